// A whole MoE FFN for few tokens an expert, in three or four launches; also a plain linear (one expert, one choice).
//
//   factors:  t = V x of the first projection's compensators (skipped where no expert has one)
//   gate_up:  h = act(W_gate x + U_gate t) * (W_up x + U_up t)
//   down:     first blocks: t2 = V2 h; the others: W_down h + U2 t2 -> partial sums; the last block of some row tiles
//             adds them over choices and splits in a fixed order, times the router's weights. No float atomics.
//   combine:  that sum on its own, where it is too much for one block.
//
// Compensators: V's rows (64 padded) are ordinary 3-bit row tiles of the layout in tile.cuh; gate and up each take
// `16 * steps` of them. U is read in steps of 16 ranks, [row tile][step][3][32 lanes] words, 12 bytes a lane, and its
// scales (one a rank and row tile) are folded into t, which enters the MMA as the sum of two bf16, so nothing of its
// float32 is lost. Rows of gate and up alternate in runs of 32, so one thread holds both halves of an output.
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
  int* arrivals;         // down: [row_tiles], zero at its start
  int* v_done;           // down: [items], zero at its start
  int* to_clear;         // gate_up, factors: counters that the first block zeroes for the next kernel
  int clear_count;
  int tokens, topk, items, in_features, row_tiles, rows, row_divisor, splits;
  int v_row_tiles;       // the most of any expert
  int v_blocks;          // down: leading blocks that compute V x in this launch
  int activation, choice_weight_type;
  int k_warps;           // warps of a block that share a row tile; the others take the next ones
  int combine_later;     // down: the sum is another launch
};

extern __shared__ __align__(16) char shared[];

struct Scratch {
  int list[TOKENS];
  int sums[WARPS];
  int histogram[MILO_EXPERTS];
  short chosen[MILO_PAIRS];
};

constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int REDUCE_BYTES = WARPS * TOKENS * PITCH * 4;
constexpr int MAIN_BYTES = RING_BYTES > REDUCE_BYTES ? RING_BYTES : REDUCE_BYTES;

__device__ __forceinline__ Scratch& scratch() { return *reinterpret_cast<Scratch*>(shared + MAIN_BYTES); }

__device__ __forceinline__ Item item_of(const Params& p, int item) {
  Scratch& s = scratch();
  return find_item<TOKENS, WARPS>(p.routing, item, s.histogram, s.chosen, s.sums, s.list);
}

__device__ __forceinline__ void clear_counters(const Params& p) {
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < p.clear_count; i += THREADS) p.to_clear[i] = 0;
  }
}

