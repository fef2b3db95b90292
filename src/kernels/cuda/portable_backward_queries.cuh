// the backward pass by queries: dQ, and the shares of dAlibi
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_QUERIES_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_QUERIES_CUH
#include "kernels/cuda/portable_backward_products.cuh"
#include "kernels/cuda/portable_backward_split.cuh"
#include "kernels/cuda/portable_backward_weights.cuh"
#include "kernels/cuda/portable_careful.cuh"

template <class P, int ROW, int OWN, int STEP, int STAGES>
struct query_room {
  enum {
    OWN_TILE = OWN * ROW,
    STEP_TILE = STEP * ROW,
    STAGES_AT = 2 * OWN_TILE,
    STAGE = 2 * STEP_TILE,
    BAD_AT = STAGES_AT + STAGES * STAGE,
    // Scales of the rows of Q, dO, K and V.
    SCALES_AT = BAD_AT + (4 * (STEP / 32 + 1) + 15) / 16 * 16,
    BYTES = SCALES_AT + (P::SPLIT ? 2 * (OWN + STEP) * 4 : 0)
  };
};

// Where a block of GROUPS times 16 queries is, and what its lanes see.
template <int GROUPS>
struct query_block {
  const sa_device_plan *plan;
  int64_t batch, head, first, row_tile;

  // Block `place` of a head, those with the most to do first.
  __device__ __forceinline__ void find(const sa_device_plan &p, int64_t b, int64_t h, int64_t place) {
    constexpr int PARTS = SA_TILE / (16 * GROUPS);
    plan = &p;
    batch = b;
    head = h;
    row_tile = p.row_tiles > 1 ? p.row_order[sa_device_plane(p, b, h) * p.row_tiles + place / PARTS] : 0;
    first = row_tile * SA_TILE + place % PARTS * (16 * GROUPS);
  }

  // Whether some pair of the row of tiles is not visible.
  __device__ __forceinline__ bool masked() const {
    const int64_t *start = plan->row_start + sa_device_plane(*plan, batch, head) * plan->row_tiles + row_tile;
    return some_masked(plan->row_runs + start[0], start[1] - start[0]);
  }

  __device__ __forceinline__ step_walk walk() const {
    const int64_t *start = plan->row_start + sa_device_plane(*plan, batch, head) * plan->row_tiles + row_tile;
    return steps_of(plan->row_runs + start[0], start[1] - start[0]);
  }

  // Whether a warp of the block sees a pair of a step.
  template <int STEP>
  __device__ __forceinline__ bool some(int pattern, int offset) const {
    const uint2 *bits = plan->row_bits + (int64_t)pattern * 256 + first % SA_TILE / 16 * 32 + (threadIdx.x & 31);
    uint32_t seen = 0;
    for (int k = 0; k < GROUPS; k++) seen |= bits[k * 32].x | bits[k * 32].y;
    return __any_sync(~0u, (seen >> (offset / 4) & ((1u << (STEP / 4)) - 1)) != 0) != 0;
  }

  // The bits of the lane's pairs of a group in a step, 4 n + i for element i of block n.
  template <int BLOCKS>
  __device__ __forceinline__ uint32_t visible(int group, int pattern, int offset) const {
    if (pattern == SA_FULL) return BLOCKS < 8 ? (1u << (4 * BLOCKS & 31)) - 1 : ~0u;
    const uint2 bits =
        plan->row_bits[(int64_t)pattern * 256 + (first % SA_TILE / 16 + group) * 32 + (threadIdx.x & 31)];
    uint32_t seen = 0;
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
      const int shift = offset / 4 + 2 * n;
      seen |= ((bits.x >> shift & 3) | (bits.y >> shift & 3) << 2) << (4 * n);
    }
    return seen;
  }
};

// Of a lane's two queries, g and g + 8 of a group.
template <class Real>
struct lane_rows {
  Real base[2], factor[2], delta[2];
  bool coarse;

