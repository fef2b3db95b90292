// which pairs dropout keeps, as words of bits; included once per ISA, which says VECTOR_BYTES
#ifndef SAFEATTN_KERNELS_CPU_DROPOUT_H
#define SAFEATTN_KERNELS_CPU_DROPOUT_H
#include "random.h"

// Philox on vectors of 64-bit lanes, of which the products read the low halves alone: so a product need not be taken
// apart, and what its high half leaves in a lane does no harm.
typedef uint64_t sa_wide __attribute__((vector_size(VECTOR_BYTES)));
enum { WIDE_LANES = VECTOR_BYTES / 8 };

static inline sa_wide sa_wide_set(uint64_t x) {
  return x - (sa_wide){0};
}

static inline sa_wide sa_wide_product(sa_wide a, sa_wide b) {
#if defined(__AVX512F__)
  return (sa_wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (sa_wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// One bit a lane: whether its low half is at least the threshold.
static inline uint64_t sa_wide_kept(sa_wide word, uint32_t threshold) {
  const sa_wide high = word << 32, least = sa_wide_set((uint64_t)threshold << 32);
#if defined(__AVX512F__)
  return _mm512_cmpge_epu64_mask((__m512i)high, (__m512i)least);
#else
  const sa_wide kept = (sa_wide)(high >= least);
#if defined(__AVX2__)
  return (uint64_t)(unsigned)_mm256_movemask_pd((__m256d)kept);
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < WIDE_LANES; lane++) bits |= (kept[lane] & 1) << lane;
  return bits;
#endif
#endif
}

// Bit i of kept[w]: word w of the Philox block first + i * step is at least the threshold.
static inline void sa_kept_fours(uint64_t seed, uint32_t threshold, uint64_t first, uint64_t step, int queries,
                                 uint64_t *kept) {
  const sa_wide multiplier0 = sa_wide_set(0xD2511F53u), multiplier1 = sa_wide_set(0xCD9E8D57u);
  sa_wide counter;
  for (int lane = 0; lane < WIDE_LANES; lane++) counter[lane] = first + (uint64_t)lane * step;
  uint64_t words[4] = {0};
  for (int i = 0; i < queries; i += WIDE_LANES, counter += sa_wide_set(WIDE_LANES * step)) {
    sa_wide x0 = counter, x1 = counter >> 32, x2 = {0}, x3 = {0};
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
      const sa_wide product0 = sa_wide_product(x0, multiplier0), product1 = sa_wide_product(x2, multiplier1);
      x0 = product1 >> 32 ^ x1 ^ sa_wide_set(key0);
      x1 = product1;
      x2 = product0 >> 32 ^ x3 ^ sa_wide_set(key1);
      x3 = product0;
    }
    words[0] |= sa_wide_kept(x0, threshold) << i;
    words[1] |= sa_wide_kept(x1, threshold) << i;
    words[2] |= sa_wide_kept(x2, threshold) << i;
    words[3] |= sa_wide_kept(x3, threshold) << i;
  }
  for (int w = 0; w < 4; w++) kept[w] = words[w];
}

// Bit i of kept[r]: the pair (i, r) is kept; bits from `queries` on mean nothing. `first` is the linear index in
// [B,H,L,S] of pair (0, 0) and `step` the distance of one query to the next, S. With S and first multiples of 4 one
// Philox block serves four keys.
static void sa_kept_words(uint64_t seed, uint32_t threshold, uint64_t first, uint64_t step, int queries, int keys,
                          uint64_t *kept) {
  const bool fours = first % 4 == 0 && step % 4 == 0;
  int key = 0;
  for (; fours && key + 4 <= keys; key += 4) {
    sa_kept_fours(seed, threshold, (first + (uint64_t)key) / 4, step / 4, queries, kept + key);
  }
  uint32_t words[64];
  for (; key < keys; key++) {
    uint64_t bits = 0;
    sa_random_words(seed, first + (uint64_t)key, step, queries, words);
    for (int i = 0; i < queries; i++) bits |= (uint64_t)(words[i] >= threshold) << i;
    kept[key] = bits;
  }
}

#endif
