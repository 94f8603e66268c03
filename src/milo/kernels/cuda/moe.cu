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
#include "tile.cuh"

struct Compensator {
  const u32* u_codes;   // steps of 16 ranks, 96 words each
  const u16* u_scales;  // [steps][parts][16] fp16
  const int4* table;    // an expert: {first V row tile, V row tiles, first U step, U steps a row tile}
  float* t;             // [splits][pairs][t_stride]
  int t_stride, t_splits;
};

struct Params {
  Routing routing;
  Matrix weights, v;
  Compensator compensator;
  const u16* x;
  void* out;             // gate_up: h [pairs, I]; down: y [tokens, N]; 16-bit
  float* partial;        // down: [pairs][splits][64 * row_tiles]
  const void* choice_weights;  // [pairs]; null: ones
  const u16* bias;       // down: [N] or null
  int* arrivals;         // down: [groups], zero at its start
  int* v_done;           // [items], zero at the start
  int* to_clear;         // clear, or gate_up where nothing was cleared: counters to zero
  int clear_count;
  int tokens, topk, in_features, row_tiles, rows, row_divisor, splits;
  int v_row_tiles;       // the most of any expert
  int activation, choice_weight_type;
  int k_warps;           // warps of a block that share a row tile; the others take the next ones
  int block_row_tiles;   // WARPS / k_warps
  int groups;            // of block_row_tiles row tiles, the last perhaps not full
  int combine_later;     // down: the sum is another launch
};

extern __shared__ __align__(16) char shared[];

using Items = Table<TOKENS, MILO_PAIRS, MILO_EXPERTS>;
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int REDUCE_BYTES = WARPS * TOKENS * PITCH * 4;
static_assert(REDUCE_BYTES >= MILO_EXPERTS * 4, "the routing's counts borrow the reduction's memory");

__device__ __forceinline__ float* reduction() { return reinterpret_cast<float*>(shared + RING_BYTES); }
__device__ __forceinline__ Items& items() { return *reinterpret_cast<Items*>(shared + RING_BYTES + REDUCE_BYTES); }

// The units of a launch, numbered: first (item, V row tile, split), then the matrix's own.
struct Unit {
  int item;        // -1: past the end
  bool is_v;
  int group;       // of row tiles, or the V row tile
  int split;
  int row_tile;    // this warp's, within the expert
  int share, shares;

  __device__ __forceinline__ Unit(const Params& p, int number, bool item_first) {
    const int warp = threadIdx.x / WARP, n = items().items;
    const int v_splits = p.compensator.t_splits, v_units = n * p.v_row_tiles * v_splits;
    if (number < v_units) {
      is_v = true;
      const Quotient by_split = divide(number, v_splits), by_tile = divide(by_split.q, p.v_row_tiles);
      split = by_split.r;
      group = row_tile = by_tile.r;
      item = by_tile.q;
      share = split * WARPS + warp, shares = v_splits * WARPS;
      return;
    }
    number -= v_units;
    is_v = false;
    if (number >= n * p.groups * p.splits) {
      item = -1;
      return;
    }
    const Quotient by_split = divide(number, p.splits), place = divide(by_split.q, item_first ? n : p.groups);
    split = by_split.r;
    item = item_first ? place.r : place.q;
    group = item_first ? place.q : place.r;
    // Beyond the matrix the last row tile is computed again and not written.
    const Quotient mine = divide(warp, p.k_warps);
    row_tile = min(group * p.block_row_tiles + mine.q, p.row_tiles - 1);
    share = split * p.k_warps + mine.r, shares = p.splits * p.k_warps;
  }
};

// Runs ahead of the computation by STAGES - 1 tiles, over the borders of units.
struct Producer {
  Loader load;
  int number, kt, last;
  bool item_first;

  __device__ __forceinline__ bool done() const { return last < 0; }

