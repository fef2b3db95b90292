// the loss of a row of logits whose right answer is an id, and its gradient, on CUDA devices
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/weights.cuh"

typedef struct answers {
  const void *ids;
  int dtype;
  int64_t base, ignore;
  __device__ int64_t id(int64_t at) const {
    return dtype == SA_I64 ? ((const int64_t *)ids)[at] : ((const int32_t *)ids)[at];
  }
} answers;

// loss = log(sum) - (x[id] - greatest), and the weights exp(x - greatest) have that sum.
template <class T>
static __global__ void __launch_bounds__(SA_GROUP_THREADS)
    loss_kernel(sa_strided rows, T *loss, sa_line<const T> x, answers right, int group) {
  const int lane = threadIdx.x & (group - 1);
  SA_EACH_ITEM(item, live, rows.numel, group) {
    int64_t at[3] = {0, 0, 0};
    if (live) sa_locate<3>(rows, item, at);
    const int64_t id = live ? right.id(at[2]) : 0;
    const bool counts = live && id != right.ignore;
    const sa_line<const T> row = {x.data + at[1], x.length, x.step};
    const auto w = sa_weigh(row, counts, lane, group);
    if (!live || lane) continue;
    double value = 0;
    if (counts) value = log(w.sum) - ((double)sa_wide(row.data[(id - right.base) * x.step]) - (double)w.greatest);
    sa_put(loss + at[0], value);
  }
}

// dx = dloss (softmax(x) - 1 at the id)
template <class T>
static __global__ void __launch_bounds__(SA_GROUP_THREADS)
    slope_kernel(sa_strided rows, sa_line<T> dx, sa_line<const T> x, answers right, const T *dloss, int group) {
  using C = decltype(sa_wide(T()));
  const int lane = threadIdx.x & (group - 1);
  SA_EACH_ITEM(item, live, rows.numel, group) {
    int64_t at[4] = {0, 0, 0, 0};
    if (live) sa_locate<4>(rows, item, at);
    const int64_t id = live ? right.id(at[2]) : 0;
    const bool counts = live && id != right.ignore;
    const sa_line<const T> row = {x.data + at[1], x.length, x.step};
    const auto w = sa_weigh(row, counts, lane, group);
    const double slope = counts ? (double)sa_wide(dloss[at[3]]) : 0;
    const C factor = (C)(slope / w.sum);
    for (int64_t i = lane; live && i < x.length; i += group) {
      T *const to = dx.data + at[0] + i * dx.step;
      if (!counts) {
        sa_put(to, (C)0);
        continue;
      }
      const C v = sa_wide(row.data[i * x.step]);
      if (i == id - right.base)
        sa_put(to, slope * (exp((double)v - (double)w.greatest) / w.sum - 1));
      else
        sa_put(to, sa_weight(v - w.greatest) * factor);
    }
  }
}

int sa_cuda_cross_entropy(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore,
                          const sa_tensor *loss) {
  const int dim = x->ndim - 1;
  const sa_strided rows = sa_walk_of(loss, x, ids);
  if (rows.numel == 0) return SA_OK;
  cudaStream_t stream;
  const int status = sa_cuda_use("sa_cross_entropy", x->device, &stream);
  if (status) return status;
  const int group = sa_group_size(x->shape[dim], rows.numel, false);
  const answers right = {ids->data, ids->dtype, base, ignore};
  return sa_with_float(x->dtype, [&](auto t) {
    using T = decltype(t);
    return sa_cuda_launch("sa_cross_entropy", loss_kernel<T>, dim3(sa_group_blocks(x->device, rows.numel, group)),
                          dim3(SA_GROUP_THREADS), 0, stream, rows, (T *)loss->data, sa_line_of<const T>(x, dim), right,
                          group);
  });
}

int sa_cuda_cross_entropy_backward(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore,
                                   const sa_tensor *dloss, const sa_tensor *dx) {
  const int dim = x->ndim - 1;
  const sa_strided rows = sa_walk_of(dx, x, ids, dloss, UINT32_C(1) << dim);
  if (rows.numel == 0 || x->shape[dim] == 0) return SA_OK;
  cudaStream_t stream;
  const int status = sa_cuda_use("sa_cross_entropy_backward", x->device, &stream);
  if (status) return status;
  const int group = sa_group_size(x->shape[dim], rows.numel, false);
  const answers right = {ids->data, ids->dtype, base, ignore};
  return sa_with_float(x->dtype, [&](auto t) {
    using T = decltype(t);
    return sa_cuda_launch("sa_cross_entropy_backward", slope_kernel<T>,
                          dim3(sa_group_blocks(x->device, rows.numel, group)), dim3(SA_GROUP_THREADS), 0, stream, rows,
                          sa_line_of<T>(dx, dim), sa_line_of<const T>(x, dim), right, (const T *)dloss->data, group);
  });
}
