// Before and after the products: sorting and cutting the pairs, permuting the activations, adding up the choices.
#pragma once
#include "prefill.cuh"

struct Preparation {
  Routing routing;
  const void* choice_weights;  // [pairs] of choice_weight_type: 0 float32, 1 float16, 2 bfloat16; null: ones
  const u16* x;                // [tokens, in_features]
  u16* operand;                // [tokens, 64 * k_tiles]
  const int4* tables[2];       // compensators of the first and the second matrix
  Record* items;
  int* item_count;
  int* order;                  // the pairs that have a local expert, sorted by it
  float* weights;              // their choices' weights
  int* to_clear;
  int clear_count, tokens, in_features, planes, k_tiles;
  int width;                   // the most tokens of an item, at most WIDTH and a multiple of 8
  int choice_weight_type;
};

constexpr int SORT_THREADS = 1024, SORT_WARPS = SORT_THREADS / WARP;

__device__ __forceinline__ float choice_weight(const void* weights, int type, int pair) {
  if (!weights) return 1;
  if (type == 0) return static_cast<const float*>(weights)[pair];
  const u16 h = static_cast<const u16*>(weights)[pair];
  return type == 1 ? from_fp16(h) : from_bf16(h);
}

// Cut `count` pairs from `begin` on into items that differ little in size.
__device__ __forceinline__ void cut(const Preparation& p, int expert, int begin, int count, int first_item) {
  const int items = (count + p.width - 1) / p.width;
  if (!items) return;
  const int each = ((count + items - 1) / items + 7) / 8 * 8;
  Record r;
  r.expert = expert, r.turn = first_item | items << 16;
  for (int i = 0; i < 2; ++i) r.factors[i] = p.tables[i] ? p.tables[i][expert] : make_int4(0, 0, 0, 0);
  r.unused = make_int4(0, 0, 0, 0);
  for (int i = 0; i < items; ++i) {
    r.begin = begin + i * each, r.count = min(each, count - i * each);
    p.items[first_item + i] = r;
  }
}

