// CUDA on a CPU, for tests: takes the place of the kernels' primitives.cuh, the only file of theirs that holds PTX.
//
// Every CUDA thread is a fiber and all blocks of a launch are in flight at once, one fiber running at a time; a fiber
// gives way at barriers, warp operations and spinning. Asynchronous copies happen only when they are waited for, so
// that reading too early shows; shared and global memory are plain memory.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using std::max;
using std::min;

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct int4 { int x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

constexpr int WARP = 32;

namespace emulator {

struct Dim { unsigned x; };
struct Copy { char* to; const char* from; int bytes; };

struct Barrier {  // of `size` fibers
  int size = 0, arrived = 0;
  long generation = 0;
};
struct Warp {
  Barrier barrier;
  alignas(16) char slots[2][32][64];
};
struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<char> memory;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  Warp* warp;
  Dim thread, block_index;
  Barrier* waiting = nullptr;
  long generation = 0;
  bool done = false;
  int operation = 0;
  std::vector<std::vector<Copy>> groups{1};
};

inline Fiber* now;
inline ucontext_t scheduler;
inline Dim grid, block_size;
inline std::function<void()> body;

inline void give_way() { swapcontext(&now->context, &scheduler); }
inline void arrive(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  now->waiting = &barrier;
  now->generation = barrier.generation;
  give_way();
}
inline void start() {
  body();
  now->done = true;
  give_way();
}

// Deposit a value, meet the warp's other lanes, and read theirs.
template <typename T>
const T* exchange(const T& mine) {
  static_assert(sizeof(T) <= 64);
  Warp& warp = *now->warp;
  const int parity = now->operation++ % 2;
  std::memcpy(warp.slots[parity][now->thread.x % 32], &mine, sizeof(T));
  arrive(warp.barrier);
  static T all[32];  // read before anybody else runs
  for (int i = 0; i < 32; ++i) std::memcpy(&all[i], warp.slots[parity][i], sizeof(T));
  return all;
}

inline void launch(unsigned blocks, unsigned threads, int shared_bytes, std::function<void()> kernel) {
  grid = {blocks}, block_size = {threads}, body = std::move(kernel);
  std::vector<std::unique_ptr<Block>> all;
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (unsigned b = 0; b < blocks; ++b) {
    all.push_back(std::make_unique<Block>());
    Block& block = *all.back();
    block.barrier.size = threads;
    block.warps.resize(threads / 32);
    for (Warp& warp : block.warps) warp.barrier.size = 32;
    block.memory.assign(shared_bytes, 0x7f);  // poison
    for (unsigned t = 0; t < threads; ++t) {
      fibers.push_back(std::make_unique<Fiber>());
      Fiber& fiber = *fibers.back();
      constexpr size_t size = 96 << 10;
      fiber.stack.reset(new char[size]);
      fiber.block = &block, fiber.warp = &block.warps[t / 32], fiber.thread = {t}, fiber.block_index = {b};
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = size;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, start, 0);
    }
  }
  size_t left = fibers.size();
  for (long idle = 0; left;) {
    bool any = false;
    for (auto& fiber : fibers) {
      if (fiber->done || (fiber->waiting && fiber->waiting->generation == fiber->generation)) continue;
      fiber->waiting = nullptr;
      now = fiber.get();
      swapcontext(&scheduler, &fiber->context);
      if (fiber->done) --left;
      any = true;
    }
    if (!any) std::fprintf(stderr, "deadlock: every thread waits at a barrier\n"), std::exit(3);
    if (++idle > 20000000) std::fprintf(stderr, "no end\n"), std::exit(4);
  }
}

inline u32 bits_of(float f) { u32 u; std::memcpy(&u, &f, 4); return u; }
inline float float_of(u32 u) { float f; std::memcpy(&f, &u, 4); return f; }
inline float half(u16 h) { _Float16 f; std::memcpy(&f, &h, 2); return static_cast<float>(f); }
inline u16 to_half(float f) { _Float16 h = static_cast<_Float16>(f); u16 u; std::memcpy(&u, &h, 2); return u; }
inline float bfloat(u16 h) { return float_of(static_cast<u32>(h) << 16); }
inline u16 to_bfloat(float f) {
  const u32 u = bits_of(f);
  return static_cast<u16>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

}  // namespace emulator

#define threadIdx (emulator::now->thread)
#define blockIdx (emulator::now->block_index)
#define gridDim (emulator::grid)
#define blockDim (emulator::block_size)
#define shared (emulator::now->block->memory.data())

