// how blocks of the Hopper kernels begin: where their shared memory is, its rings of buffers and their mbarriers
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BLOCK_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BLOCK_CUH
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx_hopper.cuh"

// Where the block's shared memory starts, a constant; thread 0 sees to it that it is so.
static __device__ __forceinline__ uint32_t hopper_block_memory() {
  const uint8_t *memory = dynamic_shared<uint8_t>();
  const uint32_t base = dynamic_shared_address(memory);
  if (threadIdx.x == 0 && shared_address(memory) != base) __trap();
  return base;
}

// The same as a T: where its parts are is known when the kernel is compiled.
template <class T>
static __device__ __forceinline__ T &hopper_block_memory_as() {
  return *(T *)shared_pointer(hopper_block_memory());
}

// `count` neighbouring mbarriers, whose phases end with `arrivals` arrivals.
static __device__ __forceinline__ void hopper_block_mbarriers(uint32_t first, int count, int arrivals) {
#pragma unroll
  for (int i = 0; i < count; i++) mbarrier_init(first + 8 * i, arrivals);
}

// Those of a buffer of `slots` slots: one thread says that a slot is full, `readers` that it is empty.
static __device__ __forceinline__ void hopper_block_slots(uint32_t full, uint32_t empty, int slots, int readers) {
  hopper_block_mbarriers(full, slots, 1);
  hopper_block_mbarriers(empty, slots, readers);
}

// A place in a ring of buffers, and the parity of its mbarriers' phase.
template <int SIZE>
struct hopper_ring {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++at == SIZE) at = 0, parity ^= 1;
  }
};

#endif
