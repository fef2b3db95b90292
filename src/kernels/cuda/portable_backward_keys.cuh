// the backward pass by keys: dK and dV stay in registers while the queries that see them go by
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_KEYS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_KEYS_CUH
#include "kernels/cuda/portable_backward_products.cuh"
#include "kernels/cuda/portable_backward_split.cuh"
#include "kernels/cuda/portable_backward_weights.cuh"
#include "kernels/cuda/portable_careful.cuh"

// Shared memory: the block's own rows, the other side's, three numbers per query, marks of rows that are not finite.
template <class P, int ROW, int WARPS, int STEP, int STAGES>
struct key_room {
  enum {
    OWN = 16 * WARPS,
    OWN_TILE = OWN * ROW,
    STEP_TILE = STEP * ROW,
    NUMBERS = 3 * STEP * (int)sizeof(typename P::real),
    VALUES_AT = OWN_TILE,
    STAGES_AT = 2 * OWN_TILE,
    STAGE = 2 * STEP_TILE + NUMBERS,
    BAD_AT = STAGES_AT + STAGES * STAGE,
    // Scales of the rows of K, V, Q and dO.
    SCALES_AT = BAD_AT + (4 * (STEP / 32 + 1) * 2 + 15) / 16 * 16,
    BYTES = SCALES_AT + (P::SPLIT ? 2 * (OWN + STEP) * 4 : 0)
  };
};

// What a block of keys does next: queries of one head.
typedef struct key_step {
  int64_t head, first;
  int pattern, offset;
} key_step;

