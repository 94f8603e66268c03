// What a launch of the decode kernels (moe.cu, wide.cu) is compiled with and told, whatever the way it divides its work.
#pragma once
#include "codes.cuh"
#include "route.cuh"

constexpr bool B16 = MILO_BF16;         // activations are bf16, not fp16
constexpr int BITS = MILO_BITS;         // of a code: 3 or 4
constexpr int HALVES = MILO_HALVES;     // groups within a tile's 64 in-features: 2 for groups of 32, else 1
constexpr int NT = MILO_NT;             // n8 tiles of tokens
constexpr int WARPS = MILO_WARPS;
constexpr int STAGES = MILO_STAGES;

constexpr int TOKENS = 8 * NT;
constexpr int THREADS = WARPS * WARP;
constexpr int CODE_BYTES = BITS * 512, META_BYTES = 256 * HALVES;

struct Matrix {
  const char* codes;
  const char* meta;
  int ktiles, groups, meta_shift;  // tiles along K; meta records a row tile; log2 of the tiles a record covers
};

// Of a row tile: 16 rows, 8 tokens, the MMA's four; in units of 2^-P (codes.cuh).
using Accumulators = float[4][NT][4];
#ifndef MILO_BARE  // codes reach the tensor core unscaled
#define MILO_BARE (MILO_NT == 1)
#endif
constexpr float UNIT = MILO_BARE ? 1.0f / (1 << P<B16, BITS>) : 1;

struct Compensator {
  const u32* u_codes;   // steps of 16 ranks, 96 words each
  const u16* u_scales;  // [steps][parts][16] fp16
  const int4* table;    // an expert: {first V row tile, V row tiles, first U step, U steps a row tile}
  float* t;             // [splits][pairs][t_stride]
  int t_stride, t_splits;
  int stacked, ends[4]; // matrices stacked over out-features, each with an entry of the table; their ends in row tiles

  // Which entry of the table row tile `group` of an expert goes by.
  __device__ __forceinline__ int entry(int expert, int group) const {
    if (!stacked) return expert;
    int number = 0;
    for (int i = 0; i < 3; ++i) number += i < stacked - 1 && group >= ends[i];
    return number;
  }
};

struct Params {
  Routing routing;
  Matrix weights, v;
  Compensator compensator;
  const u16* x;
  void* out;             // gate_up: h [pairs, I]; down: y [tokens, N]; 16-bit
  float* partial;        // down, where combine follows: [pairs][64 * row_tiles]
  float* carry;          // sums that another block finishes: moe.cu [blocks][SLICE or 64 * tokens]; wide.cu, see there
  const void* choice_weights;  // [pairs]; null: ones
  const u16* bias;       // down: [N] or null
  int* counters;         // of this launch, zero at its start: see Counters
  int* others;           // of the launch that runs before or after, to be zeroed; null: this one zeroes its own
  int tokens, topk, in_features, row_tiles, rows, row_divisor;
  int quanta, v_cost;    // runs of K a unit (moe.cu); what a part of V counts as
  int activation, choice_weight_type;
  int add_items;         // down: a block adds up the items of a row tile
};

using Items = Table<TOKENS, MILO_PAIRS, MILO_EXPERTS>;

// Counters of a launch. Kernels zero each other's, so that no launch is spent on it.
constexpr int MAX_BLOCKS = 1024;
struct Counters {
  int carried[MAX_BLOCKS];         // 1 (wide.cu: row tiles): the block's `carry` is written
  int v_done[Items::MAX_ITEMS];    // parts of V that are finished
  int exits;                       // blocks that have ended, where a launch zeroes its own
};
static_assert(sizeof(Counters) <= MILO_COUNTER_BYTES, "the host allocates less");
__device__ __forceinline__ Counters& counters(const Params& p) { return *reinterpret_cast<Counters*>(p.counters); }

// One block.
__device__ __forceinline__ void zero_counters(int* counters, int bytes) {
#pragma unroll 1
  for (int i = threadIdx.x; i < bytes / 4; i += THREADS) counters[i] = 0;
}
// Where no other launch does it, the last block to end zeroes this launch's counters. `last`: a word of shared memory.
__device__ __forceinline__ void zero_own_counters(const Params& p, int& last, int bytes) {
  if (p.others) return;
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&counters(p).exits, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (last) zero_counters(p.counters, bytes);
}

__device__ __forceinline__ Items& items();  // this block's routing table

// Where every block's stretch of a line of `total` units of time begins, where it also has its share of `parts` parts of V
// (block, block + blocks, ...) that count as `cost` units each.
struct Cut {
  int base, extra, v_base, v_extra, v_cost;

  __device__ __forceinline__ Cut(int total, int parts, int cost) : v_cost(cost) {
    const int blocks = gridDim.x;
    const Quotient v = divide(parts, blocks), all = divide(total + parts * cost, blocks);
    v_base = v.q, v_extra = v.r, base = all.q, extra = all.r;
    if (base < v_cost * (v_base + 1)) {  // some block would have V alone and more than its share of it
      const Quotient plain = divide(total, blocks);
      v_cost = 0, base = plain.q, extra = plain.r;
    }
  }
  __device__ __forceinline__ int operator()(int block) const {
    return block * base + min(block, extra) - v_cost * (block * v_base + min(block, v_extra));
  }
  __device__ __forceinline__ int v_parts() const { return v_base + (static_cast<int>(blockIdx.x) < v_extra); }
};

__device__ __forceinline__ float activate(int kind, float g) {
  if (kind == 0) return g / (1 + __expf(-g));
  if (kind == 1) return 0.5f * g * (1 + tanhf(0.7978845608028654f * (g + 0.044715f * g * g * g)));
  return 0.5f * g * (1 + erff(0.7071067811865476f * g));
}
