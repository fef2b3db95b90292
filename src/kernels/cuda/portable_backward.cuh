// the fused backward on mma.sync, for any dtype of portable_tile.cuh
//
// Deterministic without atomics and without turns: one kernel owns keys (dK and dV stay in registers while it walks the
// queries of all heads that share them), one owns queries (dQ, and the slopes of ALiBi), one owns tiles of the bias.
// Each makes the scores it needs again, with the very bits of the forward: 7 products of matrices instead of 5, and in
// return no second copy of dQ and no block that waits for another.
//
// P^T and dS^T never leave the registers: an accumulator of mma.sync is the left operand of the next one.
//
// 0 * NaN could leak through the products that sum over pairs: P^T dO into dV, dS^T Q into dK, dS K into dQ. A block
// whose result is not finite, and that met masked pairs, is made once more with 0 in place of what is not finite in dO,
// Q and K in these products; then it is given to the pairs that see it.
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_CUH
#include <limits.h>

#include <type_traits>

#include "kernels/cuda/portable_tile.cuh"

enum { BACKWARD_BLOCK = 64 };  // queries that share a flag

// What is known of each query, [B H][padded]. Weights are P = exp2((s - base) unit) factor: the LSE does for base, with
// a factor of 1, unless it is too large to hold the logarithm of the sum beside the peak. Queries without a key and
// those beyond L have a base of +inf, so P = 0.
template <class Real>
struct backward_rows {
  int64_t padded;  // queries, to whole tiles of the plan
  Real *base, *factor;
  Real *delta;        // dO . o - dLSE
  Real *sink_share;   // of dSinks; NULL: not wanted
  Real *slope_share;  // of dAlibi; NULL: not wanted
  int *coarse;        // per BACKWARD_BLOCK: whether some base is still to be found from the scores
};

typedef struct backward_aligned {
  bool q, k, v, dout;  // rows_aligned
} backward_aligned;

// Queries (or keys) `first` .. of a list of tiles, in steps of STEP, without those in which no pair is visible.
typedef struct step_walk {
  tile_walk tiles;
  int offset;  // in the tile that comes next
} step_walk;

static __device__ __forceinline__ step_walk steps_of(const sa_run *runs, int64_t count) {
  step_walk walk;
  walk.tiles = walk_start(runs, 0, count_tiles(runs, count));
  walk.offset = 0;
  return walk;
}

// The next step before `end` for which some(pattern, offset in the tile) holds, or false.
template <int STEP, class Some>
static __device__ __forceinline__ bool next_step(step_walk &walk, int64_t end, const Some &some, int64_t &first,
                                                 int &pattern, int &offset) {
  while (walk.tiles.left) {
    while (walk.offset < SA_TILE) {
      offset = walk.offset;
      pattern = walk.tiles.pattern;
      first = (int64_t)walk.tiles.tile * SA_TILE + offset;
      walk.offset += STEP;
      if (first < end && (pattern == SA_FULL || some(pattern, offset))) return true;
    }
    walk_advance(walk.tiles);
    walk.offset = 0;
  }
  return false;
}

// c = a b^T: 16 rows of one tile from `row` on, against all rows of another. SWAPPED: the forward makes it the other
// way round; the bits are the same.
template <class P, int ROW, int BLOCKS, bool SWAPPED>
static __device__ __forceinline__ void multiply_rows(typename P::real (&c)[BLOCKS][4], const char *own,
                                                     const float *own_scale, int row, const char *other,
                                                     const float *other_scale) {
  constexpr int STEPS = ROW / (int)sizeof(typename P::element) / P::DEPTH;
  typename P::sum sum[BLOCKS];
#pragma unroll
  for (int n = 0; n < BLOCKS; n++) clear_sum(sum[n]);
#pragma unroll 4
  for (int step = 0; step < STEPS; step++) {
    typename P::left a;
    typename P::right b[BLOCKS];
    P::template left_rows<ROW>(a, own, row, step);
#pragma unroll
    for (int n = 0; n < BLOCKS; n += 2) {
      typename P::right pair[2];
      P::template right_rows<ROW>(pair, other, 8 * n, step);
      b[n] = pair[0], b[n + 1] = pair[1];
    }
#pragma unroll
    for (int term = 0; term < P::TERMS; term++)
#pragma unroll
      for (int n = 0; n < BLOCKS; n++) P::template multiply_term<SWAPPED>(sum[n], a, b[n], term);
  }
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      c[n][i] = unsplit<P>(sum[n].value(i), own_scale, row + lane / 4 + i / 2 * 8, other_scale,
                           8 * n + 2 * (lane & 3) + i % 2);
}

