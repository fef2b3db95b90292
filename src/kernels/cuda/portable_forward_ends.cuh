// how the rows of the forward pass end: out, LSE, dead rows, weights, and what a part of the keys leaves
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_ENDS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_ENDS_CUH
#include "kernels/cuda/portable_forward_products.cuh"
#include "kernels/cuda/portable_forward_softmax.cuh"

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
  // In one rounding, where the peak is the row's own.
  end.lse = top == peak * natural ? fma(peak, natural, log(sum)) : top + log(sum);
  // A sink above the row's own peak takes what was gathered down.
  end.scale = end.factor * kept * (end.base == peak ? 1 : exp((peak - end.base) * natural));
  return end;
}

static __device__ __forceinline__ row_end end_dead_row(bool has_sink, double sink) {
  return row_end{INFINITY, 0, has_sink ? sink : -INFINITY, 0};
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

// Ends the rows of a block: o becomes out, LSE and dead are written; base and factor are what weights are made of.
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
      const bool inside = block.query + row < block_rows(job, C::PACKED);
      int64_t head, query;
      place_row(job, block, C::PACKED, row, head, query);
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
    if (block.query + row >= block_rows(job, C::PACKED) || column >= p.value_width) continue;
    int64_t head, query;
    place_row(job, block, C::PACKED, row, head, query);
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
      real *out = (real *)job.part_out + row * job.width + block.value_part * C::VALUE_WIDTH + 2 * t;
#pragma unroll
      for (int n = 0; n < C::COLUMNS; n++) put_pair(out + 8 * n, got.o[f][n].d[2 * half], got.o[f][n].d[2 * half + 1]);
    }
}

// What the weights of the block's rows are made of, for the kernel that writes them.
template <class C>
static __device__ __forceinline__ void keep_ends(const forward_job &job, const forward_block &block,
                                                 const typename C::real (&base)[C::FOLD][2],
                                                 const typename C::real (&factor)[C::FOLD][2]) {
  typedef typename C::real real;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int64_t query = block.query + lane_row<C>(f, half);
      if (query >= job.p.queries || threadIdx.x % 4) continue;
      const int64_t row = kept_row(job, block, query);
      ((real *)job.row_base)[row] = base[f][half];
      ((real *)job.row_factor)[row] = factor[f][half];
    }
}

#endif
