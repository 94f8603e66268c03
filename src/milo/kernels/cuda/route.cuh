// Which expert and which tokens a block works on, found from the router's choices inside every block.
//
// A *pair* is one (token, choice); its number is token * topk + choice. Pairs of one local expert, in order, are cut
// into tiles of TOKENS; a work item is one such tile. Repeating this in every block costs less than a launch, and lets
// a block prefetch its weights before the kernel ahead of it has finished.
#pragma once
#include "primitives.cuh"

struct Routing {
  const void* ids;        // [tokens * topk] int32 or int64; null: one expert takes every row
  const int* expert_map;  // [map_length] global expert -> local one or -1; null: identity
  int ids_are_64, map_length, pairs, experts;
};

struct Item {
  int expert;  // local expert, or -1: this item number is beyond the work there is
  int count;   // pairs of this item, in list[0..count)
};

__device__ __forceinline__ int local_expert(const Routing& r, int pair) {
  long long id = r.ids_are_64 ? static_cast<const long long*>(r.ids)[pair] : static_cast<const int*>(r.ids)[pair];
  if (r.expert_map) id = (id >= 0 && id < r.map_length) ? r.expert_map[id] : -1;
  return (id >= 0 && id < r.experts) ? static_cast<int>(id) : -1;
}

// Shared scratch: `histogram[experts]`, `chosen[pairs]`, `sums[WARPS]`, `list[TOKENS]`.
template <int TOKENS, int WARPS>
__device__ Item find_item(const Routing& r, int item, int* histogram, short* chosen, int* sums, int* list) {
  constexpr int THREADS = WARPS * WARP;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  Item found{-1, 0};
  if (!r.ids) {
    found.count = min(TOKENS, r.pairs - item * TOKENS);
    if (found.count > 0) {
      found.expert = 0;
      if (threadIdx.x < found.count) list[threadIdx.x] = item * TOKENS + threadIdx.x;
    }
    __syncthreads();
    return found;
  }
  int e = r.pairs <= WARP && lane < r.pairs ? local_expert(r, lane) : -1;
  u32 same = __match_any_sync(~0u, e);
  if (r.pairs <= WARP && !__any_sync(~0u, e >= 0 && __popc(same) > TOKENS)) {
    // One warp's worth and one tile an expert: items in the order of first appearance.
    u32 leaders = __ballot_sync(~0u, e >= 0 && __ffs(same) - 1 == lane);
    if (item < __popc(leaders)) {
      for (int i = 0; i < item; ++i) leaders &= leaders - 1;
      int leader = __ffs(leaders) - 1;
      found.expert = __shfl_sync(~0u, e, leader);
      same = __shfl_sync(~0u, same, leader);
      found.count = __popc(same);
      if (warp == 0 && (same >> lane & 1)) list[__popc(same & ((1u << lane) - 1))] = lane;
    }
    __syncthreads();
    return found;
  }
  for (int i = threadIdx.x; i < r.experts; i += THREADS) histogram[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < r.pairs; i += THREADS) {
    int e = local_expert(r, i);
    chosen[i] = e;
    if (e >= 0) atomicAdd(&histogram[e], 1);
  }
  __syncthreads();
  // Every warp finds the item by itself: a lane counts the tiles of a run of experts, then a scan over lanes.
  const int run = (r.experts + WARP - 1) / WARP, first = lane * run, last = min(first + run, r.experts);
  int tiles = 0;
  for (int e = first; e < last; ++e) tiles += (histogram[e] + TOKENS - 1) / TOKENS;
  int end = tiles;
  for (int d = 1; d < WARP; d *= 2) {
    int other = __shfl_up_sync(~0u, end, d);
    if (lane >= d) end += other;
  }
  int rest = item - (end - tiles);
  e = first;
  if (rest >= 0 && rest < tiles) {
    for (; rest >= (histogram[e] + TOKENS - 1) / TOKENS; ++e) rest -= (histogram[e] + TOKENS - 1) / TOKENS;
  }
  u32 owner = __ballot_sync(~0u, item - (end - tiles) >= 0 && item < end);
  if (!owner) return found;  // the same for every warp
  found.expert = __shfl_sync(~0u, e, __ffs(owner) - 1);
  const int begin = __shfl_sync(~0u, rest, __ffs(owner) - 1) * TOKENS;
  found.count = min(TOKENS, histogram[found.expert] - begin);
  // Ordered compaction: each warp takes a run of pairs.
  const int share = (r.pairs + WARPS * WARP - 1) / (WARPS * WARP) * WARP;
  int mine = 0;
  for (int i = warp * share; i < min((warp + 1) * share, r.pairs); i += WARP) {
    mine += __popc(__ballot_sync(~0u, i + lane < r.pairs && chosen[i + lane] == found.expert));
  }
  if (lane == 0) sums[warp] = mine;
  __syncthreads();
  int at = -begin;
  for (int w = 0; w < warp; ++w) at += sums[w];
  for (int i = warp * share; i < min((warp + 1) * share, r.pairs) && mine; i += WARP) {
    bool hit = i + lane < r.pairs && chosen[i + lane] == found.expert;
    u32 hits = __ballot_sync(~0u, hit);
    int place = at + __popc(hits & ((1u << lane) - 1));
    if (hit && place >= 0 && place < TOKENS) list[place] = i + lane;
    at += __popc(hits);
  }
  __syncthreads();
  return found;
}
