// AMX's instructions as functions, for machines whose processor has none; kernels/cpu/amx.c is compiled with them
#ifndef SAFEATTN_EMULATOR_AMX_H
#define SAFEATTN_EMULATOR_AMX_H
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulate_config
#define _tile_release amx_emulate_release
#define _tile_zero amx_emulate_zero
#define _tile_loadd amx_emulate_load
#define _tile_stored amx_emulate_store
#define _tile_dpbf16ps amx_emulate_product

enum { AMX_EMULATED_TILES = 8, AMX_EMULATED_ROWS = 16, AMX_EMULATED_BYTES = 64 };

typedef union amx_emulated_tile {
  _Alignas(64) unsigned char bytes[AMX_EMULATED_ROWS][AMX_EMULATED_BYTES];
  float sums[AMX_EMULATED_ROWS][16];
  uint32_t pairs[AMX_EMULATED_ROWS][16];
} amx_emulated_tile;

// A thread's tiles. Only whole ones are emulated, those that the kernels use; without a configuration there are none.
static _Thread_local struct {
  int configured;
  amx_emulated_tile tile[AMX_EMULATED_TILES];
} amx_emulated;

static inline void amx_emulate_want(int holds) {
  if (!holds) abort();
}

static inline void amx_emulate_config(const void *memory) {
  const unsigned char *config = memory;
  amx_emulate_want(config[0] == 1 && config[1] == 0);
  for (int t = 0; t < AMX_EMULATED_TILES; t++) {
    amx_emulate_want(config[16 + 2 * t] == AMX_EMULATED_BYTES && config[17 + 2 * t] == 0);
    amx_emulate_want(config[48 + t] == AMX_EMULATED_ROWS);
  }
  memset(&amx_emulated, 0, sizeof amx_emulated);
  amx_emulated.configured = 1;
}

static inline void amx_emulate_release(void) {
  memset(&amx_emulated, 0xff, sizeof amx_emulated);
  amx_emulated.configured = 0;
}

static inline amx_emulated_tile *amx_emulated_tile_of(int t) {
  amx_emulate_want(amx_emulated.configured && t >= 0 && t < AMX_EMULATED_TILES);
  return &amx_emulated.tile[t];
}

static inline void amx_emulate_zero(int t) {
  memset(amx_emulated_tile_of(t), 0, sizeof(amx_emulated_tile));
}

static inline void amx_emulate_load(int t, const void *from, int64_t stride) {
  amx_emulated_tile *tile = amx_emulated_tile_of(t);
  for (int r = 0; r < AMX_EMULATED_ROWS; r++) {
    memcpy(tile->bytes[r], (const char *)from + r * stride, AMX_EMULATED_BYTES);
  }
}

static inline void amx_emulate_store(int t, void *to, int64_t stride) {
  const amx_emulated_tile *tile = amx_emulated_tile_of(t);
  for (int r = 0; r < AMX_EMULATED_ROWS; r++) memcpy((char *)to + r * stride, tile->bytes[r], AMX_EMULATED_BYTES);
}

// TDPBF16PS: the even and the odd products of a row and a column are summed apart, from 0, by fused multiply-adds to
// the nearest even; the two sums are added, and that to C. Subnormal operands count as 0 and subnormal results become
// 0, whatever the thread's own modes.
static inline void amx_emulate_product(int c, int a, int b) {
  amx_emulated_tile *sum = amx_emulated_tile_of(c);
  const amx_emulated_tile *left = amx_emulated_tile_of(a), *right = amx_emulated_tile_of(b);
  // The compiler does not know that arithmetic reads the modes, but that what is between two barriers reads memory.
  const unsigned modes = _mm_getcsr();
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
  _mm_setcsr(0x9fc0);  // masked exceptions, to the nearest, flush to zero, denormals are zero
  __asm__ volatile("" ::: "memory");
  for (int m = 0; m < AMX_EMULATED_ROWS; m++) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < AMX_EMULATED_ROWS; k++) {
      const __m512i x = _mm512_set1_epi32((int)left->pairs[m][k]), y = _mm512_load_si512(right->pairs[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(x, upper)),
                            _mm512_castsi512_ps(_mm512_and_si512(y, upper)), odd);
    }
    _mm512_store_ps(sum->sums[m], _mm512_add_ps(_mm512_load_ps(sum->sums[m]), _mm512_add_ps(even, odd)));
  }
  __asm__ volatile("" ::: "memory");
  _mm_setcsr(modes);
}

#endif
