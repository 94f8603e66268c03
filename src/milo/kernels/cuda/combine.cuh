// From partial sums to tokens: over choices and splits, in a fixed order.
#pragma once
#include "units.cuh"

__device__ __forceinline__ float choice_weight(const Params& p, int pair) {
  if (!p.choice_weights) return 1;
  if (p.choice_weight_type == 0) return static_cast<const float*>(p.choice_weights)[pair];
  u16 h = static_cast<const u16*>(p.choice_weights)[pair];
  return p.choice_weight_type == 1 ? from_fp16(h) : from_bf16(h);
}

// The weights of the choices of the tokens from `first` to `last`, NaN for those that are not ours.
__device__ __forceinline__ void load_choices(const Params& p, int first, int last, float* weights) {
  for (int i = first * p.topk + threadIdx.x; i < last * p.topk; i += THREADS) {
    const bool ours = !p.routing.ids || local_expert(p.routing, i) >= 0;
    weights[i - first * p.topk] = ours ? choice_weight(p, i) : __int_as_float(0x7fffffff);
  }
}

// The sum over choices and splits for the row tiles from `tile` to `last_tile` and tokens from `first` to `last`.
__device__ __forceinline__ void combine_rows(const Params& p, int tile, int last_tile, int first, int last,
                                             const float* weights) {
  const int pitch = p.row_tiles * 64, width = (last_tile - tile) * 16;  // of 4 rows
  for (int i = threadIdx.x; i < width * (last - first); i += THREADS) {
    const Quotient at = divide(i, width);
    const int token = first + at.q, column = tile * 64 + at.r * 4;
    const float* from = p.partial + static_cast<long long>(token) * p.topk * p.splits * pitch + column;
    float sum[4] = {};
    for (int j = 0; j < p.topk * p.splits; j += 4) {  // four loads in flight
      float4 v[4];
      float w[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool inside = j + k < p.topk * p.splits;
        w[k] = inside ? weights[at.q * p.topk + divide(j + k, p.splits).q] : __int_as_float(0x7fffffff);
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
      for (int j = 0; j < 4; ++j) {
        if (p.bias) sum[j] += B16 ? from_bf16(p.bias[column + j]) : from_fp16(p.bias[column + j]);
      }
      const u32 low = round_to_16<B16>(sum[0]) | round_to_16<B16>(sum[1]) << 16;
      const u32 high = round_to_16<B16>(sum[2]) | round_to_16<B16>(sum[3]) << 16;
      u16* out = static_cast<u16*>(p.out) + static_cast<long long>(token) * p.rows + column;
      *reinterpret_cast<uint2*>(out) = make_uint2(low, high);
    }
  }
}
