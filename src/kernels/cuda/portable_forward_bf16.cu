// the forward pass on mma.sync in bf16
#include "kernels/cuda/portable_forward.cuh"

template <int WIDTH, int FOLD, int KEYS, int RESIDENT>
static int forward(forward_job &job, cudaStream_t stream) {
  typedef products_bf16 P;
  if (forward_packs(job)) return launch_forward<forward_shape<P, WIDTH, WIDTH, 1, 1, 64, 4, false, true>>(job, stream);
  if (forward_has_extras(job.p))
    return launch_forward<forward_shape<P, WIDTH, WIDTH, 1, 4, KEYS, 2, true, false>>(job, stream);
  return launch_forward<forward_shape<P, WIDTH, WIDTH, FOLD, 4, KEYS, RESIDENT, false, false>>(job, stream);
}

int sa_cuda_forward_bf16(forward_job &job, cudaStream_t stream) {
  const int64_t width = job.p.width > job.p.value_width ? job.p.width : job.p.value_width;
  if (width <= 64) return forward<64, 2, 64, 2>(job, stream);
  if (width <= 128) return forward<128, 2, 64, 2>(job, stream);
  return forward<256, 1, 64, 2>(job, stream);
}