// t of one row tile of V and one split; returns false where there is no such tile.
template <class Ready>
__device__ bool factor_tile(const Params& p, int tile, int item, int split, Ready ready) {
  Item work = item_of(p, item);
  if (work.expert < 0) return false;
  int4 entry = p.compensator.table[work.expert];
  if (tile >= entry.y) return false;
  Accumulators total = {};
  multiply(p.v, entry.x + tile, split * WARPS + threadIdx.x / WARP, p.compensator.t_splits * WARPS, p.x, p.in_features, p.row_divisor, scratch().list,
           work.count, shared, total, ready);
  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared);
  spread(total, partial);
  __syncthreads();
  for (int i = threadIdx.x; i < 64 * work.count; i += THREADS) {
    int token = i / 64, row = i % 64;
    long long pair = split * static_cast<long long>(p.routing.pairs) + scratch().list[token];
    p.compensator.t[pair * p.compensator.t_stride + tile * 64 + row] = gather(partial, 0, WARPS, token, row);
  }
  return true;
}

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
__device__ __forceinline__ void add_factors(const Params& p, int4 entry, int row_tile, Step<PARTS>& u, int count,
                                            Accumulators& total) {
  const Compensator& c = p.compensator;
  const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP % p.k_warps, steps = entry.w;
  for (int step = first; step < steps; step += p.k_warps) {
    if (step != first) u.load(c, entry.z + static_cast<long long>(row_tile) * steps + step);
    u32 pairs[16];
    decode<true, 3, 4>(u.words, pairs);
#pragma unroll
    for (int nt = 0; nt < NT; ++nt) {
      if (nt * 8 < count) {
        const int n = nt * 8 + lane / 4;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          u32 high[2] = {0, 0}, low[2] = {0, 0};
          if (n < count) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int k = (part * steps + step) * 16 + 8 * i + lane % 4 * 2;
              float a = 0, b = 0;
              for (int s = 0; s < c.t_splits; ++s) {
                long long row = s * static_cast<long long>(p.routing.pairs) + scratch().list[n];
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

extern "C" __global__ void __launch_bounds__(THREADS) factors(const __grid_constant__ Params p) {
  launch_dependents();
  clear_counters(p);
  const int per_item = p.v_row_tiles * p.compensator.t_splits, rest = blockIdx.x % per_item;
  factor_tile(p, rest / p.compensator.t_splits, blockIdx.x / per_item, rest % p.compensator.t_splits, [] {});
}

// Which row tile and which part of K this warp works on. A block takes WARPS / k_warps row tiles; beyond the matrix
// the last one is computed again and not written.
struct Place {
  int first_row_tile, row_tiles, row_tile, share;

  __device__ Place(const Params& p, int block) {
    const int warp = threadIdx.x / WARP, group = WARPS / p.k_warps;
    first_row_tile = block * group;
    row_tiles = min(group, p.row_tiles - first_row_tile);
    row_tile = min(first_row_tile + warp / p.k_warps, p.row_tiles - 1);
    share = warp % p.k_warps;
  }
};

template <int PARTS>
__device__ __forceinline__ int4 first_step(const Params& p, int expert, const Place& place, Step<PARTS>& u) {
  int4 entry = {0, 0, 0, 0};
  if (p.v_row_tiles) {
    entry = __ldg(p.compensator.table + expert);
    if (place.share < entry.w) {
      u.load(p.compensator, entry.z + static_cast<long long>(place.row_tile) * entry.w + place.share);
    }
  }
  return entry;
}

extern "C" __global__ void __launch_bounds__(THREADS, MILO_BLOCKS) gate_up(const __grid_constant__ Params p) {
  launch_dependents();
  const int groups = (p.row_tiles + WARPS / p.k_warps - 1) / (WARPS / p.k_warps);
  const Place place(p, blockIdx.x % groups);
  Item work = item_of(p, blockIdx.x / groups);
  if (work.expert < 0) {
    wait_for_primary();
    clear_counters(p);
    return;
  }
  Accumulators total = {};
  Step<2> u;
  const int4 entry = first_step(p, work.expert, place, u);
  multiply(p.weights, static_cast<long long>(work.expert) * p.row_tiles + place.row_tile, place.share, p.k_warps, p.x,
           p.in_features, p.row_divisor, scratch().list, work.count, shared, total, [] {});
  wait_for_primary();
  clear_counters(p);
  add_factors<2>(p, entry, place.row_tile, u, work.count, total);
  __syncthreads();
  float* partial = reinterpret_cast<float*>(shared);
  spread(total, partial);
  __syncthreads();
  const int width = 32 * place.row_tiles;
  for (int i = threadIdx.x; i < width * work.count; i += THREADS) {
    const int token = i / width, column = i % width, warp = column / 32 * p.k_warps, row = column % 32;
    const float gate = gather(partial, warp, p.k_warps, token, row);
    const float h = activate(p.activation, gate) * gather(partial, warp, p.k_warps, token, row + 32);
    const long long pair = scratch().list[token];
    static_cast<u16*>(p.out)[pair * p.rows + place.first_row_tile * 32 + column] = round_to_16<B16>(h);
  }
}

// The sum over choices and splits for 64 rows and the tokens from `first` to `last`.
__device__ void combine_rows(const Params& p, int row_tile, int first, int last) {
  const int column = row_tile * 64 + threadIdx.x % 16 * 4, pitch = p.row_tiles * 64;
  for (int token = first + threadIdx.x / 16; token < last; token += THREADS / 16) {
    float sum[4] = {};
    for (int c = 0; c < p.topk; ++c) {
      int pair = token * p.topk + c;
      if (p.routing.ids && local_expert(p.routing, pair) < 0) continue;
      float one[4] = {}, weight = choice_weight(p, pair);
      for (int s = 0; s < p.splits; ++s) {
        const float* from = p.partial + (static_cast<long long>(pair) * p.splits + s) * pitch + column;
        float4 v = __ldcg(reinterpret_cast<const float4*>(from));
        one[0] += v.x, one[1] += v.y, one[2] += v.z, one[3] += v.w;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += weight * one[i];
    }
    if (column < p.rows) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (p.bias) sum[i] += B16 ? from_bf16(p.bias[column + i]) : from_fp16(p.bias[column + i]);
        static_cast<u16*>(p.out)[static_cast<long long>(token) * p.rows + column + i] = round_to_16<B16>(sum[i]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) combine(const __grid_constant__ Params p) {
  wait_for_primary();
  const int first = blockIdx.x / p.row_tiles * (THREADS / 16);
  combine_rows(p, blockIdx.x % p.row_tiles, first, min(p.tokens, first + THREADS / 16));
}

extern "C" __global__ void __launch_bounds__(THREADS, MILO_BLOCKS) down(const __grid_constant__ Params p) {
  launch_dependents();
  if (blockIdx.x < p.v_blocks) {
    // The lowest blocks are scheduled first, so the others may wait for them.
    const int per_item = p.v_row_tiles * p.compensator.t_splits, rest = blockIdx.x % per_item;
    const int item = blockIdx.x / per_item;
    if (factor_tile(p, rest / p.compensator.t_splits, item, rest % p.compensator.t_splits, [] { wait_for_primary(); })) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) atomicAdd(p.v_done + item, 1);
    } else {
      wait_for_primary();
    }
    return;
  }
  const int block = blockIdx.x - p.v_blocks, item = block % p.items, rest = block / p.items;
  const int group = rest / p.splits, split = rest % p.splits;
  const Place place(p, group);
  Item work = item_of(p, item);
  if (work.expert < 0) {
    wait_for_primary();
  } else {
    Accumulators total = {};
    Step<1> u;
    const int4 entry = first_step(p, work.expert, place, u);
    multiply(p.weights, static_cast<long long>(work.expert) * p.row_tiles + place.row_tile,
             split * p.k_warps + place.share, p.splits * p.k_warps, p.x, p.in_features, p.row_divisor, scratch().list,
             work.count, shared, total, [] { wait_for_primary(); });
    if (entry.y && split == p.splits - 1) {
      if (p.v_blocks) {
        while (load_acquire(p.v_done + item) < entry.y * p.compensator.t_splits) __nanosleep(32);
      }
      add_factors<1>(p, entry, place.row_tile, u, work.count, total);
    }
    __syncthreads();
    float* partial = reinterpret_cast<float*>(shared);
    spread(total, partial);
    __syncthreads();
    const int width = 64 * place.row_tiles;
    for (int i = threadIdx.x; i < width * work.count; i += THREADS) {
      const int token = i / width, column = i % width;
      const long long at = static_cast<long long>(scratch().list[token]) * p.splits + split;
      __stcg(p.partial + at * (p.row_tiles * 64) + place.first_row_tile * 64 + column,
             gather(partial, column / 64 * p.k_warps, p.k_warps, token, column % 64));
    }
  }
  if (p.combine_later) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) scratch().sums[0] = atomicAdd(p.arrivals + group, 1) == p.items * p.splits - 1;
  __syncthreads();
  if (scratch().sums[0]) {
    __threadfence();
    for (int i = 0; i < place.row_tiles; ++i) combine_rows(p, place.first_row_tile + i, 0, p.tokens);
  }
}
