// the backward pass on mma.sync in f32, as three products of f16, for widths up to 64
//
// Kernels may spill: the gradients of a block fill the registers; what they keep in memory instead is read once a step,
// outside the loops of products.
#include "kernels/cuda/portable_backward.cuh"

int sa_cuda_backward_f32_64(const backward_job &job, const backward_rows<float> &rows) {
  typedef backward_shape<products_f32, 64, 4, 64, 1, 4, 64, 1, 64, 64> plain;
  typedef backward_shape<products_f32, 64, 4, 32, 1, 4, 32, 1, 64, 64> general;
  return launch_backward<general, plain>(job, rows);
}
