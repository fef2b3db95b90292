// how kernels are launched, and how they get their dynamic shared memory; the emulator (spec/emulator) has its own
#ifndef SAFEATTN_KERNELS_CUDA_LAUNCH_CUH
#define SAFEATTN_KERNELS_CUDA_LAUNCH_CUH
#include <cuda_runtime.h>

// SA_OK, or SA_NO_MEMORY for a refused allocation, or SA_NO_DEVICE; the host is told CUDA's own text, in the name of
// `function`.
int sa_cuda_check(const char *function, cudaError_t error);

// The shared memory that a kernel is launched with, aligned to 1024 bytes.
template <class T>
static __device__ __forceinline__ T *dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char sa_cuda_dynamic_shared[];
  return (T *)sa_cuda_dynamic_shared;
}

// kernel<<<grid, block, shared, stream>>>(arguments...), with its error; more than 48 KiB of shared memory are asked
// for on the way.
template <class... Parameters, class... Arguments>
static int sa_cuda_launch(const char *function, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                          cudaStream_t stream, Arguments... arguments) {
  if (shared > 48 << 10) {
    const int status = sa_cuda_check(
        function, cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    if (status) return status;
  }
  kernel<<<grid, block, shared, stream>>>(arguments...);
  return sa_cuda_check(function, cudaGetLastError());
}

#endif
