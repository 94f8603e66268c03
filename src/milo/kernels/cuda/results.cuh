// From a warpgroup's sums to memory. Sums are one row of weights by columns of tokens; memory holds a token's row in one
// piece, so they pass through shared memory, transposed, 64 numbers of 16 bits a token at a time.
#pragma once
#include "fragments.cuh"

using Sums = float[2][WIDTH / 2];

struct Group {  // this thread's place among the consumers
  int half, turn, warp, lane;  // which two row tiles, which stages
  u32 base;

  __device__ __forceinline__ explicit Group(u32 shared) : base(shared) {
    int thread = threadIdx.x - GROUP_THREADS;
    asm volatile("" : "+r"(thread));  // nothing that follows from it is to be kept over a unit's products
    half = thread / GROUP_THREADS % 2, turn = thread / (2 * GROUP_THREADS), warp = thread / WARP % 4, lane = thread % WARP;
  }
  __device__ __forceinline__ int odd() const { return warp % 2; }
  // Of the unit's row tiles.
  __device__ __forceinline__ int tile(const Unit& u) const { return (u.halved ? 0 : 2 * half) + warp / 2; }
  __device__ __forceinline__ bool works(const Unit& u) const { return u.halved || 2 * half < u.tiles; }
  __device__ __forceinline__ int thread() const { return warp * WARP + lane; }
  __device__ __forceinline__ bool takes(const Ring& ring) const { return TURNS == 1 || ring.slot % TURNS == turn; }
  __device__ __forceinline__ u32 results() const { return base + RESULTS_AT + half * RESULTS_BYTES; }
  __device__ __forceinline__ u32 choices() const { return base + CHOICES_AT + half * CHOICES_BYTES; }
  __device__ __forceinline__ u32 others() const { return base + SUMS_AT + half * SUMS_BYTES + thread() * 16; }
  __device__ __forceinline__ void sync() const { named_barrier(1 + half, GROUP_THREADS); }  // of one turn
  __device__ __forceinline__ void sync_turns() const { named_barrier(5 + half, TURNS * GROUP_THREADS); }
};

__device__ __forceinline__ float activate(float g) {
  if constexpr (MILO_ACTIVATION == 0) return fast_silu(g);
  if constexpr (MILO_ACTIVATION == 1) return 0.5f * g * (1 + tanhf(0.7978845608028654f * (g + 0.044715f * g * g * g)));
  return 0.5f * g * (1 + erff(0.7071067811865476f * g));
}

// The sums of both turns, in the first turn's registers.
__device__ __forceinline__ void add_turns(const Group& at, int count, Sums& sums) {
  if constexpr (TURNS == 2) {
    static_assert(WIDTH % 8 == 0);
    if (at.turn) {
#pragma unroll
      for (int i = 0; i < WIDTH / 2; i += 4) {
        if (i * 2 < count) {
#pragma unroll
          for (int b = 0; b < 2; ++b) store_floats(at.others() + (b * WIDTH / 2 + i) * GROUP_THREADS * 4, &sums[b][i]);
        }
      }
    }
    at.sync_turns();
    if (!at.turn) {
#pragma unroll
      for (int i = 0; i < WIDTH / 2; i += 4) {
        if (i * 2 < count) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const uint4 more = load_shared(at.others() + (b * WIDTH / 2 + i) * GROUP_THREADS * 4);
            sums[b][i] += __uint_as_float(more.x), sums[b][i + 1] += __uint_as_float(more.y);
            sums[b][i + 2] += __uint_as_float(more.z), sums[b][i + 3] += __uint_as_float(more.w);
          }
        }
      }
    }
    at.sync_turns();  // before the second turn's next ones
  }
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
    if (p.bias && at.tile(u) < u.tiles) {
      const u16* from = p.bias + (u.tile + at.tile(u)) * 64 + b * 32 + at.odd() * 16 + at.lane / 4;
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

// V's sums. The last of the parts of K to arrive adds all of them up, in their order.
__device__ __forceinline__ void write_t(const Params& p, const Unit& u, const Group& at, const Sums& sums) {
  const long long part = static_cast<long long>(p.places) * p.t_stride;
  if (at.tile(u) < u.tiles) {
    const int column = (u.tile + at.tile(u)) * 64 + at.odd() * 16 + at.lane / 4, n = at.lane % 4 * 2;
    float* to = p.t_partial + (2 * u.split + (u.halved ? at.half : 0)) * part +
                static_cast<long long>(u.begin + n) * p.t_stride + column;
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) {
      if (i / 4 * 8 + i % 2 + n < u.count) {
        float* here = to + (i / 4 * 8 + i % 2) * p.t_stride + i / 2 % 2 * 8;
        __stcg(here, sums[0][i]);
        __stcg(here + 32, sums[1][i]);
      }
    }
  }
  constexpr int CONSUMERS = 2 * GROUP_THREADS;
  const int thread = at.half * GROUP_THREADS + at.thread();
  __threadfence();
  named_barrier(3, CONSUMERS);
  if (p.v_splits > 1) {
    const u32 flag = at.base + FLAG_AT;
    if (thread == 0) {
      store_shared_word(flag, atomicAdd(p.v_arrived + u.item * p.v_groups + u.group, 1) == p.v_splits - 1);
    }
    named_barrier(3, CONSUMERS);
    const bool last = load_shared_word(flag);
    named_barrier(3, CONSUMERS);  // all have read the flag
    if (!last) return;
    __threadfence();
  }
  const int width = u.tiles * 64;
  for (int i = thread; i < width * u.count; i += CONSUMERS) {
    const int column = u.tile * 64 + i % width;
    const long long place = u.begin + i / width;
    const float* from = p.t_partial + place * p.t_stride + column;
    float t = 0;
    for (int s = 0; s < 2 * p.v_splits; s += u.halved ? 1 : 2) t += __ldcg(from + s * part);
    if (!B16) t = fminf(fmaxf(t, -65504.0f), 65504.0f);
    p.t[place * p.t_stride + column] = round_to_16<B16>(t);
  }
  __threadfence();
  named_barrier(3, CONSUMERS);
  if (thread == 0) atomicAdd(p.v_done + u.item, 1);
}
