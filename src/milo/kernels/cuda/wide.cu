// A whole MoE FFN for 9 to 32 tokens a work item, in three launches; also a plain linear, in two.
//
//   gate_up:  t = V x;  h = act(W_gate x + U_gate t) * (W_up x + U_up t)
//   down:     t2 = V2 h;  partial = W_down h + U2 t2, for every choice
//   combine:  the choices' weighted sum
//
// Blocks are persistent and take equal stretches of all work (wide.cuh). A warp has a row tile to itself and ends with all
// of its sums, gate's beside up's: nothing is added up across warps, but where warps share a row tile, and where another
// block has the rest of a unit. Activations are shared, and their sums over groups, which the zeros need, are computed
// once a block (wide_streams.cuh). V's row tiles come first in every block's order and wait for nothing, so there is no
// deadlock. No float atomics: the same bits at every run.
//
// Bytes: every touched expert's codes and metadata once; an item's activations once a group of WARPS row tiles, from L2,
// where partial sums stay too.
#define MILO_BARE true
#include "wide_streams.cuh"

#include "combine.cuh"
#include "lowrank.cuh"

// Calls `f(16 rows, n8 tile)` for all that have tokens.
template <typename F>
__device__ __forceinline__ void for_sums(int count, F f) {
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    if (nt * 8 < count) {
#pragma unroll
      for (int mt = 0; mt < 4; ++mt) f(mt, nt);
    }
  }
}

// Where a warp leaves its sums in L2: for another block, or (`own`) for another warp of its own.
__device__ __forceinline__ float4* slice(const Params& p, int block, int warp, bool own) {
  const long long at = ((own ? gridDim.x : 0) + block) * WARPS + warp;
  return reinterpret_cast<float4*>(p.carry + at * SLICE) + threadIdx.x % WARP;
}
__device__ __forceinline__ void leave(float4* to, int count, const Accumulators& total) {
  for_sums(count, [&](int mt, int nt) {
    const float(&v)[4] = total[mt][nt];
    __stcg(to + (nt * 4 + mt) * WARP, float4{v[0], v[1], v[2], v[3]});
  });
}
__device__ __forceinline__ void take(const float4* from, int count, Accumulators& total) {
  for_sums(count, [&](int mt, int nt) {
    const float4 v = __ldcg(from + (nt * 4 + mt) * WARP);
    float(&to)[4] = total[mt][nt];
    to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
  });
}

// The sums of warps that share a row tile, to the first of them. The whole block.
__device__ __forceinline__ void add_ways(const Params& p, const Place& place, int count, Accumulators& total) {
  const int warp = threadIdx.x / WARP;
  if (place.active && place.way) leave(slice(p, blockIdx.x, warp, true), count, total);
  __syncthreads();
  if (place.active && !place.way) {
#pragma unroll 1
    for (int way = 1; way < 1 << place.log; ++way) {
      take(slice(p, blockIdx.x, warp + way * (WARPS >> place.log), true), count, total);
    }
  }
  __syncthreads();  // they may be overwritten
}

// What this warp wrote before is visible to whoever sees the counter go up.
__device__ __forceinline__ void count_up(int* counter) {
  __threadfence();
  __syncwarp();
  if (threadIdx.x % WARP == 0) atomicAdd(counter, 1);
}

// The sums of one n8 tile. (A loop over them that is not unrolled keeps the code of what follows small.)
__device__ __forceinline__ void pick(const Accumulators& total, int tile, float (&sums)[4][4]) {
#pragma unroll
  for (int nt = 0; nt < NT; ++nt) {
    if (nt == tile) {
#pragma unroll
      for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = total[i / 4][nt][i % 4] * UNIT;
    }
  }
}