  __device__ __forceinline__ void read(const backward_rows<Real> &rows, int64_t at) {
    coarse = rows.coarse[at / BACKWARD_BLOCK] != 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      base[half] = rows.base[at + 8 * half];
      factor[half] = rows.factor[at + 8 * half];
      delta[half] = rows.delta[at + 8 * half];
    }
  }
};

// Scales of the rows of the tiles that a block of queries works on.
struct query_scales {
  float *query, *dout, *key, *value;

  __device__ __forceinline__ query_scales(char *at, int own, int step) {
    query = (float *)at;
    dout = query + own;
    key = dout + own;
    value = key + step;
  }
};

// dS of one step into `ds`: its products from the rows of Q and dO at `own`, and of K and V at `keys` and `values`. The
// first element of a lane is (query, key). FACTORED: weights take their factors whether or not the rows are coarse.
template <class P, int ROW, bool GENERAL, bool FACTORED, int BLOCKS>
static __device__ __forceinline__ void differentiate_step(const sa_problem &p, const score_rule<typename P::real> &rule,
                                                          const lane_rows<typename P::real> &rows, const char *queries,
                                                          const char *douts, const char *keys, const char *values,
                                                          const query_scales &scales, int64_t batch, int64_t head,
                                                          int64_t query, int64_t key, bool full, uint32_t &visible,
                                                          typename P::real (&ds)[BLOCKS][4],
                                                          typename P::real (&slope)[GENERAL ? BLOCKS : 1][4]) {
  typedef typename P::real Real;
  const int row = threadIdx.x / 32 * 16;
  Real s[BLOCKS][4];
  multiply_rows<P, ROW, false>(s, queries, scales.query, row, keys, scales.key);
  make_weights<GENERAL, false, FACTORED>(
      rule, s, slope, query, key, visible, full, rows.coarse || FACTORED, [&](int, int i) { return rows.base[i / 2]; },
      [&](int, int i) { return rows.factor[i / 2]; });
  multiply_rows<P, ROW, false>(ds, douts, scales.dout, row, values, scales.value);
  uint32_t kept = ~0u;
  Real more = 1;
  if (GENERAL && p.dropout > 0) {
    kept = kept_pairs<false, BLOCKS>(dropout_rule_of(p, batch, head), query, key);
    more = (Real)(1 / (1 - p.dropout));
  }
  differentiate_weights<GENERAL>(s, ds, visible, full, kept, more, [&](int, int i) { return rows.delta[i / 2]; });
}

