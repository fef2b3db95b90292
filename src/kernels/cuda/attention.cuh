// the attention kernels of the CUDA library, as cuda.cu chooses among them
#ifndef SAFEATTN_KERNELS_CUDA_ATTENTION_CUH
#define SAFEATTN_KERNELS_CUDA_ATTENTION_CUH
#include <cuda_runtime.h>

#include "backend.h"

// The definition in plain f64 loops: any dtype, any width, any option.
int sa_cuda_reference_forward(const sa_problem *p);
int sa_cuda_reference_backward(const sa_problem *p);

// mma.sync, for sm_80 and newer: every dtype and option, widths of q and v up to 256.
int sa_cuda_portable_forward(const sa_problem *p);
int sa_cuda_portable_backward(const sa_problem *p);
bool sa_cuda_portable_backward_small(const sa_problem *p);  // whether it is one launch

// TMA and wgmma, for sm_90a: what `covers` says, the fastest there.
bool sa_cuda_hopper_forward_covers(const sa_problem *p);
bool sa_cuda_hopper_backward_covers(const sa_problem *p);
int sa_cuda_hopper_forward(const sa_problem *p);
int sa_cuda_hopper_backward(const sa_problem *p);

// TMA and mma.sync, for sm_90a: few queries against many keys.
bool sa_cuda_hopper_decoding_covers(const sa_problem *p);
int sa_cuda_hopper_decoding(const sa_problem *p);

// dBias as the sum of its parts [parts][count], of f64 where the problem is, else of f32.
int sa_cuda_sum_bias_parts(const sa_problem &p, cudaStream_t stream, int64_t parts, int64_t count, const void *sums);

#endif
