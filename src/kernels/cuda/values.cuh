// the elements of tensors on the device: their types, how they are read and rounded, and templates chosen by dtype
#ifndef SAFEATTN_KERNELS_CUDA_VALUES_CUH
#define SAFEATTN_KERNELS_CUDA_VALUES_CUH
#include "cast.h"
#include "safeattn.h"

// In memory. The others are float, double, bool (one byte, 0 or 1), int32_t and int64_t.
struct sa_f16 {
  uint16_t bits;
};
struct sa_bf16 {
  uint16_t bits;
};

// What an element is computed in without loss: float for it and the halves, double, and int64_t for the rest.
static __device__ __forceinline__ float sa_wide(float x) {
  return x;
}
static __device__ __forceinline__ float sa_wide(sa_f16 x) {
  return sa_f16_to_f32(x.bits);
}
static __device__ __forceinline__ float sa_wide(sa_bf16 x) {
  return sa_bf16_to_f32(x.bits);
}
static __device__ __forceinline__ double sa_wide(double x) {
  return x;
}
static __device__ __forceinline__ int64_t sa_wide(bool x) {
  return x;
}
static __device__ __forceinline__ int64_t sa_wide(int32_t x) {
  return x;
}
static __device__ __forceinline__ int64_t sa_wide(int64_t x) {
  return x;
}

// A NaN keeps its sign and the bits of its payload that fit, which the device's own conversions drop.
static __device__ __forceinline__ float sa_narrow(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t nan = ((uint32_t)(bits >> 32) & 0x80000000u) | 0x7fc00000u | ((uint32_t)(bits >> 29) & 0x3fffffu);
  return x != x ? sa_f32_of_bits(nan) : (float)x;
}
static __device__ __forceinline__ double sa_widen(float x) {
  const uint32_t bits = sa_bits_of_f32(x);
  const uint64_t nan =
      (uint64_t)(bits & 0x80000000u) << 32 | UINT64_C(0x7ff8) << 48 | (uint64_t)(bits & 0x3fffffu) << 29;
  double result;
  memcpy(&result, &nan, sizeof result);
  return x != x ? result : (double)x;
}

// Casts as sa_copy does them, from a wide value.
static __device__ __forceinline__ void sa_put(float *to, float x) {
  *to = x;
}
static __device__ __forceinline__ void sa_put(float *to, double x) {
  *to = sa_narrow(x);
}
static __device__ __forceinline__ void sa_put(float *to, int64_t x) {
  *to = (float)x;
}
static __device__ __forceinline__ void sa_put(double *to, float x) {
  *to = sa_widen(x);
}
static __device__ __forceinline__ void sa_put(double *to, double x) {
  *to = x;
}
static __device__ __forceinline__ void sa_put(double *to, int64_t x) {
  *to = (double)x;
}
static __device__ __forceinline__ void sa_put(sa_f16 *to, float x) {
  to->bits = sa_f32_to_f16(x);
}
static __device__ __forceinline__ void sa_put(sa_f16 *to, double x) {
  to->bits = sa_f64_to_f16(x);
}
static __device__ __forceinline__ void sa_put(sa_f16 *to, int64_t x) {
  to->bits = sa_i64_to_f16(x);
}
static __device__ __forceinline__ void sa_put(sa_bf16 *to, float x) {
  to->bits = sa_f32_to_bf16(x);
}
static __device__ __forceinline__ void sa_put(sa_bf16 *to, double x) {
  to->bits = sa_f64_to_bf16(x);
}
static __device__ __forceinline__ void sa_put(sa_bf16 *to, int64_t x) {
  to->bits = sa_i64_to_bf16(x);
}
template <class T>
static __device__ __forceinline__ void sa_put(bool *to, T x) {
  *to = x != 0;
}
static __device__ __forceinline__ void sa_put(int32_t *to, float x) {
  *to = sa_f64_to_i32((double)x);
}
static __device__ __forceinline__ void sa_put(int32_t *to, double x) {
  *to = sa_f64_to_i32(x);
}
static __device__ __forceinline__ void sa_put(int32_t *to, int64_t x) {
  *to = sa_i64_to_i32(x);
}
static __device__ __forceinline__ void sa_put(int64_t *to, float x) {
  *to = sa_f64_to_i64((double)x);
}
static __device__ __forceinline__ void sa_put(int64_t *to, double x) {
  *to = sa_f64_to_i64(x);
}
static __device__ __forceinline__ void sa_put(int64_t *to, int64_t x) {
  *to = x;
}

// f(T()) with the type of a dtype.
template <class F>
static int sa_with_float(int dtype, F f) {
  switch (dtype) {
    case SA_F64:
      return f(double());
    case SA_F16:
      return f(sa_f16());
    case SA_BF16:
      return f(sa_bf16());
    default:
      return f(float());
  }
}

template <class F>
static int sa_with_dtype(int dtype, F f) {
  switch (dtype) {
    case SA_BOOL:
      return f(bool());
    case SA_I32:
      return f(int32_t());
    case SA_I64:
      return f(int64_t());
    default:
      return sa_with_float(dtype, f);
  }
}

#endif
