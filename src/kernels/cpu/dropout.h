// which pairs dropout keeps, as words of bits
#ifndef SAFEATTN_KERNELS_CPU_DROPOUT_H
#define SAFEATTN_KERNELS_CPU_DROPOUT_H
#include "random.h"

// Bit i of kept[r]: the pair (i, r) is kept. `first` is the linear index in [B,H,L,S] of pair (0, 0) and `step` the
// distance of one query to the next, S. With S and first multiples of 4 one Philox block serves four keys.
static void sa_kept_words(uint64_t seed, uint32_t threshold, uint64_t first, uint64_t step, int queries, int keys,
                          uint64_t *kept) {
  const bool fours = first % 4 == 0 && step % 4 == 0;
  uint32_t words[4][64];
  for (int key = 0; key < keys;) {
    const int count = fours && keys - key >= 4 ? 4 : 1;
    if (count == 4) {
      sa_random_blocks(seed, (first + (uint64_t)key) / 4, step / 4, queries, words[0], words[1], words[2], words[3]);
    } else {
      sa_random_words(seed, first + (uint64_t)key, step, queries, words[0]);
    }
    for (int k = 0; k < count; k++, key++) {
      uint64_t bits = 0;
      for (int i = 0; i < queries; i++) bits |= (uint64_t)(words[k][i] >= threshold) << i;
      kept[key] = bits;
    }
  }
}

#endif
