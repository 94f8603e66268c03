// Hopper on a CPU, for tests: takes the place of the kernels' hopper.cuh and wgmma.cuh, on top of primitives.cuh here.
//
// What is asynchronous happens late: a bulk copy when somebody waits for a barrier, a product when it is waited for, so
// that reading too early, and overwriting too early, show. Products read shared memory in the layout that wgmma wants.
#pragma once
#include <deque>
#include <map>

#include "primitives.cuh"

namespace emulator {

[[noreturn]] inline void fail(const char* why) { std::fprintf(stderr, "%s\n", why), std::exit(7); }
inline char* at(u32 address, u32 bytes) {
  Block& block = *now->block;
  if (address % std::min(bytes, 16u) || address + bytes > block.memory.size()) fail("a shared address is out of place");
  return block.memory.data() + address;
}

// An mbarrier, in the eight bytes that it has on the device too.
struct Phase {
  u8 count, left, number, unused;
  int bytes;  // announced and not yet there
};
inline Phase& phase(u32 barrier) { return *reinterpret_cast<Phase*>(at(barrier, 8)); }
inline void check(Phase& p) {
  if (p.left > p.count) fail("more arrivals than the barrier expects");
  if (p.left == 0 && p.bytes == 0) p.left = p.count, ++p.number;
}

struct Bulk { u32 to; const void* from; u32 bytes, barrier; };
inline std::map<Block*, std::deque<Bulk>> bulks;
inline void land_one() {
  auto& queue = bulks[now->block];
  if (queue.empty()) return;
  const Bulk copy = queue.front();
  queue.pop_front();
  std::memcpy(at(copy.to, copy.bytes), copy.from, copy.bytes);
  phase(copy.barrier).bytes -= copy.bytes;
  check(phase(copy.barrier));
}

struct Named { int arrived = 0; long generation = 0; };
inline std::map<std::pair<Block*, int>, Named> named;

struct Product { const u32* a; float* d; u32 b; int columns; };  // a is read late: the registers must still be there
inline std::map<Fiber*, std::deque<std::vector<Product>>> products;

template <bool B16>
float number(u16 h) {
  return B16 ? bfloat(h) : half(h);
}
// This lane's part of D += A * B: rows lane / 4 and 8 more, of columns 8 * j two.
template <bool B16>
void multiply(const Product& mine) {
  struct Lane { u32 a[4], b; };
  const Lane* lanes = exchange(Lane{{mine.a[0], mine.a[1], mine.a[2], mine.a[3]}, mine.b});
  for (int i = 0; i < 32; ++i) {
    if (lanes[i].b != mine.b) fail("lanes disagree about an operand");
  }
  const int lane = now->thread.x % 32;
  const u32 start = (mine.b & 0x3fff) << 4;
  for (int i = 0; i < mine.columns / 2; ++i) {
    const int row = i / 2 % 2, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = mine.d[i];
    for (int k = 0; k < 16; ++k) {
      const u32 pair = lanes[lane / 4 * 4 + k % 8 / 2].a[k / 8 * 2 + row];
      u32 from = start + column * 128 + k * 2;
      from ^= from / 128 % 8 * 16;  // the swizzle goes by the address
      u16 b;
      std::memcpy(&b, at(from, 2), 2);
      sum += number<B16>(static_cast<u16>(pair >> k % 2 * 16)) * number<B16>(b);
    }
    mine.d[i] = sum;
  }
}

}  // namespace emulator

inline float __uint_as_float(u32 u) { return emulator::float_of(u); }
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
  const u64 both = static_cast<u64>(y) << 32 | x;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<u32>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

inline char* shared_memory() { return shared; }  // offsets, so on any boundary
inline void barrier_init(u32 barrier, int count) {
  emulator::phase(barrier) = {static_cast<u8>(count), static_cast<u8>(count), 0, 0, 0};
}
inline void barrier_init_done() {}
inline void barrier_arrive(u32 barrier) {
  --emulator::phase(barrier).left;
  emulator::check(emulator::phase(barrier));
}
inline void barrier_expect(u32 barrier, u32 bytes) {
  emulator::phase(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
inline void barrier_wait(u32 barrier, u32 parity) {
  while ((emulator::phase(barrier).number & 1) == parity) {
    emulator::land_one();
    emulator::give_way();
  }
}
inline bool barrier_passed(u32 barrier, u32 parity) {
  return __ballot_sync(~0u, (emulator::phase(barrier).number & 1) != parity);
}
inline void named_arrive(int name, int threads) {
  auto& barrier = emulator::named[{emulator::now->block, name}];
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.generation;
}
inline void named_barrier(int name, int threads) {
  auto& barrier = emulator::named[{emulator::now->block, name}];
  const long before = barrier.generation;
  named_arrive(name, threads);
  while (barrier.generation == before) emulator::give_way();
}

inline void copy_row(u32 to, const void* from) { copy_later(to, from, 16); }
inline void copy_word(u32 to, const void* from) { std::memcpy(emulator::at(to, 4), from, 4); }
inline void copies_wait() {}
inline void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier, u64) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("a bulk copy is not on 16 bytes");
  emulator::bulks[emulator::now->block].push_back({to, from, bytes, barrier});
}
inline void prefetch(const void* from) { static_cast<void>(*static_cast<const volatile char*>(from)); }
inline u64 evict_normal() { return 0; }
inline void fence_for_tensor_core() {}
inline bool elect() { return lane_id() == 0; }
inline float fast_silu(float g) { return g / (1 + std::exp(-g)); }
template <int REGISTERS>
void give_registers() {}
template <int REGISTERS>
void take_registers() {}
inline int load_relaxed(const int* p) { return *p; }
inline u32 load_shared_word(u32 from) {
  u32 v;
  std::memcpy(&v, emulator::at(from, 4), 4);
  return v;
}
inline void store_shared_word(u32 to, u32 v) { std::memcpy(emulator::at(to, 4), &v, 4); }
inline uint2 load_shared_pair(u32 from) {
  uint2 v;
  std::memcpy(&v, emulator::at(from, 8), 8);
  return v;
}
inline int uniform(int n) {
  const int* all = emulator::exchange(n);
  for (int i = 0; i < 32; ++i) {
    if (all[i] != n) emulator::fail("lanes disagree about a number of the warp's");
  }
  return n;
}
inline void store_transposed(u32 to, const u32 (&v)[4]) {
  const u32* all = emulator::exchange(to);
  const int lane = lane_id();
  for (int i = 0; i < 8; ++i) {
    const u16 h = static_cast<u16>(v[i / 2] >> i % 2 * 16);
    std::memcpy(emulator::at(all[i / 2 * 8 + lane % 4 * 2 + i % 2] + lane / 4 * 2, 2), &h, 2);
  }
}
template <bool B16>
u32 mul2(u32 a, u32 b) {
  return fma2<B16>(a, b, 0x80008000u);
}

inline u32 operand(u32 address) { return address >> 4; }
constexpr u32 NEXT_16 = 2;
inline void products_begin() {}
inline void products_commit() { emulator::products[emulator::now].emplace_back(); }
template <int PENDING>
void products_wait() {
  auto& groups = emulator::products[emulator::now];
  while (groups.size() > PENDING + 1) {
    for (const auto& one : groups.front()) emulator::multiply<MILO_BF16>(one);
    groups.pop_front();
  }
}
template <bool B16, int WIDTH>
void product(float* d, const u32* a, u32 b) {
  auto& groups = emulator::products[emulator::now];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({a, d, b, WIDTH});
}
