// the forward pass on mma.sync: one kernel for every dtype, width and option; portable_forward_*.cu choose its shapes
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_CUH
#include <limits.h>

#include "kernels/cuda/portable_tile.cuh"

// What a launch knows. An item is a block of queries of one head (of one key head, when packed).
typedef struct forward_job {
  sa_problem p;
  sa_device_plan plan;
  tile_source q, k, v;  // of the first head
  bool out_aligned;
  int64_t group;        // query heads that share a key head
  int64_t items;        // of all
  int64_t swath;        // heads whose blocks run together, since their keys and values fit the second-level cache
  int64_t blocks;       // of queries, per head
  int32_t parts;        // the keys are split into
  int32_t value_parts;  // the columns of v are split into
  // What the parts gathered, [item * parts + part][query of the block]; NULL when the keys are not split.
  void *part_out, *part_peak, *part_sum;
  uint8_t *part_alive;
} forward_job;

// FOLD times 16 queries a warp, KEYS keys a step. With one STAGE of shared memory keys are loaded while values are
// multiplied, and the other way round; with two, both are loaded a step ahead. PACKED: the queries of all heads that
// share a key head are the rows of a block, which reads keys and values once for all of them.
template <class Products, int WIDTH_, int VALUE_WIDTH_, int FOLD_, int WARPS_, int KEYS_, int STAGES_, int RESIDENT_,
          bool EXTRAS_, bool PACKED_>
struct forward_shape {
  typedef Products products;
  typedef typename Products::element element;
  typedef typename Products::real real;
  static constexpr int WIDTH = WIDTH_, VALUE_WIDTH = VALUE_WIDTH_, FOLD = FOLD_, WARPS = WARPS_, KEYS = KEYS_;
  static constexpr int STAGES = STAGES_;
  static constexpr int RESIDENT = RESIDENT_;  // blocks a multiprocessor
  static constexpr bool EXTRAS = EXTRAS_, PACKED = PACKED_;
  static constexpr int THREADS = 32 * WARPS, QUERIES = 16 * FOLD * WARPS;
  static constexpr int ROW = WIDTH * (int)sizeof(element), VALUE_ROW = VALUE_WIDTH * (int)sizeof(element);
  static constexpr int UNROLLED = WIDTH / Products::DEPTH < 8 ? WIDTH / Products::DEPTH : 8;
  // Blocks of scores that are summed side by side: as many as o leaves registers for.
  static constexpr int ABREAST = !Products::SPLIT || FOLD == 1           ? KEYS / 8
                                 : (VALUE_WIDTH > 64 ? 2 : 4) < KEYS / 8 ? (VALUE_WIDTH > 64 ? 2 : 4)
                                                                         : KEYS / 8;
  static constexpr int BLOCKS = KEYS / 8, STEPS = KEYS / Products::DEPTH, COLUMNS = VALUE_WIDTH / 8;
  static constexpr int KEY_TILE = QUERIES * ROW, VALUE_TILE = KEY_TILE + KEYS * ROW, STAGE = KEYS * (ROW + VALUE_ROW);
  static constexpr int BAD = KEY_TILE + STAGES * STAGE;
  // Scales of the rows of Q, of a step's keys and of its values.
  static constexpr int SCALES = BAD + 16, SHARED = SCALES + (Products::SPLIT ? (QUERIES + 2 * KEYS) * 4 : 0);
};

// One block's place.
typedef struct forward_block {
  int64_t item, batch, head, key_head, plane;
  int64_t query;       // the first; of the packed rows, when packed
  const sa_run *runs;  // of its row of tiles
  int first_tile, tiles;
  int part, value_part;
} forward_block;

// Item -> head and block of queries: swath by swath, the longest rows of tiles first, neighbouring heads together.
template <class C>
static __device__ __forceinline__ forward_block block_of_item(const forward_job &job, int64_t item) {
  const sa_problem &p = job.p;
  const int64_t heads = C::PACKED ? p.key_heads : p.heads, all = p.batch * heads;
  const int64_t swath = item / (job.swath * job.blocks), first = swath * job.swath;
  const int64_t here = all - first < job.swath ? all - first : job.swath, rest = item - first * job.blocks;
  const int64_t index = first + rest % here, rank = rest / here;
  forward_block block;
  block.item = item;
  block.batch = index / heads;
  if (C::PACKED) {
    block.key_head = index % heads;
    block.head = block.key_head * job.group;
  } else {
    block.head = index % heads;
    block.key_head = block.head / job.group;
  }
  block.plane = sa_device_plane(job.plan, block.batch, block.head);
  int64_t row = 0;
  if (C::PACKED) {
    block.query = rank * C::QUERIES;
  } else {
    enum { EACH = SA_TILE / C::QUERIES };
    row = job.plan.row_order[block.plane * job.plan.row_tiles + rank / EACH];
    block.query = row * SA_TILE + rank % EACH * C::QUERIES;
  }
  const int64_t *start = job.plan.row_start + block.plane * job.plan.row_tiles + row;
  block.runs = job.plan.row_runs + start[0];
  block.first_tile = 0;
  block.tiles = count_tiles(block.runs, start[1] - start[0]);
  block.part = block.value_part = 0;
  return block;
}

template <class C>
static __device__ __forceinline__ int64_t block_rows(const forward_job &job) {
  return C::PACKED ? job.group * job.p.queries : job.p.queries;
}

// Row of the block -> head and query.
template <class C>
static __device__ __forceinline__ void place_row(const forward_job &job, const forward_block &block, int row,
                                                 int64_t &head, int64_t &query) {
  const int64_t at = block.query + row;
  head = C::PACKED ? block.head + at / job.p.queries : block.head;
  query = C::PACKED ? at % job.p.queries : at;
}

// The row of the block that this lane has as g + 8 * half of its warp's 16 rows number `fold`.
template <class C>
static __device__ __forceinline__ int lane_row(int fold, int half) {
  return (int)(threadIdx.x / 32) * 16 * C::FOLD + 16 * fold + (int)(threadIdx.x & 31) / 4 + 8 * half;
}

