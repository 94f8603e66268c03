// The producers: one warp asks the copy engine for weights, three warps fetch the tokens' activations and t.
#pragma once
#include "prefill.cuh"

// One lane asks for all: instructions for the copy engine are a warp's, and take one another's place in its queue.
__device__ __forceinline__ void produce_weights(const Params& p) {
  const u64 once = evict_first(), again = evict_normal();
  if (!p.early) wait_for_primary();
  const int items = uniform(*p.item_count);
  Ring ring(uniform(shared_address(shared_memory())));
  for (int number = blockIdx.x;; number += gridDim.x) {
    const Unit u(p, number, items);
    if (u.past) break;
    if (!u.tiles) continue;
    const Matrix& m = u.is_v ? p.v : p.weights;
    const u64 policy = u.turns == 1 ? once : again;
    const int code_stride = m.k_tiles * CODE_BYTES, meta_stride = m.records * META_BYTES;
    const char* codes = m.codes + u.first_tile * code_stride + static_cast<long long>(u.k_tile) * CODE_BYTES;
    const char* meta = m.meta + u.first_tile * meta_stride;
#pragma unroll 1
    for (int kt = u.k_tile; kt < u.k_tile + u.k_tiles; ++kt, codes += CODE_BYTES, ring.next()) {
      ring.wait_empty();
      if (elect()) {
        barrier_expect(ring.full(), u.tiles * (CODE_BYTES + META_BYTES));
        const char* record = meta + (kt >> m.meta_shift) * META_BYTES;
        const char* code = codes;
#pragma unroll 1
        for (int t = 0; t < u.tiles; ++t, code += code_stride, record += meta_stride) {
          copy_bulk(ring.codes(t), code, CODE_BYTES, ring.full(), policy);
          copy_bulk(ring.meta(t), record, META_BYTES, ring.full(), policy);
        }
      }
      __syncwarp();
    }
    const int each = steps_a_stage(p), scale_bytes = p.parts * 32;
    const long long first = u.first_step + static_cast<long long>(u.tile) * u.steps;
#pragma unroll 1
    for (int stage = 0; stage < u_stages(p, u); ++stage, ring.next()) {
      const int step = stage * each, steps = min(each, u.steps - step);
      ring.wait_empty();
      if (elect()) {
        barrier_expect(ring.full(), u.tiles * steps * (STEP_BYTES + scale_bytes));
#pragma unroll 1
        for (int t = 0; t < u.tiles; ++t) {
          const long long from = first + t * u.steps + step;
          copy_bulk(ring.codes(t), p.u_codes + from * STEP_BYTES, steps * STEP_BYTES, ring.full(), again);
          copy_bulk(ring.meta(t), p.u_scales + from * scale_bytes, steps * scale_bytes, ring.full(), again);
        }
      }
      __syncwarp();
    }
  }
}

// The record of the unit after the next, and the next one's part of `order`, on their way to L1. Where an expert has
// several items, it may be another's.
__device__ __forceinline__ void prefetch_next(const Params& p, int number, int items, int thread) {
  prefetch(Unit::near(p, number + gridDim.x, items));
  const Record* next = Unit::near(p, number, items);
  if (p.order && thread * 32 < next->count + 32) prefetch(p.order + next->begin + min(thread * 32, next->count - 1));
}

// Stages whose copies were asked for, but which the consumers were not told of yet. A thread's copies become visible to
// the tensor core by a fence of that thread once they have landed, so several stages are on their way before that of the
// first is waited for.
struct Landing {
  static constexpr int AHEAD = STAGES > 4 ? 3 : STAGES - 2;
  Ring ring;
  int pending = 0;

