// A whole MoE FFN for many tokens an expert, on sm_90a, in four launches; also a plain linear, in two.
//
//   prepare:  sorts the pairs (token, choice) by expert and cuts them into items; copies x with its columns in the
//             order of the tensor core's operands
//   multiply: t = V x;  h = act(W_gate x + U_gate t) * (W_up x + U_up t)
//   multiply: t = V h;  (W h + U t) * the router's weight, 16 bits a pair and row
//   combine:  their sum over a token's choices, in their order
//
// `multiply` is persistent, a block an SM: a warpgroup of producers keeps a ring of stages full over the borders of
// units, two of consumers turn packed codes into the tensor core's A operand in registers, a step of 16
// in-features at a time, while the products of the steps before run. Weights are scaled and rounded to 16 bits, as every
// dequantising kernel does; sums are fp32. No sum depends on the order of arrival.
//
// Roofline: a stage (256 rows, n tokens) takes 8 n clocks of the tensor cores, 4 n clocks of shared memory for their
// operand, and each scheduler about 520 instructions, mostly of decoding; 7 KiB of weights and n / 8 KiB of activations
// come from L2. The weights alone take DRAM about 520 clocks: below about 64 tokens an item decoding and DRAM are the
// limit, and what counts is that enough warps hide each other's latencies; above, the tensor cores.
#include "prepare.cuh"
#include "produce.cuh"
#include "results.cuh"

// d += A * B over 16 numbers along k, for all N columns: the width is part of the instruction, and choosing it here would
// cost more than columns without a token do. A group of its own.
template <int N>
__device__ __forceinline__ void multiply_step(float* d, const u32 (&a)[4], u32 b) {
  products_begin();
  product<B16, N>(d, a, b);
  products_commit();
}

// A step of a block. A warp that asks for more products than the tensor core has begun waits there, so it decodes in
// between. Of the products before, at most three run on: the registers of this step are free.
template <int N, int STEP>
__device__ __forceinline__ void decode_and_multiply(const Scaling& scaling, Words& words, u32 (&a)[4][4], u32 x,
                                                    float* sums) {
  products_wait<3>();
  scaling.step<STEP>(words.codes, a[STEP]);
  multiply_step<N>(sums, a[STEP], x + STEP * NEXT_16);
}

template <int N>
__device__ __forceinline__ void clear(float (&sums)[2][N]) {
#pragma unroll
  for (int b = 0; b < 2; ++b) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[b][i] = 0;
  }
}

// W x. The words of a stage are on their way from shared memory while the last products of the one before are decoded
// for; otherwise the tensor core would be idle from one stage to the next.
//
// The second warpgroup starts LAG stages behind the first, so that one writes its results while the other multiplies. The
// first cannot tell of its next unit before the second has begun this one: the ring has fewer stages than a unit.
__device__ __forceinline__ void multiply_weights(const Unit& u, const Group& at, Ring ring, Sums& sums) {
  constexpr int LAG = MILO_LAG;
  const bool lags = LAG && u.tiles > ROW_TILES / 2 && u.k_tiles >= STAGES;
  const int tell = lags && at.half == 0 ? u.k_tiles - LAG : -1;
  if (lags && at.half == 1) named_barrier(3, 2 * GROUP_THREADS);
  clear(sums);
  u32 a[4][4];
  u32 done = 0;  // the barrier of the stage before, to arrive at once its products are done
  Loading next;
  ring.wait_full();
  next.load(ring, at.tile(), at.odd(), at.lane);
#pragma unroll 1
  for (int left = u.k_tiles; left > 0; --left) {
    Words words[2];
    words[0].take<0>(next, at.odd());
    words[1].take<1>(next, at.odd());
    const u32 x = operand(ring.x());
    const u32 empty = ring.empty();
    {
      const Scaling scaling(words[0].meta);
      decode_and_multiply<WIDTH, 0>(scaling, words[0], a, x, sums[0]);
      decode_and_multiply<WIDTH, 1>(scaling, words[0], a, x, sums[0]);
      decode_and_multiply<WIDTH, 2>(scaling, words[0], a, x, sums[0]);
      decode_and_multiply<WIDTH, 3>(scaling, words[0], a, x, sums[0]);
    }
    const Scaling scaling(words[1].meta);
    decode_and_multiply<WIDTH, 0>(scaling, words[1], a, x, sums[1]);
    if (done && at.lane == 0) barrier_arrive(done);
    done = empty;
    decode_and_multiply<WIDTH, 1>(scaling, words[1], a, x, sums[1]);
    ring.next();
    if (left == tell) named_arrive(3, 2 * GROUP_THREADS);
    if (left > 1) {
      ring.wait_full();
      next.load(ring, at.tile(), at.odd(), at.lane);
    }
    decode_and_multiply<WIDTH, 2>(scaling, words[1], a, x, sums[1]);
    decode_and_multiply<WIDTH, 3>(scaling, words[1], a, x, sums[1]);
  }
  products_wait<0>();
  if (at.lane == 0) barrier_arrive(done);
}

