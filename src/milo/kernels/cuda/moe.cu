// A whole MoE FFN for few tokens an expert, in two launches (three for many tokens); also a plain linear (one expert,
// one choice), in one or two.
//
//   gate_up:  t = V x;  h = act(W_gate x + U_gate t) * (W_up x + U_up t)
//   down:     t2 = V2 h;  y = sum over choices of the router's weight times (W_down h + U2 t2). For few tokens a block
//             adds up the items of a row tile, for more it leaves the choices' sums to
//   combine:  their weighted sum.
//
// Blocks are persistent and take equal stretches of all work (units.cuh). Row tiles of V come first in every block's
// order and wait for nothing, so there is no deadlock; U t is added by the last warp of a block, which multiplies less,
// while the others multiply. No float atomics anywhere: the same bits at every run.
//
// Compensators: V's rows (64 padded) are ordinary row tiles of the layout in tile.cuh; gate and up each take
// `16 * steps` of them. U is read in steps of 16 ranks, [row tile][step][3][32 lanes] words, 12 bytes a lane, and its
// scales (one a rank and row tile) are folded into t, which enters the MMA as the sum of two bf16, so nothing of its
// float32 is lost. Rows of gate and up alternate in runs of 32, so one block holds both halves of an output.
//
// Bytes: every touched expert's codes and metadata once; activations and partial sums stay in L2.
#include "units.cuh"

#include "combine.cuh"
#include "lowrank.cuh"

// The team. Calls `f(token of the item, row)` for rows 0 .. 32 * RUNS - 1, 32 of them a warp at a time.
template <int RUNS, typename F>
__device__ __forceinline__ void for_rows(int count, F f) {
#pragma unroll 1
  for (int turn = team_thread() / WARP; turn < RUNS * count; turn += TEAM / WARP) {
    f(turn / RUNS, turn % RUNS * 32 + static_cast<int>(threadIdx.x % WARP));
  }
}

// The blocks behind this one whose sums belong to the stretch of the line that ends at `end`. Their counters are looked
// at, and their sums read, all at once: each is a trip to L2.
struct Carriers {
  Cut cut;
  int end;

  __device__ __forceinline__ Carriers(const Params& p, int sum_end) : cut(cut_of(p)), end(blockIdx.x + 1) {
#pragma unroll 1
    while (end < static_cast<int>(gridDim.x) && cut(end) < sum_end) ++end;
#pragma unroll 1
    for (int b = blockIdx.x + 1 + team_thread(); b < end; b += TEAM) {
      if (carries(b)) wait_until(counters(p).carried + b, 1);
    }
    team_sync();
  }
  __device__ __forceinline__ bool carries(int block) const {  // one may have V alone
    return block < end && cut(block) < cut(block + 1);
  }
  // Add what they have for `count` tokens to `sums`, where `at(token, row)` says.
  template <typename At>
  __device__ __forceinline__ void add(const Params& p, int count, float* sums, At at) const {
#pragma unroll 1
    for (int first = team_thread(); first < count * 16; first += 4 * TEAM) {  // four runs of four rows a thread
      float4 total[4] = {};
#pragma unroll 2
      for (int b = blockIdx.x + 1; b < end; ++b) {
        if (!carries(b)) continue;
        const float4* from = reinterpret_cast<const float4*>(p.carry + static_cast<long long>(b) * SLICE);
        float4 v[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first + i * TEAM < count * 16) v[i] = __ldcg(from + first + i * TEAM);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[i].x += v[i].x, total[i].y += v[i].y, total[i].z += v[i].z, total[i].w += v[i].w;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int run = first + i * TEAM;
        if (run < count * 16) {
          float* to = sums + at(run / 16, run % 16 * 4);
          to[0] += total[i].x, to[1] += total[i].y, to[2] += total[i].z, to[3] += total[i].w;
        }
      }
    }
    team_sync();
  }
};

__device__ __forceinline__ void write_v(const Params& p, const Part& part, const float* slices) {
  for_rows<2>(part.count, [&](int n, int row) {
    const long long pair = items().pairs[part.begin + n];
    const long long at = (part.split * static_cast<long long>(p.routing.pairs) + pair) * p.compensator.t_stride;
    __stcg(p.compensator.t + at + part.group * 64 + row, gather(slices, n, row));
  });
  team_add(counters(p).v_done + part.item);
}

