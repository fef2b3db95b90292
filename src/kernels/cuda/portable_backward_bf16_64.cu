// the backward pass on mma.sync in bf16 for widths up to 64
//
// Kernels may spill: the gradients of a block fill the registers; what they keep in memory instead is read once a step,
// outside the loops of products.
#include "kernels/cuda/portable_backward.cuh"

int sa_cuda_backward_bf16_64(const backward_job &job, const backward_rows<float> &rows) {
  typedef once_shape<__nv_bfloat16, 64, 4, 1, 3> once;
  typedef backward_shape<products_bf16, 64, 4, 32, 2, 4, 32, 2, 64, 64> general;
  return launch_backward<general, once>(job, rows);
}
