// One block's product: 64 rows of one expert's matrix times up to TOKENS activations, over a range of in-features.
//
// Layout of a matrix [N, K] (the repack's output; N and K padded to 64):
//   codes  [N/64][K/64][BITS][32 lanes][16 B]   one 64x64 tile = 128 codes a lane = BITS loads of 16 bytes
//   meta   [N/64][K/group][8][8] (fp16 scale, fp16 zero) of rows 16 * (i / 2) + 8 * (i % 2) + g for [g][i]
// Word `mt` of each lane's 16 bytes belongs to rows 16 * mt .. + 15. The tile's 64 in-features are permuted so that a
// lane's share of an activation row is two runs of 8 (one in each half of 32): k = 32 * half + 8 * (lane % 4) + ...,
// read straight from the row-major activations.
//
// Weights are the MMA's M operand, tokens its N. For up to 8 tokens the MMA sees bare codes (codes.cuh); scale and zero
// act once a group on the accumulators, where the group's sum of x comes from one more MMA by ones: no weight is ever
// rounded. For more the weights themselves are scaled.
//
// Each warp owns a run of K and a private ring of STAGES tiles in shared memory filled by cp.async: no barrier in the
// loop. The warps' partial sums are added in a fixed order at the end. Blocks are persistent: while one unit of work is
// finished, the ring already fills for the next.
//
// Roofline: (BITS + 32 / group) / 8 bytes a weight. At 3.5 bits and 3.1 TB/s an SM of an H100 takes one 64x64 tile in
// about 130 clocks, in which its four schedulers can issue 520 instructions; a tile takes about 285 for 8 tokens.
#pragma once
#include "launch.cuh"

constexpr int X_BYTES = 1024 * NT;
constexpr int STAGE_BYTES = CODE_BYTES + META_BYTES + X_BYTES;

// Copies tile after tile of one row tile into the ring.
struct Loader {
  const char *codes, *meta;  // of the next tile (meta: of this row tile), at this lane
  const char* activation;
  u32 x[NT];                 // this lane's part of its token's activations for the next tile, in bytes from there
  u64 policy;
  u32 mine;                  // this warp's ring, at this lane's 16 bytes
  int meta_shift, in_features;
  bool has_meta;             // this lane copies 16 bytes of metadata

  __device__ __forceinline__ void weights(int kt, u32 slot) {
    const u32 to = mine + slot;
#pragma unroll
    for (int j = 0; j < BITS; ++j) copy_weights(to + j * 512, codes + j * 512, policy);
    if (HALVES == 2 || has_meta) copy_weights(to + CODE_BYTES, meta + (kt >> meta_shift) * META_BYTES, policy);
    codes += CODE_BYTES;
  }
  // Beyond K (whose last tile may be half full) zeros; where there is no token, another's activations: the columns of
  // an MMA do not mix, and that one's is not written.
  __device__ __forceinline__ void activations(int nt, u32 at, bool whole, u32 slot) const {
    const char* from = activation + at;
    const u32 to = mine + slot + CODE_BYTES + META_BYTES + nt * 1024;
    copy_activations(to, from, 16);
    copy_activations(to + 512, from + 64, whole ? 16 : 0);
  }
  __device__ __forceinline__ bool whole(int kt) const { return kt * 64 + 32 < in_features; }
};

// What a tile is multiplied by the first N n8 tiles of tokens with. `at`: its place in the ring, at this lane's 16 bytes;
// `meta_at`: at the metadata of this lane's rows.
template <int N>
struct Operands {
  uint4 words[BITS], meta[HALVES][2], x[N][2];

  __device__ __forceinline__ Operands(u32 at, u32 meta_at) {
#pragma unroll
    for (int j = 0; j < BITS; ++j) words[j] = load_shared(at + j * 512);
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) meta[h][i] = load_shared(meta_at + h * 256 + i * 16);
    }
#pragma unroll
    for (int nt = 0; nt < N; ++nt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x[nt][half] = load_shared(at + CODE_BYTES + META_BYTES + nt * 1024 + half * 512);
      }
    }
  }
  // The 16 pairs of rows 16 * mt .. + 15, as they come from `decode`.
  __device__ __forceinline__ void pairs(int mt, u32 (&found)[16]) const {
    u32 mine[BITS];
#pragma unroll
    for (int j = 0; j < BITS; ++j) mine[j] = component(words[j], mt);
    decode<B16, BITS>(mine, found);
  }
  // fp16 scale and zero of row g or g + 8 of them.
  __device__ __forceinline__ u32 scale_zero(int mt, int half, int row) const {
    return component(meta[half][mt / 2], mt % 2 * 2 + row);
  }
};

// Up to 8 tokens: total += the product in units of 2^-P. Scale and zero act on the accumulators.
__device__ __forceinline__ void multiply_few(u32 at, u32 meta_at, Accumulators& total) {
  const Operands<1> o(at, meta_at);
  float sums[HALVES][4] = {};
  constexpr u32 one = B16 ? 0x3f803f80u : 0x3c003c00u;
  constexpr u32 ones[4] = {one, one, one, one};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mma<B16>(sums[half % HALVES], ones, o.x[0][half].x, o.x[0][half].y);
    mma<B16>(sums[half % HALVES], ones, o.x[0][half].z, o.x[0][half].w);
  }
