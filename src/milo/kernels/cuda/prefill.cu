// A whole MoE FFN for many tokens an expert, on sm_90a, in four launches; also a plain linear, in two.
//
//   prepare:  sorts the pairs (token, choice) by expert and cuts them into items; copies x with its columns in the
//             order of the tensor core's operands
//   multiply: t = V x;  h = act(W_gate x + U_gate t) * (W_up x + U_up t)
//   multiply: t = V h;  (W h + U t) * the router's weight, 16 bits a pair and row
//   combine:  their sum over a token's choices, in their order
//
// `multiply` is persistent, a block an SM: a warpgroup of producers keeps a ring of stages full over the borders of
// units, two or four of consumers turn packed codes into the tensor core's A operand in registers, a step of 16
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

// d += A * B over 16 numbers along k, for all WIDTH columns: the width is part of the instruction, and choosing it here
// would cost more than columns without a token do. A group of its own.
__device__ __forceinline__ void multiply_step(float* d, const u32 (&a)[4], u64 b) {
  products_begin();
  product<B16, WIDTH>(d, a, b, 1);
  products_commit();
}

// A step of a block. A warp that asks for more products than the tensor core has begun waits there, so it decodes in
// between. Of the products before, at most three run on: the registers of this step are free.
template <int STEP>
__device__ __forceinline__ void decode_and_multiply(const Scaling& scaling, u32 (&words)[BITS], u32 (&a)[4][4], u64 x,
                                                    float* sums) {
  products_wait<3>();
  scaling.step<STEP>(words, a[STEP]);
  multiply_step(sums, a[STEP], x + STEP * NEXT_16);
}

// The sums of a unit.
__device__ __forceinline__ void accumulate(const Params& p, const Unit& u, const Group& at, Ring& ring, Sums& sums) {
#pragma unroll
  for (int b = 0; b < 2; ++b) {
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) sums[b][i] = 0;
  }
  const int tile = at.tile(u);
  u32 a[4][4];
  u32 last = 0;  // the barrier of the last stage's slot, for the lane that arrives there
#pragma unroll 1
  for (int i = 0; i < u.k_tiles; ++i, ring.next()) {
    if (!at.takes(ring)) continue;
    ring.wait_full();
    if (u.halved && i / TURNS % 2 != at.half) {  // the other half's
      if (at.lane == 0) barrier_arrive(ring.empty());
      continue;
    }
    Words words;
    words.load(ring, tile, at.odd(), at.lane);
    fence_for_tensor_core();
    const u64 x = operand(uniform(ring.x()));
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const Scaling scaling(words.meta[b]);
      decode_and_multiply<0>(scaling, words.codes[b], a, x, sums[b]);
      if (b == 1 && last) barrier_arrive(last);  // all products of the last stage are done
      decode_and_multiply<1>(scaling, words.codes[b], a, x, sums[b]);
      decode_and_multiply<2>(scaling, words.codes[b], a, x, sums[b]);
      decode_and_multiply<3>(scaling, words.codes[b], a, x, sums[b]);
    }
    last = at.lane == 0 ? ring.empty() : 0;
  }
  products_wait<0>();
  if (last) barrier_arrive(last);
  const u64 second = p.parts == 2 ? 2 * NEXT_16 : 0;  // from t of the first part to t of the other
  const int each = steps_a_stage(p), stages = u.steps ? u_stages(p, u.steps) : 0;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage, ring.next()) {
    if (!at.takes(ring)) continue;
    ring.wait_full();
    fence_for_tensor_core();
    const int steps = min(each, u.steps - stage * each);
    u64 t = operand(uniform(ring.x()));
#pragma unroll 1
    for (int s = 0; s < steps; s += 2, t += 2 * NEXT_16) {
      u32 f[2][2][4];
      factor_fragments(ring, tile, s, p.parts, at.odd(), at.lane, f[0]);
      multiply_step(sums[0], f[0][0], t);
      multiply_step(sums[1], f[0][1], t + second);
      if (s + 1 < steps) {
        factor_fragments(ring, tile, s + 1, p.parts, at.odd(), at.lane, f[1]);
        multiply_step(sums[0], f[1][0], t + NEXT_16);
        multiply_step(sums[1], f[1][1], t + second + NEXT_16);
      }
      products_wait<0>();
    }
    if (at.lane == 0) barrier_arrive(ring.empty());
  }
}

__device__ __forceinline__ void consume(const Params& p) {
  Ring ring(shared_address(shared_memory()));
  wait_for_primary();
  const int items = *p.item_count;
  for (int number = blockIdx.x;; number += gridDim.x) {
    Sums sums;
    {
      const Group at(ring.base);
      const Unit u(p, number, items);
      if (u.past) break;
      if (!u.tiles) continue;
      if (at.works(u)) {
        if (p.order && p.parts == 1 && !u.is_v && at.turn == 0) {  // wanted at the end
          for (int n = at.thread(); n < u.count; n += GROUP_THREADS) {
            copy_word(at.choices() + n * 4, p.order + u.begin + n);
            if (p.choice_weights) copy_word(at.choices() + (WIDTH + n) * 4, p.choice_weights + u.begin + n);
          }
        }
        accumulate(p, u, at, ring, sums);
        add_turns(at, u.count, sums);
      } else {
#pragma unroll 1
        for (int stages = u.k_tiles + (u.steps ? u_stages(p, u.steps) : 0); stages > 0; --stages, ring.next()) {
          if (!at.takes(ring)) continue;
          ring.wait_full();
          if (at.lane == 0) barrier_arrive(ring.empty());
        }
      }
    }
    const Unit u(p, uniform(number), items);  // made again rather than kept: registers are short above
    const Group at(ring.base);
    if (at.turn) continue;
    if (u.is_v) {
      write_t(p, u, at, sums);
    } else if (at.works(u)) {
      p.parts == 2 ? write_hidden(p, u, at, sums) : write_rows(p, u, at, sums);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) multiply(const __grid_constant__ Params p) {
  const u32 base = shared_address(shared_memory());
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(base + BARRIERS_AT + s * 8, TOKEN_THREADS + 1);
      barrier_init(base + BARRIERS_AT + (STAGES + s) * 8, 8);  // the consumers' warps
    }
    barrier_init_done();
  }
  __syncthreads();
  if (threadIdx.x < GROUP_THREADS) {
    give_registers<MILO_PRODUCER_REGISTERS>();
    if (threadIdx.x < WARP) {
      produce_weights(p);
    } else {
      produce_tokens(p);
    }
  } else {
    take_registers<MILO_CONSUMER_REGISTERS>();
    consume(p);
  }
}
