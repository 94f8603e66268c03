// The parameters of a launch, its work cut into parts, and the producer that keeps the ring full across them.
//
// A *unit* is a work item times a row tile of the matrix, over all of K. Units stand in a line (for gate_up an item's
// row tiles one after the other; for down a row tile's items, since their sum is one result), each cut into `quanta`
// equal runs of K, and every block takes an equal stretch of that line: no rounds, no idle blocks at the end. A stretch
// may begin or end inside a *sum* (a unit; where down adds items up by itself, all units of a row tile): the block that
// has the sum's first quantum adds up, the others leave theirs in `carry`. Row tiles of V are cut likewise, come first,
// and are weighed against the line. One warp describes a block's parts in shared memory long before their turn, so that
// the others have nothing to work out.
#pragma once
#include "tile.cuh"

constexpr int ALONE = 4;  // steps of U that the last warp does by itself; of more, every warp takes its share

// One part of a block's work.
struct alignas(16) Part {
  u32 tile, meta;            // its first tile, and the row tile's first metadata record, in their matrix
  short first, last;         // tiles of K
  short item, group;         // group: the row tile
  short begin, count;        // of the item's pairs
  short split, u_steps;      // split: the run of K of V x, or -1; u_steps: of U that are due with this part
  int from, to;              // quanta of the line (V: none)

  __device__ __forceinline__ bool is_v() const { return split >= 0; }

  // The first tile of the warp in this place; the warps change places from part to part, since some have a tile more.
  // The last place adds U by itself and has fewer.
  __device__ __forceinline__ int share(int place) const {
    const int alone = u_steps && u_steps <= ALONE ? u_steps + 1 : 0;
    return min(first + static_cast<int>(static_cast<u32>((last - first + alone) * place) / WARPS), static_cast<int>(last));
  }
};
static_assert(sizeof(Part) == 32);
__device__ __forceinline__ int place_in(int number) {
  return static_cast<int>((threadIdx.x / WARP + static_cast<u32>(number)) % WARPS);
}

constexpr int ADDED_TOKENS = 8, ADDED_PAIRS = 128;  // at most, where a block adds items up
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int REDUCE_BYTES = BUFFERS * WARPS * SLICE * 4;
static_assert(REDUCE_BYTES >= Items::sorting_bytes(WARPS), "routing borrows the reduction's memory");

// What a block does: the first `v_parts` of its `parts` are V's.
struct Stretch {
  int start, end, first_unit, v_parts, parts;
};

// The queue of parts. A warp's next STAGES - 1 tiles lie within WARPS * STAGES parts, since in WARPS parts it takes every place
// once; it must never find the queue empty, or its ring would lose step.
constexpr int QUEUE = 4 * WARP;
static_assert(WARPS * STAGES <= WARP + WARP / 2);

struct Scratch {
  Part parts[QUEUE];
  float weights[ADDED_PAIRS];        // the router's, of pairs
  float sums[ADDED_TOKENS * 64];     // of a row tile
  Stretch stretch;
  Barrier full[BUFFERS], empty[BUFFERS];  // slices written; read
  Barrier added, described;               // a part's sums added to the row tile's; 32 more parts in the queue
  Items items;
};
static_assert(RING_BYTES + REDUCE_BYTES + sizeof(Scratch) <= MILO_SHARED_BYTES, "the host allocates less");

__device__ __forceinline__ float* reduction() { return reinterpret_cast<float*>(shared + RING_BYTES); }
__device__ __forceinline__ Scratch& scratch() {
  return *reinterpret_cast<Scratch*>(shared + RING_BYTES + REDUCE_BYTES);
}
__device__ __forceinline__ Items& items() { return scratch().items; }

__device__ __forceinline__ Cut cut_of(const Params& p) {
  return Cut(items().items * p.row_tiles * p.quanta, items().v_tiles() * p.compensator.t_splits, p.v_cost);
}

// One warp: what this block does. All items are known.
__device__ __forceinline__ void plan_stretch(const Params& p) {
  const Cut cut = cut_of(p);
  Stretch s;
  s.start = cut(blockIdx.x), s.end = cut(blockIdx.x + 1);
  s.first_unit = divide(s.start, p.quanta).q;
  s.v_parts = cut.v_parts();
  s.parts = s.v_parts + (s.end > s.start ? divide(s.end - 1, p.quanta).q - s.first_unit + 1 : 0);
  scratch().stretch = s;  // every lane the same
  __syncwarp();
}

