// random numbers by counter, for every device: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3")
#ifndef SAFEATTN_RANDOM_H
#define SAFEATTN_RANDOM_H
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "everywhere.h"

/*  The stream of a seed is one 32-bit word for every 64-bit index. Philox turns a counter of four words, under a key of
 *  two, into four random words; word `index` is output index % 4 of
 *
 *      counter = (low word of index / 4, high word of index / 4, 0, 0)      key = (low word of seed, high word of seed)
 *
 *  So any word can be had at any time, in any order, on any device. What is drawn from the words:
 *
 *      rand f32         (word(i) >> 8) * 2^-24
 *      rand f16, bf16   the same, rounded to nearest, and at most the largest value below 1
 *      rand f64         ((word(2i) >> 5) * 2^26 + (word(2i+1) >> 6)) * 2^-53
 *      randn            with a = word(i & ~1), b = word(i | 1), in f64:   r = sqrt(-2 ln((a + 1) * 2^-32)),
 *                       r cos(2 pi b 2^-32) for even i, r sin(2 pi b 2^-32) for odd i; then rounded to the dtype
 *      dropout          weight i is dropped when word(i) < threshold
 *
 *  where i is the row-major index of an element of the tensor (of the weights [B,H,L,S] for dropout).
 */

typedef struct sa_words {
  uint32_t word[4];
} sa_words;

// The words 4 * block .. 4 * block + 3 of a seed's stream.
SA_EVERYWHERE sa_words sa_random_block(uint64_t seed, uint64_t block) {
  uint32_t x0 = (uint32_t)block, x1 = (uint32_t)(block >> 32), x2 = 0, x3 = 0;
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t product0 = (uint64_t)x0 * 0xD2511F53u, product1 = (uint64_t)x2 * 0xCD9E8D57u;
    x0 = (uint32_t)(product1 >> 32) ^ x1 ^ key0;
    x1 = (uint32_t)product1;
    x2 = (uint32_t)(product0 >> 32) ^ x3 ^ key1;
    x3 = (uint32_t)product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  sa_words words;
  words.word[0] = x0;
  words.word[1] = x1;
  words.word[2] = x2;
  words.word[3] = x3;
  return words;
}

// Word `index` of a seed's stream.
SA_EVERYWHERE uint32_t sa_random_word(uint64_t seed, uint64_t index) {
  const sa_words words = sa_random_block(seed, index / 4);
  const uint32_t low = index & 1 ? words.word[1] : words.word[0];
  const uint32_t high = index & 1 ? words.word[3] : words.word[2];
  return index & 2 ? high : low;
}

// words[k] = word first + k * step of a seed's stream, for k in 0 .. count-1: a row of weights (step 1), or a column of
// them (step S). The same as sa_random_word in a loop, which the compiler vectorises from AVX2 on.
SA_EVERYWHERE void sa_random_words(uint64_t seed, uint64_t first, uint64_t step, int64_t count, uint32_t *words) {
  for (int64_t k = 0; k < count; k++) words[k] = sa_random_word(seed, first + (uint64_t)k * step);
}

// The four words of the blocks first + k * step, word w of each to words_w[k]: four neighbouring columns of weights for
// the price of one, when S is a multiple of 4.
SA_EVERYWHERE void sa_random_blocks(uint64_t seed, uint64_t first, uint64_t step, int64_t count,
                                    uint32_t *__restrict__ words0, uint32_t *__restrict__ words1,
                                    uint32_t *__restrict__ words2, uint32_t *__restrict__ words3) {
  for (int64_t k = 0; k < count; k++) {
    const sa_words words = sa_random_block(seed, first + (uint64_t)k * step);
    words0[k] = words.word[0];
    words1[k] = words.word[1];
    words2[k] = words.word[2];
    words3[k] = words.word[3];
  }
}

SA_EVERYWHERE float sa_uniform_f32(uint32_t word) {
  return (float)(word >> 8) * 0x1p-24f;
}