// dQ of block `index`: 16 WARPS queries of a head, SLICE columns of it, and their shares of dAlibi; from STEP keys at a
// time. `split`: of K and V. Returns whether the block has to be done carefully; then it has written nothing.
template <class P, int ROW, int WARPS, int STEP, int STAGES, int SLICE, bool GENERAL, bool CAREFUL>
static __device__ __forceinline__ bool make_query_gradients(const sa_problem &p, const sa_device_plan &plan,
                                                            const backward_rows<typename P::real> &rows,
                                                            const backward_aligned &aligned,
                                                            const split_operands &split, int64_t index) {
  typedef typename P::real Real;
  typedef typename P::element Element;
  constexpr int THREADS = 32 * WARPS, OWN = 16 * WARPS, BLOCKS = STEP / 8, EACH = sizeof(Element),
                SLICES = ROW / EACH / SLICE;
  typedef query_room<P, ROW, OWN, STEP, STAGES> room;
  char *const shared = dynamic_shared<char>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, t = lane & 3;

  const int64_t blocks = (int64_t)plan.row_tiles * (SA_TILE / OWN), item = index / SLICES, head = item / blocks;
  const int column = (int)(index % SLICES) * SLICE;
  query_block<WARPS> block;
  block.find(plan, head / p.heads, head % p.heads, item % blocks);
  if (block.first >= p.queries) return false;
  const int64_t key_head = block.head / (p.heads / p.key_heads);

  char *const queries = shared, *const douts = shared + room::OWN_TILE;
  uint32_t *const bad = (uint32_t *)(shared + room::BAD_AT);
  const tile_source query_source = tile_source_of(p.q, EACH, block.batch, block.head, p.queries, p.width, aligned.q),
                    key_source = tile_source_of(p.k, EACH, block.batch, key_head, p.keys, p.width, aligned.k),
                    value_source = tile_source_of(p.v, EACH, block.batch, key_head, p.keys, p.value_width, aligned.v);
  tile_source dout_source =
      tile_source_of(p.dout, EACH, block.batch, block.head, p.queries, p.value_width, aligned.dout);
  if (!p.dout.data) dout_source.rows = 0;
  const query_scales scales(shared + room::SCALES_AT, OWN, STEP);

  const int64_t query = block.first + warp * 16 + g;
  lane_rows<Real> mine;
  mine.read(rows, head * rows.padded + query);
  const score_rule<Real> rule = score_rule_of<Real>(p, block.batch, block.head);
  const auto some = [&](int pattern, int offset) { return block.template some<STEP>(pattern, offset); };
  const auto load = [&](int64_t first, char *stage) {
    if (P::SPLIT && split.rows[0] && !CAREFUL) {
      const int64_t head = block.batch * p.key_heads + key_head;
      load_split<ROW, STEP, THREADS>(stage, scales.key, split, 0, head, first, thread);
      load_split<ROW, STEP, THREADS>(stage + room::STEP_TILE, scales.value, split, 1, head, first, thread);
      return;
    }
    load_tile<Element, ROW, STEP, THREADS>(stage, key_source, first, thread);
    load_tile<Element, ROW, STEP, THREADS>(stage + room::STEP_TILE, value_source, first, thread);
  };

  Real dq[SLICE / 8][4];
  double slope_share[2] = {};
  const auto compute = [&](int64_t first, int pattern, int offset, char *keys) {
    uint32_t visible = block.template visible<BLOCKS>(warp, pattern, offset);
    const bool idle = pattern != SA_FULL && !__any_sync(~0u, visible != 0);
    Real ds[BLOCKS][4];
    if (!idle) {
      Real slope[GENERAL ? BLOCKS : 1][4];
      const int64_t key = first + 2 * t;
      differentiate_step<P, ROW, GENERAL, sizeof(Element) == sizeof(Real)>(
          p, rule, mine, queries, douts, keys, keys + room::STEP_TILE, scales, block.batch, block.head, query, key,
          pattern == SA_FULL, visible, ds, slope);
      if constexpr (GENERAL) {
        if (rows.slope_share) {
          Real share[2] = {0, 0};
#pragma unroll
          for (int n = 0; n < BLOCKS; n++) {
            const Real apart = alibi_apart(rule, query, key + 8 * n);
#pragma unroll
            for (int i = 0; i < 4; i++) share[i / 2] -= alibi_distance<false>(apart, i) * ds[n][i];
          }
          slope_share[0] += share[0];
          slope_share[1] += share[1];
        }
        if (p.softcap > 0) {
#pragma unroll
          for (int n = 0; n < BLOCKS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) ds[n][i] = visible >> (4 * n + i) & 1 ? ds[n][i] * slope[n][i] : 0;
        }
      }
    }
    if (CAREFUL) {
      __syncthreads();
      if (thread < STEP / 32 + 1) bad[thread] = 0;
      __syncthreads();
      make_finite<typename P::stored, ROW, STEP, THREADS>(keys, bad, thread);
      __syncthreads();
    }
    if (idle) return;
    if (CAREFUL) give_nonfinite<P, SLICE>(dq, ds, visible, bad, key_source, first, column);
    multiply_columns<P, ROW, SLICE>(dq, ds, keys, scales.key, column, CAREFUL);
  };

  memset(dq, 0, sizeof dq);
  memset(slope_share, 0, sizeof slope_share);
  step_walk walk = block.walk();
  int64_t now, later;
  int pattern, offset, later_pattern, later_offset, stage = 0;
  load_tile<Element, ROW, OWN, THREADS>(queries, query_source, block.first, thread);
  load_tile<Element, ROW, OWN, THREADS>(douts, dout_source, block.first, thread);
  bool more = next_step<STEP>(walk, p.keys, some, now, pattern, offset);
  if (more) load(now, shared + room::STAGES_AT);
  copy_async_commit();
  if constexpr (P::SPLIT) {
    copy_async_wait<0>();
    __syncthreads();
    split_tile<P, ROW, OWN, THREADS>(queries, scales.query, CAREFUL, thread);
    split_tile<P, ROW, OWN, THREADS>(douts, scales.dout, CAREFUL, thread, rows.dweight_gain);
  }
  while (more) {
    const bool again = next_step<STEP>(walk, p.keys, some, later, later_pattern, later_offset);
    char *const here = shared + room::STAGES_AT + stage * room::STAGE;
    if (STAGES == 2) {
      if (again) load(later, shared + room::STAGES_AT + (stage ^ 1) * room::STAGE);
      copy_async_commit();
    }
    copy_async_wait<STAGES - 1>();
    __syncthreads();
    if (P::SPLIT && (CAREFUL || !split.rows[0])) {
      split_tile<P, ROW, STEP, THREADS>(here, scales.key, CAREFUL, thread);
      split_tile<P, ROW, STEP, THREADS>(here + room::STEP_TILE, scales.value, CAREFUL, thread);
      __syncthreads();
    }
    compute(now, pattern, offset, here);
    __syncthreads();
    if (STAGES == 1) {
      if (again) load(later, here);
      copy_async_commit();
    } else {
      stage ^= 1;
    }
    now = later, pattern = later_pattern, offset = later_offset;
    more = again;
  }
  copy_async_wait<0>();
  if (!CAREFUL && __syncthreads_or(!all_finite(dq)) && (P::SPLIT || p.bias.data || block.masked())) return true;
  if (p.dq.data)
    write_rows<Element>(p.dq, block.batch, block.head, block.first + warp * 16, p.queries, p.width, column,
                        (Real)p.scale, dq);
  if constexpr (GENERAL) {
    if (!rows.slope_share || column) return false;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const double share = over_quad_sum(slope_share[half]);
      if (t == 0) rows.slope_share[head * rows.padded + query + 8 * half] = (Real)share;
    }
  }
  return false;
}

