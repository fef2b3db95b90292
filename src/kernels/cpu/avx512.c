// the fused kernels with AVX-512: vectors of 64 bytes, register tiles of 6 x 4
//
// 24 sums, 4 vectors of the right side and a broadcast are 29 of the 32 registers. f32 reaches 83 to 87 % of the
// 512-bit peak forward and 83 to 84 % backward; the half types, converted tile by tile, some 1 and 5 % less.
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
static inline __m512d max_where_f64(uint64_t lanes, __m512d a, __m512d b) {
  return _mm512_mask_max_pd(b, (__mmask8)lanes, a, b);
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
// 2^x = 2^n 2^(i/16) 2^f, x rounded to sixteenths by adding a number whose last bit is one, and its rest f, which
// vreducepd rounds likewise; then the low 4 bits of the sum are i and those above are n. The table's entries carry -i
// where n is added, so that one addition makes both of them the exponent. 15 instructions with a subtraction and a sum,
// where a polynomial for all of [-1/2, 1/2] took 20.
static inline __m512d power_f64(__m512d x, __mmask8 lanes) {
  static const uint64_t sixteenths[16]
      __attribute__((aligned(64))) = {0x3ff0000000000000, 0x3fefb5586cf9890f, 0x3fef72b83c7d517b, 0x3fef387a6e756238,
                                      0x3fef06fe0a31b715, 0x3feedea64c123422, 0x3feebfdad5362a27, 0x3feeab07dd485429,
                                      0x3feea09e667f3bcd, 0x3feea11473eb0187, 0x3feeace5422aa0db, 0x3feec49182a3f090,
                                      0x3feee89f995ad3ad, 0x3fef199bdd85529c, 0x3fef5818dcfba487, 0x3fefa4afa2a490da};
  static const double terms[] = {EXP2_SIXTEENTH_TERMS};
  const __m512d part = _mm512_reduce_pd(x, 4 << 4 | _MM_FROUND_CUR_DIRECTION | _MM_FROUND_NO_EXC);
  const __m512i bits = _mm512_castpd_si512(x + _mm512_set1_pd(0x1.8p48));
  const __m512i entry =
      _mm512_permutex2var_epi64(_mm512_load_si512(sixteenths), bits, _mm512_load_si512(sixteenths + 8));
  const __m512d power = _mm512_castsi512_pd(_mm512_add_epi64(entry, _mm512_slli_epi64(bits, 48)));
  __m512d rest = _mm512_set1_pd(terms[0]);
  for (int k = 1; k < (int)(sizeof terms / sizeof *terms); k++) rest = fma_f64(rest, part, _mm512_set1_pd(terms[k]));
  return _mm512_maskz_fmadd_pd(lanes, power, rest * part, power);
}
static inline __m512d exp2_f64(__m512d x) {
  return power_f64(x, _mm512_cmp_pd_mask(x, _mm512_set1_pd(LOWEST_EXPONENT), _CMP_NLT_UQ));
}
static inline __m512d exp2_where_f64(uint64_t lanes, __m512d x) {
  return power_f64(x, _mm512_mask_cmp_pd_mask((__mmask8)lanes, x, _mm512_set1_pd(LOWEST_EXPONENT), _CMP_NLT_UQ));
}
#include "kernels/cpu/flash.h"
#include "kernels/cpu/real_end.h"

#include "kernels/cpu/flash_table.h"
#endif
