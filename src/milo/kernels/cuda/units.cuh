// The parameters of a launch, its work cut into parts, and the producer that keeps the ring full across them.
//
// A *unit* is a work item times a row tile of the matrix, over all of K. Units stand in a line (for gate_up an item's
// row tiles one after the other; for down a row tile's items, since their sum is one result), each cut into `quanta`
// equal runs of K, and every block takes an equal stretch of that line: no rounds, no idle blocks at the end. A stretch
// may begin or end inside a *sum* (a unit; where down adds items up by itself, all units of a row tile): the block that
// has the sum's first quantum adds up, the others leave theirs in `carry`. Row tiles of V are cut likewise, come first,
// and are weighed against the line.
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
  float* partial;        // down, where combine follows: [pairs][64 * row_tiles]
  float* carry;          // [blocks][SLICE or 64 * tokens]
  const void* choice_weights;  // [pairs]; null: ones
  const u16* bias;       // down: [N] or null
  int* counters;         // of this launch, zero at its start: see Counters
  int* others;           // of the launch that runs before or after, to be zeroed; null: this one zeroes its own
  int tokens, topk, in_features, row_tiles, rows, row_divisor;
  int quanta, v_cost;    // runs of K a unit; quanta that a part of V counts as
  int activation, choice_weight_type;
  int add_items;         // down: a block adds up the items of a row tile
};

using Items = Table<TOKENS, MILO_PAIRS, MILO_EXPERTS>;

// Counters of a launch. Kernels zero each other's, so that no launch is spent on it.
constexpr int MAX_BLOCKS = 1024;
struct Counters {
  int carried[MAX_BLOCKS];         // 1: the block's `carry` is written
  int v_done[Items::MAX_ITEMS];    // parts of V that are finished
  int exits;                       // blocks that have ended, where a launch zeroes its own
};
static_assert(sizeof(Counters) <= MILO_COUNTER_BYTES, "the host allocates less");

constexpr int ADDED_TOKENS = 8, ADDED_PAIRS = 128;  // at most, where a block adds items up
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int REDUCE_BYTES = WARPS * SLICE * 4;
static_assert(REDUCE_BYTES >= MILO_EXPERTS * 8, "routing borrows the reduction's memory for two words an expert");
constexpr int ALONE = 4;  // steps of U that the last warp does by itself; of more, every warp takes its share

struct Scratch {
  Items items;
  float weights[ADDED_PAIRS];        // the router's, of pairs
  float sums[ADDED_TOKENS * 64];     // of a row tile
};
static_assert(RING_BYTES + REDUCE_BYTES + sizeof(Scratch) <= MILO_SHARED_BYTES, "the host allocates less");

__device__ __forceinline__ float* reduction() { return reinterpret_cast<float*>(shared + RING_BYTES); }
__device__ __forceinline__ Scratch& scratch() {
  return *reinterpret_cast<Scratch*>(shared + RING_BYTES + REDUCE_BYTES);
}
__device__ __forceinline__ Items& items() { return scratch().items; }
__device__ __forceinline__ Counters& counters(const Params& p) { return *reinterpret_cast<Counters*>(p.counters); }

// Where every block's stretch of the line begins, in quanta.
struct Cut {
  int base, extra, v_base, v_extra, v_cost, total;

  __device__ __forceinline__ explicit Cut(const Params& p) {
    const int blocks = gridDim.x, v_parts = items().v_tiles() * p.compensator.t_splits;
    total = items().items * p.row_tiles * p.quanta;
    v_base = v_parts / blocks, v_extra = v_parts - v_base * blocks;
    v_cost = p.v_cost;
    const int all = total + v_parts * v_cost;
    base = all / blocks, extra = all - base * blocks;
    if (base < v_cost * (v_base + 1)) {  // some block would have V alone and more than its share of it
      v_cost = 0;
      base = total / blocks, extra = total - base * blocks;
    }
  }
  __device__ __forceinline__ int operator()(int block) const {
    return block * base + min(block, extra) - v_cost * (block * v_base + min(block, v_extra));
  }
};

// One part of a block's work.
struct Part {
  bool is_v;
  int item, group, split;  // group: the row tile
  int from, to;            // quanta of the line (V: none)
  int first, last;         // tiles of K
  int u_steps;             // that are due with this part

  // This warp's tiles. One that adds U by itself has fewer.
  __device__ __forceinline__ int share(int warp) const {
    const int alone = u_steps && u_steps <= ALONE ? u_steps + 1 : 0;
    return min(first + divide((last - first + alone) * warp, WARPS).q, last);
  }
};

// The parts of this block in their order.
struct Walk {
  int v, at, end;

  __device__ __forceinline__ explicit Walk(const Cut& cut)
      : v(blockIdx.x), at(cut(blockIdx.x)), end(cut(blockIdx.x + 1)) {}

