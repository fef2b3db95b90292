// the backward pass on mma.sync in bf16
#include "kernels/cuda/portable_backward.cuh"

template <int WIDTH, int STEP, int STAGES, int SLICE>
static int backward(const backward_job &job, const backward_rows<float> &rows) {
  typedef products_bf16 P;
  return launch_backward<backward_shape<P, WIDTH, 4, STEP, STAGES, 4, STEP, STAGES, SLICE, SLICE>,
                         backward_shape<P, WIDTH, 4, 32, STAGES, 4, 32, STAGES, SLICE, SLICE>>(job, rows);
}

int sa_cuda_backward_bf16(const backward_job &job, const backward_rows<float> &rows) {
  const int64_t width = job.p.width > job.p.value_width ? job.p.width : job.p.value_width;
  if (width <= 64) return backward<64, 64, 2, 64>(job, rows);
  if (width <= 128) return backward<128, 64, 2, 128>(job, rows);
  return backward<256, 32, 1, 128>(job, rows);
}
