// U t, added to the accumulators of a row tile.
#pragma once
#include "launch.cuh"

constexpr int SPLITS = 4;  // of V's K, at most

// Where a row tile's U begins, in steps (`z`), how many steps it has (`w`), the row tiles of the item's V (`y`), and the
// first that is this row tile's (`x`, of stacked matrices).
__device__ __forceinline__ int4 factors(const Compensator& c, const Part& part) {
  const int number = c.entry(items().expert[part.item], part.group);
  int4 entry = __ldg(c.table + number);
  if (c.stacked) {  // all of V is one item's
    if (number) entry.z -= c.ends[number - 1] * entry.w;
    entry.y = c.t_stride / 64;
  }
  entry.z += part.group * entry.w;
  return entry;
}

// total += U t, in its units, for the steps first, first + stride, ... `entry`: the row tile's `factors`. PARTS = 2: rows
// 0-31 use gate's t and rows 32-63 up's. A step is read while nothing waits for it yet; t is complete when V's counter
// says so.
template <int PARTS>
__device__ __forceinline__ void add_factors(const Params& p, const Part& part, const int4& entry, int first, int stride,
                                            Accumulators& total) {
  const Compensator& c = p.compensator;
  const int lane = threadIdx.x % WARP, steps = entry.w, column = c.stacked ? entry.x * 64 : 0;  // of t
  bool complete = false;
#pragma unroll 1
  for (int step = first; step < steps; step += stride) {
    const long long at = entry.z + step;
    u32 words[3], scales[PARTS][2], pairs[16];
#pragma unroll
    for (int j = 0; j < 3; ++j) words[j] = __ldg(c.u_codes + (at * 3 + j) * WARP + lane);
#pragma unroll
    for (int side = 0; side < PARTS; ++side) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const u16* from = c.u_scales + (at * PARTS + side) * 16 + 8 * i + lane % 4 * 2;
        scales[side][i] = __ldg(reinterpret_cast<const u32*>(from));
      }
    }
    if (!complete) wait_until(counters(p).v_done + part.item, entry.y * c.t_splits);
    complete = true;
    decode<true, 3>(words, pairs);
    constexpr float unit = 1.0f / (1 << P<true, 3>);
    constexpr u32 eighth = pattern<true>(unit), shift = pattern<true>(-(BASE<true> * unit + 4));
#pragma unroll
    for (int i = 0; i < 16; ++i) pairs[i] = fma2<true>(pairs[i], eighth, shift);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      if (nt * 8 < part.count) {
        const int n = nt * 8 + lane / 4;
        const long long pair = items().pairs[part.begin + min(n, part.count - 1)];
#pragma unroll
        for (int side = 0; side < PARTS; ++side) {
          u32 high[2], low[2];
          float2 t[2][SPLITS];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int s = 0; s < SPLITS; ++s) {
              t[i][s] = {0, 0};
              if (s >= c.t_splits) continue;
              const long long row = s * static_cast<long long>(p.routing.pairs) + pair;
              const int k = column + (side * steps + step) * 16 + 8 * i + lane % 4 * 2;
              t[i][s] = __ldcg(reinterpret_cast<const float2*>(c.t + row * c.t_stride + k));
            }
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float a = 0, b = 0;
#pragma unroll
            for (int s = 0; s < SPLITS; ++s) a += t[i][s].x, b += t[i][s].y;
            a *= 1 / UNIT * from_fp16(static_cast<u16>(scales[side][i]));
            b *= 1 / UNIT * from_fp16(static_cast<u16>(scales[side][i] >> 16));
            high[i] = pair_bf16(a, b);
            const float rest_a = a - from_bf16(static_cast<u16>(high[i]));
            const float rest_b = b - from_bf16(static_cast<u16>(high[i] >> 16));
            low[i] = pair_bf16(rest_a, rest_b);
          }
#pragma unroll
          for (int mt = side * 4 / PARTS; mt < (side + 1) * 4 / PARTS; ++mt) {
            mma<true>(total[mt][nt], pairs + mt * 4, high[0], high[1]);
            mma<true>(total[mt][nt], pairs + mt * 4, low[0], low[1]);
          }
        }
      }
    }
  }
}
