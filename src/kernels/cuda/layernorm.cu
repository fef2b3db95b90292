// layer normalisation of the last dim and its gradient on CUDA devices: in f64, a group of threads a row
#include "kernels/cuda/group.cuh"
#include "kernels/cuda/operations.cuh"

typedef struct moments {
  double mean, scale;  // scale = 1 / sqrt(variance + epsilon)
} moments;

// The variance in a second pass: from the sum of squares it would cancel.
template <class T>
static __device__ __forceinline__ moments moments_of(const T *x, int64_t length, int64_t step, double epsilon,
                                                     bool live, int lane, int group) {
  double sum = 0, squares = 0;
  for (int64_t i = lane; live && i < length; i += group) sum += (double)sa_wide(x[i * step]);
  const double mean = sa_group_sum(sum, group) / (double)length;
  for (int64_t i = lane; live && i < length; i += group) {
    const double v = (double)sa_wide(x[i * step]) - mean;
    squares += v * v;
  }
  return {mean, 1 / sqrt(sa_group_sum(squares, group) / (double)length + epsilon)};
}

template <class T>
static sa_line<const T> line_or_none(const sa_tensor *t) {
  if (!t) return {NULL, 0, 0};
  return sa_line_of<const T>(t, t->ndim - 1);
}

template <class T>
static __global__ void __launch_bounds__(SA_GROUP_THREADS)
    forward_kernel(sa_strided rows, sa_line<T> y, sa_line<const T> x, sa_line<const T> weight, sa_line<const T> bias,
                   double epsilon, int group) {
  const int lane = threadIdx.x & (group - 1);
  SA_EACH_ITEM(item, live, rows.numel, group) {
    int64_t at[2] = {0, 0};
    if (live) sa_locate<2>(rows, item, at);
    const moments m = moments_of(x.data + at[1], x.length, x.step, epsilon, live, lane, group);
    for (int64_t i = lane; live && i < x.length; i += group) {
      double out = ((double)sa_wide(x.data[at[1] + i * x.step]) - m.mean) * m.scale;
      if (weight.data) out *= (double)sa_wide(weight.data[i * weight.step]);
      if (bias.data) out += (double)sa_wide(bias.data[i * bias.step]);
      sa_put(y.data + at[0] + i * y.step, out);
    }
  }
}

int sa_cuda_layernorm(const sa_tensor *x, const sa_tensor *weight, const sa_tensor *bias, double epsilon,
                      const sa_tensor *y) {
  const int dim = x->ndim - 1;
  const sa_strided rows = sa_walk_of(y, x, NULL, NULL, UINT32_C(1) << dim);
  if (rows.numel == 0 || x->shape[dim] == 0) return SA_OK;
  cudaStream_t stream;
  const int status = sa_cuda_use("sa_layernorm", x->device, &stream);
  if (status) return status;
  const int group = sa_group_size(x->shape[dim], rows.numel, false);
  return sa_with_float(x->dtype, [&](auto t) {
    using T = decltype(t);
    return sa_cuda_launch("sa_layernorm", forward_kernel<T>, dim3(sa_group_blocks(x->device, rows.numel, group)),
                          dim3(SA_GROUP_THREADS), 0, stream, rows, sa_line_of<T>(y, dim), sa_line_of<const T>(x, dim),
                          line_or_none<T>(weight), line_or_none<T>(bias), epsilon, group);
  });
}

/*  The gradient: dx = scale (g - mean of g - n mean of g n), g = dy weight, n = (x - mean) scale  */

template <class T>
static __global__ void __launch_bounds__(SA_GROUP_THREADS)
    slope_kernel(sa_strided rows, sa_line<T> dx, sa_line<const T> x, sa_line<const T> dy, sa_line<const T> weight,
                 double epsilon, int group, moments *kept) {
  const int lane = threadIdx.x & (group - 1);
  SA_EACH_ITEM(item, live, rows.numel, group) {
    int64_t at[3] = {0, 0, 0};
    if (live) sa_locate<3>(rows, item, at);
    const moments m = moments_of(x.data + at[1], x.length, x.step, epsilon, live, lane, group);
    if (live && kept && lane == 0) kept[item] = m;
    if (!dx.data) continue;
    double sum = 0, products = 0;
    for (int64_t i = lane; live && i < x.length; i += group) {
      const double n = ((double)sa_wide(x.data[at[1] + i * x.step]) - m.mean) * m.scale;
      const double g = (double)sa_wide(dy.data[at[2] + i * dy.step]) *
                       (weight.data ? (double)sa_wide(weight.data[i * weight.step]) : 1);
      sum += g;
      products += g * n;
    }
    const double mean = sa_group_sum(sum, group) / (double)x.length;
    const double product_mean = sa_group_sum(products, group) / (double)x.length;
    for (int64_t i = lane; live && i < x.length; i += group) {
      const double n = ((double)sa_wide(x.data[at[1] + i * x.step]) - m.mean) * m.scale;
      const double g = (double)sa_wide(dy.data[at[2] + i * dy.step]) *
                       (weight.data ? (double)sa_wide(weight.data[i * weight.step]) : 1);
      sa_put(dx.data + at[0] + i * dx.step, m.scale * (g - mean - n * product_mean));
    }
  }
}

