// loops over the elements of strided tensors: one thread an element, stepping by the whole grid
#ifndef SAFEATTN_KERNELS_CUDA_WALK_CUH
#define SAFEATTN_KERNELS_CUDA_WALK_CUH
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/values.cuh"
#include "strided_walk.h"

template <int TENSORS, class Index>
static __device__ __forceinline__ void sa_locate_by(const sa_strided &walk, Index i, int64_t *at) {
  for (int t = 0; t < TENSORS; t++) at[t] = 0;
  for (int dim = walk.ndim - 1; dim > 0; dim--) {
    const Index size = (Index)walk.shape[dim], above = i / size, index = i - above * size;
    for (int t = 0; t < TENSORS; t++) at[t] += (int64_t)index * walk.step[t][dim];
    i = above;
  }
  for (int t = 0; t < TENSORS; t++) at[t] += (int64_t)i * walk.step[t][0];
}

// Where element i of the walk is in each tensor, in elements. A division of 64 bits costs five of 32.
template <int TENSORS>
static __device__ __forceinline__ void sa_locate(const sa_strided &walk, int64_t i, int64_t *at) {
  if (walk.numel <= INT32_MAX)
    sa_locate_by<TENSORS, uint32_t>(walk, (uint32_t)i, at);
  else
    sa_locate_by<TENSORS, int64_t>(walk, i, at);
}

// task(i, at) for every element i of the walk.
template <int TENSORS, class Task>
static __global__ void __launch_bounds__(256) sa_walk_kernel(sa_strided walk, Task task) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < walk.numel; i += step) {
    int64_t at[TENSORS];
    sa_locate<TENSORS>(walk, i, at);
    task(i, at);
  }
}

template <int TENSORS, class Task>
static int sa_cuda_each(const char *function, int device, const sa_strided &walk, Task task) {
  if (walk.numel == 0) return SA_OK;
  cudaStream_t stream;
  const int status = sa_cuda_use(function, device, &stream);
  if (status) return status;
  return sa_cuda_launch(function, sa_walk_kernel<TENSORS, Task>, dim3((unsigned)sa_cuda_blocks(device, walk.numel)),
                        dim3(256), 0, stream, walk, task);
}

// The walk over the elements of several tensors, first the one that is written.
static inline sa_strided sa_walk_of(const sa_tensor *a, const sa_tensor *b = NULL, const sa_tensor *c = NULL,
                                    const sa_tensor *d = NULL, uint32_t without = 0, bool any_order = true) {
  const sa_tensor *const all[] = {a, b, c, d};
  return sa_strided_of(d ? 4 : c ? 3 : b ? 2 : 1, all, without, any_order);
}

#endif
