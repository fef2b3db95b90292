// the fused backward on mma.sync, for any dtype: its shapes and launches
//
// Half types without options go by portable_backward_once.cuh. The rest is deterministic without atomics and without
// turns: one kernel owns keys (dK and dV stay in registers while it walks the queries of all heads that share them),
// one owns queries (dQ, and the slopes of ALiBi), one owns tiles of the bias. Each makes the scores it needs again,
// with the very bits of the forward: 7 products of matrices instead of 5, and in return no second copy of dQ and no
// block that waits for another. Rows of f32 that many blocks load are split before (portable_backward_split.cuh).
//
// P^T and dS^T never leave the registers there: an accumulator of mma.sync is the left operand of the next one.
//
// 0 * NaN could leak through the products that sum over pairs: P^T dO into dV, dS^T Q into dK, dS K into dQ. What comes
// out not finite, of pairs of which some were masked, is made once more with 0 in place of what is not finite in dO, Q
// and K in these products; then it is given to the pairs that see it.
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_CUH
#include <limits.h>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/columns.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/portable_backward_bases.cuh"
#include "kernels/cuda/portable_backward_bias.cuh"
#include "kernels/cuda/portable_backward_keys.cuh"
#include "kernels/cuda/portable_backward_once.cuh"

static const char backward_name[] = "sa_backward";

// Columns of keys that get shorter and have so many tiles in the mean, past all heads of a group, are taken from the
// longest on.
enum { ONCE_DESCENDED_TILES = 2 };

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
  static constexpr int QUERIES = 16 * QUERY_WARPS;
  // Columns of gradients that a block has in its registers; blocks share the width when they are fewer.
  static constexpr int KEY_SLICE = KEY_SLICE_, QUERY_SLICE = QUERY_SLICE_;
  static constexpr int KEY_SLICES = WIDTH_ / KEY_SLICE, QUERY_SLICES = WIDTH_ / QUERY_SLICE;
};

// Of how many key heads the rows are split at once; 0: they are not worth it, as too few blocks load them. What a head
// takes is `bytes`, and all together no more than dQ, or 64 MiB, so that small calls go in one piece.
static inline int64_t split_heads(const backward_job &job, int64_t bytes, int row_bytes) {
  constexpr int64_t SEEN_BY_EACH = 384, ENOUGH = 64 << 20;
  const sa_problem &p = job.p;
  const double planes = (double)p.plan->batch * (double)p.plan->heads;
  const double least = planes * (double)((p.queries > p.keys ? p.queries : p.keys) * SEEN_BY_EACH);
  if (!p.heads || !(least > 0) || (double)p.plan->visible < least) return 0;
  const int64_t all = p.batch * p.key_heads, dq = p.batch * p.heads * job.plan.row_tiles * SA_TILE * row_bytes;
  const int64_t fitting = (dq > ENOUGH ? dq : ENOUGH) / bytes;
  if (!fitting) return 0;
  const int64_t parts = (all + fitting - 1) / fitting;
  return (all + parts - 1) / parts;
}

// The heads of the side that blocks walk: of queries, with Q and dO, or of keys, with K and V.
typedef struct split_side {
  bool queries;
  int64_t group, rows;  // heads to a key head, and their rows
} split_side;

static inline split_side split_side_of(const backward_job &job, bool queries) {
  const int64_t group = queries && job.p.key_heads ? job.p.heads / job.p.key_heads : 1;
  return split_side{queries, group, group * (queries ? job.plan.row_tiles : job.plan.col_tiles) * SA_TILE};
}

// Calls launch(first, end, split) for the key heads of all batches, `each` at a time, whose rows it has split before.
template <class P, int ROW, class Launch>
static int launch_split_heads(const backward_job &job, const split_side &side, int64_t each, int64_t bytes,
                              const Launch &launch) {
  const sa_problem &p = job.p;
  char *const memory = (char *)sa_cuda_scratch(backward_name, p.device, each * bytes);
  if (!memory) return SA_NO_MEMORY;
  const int64_t group = p.heads / p.key_heads;
  split_sources from = {{p.k, p.v}, {job.aligned.k, job.aligned.v}, false, p.key_heads, group,
                        p.keys,     {p.width, p.value_width}};
  if (side.queries)
    from = {{p.q, p.dout}, {job.aligned.q, job.aligned.dout}, true, p.heads, 1, p.queries, {p.width, p.value_width}};
  split_operands to = {};
  to.padded = side.rows / side.group;
  for (int n = 0; n < 2; n++) {
    to.rows[n] = memory + n * each * side.rows * ROW;
    to.scale[n] = (float *)(memory + 2 * each * side.rows * ROW) + n * each * side.rows;
  }
  const int64_t all = p.batch * p.key_heads;
  int status = SA_OK;
  for (int64_t first = 0; first < all && !status; first += each) {
    const int64_t end = all - first < each ? all : first + each;
    to.first_head = first * side.group;
    unsigned grid;
    status = backward_grid((end - first) * side.rows / SPLIT_ROWS, &grid);
    if (!status)
      status = sa_cuda_launch(backward_name, split_before<P, ROW>, dim3(grid, 2), dim3(SPLIT_THREADS),
                              SPLIT_ROWS * (ROW + (int)sizeof(float)), job.stream, job.plan, from, to);
    if (!status) status = launch(first, end, to);
  }
  sa_cuda_scratch_release(p.device, memory);
  return status;
}

