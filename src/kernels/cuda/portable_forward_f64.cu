// the forward pass on mma.sync in f64
//
// It may spill: what is used once a step (the walk over the tiles), and what the rare calls save (unaligned rows, the
// careful pass). The accumulators stay in registers.
#include "kernels/cuda/portable_forward.cuh"

template int sa_cuda_forward<products_f64>(forward_job &job, cudaStream_t stream);