  // Settle on the unit `number` or the first after it that has a tile for this warp.
  __device__ __forceinline__ void settle(const Params& p) {
    for (;; number += gridDim.x) {
      const Unit u(p, number, item_first);
      if (u.item < 0) {
        last = -1;
        return;
      }
      const Item item = items()[u.item];
      const Matrix& m = u.is_v ? p.v : p.weights;
      long long row_tile = static_cast<long long>(item.expert) * p.row_tiles + u.row_tile;
      if (u.is_v) {
        const int4 entry = __ldg(p.compensator.table + item.expert);
        if (u.group >= entry.y) continue;
        row_tile = entry.x + u.group;
      }
      kt = divide(m.ktiles * u.share, u.shares).q;
      last = divide(m.ktiles * (u.share + 1), u.shares).q;
      if (kt >= last) continue;
      load.codes = m.codes + row_tile * m.ktiles * CODE_BYTES + load.lane * 16;
      load.meta = m.meta + row_tile * m.groups * META_BYTES + load.lane * 16;
      load.meta_shift = m.meta_shift;
#pragma unroll
      for (int nt = 0; nt < NT; ++nt) {
        const int n = min(nt * 8 + load.lane / 4, item.count - 1);
        const long long row = divide(items().pairs[item.begin + n], p.row_divisor).q;
        load.x[nt] = reinterpret_cast<const char*>(p.x + row * p.in_features + load.lane % 4 * 8);
      }
      return;
    }
  }
  // One tile into a slot of the ring.
  __device__ __forceinline__ void step(const Params& p, int slot) {
    if (!done()) {
      load.weights(kt, slot);
      load.activations(kt, slot);
      if (++kt == last) {
        number += gridDim.x;
        settle(p);
      }
    }
    copy_commit();
  }
};

// One step of U: its codes, and the scales that this lane's ranks take.
template <int PARTS>
struct Step {
  u32 words[3], scales[PARTS][2];

  __device__ __forceinline__ void load(const Compensator& c, long long at) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < 3; ++j) words[j] = __ldg(c.u_codes + (at * 3 + j) * WARP + lane);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scales[part][i] = __ldg(reinterpret_cast<const u32*>(c.u_scales + (at * PARTS + part) * 16 + 8 * i + lane % 4 * 2));
      }
    }
  }
};

// total += U t for this warp's share of the ranks. PARTS = 2: rows 0-31 use gate's t and rows 32-63 up's.
// The first step comes with the call: it was requested before the weights.
template <int PARTS>
__device__ __forceinline__ void add_factors(const Params& p, int4 entry, int row_tile, Step<PARTS>& u, Item item,
                                            Accumulators& total) {
  const Compensator& c = p.compensator;
  const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP % p.k_warps, steps = entry.w;
  for (int step = first; step < steps; step += p.k_warps) {
    if (step != first) u.load(c, entry.z + static_cast<long long>(row_tile) * steps + step);
    u32 pairs[16];
    decode<true, 3, 4>(u.words, pairs);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      if (nt * 8 < item.count) {
        const int n = nt * 8 + lane / 4;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          u32 high[2] = {0, 0}, low[2] = {0, 0};
          if (n < item.count) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int k = (part * steps + step) * 16 + 8 * i + lane % 4 * 2;
              float a = 0, b = 0;
#pragma unroll 1
              for (int s = 0; s < c.t_splits; ++s) {
                long long row = s * static_cast<long long>(p.routing.pairs) + items().pairs[item.begin + n];
                float2 t = __ldcg(reinterpret_cast<const float2*>(c.t + row * c.t_stride + k));
                a += t.x;
                b += t.y;
              }
              a *= from_fp16(static_cast<u16>(u.scales[part][i]));
              b *= from_fp16(static_cast<u16>(u.scales[part][i] >> 16));
              high[i] = pair_bf16(a, b);
              low[i] = pair_bf16(a - from_bf16(static_cast<u16>(high[i])), b - from_bf16(static_cast<u16>(high[i] >> 16)));
            }
          }
#pragma unroll
          for (int mt = part * 4 / PARTS; mt < (part + 1) * 4 / PARTS; ++mt) {
            mma<true>(total[mt][nt], pairs + mt * 4, high[0], high[1]);
            mma<true>(total[mt][nt], pairs + mt * 4, low[0], low[1]);
          }
        }
      }
    }
  }
}

