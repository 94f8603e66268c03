"""What the benchmarks call of `humming-kernels`, in plain PyTorch, under the same names and with the same meaning."""
