// random numbers by counter, for every device: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3")
#ifndef SAFEATTN_RANDOM_H
#define SAFEATTN_RANDOM_H
#include <math.h>
#include <stdint.h>

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

// Box and Muller's: two words make two normal numbers. Quarter turns are taken off the angle in integers, which is
// exact, so that a sine or cosine near 0 keeps all its digits on every device.
SA_EVERYWHERE void sa_normals(uint32_t a, uint32_t b, double *values) {
  const double radius = sqrt(-2 * log((a + 1.0) * 0x1p-32));
  const uint32_t quarters = (b + 0x20000000u) >> 30;
  const double rest = (int32_t)(b - (quarters << 30)) * (0x1.921fb54442d18p0 * 0x1p-30);  // pi/2 is a quarter turn
  const double sine = radius * sin(rest), cosine = radius * cos(rest);
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
