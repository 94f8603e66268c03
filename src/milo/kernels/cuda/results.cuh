// From a warpgroup's sums to memory. Sums are one row of weights by columns of tokens; memory holds a token's row in one
// piece, so they pass through shared memory, transposed, 64 numbers of 16 bits a token at a time.
#pragma once
#include "fragments.cuh"

using Sums = float[2][WIDTH / 2];
using HalfSums = float[V_TILES][WIDTH / 4];  // of half the tokens

struct Group {  // this thread's place among the consumers
  int half, warp, lane;
  u32 base;

  __device__ __forceinline__ explicit Group(u32 memory) : base(memory) {
    int thread = threadIdx.x - GROUP_THREADS;
    asm volatile("" : "+r"(thread));  // nothing that follows from it is to be kept over a unit's products
    const int number = uniform(thread / WARP);
    half = number / 4, warp = number % 4, lane = thread % WARP;
  }
  __device__ __forceinline__ int odd() const { return warp % 2; }
  __device__ __forceinline__ int tile() const { return 2 * half + warp / 2; }  // of the unit's row tiles
  // Whether there is anything to do: row tiles, or for V tokens.
  __device__ __forceinline__ bool works(const Unit& u) const {
    return u.is_v ? half * (WIDTH / 2) < u.count : 2 * half < u.tiles;
  }
  __device__ __forceinline__ int thread() const { return warp * WARP + lane; }
  __device__ __forceinline__ u32 results() const { return base + RESULTS_AT + half * RESULTS_BYTES; }
  __device__ __forceinline__ u32 choices() const { return base + CHOICES_AT + half * CHOICES_BYTES; }
  __device__ __forceinline__ u32 flag() const { return base + FLAGS_AT + half * 4; }
  __device__ __forceinline__ void sync() const { named_barrier(1 + half, GROUP_THREADS); }
};

__device__ __forceinline__ float activate(float g) {
  if constexpr (MILO_ACTIVATION == 0) return fast_silu(g);
  if constexpr (MILO_ACTIVATION == 1) return 0.5f * g * (1 + tanhf(0.7978845608028654f * (g + 0.044715f * g * g * g)));
  return 0.5f * g * (1 + erff(0.7071067811865476f * g));
}

// Chunk `chunk` (8 numbers) of a token in the transposed results.
__device__ __forceinline__ u32 result(const Group& at, int token, int chunk) {
  return at.results() + token * 128 + ((chunk ^ token % 8) * 16);
}

// `value(i, n)`: two results of this thread, of accumulators i and i + 1 (rows alike, tokens n and n + 1), as a pair of
// 16-bit numbers. Chunk 2 * warp + r of a token gets rows 8 * r .. + 7 of the warp's 16.
template <class Value>
__device__ __forceinline__ void transpose(const Group& at, int count, Value value) {
  const u32 to = result(at, at.lane / 16 * 8 + at.lane % 8, 2 * at.warp + at.lane / 8 % 2);
#pragma unroll
  for (int j = 0; j < WIDTH / 8; j += 2) {
    if (j * 8 < count) {
      u32 v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = value((j + i / 2) * 4 + i % 2 * 2, (j + i / 2) * 8 + at.lane % 4 * 2);
      }
      store_transposed(to + j * 8 * 128, v);
    }
  }
  at.sync();
}

// h = act(gate) * up, in the order of the next product's operand: rows of 64 columns, zeros beyond the last.
__device__ __forceinline__ void write_hidden(const Params& p, const Unit& u, const Group& at, const Sums& sums) {
  transpose(at, u.count, [&](int i, int) {
    const float low = activate(sums[0][i]) * sums[1][i];
    const float high = activate(sums[0][i + 1]) * sums[1][i + 1];
    return pair_16<B16>(low, high);
  });
  // Chunk 2 * sub + c of a half of 32 columns takes word 2 * sub + c of the four chunks that hold its features.
  const int first = u.tile + 2 * at.half, word = at.thread() % 4, half = at.thread() / 4 % 2;
  const bool exists = first + half < u.tile + u.tiles;
  u16* out = p.out + static_cast<long long>(u.begin) * p.pitch_out + first * 32 + half * 32 + word * 8;
  for (int n = at.thread() / 8; n < u.count; n += GROUP_THREADS / 8) {
    uint4 v;
    v.x = load_shared_word(result(at, n, half * 4) + word * 4);
    v.y = load_shared_word(result(at, n, half * 4 + 1) + word * 4);
    v.z = load_shared_word(result(at, n, half * 4 + 2) + word * 4);
    v.w = load_shared_word(result(at, n, half * 4 + 3) + word * 4);
    if (!exists) v = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(out + static_cast<long long>(n) * p.pitch_out) = v;
  }
  at.sync();
}