template <class C>
static __device__ __forceinline__ void load_queries(const forward_job &job, const forward_block &block, char *tile) {
  typedef typename C::element element;
  const sa_problem &p = job.p;
  if (!C::PACKED) {
    tile_source source = job.q;
    source.data += (block.batch * p.q.stride[0] + block.head * p.q.stride[1]) * (int64_t)sizeof(element);
    load_tile<element, C::ROW, C::QUERIES, C::THREADS>(tile, source, block.query, threadIdx.x);
    return;
  }
  enum { CHUNKS = C::ROW / 16 };
  for (int k = threadIdx.x; k < C::QUERIES * CHUNKS; k += C::THREADS) {
    const int row = k / CHUNKS, chunk = k % CHUNKS;
    int64_t head, query;
    place_row<C>(job, block, row, head, query);
    int bytes = (int)p.width * (int)sizeof(element) - chunk * 16;
    if (bytes < 0 || block.query + row >= block_rows<C>(job)) bytes = 0;
    const int64_t offset = block.batch * p.q.stride[0] + head * p.q.stride[1] + query * p.q.stride[2];
    const char *from = (const char *)p.q.data + (bytes ? offset * (int64_t)sizeof(element) + chunk * 16 : 0);
    *(uint4 *)(tile + tile_offset<C::ROW>(row, chunk)) = read_unaligned<element>(from, bytes);
  }
}

// What a warp's rows have gathered: o unnormalised, relative to the running peak; sums are this lane's share.
template <class C>
struct gathered {
  typename C::products::total o[C::FOLD][C::COLUMNS];
  typename C::real peak[C::FOLD][2], sum[C::FOLD][2];
  uint32_t alive;  // bit 2 * fold + half: this lane saw a visible pair of that row
  bool masked;     // some pair was not visible
};

// This lane's visible pairs of a tile: bits[fold][half], as in the plan's row_bits.
template <class C>
static __device__ __forceinline__ void load_bits(const forward_job &job, const forward_block &block, int pattern,
                                                 uint32_t (&bits)[C::FOLD][2]) {
  if (pattern == SA_FULL) return;
  const uint2 *of_pattern = job.plan.row_bits + (int64_t)pattern * 256;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++) {
    if (C::PACKED) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = lane_row<C>(f, half);
        int64_t head, query;
        place_row<C>(job, block, row, head, query);
        const uint2 pair = of_pattern[query / 16 * 32 + query % 8 * 4 + (threadIdx.x & 3)];
        bits[f][half] = block.query + row >= block_rows<C>(job) ? 0 : query & 8 ? pair.y : pair.x;
      }
    } else {
      const int row = (int)(block.query % SA_TILE) + lane_row<C>(f, 0);
      const uint2 pair = of_pattern[row / 16 * 32 + (threadIdx.x & 31)];
      bits[f][0] = pair.x, bits[f][1] = pair.y;
    }
  }
}

// Where this block is in its list of tiles.
typedef struct forward_step {
  tile_walk walk;
  int piece;  // of KEYS keys
} forward_step;

template <class C>
static __device__ __forceinline__ int64_t step_key(const forward_step &step) {
  return (int64_t)step.walk.tile * SA_TILE + step.piece * C::KEYS;
}

// Returns whether the next step is in another tile. Pieces that lie beyond the last key are passed over.
template <class C>
static __device__ __forceinline__ bool step_advance(forward_step &step, int64_t keys) {
  step.piece++;
  if (step.piece < SA_TILE / C::KEYS && step_key<C>(step) < keys) return false;
  step.piece = 0;
  walk_advance(step.walk);
  return true;
}

// The scales of a block's queries, keys and values.
template <class C>
static __device__ __forceinline__ float *query_scales(char *shared) {
  return (float *)(shared + C::SCALES);
}

template <class C>
static __device__ __forceinline__ float *key_scales(char *shared) {
  return query_scales<C>(shared) + C::QUERIES;
}

template <class C>
static __device__ __forceinline__ float *value_scales(char *shared) {
  return key_scales<C>(shared) + C::KEYS;
}

// The products q.k of a warp's rows with the keys of a tile; without EXTRAS, products of split tiles lack the scale of
// their query.
template <class C>
static __device__ __forceinline__ void multiply_keys(char *shared, const char *keys,
                                                     typename C::real (&s)[C::FOLD][C::BLOCKS][4]) {
  typedef typename C::products P;
  typedef typename C::real real;
  const int row = (int)(threadIdx.x / 32) * 16 * C::FOLD, column = 2 * (int)(threadIdx.x & 3);
#pragma unroll
  for (int first = 0; first < C::BLOCKS; first += C::ABREAST) {
    typename P::sum sum[C::FOLD][C::ABREAST];
    clear_sum(sum);
    // Unrolled as far as the swizzle repeats itself, or twice that: more is code, not speed.
#pragma unroll C::UNROLLED
    for (int step = 0; step < C::WIDTH / P::DEPTH; step++) {
      typename P::left a[C::FOLD];
#pragma unroll
      for (int f = 0; f < C::FOLD; f++) P::template left_rows<C::ROW>(a[f], shared, row + 16 * f, step);
#pragma unroll
      for (int n = 0; n < C::ABREAST; n += 2) {
        typename P::right b[2];
        P::template right_rows<C::ROW>(b, keys, 8 * (first + n), step);
#pragma unroll
        for (int term = 0; term < P::TERMS; term++)
#pragma unroll
          for (int f = 0; f < C::FOLD; f++) {
            P::template multiply_term<false>(sum[f][n], a[f], b[0], term);
            P::template multiply_term<false>(sum[f][n + 1], a[f], b[1], term);
          }
      }
    }
#pragma unroll
    for (int f = 0; f < C::FOLD; f++)
#pragma unroll
      for (int n = 0; n < C::ABREAST; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          real &to = s[f][first + n][e];
          to = sum[f][n].value(e);
          if constexpr (P::SPLIT) {
            const real scale = key_scales<C>(shared)[8 * (first + n) + column + e % 2];
            to *= C::EXTRAS ? scale * query_scales<C>(shared)[lane_row<C>(f, e / 2)] : scale;
          }
        }
  }
}

// Products into scores, -inf where masked; without EXTRAS they stay products. seen[fold][half]: bits 2 n + c of the
// step's blocks n; those whose bias is -inf are cleared.
template <class C>
static __device__ __forceinline__ void score(const score_rule<typename C::real> &rule, const forward_block &block,
                                             int64_t key, bool full, uint32_t (&seen)[C::FOLD][2],
                                             typename C::real (&s)[C::FOLD][C::BLOCKS][4]) {
  typedef typename C::real real;
  if (!C::EXTRAS && full) return;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++) {
    uint32_t visible = 0;
#pragma unroll
    for (int n = 0; n < C::BLOCKS; n++)
      visible |= ((seen[f][0] >> 2 * n & 3) | (seen[f][1] >> 2 * n & 3) << 2) << 4 * n;
    if (C::EXTRAS) {
      score_blocks<false>(rule, s[f], block.query + lane_row<C>(f, 0), key + 2 * (threadIdx.x & 3), full, visible,
                          (real(*)[1][4])NULL);
      if (!rule.bias) continue;
      seen[f][0] = seen[f][1] = 0;
#pragma unroll
      for (int n = 0; n < C::BLOCKS; n++) {
        seen[f][0] |= (visible >> 4 * n & 3) << 2 * n;
        seen[f][1] |= (visible >> (4 * n + 2) & 3) << 2 * n;
      }
    } else {
#pragma unroll
      for (int n = 0; n < C::BLOCKS; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[f][n][e] = visible >> (4 * n + e) & 1 ? s[f][n][e] : -(real)INFINITY;
    }
  }
}