// Calls `f(pair, row, this sum, the sum 32 rows on)` for the sums of the first ROWS rows.
template <int ROWS, typename F>
__device__ __forceinline__ void for_results(const Part& part, const Accumulators& total, F f) {
  const int lane = threadIdx.x % WARP;
#pragma unroll 1
  for (int nt = 0; nt * 8 < part.count; ++nt) {
    float sums[4][4];
    pick(total, nt, sums);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = nt * 8 + lane % 4 * 2 + i;
      if (n >= part.count) continue;
      const long long pair = items().pairs[part.begin + n];
#pragma unroll
      for (int j = 0; j < ROWS / 8; ++j) {
        f(pair, j * 8 + lane / 4, sums[j / 2][j % 2 * 2 + i], sums[(j / 2 + 2) % 4][j % 2 * 2 + i]);
      }
    }
  }
}

// A row tile's entry of the compensators' table.
__device__ __forceinline__ int4 entry_of(const Params& p, const Part& part) {
  if (p.compensator.stacked && p.compensator.t_stride) return factors(p.compensator, part);
  return make_int4(0, part.v_tiles, part.u_first + part.group * part.u_steps, part.u_steps);
}
// One warp: its U, which is due at the end of this part, into L2.
template <int PARTS>
__device__ __forceinline__ void prefetch_factors(const Params& p, const Part& part) {
  if (part.is_v() || part.first) return;
  const int4 entry = entry_of(p, part);
  const int lane = threadIdx.x % WARP;
#pragma unroll 1
  for (int i = lane; i < entry.w * 3; i += WARP) {
    prefetch_l2(p.compensator.u_codes + (static_cast<long long>(entry.z) * 3 + i) * WARP);
  }
#pragma unroll 1
  for (int i = lane; i < entry.w; i += WARP) {
    prefetch_l2(p.compensator.u_scales + (static_cast<long long>(entry.z) + i) * PARTS * 16);
  }
}

// A warp's row tile of a unit or of a piece of one, `part` being that row tile's.
template <int PARTS>
__device__ __forceinline__ void finish(const Params& p, const Part& part, Accumulators& total) {
  if (part.is_v()) {
    const Compensator& c = p.compensator;
    float* t = c.t + part.split * static_cast<long long>(p.routing.pairs) * c.t_stride + part.group * 64;
    for_results<64>(part, total, [&](long long pair, int row, float sum, float) { __stcg(t + pair * c.t_stride + row, sum); });
    count_up(counters(p).v_done + part.item);
    return;
  }
  if (part.first) {
    leave(slice(p, blockIdx.x, threadIdx.x / WARP, false), part.count, total);
    count_up(counters(p).carried + blockIdx.x);
    return;
  }
  add_factors<PARTS>(p, part, entry_of(p, part), 0, 1, total);
  if (part.last != p.weights.ktiles) {
    const Cut& cut = scratch().cut;
#pragma unroll 1
    for (int b = blockIdx.x + 1; b < static_cast<int>(gridDim.x) && cut(b) < part.end; ++b) {
      if (cut(b) == cut(b + 1)) continue;
      wait_until(counters(p).carried + b, part.rows);
      take(slice(p, b, threadIdx.x / WARP, false), part.count, total);
    }
  }
  if constexpr (PARTS == 2) {
    u16* h = static_cast<u16*>(p.out) + part.group * 32;
    for_results<32>(part, total, [&](long long pair, int row, float gate, float up) {
      h[pair * p.rows + row] = round_to_16<B16>(activate(p.activation, gate) * up);
    });
  } else {
    const int pitch = p.row_tiles * 64, column = part.group * 64;
    for_results<64>(part, total, [&](long long pair, int row, float sum, float) {
      __stcg(p.partial + pair * pitch + column + row, sum);
    });
  }
}

// A warp's `count` tiles of a stage, for the first N n8 tiles of tokens. `x`: the activations of the first of them.
template <int N>
__device__ __forceinline__ void multiply_tiles(const Params& p, int number, int count, u32 x, u32 x_step,
                                               Weights& weights, Accumulators& total) {
  const u32 rows_at = weights.ring - threadIdx.x % WARP * 16 + threadIdx.x % WARP / 4 * 32;
#pragma unroll 1
  for (int left = count; left > 0; --left) {
    weights.turn(p, number);
    multiply<N>(weights.ring + weights.from, rows_at + Weights::meta_slot(weights.used), x, total);
    weights.from = Weights::after(weights.from), ++weights.used;
    x += x_step;
  }
}