// The same, of products that want rows split and where that is worth it; else once, of all heads.
template <class P, int ROW, class Launch>
static int launch_split(const backward_job &job, bool queries, const Launch &launch) {
  if constexpr (P::SPLIT) {
    const split_side side = split_side_of(job, queries);
    const int64_t bytes = side.rows * 2 * (ROW + (int64_t)sizeof(float)), each = split_heads(job, bytes, ROW);
    if (each) return launch_split_heads<P, ROW>(job, side, each, bytes, launch);
  }
  return launch((int64_t)0, job.p.batch * job.p.key_heads, split_operands{});
}

// Launches a kernel for `each` blocks a key head of every batch, which walk the queries or the keys, and its careful
// one where something can leak.
template <class P, int ROW, class Kernel, class Careful>
static int launch_side(const backward_job &job, const backward_rows<typename P::real> &rows, bool walk_queries,
                       int64_t each, int threads, int shared, Kernel kernel, Careful careful) {
  const sa_problem &p = job.p;
  const int64_t blocks = p.batch * p.key_heads * each;
  if (!blocks) return SA_OK;
  uint8_t *suspects = NULL;
  if (P::SPLIT || p.bias.data || job.plan.partial) {
    suspects = (uint8_t *)sa_cuda_scratch(backward_name, p.device, blocks);
    if (!suspects) return SA_NO_MEMORY;
  }
  int status = launch_split<P, ROW>(job, walk_queries, [&](int64_t first, int64_t end, const split_operands &split) {
    unsigned grid;
    const int refused = backward_grid((end - first) * each, &grid);
    if (refused) return refused;
    return sa_cuda_launch(backward_name, kernel, dim3(grid), dim3(threads), shared, job.stream, p, job.plan, rows,
                          job.aligned, split, first * each, suspects);
  });
  if (suspects) {
    if (!status)
      status = sa_cuda_launch<true>(backward_name, careful, dim3(redo_grid(p.device, blocks, 1)), dim3(threads), shared,
                                    job.stream, p, job.plan, rows, job.aligned, suspects, blocks);
    sa_cuda_scratch_release(p.device, suspects);
  }
  return status;
}

template <class C, bool GENERAL>
static int launch_keys(const backward_job &job, const backward_rows<typename C::products::real> &rows) {
  typedef typename C::products P;
  constexpr int WARPS = C::KEY_WARPS, STEP = C::KEY_STEP, STAGES = C::KEY_STAGES, SLICE = C::KEY_SLICE;
  return launch_side<P, C::ROW>(job, rows, true, job.plan.col_tiles * (SA_TILE / (16 * WARPS)) * C::KEY_SLICES,
                                32 * WARPS, key_room<P, C::ROW, WARPS, STEP, STAGES>::BYTES,
                                backward_keys<P, C::ROW, WARPS, STEP, STAGES, SLICE, GENERAL>,
                                careful_backward_keys<P, C::ROW, WARPS, STEP, STAGES, SLICE, GENERAL>);
}