// What a score of the lane's rows is multiplied by to be an exponent of 2.
template <class C>
static __device__ __forceinline__ void exponent_units(const score_rule<typename C::real> &rule, char *shared,
                                                      typename C::real (&unit)[C::FOLD][2]) {
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unit[f][half] = C::EXTRAS ? rule.unit : rule.factor;
      if (C::products::SPLIT && !C::EXTRAS) unit[f][half] *= query_scales<C>(shared)[lane_row<C>(f, half)];
    }
}

static __device__ __forceinline__ float larger(float a, float b) {
  return fmaxf(a, b);
}

static __device__ __forceinline__ double larger(double a, double b) {
  return fmax(a, b);
}

template <class T>
static __device__ __forceinline__ T over_quad_max(T x) {
  x = larger(x, __shfl_xor_sync(0xffffffff, x, 1));
  return larger(x, __shfl_xor_sync(0xffffffff, x, 2));
}

template <class T>
static __device__ __forceinline__ T over_quad_sum(T x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Scores into weights relative to the peak; factor is what a new peak costs the old sums. A peak is kept until a score
// exceeds it by a factor of 16 in the weights: so o is seldom rescaled. A NaN that the maximum passes over comes back
// with its power.
template <class C>
static __device__ __forceinline__ void soften(const typename C::real (&unit)[C::FOLD][2],
                                              typename C::real (&s)[C::FOLD][C::BLOCKS][4], gathered<C> &got,
                                              typename C::real (&factor)[C::FOLD][2]) {
  typedef typename C::real real;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      real peak = s[f][0][2 * half];
#pragma unroll
      for (int n = 0; n < C::BLOCKS; n++) peak = larger(peak, larger(s[f][n][2 * half], s[f][n][2 * half + 1]));
      peak = over_quad_max(peak);
      const real old = got.peak[f][half];
      if (!((peak - old) * unit[f][half] > 4)) peak = old;
      // A row that has seen nothing yet, or nothing but -inf, must not compute -inf - -inf.
      const real base = peak == -(real)INFINITY ? 0 : peak;
      factor[f][half] = peak == old ? 1 : exp2_of((old - base) * unit[f][half]);
      // One multiply-add; extras may hold numbers whose product with the unit overflows.
      const real top = base * unit[f][half];
      real sum = 0;
#pragma unroll
      for (int n = 0; n < C::BLOCKS; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const real x = s[f][n][2 * half + c];
          const real weight = exp2_of(C::EXTRAS ? (x - base) * unit[f][half] : x * unit[f][half] - top);
          s[f][n][2 * half + c] = weight;
          sum += weight;
        }
      got.sum[f][half] = got.sum[f][half] * factor[f][half] + sum;
      got.peak[f][half] = peak;
    }
}

// A dropped weight is 0 whatever it was, NaN too.
template <class C>
static __device__ __forceinline__ void drop(const dropout_rule &rule, const forward_block &block, int64_t key,
                                            typename C::real (&s)[C::FOLD][C::BLOCKS][4]) {
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int n = 0; n < C::BLOCKS; n++) {
      const uint32_t kept =
          kept_block<false>(rule, block.query + lane_row<C>(f, 0), key + 8 * n + 2 * (threadIdx.x & 3));
#pragma unroll
      for (int e = 0; e < 4; e++) s[f][n][e] = kept >> e & 1 ? s[f][n][e] : 0;
    }
}

// o = o * factor + weights * values of the tile; weights come in units.
template <class C>
static __device__ __forceinline__ void multiply_values(const typename C::products::left (&a)[C::FOLD][C::STEPS],
                                                       const char *values, const typename C::real (&factor)[C::FOLD][2],
                                                       const typename C::real (&unit)[C::FOLD][2],
                                                       typename C::products::total (&o)[C::FOLD][C::COLUMNS]) {
  typedef typename C::products P;
  bool moved = false;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++) moved |= factor[f][0] != 1 || factor[f][1] != 1;
  if (__any_sync(0xffffffff, moved)) {
#pragma unroll
    for (int f = 0; f < C::FOLD; f++)
#pragma unroll
      for (int n = 0; n < C::COLUMNS; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[f][n].d[e] *= factor[f][e / 2];
  }
  if constexpr (P::FRESH) {
#pragma unroll
    for (int n = 0; n < C::COLUMNS; n += 2) {
      typename P::sum sum[C::FOLD][2];
      clear_sum(sum);
#pragma unroll
      for (int step = 0; step < C::STEPS; step++) {
        typename P::right b[2];
        P::template right_columns<C::VALUE_ROW>(b, values, step * P::DEPTH, 8 * n);
#pragma unroll
        for (int term = 0; term < P::TERMS; term++)
#pragma unroll
          for (int f = 0; f < C::FOLD; f++) {
            P::template multiply_term<false>(sum[f][0], a[f][step], b[0], term);
            P::template multiply_term<false>(sum[f][1], a[f][step], b[1], term);
          }
      }
#pragma unroll
      for (int f = 0; f < C::FOLD; f++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          o[f][n].d[e] += sum[f][0].value(e) * unit[f][e / 2];
          o[f][n + 1].d[e] += sum[f][1].value(e) * unit[f][e / 2];
        }
    }
  } else {
#pragma unroll
    for (int step = 0; step < C::STEPS; step++)
#pragma unroll
      for (int n = 0; n < C::COLUMNS; n += 2) {
        typename P::right b[2];
        P::template right_columns<C::VALUE_ROW>(b, values, step * P::DEPTH, 8 * n);
#pragma unroll
        for (int f = 0; f < C::FOLD; f++) {
          P::multiply(o[f][n], a[f][step], b[0]);
          P::multiply(o[f][n + 1], a[f][step], b[1]);
        }
      }
  }
}

// The weights of a step as the left side of the products with its values. They are never Inf, and a NaN is NaN in all
// columns, so there is nothing to be careful about.
template <class C>
static __device__ __forceinline__ void take_weights(const typename C::real (&s)[C::FOLD][C::BLOCKS][4], char *shared,
                                                    typename C::products::left (&a)[C::FOLD][C::STEPS],
                                                    typename C::real (&unit)[C::FOLD][2]) {
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
    left_of_blocks<typename C::products, C::BLOCKS, false>(a[f], s[f], value_scales<C>(shared) + 2 * (threadIdx.x & 3),
                                                           unit[f]);
}

