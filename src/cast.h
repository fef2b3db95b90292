// how one value becomes another dtype: to nearest, ties to even, in one rounding
#ifndef SAFEATTN_CAST_H
#define SAFEATTN_CAST_H
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "everywhere.h"

// All of these are branch-free where it matters, so that loops over them vectorise, and the same bits on every machine.
// A NaN stays a NaN, becomes quiet and keeps the sign and as much of its payload as fits.

SA_EVERYWHERE uint32_t sa_bits_of_f32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

SA_EVERYWHERE float sa_f32_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

SA_EVERYWHERE float sa_f16_to_f32(uint16_t half) {
  const int32_t magnitude = half & 0x7fff;
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16;
  const float subnormal = (float)magnitude * 0x1p-24f;
  const uint32_t normal = (uint32_t)(magnitude << 13) + ((127 - 15) << 23);
  const uint32_t special = (uint32_t)(magnitude << 13) | 0x7f800000 | (magnitude > 0x7c00 ? 0x400000 : 0);
  const uint32_t finite = magnitude < 0x400 ? sa_bits_of_f32(subnormal) : normal;
  return sa_f32_of_bits(sign | (magnitude < 0x7c00 ? finite : special));
}

SA_EVERYWHERE uint16_t sa_f32_to_f16(float x) {
  const uint32_t bits = sa_bits_of_f32(x);
  const int32_t magnitude = bits & 0x7fffffff;
  // Half of what is cut off is added, less one when the last kept bit is even: ties then go to even.
  const int32_t normal = (magnitude - ((127 - 15) << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // The last bit of 0.5f is worth 2^-24, as is the last of a subnormal half: this addition rounds.
  const int32_t subnormal = (int32_t)sa_bits_of_f32(sa_f32_of_bits((uint32_t)magnitude) + 0.5f) - 0x3f000000;
  const int32_t special = magnitude > 0x7f800000 ? 0x7e00 | (magnitude >> 13 & 0x3ff) : 0x7c00;
  const int32_t finite = magnitude < 0x38800000 ? subnormal : normal;                    // below 2^-14
  return (uint16_t)(bits >> 16 & 0x8000) | (magnitude < 0x477ff000 ? finite : special);  // 65520 rounds to infinity
}

SA_EVERYWHERE float sa_bf16_to_f32(uint16_t brain) {
  const uint32_t quiet = (brain & 0x7fff) > 0x7f80 ? 0x400000 : 0;
  return sa_f32_of_bits((uint32_t)brain << 16 | quiet);
}

SA_EVERYWHERE uint16_t sa_f32_to_bf16(float x) {
  const uint32_t bits = sa_bits_of_f32(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((int32_t)(bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

// f64 to a 16-bit float of so many bits of fraction. Through f32 it would round twice: 1 + 2^-11 + 2^-40 is more than
// half way between two f16 values, but f32 keeps only the half.
SA_EVERYWHERE uint16_t sa_f64_to_16_bits(double x, int fraction_bits) {
  const int bias = (1 << (14 - fraction_bits)) - 1;
  const int infinity = 0x7fff & -(1 << fraction_bits);
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  const int sign = (int)(bits >> 48) & 0x8000;
  const uint64_t fraction = bits & 0xfffffffffffff;
  const int exponent = (int)(bits >> 52 & 0x7ff);
  if (exponent == 0x7ff) {
    const int payload = fraction ? 1 << (fraction_bits - 1) | (int)(fraction >> (52 - fraction_bits)) : 0;
    return (uint16_t)(sign | infinity | payload);
  }
  const int rebased = exponent - 1023 + bias;  // of a normal result: at least 1
  const int shift = 52 - fraction_bits + (rebased < 1 ? 1 - rebased : 0);
  if (shift > 53) return (uint16_t)sign;  // less than half of the smallest subnormal
  const uint64_t significand = fraction | UINT64_C(1) << 52;
  const uint64_t half_less_one = (UINT64_C(1) << (shift - 1)) - 1;
  const uint64_t rounded = (significand + half_less_one + (significand >> shift & 1)) >> shift;
  // The leading one of a normal significand adds the last step to the exponent, and so does a carry.
  const int64_t result = ((int64_t)(rebased < 1 ? 0 : rebased - 1) << fraction_bits) + (int64_t)rounded;
  return (uint16_t)(sign | (result < infinity ? (int)result : infinity));
}

SA_EVERYWHERE uint16_t sa_f64_to_f16(double x) {
  return sa_f64_to_16_bits(x, 10);
}
SA_EVERYWHERE uint16_t sa_f64_to_bf16(double x) {
  return sa_f64_to_16_bits(x, 7);
}

// Integers that f16 can hold are exact in f32; larger ones are infinite in both.
SA_EVERYWHERE uint16_t sa_i64_to_f16(int64_t x) {
  return sa_f32_to_f16((float)x);
}

// The 11 bits that f64 may lack become one that only says whether any was set, so that nothing is rounded twice.
SA_EVERYWHERE uint16_t sa_i64_to_bf16(int64_t x) {
  const bool large = x > INT64_C(1) << 52 || x < -(INT64_C(1) << 52);
  return sa_f64_to_bf16((double)(large && (x & 0x7ff) ? (x & ~INT64_C(0x7ff)) | 0x400 : x));
}

SA_EVERYWHERE int64_t sa_f64_to_i64(double x) {
  if (x >= 0x1p63) return INT64_MAX;
  if (x >= -0x1p63) return (int64_t)x;
  return x != x ? 0 : INT64_MIN;
}

SA_EVERYWHERE int32_t sa_f64_to_i32(double x) {
  const double below = x < 2147483647.0 ? x : 2147483647.0;
  const double inside = below > -2147483648.0 ? below : -2147483648.0;
  return x != x ? 0 : (int32_t)inside;
}

SA_EVERYWHERE int32_t sa_i64_to_i32(int64_t x) {
  return (int32_t)(x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : x);
}

#endif
