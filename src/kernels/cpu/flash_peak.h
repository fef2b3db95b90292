// what the core can do: fused multiply-adds from registers, for one REAL; part of flash.h

// Some tenth of a millisecond of them; returns how many flops that was.
static double NAME(multiply)(void) {
  enum { CHAINS = TILE_VECTORS == 4 ? 24 : 12, ROUNDS = 20000 };
  NAME(vector) sum[CHAINS];
  // Unrolled, so that the sums live in registers.
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; i++) sum[i] = NAME(set)((REAL)i);
  const NAME(vector) x = NAME(set)((REAL)0.999), y = NAME(set)((REAL)0.001);
  for (int round = 0; round < ROUNDS; round++) {
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++) sum[i] = NAME(fma)(sum[i], x, y);
  }
  REAL keep[LANES];
#pragma GCC unroll 24
  for (int i = 1; i < CHAINS; i++) sum[0] = sum[0] + sum[i];
  NAME(store)(keep, sum[0]);
  __asm__ volatile("" ::"r"(keep) : "memory");
  return 2.0 * CHAINS * LANES * ROUNDS;
}
