// what the files of the CUDA library share: the host's table, streams, memory, launches, errors
#ifndef SAFEATTN_KERNELS_CUDA_DEVICE_CUH
#define SAFEATTN_KERNELS_CUDA_DEVICE_CUH
#include <cuda_runtime.h>

#include "backend.h"
#include "kernels/cuda/launch.cuh"

extern const sa_host *sa_cuda_host;  // set when the library is opened
enum { SA_CUDA_DEVICES = 64 };       // at most so many devices are used

// Makes `device` (an sa_tensor's) current for the calling thread and gives the stream its work goes to.
int sa_cuda_use(const char *function, int device, cudaStream_t *stream);

typedef struct sa_cuda_properties {
  int major, minor, processors;  // compute capability, multiprocessors
  int64_t cache_bytes;           // second-level cache
  int shared_bytes;              // that a block may have
} sa_cuda_properties;
const sa_cuda_properties *sa_cuda_properties_of(int device);

// Memory that work already sent to the current stream may use until it is released; it comes from the same cache as
// tensors and is aligned to 256 bytes. NULL when refused.
void *sa_cuda_scratch(const char *function, int device, int64_t bytes);
void sa_cuda_scratch_release(int device, void *memory);

// Zeros of the current stream, for its launches to count with or to leave parts of sums in: each leaves them 0. Up to
// SA_CUDA_ZEROS, or more, of which a launch asks for as many as any would.
enum { SA_CUDA_ZEROS = 1024 };
int sa_cuda_zeros(const char *function, int device, int64_t count, uint32_t **zeros);

// A grid of blocks of 256 threads for loops that step by the whole grid: 32 blocks a multiprocessor are enough.
static inline int sa_cuda_blocks(int device, int64_t threads) {
  const int64_t wanted = (threads + 255) / 256, most = (int64_t)sa_cuda_properties_of(device)->processors * 32;
  return (int)(wanted < most ? wanted : most);
}

#endif
