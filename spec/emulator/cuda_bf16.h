// bfloat16: conversions round to nearest even, NaN becomes 0x7fff
#ifndef EMULATOR_CUDA_BF16_H
#define EMULATOR_CUDA_BF16_H
#include "cuda_runtime.h"

struct __nv_bfloat16_raw {
  unsigned short x;
};

namespace emulator {

static inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline float from_bf16(uint16_t x) {
  return bits_of<float>((uint32_t)x << 16);
}

}  // namespace emulator

struct alignas(2) __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(emulator::to_bf16(x)) {}
  __nv_bfloat16(double x) : bits(emulator::to_bf16((float)x)) {}
  __nv_bfloat16(int x) : bits(emulator::to_bf16((float)x)) {}
  __nv_bfloat16(__nv_bfloat16_raw x) : bits(x.x) {}
  operator float() const { return emulator::from_bf16(bits); }
  operator __nv_bfloat16_raw() const { return {bits}; }
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
  __nv_bfloat162() = default;
  __nv_bfloat162(__nv_bfloat16 x_, __nv_bfloat16 y_) : x(x_), y(y_) {}
};

static inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  return __nv_bfloat16(x);
}
static inline __nv_bfloat16 __float2bfloat16(float x) {
  return __nv_bfloat16(x);
}
static inline float __bfloat162float(__nv_bfloat16 x) {
  return (float)x;
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return __nv_bfloat162(x, y);
}
static inline float __low2float(__nv_bfloat162 x) {
  return x.x;
}
static inline float __high2float(__nv_bfloat162 x) {
  return x.y;
}
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) {
  return x.bits;
}
static inline bool __hisnan(__nv_bfloat16 x) {
  return (x.bits & 0x7fff) > 0x7f80;
}

#endif