// to += pairs rows: accumulator blocks against all rows of a tile, for SLICE of its columns from `column` on.
template <class P, int ROW, int BLOCKS, int SLICE>
static __device__ __forceinline__ void multiply_columns(typename P::real (&to)[SLICE / 8][4],
                                                        const typename P::real (&pairs)[BLOCKS][4], const char *tile,
                                                        const float *scale, int column, bool careful) {
  constexpr int STEPS = BLOCKS * 8 / P::DEPTH;
  typename P::left a[STEPS];
  typename P::real unit[2];
  if (P::SPLIT && careful)
    left_of_blocks<P, BLOCKS, P::SPLIT>(a, pairs, scale + 2 * (threadIdx.x & 3), unit);
  else
    left_of_blocks<P, BLOCKS, false>(a, pairs, scale + 2 * (threadIdx.x & 3), unit);
  // Sums that are made side by side: a product waits for the one before it of the same sum, 30 cycles or so.
  constexpr int ABREAST = P::FRESH ? 4 : 8;
#pragma unroll
  for (int first = 0; first < SLICE / 8; first += ABREAST) {
    typename P::sum sum[ABREAST];
#pragma unroll
    for (int n = 0; n < ABREAST; n++) {
      clear_sum(sum[n]);
      if constexpr (!P::FRESH) {
#pragma unroll
        for (int i = 0; i < 4; i++) sum[n].d[i] = to[first + n][i];
      }
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      typename P::right b[ABREAST];
#pragma unroll
      for (int n = 0; n < ABREAST; n += 2) {
        typename P::right pair[2];
        P::template right_columns<ROW>(pair, tile, step * P::DEPTH, column + 8 * (first + n));
        b[n] = pair[0], b[n + 1] = pair[1];
      }
#pragma unroll
      for (int term = 0; term < P::TERMS; term++)
#pragma unroll
        for (int n = 0; n < ABREAST; n++) P::template multiply_term<false>(sum[n], a[step], b[n], term);
    }
#pragma unroll
    for (int n = 0; n < ABREAST; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        to[first + n][i] = P::FRESH ? to[first + n][i] + sum[n].value(i) * unit[i / 2] : sum[n].value(i);
  }
}

// What is not finite in a tile, given to the pairs that see it: to += pairs rows, for those elements of the rows marked
// in `bad`; their values are read again from where the tile came from. Bits 4 n + i of `visible` are pairs[n][i]'s.
template <class P, int BLOCKS, int SLICE>
static __device__ __forceinline__ void give_nonfinite(typename P::real (&to)[SLICE / 8][4],
                                                      const typename P::real (&pairs)[BLOCKS][4], uint32_t visible,
                                                      const uint32_t *bad, const tile_source &source, int64_t first,
                                                      int column) {
  typedef typename P::real Real;
  typedef typename P::element Element;
  const int lane = threadIdx.x & 31, t = lane & 3;
  for (int row = 0; row < 8 * BLOCKS; row++) {
    if (!(bad[row / 32] >> (row % 32) & 1)) continue;
    const int from = (lane & 28) | (row % 8 / 2);
    Real top = 0, bottom = 0;
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
      if (row / 8 != n) continue;
      top = row & 1 ? pairs[n][1] : pairs[n][0];
      bottom = row & 1 ? pairs[n][3] : pairs[n][2];
    }
    top = __shfl_sync(~0u, top, from);
    bottom = __shfl_sync(~0u, bottom, from);
    const uint32_t seen = __shfl_sync(~0u, visible, from) >> (row / 8 * 4 + row % 2);
    const Element *x = (const Element *)(source.data + (first + row) * source.stride);
#pragma unroll
    for (int n = 0; n < SLICE / 8; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int d = column + 8 * n + 2 * t + i;
        if ((d + 1) * (int)sizeof(Element) > source.bytes) continue;
        const Real value = real_of(x[d]);
        if (is_finite(value)) continue;
        if (seen & 1) to[n][i] += top * value;
        if (seen & 4) to[n][i + 2] += bottom * value;
      }
    }
  }
}

template <class Real, int SLICE>
static __device__ __forceinline__ bool all_finite(const Real (&x)[SLICE][4]) {
  bool finite = true;
#pragma unroll
  for (int n = 0; n < SLICE; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) finite = finite && is_finite(x[n][i]);
  return finite;
}

// Writes a warp's accumulators: rows `row` + g and + 8 of `count`, columns from `column` on.
template <class Element, class Real, int BLOCKS>
static __device__ __forceinline__ void write_rows(const sa_operand &to, int64_t batch, int64_t head, int64_t row,
                                                  int64_t count, int64_t width, int column, Real factor,
                                                  const Real (&x)[BLOCKS][4]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t at = row + g + 8 * half;
    if (at >= count) continue;
    Element *line = (Element *)to.data + batch * to.stride[0] + head * to.stride[1] + at * to.stride[2];
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int d = column + 8 * n + 2 * t + i;
        if (d < width) put_real(line + d, x[n][2 * half + i] * factor);
      }
    }
  }
}

// Products in place become scores, with the options that act on them. Of an accumulator's 16 rows and 8 BLOCKS columns
// the lane's first element is (query, key), or with TRANSPOSED scores, whose rows are keys, (key, query). `slope`: the
// derivative of a softcap.
template <bool TRANSPOSED, class Real, int BLOCKS>
static __device__ __forceinline__ void make_scores(const score_rule<Real> &rule, Real (&c)[BLOCKS][4],
                                                   Real (&slope)[BLOCKS][4], int64_t query, int64_t key,
                                                   uint32_t &visible) {
  score_blocks<TRANSPOSED>(rule, c, query, key, false, visible, &slope);
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) slope[n][i] = 1 - slope[n][i] * slope[n][i];
}

// The bits of the pairs that dropout keeps, 4 n + i for element i of block n.
template <bool TRANSPOSED, int BLOCKS>
static __device__ __forceinline__ uint32_t kept_pairs(const dropout_rule &rule, int64_t query, int64_t key) {
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < BLOCKS; n++) {
    kept |= kept_block<TRANSPOSED>(rule, query + (TRANSPOSED ? 8 * n : 0), key + (TRANSPOSED ? 0 : 8 * n)) << (4 * n);
  }
  return kept;
}

template <class Real>
static __device__ __forceinline__ Real weight_of(Real score, Real base, Real unit, bool visible) {
  // A base of NaN must not reach a masked pair.
  return visible ? exp2_of((score - base) * unit) : 0;
}

// Products in place become weights. base_of and factor_of (n, i) are those of the query of element i of block n;
// factors are only looked at in `coarse` blocks. `full`: all pairs are visible.
template <bool GENERAL, bool TRANSPOSED, class Real, int BLOCKS, class Base, class Factor>
static __device__ __forceinline__ void make_weights(const score_rule<Real> &rule, Real (&c)[BLOCKS][4],
                                                    Real (&slope)[GENERAL ? BLOCKS : 1][4], int64_t query, int64_t key,
                                                    uint32_t &visible, bool full, bool coarse, const Base &base_of,
                                                    const Factor &factor_of) {
  if constexpr (GENERAL) {
    make_scores<TRANSPOSED>(rule, c, slope, query, key, visible);
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) c[n][i] = weight_of(c[n][i], base_of(n, i), rule.unit, visible >> (4 * n + i) & 1);
  } else {
    // One multiply-add, as in the forward.
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const Real weight = exp2_of(c[n][i] * rule.factor - base_of(n, i));
        c[n][i] = full || visible >> (4 * n + i) & 1 ? weight : 0;
      }
  }
  if (!coarse) return;
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) c[n][i] = visible >> (4 * n + i) & 1 ? c[n][i] * factor_of(n, i) : 0;
}

