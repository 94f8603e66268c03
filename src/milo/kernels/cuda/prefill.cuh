// The parameters of a product of many tokens, its units of work, and the ring in shared memory that feeds it.
//
// A unit is four row tiles of one expert's matrix times up to WIDTH of its tokens (an *item* of the list that `prepare`
// makes): two warpgroups of consumers take two row tiles each. A stage of the ring is 64 in-features: the row tiles'
// codes and metadata as they stand in memory, and the tokens' activations as the tensor core reads them.
//
// After a unit's in-features, its compensator follows as more stages: up to four steps of U (16 ranks) in the place of
// the codes, their scales in the place of the metadata, t = V x, rounded as activations are, in their place. With two
// parts a stage takes two steps, and t holds gate's ranks beside up's.
//
// V x has units of its own, which come first: two row tiles of V times a part of the in-features. There each warpgroup
// takes both row tiles and half of the tokens, for what such a unit waits for are the tokens.
#pragma once
#include "codes.cuh"
#include "route.cuh"
#include "wgmma.cuh"

constexpr bool B16 = MILO_BF16;      // activations are bf16, not fp16
constexpr int BITS = MILO_BITS;      // of a code: 3 or 4
constexpr int HALVES = MILO_HALVES;  // groups within a tile's 64 in-features: 2 for groups of 32, else 1
constexpr int WIDTH = MILO_WIDTH;    // the most tokens of an item
constexpr int STAGES = MILO_STAGES;
static_assert(WIDTH % 16 == 0, "results are transposed 16 tokens at a time, and V's are halved");

constexpr int ROW_TILES = 4, V_TILES = 2;  // of a unit
constexpr int GROUP_THREADS = 128, THREADS = 3 * GROUP_THREADS;
constexpr int TOKEN_THREADS = GROUP_THREADS - WARP;  // the producers that fetch activations; a warp fetches weights
constexpr int CODE_BYTES = BITS * 512, META_BYTES = 256 * HALVES, X_BYTES = WIDTH * 128, STEP_BYTES = 384;

struct Matrix {
  const char* codes;
  const char* meta;
  int k_tiles, records, meta_shift;  // tiles along K; meta records a row tile; log2 of the tiles a record covers
};

// What `prepare` tells of up to WIDTH tokens of one expert. A row of a compensators' table is {first V row tile, V row
// tiles, first U step, U steps a row tile}.
struct Record {
  int expert, begin, count;  // tokens `begin` .. of the sorted pairs
  int turn;                  // first record of the same expert | how many it has << 16
  int4 factors[2];           // the rows of the first and the second matrix's tables
  int4 unused;               // half a cache line
};

struct Params {
  Matrix weights, v;
  const char* u_codes;   // steps of 16 ranks
  const char* u_scales;  // [steps][parts][16] fp16
  const u16* x;          // rows of `pitch`, columns in the order of MMA operands
  u16* out;              // h [places, pitch_out], or rows of the result
  const Record* items;
  const int* item_count;
  const int* order;      // the pairs sorted by expert; null: places are rows
  const float* choice_weights;  // of the pairs in `order`; null: ones
  const u16* bias;       // [rows] or null
  float* t_partial;      // [v_splits][places][t_stride]
  u16* t;                // [places][t_stride]
  int* v_arrived;        // [items][v_groups][2]: parts of K whose sums are there, for either half of the tokens
  int* v_done;           // [items]: (group of V's row tiles, half) whose t is there
  int pitch, pitch_out, gather;  // gather: choices a token, 0 where the rows of x are places
  int parts, row_tiles, rows, groups;        // groups of ROW_TILES row tiles
  int v_groups, v_splits, t_stride, places;  // groups of V_TILES, the most of any expert; parts of K for them
  int second;                                // which of the records' factors
  int early;                                 //  the items were ready before the kernel ahead of this one started
};

constexpr int CODES_AT = STAGES * X_BYTES;
constexpr int META_AT = CODES_AT + STAGES * ROW_TILES * CODE_BYTES;
constexpr int RESULTS_AT = META_AT + STAGES * ROW_TILES * META_BYTES;
constexpr int RESULTS_BYTES = WIDTH * 128;  // a warpgroup
constexpr int CHOICES_AT = RESULTS_AT + 2 * RESULTS_BYTES;
constexpr int CHOICES_BYTES = WIDTH * 8;    // a warpgroup: order, then weights
constexpr int ROWS_AT = CHOICES_AT + 2 * CHOICES_BYTES;  // where each token's activations are
constexpr int FLAGS_AT = ROWS_AT + WIDTH * 4 + 192;  // reads run over
constexpr int BARRIERS_AT = FLAGS_AT + 16;
static_assert(BARRIERS_AT + 16 * STAGES == MILO_SHARED, "the host's sum");

// A place in the ring; producer and consumers walk it alike.
struct Ring {
  u32 base;
  int slot = 0;
  u32 phase = 0;

