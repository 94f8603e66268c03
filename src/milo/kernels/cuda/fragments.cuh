// A warp's share of a stage, as the tensor core's A operand in registers.
//
// A warpgroup has two row tiles of 64 rows, T and T', and multiplies them as two blocks of 64 rows: block b is rows
// 32 * b .. + 31 of T, then those of T'. Warps 0 and 1 have T, 2 and 3 T'; warp w has rows 32 * b + 16 * (w % 2) .. + 15
// of its tile, word 2 * b + w % 2 of each lane's 16 bytes. Gate stands in the first 32 rows of a tile and up in the
// other, so both halves of an output end in the same place of the same thread.
#pragma once
#include "prefill.cuh"

// Four words as a lane's 16 bytes hold them, and the lane's scales and zeros, on their way from shared memory.
struct Loading {
  uint4 codes[BITS];
  uint2 meta[2][HALVES];  // block; (scale, zero) of rows g and g + 8

  __device__ __forceinline__ void load(const Ring& ring, int tile, int odd, int lane) {
#pragma unroll
    for (int j = 0; j < BITS; ++j) codes[j] = load_shared(ring.codes(tile) + j * 512 + lane * 16);
    const u32 at = ring.meta(tile) + lane / 4 * 32 + odd * 8;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      meta[0][h] = load_shared_pair(at + h * 256);
      meta[1][h] = load_shared_pair(at + h * 256 + 16);
    }
  }
};

// The words of one block.
struct Words {
  u32 codes[BITS];
  uint2 meta[HALVES];

  template <int BLOCK>
  __device__ __forceinline__ void take(const Loading& from, int odd) {
#pragma unroll
    for (int j = 0; j < BITS; ++j) {
      const uint4& all = from.codes[j];
      codes[j] = BLOCK ? (odd ? all.w : all.z) : (odd ? all.y : all.x);
    }
#pragma unroll
    for (int h = 0; h < HALVES; ++h) meta[h] = from.meta[BLOCK][h];
  }
  // Word `word` of a tile, whose 16 rows are the warp's; in this way all four warps of a warpgroup have the whole tile.
  __device__ __forceinline__ void load(const Ring& ring, int tile, int word, int lane) {
#pragma unroll
    for (int j = 0; j < BITS; ++j) codes[j] = load_shared_word(ring.codes(tile) + j * 512 + lane * 16 + word * 4);
#pragma unroll
    for (int h = 0; h < HALVES; ++h) meta[h] = load_shared_pair(ring.meta(tile) + h * 256 + lane / 4 * 32 + word * 8);
  }
};

// The bit pattern of a small dyadic number, twice.
__device__ constexpr u32 pattern(bool b16, float value) {
  const u32 sign = value < 0 ? 1 : 0;
  float m = value < 0 ? -value : value;
  int e = 0;
  while (m >= 2) { m *= 0.5f; ++e; }
  while (m < 1) { m *= 2; --e; }
  const u32 fraction = static_cast<u32>((m - 1) * (b16 ? 128 : 1024));
  return twice((sign << 15) | (static_cast<u32>(e + (b16 ? 127 : 15)) << (b16 ? 7 : 10)) | fraction);
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
    constexpr u32 minus_one = pattern(false, -1), middle = pattern(false, MIDDLE);
    z = mul2<false>(s, fma2<false>(z, minus_one, middle));
  }
  scale[0] = __byte_perm(s, s, 0x1010), scale[1] = __byte_perm(s, s, 0x3232);
  shift[0] = __byte_perm(z, z, 0x1010), shift[1] = __byte_perm(z, z, 0x3232);
}

// Pair I of a lane's words, minus the middle of its codes, exactly. See `codes.cuh` for where it stands. A multiply-add
// follows anyway, so a code is read from any place in the mantissa: two or three of a word need no shift or share one.
template <int BITS, int I>
__device__ __forceinline__ u32 centred_pair(const u32 (&words)[BITS]) {
  constexpr bool stray = BITS == 3 && I == 15;
  constexpr int a_word = BITS == 3 ? 5 : 4, together = (B16 ? 7 : 10) / BITS;
  constexpr int shift = I % a_word / together * together * BITS, at = stray ? 0 : BITS * (I % a_word) - shift;
  u32 pair;
  if constexpr (stray) {
    pair = and_or(words[1] >> 14, 0x00020002u, ONE_BASE<B16>);
    pair = and_or(words[2] >> 13, 0x00040004u, pair);
    pair = and_or(words[0] >> 15, 0x00010001u, pair);
  } else {
    pair = and_or(words[I / a_word] >> shift, twice(((1u << BITS) - 1) << at), ONE_BASE<B16>);
  }
  constexpr float unit = 1 << at;
  constexpr u32 one = pattern(B16, 1 / unit), base = pattern(B16, -(BASE<B16> / unit + (1 << (BITS - 1))));
  return fma2<B16>(pair, one, base);
}
template <int BITS, int STEP>
__device__ __forceinline__ void centred_pairs(const u32 (&words)[BITS], u32 (&a)[4]) {
  a[0] = centred_pair<BITS, 4 * STEP>(words), a[1] = centred_pair<BITS, 4 * STEP + 1>(words);
  a[2] = centred_pair<BITS, 4 * STEP + 2>(words), a[3] = centred_pair<BITS, 4 * STEP + 3>(words);
}

// The scales and shifts of a block, and one k16 step of its weights, rounded to 16 bits.
struct Scaling {
  u32 scale[HALVES][2], shift[HALVES][2];

  __device__ __forceinline__ explicit Scaling(const uint2 (&meta)[HALVES]) {
#pragma unroll
    for (int h = 0; h < HALVES; ++h) scales_and_shifts(meta[h], scale[h], shift[h]);
  }
  template <int STEP>
  __device__ __forceinline__ void step(u32 (&words)[BITS], u32 (&a)[4]) const {
#pragma unroll
    for (int j = 0; j < BITS; ++j) asm volatile("" : "+r"(words[j]));  // not all steps at once: registers are short
    centred_pairs<BITS, STEP>(words, a);
    const int h = HALVES == 2 ? STEP / 2 : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = fma2<B16>(a[i], scale[h][i % 2], shift[h][i % 2]);
  }
};

// One step of U, 16 ranks, for both blocks. With two parts block b is part b, which has its own scales.
__device__ __forceinline__ void factor_fragments(const Ring& ring, int tile, int step, int parts, int odd, int lane,
                                                 u32 (&a)[2][4]) {
  u32 words[3];
#pragma unroll
  for (int j = 0; j < 3; ++j) words[j] = load_shared_word(ring.codes(tile) + step * STEP_BYTES + (j * WARP + lane) * 4);
  if (odd) {
    centred_pairs<3, 1>(words, a[0]);
    centred_pairs<3, 3>(words, a[1]);
  } else {
    centred_pairs<3, 0>(words, a[0]);
    centred_pairs<3, 2>(words, a[1]);
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
