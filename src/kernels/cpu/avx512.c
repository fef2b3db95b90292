// the fused kernels with AVX-512: vectors of 64 bytes, register tiles of 6 x 4
//
// 24 sums, 4 vectors of the right side and a broadcast are 29 of the 32 registers. f32 reaches 85 to 87 % of the
// 512-bit peak forward and 84 to 86 % backward; the half types, converted tile by tile, some 1 and 5 % less.
#if defined(__AVX512F__)
#include <immintrin.h>

#define TIER avx512
#define VECTOR_BYTES 64

#include "kernels/cpu/flash_needs.h"

#include "kernels/cpu/real_f32.h"
#include "kernels/cpu/avx512_f32.h"
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