// dP in place becomes dS = P (dP - delta), 0 for masked pairs, with dropout's part in dP.
template <bool GENERAL, class Real, int BLOCKS, class Delta>
static __device__ __forceinline__ void differentiate_weights(const Real (&weights)[BLOCKS][4], Real (&ds)[BLOCKS][4],
                                                             uint32_t visible, bool full, uint32_t kept, Real more,
                                                             const Delta &delta_of) {
  if (!GENERAL && full) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) ds[n][i] = weights[n][i] * (ds[n][i] - delta_of(n, i));
    return;
  }
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const Real dweight = !GENERAL ? ds[n][i] : kept >> (4 * n + i) & 1 ? ds[n][i] * more : 0;
      ds[n][i] = visible >> (4 * n + i) & 1 ? weights[n][i] * (dweight - delta_of(n, i)) : 0;
    }
}

/*  Keys  */

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
    SCALES_AT = BAD_AT + 4 * (STEP / 32 + 1) * 2,
    BYTES = SCALES_AT + (P::SPLIT ? 2 * (OWN + STEP) * 4 : 0)
  };
};

// What a block of keys does next: queries of one head.
typedef struct key_step {
  int64_t head, first;
  int pattern, offset;
} key_step;

// dK and dV of 16 WARPS keys of a key head, SLICE columns of it; from STEP queries at a time.
template <class P, int ROW, int WARPS, int STEP, int STAGES, int SLICE, bool GENERAL>
static __global__ void __launch_bounds__(32 * WARPS)
    backward_keys(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                  const __grid_constant__ backward_rows<typename P::real> rows,
                  const __grid_constant__ backward_aligned aligned) {
  typedef typename P::real Real;
  typedef typename P::element Element;
  typedef key_room<P, ROW, WARPS, STEP, STAGES> room;
  constexpr int THREADS = 32 * WARPS, OWN = 16 * WARPS, BLOCKS = STEP / 8, EACH = sizeof(Element),
                SLICES = ROW / EACH / SLICE;
  char *const shared = dynamic_shared<char>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, t = lane & 3;

  const int64_t parts = SA_TILE / OWN, blocks = plan.col_tiles * parts;
  const int column = (int)(blockIdx.x % SLICES) * SLICE;
  const int64_t item = blockIdx.x / SLICES, place = item % blocks, batch = item / blocks / p.key_heads,
                key_head = item / blocks % p.key_heads, group = p.heads / p.key_heads;
  int64_t col_tile = place / parts;
  if (group) col_tile = plan.col_order[sa_device_plane(plan, batch, key_head * group) * plan.col_tiles + col_tile];
  const int64_t first_key = col_tile * SA_TILE + place % parts * OWN;
  if (first_key >= p.keys) return;

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

  const auto load = [&](const key_step &step, char *stage) {
    load_tile<Element, ROW, STEP, THREADS>(stage, query_source(step.head), step.first, thread);
    load_tile<Element, ROW, STEP, THREADS>(stage + room::STEP_TILE, dout_source(step.head), step.first, thread);
    constexpr int CHUNKS = STEP * (int)sizeof(Real) / 16;
    const int64_t at = (batch * p.heads + step.head) * rows.padded + step.first;
    for (int k = thread; k < 3 * CHUNKS; k += THREADS) {
      const Real *from = k < CHUNKS ? rows.base : k < 2 * CHUNKS ? rows.factor : rows.delta;
      copy_async(shared_address(stage + 2 * room::STEP_TILE + k * 16), (const char *)(from + at) + k % CHUNKS * 16, 16);
    }
  };

  Real dk[SLICE / 8][4], dv[SLICE / 8][4];

  const auto compute = [&](const key_step &step, char *stage, bool careful) {
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
    const bool idle = step.pattern != SA_FULL && !__any_sync(~0u, visible != 0);
    Real weights[BLOCKS][4], ds[BLOCKS][4];
    if (!idle) {
      const score_rule<Real> rule = score_rule_of<Real>(p, batch, step.head);
      Real slope[GENERAL ? BLOCKS : 1][4];
      multiply_rows<P, ROW, BLOCKS, true>(weights, keys, key_scale, warp * 16, queries, query_scale);
      const bool full = step.pattern == SA_FULL;
      make_weights<GENERAL, true>(
          rule, weights, slope, query, key, visible, full, coarse, [&](int n, int i) { return base[8 * n + i % 2]; },
          [&](int n, int i) { return factor[8 * n + i % 2]; });
      uint32_t kept = ~0u;
      if (GENERAL && p.dropout > 0) kept = kept_pairs<true, BLOCKS>(dropout_rule_of(p, batch, step.head), query, key);
      multiply_rows<P, ROW, BLOCKS, true>(ds, values, value_scale, warp * 16, douts, dout_scale);
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
    if (careful) {
      __syncthreads();
      if (thread < 2 * (STEP / 32 + 1)) bad_query[thread] = 0;
      __syncthreads();
      make_finite<typename P::stored, ROW, STEP, THREADS>(queries, bad_query, thread);
      make_finite<typename P::stored, ROW, STEP, THREADS>(douts, bad_dout, thread);
      __syncthreads();
    }
    if (idle) return;
    // Before the rest, so that the pairs need not be kept in registers.
    if (careful) {
      give_nonfinite<P, BLOCKS, SLICE>(dv, weights, visible, bad_dout, dout_source(step.head), step.first, column);
      give_nonfinite<P, BLOCKS, SLICE>(dk, ds, visible, bad_query, query_source(step.head), step.first, column);
    }
    multiply_columns<P, ROW, BLOCKS, SLICE>(dv, weights, douts, dout_scale, column, careful);
    multiply_columns<P, ROW, BLOCKS, SLICE>(dk, ds, queries, query_scale, column, careful);
  };

  for (bool careful = false;; careful = true) {
    memset(dk, 0, sizeof dk);
    memset(dv, 0, sizeof dv);
    bool masked = bias;
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
    if (more_steps) load(now, shared + room::STAGES_AT);
    copy_async_commit();
    if constexpr (P::SPLIT) {
      copy_async_wait<0>();
      __syncthreads();
      split_tile<P, ROW, OWN, THREADS>(keys, key_scale, careful, thread);
      split_tile<P, ROW, OWN, THREADS>(values, value_scale, careful, thread);
    }
    while (more_steps) {
      const bool again = advance(later);
      char *const here = shared + room::STAGES_AT + stage * room::STAGE;
      if (STAGES == 2) {
        if (again) load(later, shared + room::STAGES_AT + (stage ^ 1) * room::STAGE);
        copy_async_commit();
      }
      copy_async_wait<STAGES - 1>();
      __syncthreads();
      if constexpr (P::SPLIT) {
        split_tile<P, ROW, STEP, THREADS>(here, query_scale, careful, thread);
        split_tile<P, ROW, STEP, THREADS>(here + room::STEP_TILE, dout_scale, careful, thread);
        __syncthreads();
      }
      masked = masked || now.pattern != SA_FULL;
      compute(now, here, careful);
      __syncthreads();
      if (STAGES == 1) {
        if (again) load(later, here);
        copy_async_commit();
      } else {
        stage ^= 1;
      }
      now = later;
      more_steps = again;
    }
    copy_async_wait<0>();
    if (careful || !(masked || P::SPLIT) || !__syncthreads_or(!all_finite(dk) || !all_finite(dv))) break;
  }
  const int64_t row = first_key + warp * 16;
  if (p.dk.data) write_rows<Element>(p.dk, batch, key_head, row, p.keys, p.width, column, (Real)p.scale, dk);
  if (p.dv.data) write_rows<Element>(p.dv, batch, key_head, row, p.keys, p.value_width, column, (Real)1, dv);
}

/*  Queries  */

template <class P, int ROW, int WARPS, int STEP, int STAGES>
struct query_room {
  enum {
    OWN_TILE = 16 * WARPS * ROW,
    STEP_TILE = STEP * ROW,
    STAGES_AT = 2 * OWN_TILE,
    STAGE = 2 * STEP_TILE,
    BAD_AT = STAGES_AT + STAGES * STAGE,
    // Scales of the rows of Q, dO, K and V.
    SCALES_AT = BAD_AT + 4 * (STEP / 32 + 1),
    BYTES = SCALES_AT + (P::SPLIT ? 2 * (16 * WARPS + STEP) * 4 : 0)
  };
};

// Where a block of queries is, and what its lanes see.
template <int WARPS>
struct query_block {
  const sa_device_plan *plan;
  int64_t batch, head, first, row_tile;

  // Block `place` of a head, those with the most to do first.
  __device__ __forceinline__ void find(const sa_device_plan &p, int64_t b, int64_t h, int64_t place) {
    constexpr int PARTS = SA_TILE / (16 * WARPS);
    plan = &p;
    batch = b;
    head = h;
    row_tile = p.row_order[sa_device_plane(p, b, h) * p.row_tiles + place / PARTS];
    first = row_tile * SA_TILE + place % PARTS * (16 * WARPS);
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
    for (int k = 0; k < WARPS; k++) seen |= bits[k * 32].x | bits[k * 32].y;
    return __any_sync(~0u, (seen >> (offset / 4) & ((1u << (STEP / 4)) - 1)) != 0) != 0;
  }

  // The bits of the lane's pairs of a step, 4 n + i for element i of block n.
  template <int BLOCKS>
  __device__ __forceinline__ uint32_t visible(int pattern, int offset) const {
    if (pattern == SA_FULL) return BLOCKS < 8 ? (1u << (4 * BLOCKS & 31)) - 1 : ~0u;
    const uint2 bits =
        plan->row_bits[(int64_t)pattern * 256 + (first % SA_TILE / 16 + threadIdx.x / 32) * 32 + (threadIdx.x & 31)];
    uint32_t seen = 0;
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
      const int shift = offset / 4 + 2 * n;
      seen |= ((bits.x >> shift & 3) | (bits.y >> shift & 3) << 2) << (4 * n);
    }
    return seen;
  }
};