template <class C, bool GENERAL>
static int launch_queries(const backward_job &job, const backward_rows<typename C::products::real> &rows) {
  typedef typename C::products P;
  constexpr int WARPS = C::QUERY_WARPS, STEP = C::QUERY_STEP, STAGES = C::QUERY_STAGES, SLICE = C::QUERY_SLICE;
  // Without key heads there are no queries' heads either.
  const int64_t group = job.p.key_heads ? job.p.heads / job.p.key_heads : 0;
  return launch_side<P, C::ROW>(job, rows, false, group * job.plan.row_tiles * (SA_TILE / C::QUERIES) * C::QUERY_SLICES,
                                32 * WARPS, query_room<P, C::ROW, C::QUERIES, STEP, STAGES>::BYTES,
                                backward_queries<P, C::ROW, WARPS, STEP, STAGES, SLICE, GENERAL>,
                                careful_backward_queries<P, C::ROW, WARPS, STEP, STAGES, SLICE, GENERAL>);
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

template <class C>
static int launch_bias(const backward_job &job, const backward_rows<typename C::products::real> &rows) {
  typedef typename C::products::real Real;
  typedef query_room<typename C::products, C::ROW, 16 * C::QUERY_WARPS, C::QUERY_STEP, 1> room;
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
  if (!status && sums.sums) status = sa_cuda_sum_bias_parts(p, job.stream, sums.parts, sums.count, sums.sums);
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

template <class C>
static int launch_once(const backward_job &job, const backward_rows<float> &rows) {
  const sa_problem &p = job.p;
  backward_sums sums = {};
  sums.jobs = p.batch * p.key_heads * job.plan.col_tiles * C::PARTS;
  const int64_t group = p.heads / p.key_heads;
  sums.descending = (group == 1 || p.plan->heads == 1) && sa_columns_shrink(p.plan, group, ONCE_DESCENDED_TILES);
  sums.abreast = sums.descending ? (int)group : 1;
  // Each head has some eight columns at work then, or multiprocessors: more wait for each other where they begin.
  sums.mixed = sa_cuda_properties_of(p.device)->processors * (sums.descending ? C::RESIDENT : 1) / 8;
  if (sums.mixed < 1) sums.mixed = 1;
  // Without a width a product is an empty sum, whatever 1/sqrt(0) makes of the scale.
  sums.scale_log2 = p.width ? (float)(score_scale(p) * 1.4426950408889634) : 0;
  unsigned grid;
  int status = backward_grid(sums.jobs, &grid);
  if (status) return status;
  const int64_t chunks = p.dq.data ? p.batch * p.heads * rows.padded / C::QUERIES : 0;
  const int64_t sum_bytes = chunks * C::QUERIES * C::WIDTH * 4;
  const int64_t zero_bytes = (chunks * (C::WARPS + 1) + sums.jobs + 3) * 4;
  char *const memory = (char *)sa_cuda_scratch(backward_name, p.device, sum_bytes + zero_bytes);
  if (!memory) return SA_NO_MEMORY;
  sums.sums = (float *)memory;
  sums.turn = (int *)(memory + sum_bytes);
  sums.bad_query = sums.turn + chunks * C::WARPS;
  sums.bad_key = sums.bad_query + chunks;
  sums.flagged = sums.bad_key + sums.jobs;
  sums.next_job = sums.flagged + 1;
  status = sa_cuda_check(backward_name, cudaMemsetAsync(sums.turn, 0, (size_t)zero_bytes, job.stream));
  if (!status)
    status = sa_cuda_launch(backward_name, backward_once<C, false>, dim3(grid), dim3(C::THREADS), C::SHARED, job.stream,
                            p, job.plan, rows, job.aligned, sums);
  // Without a masked pair nothing can leak.
  if (!status && job.plan.partial)
    status = sa_cuda_launch<true>(backward_name, backward_once<C, true>, dim3(grid), dim3(C::THREADS), C::SHARED,
                                  job.stream, p, job.plan, rows, job.aligned, sums);
  sa_cuda_scratch_release(p.device, memory);
  return status;
}

// The kernels for what has no option that acts on scores or weights: whether they do, and their launches.
template <class PLAIN>
struct plain_kernels {
  typedef backward_rows<typename PLAIN::products::real> known;
  static bool fit(const backward_job &, const known &) { return true; }
  static int launch(const backward_job &job, const known &rows) { return launch_gradients<PLAIN, false>(job, rows); }
};

template <class Half, int WIDTH, int WARPS, int DOUT_STAGES, int RESIDENT>
struct plain_kernels<once_shape<Half, WIDTH, WARPS, DOUT_STAGES, RESIDENT>> {
  typedef once_shape<Half, WIDTH, WARPS, DOUT_STAGES, RESIDENT> shape;
  typedef backward_rows<float> known;

  static bool fit(const backward_job &job, const known &rows) {
    const sa_problem &p = job.p;
    // Without keys nobody writes dQ, without heads nobody dK.
    if (!p.key_heads || !p.heads || !p.keys) return false;
    if (sa_cuda_properties_of(p.device)->shared_bytes < shape::SHARED) return false;
    if (p.queries > INT_MAX / 2 || p.keys > INT_MAX / 2) return false;
    const int64_t chunks = p.batch * p.heads * rows.padded / shape::QUERIES;
    // Sums of many short heads are mostly padding.
    if (p.queries < shape::QUERIES && chunks * shape::QUERIES * WIDTH * 4 > (int64_t)1 << 30) return false;
    return chunks * WARPS <= INT_MAX;
  }

  static int launch(const backward_job &job, const known &rows) { return launch_once<shape>(job, rows); }
};

template <class PLAIN>
static bool launch_if_fit(const backward_job &job, const typename plain_kernels<PLAIN>::known &rows, int *status) {
  if (!plain_kernels<PLAIN>::fit(job, rows)) return false;
  *status = plain_kernels<PLAIN>::launch(job, rows);
  return true;
}

// The first of PLAIN that fits serves what has no option that acts on scores or weights, GENERAL the rest.
template <class GENERAL, class... PLAIN>
static int launch_backward(const backward_job &job, const backward_rows<typename GENERAL::products::real> &rows) {
  int status = launch_bases<GENERAL>(job, rows);
  if (status) return status;
  [[maybe_unused]] const bool plain = plain_scores(job.p) && !(job.p.dropout > 0);
  if ((... || (plain && launch_if_fit<PLAIN>(job, rows, &status)))) return status;
  status = launch_gradients<GENERAL, true>(job, rows);
  if (!status && job.p.dbias.data) status = launch_bias<GENERAL>(job, rows);
  return status;
}

// Of portable_backward_small.cu: all of a pass that sa_cuda_portable_backward_small is true of.
int sa_cuda_backward_small(const backward_job &job);

// Of portable_backward_<dtype>*.cu: the kernels of one dtype, for widths up to that.
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
