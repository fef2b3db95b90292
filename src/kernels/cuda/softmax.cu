// the stand-alone safe softmax and its gradient on CUDA devices
//
// A line is what one softmax runs along. Whether it is dead is asked of its entries (all are -inf), never of its
// greatest one alone: a line of NaN and -inf has no greatest entry either, and must stay NaN.
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/weights.cuh"

static double dead_value(int64_t length, int dead_rows) {
  return dead_rows == SA_ZERO ? 0 : dead_rows == SA_NAN ? (double)NAN : 1.0 / (double)length;
}

template <class T>
static __global__ void __launch_bounds__(SA_GROUP_THREADS)
    forward_kernel(sa_strided lines, sa_line<T> y, sa_line<const T> x, double if_dead, int group) {
  using C = decltype(sa_wide(T()));
  const int lane = threadIdx.x & (group - 1);
  SA_EACH_ITEM(item, live, lines.numel, group) {
    int64_t at[2] = {0, 0};
    if (live) sa_locate<2>(lines, item, at);
    const sa_line<const T> line = {x.data + at[1], x.length, x.step};
    const auto w = sa_weigh(line, live, lane, group);
    const C sum = (C)w.sum;
    for (int64_t i = lane; live && i < x.length; i += group) {
      const C weight = sa_weight(sa_wide(line.data[i * x.step]) - w.greatest) / sum;
      sa_put(y.data + at[0] + i * y.step, w.dead ? (C)if_dead : weight);
    }
  }
}

// dx = y (dy - sum of y dy) over the visible entries; the others, -inf in x, get 0 and their dy is not used. A dead
// line has the gradient of what its stance says it is: of 0, of NaN, or of equal weights.
template <class T>
static __global__ void __launch_bounds__(SA_GROUP_THREADS)
    backward_kernel(sa_strided lines, sa_line<T> dx, sa_line<const T> x, sa_line<const T> y, sa_line<const T> dy,
                    double if_dead, bool uniform, int group) {
  using C = decltype(sa_wide(T()));
  const int lane = threadIdx.x & (group - 1);
  SA_EACH_ITEM(item, live, lines.numel, group) {
    int64_t at[4] = {0, 0, 0, 0};
    if (live) sa_locate<4>(lines, item, at);
    double sum = 0, sum_if_dead = 0;
    int visible = 0;
    for (int64_t i = lane; live && i < x.length; i += group) {
      const bool masked = sa_wide(x.data[at[1] + i * x.step]) == -(C)INFINITY;
      const double product =
          (double)sa_wide(y.data[at[2] + i * y.step]) * (double)sa_wide(dy.data[at[3] + i * dy.step]);
      sum += masked ? 0 : product;
      sum_if_dead += product;
      visible |= !masked;
    }
    sum = sa_group_sum(sum, group);
    sum_if_dead = sa_group_sum(sum_if_dead, group);
    const bool dead = !sa_group_fold(visible, group, [](int a, int b) { return a | b; });
    const C dot = (C)(dead ? sum_if_dead : sum);
    for (int64_t i = lane; live && i < x.length; i += group) {
      const bool masked = !dead && sa_wide(x.data[at[1] + i * x.step]) == -(C)INFINITY;
      const C slope = sa_wide(y.data[at[2] + i * y.step]) * (sa_wide(dy.data[at[3] + i * dy.step]) - dot);
      sa_put(dx.data + at[0] + i * dx.step, dead && !uniform ? (C)if_dead : masked ? (C)0 : slope);
    }
  }
}

int sa_cuda_softmax(const sa_tensor *x, int dim, int dead_rows, const sa_tensor *y) {
  const sa_strided lines = sa_walk_of(y, x, NULL, NULL, UINT32_C(1) << dim);
  if (lines.numel == 0 || x->shape[dim] == 0) return SA_OK;
  cudaStream_t stream;
  const int status = sa_cuda_use("sa_softmax", x->device, &stream);
  if (status) return status;
  const int group = sa_group_size(x->shape[dim], lines.numel, sa_side_by_side(lines, 1, x->stride[dim]));
  return sa_with_float(x->dtype, [&](auto t) {
    using T = decltype(t);
    return sa_cuda_launch("sa_softmax", forward_kernel<T>, dim3(sa_group_blocks(x->device, lines.numel, group)),
                          dim3(SA_GROUP_THREADS), 0, stream, lines, sa_line_of<T>(y, dim), sa_line_of<const T>(x, dim),
                          dead_value(x->shape[dim], dead_rows), group);
  });
}

int sa_cuda_softmax_backward(const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, int dim, int dead_rows,
                             const sa_tensor *dx) {
  const sa_strided lines = sa_walk_of(dx, x, y, dy, UINT32_C(1) << dim);
  if (lines.numel == 0 || x->shape[dim] == 0) return SA_OK;
  cudaStream_t stream;
  const int status = sa_cuda_use("sa_softmax_backward", x->device, &stream);
  if (status) return status;
  const int group = sa_group_size(x->shape[dim], lines.numel, sa_side_by_side(lines, 1, x->stride[dim]));
  return sa_with_float(x->dtype, [&](auto t) {
    using T = decltype(t);
    return sa_cuda_launch("sa_softmax_backward", backward_kernel<T>,
                          dim3(sa_group_blocks(x->device, lines.numel, group)), dim3(SA_GROUP_THREADS), 0, stream,
                          lines, sa_line_of<T>(dx, dim), sa_line_of<const T>(x, dim), sa_line_of<const T>(y, dim),
                          sa_line_of<const T>(dy, dim), dead_value(x->shape[dim], dead_rows), dead_rows == SA_UNIFORM,
                          group);
  });
}
