// Small arithmetic that needs no PTX.
#pragma once
#include "primitives.cuh"

// n / d and n % d for 0 <= n < 2^24, 0 < d, n / d < 2^21: a tenth of the instructions of an integer division.
struct Quotient {
  int q, r;
};
__device__ __forceinline__ Quotient divide(int n, int d) {
  int q = static_cast<int>(__fdividef(static_cast<float>(n), static_cast<float>(d)));
  int r = n - q * d;
  if (r < 0) --q, r += d;
  if (r >= d) ++q, r -= d;
  return {q, r};
}
