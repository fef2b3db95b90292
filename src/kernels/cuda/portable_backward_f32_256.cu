// the backward pass on mma.sync in f32, as three products of f16, for widths up to 256
//
// Kernels may spill: the gradients of a block fill the registers; what they keep in memory instead is read once a step,
// outside the loops of products.
#include "kernels/cuda/portable_backward.cuh"

int sa_cuda_backward_f32_256(const backward_job &job, const backward_rows<float> &rows) {
  typedef backward_shape<products_f32, 256, 2, 16, 1, 2, 16, 1, 128, 128> shape;
  return launch_backward<shape>(job, rows);
}