// + U t.
__device__ __forceinline__ void add_compensator(const Params& p, const Unit& u, const Group& at, Ring ring, Sums& sums) {
  ring.skip(u.k_tiles);
  const u32 second = p.parts == 2 ? 2 * NEXT_16 : 0;  // from t of the first part to t of the other
  const int each = steps_a_stage(p), stages = u_stages(p, u);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage, ring.next()) {
    ring.wait_full();
    const int steps = min(each, u.steps - stage * each);
    u32 t = operand(ring.x());
#pragma unroll 1
    for (int s = 0; s < steps; s += 2, t += 2 * NEXT_16) {
      u32 f[2][2][4];
      factor_fragments(ring, at.tile(), s, p.parts, at.odd(), at.lane, f[0]);
      multiply_step<WIDTH>(sums[0], f[0][0], t);
      multiply_step<WIDTH>(sums[1], f[0][1], t + second);
      if (s + 1 < steps) {
        factor_fragments(ring, at.tile(), s + 1, p.parts, at.odd(), at.lane, f[1]);
        multiply_step<WIDTH>(sums[0], f[1][0], t + NEXT_16);
        multiply_step<WIDTH>(sums[1], f[1][1], t + second + NEXT_16);
      }
      products_wait<0>();
    }
    if (at.lane == 0) barrier_arrive(ring.empty());
  }
}

// V x, for half of the tokens.
__device__ __forceinline__ void multiply_v(const Unit& u, const Group& at, Ring ring, HalfSums& sums) {
  clear(sums);
  u32 a[4][4];
  const u32 half = at.half * (WIDTH / 2 * 128 / 16);
#pragma unroll 1
  for (int left = u.k_tiles; left > 0; --left, ring.next()) {
    ring.wait_full();
    const u32 x = operand(ring.x()) + half;
#pragma unroll
    for (int b = 0; b < V_TILES; ++b) {
      if (b < u.tiles) {
        Words words;
        words.load(ring, b, at.warp, at.lane);
        const Scaling scaling(words.meta);
        decode_and_multiply<WIDTH / 2, 0>(scaling, words, a, x, sums[b]);
        decode_and_multiply<WIDTH / 2, 1>(scaling, words, a, x, sums[b]);
        decode_and_multiply<WIDTH / 2, 2>(scaling, words, a, x, sums[b]);
        decode_and_multiply<WIDTH / 2, 3>(scaling, words, a, x, sums[b]);
      }
    }
    products_wait<0>();
    if (at.lane == 0) barrier_arrive(ring.empty());
  }
}

__device__ __forceinline__ void consume(const Params& p) {
  Ring ring(uniform(shared_address(shared_memory())));
  wait_for_primary();
  const int items = uniform(*p.item_count);
  for (int number = blockIdx.x;; number += gridDim.x) {
    const Unit u(p, number, items);
    if (u.past) break;
    if (!u.tiles) continue;
    const Group at(ring.base);
    const int stages = u.k_tiles + u_stages(p, u);
    if (!at.works(u)) {
      Ring idle = ring;
#pragma unroll 1
      for (int left = stages; left > 0; --left, idle.next()) {
        idle.wait_full();
        if (at.lane == 0) barrier_arrive(idle.empty());
      }
    } else if (u.is_v) {
      HalfSums sums;
      multiply_v(u, at, ring, sums);
      write_v(p, u, at, sums);
    } else {
      if (p.order && p.parts == 1) {  // wanted at the end
        for (int n = at.thread(); n < u.count; n += GROUP_THREADS) {
          copy_word(at.choices() + n * 4, p.order + u.begin + n);
          if (p.choice_weights) copy_word(at.choices() + (WIDTH + n) * 4, p.choice_weights + u.begin + n);
        }
      }
      Sums sums;
      multiply_weights(u, at, ring, sums);
      add_compensator(p, u, at, ring, sums);
      const Group again(ring.base);
      p.parts == 2 ? write_hidden(p, u, again, sums) : write_rows(p, u, again, sums);
    }
    ring.skip(stages);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, MILO_BLOCKS) multiply(const __grid_constant__ Params p) {
  const u32 base = shared_address(shared_memory());
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(base + BARRIERS_AT + s * 8, 1 + TOKEN_THREADS / WARP);  // the producers' warps
      barrier_init(base + BARRIERS_AT + (STAGES + s) * 8, 8);  // the consumers' warps
    }
    barrier_init_done();
  }
  __syncthreads();
  const int warp = uniform(threadIdx.x / WARP);
  if (warp < GROUP_THREADS / WARP) {
    give_registers<MILO_PRODUCER_REGISTERS>();
    if (warp == 0) {
      produce_weights(p);
    } else {
      produce_tokens(p);
    }
  } else {
    take_registers<MILO_CONSUMER_REGISTERS>();
    consume(p);
  }
}
