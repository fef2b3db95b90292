// the fused kernels with AVX-512: vectors of 64 bytes, register tiles of 6 x 4
//
// 24 sums, 4 vectors of the right side and a broadcast are 29 of the 32 registers. f32 reaches 84 to 89 % of the
// 512-bit peak forward and 83 to 89 % backward; the half types, converted tile by tile, 83 to 85 % at D64. Scores and
// dP of bf16 are products of pairs where the processor has them (flash_pairs.h).
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
#define STRETCH KEYS
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
// 2^x = 2^n 2^(i/16) 2^f, x rounded down to sixteenths: adding a number whose last bit is one leaves i in the low 4
// bits, vreducepd gives the rest f, and vscalefpd rounds x down to n by itself. 14 instructions with a subtraction and
// a sum, where a polynomial for all of [-1/2, 1/2] took 20; with n added to the table's exponents they were 15, and the
// forward 1 to 2 % slower.
static inline __m512d power_f64(__m512d x, __mmask8 lanes) {
  enum { DOWN = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC };
  static const double sixteenths[16] __attribute__((aligned(64))) = {
      0x1.0000000000000p0, 0x1.0b5586cf9890fp0, 0x1.172b83c7d517bp0, 0x1.2387a6e756238p0,
      0x1.306fe0a31b715p0, 0x1.3dea64c123422p0, 0x1.4bfdad5362a27p0, 0x1.5ab07dd485429p0,
      0x1.6a09e667f3bcdp0, 0x1.7a11473eb0187p0, 0x1.8ace5422aa0dbp0, 0x1.9c49182a3f090p0,
      0x1.ae89f995ad3adp0, 0x1.c199bdd85529cp0, 0x1.d5818dcfba487p0, 0x1.ea4afa2a490dap0};
  static const double terms[] = {EXP2_SIXTEENTH_TERMS};
  const __m512d part = _mm512_reduce_pd(x, 4 << 4 | DOWN);
  const __m512i bits = _mm512_castpd_si512(_mm512_add_round_pd(x, _mm512_set1_pd(0x1.8p48), DOWN));
  const __m512d power = _mm512_permutex2var_pd(_mm512_load_pd(sixteenths), bits, _mm512_load_pd(sixteenths + 8));
  __m512d rest = _mm512_set1_pd(terms[0]);
  for (int k = 1; k < (int)(sizeof terms / sizeof *terms); k++) rest = fma_f64(rest, part, _mm512_set1_pd(terms[k]));
  return _mm512_maskz_scalef_pd(lanes, fma_f64(power, rest * part, power), x);
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
