// which pairs dropout keeps, as words of bits; included once per ISA, which says VECTOR_BYTES
#ifndef SAFEATTN_KERNELS_CPU_DROPOUT_H
#define SAFEATTN_KERNELS_CPU_DROPOUT_H
#include "random.h"

// Philox on vectors of 64-bit lanes, of which the products read the low halves alone: so a product need not be taken
// apart, and what its high half leaves in a lane does no harm.
typedef uint64_t sa_wide __attribute__((vector_size(VECTOR_BYTES)));
// Neighbouring queries are the same lane of two vectors, so that in the end the halves of both make one vector of words
// in their order. A round waits 7 cycles for itself, which other vectors' rounds beside it fill: one vector after the
// other, what the processor had at hand was mostly one vector's, and all took a third longer. 53 instructions for 32
// words (AVX-512) on the two ports of the products are 20 % of their time.
enum { WIDE_LANES = VECTOR_BYTES / 8, WIDE_QUERIES = 2 * WIDE_LANES, ABREAST = VECTOR_BYTES == 64 ? 4 : 2 };

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

// The high halves where the low ones were, by the port of shuffles, which has less to do than that of shifts.
static inline sa_wide sa_wide_down(sa_wide a) {
#if defined(__AVX512F__)
  return (sa_wide)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB);
#else
  return a >> 32;
#endif
}

// The low halves of two vectors, and the high halves, as words in turn.
static inline sa_wide sa_wide_lows(sa_wide even, sa_wide odd) {
#if defined(__AVX512F__)
  return (sa_wide)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
#else
  return (even & 0xffffffff) | odd << 32;
#endif
}

static inline sa_wide sa_wide_highs(sa_wide even, sa_wide odd) {
#if defined(__AVX512F__)
  return (sa_wide)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, _MM_PERM_DDBB);
#else
  return even >> 32 | (odd & ~(uint64_t)0xffffffff);
#endif
}

// One bit a word: whether it is at least the threshold.
static inline uint64_t sa_wide_kept(sa_wide words, uint32_t threshold) {
  typedef uint32_t narrow __attribute__((vector_size(VECTOR_BYTES)));
  const narrow least = threshold - (narrow){0};
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask((__m512i)words, (__m512i)least);
#else
  const narrow kept = (narrow)((narrow)words >= least);
#if defined(__AVX2__)
  return (uint64_t)(unsigned)_mm256_movemask_ps((__m256)kept);
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < WIDE_QUERIES; lane++) bits |= (uint64_t)(kept[lane] & 1) << lane;
  return bits;
#endif
#endif
}

// Bit i of kept[w]: word w of the Philox block first + i * step is at least the threshold. All these blocks have the
// same high word, so that the first product of the second round is one number.
static inline void sa_kept_fours(uint64_t seed, uint32_t threshold, uint64_t first, uint64_t step, int queries,
                                 uint64_t *kept) {
  const uint64_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
  uint32_t key0[10], key1[10];
  for (int round = 0; round < 10; round++) {
    key0[round] = (uint32_t)seed + (uint32_t)round * 0x9E3779B9u;
    key1[round] = (uint32_t)(seed >> 32) + (uint32_t)round * 0xBB67AE85u;
  }
  const uint64_t common = (uint64_t)((uint32_t)(first >> 32) ^ key0[0]) * multiplier0;
  sa_wide lanes;
  for (int lane = 0; lane < WIDE_LANES; lane++) lanes[lane] = first + 2 * (uint64_t)lane * step;
  uint64_t words[4] = {0};
  for (int i = 0; i < queries; i += ABREAST * WIDE_LANES) {
    sa_wide x0[ABREAST], x1[ABREAST], x2[ABREAST], x3[ABREAST];
#pragma GCC unroll 4
    for (int n = 0; n < ABREAST; n++) {
      const int query = i + n / 2 * WIDE_QUERIES + n % 2;
      const sa_wide counter = lanes + sa_wide_set((uint64_t)query * step);
      const sa_wide product0 = sa_wide_product(counter, sa_wide_set(multiplier0));
      x2[n] = product0 >> 32 ^ sa_wide_set(key1[0]);
      x3[n] = product0;
    }
#pragma GCC unroll 4
    for (int n = 0; n < ABREAST; n++) {
      const sa_wide product1 = sa_wide_product(x2[n], sa_wide_set(multiplier1));
      x0[n] = sa_wide_down(product1) ^ sa_wide_set(key0[1]);
      x1[n] = product1;
      x2[n] = x3[n] ^ sa_wide_set(common >> 32 ^ key1[1]);
      x3[n] = sa_wide_set(common);
    }
#pragma GCC unroll 7
    for (int round = 2; round < 9; round++) {
#pragma GCC unroll 4
      for (int n = 0; n < ABREAST; n++) {
        const sa_wide product0 = sa_wide_product(x0[n], sa_wide_set(multiplier0));
        const sa_wide product1 = sa_wide_product(x2[n], sa_wide_set(multiplier1));
        x0[n] = product1 >> 32 ^ x1[n] ^ sa_wide_set(key0[round]);
        x1[n] = product1;
        x2[n] = sa_wide_down(product0) ^ x3[n] ^ sa_wide_set(key1[round]);
        x3[n] = product0;
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < ABREAST; n += 2) {
      sa_wide product0[2], product1[2];
#pragma GCC unroll 2
      for (int k = 0; k < 2; k++) {
        product0[k] = sa_wide_product(x0[n + k], sa_wide_set(multiplier0));
        product1[k] = sa_wide_product(x2[n + k], sa_wide_set(multiplier1));
      }
      const sa_wide last0 = sa_wide_set((uint64_t)key0[9] << 32 | key0[9]);
      const sa_wide last1 = sa_wide_set((uint64_t)key1[9] << 32 | key1[9]);
      const sa_wide word[4] = {
          sa_wide_highs(product1[0], product1[1]) ^ sa_wide_lows(x1[n], x1[n + 1]) ^ last0,
          sa_wide_lows(product1[0], product1[1]),
          sa_wide_highs(product0[0], product0[1]) ^ sa_wide_lows(x3[n], x3[n + 1]) ^ last1,
          sa_wide_lows(product0[0], product0[1]),
      };
#pragma GCC unroll 4
      for (int w = 0; w < 4; w++) words[w] |= sa_wide_kept(word[w], threshold) << (i + n * WIDE_LANES);
    }
  }
  for (int w = 0; w < 4; w++) kept[w] = words[w];
}

// Bit i of kept[r]: the pair (i, r) is kept; bits from `queries` on mean nothing. `first` is the linear index in
// [B,H,L,S] of pair (0, 0) and `step` the distance of one query to the next, S. With S and first multiples of 4 one
// Philox block serves four keys.
static void sa_kept_words(uint64_t seed, uint32_t threshold, uint64_t first, uint64_t step, int queries, int keys,
                          uint64_t *kept) {
  const uint64_t last = first + (uint64_t)keys + 64 * step;
  const bool fours = first % 4 == 0 && step % 4 == 0 && first >> 34 == last >> 34;
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
