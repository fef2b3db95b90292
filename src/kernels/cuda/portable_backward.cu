// the backward pass on mma.sync: what is known per query, the sums of the extras, and the choice of kernels
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/portable_backward.cuh"
#include "kernels/cuda/portable_backward_rows.cuh"

template <class Element, class Real>
static __global__ void __launch_bounds__(256)
    prepare_rows(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                 const __grid_constant__ backward_rows<Real> rows) {
  prepare_block<Element, Real, 32>(p, plan, rows, false, blockIdx.x);
}

// A gradient of shape [H]: the shares of all queries, summed in order.
template <class Real>
static __global__ void __launch_bounds__(256)
    sum_shares(const __grid_constant__ sa_problem p, const __grid_constant__ sa_operand to, const Real *shares,
               int64_t padded) {
  const int64_t head = blockIdx.x;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < p.batch * p.queries; k += 256)
    sum += shares[(k / p.queries * p.heads + head) * padded + k % p.queries];
  sum = over_lanes<32>(sum);
  __shared__ double warps[8];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int k = 1; k < 8; k++) sum += warps[k];
  write_operand(to, head * to.stride[1], sum);
}

// dBias, the sum of its parts [parts][bias].
template <class Real>
static __global__ void __launch_bounds__(256)
    sum_bias_parts(const __grid_constant__ sa_problem p, const Real *sums, int64_t parts, int64_t count) {
  for (int64_t k = blockIdx.x * (int64_t)256 + threadIdx.x; k < count; k += gridDim.x * (int64_t)256) {
    double sum = 0;
    for (int64_t part = 0; part < parts; part++) sum += sums[part * count + k];
    const int64_t *shape = p.bias_shape, *stride = p.dbias.stride;
    const int64_t key = k % shape[3], row = k / shape[3], query = row % shape[2], plane = row / shape[2];
    write_operand(p.dbias,
                  plane / shape[1] * stride[0] + plane % shape[1] * stride[1] + query * stride[2] + key * stride[3],
                  sum);
  }
}

int sa_cuda_sum_bias_parts(const sa_problem &p, cudaStream_t stream, int64_t parts, int64_t count, const void *sums) {
  const int64_t blocks = (count + 255) / 256;
  const dim3 grid(blocks < 65536 ? (unsigned)blocks : 65536u);
  if (p.dtype == SA_F64)
    return sa_cuda_launch(backward_name, sum_bias_parts<double>, grid, dim3(256), 0, stream, p, (const double *)sums,
                          parts, count);
  return sa_cuda_launch(backward_name, sum_bias_parts<float>, grid, dim3(256), 0, stream, p, (const float *)sums, parts,
                        count);
}

template <class Real>
static Real *take(char **memory, int64_t count) {
  Real *taken = (Real *)*memory;
  *memory += (count * (int64_t)sizeof(Real) + 255) / 256 * 256;
  return taken;
}

template <class Real>
struct width_kernels {
  int (*up_to_64)(const backward_job &job, const backward_rows<Real> &rows);
  int (*up_to_128)(const backward_job &job, const backward_rows<Real> &rows);
  int (*up_to_256)(const backward_job &job, const backward_rows<Real> &rows);
};

static const width_kernels<float> of_bf16 = {sa_cuda_backward_bf16_64, sa_cuda_backward_bf16_128,
                                             sa_cuda_backward_bf16_256},
                                  of_f16 = {sa_cuda_backward_f16_64, sa_cuda_backward_f16_128,
                                            sa_cuda_backward_f16_256},
                                  of_f32 = {sa_cuda_backward_f32_64, sa_cuda_backward_f32_128,
                                            sa_cuda_backward_f32_256};
static const width_kernels<double> of_f64 = {sa_cuda_backward_f64_64, sa_cuda_backward_f64_128,
                                             sa_cuda_backward_f64_256};

template <class Element, class Real>
static int run_backward(const backward_job &job, const width_kernels<Real> &kernels) {
  const sa_problem &p = job.p;
  backward_rows<Real> rows = {};
  rows.padded = (p.queries + SA_TILE - 1) / SA_TILE * SA_TILE;
  const int64_t count = p.batch * p.heads * rows.padded, blocks = count / BACKWARD_BLOCK;
  char *const scratch =
      (char *)sa_cuda_scratch(backward_name, p.device, 5 * (count * (int64_t)sizeof(Real) + 256) + blocks * 4 + 256);
  if (!scratch) return SA_NO_MEMORY;
  char *memory = scratch;
  rows.base = take<Real>(&memory, count);
  rows.factor = take<Real>(&memory, count);
  rows.delta = take<Real>(&memory, count);
  if (p.dsinks.data) rows.sink_share = take<Real>(&memory, count);
  if (p.dalibi.data) rows.slope_share = take<Real>(&memory, count);
  rows.coarse = take<int>(&memory, blocks);
  rows.dweight_gain = (float)uncut(p.value_width);
  unsigned grid;
  int status = backward_grid(blocks, &grid);
  if (!status && grid)
    status = sa_cuda_launch(backward_name, prepare_rows<Element, Real>, dim3(grid), dim3(256), 0, job.stream, p,
                            job.plan, rows);
  const int64_t width = p.width > p.value_width ? p.width : p.value_width;
  if (!status)
    status = width <= 64    ? kernels.up_to_64(job, rows)
             : width <= 128 ? kernels.up_to_128(job, rows)
                            : kernels.up_to_256(job, rows);
  if (!status && p.dsinks.data && p.heads)
    status = sa_cuda_launch(backward_name, sum_shares<Real>, dim3((unsigned)p.heads), dim3(256), 0, job.stream, p,
                            p.dsinks, (const Real *)rows.sink_share, rows.padded);
  if (!status && p.dalibi.data && p.heads)
    status = sa_cuda_launch(backward_name, sum_shares<Real>, dim3((unsigned)p.heads), dim3(256), 0, job.stream, p,
                            p.dalibi, (const Real *)rows.slope_share, rows.padded);
  sa_cuda_scratch_release(p.device, scratch);
  return status;
}

int sa_cuda_portable_backward(const sa_problem *p) {
  backward_job job = {};
  const int status = sa_cuda_use(backward_name, p->device, &job.stream);
  if (status) return status;
  const sa_device_plan *plan = sa_cuda_plan(backward_name, p->plan, p->device);
  if (!plan) return SA_NO_MEMORY;
  const int bytes = p->dtype == SA_F64 ? 8 : p->dtype == SA_F32 ? 4 : 2;
  // Rows of 2 KiB: 16 of each side do not fit the 99 KiB of a block on devices for graphics.
  const int64_t width = p->width > p->value_width ? p->width : p->value_width;
  if (width * bytes > 1024 && sa_cuda_properties_of(p->device)->shared_bytes < 132 << 10)
    return sa_cuda_reference_backward(p);
  job.p = *p;
  job.plan = *plan;
  job.aligned.q = rows_aligned(p->q, bytes);
  job.aligned.k = rows_aligned(p->k, bytes);
  job.aligned.v = rows_aligned(p->v, bytes);
  job.aligned.dout = rows_aligned(p->dout, bytes);
  job.aligned.out = rows_aligned(p->out, bytes);
  if (sa_cuda_portable_backward_small(p)) return sa_cuda_backward_small(job);
  switch (p->dtype) {
    case SA_BF16:
      return run_backward<__nv_bfloat16, float>(job, of_bf16);
    case SA_F16:
      return run_backward<__half, float>(job, of_f16);
    case SA_F32:
      return run_backward<float, float>(job, of_f32);
    default:
      return run_backward<double, double>(job, of_f64);
  }
}
