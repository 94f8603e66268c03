// What a block reads ahead of its computation, over the borders of parts: each warp the tiles of its own row tiles, into a
// ring of its own, and all warps together the activations that they share.
#pragma once
#include "wide_tile.cuh"

// A warp's ring of STAGES tiles: one in use and the next ones on their way. There is one group of copies a tile.
struct Weights {
  const char *codes, *meta;  // of the next tile (meta: of its row tile), at this lane
  u32 ring;                  // at this lane's 16 bytes
  int kt = 0, last = 0, step = 1, meta_shift = 0;
  int next = 0;              // the part that comes next
  int known;                 // parts that are described
  int asked = 0, used = 0;   // tiles
  u32 to = 0, from = 0;      // slots of the ring for the next tile that is asked for and used
  bool dry = false;          // found none: starts again when all that it asked for is used
  bool has_meta;             // this lane copies metadata

  __device__ __forceinline__ explicit Weights(int lane) : known(described(0)), has_meta(HALVES == 2 || lane < 16) {
    ring = shared_address(shared) + threadIdx.x / WARP * RING_BYTES + lane * 16;
  }
  // The next part that has a tile for this warp.
  __device__ __forceinline__ void find(const Params& p) {
    if (dry) return;
    const int lane = threadIdx.x % WARP;
#pragma unroll 1
    while (next < known) {
      const Part& part = scratch().parts[static_cast<u32>(next++) % QUEUE];
      const Place place(part);
      const int first = part.first + place.way;
      if (!place.active || first >= part.last) continue;
      const Matrix& m = part.is_v() ? p.v : p.weights;
      const u64 row = part.row_tile + place.row;
      kt = first, last = part.last, step = 1 << place.log, meta_shift = m.meta_shift;
      codes = m.codes + (row * m.ktiles + kt) * CODE_BYTES + lane * 16;
      meta = m.meta + row * m.groups * META_BYTES + lane * 16;
      return;
    }
    dry = true;
  }
  static __device__ __forceinline__ u32 meta_slot(int tile) {
    return STAGES * CODE_BYTES + static_cast<u32>(tile) % META_SLOTS * META_BYTES;
  }
  static __device__ __forceinline__ u32 after(u32 slot) {
    return slot == (STAGES - 1) * CODE_BYTES ? 0 : slot + CODE_BYTES;
  }
  // The next tile, which is known to be there, into the ring.
  __device__ __forceinline__ void copy() {
#pragma unroll
    for (int j = 0; j < BITS; ++j) copy_weights(ring + to + j * 512, codes + j * 512, evict_first());
    if (has_meta) copy_weights(ring + meta_slot(asked), meta + (kt >> meta_shift) * META_BYTES, evict_first());
    codes += step * CODE_BYTES, kt += step, ++asked;
    to = after(to);
  }
  // The next `tiles` into the ring.
  __device__ __forceinline__ void ask(const Params& p, int tiles) {
#pragma unroll 1
    for (; tiles > 0; --tiles) {
      if (kt >= last) find(p);
      if (kt < last) copy();
      copy_commit();
    }
  }
  // The part of this number has a tile that is used next: see that it is there, and ask for one more. (Into the slot that
  // was used last: its codes were each lane's own, and metadata have slots enough.)
  __device__ __forceinline__ void turn(const Params& p, int number) {
    if (kt < last && asked != used) {
      copy();
      copy_commit();
    } else {
      int tiles = 1;
      if (asked == used) {  // begin again
        if (next <= number) next = number, last = kt;
        dry = false, tiles = STAGES;
      }
      ask(p, tiles);
    }
    copy_wait<STAGES - 1>();
    __syncwarp();  // other lanes copied metadata
  }
};

template <int MOST>
__device__ __forceinline__ void wait_but_for(int groups) {
  if constexpr (MOST > 0) {
    if (groups < MOST) return wait_but_for<MOST - 1>(groups);
  }
  copy_wait<MOST>();
}

// The activations of stages, each of whose 1 KB runs (8 tokens, 64 in-features) is copied and summed up by one warp.
struct Activations {
  static constexpr int RUNS = (SPAN * NT + WARPS - 1) / WARPS;  // of a warp: warp, warp + WARPS, ...
  u32 x;                      // in shared memory: this warp's first run, at this lane's 16 bytes
  int next = 0;               // the part that comes next
  int kt = 0, last = 0;
  int span = 0, tiles = 0;    // of the stage that was asked for last: tiles along K, n8 tiles of tokens
  u32 number = 0;             // stages that were asked for
  u32 from[RUNS];             // this lane's token's activations, bytes from where its run's would be in the first stage

  __device__ __forceinline__ explicit Activations(int lane)
      : x(shared_address(shared) + X_AT + threadIdx.x / WARP * 1024 + lane * 16) {}

  static __device__ __forceinline__ u32 buffer(u32 stage) { return stage % BUFFERS * SPAN * X_BYTES; }
  static __device__ __forceinline__ u32* sums(u32 stage) {
    return reinterpret_cast<u32*>(shared + SUMS_AT) + stage % BUFFERS * SUM_WORDS;
  }
  // Calls `f(i, tile along K, n8 tile)` for this warp's runs of the stage.
  template <typename F>
  __device__ __forceinline__ void for_runs(F f) const {
    const int warp = threadIdx.x / WARP;
#pragma unroll
    for (int i = 0; i < RUNS; ++i) {
      const int run = i * WARPS + warp, k = run / NT, nt = run % NT;
      if (k < span && nt < tiles) f(i, k, nt);
    }
  }
  // Ask for the next stage; `known` parts are described. Beyond K (whose last tile may be half full) there are zeros;
  // where there is no token, another's activations: the columns of an MMA do not mix, and that one's is not written.
  __device__ __forceinline__ void ask(const Params& p, int known) {
    if (kt >= last) {
      span = 0;
      if (next >= known) return;
      const Part& part = scratch().parts[static_cast<u32>(next++) % QUEUE];
      kt = part.first, last = part.last, tiles = (part.count + 7) / 8, span = SPAN;
      const int lane = threadIdx.x % WARP, begin = part.begin, count = part.count;
      for_runs([&](int i, int k, int nt) {
        const int row = items().rows[begin + min(nt * 8 + lane / 4, count - 1)];
        from[i] = 2 * (row * p.in_features + k * 64 + lane % 4 * 8);
      });
    }
    span = min(SPAN, last - kt);
    const char* column = reinterpret_cast<const char*>(p.x) + kt * 128;
    const int whole = (p.in_features - 32 - kt * 64 + 63) / 64;  // tiles from here on that are full
    for_runs([&](int i, int k, int) {
      const u32 to = x + buffer(number) + i * WARPS * 1024;
      copy_activations(to, column + from[i], 16);
      copy_activations(to + 512, column + from[i] + 64, k < whole ? 16 : 0);
    });
    kt += span, ++number;
  }
  // What this warp asked for last has arrived: sum it up, and say so.
  __device__ __forceinline__ void finish() const {
    const u32 stage = number - 1;
    for_runs([&](int i, int k, int nt) {
      sum_activations(x + buffer(stage) + i * WARPS * 1024, sums(stage) + k * SUM_PITCH + nt * 8);
    });
    warp_arrive(&scratch().ready[stage % BUFFERS]);
  }
};
