// U t, added to the accumulators of a row tile.
#pragma once
#include "units.cuh"

// One step of U: its codes, and the scales that this lane's ranks take.
template <int PARTS>
struct Step {
  u32 words[3], scales[PARTS][2];

  __device__ __forceinline__ void load(const Compensator& c, long long at) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < 3; ++j) words[j] = __ldg(c.u_codes + (at * 3 + j) * WARP + lane);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const u16* from = c.u_scales + (at * PARTS + part) * 16 + 8 * i + lane % 4 * 2;
        scales[part][i] = __ldg(reinterpret_cast<const u32*>(from));
      }
    }
  }
};

// total += U t for this warp's share of the ranks. PARTS = 2: rows 0-31 use gate's t and rows 32-63 up's.
// The first step comes with the call: it was requested before the weights.
template <int PARTS>
__device__ __forceinline__ void add_factors(const Params& p, int4 entry, int row_tile, Step<PARTS>& u, Item item,
                                            Accumulators& total) {
  const Compensator& c = p.compensator;
  const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP % p.k_warps, steps = entry.w;
  for (int step = first; step < steps; step += p.k_warps) {
    if (step != first) u.load(c, entry.z + static_cast<long long>(row_tile) * steps + step);
    u32 pairs[16];
    decode<true, 3, 4>(u.words, pairs);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      if (nt * 8 < item.count) {
        const int n = nt * 8 + lane / 4;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          u32 high[2] = {0, 0}, low[2] = {0, 0};
          if (n < item.count) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int k = (part * steps + step) * 16 + 8 * i + lane % 4 * 2;
              float a = 0, b = 0;
#pragma unroll 1
              for (int s = 0; s < c.t_splits; ++s) {
                long long row = s * static_cast<long long>(p.routing.pairs) + items().pairs[item.begin + n];
                float2 t = __ldcg(reinterpret_cast<const float2*>(c.t + row * c.t_stride + k));
                a += t.x;
                b += t.y;
              }
              a *= from_fp16(static_cast<u16>(u.scales[part][i]));
              b *= from_fp16(static_cast<u16>(u.scales[part][i] >> 16));
              high[i] = pair_bf16(a, b);
              const float rest_a = a - from_bf16(static_cast<u16>(high[i]));
              const float rest_b = b - from_bf16(static_cast<u16>(high[i] >> 16));
              low[i] = pair_bf16(rest_a, rest_b);
            }
          }
#pragma unroll
          for (int mt = part * 4 / PARTS; mt < (part + 1) * 4 / PARTS; ++mt) {
            mma<true>(total[mt][nt], pairs + mt * 4, high[0], high[1]);
            mma<true>(total[mt][nt], pairs + mt * 4, low[0], low[1]);
          }
        }
      }
    }
  }
}
