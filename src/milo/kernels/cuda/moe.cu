// A whole MoE FFN for few tokens an expert, in two to four launches; also a plain linear (one expert, one choice).
//
//   clear:    zeroes the counters (only where there are compensators; it overlaps with the next)
//   gate_up:  t = V x;  h = act(W_gate x + U_gate t) * (W_up x + U_up t)
//   down:     t2 = V2 h;  W_down h + U2 t2 -> partial sums; the last block to finish some row tiles adds them over
//             choices and splits in a fixed order, times the router's weights. No float atomics anywhere.
//   combine:  that sum on its own, where it is too much for one block.
//
// Blocks are persistent; a *unit* of work is a work item (an expert and up to TOKENS of its tokens) times WARPS /
// k_warps row tiles, whose K the warps share. The first units are row tiles of V. U t is due only when a unit's K is
// done, so it seldom waits; the units of V come first in every block's order and wait for nothing, so there is no
// deadlock.
//
// Compensators: V's rows (64 padded) are ordinary row tiles of the layout in tile.cuh; gate and up each take
// `16 * steps` of them. U is read in steps of 16 ranks, [row tile][step][3][32 lanes] words, 12 bytes a lane, and its
// scales (one a rank and row tile) are folded into t, which enters the MMA as the sum of two bf16, so nothing of its
// float32 is lost. Rows of gate and up alternate in runs of 32, so one block holds both halves of an output.
//
// Bytes: every touched expert's codes and metadata once; activations and partial sums stay in L2.
#include "combine.cuh"
#include "lowrank.cuh"

__device__ __forceinline__ float activate(int kind, float g) {
  if (kind == 0) return g / (1 + __expf(-g));
  if (kind == 1) return 0.5f * g * (1 + tanhf(0.7978845608028654f * (g + 0.044715f * g * g * g)));
  return 0.5f * g * (1 + erff(0.7071067811865476f * g));
}

// A unit's accumulators, spread over shared memory, to the results, 32 rows of a token a warp and turn. PARTS = 2
// writes h, 1 partial sums.
template <int PARTS>
__device__ __forceinline__ void write(const Params& p, const Unit& unit, Item item) {
  const float* partial = reduction();
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const short* pairs = items().pairs + item.begin;
  constexpr int RUN = 64 / PARTS;  // results of a row tile
  const int first = unit.group * p.block_row_tiles;
  const int runs = unit.is_v ? 2 : min(p.block_row_tiles, p.row_tiles - first) * RUN / 32;
  for (int turn = warp; turn < runs * item.count; turn += WARPS) {
    const Quotient at = divide(turn, runs);
    const int token = at.q, column = at.r * 32 + lane;
    const long long pair = pairs[token];
    if (unit.is_v) {
      const long long row = unit.split * static_cast<long long>(p.routing.pairs) + pair;
      float* t = p.compensator.t + row * p.compensator.t_stride + unit.group * 64;
      __stcg(t + column, gather(partial, 0, WARPS, token, column));
      continue;
    }
    const int from = column / RUN * p.k_warps, row = column % RUN;
    const float sum = gather(partial, from, p.k_warps, token, row);
    if constexpr (PARTS == 2) {
      const float h = activate(p.activation, sum) * gather(partial, from, p.k_warps, token, row + 32);
      static_cast<u16*>(p.out)[pair * p.rows + first * 32 + column] = round_to_16<B16>(h);
    } else {
      __stcg(p.partial + (pair * p.splits + unit.split) * (p.row_tiles * 64) + first * 64 + column, sum);
    }
  }
}

