// How wide.cu divides work, and its memory.
//
// A *unit* is a work item times a group of up to WARPS row tiles of the matrix, over all of K. Each warp of a block takes
// one of the row tiles, and all of them walk over K together, a stage of SPAN tiles at a time, for which they share the
// activations. Where a group has few row tiles (the last of a matrix; V), 2 or 4 warps share one, each with every second
// or fourth of its tiles.
//
// Units stand in a line, an item's groups one after the other, measured in *ticks*: the tiles along K that a warp takes.
// Every block takes an equal stretch of that line, wherever it begins and ends; of a unit that several blocks have, the
// block with its beginning adds up what the others leave in `carry`, row tile by row tile. V's units come first in every
// block's order, cut into runs of K, and are weighed against the line. One warp describes a block's parts in shared
// memory before their turn.
#pragma once
#include "launch.cuh"

constexpr int SPAN = 4;        // tiles along K of a stage of activations
constexpr int BUFFERS = 4;     // of such stages: one that slow warps are still at, one in work, two that come
constexpr int META_SLOTS = 8;  // of a warp's metadata, which are needed once more at the end of a stage
static_assert(SPAN + STAGES - 1 <= META_SLOTS);

constexpr int RING_BYTES = STAGES * CODE_BYTES + META_SLOTS * META_BYTES;  // of a warp
constexpr int X_BYTES = 1024 * NT;                                        // of a tile along K
constexpr int SUM_PITCH = 8 * (NT | 1);                                   // words; no bank conflicts
constexpr int SUM_WORDS = HALVES * SPAN * SUM_PITCH;
constexpr int SLICE = 64 * TOKENS;  // floats of a row tile's sums

struct alignas(16) Part {
  int row_tile;        // the first, in its matrix
  int end;             // of its unit, in ticks of the line
  short first, last;   // tiles along K
  short item, group;   // group: the first row tile, among its expert's
  u8 rows, log_ways;   // row tiles; log2 of the warps that share one
  short split;         // the run of K of V x, or -1
  short begin, count;  // of the item's pairs
  int u_first;         // the expert's entry of the compensators' table, where matrices are not stacked
  short v_tiles, u_steps;

  __device__ __forceinline__ bool is_v() const { return split >= 0; }
};
static_assert(sizeof(Part) == 32);

constexpr int QUEUE = 2 * WARP;
constexpr int LAG = 16;  // so many parts on, nobody reads what is to be overwritten: warps are two stages apart at most

struct Scratch {
  Part parts[QUEUE];
  Barrier ready[BUFFERS];  // a stage's activations are there, and the stage before the last has been left by all
  Cut cut;
  int v_parts, part_count, start, end, first_unit;
  Items items;
};

constexpr int X_AT = WARPS * RING_BYTES, SUMS_AT = X_AT + BUFFERS * SPAN * X_BYTES;
constexpr int SCRATCH_AT = SUMS_AT + BUFFERS * SUM_WORDS * 4;
static_assert(SCRATCH_AT + sizeof(Scratch) <= MILO_SHARED_BYTES, "the host allocates less");
static_assert(BUFFERS * SPAN * X_BYTES >= Items::sorting_bytes(WARPS), "routing borrows the activations' memory");

__device__ __forceinline__ Scratch& scratch() { return *reinterpret_cast<Scratch*>(shared + SCRATCH_AT); }
__device__ __forceinline__ Items& items() { return scratch().items; }

// log2 of the warps that share a row tile, where a group has so many of them.
__device__ __forceinline__ int log_ways(int rows) { return rows * 4 <= WARPS ? 2 : rows * 2 <= WARPS ? 1 : 0; }

// A warp's place in a part: which row tile, and which of its tiles.
struct Place {
  int row, way, log;
  bool active;

  __device__ __forceinline__ explicit Place(const Part& part) : way(0), log(part.log_ways) {
    row = static_cast<int>(threadIdx.x / WARP);
    const int warps = WARPS >> log;
    for (; row >= warps && way < (1 << log) - 1; row -= warps) ++way;
    active = row < part.rows;
  }
};

// The line: an item's `groups` units of `whole` ticks and one of `rest` ticks, which may be none.
struct Line {
  int groups, whole, rest, length;

  __device__ __forceinline__ explicit Line(const Params& p) : whole(p.weights.ktiles) {
    const Quotient all = divide(p.row_tiles, WARPS);
    const int log = log_ways(all.r);
    groups = all.q, rest = all.r ? (whole + (1 << log) - 1) >> log : 0;
    length = groups * whole + rest;
  }
  __device__ __forceinline__ int units() const { return groups + (rest > 0); }  // of an item
  __device__ __forceinline__ int unit(int tick) const {
    const Quotient item = divide(tick, length);
    return item.q * units() + min(divide(item.r, whole).q, groups);
  }
};

