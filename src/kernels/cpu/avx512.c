// the fused kernels with AVX-512: vectors of 64 bytes, register tiles of 6 x 4
//
// 24 sums, 4 vectors of the right side and a broadcast are 29 of the 32 registers. f32 reaches 77 to 84 % of the
// 512-bit peak forward and 83 to 85 % backward; the half types, converted tile by tile, some 5 % less.
#if defined(__AVX512F__)
#include <immintrin.h>

#define TIER avx512
#define VECTOR_BYTES 64

#include "kernels/cpu/flash_needs.h"

#include "kernels/cpu/real_f32.h"
#define LANES 16
#define TILE_VECTORS 4
#define STRETCH KEYS
typedef __m512 vector_f32;
static inline __m512 load_f32(const float *from) {
  return _mm512_loadu_ps(from);
}
static inline void store_f32(float *to, __m512 x) {
  _mm512_storeu_ps(to, x);
}
static inline __m512 set_f32(float x) {
  return _mm512_set1_ps(x);
}
static inline __m512 fma_f32(__m512 a, __m512 b, __m512 c) {
  return _mm512_fmadd_ps(a, b, c);
}
static inline __m512 max_f32(__m512 a, __m512 b) {
  return _mm512_max_ps(a, b);
}
static inline __m512 magnitude_f32(__m512 x) {
  return _mm512_abs_ps(x);
}
static inline __m512 select_f32(uint64_t lanes, __m512 a, __m512 b) {
  return _mm512_mask_mov_ps(b, (__mmask16)lanes, a);
}
static inline uint64_t below_or_equal_f32(__m512 a, __m512 b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
}
// vreduceps and vscalefps do the splitting and the scaling in one instruction each: 9.6 elements a nanosecond, where
// adding a shift and a mask gave 6.5. What is below 2^LOWEST_EXPONENT becomes 0, as vector.h explains.
static inline __m512 exp2_f32(__m512 x) {
  const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  static const float terms[] = {EXP2_TERMS_f32};
  __m512 power = _mm512_set1_ps(terms[0]);
  for (int k = 1; k < (int)(sizeof terms / sizeof *terms); k++) power = fma_f32(power, part, _mm512_set1_ps(terms[k]));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(LOWEST_EXPONENT), _CMP_NLT_UQ), power, x);
}
#include "kernels/cpu/flash.h"
#include "kernels/cpu/real_end.h"
#include "kernels/cpu/real_f64.h"
#define LANES 8
#define TILE_VECTORS 4
#define STRETCH SEGMENT
typedef __m512d vector_f64;
static inline __m512d load_f64(const double *from) {
  return _mm512_loadu_pd(from);
}
static inline void store_f64(double *to, __m512d x) {
  _mm512_storeu_pd(to, x);
}
static inline __m512d set_f64(double x) {
  return _mm512_set1_pd(x);
}
static inline __m512d fma_f64(__m512d a, __m512d b, __m512d c) {
  return _mm512_fmadd_pd(a, b, c);
}
static inline __m512d max_f64(__m512d a, __m512d b) {
  return _mm512_max_pd(a, b);
}
static inline __m512d magnitude_f64(__m512d x) {
  return _mm512_abs_pd(x);
}
static inline __m512d select_f64(uint64_t lanes, __m512d a, __m512d b) {
  return _mm512_mask_mov_pd(b, (__mmask8)lanes, a);
}
static inline uint64_t below_or_equal_f64(__m512d a, __m512d b) {
  return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ);
}
static inline __m512d exp2_f64(__m512d x) {
  const __m512d whole = _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512d part = x - whole;
  static const double terms[] = {EXP2_TERMS_f64};
  __m512d power = _mm512_set1_pd(terms[0]);
  for (int k = 1; k < (int)(sizeof terms / sizeof *terms); k++) power = fma_f64(power, part, _mm512_set1_pd(terms[k]));
  return _mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(x, _mm512_set1_pd(LOWEST_EXPONENT), _CMP_NLT_UQ), power, whole);
}
#include "kernels/cpu/flash.h"
#include "kernels/cpu/real_end.h"

#include "kernels/cpu/flash_table.h"
#endif