// Of a lane's two queries, g and g + 8 of its warp's.
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

// dS of one step into `ds`: its products from the rows of Q and dO at `own`, and of K and V at `keys` and `values`.
template <class P, int ROW, int BLOCKS, bool GENERAL>
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
  multiply_rows<P, ROW, BLOCKS, false>(s, queries, scales.query, row, keys, scales.key);
  make_weights<GENERAL, false>(
      rule, s, slope, query, key, visible, full, rows.coarse, [&](int, int i) { return rows.base[i / 2]; },
      [&](int, int i) { return rows.factor[i / 2]; });
  uint32_t kept = ~0u;
  Real more = 1;
  if (GENERAL && p.dropout > 0) {
    kept = kept_pairs<false, BLOCKS>(dropout_rule_of(p, batch, head), query, key);
    more = (Real)(1 / (1 - p.dropout));
  }
  multiply_rows<P, ROW, BLOCKS, false>(ds, douts, scales.dout, row, values, scales.value);
  differentiate_weights<GENERAL>(s, ds, visible, full, kept, more, [&](int, int i) { return rows.delta[i / 2]; });
}

// dQ of 16 WARPS queries of a head, SLICE columns of it, and their shares of dAlibi; from STEP keys at a time.
template <class P, int ROW, int WARPS, int STEP, int STAGES, int SLICE, bool GENERAL>
static __global__ void __launch_bounds__(32 * WARPS)
    backward_queries(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                     const __grid_constant__ backward_rows<typename P::real> rows,
                     const __grid_constant__ backward_aligned aligned) {
  typedef typename P::real Real;
  typedef typename P::element Element;
  typedef query_room<P, ROW, WARPS, STEP, STAGES> room;
  constexpr int THREADS = 32 * WARPS, OWN = 16 * WARPS, BLOCKS = STEP / 8, EACH = sizeof(Element),
                SLICES = ROW / EACH / SLICE;
  char *const shared = dynamic_shared<char>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, t = lane & 3;

  const int64_t blocks = (int64_t)plan.row_tiles * (SA_TILE / OWN), item = blockIdx.x / SLICES, head = item / blocks;
  const int column = (int)(blockIdx.x % SLICES) * SLICE;
  query_block<WARPS> block;
  block.find(plan, head / p.heads, head % p.heads, item % blocks);
  if (block.first >= p.queries) return;
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
    load_tile<Element, ROW, STEP, THREADS>(stage, key_source, first, thread);
    load_tile<Element, ROW, STEP, THREADS>(stage + room::STEP_TILE, value_source, first, thread);
  };

  Real dq[SLICE / 8][4];
  double slope_share[2] = {0, 0};
  const auto compute = [&](int64_t first, int pattern, int offset, char *keys, bool careful) {
    uint32_t visible = block.template visible<BLOCKS>(pattern, offset);
    const bool idle = pattern != SA_FULL && !__any_sync(~0u, visible != 0);
    Real ds[BLOCKS][4];
    if (!idle) {
      Real slope[GENERAL ? BLOCKS : 1][4];
      const int64_t key = first + 2 * t;
      differentiate_step<P, ROW, BLOCKS, GENERAL>(p, rule, mine, queries, douts, keys, keys + room::STEP_TILE, scales,
                                                  block.batch, block.head, query, key, pattern == SA_FULL, visible, ds,
                                                  slope);
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
    if (careful) {
      __syncthreads();
      if (thread < STEP / 32 + 1) bad[thread] = 0;
      __syncthreads();
      make_finite<typename P::stored, ROW, STEP, THREADS>(keys, bad, thread);
      __syncthreads();
    }
    if (idle) return;
    if (careful) give_nonfinite<P, BLOCKS, SLICE>(dq, ds, visible, bad, key_source, first, column);
    multiply_columns<P, ROW, BLOCKS, SLICE>(dq, ds, keys, scales.key, column, careful);
  };

  for (bool careful = false;; careful = true) {
    memset(dq, 0, sizeof dq);
    slope_share[0] = slope_share[1] = 0;
    bool masked = p.bias.data != NULL;
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
      split_tile<P, ROW, OWN, THREADS>(queries, scales.query, careful, thread);
      split_tile<P, ROW, OWN, THREADS>(douts, scales.dout, careful, thread);
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
      if constexpr (P::SPLIT) {
        split_tile<P, ROW, STEP, THREADS>(here, scales.key, careful, thread);
        split_tile<P, ROW, STEP, THREADS>(here + room::STEP_TILE, scales.value, careful, thread);
        __syncthreads();
      }
      masked = masked || pattern != SA_FULL;
      compute(now, pattern, offset, here, careful);
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
    if (careful || !(masked || P::SPLIT) || !__syncthreads_or(!all_finite(dq))) break;
  }
  if (p.dq.data)
    write_rows<Element>(p.dq, block.batch, block.head, block.first + warp * 16, p.queries, p.width, column,
                        (Real)p.scale, dq);
  if constexpr (GENERAL) {
    if (!rows.slope_share || column) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      double share = slope_share[half];
      share += __shfl_xor_sync(~0u, share, 1);
      share += __shfl_xor_sync(~0u, share, 2);
      if (t == 0) rows.slope_share[head * rows.padded + query + 8 * half] = (Real)share;
    }
  }
}