// One warp: what this block does. All items are known.
__device__ __forceinline__ void plan(const Params& p) {
  const Line line(p);
  Scratch& s = scratch();
  const Cut cut(items().items * line.length, items().v_tiles() * p.compensator.t_splits, p.v_cost);
  s.cut = cut;  // every lane the same
  s.start = cut(blockIdx.x), s.end = cut(blockIdx.x + 1), s.v_parts = cut.v_parts();
  s.first_unit = s.end > s.start ? line.unit(s.start) : 0;
  s.part_count = s.v_parts + (s.end > s.start ? line.unit(s.end - 1) - s.first_unit + 1 : 0);
  __syncwarp();
}

// One warp, a lane a part: the parts from `base` on into the queue.
__device__ __forceinline__ void describe(const Params& p, int base) {
  const Scratch& s = scratch();
  const int at = base + static_cast<int>(threadIdx.x % WARP);
  if (at >= s.part_count) return;
  Part part;
  part.split = -1, part.end = 0;
  int4 entry = {};
  int number;
  if (at < s.v_parts) {
    const Quotient group = divide(blockIdx.x + at * gridDim.x, p.compensator.t_splits);
    int first = 0, last = items().items - 1;  // the first item whose V ends beyond this group
#pragma unroll 1
    while (first < last) {
      const int middle = (first + last) / 2;
      if (items().v_end[middle] > group.q) last = middle; else first = middle + 1;
    }
    number = first;
    entry = p.compensator.stacked ? make_int4(0, p.compensator.t_stride / 64, 0, 0)
                                  : __ldg(p.compensator.table + items().expert[number]);
    const int row = (group.q - (first ? items().v_end[first - 1] : 0)) * WARPS;
    part.group = static_cast<short>(row), part.rows = static_cast<u8>(min(WARPS, entry.y - row));
    part.row_tile = entry.x + row;
    part.split = static_cast<short>(group.r);
    part.first = static_cast<short>(divide(p.v.ktiles * group.r, p.compensator.t_splits).q);
    part.last = static_cast<short>(divide(p.v.ktiles * (group.r + 1), p.compensator.t_splits).q);
  } else {
    const Line line(p);
    const Quotient unit = divide(s.first_unit + at - s.v_parts, line.units());
    number = unit.q;
    const int start = unit.q * line.length + unit.r * line.whole;
    part.end = start + (unit.r < line.groups ? line.whole : line.rest);
    const int row = unit.r * WARPS;
    part.group = static_cast<short>(row), part.rows = static_cast<u8>(min(WARPS, p.row_tiles - row));
    part.row_tile = items().expert[number] * p.row_tiles + row;
    const int log = log_ways(part.rows);
    if (p.compensator.t_stride && !p.compensator.stacked) entry = __ldg(p.compensator.table + items().expert[number]);
    part.first = static_cast<short>(max(s.start - start, 0) << log);
    part.last = static_cast<short>(min((min(s.end, part.end) - start) << log, p.weights.ktiles));
  }
  const Item item = items()[number];
  part.log_ways = static_cast<u8>(log_ways(part.rows));
  part.item = static_cast<short>(number);
  part.begin = static_cast<short>(item.begin), part.count = static_cast<short>(item.count);
  part.v_tiles = static_cast<short>(entry.y), part.u_first = entry.z, part.u_steps = static_cast<short>(entry.w);
  scratch().parts[at % QUEUE] = part;
}

// Parts that a warp knows to be described when it begins the part of this number.
__device__ __forceinline__ int described(int number) {
  const int behind = number - LAG - 4;  // that of the describing warp, for certain
  return min(scratch().part_count, QUEUE + (behind > 0 ? behind / WARP * WARP : 0));
}
// One warp, when it begins that part.
__device__ __forceinline__ void describe_more(const Params& p, int number) {
  if (number > LAG && (number - LAG) % WARP == 0) describe(p, QUEUE + (number - LAG) - WARP);
}

__device__ __forceinline__ void prepare(const Params& p) {
  auto& memory = *reinterpret_cast<Items::Sorting*>(shared + X_AT);
  u32* sizes = memory.spare;
  const bool compensated = p.compensator.t_stride > 0;
  auto gather = [&](int thread, int threads) {  // groups of V's row tiles
    if (!compensated) return;
#pragma unroll 2
    for (int i = thread; i < p.routing.experts; i += threads) {
      const int tiles = p.compensator.stacked ? p.compensator.t_stride / 64 : __ldg(&p.compensator.table[i].y);
      sizes[i] = (tiles + WARPS - 1) / WARPS;
    }
  };
  if (p.routing.ids) {
    items().build(p.routing, p.row_divisor, &memory, gather);
  } else {
    items().build_plain(p.routing);
    gather(threadIdx.x, THREADS);
  }
  __syncthreads();
  if (threadIdx.x < WARP) {
    if (threadIdx.x == 0) {
      for (int b = 0; b < BUFFERS; ++b) barrier_init(&scratch().ready[b], WARPS);
    }
    items().add_compensators(compensated ? sizes : nullptr);
    plan(p);
    describe(p, 0);
    describe(p, WARP);
  }
  __syncthreads();
}