// What the careful pass keeps of a step, in memory: the fast one has it in registers, which cannot be indexed.
template <class C>
struct careful_step {
  typename C::products::total o[C::FOLD][C::COLUMNS];
  typename C::real weights[C::FOLD][C::BLOCKS][4];
  uint32_t seen[C::FOLD][2];
};

// The contributions of non-finite values to the rows that see them.
template <class C>
__attribute__((noinline)) static __device__ void add_nonfinite(careful_step<C> &step, const char *values,
                                                               int64_t stride, int columns, const uint32_t *bad) {
  typedef typename C::real real;
  const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  for (int key = 0; key < C::KEYS; key++) {
    if (!(bad[key / 32] >> key % 32 & 1)) continue;
    const int owner = 4 * g + key % 8 / 2, block = key / 8, c = key % 2;
    for (int f = 0; f < C::FOLD; f++)
      for (int half = 0; half < 2; half++) {
        const real weight = __shfl_sync(0xffffffff, step.weights[f][block][2 * half + c], owner);
        const uint32_t seen = __shfl_sync(0xffffffff, step.seen[f][half], owner);
        if (!(seen >> (2 * block + c) & 1)) continue;
        for (int n = 0; n < C::COLUMNS; n++)
          for (int e = 0; e < 2; e++) {
            const int column = 8 * n + 2 * t + e;
            if (column >= columns) continue;
            const real v = real_of(((const typename C::element *)(values + key * stride))[column]);
            if (!is_finite(v)) step.o[f][n].d[2 * half + e] += weight * v;
          }
      }
  }
}

// Attention of the block over its tiles. `careful` is for blocks that came out non-finite: the same products in the
// same order, with the non-finite elements of V 0, and then these given to the rows that see them. So a row that sees
// none gets the very bits that any finite V would have given.
template <class C>
static __device__ __forceinline__ void gather(const forward_job &job, const forward_block &block, bool careful,
                                              char *shared, uint32_t *bad, gathered<C> &got) {
  typedef typename C::products P;
  typedef typename C::element element;
  typedef typename C::real real;
  const sa_problem &p = job.p;
  clear_sum(got.o);
  got.alive = 0;
  got.masked = false;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      got.peak[f][half] = -(real)INFINITY;
      got.sum[f][half] = 0;
    }
  forward_step step = {walk_start(block.runs, block.first_tile, block.tiles), 0};
  if (!step.walk.left) {
    copy_async_wait<0>();  // the queries' place is where out goes
    __syncthreads();
    return;
  }

  const score_rule<real> rule = score_rule_of<real>(p, block.batch, block.head);
  const dropout_rule dropout = dropout_rule_of(p, block.batch, block.head);
  // All but the place is the same in every block, and stays in the constant bank.
  tile_source keys = job.k, values = job.v;
  keys.data += (block.batch * p.k.stride[0] + block.key_head * p.k.stride[1]) * (int64_t)sizeof(element);
  values.data += (block.batch * p.v.stride[0] + block.key_head * p.v.stride[1]) * (int64_t)sizeof(element);
  if (C::VALUE_WIDTH < C::WIDTH) {
    values.data += block.value_part * C::VALUE_ROW;
    values.bytes -= block.value_part * C::VALUE_ROW;
    if (values.bytes > C::VALUE_ROW) values.bytes = C::VALUE_ROW;
  }

  load_tile<element, C::ROW, C::KEYS, C::THREADS>(shared + C::KEY_TILE, keys, step_key<C>(step), threadIdx.x);
  if (C::STAGES > 1)
    load_tile<element, C::VALUE_ROW, C::KEYS, C::THREADS>(shared + C::VALUE_TILE, values, step_key<C>(step),
                                                          threadIdx.x);
  copy_async_commit();
  char *stage = shared;
  uint32_t bits[C::FOLD][2] = {};
  load_bits<C>(job, block, step.walk.pattern, bits);
  bool first = true;
  for (;;) {
    const int64_t key = step_key<C>(step);
    const bool full = step.walk.pattern == SA_FULL;
    uint32_t seen[C::FOLD][2], any = 0;
#pragma unroll
    for (int f = 0; f < C::FOLD; f++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        seen[f][half] = full ? ~0u : bits[f][half] >> (step.piece * (C::KEYS / 4));
        any |= seen[f][half] &= (uint32_t)((1ull << C::KEYS / 4) - 1);
      }
    if (!full) got.masked = true;
    // For rows that see nothing here, nothing changes.
    const bool idle = !full && !__any_sync(0xffffffff, any != 0);

    copy_async_wait<0>();
    __syncthreads();
    if (careful && threadIdx.x < (C::KEYS + 31) / 32) bad[threadIdx.x] = 0;
    if (step_advance<C>(step, p.keys) && step.walk.left) load_bits<C>(job, block, step.walk.pattern, bits);
    char *const key_tile = stage + C::KEY_TILE, *const value_tile = stage + C::VALUE_TILE;
    if (C::STAGES > 1) {
      stage = stage == shared ? shared + C::STAGE : shared;
      if (step.walk.left) {
        load_tile<element, C::ROW, C::KEYS, C::THREADS>(stage + C::KEY_TILE, keys, step_key<C>(step), threadIdx.x);
        load_tile<element, C::VALUE_ROW, C::KEYS, C::THREADS>(stage + C::VALUE_TILE, values, step_key<C>(step),
                                                              threadIdx.x);
      }
    } else {
      load_tile<element, C::VALUE_ROW, C::KEYS, C::THREADS>(value_tile, values, key, threadIdx.x);
    }
    copy_async_commit();

    if constexpr (P::SPLIT) {
      if (first) split_tile<P, C::ROW, C::QUERIES, C::THREADS>(shared, query_scales<C>(shared), careful, threadIdx.x);
      split_tile<P, C::ROW, C::KEYS, C::THREADS>(key_tile, key_scales<C>(shared), careful, threadIdx.x);
      if (C::STAGES > 1)
        split_tile<P, C::VALUE_ROW, C::KEYS, C::THREADS>(value_tile, value_scales<C>(shared), careful, threadIdx.x);
      __syncthreads();
      first = false;
    }

    real factor[C::FOLD][2], unit[C::FOLD][2];
    typename P::left weights[C::FOLD][C::STEPS];
    careful_step<C> kept;
    real s[C::FOLD][C::BLOCKS][4];
    if (!idle) {
      multiply_keys<C>(shared, key_tile, s);
      score<C>(rule, block, key, full, seen, s);
#pragma unroll
      for (int f = 0; f < C::FOLD; f++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          if (seen[f][half]) got.alive |= 1u << (2 * f + half);
      real exponent[C::FOLD][2];
      exponent_units<C>(rule, shared, exponent);
      soften<C>(exponent, s, got, factor);
      if (C::EXTRAS && dropout.threshold) drop<C>(dropout, block, key, s);
      if (careful) {
        memcpy(kept.weights, s, sizeof kept.weights);
        memcpy(kept.seen, seen, sizeof kept.seen);
      }
      if (!P::SPLIT) take_weights<C>(s, shared, weights, unit);
    }

    if (C::STAGES == 1) {
      copy_async_wait<0>();
      __syncthreads();
      if (step.walk.left)
        load_tile<element, C::ROW, C::KEYS, C::THREADS>(key_tile, keys, step_key<C>(step), threadIdx.x);
      copy_async_commit();
      if constexpr (P::SPLIT) {
        split_tile<P, C::VALUE_ROW, C::KEYS, C::THREADS>(value_tile, value_scales<C>(shared), careful, threadIdx.x);
        __syncthreads();
      }
    }
    if (careful) {
      if (C::STAGES > 1) __syncthreads();
      make_finite<typename P::stored, C::VALUE_ROW, C::KEYS, C::THREADS>(value_tile, bad, threadIdx.x);
      __syncthreads();
    }
    if (!idle) {
      if (P::SPLIT) take_weights<C>(s, shared, weights, unit);
      multiply_values<C>(weights, value_tile, factor, unit, got.o);
      if (careful) {
        memcpy(kept.o, got.o, sizeof kept.o);
        add_nonfinite<C>(kept, values.data + key * values.stride, values.stride, values.bytes / (int)sizeof(element),
                         bad);
        memcpy(got.o, kept.o, sizeof kept.o);
      }
    }
    if (!step.walk.left) break;
  }
  if (C::EXTRAS) return;
  real exponent[C::FOLD][2];
  exponent_units<C>(rule, shared, exponent);
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (got.peak[f][half] != -(real)INFINITY) got.peak[f][half] *= exponent[f][half];
}

