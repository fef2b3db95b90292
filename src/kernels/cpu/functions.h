// exp, log, tanh and the normal distribution in f32 for the loops of the tape, in C that vectorises; CUDA devices use
// them too
//
// The choices of two values in them become vectors only under -fno-trapping-math.
#ifndef SAFEATTN_KERNELS_CPU_FUNCTIONS_H
#define SAFEATTN_KERNELS_CPU_FUNCTIONS_H
#include <math.h>

#include "cast.h"
#include "kernels/cpu/exponential.h"

// ln 2 in two parts: the high one times an exponent is exact.
#define SA_LN2_HIGH 0x1.62e4p-1f
#define SA_LN2_LOW 0x1.7f7d1cp-20f

// exp(x + low) = 2^n (1 + r + r^2 p(r)), n = round(x / ln 2), |r| <= ln 2 / 2; low is what x was rounded by. NaN stays
// NaN through r.
SA_EVERYWHERE float sa_exp_f32_parts(float x, float low, int32_t *n) {
  const float shifter = 0x1.8p23f;  // adding it rounds to an integer, which then is in the low bits
  const float shifted = x * 0x1.715476p0f + shifter;
  const float rounded = shifted - shifter;
  const float r = (x - rounded * SA_LN2_HIGH) - rounded * SA_LN2_LOW + low;
  float p = 0x1.6850e4p-10f;
  p = p * r + 0x1.123bccp-7f;
  p = p * r + 0x1.555b98p-5f;
  p = p * r + 0x1.55548ep-3f;
  p = p * r + 0x1.fffff8p-2f;
  *n = (int32_t)(sa_bits_of_f32(shifted) - sa_bits_of_f32(shifter));
  return (p * (r * r) + r) + 1.0f;
}

SA_EVERYWHERE float sa_power_of_two(int32_t n) {
  return sa_f32_of_bits((uint32_t)(n + 127) << 23);
}

// exp(x + low). The scale is applied in two steps, so that results may be subnormal or overflow.
SA_EVERYWHERE float sa_exp_f32_sum(float x, float low) {
  const float below = x > 89.0f ? 89.0f : x;  // both ends are past infinity and zero
  const float inside = below < -104.0f ? -104.0f : below;
  int32_t n;
  const float p = sa_exp_f32_parts(inside, low, &n);
  const int32_t half = n >> 1;
  return p * sa_power_of_two(half) * sa_power_of_two(n - half);
}

SA_EVERYWHERE float sa_exp_f32(float x) {
  return sa_exp_f32_sum(x, 0.0f);
}  // within 1 ulp

// exp for x <= 0: results below the smallest normal number are 0. A subnormal operand costs 150 cycles, and rows of
// softmax weights are full of them as soon as a bias is large.
SA_EVERYWHERE float sa_weight_f32(float x) {
  const float smallest = -0x1.5d589ep6f;  // ln 2^-126
  const float inside = x < smallest ? smallest : x;
  int32_t n;
  const float p = sa_exp_f32_parts(inside, 0.0f, &n);
  const float weight = p * sa_power_of_two(n);
  return x < smallest ? 0.0f : weight;
}

SA_EVERYWHERE double sa_weight_f64(double x) {
  return x < -0x1.6232bdd7abcd2p9 ? 0.0 : exp(x);
}

// Within 1 ulp. x = 2^e (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); log(1 + f) = 2 atanh(s), s = f / (2 + f), which is
// f - s (f - R(s^2)) with the terms of atanh's series in R.
SA_EVERYWHERE float sa_log_f32(float x) {
  const bool small = x < 0x1p-126f;
  const float normal = small ? x * 0x1p23f : x;
  const uint32_t bits = sa_bits_of_f32(normal);
  const int32_t e = (int32_t)(bits - 0x3f3504f3) >> 23;  // the bits of sqrt(1/2)
  const float f = sa_f32_of_bits(bits - ((uint32_t)e << 23)) - 1.0f;
  const float exponent = (float)(e - (small ? 23 : 0));
  const float s = f / (2.0f + f), z = s * s;
  const float r = z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9))));
  const float result = exponent * SA_LN2_HIGH + (f - (s * (f - r) - exponent * SA_LN2_LOW));
  const float of_special = x < 0 ? NAN : x == 0 ? -INFINITY : x;
  return x > 0 && x < INFINITY ? result : of_special;
}

// The same of finite x from 2^-126 on, with some digits more, within 3e-8: those of 2^e, and of a float near 1.
SA_EVERYWHERE double sa_log_in_double_f32(float x) {
  const uint32_t bits = sa_bits_of_f32(x);
  const int32_t e = (int32_t)(bits - 0x3f3504f3) >> 23;
  return (float)e * 0.6931471805599453 + sa_log_f32(sa_f32_of_bits(bits - ((uint32_t)e << 23)));
}

// Within 3 ulp: 1 - 2 / (exp(2x) + 1), and the polynomial below 0.4, where that would cancel.
SA_EVERYWHERE float sa_tanh_f32(float x) {
  static const float terms[] = {TANH_TERMS_f32};
  const float magnitude = fabsf(x), square = x * x;
  const float inside = magnitude > 20.0f ? 20.0f : magnitude;
  const float large = 1.0f - 2.0f / (sa_exp_f32(2.0f * inside) + 1.0f);
  float p = terms[0];
  for (int i = 1; i < 5; i++) p = p * square + terms[i];
  return magnitude < 0.4f ? x + x * square * p : copysignf(large, x);
}

// The standard normal distribution, within 5 ulp: its series near 0; elsewhere log(erfc(z) exp(z^2) / t), t = 1 / (1 +
// z/2), is a polynomial in t to 1e-8 for all z >= 0 (interpolated at Chebyshev's points). The tail is computed as a
// tail, so that it does not cancel, and its exponent as a sum of two parts, or its rounding would show 4 ulp at z = 2.
SA_EVERYWHERE float sa_normal_f32(float x) {
  static const float terms[] = {-0.148811626f,  0.148840285f, 0.14048364f,    -0.248501404f,
                                -0.0473114387f, 0.296174068f, -0.0395941327f, -0.406901133f,
                                0.0947626167f,  1.36811885f,  -0.563156786f};
  const float magnitude = fabsf(x);
  const float inside = magnitude > 15.0f ? 15.0f : magnitude;  // the tail is 0 from there on
  const float t = 1.0f / (1.0f + 0.353553391f * inside);       // z = |x| / sqrt(2)
  const float u = t - 0.58f;
  float p = terms[0];
  for (int i = 1; i < 11; i++) p = p * u + terms[i];
  const float high = sa_f32_of_bits(sa_bits_of_f32(inside) & 0xfffff000);  // its square is exact
  const float square = -0.5f * high * high, rest = -0.5f * (inside - high) * (inside + high);
  const float sum = square + p, p_kept = sum - square;
  const float lost = (square - (sum - p_kept)) + (p - p_kept);
  const float tail = 0.5f * t * sa_exp_f32_sum(sum, lost + rest);
  const float large = x < 0 ? tail : 1.0f - tail;
  static const float series[] = {6.65969352e-07f, -9.44465626e-06f, 0.000115434688f, -0.00118732822f,
                                 0.00997355701f,  -0.0664903801f,   0.39894228f};
  float q = series[0];
  for (int i = 1; i < 7; i++) q = q * (x * x) + series[i];
  return magnitude < 0.7f ? 0.5f + x * q : large;
}

SA_EVERYWHERE float sa_normal_density_f32(float x) {
  return 0.398942280f * sa_exp_f32(-0.5f * x * x);
}

#endif