// Bases of blocks in which some LSE is too coarse: peaks and sums of their rows, as the forward found them.
template <class P, int ROW, int WARPS, int STEP>
static __global__ void __launch_bounds__(32 * WARPS)
    backward_bases(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                   const __grid_constant__ backward_rows<typename P::real> rows,
                   const __grid_constant__ backward_aligned aligned) {
  typedef typename P::real Real;
  typedef typename P::element Element;
  constexpr int THREADS = 32 * WARPS, OWN = 16 * WARPS, BLOCKS = STEP / 8, EACH = sizeof(Element);
  char *const shared = dynamic_shared<char>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int64_t blocks = (int64_t)plan.row_tiles * (SA_TILE / OWN), head = blockIdx.x / blocks;
  query_block<WARPS> block;
  block.find(plan, head / p.heads, head % p.heads, blockIdx.x % blocks);
  if (block.first >= p.queries || !rows.coarse[(head * rows.padded + block.first) / BACKWARD_BLOCK]) return;
  const int64_t key_head = block.head / (p.heads / p.key_heads), query = block.first + warp * 16 + g;
  char *const queries = shared, *const keys = shared + OWN * ROW;
  float *const query_scale = (float *)(keys + STEP * ROW), *const key_scale = query_scale + OWN;
  const tile_source query_source = tile_source_of(p.q, EACH, block.batch, block.head, p.queries, p.width, aligned.q),
                    key_source = tile_source_of(p.k, EACH, block.batch, key_head, p.keys, p.width, aligned.k);
  load_tile<Element, ROW, OWN, THREADS>(queries, query_source, block.first, thread);
  if constexpr (P::SPLIT) {
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    split_tile<P, ROW, OWN, THREADS>(queries, query_scale, true, thread);
  }
  const score_rule<Real> rule = score_rule_of<Real>(p, block.batch, block.head);
  const auto some = [&](int pattern, int offset) { return block.template some<STEP>(pattern, offset); };

  Real peak[2] = {-(Real)INFINITY, -(Real)INFINITY}, sum[2] = {0, 0};
  step_walk walk = block.walk();
  int64_t first;
  int pattern, offset;
  while (next_step<STEP>(walk, p.keys, some, first, pattern, offset)) {
    __syncthreads();
    load_tile<Element, ROW, STEP, THREADS>(keys, key_source, first, thread);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if constexpr (P::SPLIT) {
      split_tile<P, ROW, STEP, THREADS>(keys, key_scale, true, thread);
      __syncthreads();
    }
    uint32_t visible = block.template visible<BLOCKS>(pattern, offset);
    Real s[BLOCKS][4], slope[BLOCKS][4];
    multiply_rows<P, ROW, BLOCKS, false>(s, queries, query_scale, warp * 16, keys, key_scale);
    make_scores<false>(rule, s, slope, query, first + 2 * t, visible);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Real top = peak[half], more = 0;
#pragma unroll
      for (int n = 0; n < BLOCKS; n++) top = fmax(top, fmax(s[n][2 * half], s[n][2 * half + 1]));
      top = fmax(top, __shfl_xor_sync(~0u, top, 1));
      top = fmax(top, __shfl_xor_sync(~0u, top, 2));
      const Real base = top == -(Real)INFINITY ? 0 : top;
#pragma unroll
      for (int n = 0; n < BLOCKS; n++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          more += weight_of(s[n][2 * half + i], base, rule.unit, visible >> (4 * n + 2 * half + i) & 1);
      sum[half] = sum[half] * exp2_of((peak[half] - base) * rule.unit) + more;
      peak[half] = top;
    }
  }
  copy_async_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    double total = sum[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const int64_t at = head * rows.padded + query + 8 * half;
    // Rows without a key keep their base.
    if (t || query + 8 * half >= p.queries || rows.base[at] == (Real)INFINITY) continue;
    // In natural units, in which a sink near the dtype's largest number does not overflow.
    const double natural = plain_scores(p) ? 0.6931471805599453 : 1;
    double top = peak[half] * natural, base = peak[half], own = 0, sink = -INFINITY;
    if (p.sinks.data) {
      sink = (Real)read_operand(p.sinks, block.head * p.sinks.stride[1]);
      if (sink > top || sink != sink) {
        top = sink;
        base = sink / natural;
      }
      own = exp(sink - top);
      total = total * exp(peak[half] * natural - top) + own;
    }
    // Visible scores that are all -inf leave a sum of 0: 0/0 is the NaN that the definition gives.
    rows.base[at] = total > 0 ? (Real)base : (Real)NAN;
    rows.factor[at] = (Real)(1 / total);
    if (rows.sink_share) rows.sink_share[at] = sink == -INFINITY ? 0 : (Real)(own / total * -rows.delta[at]);
  }
}