template <class C>
static __device__ __forceinline__ bool came_out_nonfinite(const gathered<C> &got) {
  bool found = false;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++) {
    found |= !is_finite(got.sum[f][0]) || !is_finite(got.sum[f][1]);
#pragma unroll
    for (int n = 0; n < C::COLUMNS; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) found |= !is_finite(got.o[f][n].d[e]);
  }
  return found;
}

// How a row ends. The weights are 2^((s - base) unit) * factor: the LSE alone would do for ordinary rows, but a bias of
// -1e30 leaves no room in it for the logarithm of the sum. What was gathered becomes out by `scale`.
typedef struct row_end {
  double base, factor, lse, scale;
} row_end;

__attribute__((noinline)) static __device__ row_end end_row(double peak, double sum, bool has_sink, double sink,
                                                            bool plain, double kept) {
  // In natural units, in which a sink near the dtype's largest number does not overflow.
  const double natural = plain ? 0.6931471805599453 : 1;
  double top = peak * natural;
  if (has_sink) {
    if (sink > top || sink != sink) top = sink;
    sum = sum * exp(peak * natural - top) + exp(sink - top);
  }
  // Visible scores that are all -inf leave a sum of 0: 0/0 is the NaN that the definition gives.
  if (!(sum > 0)) {
    const double none = nan("");
    return row_end{none, none, none, none};
  }
  row_end end;
  end.base = top == peak * natural ? peak : top / natural;
  end.factor = 1 / sum;
  end.lse = top + log(sum);
  // A sink above the row's own peak takes what was gathered down.
  end.scale = end.factor * kept * (end.base == peak ? 1 : exp((peak - end.base) * natural));
  return end;
}

static __device__ __forceinline__ row_end end_dead_row(bool has_sink, double sink) {
  return row_end{INFINITY, 0, has_sink ? sink : -INFINITY, 0};
}

static __device__ __forceinline__ int64_t row_offset(const sa_operand &x, int64_t batch, int64_t head, int64_t query) {
  return batch * x.stride[0] + head * x.stride[1] + query * x.stride[2];
}

// LSE and dead of a row; one lane does it.
template <class Real>
static __device__ __forceinline__ void write_row_end(const sa_problem &p, int64_t batch, int64_t head, int64_t query,
                                                     const row_end &end, bool dead) {
  if (p.lse.data) ((Real *)p.lse.data)[row_offset(p.lse, batch, head, query)] = (Real)end.lse;
  if (p.dead.data) ((bool *)p.dead.data)[row_offset(p.dead, batch, head, query)] = dead;
}

template <class Element, class Real>
static __device__ __forceinline__ void put_pair(Element *to, Real a, Real b) {
  struct alignas(2 * sizeof(Element)) {
    Element x[2];
  } pair;
  put_real(&pair.x[0], a);
  put_real(&pair.x[1], b);
  *(decltype(pair) *)to = pair;
}

// Ends the rows of a block: o becomes out, LSE and dead are written; base and factor are what write_weights wants.
template <class C>
static __device__ __forceinline__ void end_rows(const forward_job &job, const forward_block &block, gathered<C> &got,
                                                typename C::real (&base)[C::FOLD][2],
                                                typename C::real (&factor)[C::FOLD][2]) {
  typedef typename C::real real;
  const sa_problem &p = job.p;
  const bool plain = plain_scores(p), has_sink = p.sinks.data != NULL;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = lane_row<C>(f, half);
      const bool inside = block.query + row < block_rows<C>(job);
      int64_t head, query;
      place_row<C>(job, block, row, head, query);
      const real sum = over_quad_sum(got.sum[f][half]);
      const uint32_t alive = __ballot_sync(0xffffffff, got.alive >> (2 * f + half) & 1);
      const bool dead = !(alive >> (threadIdx.x & 28) & 15);
      const double sink = has_sink && inside ? (double)(real)read_operand(p.sinks, head * p.sinks.stride[1]) : 0;
      row_end end = end_dead_row(has_sink, sink);
      if (!dead) end = end_row(got.peak[f][half], sum, has_sink, sink, plain, 1 / (1 - p.dropout));
      base[f][half] = (real)end.base;
      factor[f][half] = (real)end.factor;
      if (inside && threadIdx.x % 4 == 0 && block.value_part == 0)
        write_row_end<real>(p, block.batch, head, query, end, dead);
      const real by = (real)end.scale;
#pragma unroll
      for (int n = 0; n < C::COLUMNS; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          real &x = got.o[f][n].d[2 * half + c];
          x = dead ? 0 : x * by;
        }
    }
}