  __device__ __forceinline__ explicit Landing(u32 memory) : ring(memory) {}
  template <int LEFT>
  __device__ __forceinline__ void tell() {
    copy_wait<LEFT>();
    fence_for_tensor_core();
    __syncwarp();
#pragma unroll 1
    for (; pending > LEFT; --pending, ring.next()) {
      if (elect()) barrier_arrive(ring.full());
    }
  }
  __device__ __forceinline__ void add() {
    copy_commit();
    if (++pending > AHEAD) tell<AHEAD>();
  }
  // Before a wait for a slot: what the consumers are to free it for may be among these.
  __device__ __forceinline__ void wait_empty(const Ring& next) {
    if (pending && !next.is_empty()) tell<0>();
    next.wait_empty();
  }
};

// Rows without a token are left as they are: the columns of a product do not mix, and those are not written.
__device__ __forceinline__ void produce_tokens(const Params& p) {
  constexpr int ROWS = TOKEN_THREADS / 8, ROUNDS = (WIDTH + ROWS - 1) / ROWS, BATCH = 4;  // 8 threads a row
  const int thread = threadIdx.x - WARP, chunk = thread % 8, row = thread / 8;
  wait_for_primary();
  launch_dependents();
  const int items = uniform(*p.item_count);
  if (items) prefetch(Unit::near(p, blockIdx.x + gridDim.x, items));
  Ring ring(uniform(shared_address(shared_memory())));
  Landing landing(ring.base);
  const u32 rows = ring.base + ROWS_AT, from = rows + row * 4;
  for (int number = blockIdx.x;; number += gridDim.x) {
    const Unit u(p, number, items);
    if (u.past) break;
    if (!u.tiles) continue;
    named_barrier(4, TOKEN_THREADS);  // all have read the last unit's
    for (int n = thread; n < u.count; n += TOKEN_THREADS) {
      const int place = u.begin + n;
      store_shared_word(rows + n * 4, (p.gather ? p.order[place] / p.gather : place) * p.pitch * 2);
    }
    named_barrier(4, TOKEN_THREADS);
    prefetch_next(p, number + gridDim.x, items, thread);
    const char* x = reinterpret_cast<const char*>(p.x) + u.k_tile * 128 + chunk * 16;
    const int left = u.count - row;
#pragma unroll 1
    for (int kt = 0; kt < u.k_tiles; ++kt, x += 128) {
      landing.wait_empty(ring);
      const u32 even = ring.x() + row * 128 + (chunk ^ row % 8) * 16;  // of this thread's rows, 12 apart: the swizzle
      const u32 odd = ring.x() + row * 128 + (chunk ^ (row + ROWS) % 8) * 16;  // has two values
#pragma unroll
      for (int first = 0; first < ROUNDS; first += BATCH) {
        if (left <= first * ROWS) break;
        u32 at[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) at[i] = load_shared_word(from + (first + i) * ROWS * 4);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          if (left > (first + i) * ROWS) copy_row((i % 2 ? odd : even) + (first + i) * ROWS * 128, x + at[i]);
        }
      }
      __syncwarp();
      landing.add();
      ring.next();
    }
    const int stages = u_stages(p, u);
    if (!stages) continue;
    landing.tell<0>();  // what follows may take long
    // t is read past L1, which an acquiring load would empty of what was prefetched.
    const int wanted = u.v_groups * (u.count > WIDTH / 2 ? 2 : 1);
    while (load_relaxed(p.v_done + u.item) < wanted) __nanosleep(64);
    __syncwarp();
    const int part = p.parts == 2 ? chunk / 4 : 0, ranks = u.steps * 16, each = steps_a_stage(p) * 16;
#pragma unroll 1
    for (int stage = 0; stage < stages; ++stage) {
      const int rank = stage * each + (p.parts == 2 ? chunk % 4 : chunk) * 8;
      landing.wait_empty(ring);
      if (rank < ranks) {
        const u16* t = p.t + static_cast<long long>(u.begin) * p.t_stride + part * ranks + rank;
#pragma unroll 1
        for (int n = row; n < u.count; n += ROWS) {
          copy_row(ring.x() + n * 128 + ((chunk ^ n % 8) * 16), t + n * p.t_stride);
        }
      }
      __syncwarp();
      landing.add();
      ring.next();
    }
  }
  landing.tell<0>();
}
