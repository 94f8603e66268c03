// Exposes the kernels of moe.cu or wide.cu to Python: one function a kernel, compiled with the kernels' own macros.
#include EMULATED

#define KERNEL(name)                                                                                  \
  extern "C" void launch_##name(unsigned blocks, unsigned threads, int shared_bytes, Params* params) { \
    const Params p = *params;                                                                          \
    emulator::launch(blocks, threads, shared_bytes, [p] { name(p); });                                 \
  }
KERNEL(gate_up)
KERNEL(down)
KERNEL(combine)
