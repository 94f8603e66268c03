// Which expert and which tokens a block works on, found from the router's choices inside every block.
//
// A *pair* is one (token, choice); its number is token * topk + choice. Pairs are sorted by local expert, and those of
// one expert are cut into tiles of TOKENS; a work item is one such tile. Repeating this in every block costs less than
// a launch, and lets a block request its first weights before the kernel ahead of it has finished. The order is stable,
// so all blocks agree.
#pragma once
#include "arithmetic.cuh"

struct Routing {
  const void* ids;        // [tokens * topk] int32 or int64; null: one expert takes every row
  const int* expert_map;  // [map_length] global expert -> local one or -1; null: identity
  int ids_are_64, map_length, pairs, experts;
};

struct Item {
  int expert, begin, count;  // pairs[begin .. begin + count)
};

__device__ __forceinline__ int local_expert(const Routing& r, int pair) {
  long long id = r.ids_are_64 ? static_cast<const long long*>(r.ids)[pair] : static_cast<const int*>(r.ids)[pair];
  if (r.expert_map) id = (id >= 0 && id < r.map_length) ? r.expert_map[id] : -1;
  return (id >= 0 && id < r.experts) ? static_cast<int>(id) : -1;
}

template <int TOKENS, int MAX_PAIRS, int MAX_EXPERTS>
struct Table {
  static constexpr int MAX_ITEMS = MAX_PAIRS + MAX_PAIRS / TOKENS;
  short pairs[MAX_PAIRS];  // sorted by expert
  short expert[MAX_ITEMS], begin[MAX_ITEMS];
  short v_end[MAX_ITEMS];    // row tiles of V of all items up to this one
  short u_steps[MAX_ITEMS];  // of an item's expert
  int items, routed;       // work items; pairs that have a local expert

  __device__ __forceinline__ Item operator[](int i) const {
    const int e = expert[i], b = begin[i];
    int end = i + 1 < items ? begin[i + 1] : routed;
    return {e, b, end - b};
  }

  // The row tiles of V of all items.
  __device__ __forceinline__ int v_tiles() const { return items ? v_end[items - 1] : 0; }

  // `sizes` [experts]: row tiles of V, and steps of U in the upper half; null: none. All threads of the block call this
  // after `build`.
  __device__ void add_compensators(const u32* sizes) {
    const int lane = threadIdx.x % WARP;
    if (threadIdx.x < WARP) {
      int before = 0;
      for (int i = 0; i < items; i += WARP) {
        const u32 size = sizes && i + lane < items ? sizes[expert[i + lane]] : 0;
        int sum = size & 0xffff;
        for (int d = 1; d < WARP; d *= 2) {
          const int other = __shfl_up_sync(~0u, sum, d);
          if (lane >= d) sum += other;
        }
        if (i + lane < items) {
          v_end[i + lane] = static_cast<short>(before + sum);
          u_steps[i + lane] = static_cast<short>(size >> 16);
        }
        before += __shfl_sync(~0u, sum, WARP - 1);
      }
    }
    __syncthreads();
  }

  // `counts` is scratch for MAX_EXPERTS ints. All threads of the block call this.
  __device__ void build(const Routing& r, int* counts) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (!r.ids) {
      for (int i = threadIdx.x; i < r.pairs; i += blockDim.x) pairs[i] = i;
      const int n = (r.pairs + TOKENS - 1) / TOKENS;
      for (int i = threadIdx.x; i < n; i += blockDim.x) expert[i] = 0, begin[i] = i * TOKENS;
      if (threadIdx.x == 0) items = n, routed = r.pairs;
      __syncthreads();
      return;
    }
    if (r.pairs <= WARP) {
      if (warp == 0) build_small(r);
      __syncthreads();
      return;
    }
    for (int i = threadIdx.x; i < r.experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < r.pairs; i += blockDim.x) {
      const int e = local_expert(r, i);
      if (e >= 0) atomicAdd(&counts[e], 1);
    }
    __syncthreads();
    if (warp == 0) {  // a lane takes a run of experts: counts become places, and the items are listed
      const int run = (r.experts + WARP - 1) / WARP;
      const int first = min(lane * run, r.experts), last = min(first + run, r.experts);
      int total = 0, tiles = 0;
      for (int e = first; e < last; ++e) total += counts[e], tiles += (counts[e] + TOKENS - 1) / TOKENS;
      int place = total, item = tiles;
      for (int d = 1; d < WARP; d *= 2) {
        const int p = __shfl_up_sync(~0u, place, d), i = __shfl_up_sync(~0u, item, d);
        if (lane >= d) place += p, item += i;
      }
      if (lane == WARP - 1) items = item, routed = place;
      place -= total, item -= tiles;
      for (int e = first; e < last; ++e) {
        const int n = counts[e];
        counts[e] = place;
        for (int b = 0; b < n; b += TOKENS, ++item) expert[item] = e, begin[item] = place + b;
        place += n;
      }
      __syncwarp();
      for (int i = 0; i < r.pairs; i += WARP) {
        const int e = i + lane < r.pairs ? local_expert(r, i + lane) : -1;
        const u32 same = __match_any_sync(~0u, e);
        int at = e >= 0 ? counts[e] : 0;
        __syncwarp();
        if (e >= 0) {
          pairs[at + __popc(same & ((1u << lane) - 1))] = i + lane;
          if (__ffs(same) - 1 == lane) counts[e] = at + __popc(same);
        }
        __syncwarp();
      }
    }
    __syncthreads();
  }

  // At most 32 pairs: one warp, a lane a pair, experts in the order of first appearance.
  __device__ __forceinline__ void build_small(const Routing& r) {
    const int lane = threadIdx.x % WARP;
    const int e = lane < r.pairs ? local_expert(r, lane) : -1;
    const u32 same = __match_any_sync(~0u, e);
    const int rank = __popc(same & ((1u << lane) - 1)), leader = __ffs(same) - 1;
    const bool opens = e >= 0 && rank % TOKENS == 0;  // this pair is the first of an item
    const u32 leaders = __ballot_sync(~0u, e >= 0 && rank == 0);
    int place = 0, item = 0;  // of this lane's expert
    for (u32 rest = leaders; rest; rest &= rest - 1) {
      const int other = __ffs(rest) - 1, n = __popc(__shfl_sync(~0u, same, other));
      if (other < leader) place += n, item += (n + TOKENS - 1) / TOKENS;
    }
    if (e >= 0) pairs[place + rank] = lane;
    if (opens) expert[item + rank / TOKENS] = e, begin[item + rank / TOKENS] = place + rank;
    const u32 all = __ballot_sync(~0u, opens), some = __ballot_sync(~0u, e >= 0);
    if (lane == 0) items = __popc(all), routed = __popc(some);
  }
};
