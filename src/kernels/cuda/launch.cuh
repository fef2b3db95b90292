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

// What a thread remembers of a kernel on a device, since to ask takes as long as a good part of a launch.
typedef struct sa_cuda_kernel_notes {
  const void *kernel;
  int device;
  size_t shared;  // the most that was asked for; 0: up to 48 KiB
  int code;       // the architecture that its code was compiled for, as 90; 0: not asked yet
} sa_cuda_kernel_notes;

static inline int sa_cuda_note_kernel(const char *function, const void *kernel, sa_cuda_kernel_notes **notes) {
  enum { REMEMBERED = 64 };
  static thread_local sa_cuda_kernel_notes all[REMEMBERED];
  int device;
  const int status = sa_cuda_check(function, cudaGetDevice(&device));
  sa_cuda_kernel_notes *const place = &all[((uintptr_t)kernel >> 4) % REMEMBERED];
  if (place->kernel != kernel || place->device != device) *place = sa_cuda_kernel_notes{kernel, device, 0, 0};
  *notes = place;
  return status;
}

// More than 48 KiB of shared memory have to be asked for, once a kernel and device.
static inline int sa_cuda_allow_shared(const char *function, const void *kernel, size_t shared) {
  sa_cuda_kernel_notes *notes;
  int status = sa_cuda_note_kernel(function, kernel, &notes);
  if (status || notes->shared >= shared) return status;
  status =
      sa_cuda_check(function, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
  if (!status) notes->shared = shared;
  return status;
}

// Whether the code of a kernel waits in dependency_wait(): of sm_90 and newer.
static inline int sa_cuda_find_waits(const char *function, const void *kernel, bool *waits) {
  sa_cuda_kernel_notes *notes;
  int status = sa_cuda_note_kernel(function, kernel, &notes);
  if (!status && !notes->code) {
    cudaFuncAttributes attributes;
    status = sa_cuda_check(function, cudaFuncGetAttributes(&attributes, kernel));
    if (!status) notes->code = attributes.ptxVersion;
  }
  *waits = !status && notes->code >= 90;
  return status;
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

// kernel<<<grid, block, shared, stream>>>(arguments...), with its error. EARLY: it is brought to the device while the
// launch before it ends, and waits for that itself, by dependency_wait(), where its code can.
template <bool EARLY = false, class... Parameters, class... Arguments>
static int sa_cuda_launch(const char *function, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                          cudaStream_t stream, const Arguments &...arguments) {
  bool early = false;
  int status = SA_OK;
  if (shared > 48 << 10) status = sa_cuda_allow_shared(function, (const void *)kernel, shared);
  if (EARLY && !status) status = sa_cuda_find_waits(function, (const void *)kernel, &early);
  if (status) return status;
  return sa_cuda_launch_as<Parameters...>(function, kernel, grid, block, shared, stream, early, arguments...);
}

#endif
