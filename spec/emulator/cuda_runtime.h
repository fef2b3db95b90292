// CUDA's language and runtime for g++: kernels run on this machine (README.md)
#ifndef EMULATOR_CUDA_RUNTIME_H
#define EMULATOR_CUDA_RUNTIME_H

// The newest architecture: kernels that ask find everything there. One pass compiles host and device code.
#define __CUDA_ARCH__ 900
#define __CUDA_ARCH_FEAT_SM90_ALL 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// A block runs on one thread of the system, which no host code shares; dynamic memory comes from dynamic_shared().
#define __shared__ static thread_local

#include "block.h"
#include "device_functions.h"
#include "runtime_api.h"
#include "vector_types.h"

#endif