// dK and dV of block `index`: 16 WARPS keys of a key head, SLICE columns of it; from STEP queries at a time. `split`:
// of Q and dO. Returns whether the block has to be done carefully; then it has written nothing.
template <class P, int ROW, int WARPS, int STEP, int STAGES, int SLICE, bool GENERAL, bool CAREFUL>
static __device__ __forceinline__ bool make_key_gradients(const sa_problem &p, const sa_device_plan &plan,
                                                          const backward_rows<typename P::real> &rows,
                                                          const backward_aligned &aligned, const split_operands &split,
                                                          int64_t index) {
  typedef typename P::real Real;
  typedef typename P::element Element;
  static_assert(!P::SPLIT || STAGES == 1, "scales have one place");
  // Whether rows of the next step are called for as soon as those in their place have been done with: width 128 6 %
  // less time. With options, in f64 and in rows of 256 steps took 3 % longer so.
  constexpr bool EARLY = P::SPLIT && !GENERAL;
  typedef key_room<P, ROW, WARPS, STEP, STAGES> room;
  constexpr int THREADS = 32 * WARPS, OWN = 16 * WARPS, BLOCKS = STEP / 8, EACH = sizeof(Element),
                SLICES = ROW / EACH / SLICE;
  char *const shared = dynamic_shared<char>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, t = lane & 3;

  const int64_t parts = SA_TILE / OWN, blocks = plan.col_tiles * parts;
  const int column = (int)(index % SLICES) * SLICE;
  const int64_t item = index / SLICES, place = item % blocks, batch = item / blocks / p.key_heads,
                key_head = item / blocks % p.key_heads, group = p.heads / p.key_heads;
  int64_t col_tile = place / parts;
  if (group && plan.col_tiles > 1)
    col_tile = plan.col_order[sa_device_plane(plan, batch, key_head * group) * plan.col_tiles + col_tile];
  const int64_t first_key = col_tile * SA_TILE + place % parts * OWN;
  if (first_key >= p.keys) return false;

  char *const keys = shared, *const values = shared + room::VALUES_AT;
  uint32_t *const bad_query = (uint32_t *)(shared + room::BAD_AT), *const bad_dout = bad_query + STEP / 32 + 1;
  float *const key_scale = (float *)(shared + room::SCALES_AT), *const value_scale = key_scale + OWN,
               *const query_scale = value_scale + OWN, *const dout_scale = query_scale + STEP;
  const tile_source key_source = tile_source_of(p.k, EACH, batch, key_head, p.keys, p.width, aligned.k),
                    value_source = tile_source_of(p.v, EACH, batch, key_head, p.keys, p.value_width, aligned.v);

  const int key_bits = (int)(first_key % SA_TILE) / 64 * 128 + ((int)(first_key % 64) / 16 + warp) * 32 + lane;
  const Real more = (Real)(1 / (1 - p.dropout));
  const bool bias = p.bias.data != NULL;

  // Whether a warp of this block sees a pair of a step.
  const auto some = [&](int pattern, int offset) {
    const uint32_t *bits = plan.col_bits + (int64_t)pattern * 512 + offset / 64 * 256 + first_key % SA_TILE / 64 * 128;
    uint32_t seen = 0;
    for (int k = lane; k < 2 * OWN; k += 32) seen |= bits[first_key % 64 / 16 * 32 + k];
    seen >>= offset % 64 / 2;
    if (STEP < 64) seen &= (1u << (STEP / 2 & 31)) - 1;
    return __any_sync(~0u, seen != 0) != 0;
  };

  const auto walk_head = [&](int64_t head) {
    const int64_t *start = plan.col_start + sa_device_plane(plan, batch, head) * plan.col_tiles + col_tile;
    return steps_of(plan.col_runs + start[0], start[1] - start[0]);
  };

  const auto query_source = [&](int64_t head) {
    return tile_source_of(p.q, EACH, batch, head, p.queries, p.width, aligned.q);
  };
  const auto dout_source = [&](int64_t head) {
    tile_source source = tile_source_of(p.dout, EACH, batch, head, p.queries, p.value_width, aligned.dout);
    if (!p.dout.data) source.rows = 0;
    return source;
  };

  const auto load_douts = [&](const key_step &step, char *stage) {
    char *const douts = stage + room::STEP_TILE;
    if (P::SPLIT && split.rows[0] && !CAREFUL)
      load_split<ROW, STEP, THREADS>(douts, dout_scale, split, 1, batch * p.heads + step.head, step.first, thread);
    else
      load_tile<Element, ROW, STEP, THREADS>(douts, dout_source(step.head), step.first, thread);
  };
  const auto load_queries = [&](const key_step &step, char *stage) {
    if (P::SPLIT && split.rows[0] && !CAREFUL)
      load_split<ROW, STEP, THREADS>(stage, query_scale, split, 0, batch * p.heads + step.head, step.first, thread);
    else
      load_tile<Element, ROW, STEP, THREADS>(stage, query_source(step.head), step.first, thread);
    constexpr int CHUNKS = STEP * (int)sizeof(Real) / 16;
    const int64_t at = (batch * p.heads + step.head) * rows.padded + step.first;
    for (int k = thread; k < 3 * CHUNKS; k += THREADS) {
      const Real *from = k < CHUNKS ? rows.base : k < 2 * CHUNKS ? rows.factor : rows.delta;
      copy_async(shared_address(stage + 2 * room::STEP_TILE + k * 16), (const char *)(from + at) + k % CHUNKS * 16);
    }
  };

  Real dk[SLICE / 8][4], dv[SLICE / 8][4];

  // EARLY: Q of the step that comes `later`, if it comes `again`, is called for beside dV, and dO beside its scores.
  const auto compute = [&](const key_step &step, const key_step &later, bool again, char *stage) {
    char *const queries = stage, *const douts = stage + room::STEP_TILE;
    const Real *base = (const Real *)(stage + 2 * room::STEP_TILE) + 2 * t, *factor = base + STEP,
               *delta = factor + STEP;
    const bool coarse = rows.coarse[((batch * p.heads + step.head) * rows.padded + step.first) / BACKWARD_BLOCK] != 0;
    const int64_t key = first_key + warp * 16 + g, query = step.first + 2 * t;
    uint32_t visible = ~0u;
    if (step.pattern != SA_FULL) {
      const uint32_t *bits = plan.col_bits + (int64_t)step.pattern * 512 + step.offset / 64 * 256;
      visible = bits[key_bits] >> (step.offset % 64 / 2);
    }
    if (BLOCKS < 8) visible &= (1u << (4 * BLOCKS & 31)) - 1;
    // To keys that a warp's queries see nothing of, nothing is added.
    const bool full = step.pattern == SA_FULL, idle = !full && !__any_sync(~0u, visible != 0);
    Real weights[BLOCKS][4], ds[BLOCKS][4], slope[GENERAL ? BLOCKS : 1][4];
    if (!idle) {
      const score_rule<Real> rule = score_rule_of<Real>(p, batch, step.head);
      multiply_rows<P, ROW, true>(weights, keys, key_scale, warp * 16, queries, query_scale);
      constexpr bool FACTORED = sizeof(Element) == sizeof(Real);
      make_weights<GENERAL, true, FACTORED>(
          rule, weights, slope, query, key, visible, full, coarse || FACTORED,
          [&](int n, int i) { return base[8 * n + i % 2]; }, [&](int n, int i) { return factor[8 * n + i % 2]; });
    }
    if (EARLY) {
      copy_async_wait<0>();
      __syncthreads();
    }
    if (!idle) {
      uint32_t kept = ~0u;
      if (GENERAL && p.dropout > 0) kept = kept_pairs<true, BLOCKS>(dropout_rule_of(p, batch, step.head), query, key);
      multiply_rows<P, ROW, true>(ds, values, value_scale, warp * 16, douts, dout_scale);
      differentiate_weights<GENERAL>(weights, ds, visible, full, kept, more,
                                     [&](int n, int i) { return delta[8 * n + i % 2]; });
      if constexpr (GENERAL) {
#pragma unroll
        for (int n = 0; n < BLOCKS; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            // A masked pair may hold NaN in its slope.
            if (p.softcap > 0) ds[n][i] = visible >> (4 * n + i) & 1 ? ds[n][i] * slope[n][i] : 0;
            weights[n][i] = kept >> (4 * n + i) & 1 ? weights[n][i] * more : 0;
          }
      }
    }
    if (CAREFUL) {
      __syncthreads();
      if (thread < 2 * (STEP / 32 + 1)) bad_query[thread] = 0;
      __syncthreads();
      make_finite<typename P::stored, ROW, STEP, THREADS>(queries, bad_query, thread);
      make_finite<typename P::stored, ROW, STEP, THREADS>(douts, bad_dout, thread);
      __syncthreads();
    }
    // Before the rest, so that the pairs need not be kept in registers.
    if (CAREFUL && !idle) {
      give_nonfinite<P, SLICE>(dv, weights, visible, bad_dout, dout_source(step.head), step.first, column);
      give_nonfinite<P, SLICE>(dk, ds, visible, bad_query, query_source(step.head), step.first, column);
    }
    if (!EARLY) {
      if (idle) return;
      multiply_columns<P, ROW, SLICE>(dv, weights, douts, dout_scale, column, CAREFUL);
      multiply_columns<P, ROW, SLICE>(dk, ds, queries, query_scale, column, CAREFUL);
      return;
    }
    if (!idle) multiply_columns<P, ROW, SLICE>(dk, ds, queries, query_scale, column, CAREFUL);
    __syncthreads();
    if (again) load_queries(later, stage);
    copy_async_commit();
    if (!idle) multiply_columns<P, ROW, SLICE>(dv, weights, douts, dout_scale, column, CAREFUL);
    __syncthreads();
    if (again) load_douts(later, stage);
    copy_async_commit();
  };

  memset(dk, 0, sizeof dk);
  memset(dv, 0, sizeof dv);
  int64_t head = key_head * group;
  const int64_t last_head = head + group;
  step_walk walk;
  if (group) walk = walk_head(head);
  const auto advance = [&](key_step &step) {
    while (head < last_head) {
      step.head = head;
      if (next_step<STEP>(walk, p.queries, some, step.first, step.pattern, step.offset)) return true;
      if (++head < last_head) walk = walk_head(head);
    }
    return false;
  };
  key_step now, later;
  load_tile<Element, ROW, OWN, THREADS>(keys, key_source, first_key, thread);
  load_tile<Element, ROW, OWN, THREADS>(values, value_source, first_key, thread);
  bool more_steps = advance(now);
  int stage = 0;
  const auto load = [&](const key_step &step, char *to) {
    load_queries(step, to);
    if (EARLY) copy_async_commit();
    load_douts(step, to);
  };
  if (more_steps) load(now, shared + room::STAGES_AT);
  copy_async_commit();
  if constexpr (P::SPLIT) {
    copy_async_wait<0>();
    __syncthreads();
    split_tile<P, ROW, OWN, THREADS>(keys, key_scale, CAREFUL, thread);
    split_tile<P, ROW, OWN, THREADS>(values, value_scale, CAREFUL, thread, rows.dweight_gain);
  }
  while (more_steps) {
    const bool again = advance(later);
    char *const here = shared + room::STAGES_AT + stage * room::STAGE;
    if (STAGES == 2) {
      if (again) load(later, shared + room::STAGES_AT + (stage ^ 1) * room::STAGE);
      copy_async_commit();
    }
    const bool whole = P::SPLIT && (CAREFUL || !split.rows[0]);
    if (EARLY && !whole)
      copy_async_wait<1>();
    else
      copy_async_wait<STAGES - 1>();
    __syncthreads();
    if (whole) {
      split_tile<P, ROW, STEP, THREADS>(here, query_scale, CAREFUL, thread);
      split_tile<P, ROW, STEP, THREADS>(here + room::STEP_TILE, dout_scale, CAREFUL, thread);
      __syncthreads();
    }
    compute(now, later, again, here);
    if (!EARLY) __syncthreads();
    if (!EARLY && STAGES == 1) {
      if (again) load(later, here);
      copy_async_commit();
    }
    if (STAGES == 2) stage ^= 1;
    now = later;
    more_steps = again;
  }
  copy_async_wait<0>();
  if (!CAREFUL && __syncthreads_or(!all_finite(dk) || !all_finite(dv))) {
    // What can leak, leaks through pairs that are masked; only f32 has another reason to look again (products_f32).
    bool suspect = P::SPLIT || bias;
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h++) {
      const int64_t *start = plan.col_start + sa_device_plane(plan, batch, h) * plan.col_tiles + col_tile;
      suspect = suspect || some_masked(plan.col_runs + start[0], start[1] - start[0]);
    }
    if (suspect) return true;
  }
  const int64_t row = first_key + warp * 16;
  if (p.dk.data) write_rows<Element>(p.dk, batch, key_head, row, p.keys, p.width, column, (Real)p.scale, dk);
  if (p.dv.data) write_rows<Element>(p.dv, batch, key_head, row, p.keys, p.value_width, column, (Real)1, dv);
  return false;
}

