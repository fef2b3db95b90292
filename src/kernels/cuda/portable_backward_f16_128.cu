// the backward pass on mma.sync in f16 for widths up to 128
//
// Kernels may spill: the gradients of a block fill the registers; what they keep in memory instead is read once a step,
// outside the loops of products.
#include "kernels/cuda/portable_backward.cuh"

int sa_cuda_backward_f16_128(const backward_job &job, const backward_rows<float> &rows) {
  typedef once_shape<__half, 128, 8, 2, 1> once;
  // For the 99 KiB that a block has on devices for graphics.
  typedef once_shape<__half, 128, 4, 1, 1> narrow;
  static_assert(narrow::SHARED <= 99 << 10, "it is for devices that have no more");
  typedef backward_shape<products_f16, 128, 4, 32, 2, 4, 32, 2, 128, 128> general;
  return launch_backward<general, once, narrow>(job, rows);
}
