// A warp's share of a stage, as the tensor core's A operand in registers.
//
// A warpgroup has two row tiles of 64 rows, T and T', and multiplies them as two blocks of 64 rows: block b is rows
// 32 * b .. + 31 of T, then those of T'. Warps 0 and 1 have T, 2 and 3 T'; warp w has rows 32 * b + 16 * (w % 2) .. + 15
// of its tile, word 2 * b + w % 2 of each lane's 16 bytes. Gate stands in the first 32 rows of a tile and up in the
// other, so both halves of an output end in the same place of the same thread.
#pragma once
#include "prefill.cuh"

struct Words {
  u32 codes[2][BITS];      // block
  uint2 meta[2][HALVES];   // (scale, zero) of rows g and g + 8

  __device__ __forceinline__ void load(const Ring& ring, int tile, int odd, int lane) {
#pragma unroll
    for (int j = 0; j < BITS; ++j) {
      const uint4 all = load_shared(ring.codes(tile) + j * 512 + lane * 16);
      codes[0][j] = odd ? all.y : all.x;
      codes[1][j] = odd ? all.w : all.z;
    }
    const u32 at = ring.meta(tile) + lane / 4 * 32 + odd * 8;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      meta[0][h] = load_shared_pair(at + h * 256);
      meta[1][h] = load_shared_pair(at + h * 256 + 16);
    }
  }
};

// A pair BASE + 2^P q as `codes.cuh` makes it, to q - OFFSET, exactly.
template <int WIDTH_OF_CODE, int OFFSET>
__device__ __forceinline__ u32 around(u32 pair) {
  constexpr float unit = 1.0f / (1 << P<B16, WIDTH_OF_CODE>);
  constexpr u32 units = pattern<B16>(unit), offset = pattern<B16>(-(BASE<B16> * unit + OFFSET));
  return fma2<B16>(pair, units, offset);
}

// Codes are taken around their middle: what is then left of the zero is small, and so is the error of rounding it.
constexpr int MIDDLE = 1 << (BITS - 1);

// (scale, scale) and (-scale * zero, -scale * zero) of two rows, where zero counts from MIDDLE.
__device__ __forceinline__ void scales_and_shifts(uint2 rows, u32 (&scale)[2], u32 (&shift)[2]) {
  u32 s = __byte_perm(rows.x, rows.y, 0x5410), z = __byte_perm(rows.x, rows.y, 0x7632);
  if constexpr (B16) {
    s = pair_bf16(from_fp16(static_cast<u16>(s)), from_fp16(static_cast<u16>(s >> 16)));
    z = pair_bf16(__uint_as_float(s << 16) * (MIDDLE - from_fp16(static_cast<u16>(z))),
                  __uint_as_float(s & 0xffff0000u) * (MIDDLE - from_fp16(static_cast<u16>(z >> 16))));
  } else {
    constexpr u32 minus_one = pattern<false>(-1), middle = pattern<false>(MIDDLE);
    z = mul2<false>(s, fma2<false>(z, minus_one, middle));
  }
  scale[0] = __byte_perm(s, s, 0x1010), scale[1] = __byte_perm(s, s, 0x3232);
  shift[0] = __byte_perm(z, z, 0x1010), shift[1] = __byte_perm(z, z, 0x3232);
}

// The weights of four k16 steps, rounded to 16 bits.
__device__ __forceinline__ void weight_fragments(const u32 (&codes)[BITS], const uint2 (&meta)[HALVES], u32 (&a)[16]) {
  decode<B16, BITS>(codes, a);
#pragma unroll
  for (int i = 0; i < 16; ++i) a[i] = around<BITS, MIDDLE>(a[i]);
#pragma unroll
  for (int h = 0; h < HALVES; ++h) {
    u32 scale[2], shift[2];
    scales_and_shifts(meta[h], scale, shift);
#pragma unroll
    for (int i = h * 8; i < (HALVES == 2 ? h * 8 + 8 : 16); ++i) a[i] = fma2<B16>(a[i], scale[i % 2], shift[i % 2]);
  }
}

// Pair `i` of three words of 3-bit codes, minus 4.
template <int I>
__device__ __forceinline__ u32 factor_pair(const u32 (&words)[3]) {
  if constexpr (I == 15) {
    const u32 high = and_or(words[1] >> 14, 0x00020002u, (words[2] >> 13) & 0x00040004u);
    const u32 stray = and_or(words[0] >> 15, 0x00010001u, high);
    return around<3, 4>(extract<B16, 3, 0>(stray));
  } else {
    return around<3, 4>(extract<B16, 3, 3 * (I % 5)>(words[I / 5]));
  }
}
template <int WORD>
__device__ __forceinline__ void factor_pairs(const u32 (&words)[3], u32 (&a)[4]) {
  a[0] = factor_pair<4 * WORD>(words), a[1] = factor_pair<4 * WORD + 1>(words);
  a[2] = factor_pair<4 * WORD + 2>(words), a[3] = factor_pair<4 * WORD + 3>(words);
}

// One step of U, 16 ranks, for both blocks. With two parts block b is part b, which has its own scales.
__device__ __forceinline__ void factor_fragments(const Ring& ring, int tile, int step, int parts, int odd, int lane,
                                                 u32 (&a)[2][4]) {
  u32 words[3];
#pragma unroll
  for (int j = 0; j < 3; ++j) words[j] = load_shared_word(ring.codes(tile) + step * STEP_BYTES + (j * WARP + lane) * 4);
  if (odd) {
    factor_pairs<1>(words, a[0]);
    factor_pairs<3>(words, a[1]);
  } else {
    factor_pairs<0>(words, a[0]);
    factor_pairs<2>(words, a[1]);
  }
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const u32 at = ring.meta(tile) + (step * parts + (parts == 2 ? b : 0)) * 32 + lane % 4 * 4;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      u32 scale = load_shared_word(at + c * 16);
      if (B16) scale = pair_bf16(from_fp16(static_cast<u16>(scale)), from_fp16(static_cast<u16>(scale >> 16)));
      a[b][2 * c] = mul2<B16>(a[b][2 * c], scale);
      a[b][2 * c + 1] = mul2<B16>(a[b][2 * c + 1], scale);
    }
  }
}
