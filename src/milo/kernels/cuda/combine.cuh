// From sums over K to tokens: the weighted sum over choices, in a fixed order.
#pragma once
#include "launch.cuh"

__device__ __forceinline__ float choice_weight(const Params& p, int pair) {
  if (!p.choice_weights) return 1;
  if (p.choice_weight_type == 0) return static_cast<const float*>(p.choice_weights)[pair];
  const u16 h = static_cast<const u16*>(p.choice_weights)[pair];
  return p.choice_weight_type == 1 ? from_fp16(h) : from_bf16(h);
}

__device__ __forceinline__ float bias(const Params& p, int column) {
  if (!p.bias) return 0;
  return B16 ? from_bf16(p.bias[column]) : from_fp16(p.bias[column]);
}

// y of a row tile and the tokens from `first` to `last` from partial sums. `weights` [choices of these tokens] is NaN
// for choices that are not ours.
__device__ __forceinline__ void combine_rows(const Params& p, int tile, int first, int last, const float* weights) {
  const int pitch = p.row_tiles * 64;
  for (int i = threadIdx.x; i < 16 * (last - first); i += blockDim.x) {
    const int local = i / 16, token = first + local, column = tile * 64 + i % 16 * 4;
    const float* from = p.partial + static_cast<long long>(token) * p.topk * pitch + column;
    float sum[4] = {};
    for (int j = 0; j < p.topk; j += 4) {  // four loads in flight
      float4 v[4];
      float w[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        w[k] = j + k < p.topk ? weights[local * p.topk + j + k] : __int_as_float(0x7fffffff);
        v[k] = {0, 0, 0, 0};
        if (w[k] == w[k]) v[k] = __ldcg(reinterpret_cast<const float4*>(from + static_cast<long long>(j + k) * pitch));
        w[k] = w[k] == w[k] ? w[k] : 0;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum[0] += w[k] * v[k].x, sum[1] += w[k] * v[k].y, sum[2] += w[k] * v[k].z, sum[3] += w[k] * v[k].w;
      }
    }
    if (column < p.rows) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += bias(p, column + j);
      const u32 low = round_to_16<B16>(sum[0]) | round_to_16<B16>(sum[1]) << 16;
      const u32 high = round_to_16<B16>(sum[2]) | round_to_16<B16>(sum[3]) << 16;
      u16* out = static_cast<u16*>(p.out) + static_cast<long long>(token) * p.rows + column;
      *reinterpret_cast<uint2*>(out) = make_uint2(low, high);
    }
  }
}

// A block takes a row tile and TURN tokens, and MILO_PAIRS floats of shared memory.
constexpr int TURN = 256 / 16;

extern "C" __global__ void __launch_bounds__(256) combine(const __grid_constant__ Params p) {
  float* weights = reinterpret_cast<float*>(shared);
  const int tile = blockIdx.x % p.row_tiles, first = blockIdx.x / p.row_tiles * TURN;
  const int last = min(p.tokens, first + TURN);
  for (int i = first * p.topk + threadIdx.x; i < last * p.topk; i += blockDim.x) {
    const bool ours = !p.routing.ids || local_expert(p.routing, i) >= 0;
    weights[i - first * p.topk] = ours ? choice_weight(p, i) : __int_as_float(0x7fffffff);
  }
  __syncthreads();
  wait_for_primary();
  combine_rows(p, tile, first, last, weights);
}