  __device__ __forceinline__ explicit Ring(u32 memory) : base(memory) {}
  __device__ __forceinline__ u32 full() const { return base + BARRIERS_AT + slot * 8; }
  __device__ __forceinline__ u32 empty() const { return full() + STAGES * 8; }
  __device__ __forceinline__ u32 x() const { return base + slot * X_BYTES; }
  __device__ __forceinline__ u32 codes(int tile) const {
    return base + CODES_AT + (slot * ROW_TILES + tile) * CODE_BYTES;
  }
  __device__ __forceinline__ u32 meta(int tile) const {
    return base + META_AT + (slot * ROW_TILES + tile) * META_BYTES;
  }
  __device__ __forceinline__ void wait_full() const { barrier_wait(full(), phase); }
  __device__ __forceinline__ void wait_empty() const { barrier_wait(empty(), phase ^ 1); }
  __device__ __forceinline__ bool is_empty() const { return barrier_passed(empty(), phase ^ 1); }
  __device__ __forceinline__ void next() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
  __device__ __forceinline__ void skip(int stages) {
    const u32 to = slot + stages, turns = to / STAGES;
    slot = to - turns * STAGES, phase ^= turns & 1;
  }
};

// n / d and n % d of numbers that all lanes of a warp have alike, and the compiler knows it.
__device__ __forceinline__ Quotient divide_uniform(int n, int d) {
  const Quotient any = divide(n, d);
  return {uniform(any.q), uniform(any.r)};
}

// The units of a launch, numbered: first V's (item, group of its row tiles, part of K), then the matrix's own, where the
// items of an expert take turns with each group of row tiles, so that its weights leave DRAM once.
//
// Everything in it is the same for all lanes of a warp and known as such to the compiler, which then counts, compares
// and makes addresses and descriptors beside the lanes' own instructions, in uniform registers.
struct Unit {
  int item, begin, count, turns;   // the item, and how many its expert has
  int group, tile, tiles;          // first row tile, of V or of the expert's matrix, and how many: 0, nothing to do
  int split, k_tile, k_tiles;      // first, and how many
  int first_step, steps;           // U's, and how many of them a row tile has
  int v_groups;                    // groups of V's row tiles of this expert, which t waits for
  long long first_tile;            // `tile`, counted over all experts
  bool is_v, past;

  __device__ __forceinline__ Unit(const Params& p, int number, int items) {
    const int v_units = items * p.v_groups * p.v_splits;
    past = number >= v_units + items * p.groups;
    if (past) return;
    is_v = number < v_units;
    if (is_v) {
      const Quotient parts = divide_uniform(number, p.v_splits), of_item = divide_uniform(parts.q, p.v_groups);
      split = parts.r, group = of_item.r, item = of_item.q;
    } else {
      number -= v_units;
      const int any = uniform(p.items[divide_uniform(number, p.groups).q].turn);  // of this expert, perhaps not ours
      const int first = any & 0xffff;
      const Quotient turn = divide_uniform(number - first * p.groups, any >> 16);
      split = 0, group = turn.q, item = first + turn.r;
    }
    const Record& r = p.items[item];
    const int4 factors = r.factors[p.second];
    begin = uniform(r.begin), count = uniform(r.count), turns = uniform(r.turn) >> 16;
    const int v_tiles = uniform(factors.y);
    v_groups = (v_tiles + V_TILES - 1) / V_TILES;
    first_step = uniform(factors.z), steps = uniform(factors.w);
    const int most = is_v ? V_TILES : ROW_TILES;
    tile = group * most;
    tiles = max(0, min(most, (is_v ? v_tiles : p.row_tiles) - tile));
    first_tile = (is_v ? uniform(factors.x) : static_cast<long long>(uniform(r.expert)) * p.row_tiles) + tile;
    const int all = p.weights.k_tiles;
    k_tile = is_v ? divide_uniform(all * split, p.v_splits).q : 0;
    k_tiles = is_v ? divide_uniform(all * (split + 1), p.v_splits).q - k_tile : all;
  }

  // Where the record of a unit stands, or one beside it.
  static __device__ __forceinline__ const Record* near(const Params& p, int number, int items) {
    const int v_units = items * p.v_groups * p.v_splits;
    const bool is_v = number < v_units;
    const int item = divide(is_v ? number : number - v_units, is_v ? p.v_splits * p.v_groups : p.groups).q;
    return p.items + min(item, items - 1);
  }
};

// Steps of U a stage, and the stages that follow a unit's in-features.
__device__ __forceinline__ int steps_a_stage(const Params& p) { return p.parts == 2 ? 2 : 4; }
__device__ __forceinline__ int u_stages(const Params& p, const Unit& u) {
  if (u.is_v) return 0;
  return p.parts == 2 ? (u.steps + 1) / 2 : (u.steps + 3) / 4;
}