// Writes out by way of shared memory, in whole chunks of 16 bytes. A warp puts its rows where it had its queries.
template <class C>
static __device__ __forceinline__ void write_out(const forward_job &job, const forward_block &block, char *shared,
                                                 const gathered<C> &got) {
  typedef typename C::element element;
  const sa_problem &p = job.p;
  const int lane = threadIdx.x & 31, first = (int)(threadIdx.x / 32) * 16 * C::FOLD;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int n = 0; n < C::COLUMNS; n++) {
        const int byte = (8 * n + 2 * (lane & 3)) * (int)sizeof(element);
        put_pair((element *)(shared + tile_offset<C::ROW>(lane_row<C>(f, half), byte / 16) + byte % 16),
                 got.o[f][n].d[2 * half], got.o[f][n].d[2 * half + 1]);
      }
  __syncwarp();
  constexpr int CHUNKS = C::VALUE_ROW / 16, EACH = 16 / (int)sizeof(element);
  for (int k = lane; k < 16 * C::FOLD * CHUNKS; k += 32) {
    const int row = first + k / CHUNKS, chunk = k % CHUNKS;
    const int64_t column = block.value_part * C::VALUE_WIDTH + chunk * EACH;
    if (block.query + row >= block_rows<C>(job) || column >= p.value_width) continue;
    int64_t head, query;
    place_row<C>(job, block, row, head, query);
    const element *from = (const element *)(shared + tile_offset<C::ROW>(row, chunk));
    element *to = (element *)p.out.data + row_offset(p.out, block.batch, head, query) + column;
    if (job.out_aligned && column + EACH <= p.value_width) {
      *(uint4 *)to = *(const uint4 *)from;
    } else {
      for (int n = 0; n < EACH && column + n < p.value_width; n++) to[n] = from[n];
    }
  }
}

// What a part of the keys gathered, for the kernel that merges.
template <class C>
static __device__ __forceinline__ void write_part(const forward_job &job, const forward_block &block,
                                                  const gathered<C> &got) {
  typedef typename C::real real;
  const int t = threadIdx.x & 3;
  const int width = C::VALUE_WIDTH * job.value_parts;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t row = (block.item * job.parts + block.part) * C::QUERIES + lane_row<C>(f, half);
      const real sum = over_quad_sum(got.sum[f][half]);
      const uint32_t alive = __ballot_sync(0xffffffff, got.alive >> (2 * f + half) & 1);
      if (t == 0 && block.value_part == 0) {
        ((real *)job.part_peak)[row] = got.peak[f][half];
        ((real *)job.part_sum)[row] = sum;
        job.part_alive[row] = (alive >> (threadIdx.x & 28) & 15) != 0;
      }
      real *out = (real *)job.part_out + row * width + block.value_part * C::VALUE_WIDTH + 2 * t;
#pragma unroll
      for (int n = 0; n < C::COLUMNS; n++) put_pair(out + 8 * n, got.o[f][n].d[2 * half], got.o[f][n].d[2 * half + 1]);
    }
}

// The weights p_ij of a finished block: the scores again, against what the whole rows came to.
template <class C>
static __device__ __forceinline__ void write_weights(const forward_job &job, const forward_block &block, char *shared,
                                                     const typename C::real (&base)[C::FOLD][2],
                                                     const typename C::real (&factor)[C::FOLD][2]) {
  typedef typename C::element element;
  typedef typename C::real real;
  const sa_problem &p = job.p;
  element *to = (element *)p.weights.data + row_offset(p.weights, block.batch, block.head, 0);
  for (int row = 0; row < C::QUERIES && block.query + row < p.queries; row++)
    for (int64_t key = threadIdx.x; key < p.keys; key += C::THREADS)
      put_real(&to[(block.query + row) * p.weights.stride[2] + key * p.weights.stride[3]], (real)0);
  __syncthreads();
  const score_rule<real> rule = score_rule_of<real>(p, block.batch, block.head);
  tile_source keys = job.k;
  keys.data += (block.batch * p.k.stride[0] + block.key_head * p.k.stride[1]) * (int64_t)sizeof(element);
  forward_step step = {walk_start(block.runs, 0, block.tiles), 0};
  uint32_t bits[C::FOLD][2] = {};
  for (bool entered = true; step.walk.left;) {
    if (entered) load_bits<C>(job, block, step.walk.pattern, bits);
    const int64_t key = step_key<C>(step);
    const bool full = step.walk.pattern == SA_FULL;
    load_tile<element, C::ROW, C::KEYS, C::THREADS>(shared + C::KEY_TILE, keys, key, threadIdx.x);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if constexpr (C::products::SPLIT) {
      split_tile<typename C::products, C::ROW, C::KEYS, C::THREADS>(shared + C::KEY_TILE, key_scales<C>(shared), true,
                                                                    threadIdx.x);
      __syncthreads();
    }
    uint32_t seen[C::FOLD][2];
#pragma unroll
    for (int f = 0; f < C::FOLD; f++)
#pragma unroll
      for (int half = 0; half < 2; half++) seen[f][half] = full ? ~0u : bits[f][half] >> (step.piece * (C::KEYS / 4));
    real s[C::FOLD][C::BLOCKS][4];
    multiply_keys<C>(shared, shared + C::KEY_TILE, s);
    score<C>(rule, block, key, full, seen, s);
#pragma unroll
    for (int f = 0; f < C::FOLD; f++)
#pragma unroll
      for (int n = 0; n < C::BLOCKS; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int half = e / 2, bit = 2 * n + e % 2;
          const int64_t query = block.query + lane_row<C>(f, half), at = key + 8 * n + 2 * (threadIdx.x & 3) + e % 2;
          if (query >= p.queries || !(seen[f][half] >> bit & 1)) continue;
          const real x = s[f][n][e] - base[f][half];
          put_real(&to[query * p.weights.stride[2] + at * p.weights.stride[3]],
                   exp2_of(C::EXTRAS ? x * rule.unit : x) * factor[f][half]);
        }
    entered = step_advance<C>(step, p.keys);
    __syncthreads();
  }
}

template <class C>
static __global__ void __launch_bounds__(C::THREADS, C::RESIDENT)
    forward_kernel(const __grid_constant__ forward_job job) {
  typedef typename C::real real;
  char *const shared = dynamic_shared<char>();
  uint32_t *const bad = (uint32_t *)(shared + C::BAD);  // rows of the values' tile, for the careful pass
  int64_t index = blockIdx.x;
  const int value_part = (int)(index % job.value_parts);
  index /= job.value_parts;
  const int part = (int)(index % job.parts);
  forward_block block = block_of_item<C>(job, index / job.parts);
  if (block.query >= block_rows<C>(job)) return;
  block.part = part;
  block.value_part = value_part;
  if (job.parts > 1) {
    const int64_t all = block.tiles;
    block.first_tile = (int)(all * part / job.parts);
    block.tiles = (int)(all * (part + 1) / job.parts) - block.first_tile;
  }
  gathered<C> got;
  for (bool careful = false;; careful = true) {
    load_queries<C>(job, block, shared);
    copy_async_commit();
    gather<C>(job, block, careful, shared, bad, got);
    // What can leak, leaks through pairs that are masked; only f32 has another reason to look again (products_f32).
    const bool suspect = !careful && (got.masked || job.p.bias.data || C::products::SPLIT) && came_out_nonfinite(got);
    if (!__syncthreads_or(suspect)) break;
  }
  if (job.parts > 1) {
    write_part<C>(job, block, got);
    return;
  }
  real base[C::FOLD][2], factor[C::FOLD][2];
  end_rows<C>(job, block, got, base, factor);
  if (C::EXTRAS && job.p.weights.data && value_part == 0) write_weights<C>(job, block, shared, base, factor);
  write_out<C>(job, block, shared, got);
}

