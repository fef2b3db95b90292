// the emulated products of AMX beside the processor's, bit by bit; for a machine that has them
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

// The same text twice: with the processor's instructions, and behind amx.h with the emulated ones.
#define DEFINE_PRODUCT(name)                                                    \
  static void name(const void *shape, const void *a, const void *b, float *c) { \
    _tile_loadconfig(shape);                                                    \
    _tile_loadd(0, c, 64);                                                      \
    _tile_loadd(1, a, 64);                                                      \
    _tile_loadd(2, b, 64);                                                      \
    _tile_dpbf16ps(0, 1, 2);                                                    \
    _tile_stored(0, c, 64);                                                     \
    _tile_release();                                                            \
  }

DEFINE_PRODUCT(real_product)
#include "amx.h"
DEFINE_PRODUCT(emulated_product)

static uint32_t draw(void) {
  static uint64_t state = 0x9e3779b97f4a7c15;
  state = state * 6364136223846793005 + 1442695040888963407;
  return (uint32_t)(state >> 32);
}

// Exponents within `spread` of 1 and below; all bits at random when it is 255.
static uint32_t number(unsigned spread) {
  return spread == 255 ? draw() : (draw() & 0x807fffff) | (127 - draw() % (spread + 1)) << 23;
}

int main(void) {
  static uint8_t shape[64] __attribute__((aligned(64))) = {1};
  static uint16_t a[512] __attribute__((aligned(64))), b[512] __attribute__((aligned(64)));
  static float real[256] __attribute__((aligned(64))), emulated[256] __attribute__((aligned(64)));
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return puts("no AMX here"), 2;
  for (int t = 0; t < 8; t++) shape[16 + 2 * t] = 64, shape[48 + t] = 16;
  static const unsigned spreads[] = {0, 4, 20, 70, 126, 127, 255};
  for (unsigned round = 0; round < 70000; round++) {
    const unsigned spread = spreads[round % 7];
    for (int n = 0; n < 512; n++) a[n] = (uint16_t)(number(spread) >> 16), b[n] = (uint16_t)(number(spread) >> 16);
    for (int n = 0; n < 256; n++) {
      const uint32_t bits = round % 2 ? number(spread) : 0;
      memcpy(&real[n], &bits, sizeof bits);
    }
    memcpy(emulated, real, sizeof real);
    real_product(shape, a, b, real);
    emulated_product(shape, a, b, emulated);
    for (int n = 0; n < 256; n++) {
      // NaN are not told apart.
      if (!memcmp(&real[n], &emulated[n], sizeof *real) || (real[n] != real[n] && emulated[n] != emulated[n])) continue;
      return printf("round %u, spread %u, element %d: %a, emulated %a\n", round, spread, n, real[n], emulated[n]), 1;
    }
  }
  return puts("the same bits"), 0;
}