// A unit to h (PARTS = 2) or to `partial`.
template <int PARTS>
__device__ __forceinline__ void write_unit(const Params& p, const Part& part, const float* slices) {
  constexpr int RUN = 64 / PARTS;  // results of a row tile
  for_rows<RUN / 32>(part.count, [&](int n, int row) {
    const long long pair = items().pairs[part.begin + n];
    const float one = gather(slices, n, row);
    if constexpr (PARTS == 2) {
      const float up = gather(slices, n, row + 32);
      const int column = part.group * RUN + row;
      static_cast<u16*>(p.out)[pair * p.rows + column] = round_to_16<B16>(activate(p.activation, one) * up);
    } else {
      __stcg(p.partial + pair * (p.row_tiles * 64) + part.group * 64 + row, one);
    }
  });
}

// A unit or a piece of one.
template <int PARTS>
__device__ __forceinline__ void write(const Params& p, const Part& part, float* slices) {
  if (part.first != 0) {
    float* carry = p.carry + static_cast<long long>(blockIdx.x) * SLICE;
    for_rows<2>(part.count, [&](int n, int row) { __stcg(carry + n * 64 + row, gather(slices, n, row)); });
    team_add(counters(p).carried + blockIdx.x);
    return;
  }
  if (part.last != p.weights.ktiles) Carriers(p, part.from + p.quanta).add(p, part.count, slices, place);
  write_unit<PARTS>(p, part, slices);
}

// A unit or a piece of one, times the router's weights, to the sums of its row tile.
__device__ __forceinline__ void add_item(const Params& p, const Part& part, const float* slices) {
  const short* pairs = items().pairs + part.begin;
  for_rows<2>(part.count, [&](int n, int row) {
    scratch().sums[divide(pairs[n], p.topk).q * 64 + row] += scratch().weights[pairs[n]] * gather(slices, n, row);
  });
}

// The sums of a row tile to y.
__device__ __forceinline__ void write_y(const Params& p, int group) {
#pragma unroll 1
  for (int i = threadIdx.x % WARP; i < p.tokens * 64; i += WARP) {
    const int column = group * 64 + i % 64;
    if (column < p.rows) {
      const float y = scratch().sums[i] + bias(p, column);
      static_cast<u16*>(p.out)[static_cast<long long>(i / 64) * p.rows + column] = round_to_16<B16>(y);
    }
  }
}

// Down, a unit or a piece of one: to the sums of its row tile, and these, if they are all that this block has of them,
// to y or to `carry`. Warps take turns, and a part's turn begins when the last part's has ended.
__device__ __forceinline__ void add(const Params& p, const Part& part, const float* slices, int number) {
  const Stretch& s = scratch().stretch;
  const int turn = number - s.v_parts, lane = threadIdx.x % WARP;
  if (turn) wait_phase(&scratch().added, turn - 1);
  const bool starts = part.item == 0 && part.first == 0;  // the row tile's sums, not just this block's share
  if (!turn || starts) {
#pragma unroll 1
    for (int i = lane; i < p.tokens * 64; i += WARP) scratch().sums[i] = 0;
    __syncwarp();
  }
  add_item(p, part, slices);
  __syncwarp();
  const bool ends = part.item == items().items - 1 && part.last == p.weights.ktiles;
  if (ends || number == s.parts - 1) {
    const int length = items().items * p.quanta;
    if (s.start > part.group * length) {
      float* carry = p.carry + static_cast<long long>(blockIdx.x) * SLICE;
#pragma unroll 1
      for (int i = lane; i < p.tokens * 64; i += WARP) __stcg(carry + i, scratch().sums[i]);
      team_add(counters(p).carried + blockIdx.x);
    } else {
      if (!ends) {
        Carriers(p, (part.group + 1) * length).add(p, p.tokens, scratch().sums, [](int t, int row) { return t * 64 + row; });
      }
      write_y(p, part.group);
    }
  }
  warp_arrive(&scratch().added);
}