// sums[block][0]: of dy n over the block's rows, per column; sums[block][1]: of dy.
template <class T>
static __global__ void __launch_bounds__(SA_GROUP_THREADS)
    sum_kernel(sa_strided rows, sa_line<const T> x, sa_line<const T> dy, const moments *kept, int64_t blocks,
               int64_t rows_each, double *sums) {
  const int64_t count = blocks * x.length, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t block = i / x.length, column = i - block * x.length, first = block * rows_each;
    const int64_t last = first + rows_each < rows.numel ? first + rows_each : rows.numel;
    double dweight = 0, dbias = 0;
    for (int64_t row = first; row < last; row++) {
      int64_t at[3];
      sa_locate<3>(rows, row, at);
      const moments m = kept[row];
      const double slope = (double)sa_wide(dy.data[at[2] + column * dy.step]);
      dweight += slope * (((double)sa_wide(x.data[at[1] + column * x.step]) - m.mean) * m.scale);
      dbias += slope;
    }
    sums[2 * block * x.length + column] = dweight;
    sums[(2 * block + 1) * x.length + column] = dbias;
  }
}

// The partial sums of all blocks, in their order.
template <class T>
struct finish_task {
  T *to;
  const double *sums;
  int64_t blocks, length;
  __device__ void operator()(int64_t i, const int64_t *at) const {
    double sum = 0;
    for (int64_t block = 0; block < blocks; block++) sum += sums[2 * block * length + i];
    sa_put(to + at[0], sum);
  }
};

enum { BLOCKS = 256 };  // at most so many partial sums: a number of the shape, never of the device

template <class T>
static int add_up(const sa_tensor *x, const sa_tensor *dy, const sa_tensor *dweight, const sa_tensor *dbias,
                  const sa_strided &rows, const moments *kept, cudaStream_t stream) {
  const int dim = x->ndim - 1;
  const int64_t length = x->shape[dim], least = (rows.numel + BLOCKS - 1) / BLOCKS;
  const int64_t rows_each = least < 16 ? 16 : least, blocks = (rows.numel + rows_each - 1) / rows_each;
  double *sums = (double *)sa_cuda_scratch("sa_layernorm_backward", x->device, blocks * 2 * length * 8);
  if (!sums) return SA_NO_MEMORY;
  int status = SA_OK;
  if (blocks > 0)
    status =
        sa_cuda_launch("sa_layernorm_backward", sum_kernel<T>,
                       dim3((unsigned)sa_cuda_blocks(x->device, blocks * length)), dim3(SA_GROUP_THREADS), 0, stream,
                       rows, sa_line_of<const T>(x, dim), sa_line_of<const T>(dy, dim), kept, blocks, rows_each, sums);
  if (!status && dweight)
    status = sa_cuda_each<1>("sa_layernorm_backward", x->device, sa_walk_of(dweight),
                             finish_task<T>{(T *)dweight->data, sums, blocks, length});
  if (!status && dbias)
    status = sa_cuda_each<1>("sa_layernorm_backward", x->device, sa_walk_of(dbias),
                             finish_task<T>{(T *)dbias->data, sums + length, blocks, length});
  sa_cuda_scratch_release(x->device, sums);
  return status;
}

int sa_cuda_layernorm_backward(const sa_tensor *x, const sa_tensor *weight, double epsilon, const sa_tensor *dy,
                               const sa_tensor *dx, const sa_tensor *dweight, const sa_tensor *dbias) {
  const int dim = x->ndim - 1;
  const sa_strided rows = sa_walk_of(dx ? dx : x, x, dy, NULL, UINT32_C(1) << dim, false);
  if (x->shape[dim] == 0) return SA_OK;
  cudaStream_t stream;
  int status = sa_cuda_use("sa_layernorm_backward", x->device, &stream);
  if (status) return status;
  moments *kept = NULL;
  const bool wants_sums = dweight || dbias;
  if (wants_sums) {
    kept = (moments *)sa_cuda_scratch("sa_layernorm_backward", x->device, rows.numel * (int64_t)sizeof *kept);
    if (!kept) return SA_NO_MEMORY;
  }
  const int group = sa_group_size(x->shape[dim], rows.numel, false);
  status = sa_with_float(x->dtype, [&](auto t) {
    using T = decltype(t);
    int done = SA_OK;
    const sa_line<T> slopes = dx ? sa_line_of<T>(dx, dim) : sa_line<T>{NULL, 0, 0};
    if (rows.numel > 0)
      done =
          sa_cuda_launch("sa_layernorm_backward", slope_kernel<T>, dim3(sa_group_blocks(x->device, rows.numel, group)),
                         dim3(SA_GROUP_THREADS), 0, stream, rows, slopes, sa_line_of<const T>(x, dim),
                         sa_line_of<const T>(dy, dim), line_or_none<T>(weight), epsilon, group, kept);
    return done || !wants_sums ? done : add_up<T>(x, dy, dweight, dbias, rows, kept, stream);
  });
  sa_cuda_scratch_release(x->device, kept);
  return status;
}
