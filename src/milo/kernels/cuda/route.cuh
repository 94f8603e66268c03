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
  static constexpr int MAX_ITEMS = (MAX_PAIRS < MAX_EXPERTS ? MAX_PAIRS : MAX_EXPERTS) + MAX_PAIRS / TOKENS;
  short pairs[MAX_PAIRS];  // sorted by expert
  short rows[MAX_PAIRS];   // of the activations, likewise
  short expert[MAX_ITEMS], begin[MAX_ITEMS];
  short v_end[MAX_ITEMS];    // row tiles of V of all items up to this one
  short u_steps[MAX_ITEMS];  // of an item's expert
  int items, routed;         // work items; pairs that have a local expert

  __device__ __forceinline__ Item operator[](int i) const {
    const int e = expert[i], b = begin[i];
    const int end = i + 1 < items ? begin[i + 1] : routed;
    return {e, b, end - b};
  }
  __device__ __forceinline__ int v_tiles() const { return items ? v_end[items - 1] : 0; }

  __device__ __forceinline__ void put(int at, int pair, int row_divisor) {
    pairs[at] = static_cast<short>(pair);
    rows[at] = static_cast<short>(divide(pair, row_divisor).q);
  }

  // One warp. `sizes` [experts]: row tiles of V, and steps of U in the upper half; null: none.
  __device__ __forceinline__ void add_compensators(const u32* sizes) {
    const int lane = threadIdx.x % WARP;
    int before = 0;
#pragma unroll 1
    for (int i = 0; i < items; i += WARP) {
      const u32 size = sizes && i + lane < items ? sizes[expert[i + lane]] : 0;
      int sum = size & 0xffff;
      if (sizes) {
#pragma unroll
        for (int d = 1; d < WARP; d *= 2) {
          const int other = __shfl_up_sync(~0u, sum, d);
          if (lane >= d) sum += other;
        }
      }
      if (i + lane < items) {
        v_end[i + lane] = static_cast<short>(before + sum);
        u_steps[i + lane] = static_cast<short>(size >> 16);
      }
      if (sizes) before += __shfl_sync(~0u, sum, WARP - 1);
    }
    __syncwarp();
  }

  // The rows of a plain matrix: one expert takes all. All threads of the block call this.
  __device__ __forceinline__ void build_plain(const Routing& r) {
    const int n = (r.pairs + TOKENS - 1) / TOKENS;
#pragma unroll 1
    for (int i = threadIdx.x; i < r.pairs; i += blockDim.x) pairs[i] = rows[i] = static_cast<short>(i);
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += blockDim.x) expert[i] = 0, begin[i] = static_cast<short>(i * TOKENS);
    if (threadIdx.x == 0) items = n, routed = r.pairs;
    __syncthreads();
  }

  // Scratch memory of `build`.
  struct Sorting {
    int counts[MAX_EXPERTS];    // pairs an expert, then where they begin
    u32 spare[MAX_EXPERTS];     // for `meanwhile`
    short experts[MAX_PAIRS];   // of the pairs
    // Behind this: pairs an expert in a warp's run of the pairs, then in the runs before.
    __device__ __forceinline__ short* ahead(int warp) { return reinterpret_cast<short*>(this + 1) + warp * MAX_EXPERTS; }
  };
  static __device__ constexpr int sorting_bytes(int warps) { return sizeof(Sorting) + warps * MAX_EXPERTS * 2; }

  // Calls `f(pair, its expert, lanes with the same expert)` for a warp's run of the pairs.
  template <typename F>
  static __device__ __forceinline__ void for_run(const short* experts, int first, int last, F f) {
    const int lane = threadIdx.x % WARP;
#pragma unroll 1
    for (int i = first; i < last; i += WARP) {
      const int e = i + lane < last ? experts[i + lane] : -1;
      f(i + lane, e, __match_any_sync(~0u, e));
      __syncwarp();
    }
  }

  // Sorts by counting: each warp has a run of the pairs. All threads of the block call this; at first the upper half of
  // them does what `meanwhile(thread, threads)` says while the lower half waits for ids.
  template <typename Meanwhile>
  __device__ __forceinline__ void build(const Routing& r, int row_divisor, void* memory, Meanwhile meanwhile) {
    Sorting& s = *static_cast<Sorting*>(memory);
    const int half = blockDim.x / 2, upper = static_cast<int>(threadIdx.x) - half;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    short* ahead = s.ahead(warp);
    if (upper >= 0) {
      meanwhile(upper, half);
    } else {
#pragma unroll 4
      for (int i = threadIdx.x; i < r.pairs; i += half) s.experts[i] = static_cast<short>(local_expert(r, i));
    }
#pragma unroll 1
    for (int i = lane; i < r.experts; i += WARP) ahead[i] = 0;
    __syncthreads();
    const int run = ((r.pairs + WARP - 1) / WARP + warps - 1) / warps * WARP;
    const int first = warp * run, last = min(first + run, r.pairs);
    for_run(s.experts, first, last, [&](int, int e, u32 same) {
      if (e >= 0 && __ffs(same) - 1 == lane) ahead[e] += static_cast<short>(__popc(same));
    });
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < r.experts; e += blockDim.x) {
      int sum = 0;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) {
        const int n = s.ahead(w)[e];
        s.ahead(w)[e] = static_cast<short>(sum);
        sum += n;
      }
      s.counts[e] = sum;
    }
    __syncthreads();
    if (warp == 0) list(r.experts, s.counts);
    __syncthreads();
    for_run(s.experts, first, last, [&](int pair, int e, u32 same) {
      const int at = e >= 0 ? s.counts[e] + ahead[e] : 0;
      __syncwarp();
      if (e < 0) return;
      put(at + __popc(same & ((1u << lane) - 1)), pair, row_divisor);
      if (__ffs(same) - 1 == lane) ahead[e] += static_cast<short>(__popc(same));
    });
  }

  // One warp, a lane a run of experts: counts become places, and the items are listed.
  __device__ __forceinline__ void list(int experts, int* counts) {
    const int lane = threadIdx.x % WARP, run = (experts + WARP - 1) / WARP;
    const int first = min(lane * run, experts), last = min(first + run, experts);
    int total = 0, tiles = 0;
#pragma unroll 1
    for (int e = first; e < last; ++e) total += counts[e], tiles += (counts[e] + TOKENS - 1) / TOKENS;
    int place = total, item = tiles;
#pragma unroll
    for (int d = 1; d < WARP; d *= 2) {
      const int p = __shfl_up_sync(~0u, place, d), i = __shfl_up_sync(~0u, item, d);
      if (lane >= d) place += p, item += i;
    }
    if (lane == WARP - 1) items = item, routed = place;
    place -= total, item -= tiles;
#pragma unroll 1
    for (int e = first; e < last; ++e) {
      const int n = counts[e];
      counts[e] = place;
#pragma unroll 1
      for (int b = 0; b < n; b += TOKENS, ++item) {
        expert[item] = static_cast<short>(e), begin[item] = static_cast<short>(place + b);
      }
      place += n;
    }
  }

  // At most 32 pairs: one warp, a lane a pair, experts in the order of first appearance. `e`: of this lane's pair.
  __device__ __forceinline__ void build_small(int e, int row_divisor) {
    const int lane = threadIdx.x % WARP;
    const u32 same = __match_any_sync(~0u, e);
    const int rank = __popc(same & ((1u << lane) - 1)), leader = __ffs(same) - 1;
    const bool opens = e >= 0 && rank % TOKENS == 0;  // this pair is the first of an item
    const u32 leaders = __ballot_sync(~0u, e >= 0 && rank == 0);
    int place = 0, item = 0;  // of this lane's expert
#pragma unroll 1
    for (u32 rest = leaders; rest; rest &= rest - 1) {
      const int other = __ffs(rest) - 1, n = __popc(__shfl_sync(~0u, same, other));
      if (other < leader) place += n, item += (n + TOKENS - 1) / TOKENS;
    }
    if (e >= 0) put(place + rank, lane, row_divisor);
    if (opens) {
      expert[item + rank / TOKENS] = static_cast<short>(e);
      begin[item + rank / TOKENS] = static_cast<short>(place + rank);
    }
    const u32 all = __ballot_sync(~0u, opens), some = __ballot_sync(~0u, e >= 0);
    if (lane == 0) items = __popc(all), routed = __popc(some);
    __syncwarp();
  }
};