SA_EVERYWHERE double sa_uniform_f64(uint32_t high, uint32_t low) {
  return ((high >> 5) * 0x1p26 + (low >> 6)) * 0x1p-53;
}

// A product and a sum that no compiler makes one of, so that normal numbers have the same bits on every device. Their
// functions are series of their own for that reason, too: those of two libraries differ by an ulp or two.
SA_EVERYWHERE double sa_times(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

SA_EVERYWHERE double sa_plus(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

// x term[0] + x^2 term[1] + ...
SA_EVERYWHERE double sa_series(double x, int terms, const double *term) {
  double sum = 0;
  for (int k = terms - 1; k >= 0; k--) sum = sa_times(sa_plus(sum, term[k]), x);
  return sum;
}

// -log(n / 2^32), n from 1 to 2^32. With n = 2^e m, m within sqrt 2 of 1: (32 - e) log 2 - 2 atanh((m-1) / (m+1)).
SA_EVERYWHERE double sa_minus_log(double n) {
  const double term[] = {1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11, 1.0 / 13,
                         1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21, 1.0 / 23};
  uint64_t bits;
  memcpy(&bits, &n, sizeof bits);
  int e = (int)(bits >> 52) - 1023;
  double m = n * (1 / (double)((uint64_t)1 << e));
  if (m > 0x1.6a09e667f3bcdp0) {
    m *= 0.5;
    e++;
  }
  const double x = 2 * (m - 1) / (m + 1);
  const double small = sa_plus(x, sa_times(x, sa_series(sa_times(0.25 * x, x), 11, term)));
  return sa_plus(sa_times(32 - e, 0x1.62e42fefa39efp-1), -small);
}

// Of angles up to an eighth of a turn.
SA_EVERYWHERE double sa_sine(double x) {
  const double term[] = {-1.0 / 6,        1.0 / 120,        -1.0 / 5040,          1.0 / 362880,
                         -1.0 / 39916800, 1.0 / 6227020800, -1.0 / 1307674368000, 1.0 / 355687428096000};
  return sa_plus(x, sa_times(x, sa_series(sa_times(x, x), 8, term)));
}

SA_EVERYWHERE double sa_cosine(double x) {
  const double term[] = {-1.0 / 2,       1.0 / 24,        -1.0 / 720,         1.0 / 40320,
                         -1.0 / 3628800, 1.0 / 479001600, -1.0 / 87178291200, 1.0 / 20922789888000};
  return sa_plus(1, sa_series(sa_times(x, x), 8, term));
}

// Box and Muller's: two words make two normal numbers. Quarter turns are taken off the angle in integers, which is
// exact, so that a sine or cosine near 0 keeps all its digits.
SA_EVERYWHERE void sa_normals(uint32_t a, uint32_t b, double *values) {
  const double radius = sqrt(2 * sa_minus_log(a + 1.0));
  const uint32_t quarters = (b + 0x20000000u) >> 30;
  const double rest = (int32_t)(b - (quarters << 30)) * (0x1.921fb54442d18p0 * 0x1p-30);  // pi/2 is a quarter turn
  const double sine = sa_times(radius, sa_sine(rest)), cosine = sa_times(radius, sa_cosine(rest));
  const double x = quarters & 1 ? sine : cosine, y = quarters & 1 ? cosine : sine;
  values[0] = quarters == 1 || quarters == 2 ? -x : x;
  values[1] = quarters >= 2 ? -y : y;
}

// A weight is dropped when its word is below this: the smallest threshold for which at least `probability` of all words
// are. 0 drops nothing; a probability within 2^-32 of 1 keeps one word in 2^32.
SA_EVERYWHERE uint32_t sa_dropout_threshold(double probability) {
  const double words = probability * 4294967296.0;
  if (!(words > 0)) return 0;
  if (words >= 4294967295.0) return 0xffffffffu;
  const uint32_t whole = (uint32_t)words;
  return whole + (whole < words);
}

SA_EVERYWHERE int sa_dropped(uint64_t seed, uint64_t index, uint32_t threshold) {
  return sa_random_word(seed, index) < threshold;
}

#endif