/*  The bias  */

// What the blocks of dBias are: tiles of the bias, each a sum over the dims that it is broadcast along. `parts` blocks
// share such a sum; each writes what it found to parts[part][bias], or to dBias when it is alone.
template <class Real>
struct bias_sums {
  int64_t size[4];   // batches, heads, blocks of queries, steps of keys
  int64_t tiles[4];  // the same of the bias: 1 where it is broadcast
  int64_t parts;
  int64_t count;  // elements of the bias
  Real *sums;     // NULL: dBias itself
};

template <class P, int ROW, int WARPS, int STEP>
static __global__ void __launch_bounds__(32 * WARPS)
    backward_bias(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                  const __grid_constant__ backward_rows<typename P::real> rows,
                  const __grid_constant__ backward_aligned aligned,
                  const __grid_constant__ bias_sums<typename P::real> sums) {
  typedef typename P::real Real;
  typedef typename P::element Element;
  typedef query_room<P, ROW, WARPS, STEP, 1> room;
  constexpr int THREADS = 32 * WARPS, OWN = 16 * WARPS, BLOCKS = STEP / 8, EACH = sizeof(Element);
  static_assert(OWN * STEP * sizeof(Real) <= room::STAGES_AT, "a tile of dS lies where Q and dO were");
  char *const shared = dynamic_shared<char>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, t = lane & 3;
  char *const queries = shared, *const douts = shared + room::OWN_TILE, *const keys = shared + room::STAGES_AT,
              *const values = keys + room::STEP_TILE;
  const query_scales scales(shared + room::SCALES_AT, OWN, STEP);

  int64_t rest = blockIdx.x, at[4];
  const int64_t part = rest % sums.parts;
  rest /= sums.parts;
  for (int d = 3; d >= 0; d--) {
    at[d] = rest % sums.tiles[d];
    rest /= sums.tiles[d];
  }
  int64_t loop[4], turns = 1;
  for (int d = 0; d < 4; d++) turns *= loop[d] = sums.size[d] / sums.tiles[d];

  Real total[BLOCKS][4];
  memset(total, 0, sizeof total);
  for (int64_t turn = turns * part / sums.parts; turn < turns * (part + 1) / sums.parts; turn++) {
    int64_t index[4], left = turn;
    for (int d = 3; d >= 0; d--) {
      index[d] = at[d] + left % loop[d];
      left /= loop[d];
    }
    const int64_t batch = index[0], head = index[1], first_query = index[2] * OWN, first_key = index[3] * STEP;
    const int64_t row_tile = first_query / SA_TILE, col_tile = first_key / SA_TILE,
                  *start = plan.row_start + sa_device_plane(plan, batch, head) * plan.row_tiles + row_tile;
    int64_t run = start[0];
    while (run < start[1] &&
           !(plan.row_runs[run].first <= col_tile && col_tile < plan.row_runs[run].first + plan.row_runs[run].count))
      run++;
    if (run == start[1]) continue;
    query_block<WARPS> block = {&plan, batch, head, first_query, row_tile};
    const int pattern = plan.row_runs[run].pattern, offset = (int)(first_key % SA_TILE);
    if (pattern != SA_FULL && !block.template some<STEP>(pattern, offset)) continue;

    const int64_t key_head = head / (p.heads / p.key_heads);
    tile_source dout_source = tile_source_of(p.dout, EACH, batch, head, p.queries, p.value_width, aligned.dout);
    if (!p.dout.data) dout_source.rows = 0;
    __syncthreads();
    load_tile<Element, ROW, OWN, THREADS>(
        queries, tile_source_of(p.q, EACH, batch, head, p.queries, p.width, aligned.q), first_query, thread);
    load_tile<Element, ROW, OWN, THREADS>(douts, dout_source, first_query, thread);
    load_tile<Element, ROW, STEP, THREADS>(keys, tile_source_of(p.k, EACH, batch, key_head, p.keys, p.width, aligned.k),
                                           first_key, thread);
    load_tile<Element, ROW, STEP, THREADS>(
        values, tile_source_of(p.v, EACH, batch, key_head, p.keys, p.value_width, aligned.v), first_key, thread);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if constexpr (P::SPLIT) {
      split_tile<P, ROW, OWN, THREADS>(queries, scales.query, true, thread);
      split_tile<P, ROW, OWN, THREADS>(douts, scales.dout, true, thread);
      split_tile<P, ROW, STEP, THREADS>(keys, scales.key, true, thread);
      split_tile<P, ROW, STEP, THREADS>(values, scales.value, true, thread);
      __syncthreads();
    }
    const int64_t query = first_query + warp * 16 + g, key = first_key + 2 * t;
    lane_rows<Real> mine;
    mine.read(rows, (batch * p.heads + head) * rows.padded + query);
    uint32_t visible = block.template visible<BLOCKS>(pattern, offset);
    Real ds[BLOCKS][4], slope[BLOCKS][4];
    differentiate_step<P, ROW, BLOCKS, true>(p, score_rule_of<Real>(p, batch, head), mine, queries, douts, keys, values,
                                             scales, batch, head, query, key, false, visible, ds, slope);
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) total[n][i] += ds[n][i];
  }

  // Through shared memory, where sums over queries and keys are made in order.
  Real *const tile = (Real *)shared;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) tile[(warp * 16 + g + i / 2 * 8) * STEP + 8 * n + 2 * t + i % 2] = total[n][i];
  __syncthreads();
  const int64_t *shape = p.bias_shape, first_row = at[2] * OWN, first_column = at[3] * STEP;
  const int over_rows = shape[2] == 1 ? OWN : 1, over_columns = shape[3] == 1 ? STEP : 1;
  for (int k = thread; k < OWN / over_rows * (STEP / over_columns); k += THREADS) {
    const int row = k / (STEP / over_columns), column = k % (STEP / over_columns);
    if (first_row + row >= shape[2] || first_column + column >= shape[3]) continue;
    Real sum = 0;
    for (int i = 0; i < over_rows; i++)
      for (int j = 0; j < over_columns; j++) sum += tile[(row + i) * STEP + column + j];
    if (sums.sums) {
      const int64_t element =
          ((at[0] * shape[1] + at[1]) * shape[2] + first_row + row) * shape[3] + first_column + column;
      sums.sums[part * sums.count + element] = sum;
    } else {
      write_operand(p.dbias,
                    at[0] * p.dbias.stride[0] + at[1] * p.dbias.stride[1] + (first_row + row) * p.dbias.stride[2] +
                        (first_column + column) * p.dbias.stride[3],
                    (double)sum);
    }
  }
}

