// From packed codes to MMA operands.
//
// One lane holds 16 register pairs (32 codes) in BITS words. Pair i of 3-bit codes sits in word i / 5 at bits
// 3 * (i % 5) of each half-word, and pair 15 is spread over bit 15 of the three half-words: no bit is wasted and most
// codes decode without a shift. 4-bit codes: pair i in word i / 4, nibble i % 4 of each half-word.
//
// A code under the exponent of a power of two is a float: 0x6400 | q = 1024 + q in fp16, 0x4300 | q = 128 + q in bf16.
// At a higher position the code counts 8, 16 or 64 fold; the multiply-add that removes the base undoes that, exactly.
// Cost for 32 codes of 3 bits: 24 (fp16) or 27 (bf16) integer operations and 16 packed multiply-adds.
#pragma once
#include "primitives.cuh"

template <bool B16>
constexpr u32 BASE = B16 ? 0x43004300u : 0x64006400u;

// The bit pattern of a small dyadic constant, twice: value = sign * mantissa * 2^exponent, 1 <= mantissa < 2.
__device__ constexpr u32 twice(u32 h) { return h | (h << 16); }

__device__ constexpr u32 pattern(bool b16, float value) {
  u32 sign = value < 0 ? 1 : 0;
  float m = value < 0 ? -value : value;
  int e = 0;
  while (m >= 2) { m *= 0.5f; ++e; }
  while (m < 1) { m *= 2; --e; }
  u32 fraction = static_cast<u32>((m - 1) * (b16 ? 128 : 1024));
  return twice((sign << 15) | (static_cast<u32>(e + (b16 ? 127 : 15)) << (b16 ? 7 : 10)) | fraction);
}

// The pair whose codes sit at bit POSITION of each half of `word`, minus OFFSET.
template <bool B16, int BITS, int OFFSET, int POSITION>
__device__ __forceinline__ u32 extract(u32 word) {
  constexpr u32 mask = twice(((1u << BITS) - 1) << POSITION);
  constexpr float fold = 1 << POSITION;
  constexpr float base = B16 ? 128 : 1024;
  constexpr u32 one = pattern(B16, 1 / fold), bias = pattern(B16, -(base / fold + OFFSET));
  return fma2<B16>(and_or(word, mask, BASE<B16>), one, bias);
}

// `words[0..BITS)` to the 16 pairs of q - OFFSET.
template <bool B16, int BITS, int OFFSET>
__device__ __forceinline__ void decode(const u32* words, u32 (&pairs)[16]) {
  if constexpr (BITS == 3) {
    u32 stray = 0;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      u32 w = words[j];
      pairs[5 * j] = extract<B16, 3, OFFSET, 0>(w);
      pairs[5 * j + 1] = extract<B16, 3, OFFSET, 3>(w);
      if constexpr (B16) {
        pairs[5 * j + 2] = extract<B16, 3, OFFSET, 0>(w >> 6);
        pairs[5 * j + 3] = extract<B16, 3, OFFSET, 3>(w >> 6);
        pairs[5 * j + 4] = extract<B16, 3, OFFSET, 0>(w >> 12);
      } else {
        pairs[5 * j + 2] = extract<B16, 3, OFFSET, 6>(w);
        pairs[5 * j + 3] = extract<B16, 3, OFFSET, 0>(w >> 9);
        pairs[5 * j + 4] = extract<B16, 3, OFFSET, 3>(w >> 9);
      }
      stray = and_or(w >> (15 - j), twice(1u << j), stray);
    }
    pairs[15] = extract<B16, 3, OFFSET, 0>(stray);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 w = words[j];
      pairs[4 * j] = extract<B16, 4, OFFSET, 0>(w);
      pairs[4 * j + 2] = extract<B16, 4, OFFSET, 0>(w >> 8);
      if constexpr (B16) {
        pairs[4 * j + 1] = extract<B16, 4, OFFSET, 0>(w >> 4);
        pairs[4 * j + 3] = extract<B16, 4, OFFSET, 0>(w >> 12);
      } else {
        pairs[4 * j + 1] = extract<B16, 4, OFFSET, 4>(w);
        pairs[4 * j + 3] = extract<B16, 4, OFFSET, 4>(w >> 8);
      }
    }
  }
}
