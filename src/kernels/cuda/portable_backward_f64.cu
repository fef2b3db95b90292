// the backward pass on mma.sync in f64
//
// Kernels may spill: the gradients of a block fill the registers; what they keep in memory instead is read once a step,
// outside the loops of products.
#include "kernels/cuda/portable_backward.cuh"

int sa_cuda_backward_f64_64(const backward_job &job, const backward_rows<double> &rows) {
  typedef backward_shape<products_f64, 64, 4, 16, 1, 4, 16, 1, 64, 64> shape;
  return launch_backward<shape>(job, rows);
}

int sa_cuda_backward_f64_128(const backward_job &job, const backward_rows<double> &rows) {
  typedef backward_shape<products_f64, 128, 2, 16, 1, 2, 16, 1, 64, 64> shape;
  return launch_backward<shape>(job, rows);
}

int sa_cuda_backward_f64_256(const backward_job &job, const backward_rows<double> &rows) {
  typedef backward_shape<products_f64, 256, 1, 16, 1, 1, 16, 1, 64, 64> shape;
  return launch_backward<shape>(job, rows);
}