/*  Launches  */

static const char backward_name[] = "sa_backward";

// What a launch knows.
typedef struct backward_job {
  sa_problem p;
  sa_device_plan plan;
  backward_aligned aligned;
  cudaStream_t stream;
} backward_job;

static inline int backward_grid(int64_t blocks, unsigned *grid) {
  *grid = (unsigned)blocks;
  if (blocks <= INT_MAX) return SA_OK;
  return sa_cuda_host->fail(SA_UNSUPPORTED, backward_name, "q: has too many heads, queries and keys");
}

// The shapes of the kernels of one dtype and width. KEY_ and QUERY_STEP are what one step takes of the other side.
template <class Products, int WIDTH_, int KEY_WARPS_, int KEY_STEP_, int KEY_STAGES_, int QUERY_WARPS_, int QUERY_STEP_,
          int QUERY_STAGES_, int KEY_SLICE_, int QUERY_SLICE_>
struct backward_shape {
  typedef Products products;
  static constexpr int ROW = WIDTH_ * (int)sizeof(typename Products::element);
  static constexpr int KEY_WARPS = KEY_WARPS_, KEY_STEP = KEY_STEP_, KEY_STAGES = KEY_STAGES_,
                       QUERY_WARPS = QUERY_WARPS_, QUERY_STEP = QUERY_STEP_, QUERY_STAGES = QUERY_STAGES_;
  // Columns of gradients that a block has in its registers; blocks share the width when they are fewer.
  static constexpr int KEY_SLICE = KEY_SLICE_, QUERY_SLICE = QUERY_SLICE_;
  static constexpr int KEY_SLICES = WIDTH_ / KEY_SLICE, QUERY_SLICES = WIDTH_ / QUERY_SLICE;
};

template <class C, bool GENERAL>
static int launch_keys(const backward_job &job, const backward_rows<typename C::products::real> &rows) {
  typedef key_room<typename C::products, C::ROW, C::KEY_WARPS, C::KEY_STEP, C::KEY_STAGES> room;
  unsigned grid;
  const int64_t blocks =
      job.p.batch * job.p.key_heads * job.plan.col_tiles * (SA_TILE / (16 * C::KEY_WARPS)) * C::KEY_SLICES;
  const int status = backward_grid(blocks, &grid);
  if (status || !grid) return status;
  return sa_cuda_launch(
      backward_name,
      backward_keys<typename C::products, C::ROW, C::KEY_WARPS, C::KEY_STEP, C::KEY_STAGES, C::KEY_SLICE, GENERAL>,
      dim3(grid), dim3(32 * C::KEY_WARPS), room::BYTES, job.stream, job.p, job.plan, rows, job.aligned);
}

template <class C, bool GENERAL>
static int launch_queries(const backward_job &job, const backward_rows<typename C::products::real> &rows) {
  typedef query_room<typename C::products, C::ROW, C::QUERY_WARPS, C::QUERY_STEP, C::QUERY_STAGES> room;
  unsigned grid;
  const int64_t blocks =
      job.p.batch * job.p.heads * job.plan.row_tiles * (SA_TILE / (16 * C::QUERY_WARPS)) * C::QUERY_SLICES;
  const int status = backward_grid(blocks, &grid);
  if (status || !grid) return status;
  return sa_cuda_launch(backward_name,
                        backward_queries<typename C::products, C::ROW, C::QUERY_WARPS, C::QUERY_STEP, C::QUERY_STAGES,
                                         C::QUERY_SLICE, GENERAL>,
                        dim3(grid), dim3(32 * C::QUERY_WARPS), room::BYTES, job.stream, job.p, job.plan, rows,
                        job.aligned);
}

