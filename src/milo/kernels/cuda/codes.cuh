// From packed codes to MMA operands.
//
// One lane holds 16 register pairs (32 codes) in BITS words. Pair i of 3-bit codes sits in word i / 5 at bits
// 3 * (i % 5) of each half-word, and pair 15 is spread over bit 15 of the three half-words: no bit is wasted. 4-bit
// codes: pair i in word i / 4, nibble i % 4 of each half-word.
//
// A code q at bit P of the mantissa of a power of two is the float BASE + 2^P q, exactly: one shift and one logical
// operation make a pair of them, and nothing else is done to a weight. 2^P and BASE are undone on the accumulators,
// where the zero point is taken off anyway: 2^-P (sum of (BASE + 2^P q) x - (BASE + 2^P z) sum of x). Tensor cores cut
// sums off at 24 bits of the largest summand, so the base should not dwarf the codes: P is as high as the mantissa
// allows without one more shift a word, which leaves BASE at 16 (or, for 4 bits in fp16, 64) units of a code.
#pragma once
#include "primitives.cuh"

template <bool B16>
constexpr u32 ONE_BASE = B16 ? 0x43004300u : 0x64006400u;
template <bool B16>
constexpr float BASE = B16 ? 128 : 1024;
template <bool B16, int BITS>
constexpr int P = B16 ? 3 : (BITS == 3 ? 6 : 4);

__device__ constexpr u32 twice(u32 h) { return h | (h << 16); }

// The bit pattern of a small dyadic constant, twice.
template <bool B16>
__device__ constexpr u32 pattern(float value) {
  const u32 sign = value < 0 ? 1 : 0;
  float m = value < 0 ? -value : value;
  int e = 0;
  while (m >= 2) { m *= 0.5f; ++e; }
  while (m < 1) { m *= 2; --e; }
  const u32 fraction = static_cast<u32>((m - 1) * (B16 ? 128 : 1024));
  return twice((sign << 15) | (static_cast<u32>(e + (B16 ? 127 : 15)) << (B16 ? 7 : 10)) | fraction);
}

template <int BY>
__device__ __forceinline__ u32 shift_left(u32 word) {
  if constexpr (BY >= 0) {
    return word << BY;
  } else {
    return word >> -BY;
  }
}

// The pair whose codes sit at bit FROM of each half of `word`, as BASE + 2^P q.
template <bool B16, int BITS, int FROM>
__device__ __forceinline__ u32 extract(u32 word) {
  constexpr int to = P<B16, BITS>;
  return and_or(shift_left<to - FROM>(word), twice(((1u << BITS) - 1) << to), ONE_BASE<B16>);
}

__device__ __forceinline__ u32 component(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// `words[0..BITS)` to the 16 pairs.
template <bool B16, int BITS>
__device__ __forceinline__ void decode(const u32* words, u32 (&pairs)[16]) {
  if constexpr (BITS == 3) {
    constexpr int to = P<B16, 3>;
    u32 stray = ONE_BASE<B16>;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      const u32 w = words[j];
      pairs[5 * j] = extract<B16, 3, 0>(w);
      pairs[5 * j + 1] = extract<B16, 3, 3>(w);
      pairs[5 * j + 2] = extract<B16, 3, 6>(w);
      pairs[5 * j + 3] = extract<B16, 3, 9>(w);
      pairs[5 * j + 4] = extract<B16, 3, 12>(w);
      stray = and_or(w >> (15 - to - j), twice(1u << (to + j)), stray);
    }
    pairs[15] = stray;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const u32 w = words[j];
      pairs[4 * j] = extract<B16, 4, 0>(w);
      pairs[4 * j + 1] = extract<B16, 4, 4>(w);
      pairs[4 * j + 2] = extract<B16, 4, 8>(w);
      pairs[4 * j + 3] = extract<B16, 4, 12>(w);
    }
  }
}
