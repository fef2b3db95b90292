// how kernels are launched in the emulator, and how they get their dynamic shared memory
#ifndef SAFEATTN_KERNELS_CUDA_LAUNCH_CUH
#define SAFEATTN_KERNELS_CUDA_LAUNCH_CUH
#include <cuda_runtime.h>

template <class T>
static inline T *dynamic_shared() {
  return (T *)emulator::current()->home->dynamic;
}

int sa_cuda_check(const char *function, cudaError_t error);

template <bool EARLY = false, class... Parameters, class... Arguments>
static int sa_cuda_launch(const char *function, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                          cudaStream_t stream, Arguments... arguments) {
  if (shared > 48 << 10) {
    const int status =
        sa_cuda_check(function, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    if (status) return status;
  }
  const cudaError_t error = emulator::check_launch((const void *)kernel, grid, block, shared, stream);
  if (!error) emulator::run_grid(function, grid, block, shared, [&] { kernel(arguments...); });
  return sa_cuda_check(function, error);
}

#endif
