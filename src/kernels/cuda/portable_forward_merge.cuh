// parts of the keys of the forward pass, brought to one peak and added
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_MERGE_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_MERGE_CUH
#include "kernels/cuda/portable_forward_ends.cuh"

enum { MERGE_WARPS = 8, MERGE_PARTS = 256 };

// A block a row: the parts of its keys, brought to one peak and added. What a part is multiplied by is found once, by a
// thread; then each warp takes every eighth part, 16 bytes a lane, many at once, as they are few numbers far apart. The
// warps' sums are added in their order.
template <class P, int WIDTH>
static __global__ void __launch_bounds__(32 * MERGE_WARPS) merge_kernel(const __grid_constant__ forward_job job) {
  typedef typename P::element element;
  typedef typename P::real real;
  enum { EACH = 16 / (int)sizeof(real), PIECES = WIDTH / EACH / 32 ? WIDTH / EACH / 32 : 1 };
  struct alignas(16) piece {
    real x[EACH];
  };
  __shared__ piece column_sum[MERGE_WARPS][WIDTH / EACH];
  __shared__ real factor[MERGE_PARTS];
  const sa_problem &p = job.p;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int64_t item = blockIdx.x / job.queries;
  const int row = (int)(blockIdx.x % job.queries), width = job.width;
  const forward_block block = block_of_item(job, item, job.packed, job.queries);
  if (block.query + row >= block_rows(job, job.packed)) return;
  const int64_t first = item * job.parts * job.queries + row;
  const real unit = plain_scores(p) ? 1 : (real)1.4426950408889634;
  // Every warp looks at all parts, and sums them in the same order.
  enum { LOOKS = MERGE_PARTS / 32 };
  real peaks[LOOKS], sums[LOOKS], peak = -(real)INFINITY;
  bool alive = false;
#pragma unroll
  for (int k = 0; k < LOOKS; k++) {
    const int part = lane + 32 * k;
    const int64_t at = first + (int64_t)part * job.queries;
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
    const piece *from = (const piece *)((const real *)job.part_out + (first + (int64_t)part * job.queries) * width);
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
  place_row(job, block, job.packed, row, head, query);
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

#endif