// Rows of the result: those of each pair, weighted, or of each token, with the bias.
__device__ __forceinline__ void write_rows(const Params& p, const Unit& u, const Group& at, const Sums& sums) {
  if (p.order) {
    copies_wait();
    at.sync();
  }
  const int chunk = at.thread() % 8;
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    float bias[2] = {0, 0};
    if (p.bias && at.tile() < u.tiles) {
      const u16* from = p.bias + (u.tile + at.tile()) * 64 + b * 32 + at.odd() * 16 + at.lane / 4;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (from + 8 * r < p.bias + p.rows) bias[r] = B16 ? from_bf16(from[8 * r]) : from_fp16(from[8 * r]);
      }
    }
    transpose(at, u.count, [&](int i, int n) {
      float2 weight = {1, 1};
      if (p.choice_weights) {
        const uint2 both = load_shared_pair(at.choices() + WIDTH * 4 + n * 4);
        weight.x = __uint_as_float(both.x), weight.y = __uint_as_float(both.y);
      }
      const float plus = i % 4 < 2 ? bias[0] : bias[1];
      return pair_16<B16>(sums[b][i] * weight.x + plus, sums[b][i + 1] * weight.y + plus);
    });
    const int tile = 2 * at.half + chunk / 4, row = (u.tile + tile) * 64 + b * 32 + chunk % 4 * 8;
    if (tile < u.tiles && row < p.rows) {
      for (int n = at.thread() / 8; n < u.count; n += GROUP_THREADS / 8) {
        const uint4 v = load_shared(result(at, n, chunk));
        const long long to = p.order ? load_shared_word(at.choices() + n * 4) : u.begin + n;
        *reinterpret_cast<uint4*>(p.out + to * p.pitch_out + row) = v;
      }
    }
    at.sync();
  }
}

// A number that 16 bits can hold.
__device__ __forceinline__ float in_range(float t) { return B16 ? t : fminf(fmaxf(t, -65504.0f), 65504.0f); }

// t from the sums over all parts of K, in their order, with all that four ranks of a token need on the way at once:
// everybody waits for it in the end.
__device__ __forceinline__ void add_parts(const Params& p, const float* partial, u16* t, long long part, int chunks,
                                          int count, const Group& at) {
#pragma unroll 1
  for (int i = at.thread(); i < chunks * count; i += GROUP_THREADS) {
    const Quotient where = divide(i, chunks);  // a token, four ranks
    const long long offset = static_cast<long long>(where.q) * p.t_stride + where.r * 4;
    float4 v[MILO_V_SPLITS], sum = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < MILO_V_SPLITS; ++s) {
      v[s] = {0, 0, 0, 0};
      if (s < p.v_splits) v[s] = __ldcg(reinterpret_cast<const float4*>(partial + s * part + offset));
    }
#pragma unroll
    for (int s = 0; s < MILO_V_SPLITS; ++s) {
      sum.x += v[s].x, sum.y += v[s].y, sum.z += v[s].z, sum.w += v[s].w;
    }
    const u32 low = pair_16<B16>(in_range(sum.x), in_range(sum.y)), high = pair_16<B16>(in_range(sum.z), in_range(sum.w));
    *reinterpret_cast<uint2*>(t + offset) = make_uint2(low, high);
  }
}

// V's sums over a part of K; of all parts the last to arrive adds them up.
__device__ __forceinline__ void write_v(const Params& p, const Unit& u, const Group& at, const HalfSums& sums) {
  const int first = at.half * (WIDTH / 2), count = min(u.count - first, WIDTH / 2);
  const int ranks = min(p.parts * u.steps * 16 - u.tile * 64, u.tiles * 64);  // of these row tiles; a multiple of 16
  const int stride = p.t_stride;
  const long long place = u.begin + first, part = static_cast<long long>(p.places) * stride;
  float* partial = p.t_partial + place * stride + u.tile * 64;
  const int rank = at.warp * 16 + at.lane / 4, token = at.lane % 4 * 2;
  const long long to = token * static_cast<long long>(stride) + rank;
  u16* t = p.t + place * stride + u.tile * 64;
#pragma unroll
  for (int b = 0; b < V_TILES; ++b) {
    if (b * 64 + at.warp * 16 < ranks) {
#pragma unroll
      for (int i = 0; i < WIDTH / 4; ++i) {
        if (i / 4 * 8 + i % 2 + token < count) {
          const long long here = to + (i / 4 * 8 + i % 2) * stride + b * 64 + i / 2 % 2 * 8;
          if (p.v_splits == 1) {
            t[here] = round_to_16<B16>(in_range(sums[b][i]));
          } else {
            __stcg(partial + u.split * part + here, sums[b][i]);
          }
        }
      }
    }
  }
  __threadfence();
  at.sync();
  if (p.v_splits > 1) {
    if (at.thread() == 0) {
      int* arrived = p.v_arrived + (u.item * p.v_groups + u.group) * 2 + at.half;
      store_shared_word(at.flag(), atomicAdd(arrived, 1) == p.v_splits - 1);
    }
    at.sync();
    const bool last = load_shared_word(at.flag());
    at.sync();  // all have read the flag
    if (!last) return;
    __threadfence();
    add_parts(p, partial, t, part, ranks / 4, count, at);
    __threadfence();
    at.sync();
  }
  if (at.thread() == 0) atomicAdd(p.v_done + u.item, 1);
}
