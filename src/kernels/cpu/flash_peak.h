// what the core can do: fused multiply-adds from registers, for one REAL; part of flash.h

// Best of several runs of about a millisecond, in flops per second.
static double NAME(measure_peak)(void) {
  enum { CHAINS = TILE_VECTORS == 4 ? 24 : 12, ROUNDS = 20000 };
  double best = 0;
  for (int attempt = 0; attempt < 20; attempt++) {
    NAME(vector) sum[CHAINS];
    // Unrolled, so that the sums live in registers.
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++) sum[i] = NAME(set)((REAL)i);
    const NAME(vector) x = NAME(set)((REAL)0.999), y = NAME(set)((REAL)0.001);
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (int round = 0; round < ROUNDS; round++) {
#pragma GCC unroll 24
      for (int i = 0; i < CHAINS; i++) sum[i] = NAME(fma)(sum[i], x, y);
    }
    clock_gettime(CLOCK_MONOTONIC, &to);
    REAL keep[LANES];
#pragma GCC unroll 24
    for (int i = 1; i < CHAINS; i++) sum[0] = sum[0] + sum[i];
    NAME(store)(keep, sum[0]);
    __asm__ volatile("" ::"r"(keep) : "memory");
    const double seconds = (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec);
    const double rate = 2.0 * CHAINS * LANES * ROUNDS / seconds;
    if (rate > best) best = rate;
  }
  return best;
}
