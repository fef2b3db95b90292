// exp(x - greatest x) along a line and its sum, by a group of threads; what softmax and cross entropy share
#ifndef SAFEATTN_KERNELS_CUDA_WEIGHTS_CUH
#define SAFEATTN_KERNELS_CUDA_WEIGHTS_CUH
#include "kernels/cpu/functions.h"
#include "kernels/cuda/group.cuh"

static __device__ __forceinline__ float sa_weight(float x) {
  return sa_weight_f32(x);
}
static __device__ __forceinline__ double sa_weight(double x) {
  return sa_weight_f64(x);
}

// Of one line: the greatest entry (NaN ones are passed over: they make the sum NaN), whether all are -inf, and the sum
// of the weights. The line is read by every thread of the block's group; a line that is not `live` is not read.
template <class C>
struct sa_line_weights {
  C greatest;
  bool dead;
  double sum;
};

template <class T>
static __device__ __forceinline__ auto sa_weigh(const sa_line<T> &x, bool live, int lane, int group)
    -> sa_line_weights<decltype(sa_wide(T()))> {
  using C = decltype(sa_wide(T()));
  sa_line_weights<C> w = {-(C)INFINITY, true, 0};
  int visible = 0;
  for (int64_t i = lane; live && i < x.length; i += group) {
    const C v = sa_wide(x.data[i * x.step]);
    w.greatest = v > w.greatest ? v : w.greatest;
    visible |= !(v == -(C)INFINITY);
  }
  w.greatest = sa_group_fold(w.greatest, group, [](C a, C b) { return b > a ? b : a; });
  w.dead = !sa_group_fold(visible, group, [](int a, int b) { return a | b; });
  for (int64_t i = lane; live && i < x.length; i += group)
    w.sum += (double)sa_weight(sa_wide(x.data[i * x.step]) - w.greatest);
  w.sum = sa_group_sum(w.sum, group);
  return w;
}

#endif
