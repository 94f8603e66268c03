"""Kernels of the solver: what `milo.solve` does group by group, in Triton.

`groups` and `gram` hold the kernels, `calls` what the solver calls. Nothing here is imported on a machine without a
GPU: Triton comes with PyTorch's CUDA builds only.
"""
