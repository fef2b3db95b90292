// float16: conversions round to nearest even, NaN becomes 0x7fff
#ifndef EMULATOR_CUDA_FP16_H
#define EMULATOR_CUDA_FP16_H
#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};

namespace emulator {

static inline uint16_t to_f16(float x) {
  const uint32_t bits = bits_of<uint32_t>(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 and more
  // Below the smallest normal number an addition places the last bit and rounds.
  if (magnitude < 0x38800000)
    return (uint16_t)(sign | (bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000));
  return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}
static inline float from_f16(uint16_t x) {
  const uint32_t sign = (uint32_t)(x & 0x8000) << 16, magnitude = x & 0x7fff;
  if (magnitude >= 0x7c00) return bits_of<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400) return bits_of<float>(sign | bits_of<uint32_t>((float)magnitude * 0x1p-24f));
  return bits_of<float>(sign | ((magnitude << 13) + 0x38000000));
}

}  // namespace emulator

struct alignas(2) __half {
  unsigned short bits;
  __half() = default;
  __half(float x) : bits(emulator::to_f16(x)) {}
  __half(double x) : bits(emulator::to_f16((float)x)) {}
  __half(int x) : bits(emulator::to_f16((float)x)) {}
  __half(__half_raw x) : bits(x.x) {}
  operator float() const { return emulator::from_f16(bits); }
  operator __half_raw() const { return {bits}; }
};
typedef __half half;

struct alignas(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half x_, __half y_) : x(x_), y(y_) {}
};

static inline __half __float2half_rn(float x) {
  return __half(x);
}
static inline __half __float2half(float x) {
  return __half(x);
}
static inline float __half2float(__half x) {
  return (float)x;
}
static inline __half2 __floats2half2_rn(float x, float y) {
  return __half2(x, y);
}
static inline float __low2float(__half2 x) {
  return x.x;
}
static inline float __high2float(__half2 x) {
  return x.y;
}
static inline unsigned short __half_as_ushort(__half x) {
  return x.bits;
}
static inline __half __ushort_as_half(unsigned short x) {
  return __half_raw{x};
}
static inline bool __hisnan(__half x) {
  return (x.bits & 0x7fff) > 0x7c00;
}

#endif
