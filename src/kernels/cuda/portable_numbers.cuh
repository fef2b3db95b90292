// numbers of any dtype for the portable attention kernels: conversions, finiteness, powers, sums over lanes
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_NUMBERS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_NUMBERS_CUH
#include "backend.h"
#include "kernels/cuda/ptx.cuh"

static __device__ __forceinline__ bool is_finite(float x) {
  return x * 0 == 0;
}

static __device__ __forceinline__ bool is_finite(double x) {
  return x * 0 == 0;
}

// Notes whether numbers are finite, in a few chains of products with 0, as an instruction waits for the one before it
// of its own. They are all 0, then, or some is NaN.
template <class Real>
struct finite_test {
  Real zeros[4] = {0, 0, 0, 0};

  __device__ __forceinline__ void note(Real x, int chain) { zeros[chain % 4] += x * 0; }
  __device__ __forceinline__ bool passed() const { return (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]) == 0; }
};

static __device__ __forceinline__ float real_of(float x) {
  return x;
}

static __device__ __forceinline__ double real_of(double x) {
  return x;
}

static __device__ __forceinline__ float real_of(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

static __device__ __forceinline__ float real_of(__half x) {
  return __half2float(x);
}

static __device__ __forceinline__ void put_real(float *to, float x) {
  *to = x;
}

static __device__ __forceinline__ void put_real(double *to, double x) {
  *to = x;
}

static __device__ __forceinline__ void put_real(__nv_bfloat16 *to, float x) {
  *to = __float2bfloat16_rn(x);
}

static __device__ __forceinline__ void put_real(__half *to, float x) {
  *to = __float2half_rn(x);
}

static __device__ __forceinline__ float exp2_of(float x) {
  return exp2_fast(x);
}

static __device__ __forceinline__ double exp2_of(double x) {
  return exp2(x);
}

static __device__ __forceinline__ float larger(float a, float b) {
  return fmaxf(a, b);
}

static __device__ __forceinline__ double larger(double a, double b) {
  return fmax(a, b);
}

template <class T>
static __device__ __forceinline__ T over_quad_max(T x) {
  x = larger(x, __shfl_xor_sync(0xffffffff, x, 1));
  return larger(x, __shfl_xor_sync(0xffffffff, x, 2));
}

template <class T>
static __device__ __forceinline__ T over_quad_sum(T x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

static __device__ __forceinline__ int64_t row_offset(const sa_operand &x, int64_t batch, int64_t head, int64_t query) {
  return batch * x.stride[0] + head * x.stride[1] + query * x.stride[2];
}

#endif
