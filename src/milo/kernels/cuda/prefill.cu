// A whole MoE FFN for many tokens an expert, on sm_90a, in four launches; also a plain linear, in two.
//
//   prepare:  sorts the pairs (token, choice) by expert and cuts them into items; copies x with its columns in the
//             order of the tensor core's operands
//   multiply: t = V x;  h = act(W_gate x + U_gate t) * (W_up x + U_up t)
//   multiply: t = V h;  (W h + U t) * the router's weight, 16 bits a pair and row
//   combine:  their sum over a token's choices, in their order
//
// `multiply` is persistent, a block an SM: a warpgroup of producers keeps a ring of stages full over the borders of
// units, two of consumers turn packed codes into the tensor core's A operand in registers while its last products run.
// Two blocks of 64 rows a warpgroup alternate: one is decoded while the other is multiplied. Weights are scaled and
// rounded to 16 bits, as every dequantising kernel does; sums are fp32. No sum depends on the order of arrival.
//
// Roofline: a stage (256 rows, n tokens) takes 8 n clocks of the tensor cores, 4 n clocks of shared memory for their
// operand, and each scheduler about 300 instructions of decoding; 7 KiB of weights and n / 8 KiB of activations come
// from L2. Below about 40 tokens an item decoding or DRAM is the limit, above about 64 the tensor cores.
#include "prepare.cuh"
#include "produce.cuh"
#include "results.cuh"

// d += A * B over STEPS times 16 numbers along k, for `count` columns; a group of its own. The width of a product is part
// of the instruction, so this is a tree of branches, and `count` must come from `uniform`: else the compiler hoists them
// out of the loop and gives the operands of each width registers of their own, of which there are not enough.
template <int STEPS, int LOW = MILO_WIDTH_STEP, int HIGH = WIDTH>
__device__ __forceinline__ void products(int count, float* d, const u32* a, u64 b, bool add) {
  if constexpr (LOW < HIGH) {
    constexpr int MIDDLE = LOW + (HIGH - LOW) / MILO_WIDTH_STEP / 2 * MILO_WIDTH_STEP;
    if (count <= MIDDLE) {
      products<STEPS, LOW, MIDDLE>(count, d, a, b, add);
    } else {
      products<STEPS, MIDDLE + MILO_WIDTH_STEP, HIGH>(count, d, a, b, add);
    }
  } else {
    products_begin();
#pragma unroll
    for (int s = 0; s < STEPS; ++s) product<B16, LOW>(d, a + 4 * s, b + s * NEXT_16, s > 0 || add);
    products_commit();
  }
}

// The sums of a unit.
__device__ __forceinline__ void accumulate(const Params& p, const Unit& u, const Group& at, Ring& ring, Sums& sums) {
  u32 a[2][16];
  u32 last = 0;
#pragma unroll 1
  for (int i = 0; i < u.k_tiles; ++i) {
    const int count = uniform(u.count);
    ring.wait_full();
    Words words;
    words.load(ring, at.tile(), at.odd(), at.lane);
    fence_for_tensor_core();
    const u64 x = operand(ring.x());
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      products_wait<1>();  // the registers of this block's last products are free
      if (b == 1 && i > 0 && at.lane == 0) barrier_arrive(last);
      weight_fragments(words.codes[b], words.meta[b], a[b]);
      products<4>(count, sums[b], a[b], x, i > 0);
    }
    last = ring.empty();
    ring.next();
  }
  products_wait<0>();
  if (at.lane == 0) barrier_arrive(last);
  const int each = steps_a_stage(p), stages = u.steps ? u_stages(p, u.steps) : 0;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    ring.wait_full();
    fence_for_tensor_core();
    const int steps = min(each, u.steps - stage * each);
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      const int count = uniform(u.count);
      u32 f[2][4];
      factor_fragments(ring, at.tile(), s, p.parts, at.odd(), at.lane, f);
      const u64 t = operand(ring.x()) + s * NEXT_16;
      products<1>(count, sums[0], f[0], t, true);
      products<1>(count, sums[1], f[1], p.parts == 2 ? t + 2 * NEXT_16 : t, true);
      products_wait<0>();
    }
    if (at.lane == 0) barrier_arrive(ring.empty());
    ring.next();
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
      if (2 * at.group < u.tiles) {
        if (p.order && p.parts == 1 && !u.is_v) {  // wanted at the end
          for (int n = at.thread(); n < u.count; n += GROUP_THREADS) {
            copy_word(at.choices() + n * 4, p.order + u.begin + n);
            if (p.choice_weights) copy_word(at.choices() + (WIDTH + n) * 4, p.choice_weights + u.begin + n);
          }
        }
        accumulate(p, u, at, ring, sums);
      } else {
#pragma unroll 1
        for (int stages = u.k_tiles + (u.steps ? u_stages(p, u.steps) : 0); stages > 0; --stages) {
          ring.wait_full();
          if (at.lane == 0) barrier_arrive(ring.empty());
          ring.next();
        }
      }
    }
    const Unit u(p, uniform(number), items);  // made again rather than kept: registers are short above
    const Group at(ring.base);
    if (u.is_v) {
      write_t(p, u, at, sums);
    } else if (2 * at.group < u.tiles) {
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
