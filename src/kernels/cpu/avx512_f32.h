// vectors of 16 floats, for the files of AVX-512 and AMX; part of flash.h's vectors
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
static inline __m512 max_where_f32(uint64_t lanes, __m512 a, __m512 b) {
  return _mm512_mask_max_ps(b, (__mmask16)lanes, a, b);
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
static inline __m512 power_f32(__m512 x, __mmask16 lanes) {
  const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  static const float terms[] = {EXP2_TERMS_f32};
  __m512 power = _mm512_set1_ps(terms[0]);
  for (int k = 1; k < (int)(sizeof terms / sizeof *terms); k++) power = fma_f32(power, part, _mm512_set1_ps(terms[k]));
  return _mm512_maskz_scalef_ps(lanes, power, x);
}
static inline __m512 exp2_f32(__m512 x) {
  return power_f32(x, _mm512_cmp_ps_mask(x, _mm512_set1_ps(LOWEST_EXPONENT), _CMP_NLT_UQ));
}
static inline __m512 exp2_where_f32(uint64_t lanes, __m512 x) {
  return power_f32(x, _mm512_mask_cmp_ps_mask((__mmask16)lanes, x, _mm512_set1_ps(LOWEST_EXPONENT), _CMP_NLT_UQ));
}
// sum + a b, of pairs of bf16, by AVX512_BF16, which files of AVX-512 are not compiled for, where it is as fast as a
// multiply-add: AMD's processors. A Sapphire Rapids, which has AMX for bf16, takes 1.4 times as long for a forward with
// it. Subnormal elements are 0 to it.
#define OWN_PAIRS
static inline bool has_pairs_f32(void) {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
}
static inline __m512 add_pairs_f32(__m512 sum, __m512 a, __m512 b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
// The columns of a square: quarters of four rows are one load's vector, so that two rounds of interleaving in quarters
// are left of four across vectors. A third less than those.
#define OWN_COLUMNS
static inline __attribute__((always_inline)) void columns_of_f32(const float *from, int64_t from_row,
                                                                 __m512 column[LANES]) {
#pragma GCC unroll 4
  for (int d = 0; d < LANES; d += 4) {
    __m512 quarter[4], pair[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const float *row = from + i * from_row + d;
      // Else the compiler keeps the places of all 16 rows at hand, in more registers than there are.
      __asm__("" : "+r"(row));
      const __m512 low = _mm512_castps128_ps512(_mm_loadu_ps(row));
      const __m512 half = _mm512_insertf32x4(low, _mm_loadu_ps(row + 4 * from_row), 1);
      const __m512 most = _mm512_insertf32x4(half, _mm_loadu_ps(row + 8 * from_row), 2);
      quarter[i] = _mm512_insertf32x4(most, _mm_loadu_ps(row + 12 * from_row), 3);
    }
    pair[0] = _mm512_unpacklo_ps(quarter[0], quarter[1]);
    pair[1] = _mm512_unpackhi_ps(quarter[0], quarter[1]);
    pair[2] = _mm512_unpacklo_ps(quarter[2], quarter[3]);
    pair[3] = _mm512_unpackhi_ps(quarter[2], quarter[3]);
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++) {
      const __m512d low = _mm512_castps_pd(pair[n]), high = _mm512_castps_pd(pair[n + 2]);
      column[d + 2 * n] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      column[d + 2 * n + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
}
// The sum of each vector's lanes, vector i's in lane i: pairs within quarters, which take a cycle, and then quarters.
#define OWN_SUMS
static inline __attribute__((always_inline)) __m512 sums_of_f32(__m512 sum[LANES]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    sum[i] = _mm512_unpacklo_ps(sum[2 * i], sum[2 * i + 1]) + _mm512_unpackhi_ps(sum[2 * i], sum[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(sum[2 * i]), b = _mm512_castps_pd(sum[2 * i + 1]);
    sum[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
#pragma GCC unroll 2
  for (int n = 2; n > 0; n--) {
#pragma GCC unroll 2
    for (int i = 0; i < n; i++) {
      sum[i] = _mm512_shuffle_f32x4(sum[2 * i], sum[2 * i + 1], 0x88) +
               _mm512_shuffle_f32x4(sum[2 * i], sum[2 * i + 1], 0xdd);
    }
  }
  return sum[0];
}
