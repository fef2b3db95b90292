// the backward pass on mma.sync in f32, as three products of tf32
#include "kernels/cuda/portable_backward.cuh"

template <int WIDTH, int WARPS, int STEP, int STAGES, int SLICE, bool PLAIN>
static int backward(const backward_job &job, const backward_rows<float> &rows) {
  typedef backward_shape<products_f32, WIDTH, WARPS, STEP, STAGES, WARPS, STEP, STAGES, SLICE, SLICE> shape;
  return launch_backward<std::conditional_t<PLAIN, shape, void>, shape>(job, rows);
}

int sa_cuda_backward_f32(const backward_job &job, const backward_rows<float> &rows) {
  const int64_t width = job.p.width > job.p.value_width ? job.p.width : job.p.value_width;
  if (width <= 64) return backward<64, 4, 32, 2, 64, true>(job, rows);
  if (width <= 128) return backward<128, 4, 32, 1, 128, true>(job, rows);
  return backward<256, 2, 16, 1, 128, false>(job, rows);
}
