// blocks that came out not finite, and may have met 0 * NaN of masked pairs: told apart, and done again by another
// launch
//
// The kernels write no result for such a block, and a word of it in a list; the launch behind them does it carefully. A
// careful branch in the kernel, or a call at its end, kept registers from the loop over the steps: clean inputs took up
// to a fifth longer, forward and backward, where this takes the 4 us of an empty launch. A kernel of short work,
// launched for small problems, has the call.
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_CAREFUL_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_CAREFUL_CUH
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/ptx.cuh"

// Calls redo(block) for this block's share of `count` blocks, if they are to be done again. All THREADS threads call
// it.
template <int THREADS, class Redo>
static __device__ __forceinline__ void redo_suspects(const uint8_t *suspects, int64_t count, const Redo &redo) {
  const int64_t stride = gridDim.x;
  dependency_wait();
  for (int64_t first = blockIdx.x; first < count; first += THREADS * stride) {
    const int64_t mine = first + threadIdx.x * stride;
    if (!__syncthreads_or(mine < count && suspects[mine])) continue;
    for (int64_t block = first; block < count && block < first + THREADS * stride; block += stride) {
      if (suspects[block]) redo(block);
      __syncthreads();
    }
  }
}

// The grid of a launch that does blocks of `count` again: as many as are at work together, `resident` a multiprocessor.
static inline unsigned redo_grid(int device, int64_t count, int resident) {
  const int64_t all = (int64_t)sa_cuda_properties_of(device)->processors * resident;
  return (unsigned)(count < all ? count : all);
}

#endif
