// the forward pass on mma.sync in bf16, widths up to 128
#include "kernels/cuda/portable_forward.cuh"

template int sa_cuda_forward<products_bf16, 128>(forward_job &job, cudaStream_t stream);