inline void __syncthreads() { emulator::arrive(emulator::now->block->barrier); }
inline void __syncwarp() { emulator::arrive(emulator::now->warp->barrier); }
inline void __threadfence() {}
inline void __nanosleep(int) { emulator::give_way(); }
template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
template <typename T> void __stcg(T* p, T v) { *p = v; }
inline int atomicAdd(int* p, int v) { const int old = *p; *p += v; return old; }
inline float __int_as_float(int i) { return emulator::float_of(i); }
inline float __fdividef(float a, float b) { return a / b * (1 - 1e-7f); }
inline float __expf(float x) { return std::exp(x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(u32 x) { return __builtin_ffs(x); }
inline int __shfl_sync(u32, int v, int lane) { return emulator::exchange(v)[lane]; }
inline int __shfl_up_sync(u32, int v, int d) {
  const int lane = threadIdx.x % 32;
  const int* all = emulator::exchange(v);
  return lane >= d ? all[lane - d] : v;
}
inline u32 __match_any_sync(u32, int v) {
  const int* all = emulator::exchange(v);
  u32 same = 0;
  for (int i = 0; i < 32; ++i) same |= static_cast<u32>(all[i] == v) << i;
  return same;
}
inline u32 __ballot_sync(u32, bool v) {
  const bool* all = emulator::exchange(v);
  u32 set = 0;
  for (int i = 0; i < 32; ++i) set |= static_cast<u32>(all[i]) << i;
  return set;
}

inline int lane_id() { return threadIdx.x % WARP; }
inline u32 shared_address(const void* p) { return static_cast<u32>(static_cast<const char*>(p) - shared); }
inline u64 evict_first() { return 0; }
inline void copy_later(u32 to, const void* from, int bytes) {
  if (to % 16 || reinterpret_cast<uintptr_t>(from) % 16 || to + 16 > emulator::now->block->memory.size()) {
    std::fprintf(stderr, "a copy is misplaced or not on 16 bytes\n"), std::exit(5);
  }
  emulator::now->groups.back().push_back({shared + to, static_cast<const char*>(from), bytes});
}
inline void copy_weights(u32 to, const void* from, u64) { copy_later(to, from, 16); }
inline void copy_activations(u32 to, const void* from, int bytes) { copy_later(to, from, bytes); }
inline void copy_commit() { emulator::now->groups.emplace_back(); }
template <int PENDING>
void copy_wait() {
  auto& groups = emulator::now->groups;
  while (groups.size() > PENDING + 1) {
    for (const auto& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
    }
    groups.erase(groups.begin());
  }
}
inline uint4 load_shared(u32 from) {
  uint4 v;
  std::memcpy(&v, shared + from, 16);
  return v;
}
inline void prefetch_l2(const void* p) { *static_cast<const volatile char*>(p); }  // it must be there

inline void launch_dependents() {}
inline void wait_for_primary() {}
inline int load_acquire(const int* p) { return *p; }
inline void wait_until(const int* counter, int value) {
  while (*counter < value) emulator::give_way();
}

using Barrier = u64;  // arrivals a phase, arrivals so far, phases
inline void barrier_init(Barrier* b, int count) { *b = static_cast<u64>(count) << 48; }
inline void warp_arrive(Barrier* b) {
  __syncwarp();
  if (threadIdx.x % WARP) return;
  ++*b;
  if ((*b & 0xffff) == *b >> 48) *b = (*b & ~0xffffull) + 0x10000;
}
inline void wait_phase(Barrier* b, int phase) {
  const u32 mine = phase;
  if ((*b >> 16 & 0xffffffff) > mine + 1) std::fprintf(stderr, "a warp is phases behind\n"), std::exit(6);
  while ((*b >> 16 & 0xffffffff) <= mine) emulator::give_way();
}

template <bool B16>
void mma(float (&d)[4], const u32* a, u32 b0, u32 b1) {
  struct Operands { u32 a[4], b[2]; };
  const Operands* all = emulator::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  auto value = [](u32 pair, int i) {
    const u16 h = static_cast<u16>(pair >> (16 * i));
    return B16 ? emulator::bfloat(h) : emulator::half(h);
  };
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * q + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const u32 left = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const u32 right = all[column * 4 + k % 8 / 2].b[k / 8];
      sum += value(left, k % 2) * value(right, k % 2);
    }
    d[i] = sum;
  }
}
template <bool B16>
u32 fma2(u32 a, u32 b, u32 c) {
  auto value = [](u32 pair, int i) {
    const u16 h = static_cast<u16>(pair >> i);
    return static_cast<double>(B16 ? emulator::bfloat(h) : emulator::half(h));
  };
  u32 d = 0;
  for (int i = 0; i < 32; i += 16) {
    const float v = static_cast<float>(std::fma(value(a, i), value(b, i), value(c, i)));
    d |= static_cast<u32>(B16 ? emulator::to_bfloat(v) : emulator::to_half(v)) << i;
  }
  return d;
}
inline u32 and_or(u32 a, u32 mask, u32 bits) { return (a & mask) | bits; }
inline float from_fp16(u16 h) { return emulator::half(h); }
inline float from_bf16(u16 h) { return emulator::bfloat(h); }
template <bool B16>
u16 round_to_16(float f) { return B16 ? emulator::to_bfloat(f) : emulator::to_half(f); }
template <bool B16>
u32 pair_16(float low, float high) { return round_to_16<B16>(low) | static_cast<u32>(round_to_16<B16>(high)) << 16; }
inline u32 pair_bf16(float low, float high) { return pair_16<true>(low, high); }