// All units of this block. `early`: activations come from memory that no kernel still running writes.
template <int PARTS>
__device__ __forceinline__ void work(const Params& p, bool early) {
  constexpr bool ITEM_FIRST = PARTS == 1;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  items().build(p.routing, reinterpret_cast<int*>(reduction()));
  Producer producer;
  producer.load.lane = lane;
  producer.load.policy = evict_first();
  producer.load.in_features = p.in_features;
  producer.load.ring = shared_address(shared) + warp * STAGES * STAGE_BYTES;
  producer.number = blockIdx.x;
  producer.item_first = ITEM_FIRST;
  producer.settle(p);
  if (early) {
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) producer.step(p, s);
  } else {  // the weights of the first unit before the wait, its activations after
    const int ahead = producer.done() ? 0 : min(producer.last - producer.kt, STAGES - 1);
    for (int s = 0; s < ahead; ++s) producer.load.weights(producer.kt + s, s);
    wait_for_primary();
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < ahead) {
        producer.load.activations(producer.kt, s);
        copy_commit();
        if (++producer.kt == producer.last) {
          producer.number += gridDim.x;
          producer.settle(p);
        }
      } else {
        producer.step(p, s);
      }
    }
  }
  bool waited = !early;
  int slot = 0;
  for (int number = blockIdx.x;; number += gridDim.x) {
    const Unit unit(p, number, ITEM_FIRST);
    if (unit.item < 0) break;
    const Item item = items()[unit.item];
    int4 entry = {0, 0, 0, 0};
    if (p.v_row_tiles) entry = __ldg(p.compensator.table + item.expert);
    if (unit.is_v && unit.group >= entry.y) continue;
    const bool has_u = !unit.is_v && entry.w && unit.split == p.splits - 1;
    Step<PARTS> u;
    if (has_u && warp % p.k_warps < entry.w) {
      u.load(p.compensator, entry.z + static_cast<long long>(unit.row_tile) * entry.w + warp % p.k_warps);
    }
    Accumulators total = {};
    const int k_tiles = p.weights.ktiles, tiles = (item.count + 7) / 8;
    int left = divide(k_tiles * (unit.share + 1), unit.shares).q - divide(k_tiles * unit.share, unit.shares).q;
    for (; left > 0; --left) {
      copy_wait<STAGES - 2>();
      __syncwarp();  // metadata were copied by other lanes; and all are done with the slot that is refilled next
      producer.step(p, slot == 0 ? STAGES - 1 : slot - 1);
      multiply_tile(producer.load.ring + slot * STAGE_BYTES, lane, tiles, total);
      slot = slot == STAGES - 1 ? 0 : slot + 1;
    }
    if (!waited) {  // counters, and the buffers that an earlier call may have used, are ours from here on
      wait_for_primary();
      waited = true;
    }
    if (has_u) {
      while (load_acquire(p.v_done + unit.item) < entry.y * p.compensator.t_splits) __nanosleep(32);
      add_factors<PARTS>(p, entry, unit.row_tile, u, item, total);
    }
    __syncthreads();  // the last unit's sums have been read
    spread(total, reduction());
    __syncthreads();
    write<PARTS>(p, unit, item);
    if (unit.is_v) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(p.v_done + unit.item, 1);
    } else if (PARTS == 1 && !p.combine_later) {
      __shared__ int last;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) last = atomicAdd(p.arrivals + unit.group, 1) == items().items * p.splits - 1;
      __syncthreads();
      if (last) {
        __threadfence();
        load_choices(p, 0, p.tokens, reduction());
        __syncthreads();
        const int first = unit.group * p.block_row_tiles;
        combine_rows(p, first, min(first + p.block_row_tiles, p.row_tiles), 0, p.tokens, reduction());
      }
    }
  }
  if (!waited) wait_for_primary();
  copy_wait<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS) clear(const __grid_constant__ Params p) {
  launch_dependents();
  for (int i = threadIdx.x; i < p.clear_count; i += THREADS) p.to_clear[i] = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS, MILO_BLOCKS) gate_up(const __grid_constant__ Params p) {
  launch_dependents();
  if (!p.v_row_tiles && blockIdx.x == 0) {
    for (int i = threadIdx.x; i < p.clear_count; i += THREADS) p.to_clear[i] = 0;
  }
  work<2>(p, true);
}

extern "C" __global__ void __launch_bounds__(THREADS, MILO_BLOCKS) down(const __grid_constant__ Params p) {
  launch_dependents();
  work<1>(p, false);
  if (items().items == 0 && !p.combine_later) {  // nobody arrives: the sums of nothing
    load_choices(p, 0, p.tokens, reduction());
    __syncthreads();
    for (int r = blockIdx.x; r < p.row_tiles; r += gridDim.x) combine_rows(p, r, r + 1, 0, p.tokens, reduction());
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) combine(const __grid_constant__ Params p) {
  __shared__ float weights[MILO_PAIRS];
  constexpr int TURN = THREADS / 16;  // tokens a block
  const int tile = blockIdx.x % p.row_tiles, first = blockIdx.x / p.row_tiles * TURN;
  const int last = min(p.tokens, first + TURN);
  load_choices(p, first, last, weights);
  __syncthreads();
  wait_for_primary();
  combine_rows(p, tile, tile + 1, first, last, weights);
}
