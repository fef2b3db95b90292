// the forward pass on mma.sync in f64
#include "kernels/cuda/portable_forward.cuh"

template <int WIDTH, int VALUE_WIDTH, int WARPS, int KEYS>
static int forward(forward_job &job, cudaStream_t stream) {
  typedef products_f64 P;
  if (forward_packs(job))
    return launch_forward<forward_shape<P, WIDTH, VALUE_WIDTH, 1, 1, 16, 1, false, true>>(job, stream);
  return launch_forward<forward_shape<P, WIDTH, VALUE_WIDTH, 1, WARPS, KEYS, 1, true, false>>(job, stream);
}

int sa_cuda_forward_f64(forward_job &job, cudaStream_t stream) {
  const int64_t width = job.p.width > job.p.value_width ? job.p.width : job.p.value_width;
  if (width <= 64) return forward<64, 64, 4, 32>(job, stream);
  if (width <= 128) return forward<128, 128, 4, 16>(job, stream);
  // o of a whole row would not fit the registers.
  return forward<256, 128, 1, 16>(job, stream);
}