  template <bool ITEM_FIRST>
  __device__ __forceinline__ bool next(const Params& p, Part& part) {
    const int splits = p.compensator.t_splits, n = items().items;
    if (v < items().v_tiles() * splits) {
      const Quotient tile = divide(v, splits);
      int low = 0, high = n - 1;  // the first item whose V ends beyond this tile
      while (low < high) {
        const int middle = (low + high) / 2;
        if (items().v_end[middle] > tile.q) high = middle; else low = middle + 1;
      }
      part.is_v = true, part.item = low, part.split = tile.r;
      part.group = tile.q - (low ? items().v_end[low - 1] : 0);
      part.from = part.to = part.u_steps = 0;
      part.first = divide(p.v.ktiles * tile.r, splits).q;
      part.last = divide(p.v.ktiles * (tile.r + 1), splits).q;
      v += gridDim.x;
      return true;
    }
    if (at >= end) return false;
    const Quotient unit = divide(at, p.quanta), place = divide(unit.q, ITEM_FIRST ? n : p.row_tiles);
    const int run = min(p.quanta - unit.r, end - at);
    part.is_v = false, part.split = 0;
    part.item = ITEM_FIRST ? place.r : place.q;
    part.group = ITEM_FIRST ? place.q : place.r;
    part.from = at, part.to = at + run;
    part.first = divide(p.weights.ktiles * unit.r, p.quanta).q;
    part.last = divide(p.weights.ktiles * (unit.r + run), p.quanta).q;
    part.u_steps = part.first == 0 ? items().u_steps[part.item] : 0;
    at += run;
    return true;
  }
};

// Runs ahead of the computation by STAGES - 1 tiles, over the borders of parts.
template <bool ITEM_FIRST>
struct Producer {
  Loader load;
  Walk walk;
  int kt = 0, last = 0;  // last < 0: there is no more

  __device__ __forceinline__ Producer(const Params& p, const Walk& start, int lane, int warp) : walk(start) {
    load.policy = evict_first();
    load.in_features = p.in_features;
    load.activation = reinterpret_cast<const char*>(p.x);
    load.mine = shared_address(shared) + warp * STAGES * STAGE_BYTES + lane * 16;
    load.has_meta = lane < 16;
  }

  // Whether there is a tile for this warp; if the part has none left, in the parts that follow.
  __device__ __forceinline__ bool find(const Params& p) {
    if (kt < last) return true;
    if (last < 0) return false;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Part part;
    do {
      if (!walk.next<ITEM_FIRST>(p, part)) {
        last = -1;
        return false;
      }
      kt = part.share(warp), last = part.share(warp + 1);
    } while (kt >= last);
    const Item item = items()[part.item];
    const Matrix& m = part.is_v ? p.v : p.weights;
    long long row_tile = static_cast<long long>(item.expert) * p.row_tiles + part.group;
    if (part.is_v) row_tile = __ldg(&p.compensator.table[item.expert].x) + part.group;
    load.codes = m.codes + (row_tile * m.ktiles + kt) * CODE_BYTES + lane * 16;
    load.meta = m.meta + row_tile * m.groups * META_BYTES + lane * 16;
    load.meta_shift = m.meta_shift;
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      const int n = min(nt * 8 + lane / 4, item.count - 1);
      const int row = divide(items().pairs[item.begin + n], p.row_divisor).q;
      load.x[nt] = 2 * static_cast<u32>(row * p.in_features + kt * 64 + lane % 4 * 8);
    }
    return true;
  }
  // One tile into the slot of the ring that begins at `slot`.
  __device__ __forceinline__ void step(const Params& p, u32 slot) {
    if (find(p)) {
      load.weights(kt, slot);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        load.activations(nt, load.x[nt], load.whole(kt), slot);
        load.x[nt] += 128;
      }
      ++kt;
    }
    copy_commit();
  }
  // The first tiles: their weights at once, their activations when the kernel ahead has written them. Meanwhile a
  // slot's room for activations holds where they are.
  __device__ __forceinline__ void fill(const Params& p) {
    int filled = 0;
#pragma unroll 1
    for (; filled < STAGES - 1 && find(p); ++filled, ++kt) {
      load.weights(kt, filled * STAGE_BYTES);
      const bool whole = load.whole(kt);
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        *note(filled, nt) = make_uint2(load.x[nt], whole);
        load.x[nt] += 128;
      }
    }
    wait_for_primary();
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < filled) {
#pragma unroll
        for (int nt = 0; nt < NT; ++nt) {
          const uint2 where = *note(s, nt);
          load.activations(nt, where.x, where.y, s * STAGE_BYTES);
        }
      }
      copy_commit();
    }
  }
  __device__ __forceinline__ uint2* note(int slot, int nt) const {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int at = (warp * STAGES + slot) * STAGE_BYTES + CODE_BYTES + META_BYTES + nt * 1024 + lane * 16;
    return reinterpret_cast<uint2*>(shared + at);
  }
};
