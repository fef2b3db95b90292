// how kernels are launched, and how they get their dynamic shared memory; the emulator (spec/emulator) has its own
#ifndef SAFEATTN_KERNELS_CUDA_LAUNCH_CUH
#define SAFEATTN_KERNELS_CUDA_LAUNCH_CUH
#include <cuda_runtime.h>

#include "safeattn.h"

// SA_OK, or SA_NO_MEMORY for a refused allocation, or SA_NO_DEVICE; the host is told CUDA's own text, in the name of
// `function`.
int sa_cuda_check(const char *function, cudaError_t error);

// The shared memory that a kernel is launched with, aligned to 1024 bytes.
template <class T>
static __device__ __forceinline__ T *dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char sa_cuda_dynamic_shared[];
  return (T *)sa_cuda_dynamic_shared;
}

// More than 48 KiB of shared memory have to be asked for, once a kernel and device: a thread remembers the greatest
// size that it has asked for, as asking takes as long as a good part of a launch.
static inline int sa_cuda_allow_shared(const char *function, const void *kernel, size_t shared) {
  enum { REMEMBERED = 64 };
  static thread_local struct {
    const void *kernel;
    int device;
    size_t shared;
  } allowed[REMEMBERED];
  int device;
  int status = sa_cuda_check(function, cudaGetDevice(&device));
  auto *place = &allowed[((uintptr_t)kernel >> 4) % REMEMBERED];
  if (status || (place->kernel == kernel && place->device == device && place->shared >= shared)) return status;
  status =
      sa_cuda_check(function, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
  if (status) return status;
  place->kernel = kernel;
  place->device = device;
  place->shared = shared;
  return SA_OK;
}

template <class... Parameters>
static int sa_cuda_launch_as(const char *function, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                             cudaStream_t stream, bool early, const Parameters &...parameters) {
  void *list[] = {(void *)&parameters..., NULL};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return sa_cuda_check(function, cudaLaunchKernelExC(&config, (const void *)kernel, list));
}

// kernel<<<grid, block, shared, stream>>>(arguments...), with its error. EARLY (sm_90 and newer): it is brought to the
// device while the launch before it ends, and waits for that itself, by dependency_wait().
template <bool EARLY = false, class... Parameters, class... Arguments>
static int sa_cuda_launch(const char *function, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                          cudaStream_t stream, const Arguments &...arguments) {
  if (shared > 48 << 10) {
    const int status = sa_cuda_allow_shared(function, (const void *)kernel, shared);
    if (status) return status;
  }
  return sa_cuda_launch_as<Parameters...>(function, kernel, grid, block, shared, stream, EARLY, arguments...);
}

#endif
