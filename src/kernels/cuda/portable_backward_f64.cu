// the backward pass on mma.sync in f64
#include "kernels/cuda/portable_backward.cuh"

template <int WIDTH, int WARPS, int STEP>
static int backward(const backward_job &job, const backward_rows<double> &rows) {
  return launch_backward<void, backward_shape<products_f64, WIDTH, WARPS, STEP, 1, WARPS, STEP, 1, 64, 64>>(job, rows);
}

int sa_cuda_backward_f64(const backward_job &job, const backward_rows<double> &rows) {
  const int64_t width = job.p.width > job.p.value_width ? job.p.width : job.p.value_width;
  if (width <= 64) return backward<64, 4, 16>(job, rows);
  if (width <= 128) return backward<128, 2, 16>(job, rows);
  return backward<256, 1, 16>(job, rows);
}