template <class P, int ROW, int WARPS, int STEP, int STAGES, int SLICE, bool GENERAL>
static __global__ void __launch_bounds__(32 * WARPS)
    backward_keys(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                  const __grid_constant__ backward_rows<typename P::real> rows,
                  const __grid_constant__ backward_aligned aligned, const __grid_constant__ split_operands split,
                  int64_t first, uint8_t *suspects) {
  dependents_launch();
  const int64_t index = first + blockIdx.x;
  const bool suspect =
      make_key_gradients<P, ROW, WARPS, STEP, STAGES, SLICE, GENERAL, false>(p, plan, rows, aligned, split, index);
  if (threadIdx.x == 0 && suspects) suspects[index] = suspect;
}

template <class P, int ROW, int WARPS, int STEP, int STAGES, int SLICE, bool GENERAL>
static __global__ void __launch_bounds__(32 * WARPS)
    careful_backward_keys(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                          const __grid_constant__ backward_rows<typename P::real> rows,
                          const __grid_constant__ backward_aligned aligned, const uint8_t *suspects, int64_t blocks) {
  redo_suspects<32 * WARPS>(suspects, blocks, [&](int64_t block) {
    make_key_gradients<P, ROW, WARPS, STEP, STAGES, SLICE, GENERAL, true>(p, plan, rows, aligned, {}, block);
  });
}

#endif