// What the block does, and the first of its parts. All that must come from memory is asked for at the same time.
template <bool ITEM_FIRST>
__device__ __forceinline__ void prepare(const Params& p) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  auto& memory = *reinterpret_cast<Items::Sorting*>(reduction());
  u32* sizes = memory.spare;
  const bool compensated = p.compensator.t_stride > 0;
  auto gather_tables = [&](int thread, int threads) {
    if (compensated) {
#pragma unroll 2
      for (int i = thread; i < p.routing.experts; i += threads) {
        const int4 entry = __ldg(p.compensator.table + i);
        sizes[i] = p.compensator.stacked ? p.compensator.t_stride / 64 : entry.y | entry.w << 16;
      }
    }
    if (p.add_items) {
#pragma unroll 1
      for (int i = thread; i < p.routing.pairs; i += threads) scratch().weights[i] = choice_weight(p, i);
    }
  };
  if (!p.routing.ids) {
    items().build_plain(p.routing);
    gather_tables(threadIdx.x, THREADS);
  } else if (p.routing.pairs > WARP) {
    items().build(p.routing, p.row_divisor, &memory, gather_tables);
  } else if (warp == 0) {
    items().build_small(lane < p.routing.pairs ? local_expert(p.routing, lane) : -1, p.row_divisor);
  } else {
    gather_tables(threadIdx.x - WARP, THREADS - WARP);
  }
  __syncthreads();
  if (warp == 0) {
    if (lane == 0) {
      for (int b = 0; b < BUFFERS; ++b) barrier_init(&scratch().full[b], WARPS), barrier_init(&scratch().empty[b], 1);
      barrier_init(&scratch().added, 1), barrier_init(&scratch().described, 1);
    }
    items().add_compensators(compensated ? sizes : nullptr);
    plan_stretch(p);
    describe<ITEM_FIRST>(p, 0);
    describe<ITEM_FIRST>(p, WARP);
  }
  __syncthreads();
}

// Warps are at most BUFFERS parts apart: so many parts on nobody reads what is to be overwritten.
constexpr int LAG = 8;
static_assert(LAG > BUFFERS);

template <int PARTS>
__device__ __forceinline__ void work(const Params& p) {
  constexpr bool ITEM_FIRST = PARTS == 1;
  const int lane = lane_id(), warp = threadIdx.x / WARP;
  prepare<ITEM_FIRST>(p);
  Producer producer(p, lane, warp);
  producer.fill(p);
  if (p.others && blockIdx.x == 0) zero_counters(p.others, sizeof(Counters));
  constexpr u32 END = STAGES * STAGE_BYTES;
  u32 slot = 0, refill = END - STAGE_BYTES;  // the ring's slots that are read and filled next
  const u32 meta_at = producer.load.mine - lane * 16 + CODE_BYTES + lane / 4 * 32;
  const int parts = scratch().stretch.parts;
#pragma unroll 1
  for (int number = 0; number < parts; ++number) {
    if (number % WARP == 2 * LAG) {  // described long ago: this is no wait, but an assurance
      wait_phase(&scratch().described, number / WARP);
      producer.known = min(number - 2 * LAG + 3 * WARP, parts);
    }
    const Part part = scratch().parts[number % QUEUE];
    Accumulators total = {};
    const int tiles = (part.count + 7) / 8, place = place_in(number);
#pragma unroll 1
    for (int left = part.share(place + 1) - part.share(place); left > 0; --left) {
      copy_wait<STAGES - 2>();
      __syncwarp();  // metadata were copied by other lanes; and all are done with the slot that is refilled next
      producer.step(p, refill);
      multiply_tile(producer.load.mine + slot, meta_at + slot, tiles, total);
      refill = slot;
      slot = slot == END - STAGE_BYTES ? 0 : slot + STAGE_BYTES;
    }
    if (part.u_steps > ALONE || (part.u_steps && place == WARPS - 1)) {
      const bool alone = part.u_steps <= ALONE;
      add_factors<PARTS>(p, part, factors(p.compensator, part), alone ? 0 : place, alone ? 1 : WARPS, total);
    }
    const int buffer = number % BUFFERS, phase = number / BUFFERS;
    float* slices = reduction() + buffer * WARPS * SLICE;
    if (TOGETHER) {
      __syncthreads();  // the last part's slices have been read
    } else if (phase) {
      wait_phase(&scratch().empty[buffer], phase - 1);
    }
    spread(total, slices + warp * SLICE);
    if (!TOGETHER) warp_arrive(&scratch().full[buffer]);
    if (warp == 0 && number % WARP == LAG) {
      describe<ITEM_FIRST>(p, number - LAG + 2 * WARP);
      warp_arrive(&scratch().described);
    }
    if (TOGETHER) __syncthreads();
    if (TOGETHER || place == 0) {  // nobody else waits for the other warps
      if (!TOGETHER) wait_phase(&scratch().full[buffer], phase);
      if (part.is_v()) {
        write_v(p, part, slices);
      } else if (PARTS == 1 && p.add_items) {
        if constexpr (!TOGETHER) add(p, part, slices, number);
      } else {
        write<PARTS>(p, part, slices);
      }
      if (!TOGETHER) warp_arrive(&scratch().empty[buffer]);
    }
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
  if (p.add_items && items().items == 0) {  // nobody has a row tile: the sums of nothing
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < p.tokens * p.rows; i += gridDim.x * THREADS) {
      static_cast<u16*>(p.out)[i] = 0;
    }
  }
  zero_own_counters(p, *reinterpret_cast<int*>(reduction()), sizeof(Counters));
}
