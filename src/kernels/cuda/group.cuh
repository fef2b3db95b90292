// groups of threads that work on one line of a tensor each, and what they find out together
#ifndef SAFEATTN_KERNELS_CUDA_GROUP_CUH
#define SAFEATTN_KERNELS_CUDA_GROUP_CUH
#include "kernels/cuda/walk.cuh"

enum { SA_GROUP_THREADS = 256 };  // of a block; a group is a power of two of them, one after another

// Folds the values of a group's threads, always in the same order; every thread of the block must call it, and each
// gets its group's result. fold(a, b) has a from the thread before.
template <class A, class Fold>
static __device__ __forceinline__ A sa_group_fold(A value, int group, Fold fold) {
  __shared__ A shared[SA_GROUP_THREADS];
  const int thread = threadIdx.x, lane = thread & (group - 1);
  shared[thread] = value;
  __syncthreads();
  for (int half = group / 2; half > 0; half /= 2) {
    if (lane < half) shared[thread] = fold(shared[thread], shared[thread + half]);
    __syncthreads();
  }
  const A result = shared[thread - lane];
  __syncthreads();
  return result;
}

static __device__ __forceinline__ double sa_group_sum(double value, int group) {
  return sa_group_fold(value, group, [](double a, double b) { return a + b; });
}

// How many threads work on a line of so many entries; 1 for lines that lie side by side, closer than the entries of
// one, for then neighbouring threads read neighbours.
static inline int sa_group_size(int64_t entries, int64_t lines, bool side_by_side) {
  if (side_by_side && lines >= 32) return 1;
  int group = 1;
  while (group < SA_GROUP_THREADS && group * 4 < entries) group *= 2;
  return group;
}

static inline bool sa_side_by_side(const sa_strided &lines, int tensor, int64_t entry_step) {
  const int64_t apart = lines.step[tensor][lines.ndim - 1];
  return lines.shape[lines.ndim - 1] > 1 && apart > 0 && apart < entry_step;
}

static inline unsigned sa_group_blocks(int device, int64_t items, int group) {
  return (unsigned)sa_cuda_blocks(device, items * group);
}

// `item` for each of this thread's group, `live` unless the group has none left while others of its block have.
#define SA_EACH_ITEM(item, live, items, group)                                                                 \
  for (int64_t sa_base = (int64_t)blockIdx.x * (blockDim.x / (group)), item = sa_base + threadIdx.x / (group), \
               live = item < (items);                                                                          \
       sa_base < (items); sa_base += (int64_t)gridDim.x * (blockDim.x / (group)),                              \
               item = sa_base + threadIdx.x / (group), live = item < (items))

// A line along one dim of a tensor.
template <class T>
struct sa_line {
  T *data;
  int64_t length, step;
};

template <class T>
static inline sa_line<T> sa_line_of(const sa_tensor *t, int dim) {
  return {(T *)t->data, t->shape[dim], t->stride[dim]};
}

#endif
