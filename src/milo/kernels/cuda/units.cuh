// The parameters of a launch, its units of work, and the producer that keeps the ring full across them.
#pragma once
#include "tile.cuh"

struct Compensator {
  const u32* u_codes;   // steps of 16 ranks, 96 words each
  const u16* u_scales;  // [steps][parts][16] fp16
  const int4* table;    // an expert: {first V row tile, V row tiles, first U step, U steps a row tile}
  float* t;             // [splits][pairs][t_stride]
  int t_stride, t_splits;
};

struct Params {
  Routing routing;
  Matrix weights, v;
  Compensator compensator;
  const u16* x;
  void* out;             // gate_up: h [pairs, I]; down: y [tokens, N]; 16-bit
  float* partial;        // down: [pairs][splits][64 * row_tiles]
  const void* choice_weights;  // [pairs]; null: ones
  const u16* bias;       // down: [N] or null
  int* arrivals;         // down: [groups], zero at its start
  int* v_done;           // [items], zero at the start
  int* to_clear;         // clear, or gate_up where nothing was cleared: counters to zero
  int clear_count;
  int tokens, topk, in_features, row_tiles, rows, row_divisor, splits;
  int v_row_tiles;       // the most of any expert
  int activation, choice_weight_type;
  int k_warps;           // warps of a block that share a row tile; the others take the next ones
  int block_row_tiles;   // WARPS / k_warps
  int groups;            // of block_row_tiles row tiles, the last perhaps not full
  int combine_later;     // down: the sum is another launch
};

extern __shared__ __align__(16) char shared[];

using Items = Table<TOKENS, MILO_PAIRS, MILO_EXPERTS>;
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int REDUCE_BYTES = WARPS * TOKENS * PITCH * 4;
static_assert(REDUCE_BYTES >= MILO_EXPERTS * 4, "the routing's counts borrow the reduction's memory");

__device__ __forceinline__ float* reduction() { return reinterpret_cast<float*>(shared + RING_BYTES); }
__device__ __forceinline__ Items& items() { return *reinterpret_cast<Items*>(shared + RING_BYTES + REDUCE_BYTES); }

// The units of a launch, numbered: first (item, V row tile, split), then the matrix's own.
struct Unit {
  int item;        // -1: past the end
  bool is_v;
  int group;       // of row tiles, or the V row tile
  int split;
  int row_tile;    // this warp's, within the expert
  int share, shares;

  __device__ __forceinline__ Unit(const Params& p, int number, bool item_first) {
    const int warp = threadIdx.x / WARP, n = items().items;
    const int v_splits = p.compensator.t_splits, v_units = n * p.v_row_tiles * v_splits;
    if (number < v_units) {
      is_v = true;
      const Quotient by_split = divide(number, v_splits), by_tile = divide(by_split.q, p.v_row_tiles);
      split = by_split.r;
      group = row_tile = by_tile.r;
      item = by_tile.q;
      share = split * WARPS + warp, shares = v_splits * WARPS;
      return;
    }
    number -= v_units;
    is_v = false;
    if (number >= n * p.groups * p.splits) {
      item = -1;
      return;
    }
    const Quotient by_split = divide(number, p.splits), place = divide(by_split.q, item_first ? n : p.groups);
    split = by_split.r;
    item = item_first ? place.r : place.q;
    group = item_first ? place.q : place.r;
    // Beyond the matrix the last row tile is computed again and not written.
    const Quotient mine = divide(warp, p.k_warps);
    row_tile = min(group * p.block_row_tiles + mine.q, p.row_tiles - 1);
    share = split * p.k_warps + mine.r, shares = p.splits * p.k_warps;
  }
};

// Runs ahead of the computation by STAGES - 1 tiles, over the borders of units.
struct Producer {
  Loader load;
  int number, kt, last;
  bool item_first;

  __device__ __forceinline__ bool done() const { return last < 0; }

  // Settle on the unit `number` or the first after it that has a tile for this warp.
  __device__ __forceinline__ void settle(const Params& p) {
    for (;; number += gridDim.x) {
      const Unit u(p, number, item_first);
      if (u.item < 0) {
        last = -1;
        return;
      }
      const Item item = items()[u.item];
      const Matrix& m = u.is_v ? p.v : p.weights;
      long long row_tile = static_cast<long long>(item.expert) * p.row_tiles + u.row_tile;
      if (u.is_v) {
        const int4 entry = __ldg(p.compensator.table + item.expert);
        if (u.group >= entry.y) continue;
        row_tile = entry.x + u.group;
      }
      kt = divide(m.ktiles * u.share, u.shares).q;
      last = divide(m.ktiles * (u.share + 1), u.shares).q;
      if (kt >= last) continue;
      load.codes = m.codes + row_tile * m.ktiles * CODE_BYTES + load.lane * 16;
      load.meta = m.meta + row_tile * m.groups * META_BYTES + load.lane * 16;
      load.meta_shift = m.meta_shift;
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const int n = min(nt * 8 + load.lane / 4, item.count - 1);
        const long long row = divide(items().pairs[item.begin + n], p.row_divisor).q;
        load.x[nt] = reinterpret_cast<const char*>(p.x + row * p.in_features + load.lane % 4 * 8);
      }
      return;
    }
  }
  // One tile into a slot of the ring.
  __device__ __forceinline__ void step(const Params& p, int slot) {
    if (!done()) {
      load.weights(kt, slot);
      load.activations(kt, slot);
      if (++kt == last) {
        number += gridDim.x;
        settle(p);
      }
    }
    copy_commit();
  }
};
