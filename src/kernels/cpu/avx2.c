// the fused kernels with AVX2 and FMA: vectors of 32 bytes, register tiles of 6 x 2
//
// 12 sums, 2 vectors of the right side and a broadcast are 15 of the 16 registers. f32 reaches 81 to 85 % of the
// 256-bit peak forward and 81 to 90 % backward.
#if defined(__AVX2__)
#include <immintrin.h>

#define TIER avx2
#define VECTOR_BYTES 32

#include "kernels/cpu/flash_needs.h"

#include "kernels/cpu/real_f32.h"
// Rounds down in one instruction, and adds the whole part to the exponent of the power, which lies in [1, 2). (What no
// integer holds becomes 0x80000000, which is shifted out: a NaN stays one.)
static inline __m256 exp2_avx2(__m256 x) {
  const __m256 whole = _mm256_floor_ps(x), part = x - whole;
  static const float terms[] = {EXP2_TERMS_f32};
  __m256 power = _mm256_set1_ps(terms[0]);
  for (int k = 1; k < (int)(sizeof terms / sizeof *terms); k++) {
    power = _mm256_fmadd_ps(power, part, _mm256_set1_ps(terms[k]));
  }
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), MANTISSA_BITS);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(LOWEST_EXPONENT), _CMP_LT_OQ), scaled);
}
#define LANES 8
#define TILE_VECTORS 2
#define STRETCH SEGMENT
#define OWN_FMA _mm256_fmadd_ps
#define OWN_MAX _mm256_max_ps
#define OWN_EXP2 exp2_avx2
#define OWN_BITS_OF _mm256_movemask_ps
#include "kernels/cpu/vector.h"
#include "kernels/cpu/flash.h"
#include "kernels/cpu/real_end.h"

#include "kernels/cpu/real_f64.h"
#define LANES 4
#define TILE_VECTORS 2
#define STRETCH SEGMENT
#define OWN_FMA _mm256_fmadd_pd
#define OWN_MAX _mm256_max_pd
#define OWN_BITS_OF _mm256_movemask_pd
#include "kernels/cpu/vector.h"
#include "kernels/cpu/flash.h"
#include "kernels/cpu/real_end.h"

#include "kernels/cpu/flash_table.h"
#endif