template <class P, int ROW, int WARPS, int STEP, int STAGES, int SLICE, bool GENERAL>
static __global__ void __launch_bounds__(32 * WARPS)
    backward_queries(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                     const __grid_constant__ backward_rows<typename P::real> rows,
                     const __grid_constant__ backward_aligned aligned, const __grid_constant__ split_operands split,
                     int64_t first, uint8_t *suspects) {
  dependents_launch();
  const int64_t index = first + blockIdx.x;
  const bool suspect =
      make_query_gradients<P, ROW, WARPS, STEP, STAGES, SLICE, GENERAL, false>(p, plan, rows, aligned, split, index);
  if (threadIdx.x == 0 && suspects) suspects[index] = suspect;
}

template <class P, int ROW, int WARPS, int STEP, int STAGES, int SLICE, bool GENERAL>
static __global__ void __launch_bounds__(32 * WARPS)
    careful_backward_queries(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                             const __grid_constant__ backward_rows<typename P::real> rows,
                             const __grid_constant__ backward_aligned aligned, const uint8_t *suspects,
                             int64_t blocks) {
  redo_suspects<32 * WARPS>(suspects, blocks, [&](int64_t block) {
    make_query_gradients<P, ROW, WARPS, STEP, STAGES, SLICE, GENERAL, true>(p, plan, rows, aligned, {}, block);
  });
}

#endif