enum { MERGE_WARPS = 8, MERGE_PARTS = 256 };

// A block a row: the parts of its keys, brought to one peak and added. What a part is multiplied by is found once, by a
// thread; then each warp takes every eighth part, 16 bytes a lane, many at once, as they are few numbers far apart. The
// warps' sums are added in their order.
template <class C>
static __global__ void __launch_bounds__(32 * MERGE_WARPS) merge_kernel(const __grid_constant__ forward_job job) {
  typedef typename C::element element;
  typedef typename C::real real;
  enum { EACH = 16 / (int)sizeof(real), WIDTH = 256, PIECES = C::WIDTH / EACH / 32 ? C::WIDTH / EACH / 32 : 1 };
  struct alignas(16) piece {
    real x[EACH];
  };
  __shared__ piece column_sum[MERGE_WARPS][WIDTH / EACH];
  __shared__ real factor[MERGE_PARTS];
  const sa_problem &p = job.p;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int64_t item = blockIdx.x / C::QUERIES;
  const int row = (int)(blockIdx.x % C::QUERIES), width = C::VALUE_WIDTH * job.value_parts;
  const forward_block block = block_of_item<C>(job, item);
  if (block.query + row >= block_rows<C>(job)) return;
  const int64_t first = item * job.parts * C::QUERIES + row;
  const real unit = plain_scores(p) ? 1 : (real)1.4426950408889634;
  // Every warp looks at all parts, and sums them in the same order.
  enum { LOOKS = MERGE_PARTS / 32 };
  real peaks[LOOKS], sums[LOOKS], peak = -(real)INFINITY;
  bool alive = false;
#pragma unroll
  for (int k = 0; k < LOOKS; k++) {
    const int part = lane + 32 * k;
    const int64_t at = first + (int64_t)part * C::QUERIES;
    const bool there = part < job.parts;
    peaks[k] = there ? ((const real *)job.part_peak)[at] : -(real)INFINITY;
    sums[k] = there ? ((const real *)job.part_sum)[at] : 0;
    alive |= there && job.part_alive[at] != 0;
  }
#pragma unroll
  for (int k = 0; k < LOOKS; k++) peak = larger(peak, peaks[k]);
  for (int distance = 16; distance; distance /= 2) peak = larger(peak, __shfl_xor_sync(0xffffffff, peak, distance));
  alive = __any_sync(0xffffffff, alive);
  // A part that saw nothing has a peak of -inf, so its factor is 0, and sums of 0.
  const real base = peak == -(real)INFINITY ? 0 : peak;
  real sum = 0;
#pragma unroll
  for (int k = 0; k < LOOKS; k++) {
    const real by = exp2_of((peaks[k] - base) * unit);
    sum += sums[k] * by;
    if (warp == k % MERGE_WARPS) factor[lane + 32 * k] = by;
  }
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
  __syncthreads();
  piece o[PIECES];
  memset(o, 0, sizeof o);
#pragma unroll 8
  for (int part = warp; part < job.parts; part += MERGE_WARPS) {
    const piece *from = (const piece *)((const real *)job.part_out + (first + (int64_t)part * C::QUERIES) * width);
#pragma unroll
    for (int n = 0; n < PIECES; n++) {
      if ((32 * n + lane) * EACH >= width) continue;
      const piece x = from[32 * n + lane];
#pragma unroll
      for (int e = 0; e < EACH; e++) o[n].x[e] += x.x[e] * factor[part];
    }
  }
#pragma unroll
  for (int n = 0; n < PIECES; n++)
    if (32 * n + lane < WIDTH / EACH) column_sum[warp][32 * n + lane] = o[n];
  __syncthreads();
  int64_t head, query;
  place_row<C>(job, block, row, head, query);
  const bool has_sink = p.sinks.data != NULL;
  const double sink = has_sink ? (double)(real)read_operand(p.sinks, head * p.sinks.stride[1]) : 0;
  row_end end = end_dead_row(has_sink, sink);
  if (alive) end = end_row(peak, sum, has_sink, sink, plain_scores(p), 1 / (1 - p.dropout));
  if (threadIdx.x == 0) write_row_end<real>(p, block.batch, head, query, end, !alive);
  element *out = (element *)p.out.data + row_offset(p.out, block.batch, head, query);
  for (int column = threadIdx.x; column < p.value_width; column += 32 * MERGE_WARPS) {
    real x = ((const real *)column_sum[0])[column];
    for (int w = 1; w < MERGE_WARPS; w++) x += ((const real *)column_sum[w])[column];
    put_real(&out[column], alive ? x * (real)end.scale : (real)0);
  }
}

static const char forward_name[] = "sa_forward";

// Heads whose keys and values, of `head_bytes` each, fit half of the second-level cache; whole groups.
static int64_t forward_swath(const forward_job &job, int64_t heads, int64_t per_key_head, int64_t head_bytes,
                             int64_t cache_bytes) {
  int64_t fit = head_bytes ? cache_bytes / 2 / head_bytes : heads;
  if (fit < 1) fit = 1;
  fit *= per_key_head;
  const int64_t all = job.p.batch * heads;
  return fit < all ? fit : all;
}

// How many parts the keys are split into: enough to give every multiprocessor its blocks, none below `least` tiles.
static int forward_parts(const forward_job &job, int64_t items, int64_t resident, int64_t least) {
  const int64_t rows = job.plan.batch * job.plan.heads * job.plan.row_tiles;
  const int64_t tiles = rows ? (job.plan.partial + job.plan.full) / rows : 0;
  int64_t parts = items ? resident / items : 1;
  if (parts > tiles / least) parts = tiles / least;
  if (parts > MERGE_PARTS) parts = MERGE_PARTS;
  return parts > 1 ? (int)parts : 1;
}