__device__ __forceinline__ float activate(int kind, float g) {
  if (kind == 0) return g / (1 + __expf(-g));
  if (kind == 1) return 0.5f * g * (1 + tanhf(0.7978845608028654f * (g + 0.044715f * g * g * g)));
  return 0.5f * g * (1 + erff(0.7071067811865476f * g));
}

__device__ __forceinline__ float choice_weight(const Params& p, int pair) {
  if (!p.choice_weights) return 1;
  if (p.choice_weight_type == 0) return static_cast<const float*>(p.choice_weights)[pair];
  u16 h = static_cast<const u16*>(p.choice_weights)[pair];
  return p.choice_weight_type == 1 ? from_fp16(h) : from_bf16(h);
}

// The weights of the choices of the tokens from `first` to `last`, NaN for those that are not ours.
__device__ __forceinline__ void load_choices(const Params& p, int first, int last, float* weights) {
  for (int i = first * p.topk + threadIdx.x; i < last * p.topk; i += THREADS) {
    const bool ours = !p.routing.ids || local_expert(p.routing, i) >= 0;
    weights[i - first * p.topk] = ours ? choice_weight(p, i) : __int_as_float(0x7fffffff);
  }
}

// The sum over choices and splits for the row tiles from `tile` to `last_tile` and tokens from `first` to `last`.
__device__ __forceinline__ void combine_rows(const Params& p, int tile, int last_tile, int first, int last,
                                             const float* weights) {
  const int pitch = p.row_tiles * 64, width = (last_tile - tile) * 16;  // of 4 rows
  for (int i = threadIdx.x; i < width * (last - first); i += THREADS) {
    const Quotient at = divide(i, width);
    const int token = first + at.q, column = tile * 64 + at.r * 4;
    const float* from = p.partial + static_cast<long long>(token) * p.topk * p.splits * pitch + column;
    float sum[4] = {};
    for (int j = 0; j < p.topk * p.splits; j += 4) {  // four loads in flight
      float4 v[4];
      float w[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool inside = j + k < p.topk * p.splits;
        w[k] = inside ? weights[at.q * p.topk + divide(j + k, p.splits).q] : __int_as_float(0x7fffffff);
        v[k] = {0, 0, 0, 0};
        if (w[k] == w[k]) v[k] = __ldcg(reinterpret_cast<const float4*>(from + static_cast<long long>(j + k) * pitch));
        w[k] = w[k] == w[k] ? w[k] : 0;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sum[0] += w[k] * v[k].x, sum[1] += w[k] * v[k].y, sum[2] += w[k] * v[k].z, sum[3] += w[k] * v[k].w;
      }
    }
    if (column < p.rows) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (p.bias) sum[j] += B16 ? from_bf16(p.bias[column + j]) : from_fp16(p.bias[column + j]);
      }
      const u32 low = round_to_16<B16>(sum[0]) | round_to_16<B16>(sum[1]) << 16;
      const u32 high = round_to_16<B16>(sum[2]) | round_to_16<B16>(sum[3]) << 16;
      u16* out = static_cast<u16*>(p.out) + static_cast<long long>(token) * p.rows + column;
      *reinterpret_cast<uint2*>(out) = make_uint2(low, high);
    }
  }
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
  const int first = blockIdx.x / p.row_tiles * TURN, last = min(p.tokens, first + TURN), tile = blockIdx.x % p.row_tiles;
  load_choices(p, first, last, weights);
  __syncthreads();
  wait_for_primary();
  combine_rows(p, tile, tile + 1, first, last, weights);
}