// One warp, a lane a part: the parts from `base` on into the queue.
template <bool ITEM_FIRST>
__device__ __forceinline__ void describe(const Params& p, int base) {
  const Stretch& s = scratch().stretch;
  const int at = base + threadIdx.x % WARP, n = items().items;
  if (at < s.parts) {
    Part part;
    part.from = part.to = part.u_steps = 0;
    part.split = -1;
    const Matrix& m = at < s.v_parts ? p.v : p.weights;
    int number, pieces, low, high, row_tile;  // run of K from low / pieces to high / pieces
    if (at < s.v_parts) {
      const Quotient tile = divide(blockIdx.x + at * gridDim.x, p.compensator.t_splits);
      int first = 0, last = n - 1;  // the first item whose V ends beyond this tile
#pragma unroll 1
      while (first < last) {
        const int middle = (first + last) / 2;
        if (items().v_end[middle] > tile.q) last = middle; else first = middle + 1;
      }
      number = first;
      part.group = static_cast<short>(tile.q - (first ? items().v_end[first - 1] : 0));
      part.split = static_cast<short>(tile.r);
      pieces = p.compensator.t_splits, low = tile.r, high = low + 1;
      row_tile = __ldg(&p.compensator.table[items().expert[number]].x) + part.group;
    } else {
      const int unit = s.first_unit + at - s.v_parts;
      const Quotient place = divide(unit, ITEM_FIRST ? n : p.row_tiles);
      number = ITEM_FIRST ? place.r : place.q;
      part.group = static_cast<short>(ITEM_FIRST ? place.q : place.r);
      part.from = max(s.start, unit * p.quanta), part.to = min(s.end, (unit + 1) * p.quanta);
      pieces = p.quanta, low = part.from - unit * p.quanta, high = part.to - unit * p.quanta;
      if (low == 0) {
        const Compensator& c = p.compensator;
        part.u_steps = c.stacked && c.t_stride ? __ldg(&c.table[c.entry(0, part.group)].w) : items().u_steps[number];
      }
      row_tile = items().expert[number] * p.row_tiles + part.group;
    }
    const Item item = items()[number];
    part.item = static_cast<short>(number);
    part.begin = static_cast<short>(item.begin), part.count = static_cast<short>(item.count);
    part.first = static_cast<short>(divide(m.ktiles * low, pieces).q);
    part.last = static_cast<short>(divide(m.ktiles * high, pieces).q);
    part.tile = static_cast<u32>(row_tile) * m.ktiles + part.first;
    part.meta = static_cast<u32>(row_tile) * m.groups;
    scratch().parts[at % QUEUE] = part;
  }
}

// Runs ahead of the computation by STAGES - 1 tiles, over the borders of parts.
struct Producer {
  Loader load;
  int next = 0, known;  // the part that comes next; parts that this warp knows to be in the queue
  int kt = 0, last = 0;

  __device__ __forceinline__ Producer(const Params& p, int lane, int warp) : known(min(2 * WARP, scratch().stretch.parts)) {
    load.policy = evict_first();
    load.in_features = p.in_features;
    load.activation = reinterpret_cast<const char*>(p.x);
    load.mine = shared_address(shared) + warp * STAGES * STAGE_BYTES + lane * 16;
    load.has_meta = lane < 16;
  }

  // Whether there is a tile for this warp; if the part has none left, in the parts that follow.
  __device__ __forceinline__ bool find(const Params& p) {
    if (kt < last) return true;
    const int lane = threadIdx.x % WARP;
#pragma unroll 1
    while (next < known) {
      const int place = place_in(next);
      const Part part = scratch().parts[next++ % QUEUE];
      kt = part.share(place), last = part.share(place + 1);
      if (kt >= last) continue;
      const Matrix& m = part.is_v() ? p.v : p.weights;
      load.codes = m.codes + static_cast<u64>(part.tile + kt - part.first) * CODE_BYTES + lane * 16;
      load.meta = m.meta + static_cast<u64>(part.meta) * META_BYTES + lane * 16;
      load.meta_shift = m.meta_shift;
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const int n = min(nt * 8 + lane / 4, part.count - 1);
        const u32 row = items().rows[part.begin + n];
        load.x[nt] = 2 * (row * p.in_features + kt * 64 + lane % 4 * 8);
      }
      return true;
    }
    return false;
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