template <class C>
static int launch_bases(const backward_job &job, const backward_rows<typename C::products::real> &rows) {
  unsigned grid;
  const int status =
      backward_grid(job.p.batch * job.p.heads * job.plan.row_tiles * (SA_TILE / (16 * C::QUERY_WARPS)), &grid);
  if (status || !grid) return status;
  return sa_cuda_launch(backward_name, backward_bases<typename C::products, C::ROW, C::QUERY_WARPS, C::QUERY_STEP>,
                        dim3(grid), dim3(32 * C::QUERY_WARPS), (16 * C::QUERY_WARPS + C::QUERY_STEP) * (C::ROW + 4),
                        job.stream, job.p, job.plan, rows, job.aligned);
}

// Of portable_backward.cu: dBias as the sum of its parts.
int sa_cuda_sum_bias_parts(const backward_job &job, int64_t parts, int64_t count, const void *sums);

template <class C>
static int launch_bias(const backward_job &job, const backward_rows<typename C::products::real> &rows) {
  typedef typename C::products::real Real;
  typedef query_room<typename C::products, C::ROW, C::QUERY_WARPS, C::QUERY_STEP, 1> room;
  const sa_problem &p = job.p;
  bias_sums<Real> sums = {};
  const int64_t tile[4] = {1, 1, 16 * C::QUERY_WARPS, C::QUERY_STEP}, size[4] = {p.batch, p.heads, p.queries, p.keys};
  int64_t tiles = 1, turns = 1;
  sums.count = 1;
  for (int d = 0; d < 4; d++) {
    sums.size[d] = (size[d] + tile[d] - 1) / tile[d];
    sums.tiles[d] = (p.bias_shape[d] + tile[d] - 1) / tile[d];
    sums.count *= p.bias_shape[d];
    tiles *= sums.tiles[d];
    turns *= sums.tiles[d] ? sums.size[d] / sums.tiles[d] : 0;
  }
  if (!sums.count) return SA_OK;
  // Parts keep all multiprocessors busy when the bias has few tiles; what they find takes at most 64 MiB.
  const int64_t busy = 4 * sa_cuda_properties_of(p.device)->processors, room_for = (64 << 20) / (sums.count * 8);
  sums.parts = busy / tiles;
  if (sums.parts > turns) sums.parts = turns;
  if (sums.parts > room_for) sums.parts = room_for;
  if (sums.parts < 1) sums.parts = 1;
  if (sums.parts > 1) {
    sums.sums = (Real *)sa_cuda_scratch(backward_name, p.device, sums.parts * sums.count * (int64_t)sizeof(Real));
    if (!sums.sums) return SA_NO_MEMORY;
  }
  unsigned grid;
  int status = backward_grid(tiles * sums.parts, &grid);
  if (!status)
    status = sa_cuda_launch(backward_name, backward_bias<typename C::products, C::ROW, C::QUERY_WARPS, C::QUERY_STEP>,
                            dim3(grid), dim3(32 * C::QUERY_WARPS), room::BYTES, job.stream, job.p, job.plan, rows,
                            job.aligned, sums);
  if (!status && sums.sums) status = sa_cuda_sum_bias_parts(job, sums.parts, sums.count, sums.sums);
  if (sums.sums) sa_cuda_scratch_release(p.device, sums.sums);
  return status;
}

template <class C, bool GENERAL>
static int launch_gradients(const backward_job &job, const backward_rows<typename C::products::real> &rows) {
  const sa_problem &p = job.p;
  int status = SA_OK;
  if (p.dk.data || p.dv.data) status = launch_keys<C, GENERAL>(job, rows);
  if (!status && (p.dq.data || rows.slope_share)) status = launch_queries<C, GENERAL>(job, rows);
  return status;
}

// PLAIN serves what has no option that acts on scores or weights, unless it is void: then GENERAL does.
template <class PLAIN, class GENERAL>
static int launch_backward(const backward_job &job, const backward_rows<typename GENERAL::products::real> &rows) {
  int status = launch_bases<GENERAL>(job, rows);
  if (status) return status;
  if constexpr (!std::is_void<PLAIN>::value) {
    if (plain_scores(job.p) && !(job.p.dropout > 0)) return launch_gradients<PLAIN, false>(job, rows);
  }
  status = launch_gradients<GENERAL, true>(job, rows);
  if (!status && job.p.dbias.data) status = launch_bias<GENERAL>(job, rows);
  return status;
}

// Of portable_backward_<dtype>_<width>.cu: the kernels of one dtype, for widths up to that.
int sa_cuda_backward_bf16_64(const backward_job &job, const backward_rows<float> &rows);
int sa_cuda_backward_bf16_128(const backward_job &job, const backward_rows<float> &rows);
int sa_cuda_backward_bf16_256(const backward_job &job, const backward_rows<float> &rows);
int sa_cuda_backward_f16_64(const backward_job &job, const backward_rows<float> &rows);
int sa_cuda_backward_f16_128(const backward_job &job, const backward_rows<float> &rows);
int sa_cuda_backward_f16_256(const backward_job &job, const backward_rows<float> &rows);
int sa_cuda_backward_f32_64(const backward_job &job, const backward_rows<float> &rows);
int sa_cuda_backward_f32_128(const backward_job &job, const backward_rows<float> &rows);
int sa_cuda_backward_f32_256(const backward_job &job, const backward_rows<float> &rows);
int sa_cuda_backward_f64_64(const backward_job &job, const backward_rows<double> &rows);
int sa_cuda_backward_f64_128(const backward_job &job, const backward_rows<double> &rows);
int sa_cuda_backward_f64_256(const backward_job &job, const backward_rows<double> &rows);

#endif
