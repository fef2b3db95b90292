// exp for the loops of the tape, in C that vectorises: f32 within 1 ulp, and a form for softmax weights
#ifndef SAFEATTN_KERNELS_CPU_EXP_H
#define SAFEATTN_KERNELS_CPU_EXP_H
#include <math.h>

#include "cast.h"

// exp(x) = 2^n (1 + r + r^2 p(r)), n = round(x / ln 2), |r| <= ln 2 / 2. ln 2 is split so that n times its high part is
// exact. NaN stays NaN through r.
static inline float sa_exp_f32_parts(float x, int32_t *n) {
  const float shifter = 0x1.8p23f;  // adding it rounds to an integer, which then is in the low bits
  const float shifted = x * 0x1.715476p0f + shifter;
  const float rounded = shifted - shifter;
  const float r = (x - rounded * 0x1.62e4p-1f) - rounded * 0x1.7f7d1cp-20f;
  float p = 0x1.6850e4p-10f;
  p = p * r + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  *n = (int32_t)(sa_bits_of_f32(shifted) - sa_bits_of_f32(shifter));
  return (p * (r * r) + r) + 1.0f;
}

static inline float sa_power_of_two(int32_t n) {
  return sa_f32_of_bits((uint32_t)(n + 127) << 23);
}

// The scale is applied in two steps, so that results may be subnormal or overflow.
static inline float sa_exp_f32(float x) {
  const float below = x > 89.0f ? 89.0f : x;  // both ends are past infinity and zero
  const float inside = below < -104.0f ? -104.0f : below;
  int32_t n;
  const float p = sa_exp_f32_parts(inside, &n);
  const int32_t half = n >> 1;
  return p * sa_power_of_two(half) * sa_power_of_two(n - half);
}

// For x <= 0: results below the smallest normal number are 0. A subnormal operand costs 150 cycles, and rows of softmax
// weights are full of them as soon as a bias is large.
static inline float sa_weight_f32(float x) {
  const float smallest = -0x1.5d589ep6f;  // ln 2^-126
  const float inside = x < smallest ? smallest : x;
  int32_t n;
  const float p = sa_exp_f32_parts(inside, &n);
  const float weight = p * sa_power_of_two(n);
  // Not a second choice by x < smallest: the compiler would make one branch of the two, and no vectors.
  const uint32_t keep = inside == x || x != x ? ~UINT32_C(0) : 0;
  return sa_f32_of_bits(sa_bits_of_f32(weight) & keep);
}

static inline double sa_weight_f64(double x) {
  return x < -0x1.6232bdd7abcd2p9 ? 0.0 : exp(x);
}

#endif
