// which pairs dropout drops; included once per ISA, which says VECTOR_BYTES
#ifndef SAFEATTN_KERNELS_CPU_DROPOUT_H
#define SAFEATTN_KERNELS_CPU_DROPOUT_H
#include <string.h>

#include "random.h"

// Philox on vectors of 64-bit lanes, of which the products read the low halves alone: so a product need not be taken
// apart, and what its high half leaves in a lane does no harm.
typedef uint64_t sa_wide __attribute__((vector_size(VECTOR_BYTES)));
// Neighbouring queries are the same lane of two vectors, a pair, so that in the end the halves of both make one vector
// of words in their order. A round waits 10 cycles for itself, which other pairs' rounds beside it fill: 32 words take
// 33 cycles with 8 vectors side by side, 41 with 4 (AVX-512: some 58 instructions on the two ports of the products).
enum { WIDE_LANES = VECTOR_BYTES / 8, WIDE_QUERIES = 2 * WIDE_LANES, PAIRS = VECTOR_BYTES == 64 ? 4 : 1 };

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

// One bit a word: whether it is below the threshold.
static inline uint64_t sa_wide_below(sa_wide words, uint32_t threshold) {
  typedef uint32_t narrow __attribute__((vector_size(VECTOR_BYTES)));
  const narrow limit = threshold - (narrow){0};
#if defined(__AVX512F__)
  return _mm512_cmplt_epu32_mask((__m512i)words, (__m512i)limit);
#else
  const narrow below = (narrow)((narrow)words < limit);
#if defined(__AVX2__)
  return (uint64_t)(unsigned)_mm256_movemask_ps((__m256)below);
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < WIDE_QUERIES; lane++) bits |= (uint64_t)(below[lane] & 1) << lane;
  return bits;
#endif
#endif
}

// Takes what is dropped of the pairs (query .. query + WIDE_QUERIES - 1, key), a bit a query. It may be told twice.
typedef void (*sa_take_dropped)(void *to, int key, int query, uint64_t dropped);

// Tells which words of the Philox blocks first + i * step + n are below the threshold: word w is key 4 n + w, i the
// query. All these blocks have the same high word, so that the first product of the second round is one number, and
// that of the first round grows by its multiplier from n to n + 1.
static inline __attribute__((always_inline)) void sa_draw_fours(uint64_t seed, uint32_t threshold, uint64_t first,
                                                                uint64_t step, int queries, int fours,
                                                                sa_take_dropped take, void *to) {
  const uint64_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
  uint32_t key0[10], key1[10];
  for (int round = 0; round < 10; round++) {
    key0[round] = (uint32_t)seed + (uint32_t)round * 0x9E3779B9u;
    key1[round] = (uint32_t)(seed >> 32) + (uint32_t)round * 0xBB67AE85u;
  }
  const uint64_t common = (uint64_t)((uint32_t)(first >> 32) ^ key0[0]) * multiplier0;
  const int columns = (queries + WIDE_QUERIES - 1) / WIDE_QUERIES;
  sa_wide start[64 / WIDE_QUERIES][2];
  for (int i = 0; i < columns * WIDE_QUERIES; i++) {
    start[i / WIDE_QUERIES][i % 2][i % WIDE_QUERIES / 2] = (uint32_t)(first + (uint64_t)i * step) * multiplier0;
  }
  for (int pair = 0, column = 0, four = 0; pair < columns * fours; pair += PAIRS) {
    enum { VECTORS = 2 * PAIRS };
    sa_wide x0[VECTORS], x1[VECTORS], x2[VECTORS], x3[VECTORS];
    int query[PAIRS], key[PAIRS];
#pragma GCC unroll 4
    for (int n = 0; n < PAIRS; n++) {
      query[n] = column * WIDE_QUERIES;
      key[n] = 4 * four;
      for (int k = 0; k < 2; k++) {
        const sa_wide product0 = start[column][k] + sa_wide_set((uint64_t)four * multiplier0);
        x2[2 * n + k] = product0 >> 32 ^ sa_wide_set(key1[0]);
        x3[2 * n + k] = product0;
      }
      // Beyond the last four its columns come again.
      if (++column < columns) continue;
      column = 0;
      four += four + 1 < fours;
    }
#pragma GCC unroll 8
    for (int n = 0; n < VECTORS; n++) {
      const sa_wide product1 = sa_wide_product(x2[n], sa_wide_set(multiplier1));
      x0[n] = sa_wide_down(product1) ^ sa_wide_set(key0[1]);
      x1[n] = product1;
      x2[n] = x3[n] ^ sa_wide_set(common >> 32 ^ key1[1]);
      x3[n] = sa_wide_set(common);
    }
#pragma GCC unroll 7
    for (int round = 2; round < 9; round++) {
#pragma GCC unroll 8
      for (int n = 0; n < VECTORS; n++) {
        const sa_wide product0 = sa_wide_product(x0[n], sa_wide_set(multiplier0));
        const sa_wide product1 = sa_wide_product(x2[n], sa_wide_set(multiplier1));
        x0[n] = product1 >> 32 ^ x1[n] ^ sa_wide_set(key0[round]);
        x1[n] = product1;
        x2[n] = sa_wide_down(product0) ^ x3[n] ^ sa_wide_set(key1[round]);
        x3[n] = product0;
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; n += 2) {
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
      for (int w = 0; w < 4; w++) take(to, key[n / 2] + w, query[n / 2], sa_wide_below(word[w], threshold));
    }
  }
}

// The words of a key's pairs, wherever they lie.
static __attribute__((noinline)) void sa_draw_key(uint64_t seed, uint64_t first, uint64_t step, int queries,
                                                  uint32_t *words) {
  sa_random_words(seed, first, step, queries, words);
}

// Tells which of the pairs (i, r) are dropped. `first` is the linear index in [B,H,L,S] of pair (0, 0) and `step` the
// distance of one query to the next, S. With S and first multiples of 4 one Philox block serves four keys.
static inline __attribute__((always_inline)) void sa_draw(uint64_t seed, uint32_t threshold, uint64_t first,
                                                          uint64_t step, int queries, int keys, sa_take_dropped take,
                                                          void *to) {
  const uint64_t last = first + (uint64_t)keys + 64 * step;
  const int fours = first % 4 == 0 && step % 4 == 0 && first >> 34 == last >> 34 ? keys / 4 : 0;
  sa_draw_fours(seed, threshold, first / 4, step / 4, queries, fours, take, to);
  uint32_t words[64 + WIDE_QUERIES];
  for (int key = 4 * fours; key < keys; key++) {
    sa_draw_key(seed, first + (uint64_t)key, step, queries, words);
    for (int query = 0; query < queries; query += WIDE_QUERIES) {
      uint64_t dropped = 0;
      for (int i = 0; i < WIDE_QUERIES; i++) dropped |= (uint64_t)(words[query + i] < threshold) << i;
      take(to, key, query, dropped);
    }
  }
}

static inline void sa_unset_dropped(void *kept, int key, int query, uint64_t dropped) {
  ((uint64_t *)kept)[key] &= ~(dropped << query);
}

// Bit i of kept[r]: the pair (i, r) is kept; bits from `queries` on mean nothing.
static void sa_kept_words(uint64_t seed, uint32_t threshold, uint64_t first, uint64_t step, int queries, int keys,
                          uint64_t *kept) {
  memset(kept, 255, sizeof *kept * keys);
  sa_draw(seed, threshold, first, step, queries, keys, sa_unset_dropped, kept);
}

#endif