// A stable counting sort without a word between blocks: every sorting block counts all pairs, from which it knows where
// each expert's begin, and then places those of its own experts, every gridDim-th. A warp has a run of pairs.
__device__ __forceinline__ void sort(const Preparation& p) {
  const Routing& r = p.routing;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int* counts = reinterpret_cast<int*>(shared_memory());
  int* begins = counts + SORT_THREADS;
  int* sums = begins + SORT_THREADS;  // of the warps, pairs then items
  u16* experts = reinterpret_cast<u16*>(sums + 2 * SORT_WARPS);
  counts[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll 8
  for (int i = threadIdx.x; i < r.pairs; i += SORT_THREADS) {
    const int e = local_expert(r, i);
    experts[i] = static_cast<u16>(e);
    if (e >= 0) atomicAdd(counts + e, 1);
  }
  __syncthreads();
  const int total = counts[threadIdx.x];  // of the expert that is this thread's number
  const int tiles = (total + p.width - 1) / p.width;
  int place = total, item = tiles;  // inclusive sums over experts, within the warp
  for (int d = 1; d < WARP; d *= 2) {
    const int a = __shfl_up_sync(~0u, place, d), b = __shfl_up_sync(~0u, item, d);
    if (lane >= d) place += a, item += b;
  }
  if (lane == WARP - 1) sums[warp] = place, sums[SORT_WARPS + warp] = item;
  __syncthreads();
  int all_items = 0;
  for (int w = 0; w < SORT_WARPS; ++w) {
    if (w < warp) place += sums[w], item += sums[SORT_WARPS + w];
    all_items += sums[SORT_WARPS + w];
  }
  begins[threadIdx.x] = place - total;
  if (threadIdx.x % gridDim.x == blockIdx.x) cut(p, threadIdx.x, place - total, total, item - tiles);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.item_count = all_items;
  const int run = (r.pairs + SORT_THREADS - 1) / SORT_THREADS * WARP;
  const int first = warp * run, last = min(r.pairs, first + run);
  for (int e = blockIdx.x; e < r.experts; e += gridDim.x) {
    int found = 0;
#pragma unroll 4
    for (int i = first; i < last; i += WARP) {
      found += __popc(__ballot_sync(~0u, i + lane < last && experts[i + lane] == e));
    }
    __syncthreads();  // sums were read
    if (lane == 0) sums[warp] = found;
    __syncthreads();
    int to = begins[e];
    for (int w = 0; w < warp; ++w) to += sums[w];
#pragma unroll 4
    for (int i = first; i < last; i += WARP) {
      const bool mine = i + lane < last && experts[i + lane] == e;
      const u32 all = __ballot_sync(~0u, mine);
      if (mine) {
        const int at = to + __popc(all & ((1u << lane) - 1));
        p.order[at] = i + lane;
        p.weights[at] = choice_weight(p.choice_weights, p.choice_weight_type, i + lane);
      }
      to += __popc(all);
    }
  }
}

// x with its columns in the order of the tensor core's operand: of 32 features, number 8 * q + 2 * s + e (s < 4) goes to
// 8 * s + 2 * q + e. Zeros up to a multiple of 64; x again where the matrix has two planes.
__device__ __forceinline__ void permute(const Preparation& p, int block, int blocks) {
  const int width = p.k_tiles * 8;  // chunks of 8 numbers a row
  const long long chunks = static_cast<long long>(p.tokens) * width;
  for (long long i = static_cast<long long>(block) * SORT_THREADS + threadIdx.x; i < chunks;
       i += blocks * SORT_THREADS) {
    const long long row = i / width;
    const int chunk = static_cast<int>(i - row * width);
    int feature = chunk / 4 * 32;
    if (p.planes == 2 && feature >= p.in_features) feature -= p.in_features;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (feature < p.in_features) {
      const u32* from = reinterpret_cast<const u32*>(p.x + row * p.in_features + feature) + chunk % 4;
      v = make_uint4(from[0], from[4], from[8], from[12]);
    }
    *reinterpret_cast<uint4*>(p.operand + i * 8) = v;
  }
}

extern "C" __global__ void __launch_bounds__(SORT_THREADS) prepare(const __grid_constant__ Preparation p) {
  launch_dependents();
  const int block = blockIdx.x, blocks = gridDim.x, sorting = p.routing.ids ? min(p.routing.experts, blocks) : 1;
  for (int i = block * SORT_THREADS + threadIdx.x; i < p.clear_count; i += blocks * SORT_THREADS) p.to_clear[i] = 0;
  if (p.routing.ids) {
    if (block < sorting) sort(p);
  } else if (block == 0 && threadIdx.x == 0) {
    cut(p, 0, 0, p.routing.pairs, 0);
    *p.item_count = (p.routing.pairs + p.width - 1) / p.width;
  }
  if (blocks < 2 * sorting) {
    permute(p, block, blocks);
  } else if (block >= sorting) {  // the others are busy
    permute(p, block - sorting, blocks - sorting);
  }
}

struct Combination {
  Routing routing;
  const u16* partial;  // [pairs, rows], weighted
  u16* out;            // [tokens, rows]
  int tokens, topk, rows;
};

constexpr int COMBINE_THREADS = 256;

// out = the sum over a token's choices that have a local expert, in their order; 8 numbers a thread.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) combine(const __grid_constant__ Combination p) {
  wait_for_primary();
  const int width = p.rows / 8;
  const long long i = static_cast<long long>(blockIdx.x) * COMBINE_THREADS + threadIdx.x;
  if (i >= static_cast<long long>(p.tokens) * width) return;
  const int token = static_cast<int>(i / width), column = static_cast<int>(i - static_cast<long long>(token) * width) * 8;
  float sum[8] = {};
#pragma unroll 4
  for (int j = 0; j < p.topk; ++j) {
    const int pair = token * p.topk + j;
    if (local_expert(p.routing, pair) < 0) continue;
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(p.partial + static_cast<long long>(pair) * p.rows + column));
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const u16 h = static_cast<u16>(words[k / 2] >> k % 2 * 16);
      sum[k] += B16 ? from_bf16(h) : from_fp16(h);
    }
  }
  uint4 v = make_uint4(pair_16<B16>(sum[0], sum[1]), pair_16<B16>(sum[2], sum[3]), pair_16<B16>(sum[4], sum[5]),
                       pair_16<B16>(sum[6], sum[7]));
  *reinterpret_cast<uint4*>(p.out + i * 8) = v;
}