template <class C>
static int launch_forward(forward_job &job, cudaStream_t stream) {
  typedef typename C::real real;
  const sa_problem &p = job.p;
  const sa_cuda_properties *device = sa_cuda_properties_of(p.device);
  const int64_t heads = C::PACKED ? p.key_heads : p.heads;
  job.blocks = C::PACKED ? (job.group * p.queries + C::QUERIES - 1) / C::QUERIES
                         : (int64_t)job.plan.row_tiles * (SA_TILE / C::QUERIES);
  job.items = p.batch * heads * job.blocks;
  job.swath =
      forward_swath(job, heads, C::PACKED ? 1 : job.group,
                    p.keys * (p.width + p.value_width) * (int64_t)sizeof(typename C::element), device->cache_bytes);
  job.value_parts = p.value_width > C::VALUE_WIDTH ? (int)((p.value_width + C::VALUE_WIDTH - 1) / C::VALUE_WIDTH) : 1;
  job.parts =
      p.weights.data ? 1 : forward_parts(job, job.items, (int64_t)device->processors * C::RESIDENT, C::PACKED ? 1 : 2);
  char *memory = NULL;
  if (job.parts > 1) {
    const int64_t rows = job.items * job.parts * C::QUERIES, width = C::VALUE_WIDTH * job.value_parts;
    memory = (char *)sa_cuda_scratch(forward_name, p.device, rows * ((width + 2) * (int64_t)sizeof(real) + 1));
    if (!memory) return SA_NO_MEMORY;
    job.part_out = memory;
    job.part_peak = (real *)memory + rows * width;
    job.part_sum = (real *)job.part_peak + rows;
    job.part_alive = (uint8_t *)((real *)job.part_sum + rows);
  }
  const int64_t grid = job.items * job.parts * job.value_parts;
  int status =
      grid > INT_MAX ? sa_cuda_host->fail(SA_UNSUPPORTED, forward_name, "q: has too many heads and queries") : SA_OK;
  if (!status)
    status =
        sa_cuda_launch(forward_name, forward_kernel<C>, dim3((unsigned)grid), dim3(C::THREADS), C::SHARED, stream, job);
  if (!status && job.parts > 1)
    status = sa_cuda_launch(forward_name, merge_kernel<C>, dim3((unsigned)(job.items * C::QUERIES)),
                            dim3(32 * MERGE_WARPS), 0, stream, job);
  if (memory) sa_cuda_scratch_release(p.device, memory);
  return status;
}

// The shapes for a dtype and a width that those of q and v are padded to. A block has at most 97 KiB of shared memory,
// which every device has.
template <class P, int WIDTH, bool EXTRAS>
struct forward_choice;

// Half types have two times 16 queries a warp where o leaves room: keys and values are read half as often then. One
// stage is 3 % faster than two at 128: two blocks of a multiprocessor hide what one waits for.
template <class P, int WIDTH, bool EXTRAS>
struct forward_choice_halves {
  static constexpr bool LARGE = WIDTH > 128;
  static constexpr int FOLD = EXTRAS || LARGE ? 1 : 2, KEYS = LARGE ? 32 : 64,
                       STAGES = FOLD == 2 && WIDTH == 128 ? 1 : 2, PACKED_RESIDENT = LARGE ? 3 : 6;
  typedef forward_shape<P, WIDTH, WIDTH, FOLD, 4, KEYS, STAGES, 2, EXTRAS, false> whole;
  typedef forward_shape<P, WIDTH, WIDTH, 1, 1, 64, 1, PACKED_RESIDENT, false, true> packed;
};

template <int WIDTH, bool EXTRAS>
struct forward_choice<products_bf16, WIDTH, EXTRAS> : forward_choice_halves<products_bf16, WIDTH, EXTRAS> {};

template <int WIDTH, bool EXTRAS>
struct forward_choice<products_f16, WIDTH, EXTRAS> : forward_choice_halves<products_f16, WIDTH, EXTRAS> {};

// Twice 16 queries a warp halve what splitting keys and values costs.
template <int WIDTH, bool EXTRAS>
struct forward_choice<products_f32, WIDTH, EXTRAS> {
  typedef products_f32 P;
  static constexpr bool DOUBLE = WIDTH < 256 && !EXTRAS;
  static constexpr int FOLD = DOUBLE ? 2 : 1, STAGES = WIDTH == 256 || (DOUBLE && WIDTH == 128) ? 1 : 2;
  static constexpr int KEYS = WIDTH == 64 ? 64 : WIDTH == 128 ? 32 : 16;
  static constexpr int RESIDENT = WIDTH == 256 ? 1 : 2, PACKED_RESIDENT = WIDTH == 256 ? 2 : 5;
  typedef forward_shape<P, WIDTH, WIDTH, FOLD, 4, KEYS, STAGES, RESIDENT, EXTRAS, false> whole;
  typedef forward_shape<P, WIDTH, WIDTH, 1, 1, 32, 1, PACKED_RESIDENT, false, true> packed;
};

// Of 256 columns o would not fit the registers. One kernel for all options is enough.
template <int WIDTH, bool EXTRAS>
struct forward_choice<products_f64, WIDTH, EXTRAS> {
  typedef products_f64 P;
  static constexpr int VALUE_WIDTH = WIDTH == 256 ? 128 : WIDTH, KEYS = WIDTH == 64 ? 32 : 16;
  static constexpr int WARPS = WIDTH == 256 ? 1 : 4, PACKED_RESIDENT = WIDTH == 256 ? 2 : 4;
  typedef forward_shape<P, WIDTH, VALUE_WIDTH, 1, WARPS, KEYS, 1, 1, true, false> whole;
  typedef forward_shape<P, WIDTH, VALUE_WIDTH, 1, 1, 16, 1, PACKED_RESIDENT, false, true> packed;
};

// Whether the kernels without EXTRAS do. They multiply by the scale at the end, which must not turn peaks around, nor
// -inf into NaN.
static inline bool plain_forward(const sa_problem &p) {
  return plain_scores(p) && p.scale >= 0x1p-16 && !(p.dropout > 0) && !p.weights.data;
}

// Few enough queries for their heads to share blocks, and nothing but a mask.
static inline bool forward_packs(const forward_job &job) {
  const sa_problem &p = job.p;
  return plain_forward(p) && job.plan.heads == 1 && job.plan.row_tiles == 1 && job.group * p.queries <= 64;
}

// Instantiated in portable_forward_<dtype>_<width>.cu, a file each, as compiling one takes long enough.
template <class P, int WIDTH>
int sa_cuda_forward(forward_job &job, cudaStream_t stream) {
  if (forward_packs(job)) return launch_forward<typename forward_choice<P, WIDTH, false>::packed>(job, stream);
  if (plain_forward(job.p)) return launch_forward<typename forward_choice<P, WIDTH, false>::whole>(job, stream);
  return launch_forward<typename forward_choice<P, WIDTH, true>::whole>(job, stream);
}

#endif
