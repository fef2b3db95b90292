// the scale of scores, with what tensor cores cut off their sums
#ifndef SAFEATTN_KERNELS_CUDA_SCORE_SCALE_CUH
#define SAFEATTN_KERNELS_CUDA_SCORE_SCALE_CUH
#include "backend.h"

// What makes up, in the mean, for what mma.sync and wgmma cut off a sum in f32 of so many products, 16 at a time and
// always towards 0: an H200 loses 0.32, 0.47, 0.74, 1.30 and 2.40 times 2^-23 of the sums that are made in 1, 2, 4, 8
// and 16 steps. Products and the sum so far are aligned to the largest of them, and two bits below its last are kept.
static __host__ __device__ inline double uncut(int64_t products) {
  return 1 + (int)products * (0x1p-23 / 115) + 0.18 * 0x1p-23;
}

// What a product q.k is multiplied by, forward and backward, on all kernels but the reference.
static __host__ __device__ inline double score_scale(const sa_problem &p) {
  return p.dtype == SA_F64 ? p.scale : p.scale * uncut(p.width);
}

#endif