// There is code for every number of n8 tiles.
template <int N = NT>
__device__ __forceinline__ void multiply_stage(const Params& p, int number, int token_tiles, int count, u32 x, u32 x_step,
                                               Weights& weights, Accumulators& total) {
  if constexpr (N > 1) {
    if (token_tiles < N) return multiply_stage<N - 1>(p, number, token_tiles, count, x, x_step, weights, total);
  }
  multiply_tiles<N>(p, number, count, x, x_step, weights, total);
}

template <int PARTS>
__device__ __forceinline__ void work(const Params& p) {
  const int lane = lane_id(), warp = threadIdx.x / WARP;
  prepare(p);
  Weights weights(lane);
  Activations activations(lane);
  weights.ask(p, STAGES - 1);
  wait_for_primary();
  if (p.others && blockIdx.x == 0) zero_counters(p.others, MILO_COUNTER_BYTES);
  activations.ask(p, weights.known);
  copy_commit();
  copy_wait<0>();
  if (activations.span) activations.finish();
  activations.ask(p, weights.known);
  const u32 x_at = shared_address(shared) + X_AT + lane * 16;
  int since = 0;  // at most so many groups of copies were committed since
  const int parts = scratch().part_count;
  u32 stage = 0;
#pragma unroll 1
  for (int number = 0; number < parts; ++number) {
    if (warp == 0) describe_more(p, number);
    weights.known = described(number);
    const Part& part = scratch().parts[static_cast<u32>(number) % QUEUE];
    const Place place(part);
    const int count = part.count, tiles = (count + 7) / 8, last = part.last;
    Part mine = part;
    mine.group = static_cast<short>(mine.group + place.row);
    if (place.active && !place.way) prefetch_factors<PARTS>(p, mine);
    const int spare = place.active ? (1 << place.log) - 1 - place.way : -64;
    int order = lane % 4 >> place.log;  // of tile lane % 4 of a stage among this warp's
    if (lane % 4 != place.way + (order << place.log)) order = SPAN;
    Accumulators total = {};
#pragma unroll 1
    for (int kt = part.first; kt < last; kt += SPAN, ++stage) {
      if (activations.span) {  // the stage that follows
        if (since == 0) copy_commit(), since = 1;
        wait_but_for<STAGES - 1>(since - 1);
        activations.finish();
      }
      wait_phase(&scratch().ready[stage % BUFFERS], static_cast<int>(stage / BUFFERS));
      activations.ask(p, weights.known);
      since = max(0, (min(SPAN, last - kt) + spare) >> place.log);  // tiles that this warp has
      const int first = weights.used;
      if (since) {
        const u32 x = x_at + Activations::buffer(stage) + place.way * X_BYTES;
        multiply_stage(p, number, tiles, since, x, X_BYTES << place.log, weights, total);
        const bool has = order < since;
        const u32 meta = weights.ring - lane * 16 + lane / 4 * 32 + Weights::meta_slot(first + (has ? order : 0));
        add_zeros(tiles, meta, has, Activations::sums(stage), total);
      }
    }
    if (place.log) add_ways(p, place, count, total);
    if (place.active && !place.way) finish<PARTS>(p, mine, total);
  }
  copy_wait<0>();
}

extern "C" __global__ void __launch_bounds__(THREADS, MILO_BLOCKS) gate_up(const __grid_constant__ Params p) {
  launch_dependents();
  work<2>(p);
}

extern "C" __global__ void __launch_bounds__(THREADS, MILO_BLOCKS) down(const __grid_constant__ Params p) {
  launch_dependents();
  work<1>(p);
  zero_own_counters(p, scratch().part_count, MILO_COUNTER_BYTES);
}
