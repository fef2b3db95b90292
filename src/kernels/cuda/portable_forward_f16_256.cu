// the forward pass on mma.sync in f16, widths up to 256
#include "kernels/cuda/portable_forward.cuh"

template int sa_cuda_forward<products_f16, 256>(forward_job &job, cudaStream_t stream);
