// Exposes the kernels of prefill.cu to Python, as driver.cpp those of moe.cu.
#include "prefill.cu"

#define KERNEL(name, Parameters)                                                                          \
  extern "C" void launch_##name(unsigned blocks, unsigned threads, int shared_bytes, Parameters* params) { \
    const Parameters p = *params;                                                                         \
    emulator::bulks.clear(), emulator::named.clear(), emulator::products.clear();                         \
    emulator::launch(blocks, threads, shared_bytes, [p] { name(p); });                                    \
  }
KERNEL(prepare, Preparation)
KERNEL(multiply, Params)
KERNEL(combine, Combination)
