// A warp's product of one tile: 64 rows times 64 in-features times up to TOKENS tokens.
//
// The layout is tile.cuh's. The MMA sees bare codes (codes.cuh): no weight is rounded. A group's scale acts on its
// accumulators. Its zero, which multiplies the group's sum of x, does so for a whole stage at once: the zeros of 64 rows
// and SPAN groups times the sums of SPAN groups are a small product themselves. Each factor enters it as the sum of two
// bf16, and their four products fill the 16 columns of one MMA.
#pragma once
#include "wide.cuh"

// A float as the sum of two bf16, the larger in the low half.
__device__ __forceinline__ u32 split(float f) {
  const float high = from_bf16(static_cast<u16>(pair_bf16(f, 0)));
  return pair_bf16(high, f - high);
}

// total += the product of the first N n8 tiles of tokens, but for the zeros. `codes`, `x`: where the tile and its
// activations are, at this lane's 16 bytes; `meta`: the metadata of this lane's rows.
template <int N>
__device__ __forceinline__ void multiply(u32 codes, u32 meta, u32 x, Accumulators& total) {
  uint4 words[BITS], scales[HALVES][2], x_words[N][2];
#pragma unroll
  for (int j = 0; j < BITS; ++j) words[j] = load_shared(codes + j * 512);
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
#pragma unroll
    for (int i = 0; i < 2; ++i) scales[h][i] = load_shared(meta + h * 256 + i * 16);
  }
#pragma unroll
  for (int nt = 0; nt < N; ++nt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) x_words[nt][half] = load_shared(x + nt * 1024 + half * 512);
  }
#pragma unroll
  for (int mt = 0; mt < 4; ++mt) {
    u32 mine[BITS], pairs[16];
#pragma unroll
    for (int j = 0; j < BITS; ++j) mine[j] = component(words[j], mt);
    decode<B16, BITS>(mine, pairs);
    float scale[HALVES][2], d[N][HALVES][4] = {};
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        scale[h][row] = from_fp16(static_cast<u16>(component(scales[h][mt / 2], mt % 2 * 2 + row)));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // one product after the other of as many sums as there are
#pragma unroll
      for (int nt = 0; nt < N; ++nt) {
        mma<B16>(d[nt][half % HALVES], pairs + half * 8, x_words[nt][half].x, x_words[nt][half].y);
      }
#pragma unroll
      for (int nt = 0; nt < N; ++nt) {
        mma<B16>(d[nt][half % HALVES], pairs + half * 8 + 4, x_words[nt][half].z, x_words[nt][half].w);
      }
    }
#pragma unroll
    for (int nt = 0; nt < N; ++nt) {
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
#pragma unroll
        for (int i = 0; i < 4; ++i) total[mt][nt][i] += scale[h][i / 2] * d[nt][h][i];
      }
    }
  }
}

// The sums of x over the groups of a tile for 8 tokens; `x`: their activations, at this lane's 16 bytes, `to`: the words
// of the tile's first group for these tokens.
__device__ __forceinline__ void sum_activations(u32 x, u32* to) {
  constexpr u32 one = B16 ? 0x3f803f80u : 0x3c003c00u;
  constexpr u32 ones[4] = {one, one, one, one};
  float sums[HALVES][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 v = load_shared(x + half * 512);
    mma<B16>(sums[half % HALVES], ones, v.x, v.y);
    mma<B16>(sums[half % HALVES], ones, v.z, v.w);
  }
  const int lane = threadIdx.x % WARP;
  if (lane < 4) {
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      to[h * SPAN * SUM_PITCH + 2 * lane] = split(sums[h][0]);
      to[h * SPAN * SUM_PITCH + 2 * lane + 1] = split(sums[h][1]);
    }
  }
}

// total += the zeros' share of a stage. Lane % 4 says which tile of the stage a lane has the metadata of, at `meta`, unless
// the warp has not multiplied it (`known`; `meta` is then some other's). `sums`: of the stage.
__device__ __forceinline__ void add_zeros(int tiles, u32 meta, bool known, const u32* sums,
                                          Accumulators& total) {
  const int lane = threadIdx.x % WARP;
  sums += lane % 4 * SUM_PITCH + lane / 4;
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    u32 zeros[4][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 four = load_shared(meta + h * 256 + i * 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const u32 both = component(four, j);
        const float scale = from_fp16(static_cast<u16>(both)), zero = from_fp16(static_cast<u16>(both >> 16));
        zeros[i * 2 + j / 2][j % 2] = split(scale * (-BASE<B16> - (1 << P<B16, BITS>) * zero));
      }
    }
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      if (nt && nt >= tiles) break;
      const u32 both = known ? sums[h * SPAN * SUM_PITCH + nt * 8] : 0;
      const u32 high = (both & 0xffff) | both << 16, low = (both >> 16) | (both & 0xffff0000);
#pragma unroll
      for (int mt = 0; mt < 4; ++mt) {
        const u32 a[4] = {zeros[mt][0], zeros[mt][1], zeros[mt][0], zeros[mt][1]};
        mma<true>(total[mt][nt], a, high, low);
      }
    }
  }
}