#pragma unroll
  for (int mt = 0; mt < 4; ++mt) {
    u32 pairs[16];
    o.pairs(mt, pairs);
    float scale[HALVES][2], d[HALVES][4];
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const u32 both = o.scale_zero(mt, h, row);
        scale[h][row] = from_fp16(static_cast<u16>(both));
        const float zero = -BASE<B16> - (1 << P<B16, BITS>) * from_fp16(static_cast<u16>(both >> 16));
        d[h][2 * row] = zero * sums[h][0], d[h][2 * row + 1] = zero * sums[h][1];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mma<B16>(d[half % HALVES], pairs + half * 8, o.x[0][half].x, o.x[0][half].y);
      mma<B16>(d[half % HALVES], pairs + half * 8 + 4, o.x[0][half].z, o.x[0][half].w);
    }
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[mt][0][i] += scale[h][i / 2] * d[h][i];
    }
  }
}

// More tokens: total += the product. It is cheaper to scale the 64 weight pairs of a lane, and round them to 16 bits,
// than its accumulators. Codes are taken around their middle: what is then left of the zero is small, and so is the
// error of rounding it.
template <int N>
__device__ __forceinline__ void multiply_many(u32 at, u32 meta_at, Accumulators& total) {
  const Operands<N> o(at, meta_at);
  constexpr int MIDDLE = 1 << (BITS - 1);
  constexpr float unit = 1.0f / (1 << P<B16, BITS>);
  constexpr u32 units = pattern<B16>(unit), offset = pattern<B16>(-(BASE<B16> * unit + MIDDLE));
#pragma unroll
  for (int mt = 0; mt < 4; ++mt) {
    u32 pairs[16];
    o.pairs(mt, pairs);
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const u32 both = o.scale_zero(mt, h, row);
        const float s = from_fp16(static_cast<u16>(both)), z = from_fp16(static_cast<u16>(both >> 16));
        const u32 scale = pair_16<B16>(s, s);
        const float rounded = B16 ? from_bf16(static_cast<u16>(scale)) : s;  // the zero of the scale that is used
        const float shift = rounded * (MIDDLE - z);
        const u32 shifts = pair_16<B16>(shift, shift);
#pragma unroll
        for (int i = h * 8 + row; i < (HALVES == 2 ? h * 8 + 8 : 16); i += 2) {
          pairs[i] = fma2<B16>(fma2<B16>(pairs[i], units, offset), scale, shifts);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int nt = 0; nt < N; ++nt) mma<B16>(total[mt][nt], pairs + half * 8, o.x[nt][half].x, o.x[nt][half].y);
#pragma unroll
      for (int nt = 0; nt < N; ++nt) mma<B16>(total[mt][nt], pairs + half * 8 + 4, o.x[nt][half].z, o.x[nt][half].w);
    }
  }
}

// By as many n8 tiles of tokens as there are: a branch here, none inside.
template <int N = NT>
__device__ __forceinline__ void multiply_tile(u32 at, u32 meta_at, int tiles, Accumulators& total) {
  if constexpr (NT == 1) {
    multiply_few(at, meta_at, total);
  } else {
    if constexpr (N > 1) {
      if (tiles < N) return multiply_tile<N - 1>(at, meta_at, tiles, total);
    }
    multiply_many<N>(at, meta_at, total);
  }
}

// Where the sum for a token and a row stands in a slice of the reduction: without bank conflicts for those who spread
// accumulators and for those who gather rows.
__device__ __forceinline__ int place(int token, int row) { return token * 64 + (row ^ (token / 2 % 4 * 8)); }
constexpr int SLICE = TOKENS * 64;  // floats
// Slices of a part are added up by a team. For up to 8 tokens that is one warp, whose turn it is, while the others go on
// to the next part and another buffer; more tokens are too much for one, so all warps do it together.
constexpr bool TOGETHER = NT > 1;
constexpr int BUFFERS = TOGETHER ? 1 : 2, TEAM = TOGETHER ? THREADS : WARP;

__device__ __forceinline__ int team_thread() { return static_cast<int>(threadIdx.x) % TEAM; }
__device__ __forceinline__ void team_sync() {
  if constexpr (TOGETHER) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
// What the team wrote before is visible to whoever sees the counter go up.
__device__ __forceinline__ void team_add(int* counter) {
  __threadfence();
  team_sync();
  if (team_thread() == 0) atomicAdd(counter, 1);
}

// This warp's accumulators to its slice.
__device__ __forceinline__ void spread(const Accumulators& total, float* slice) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int mt = 0; mt < 4; ++mt) {
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        slice[place(nt * 8 + lane % 4 * 2 + i % 2, mt * 16 + i / 2 * 8 + lane / 4)] = total[mt][nt][i] * UNIT;
      }
    }
  }
}

__device__ __forceinline__ float gather(const float* partial, int token, int row) {
  float sum = 0;
  const int at = place(token, row);
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += partial[w * SLICE + at];
  return sum;
}
