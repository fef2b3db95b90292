// softmax of the forward on Hopper: a thread's scores of a step to weights
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_SOFTMAX_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_SOFTMAX_CUH
#include "kernels/cuda/hopper_forward_consumer.cuh"

// The greatest score of each row.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::row_maxima(float (&x)[2]) {
  float t[4];
#pragma unroll
  for (int i = 0; i < 4; i++) t[i] = fmaxf(s[i], s[i + 4]);
#pragma unroll
  for (int i = 8; i < scores; i++) t[i % 4] = fmaxf(t[i % 4], s[i]);
  x[0] = forward_quad_max(fmaxf(t[0], t[1]));
  x[1] = forward_quad_max(fmaxf(t[2], t[3]));
}

// A score in the units of the maximum.
template <class SHAPE>
__device__ __forceinline__ float forward_consumer<SHAPE>::in_units(float score) {
  return SHAPE::extras ? score : score * c.scale_log2;
}

// No row of an item has a maximum yet. What the item before had is kept for its end.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::begin_rows() {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    top_before[r] = top[r], sum_before[r] = sum[r];
    sum[r] = low[r] = 0.f;
    keep(r, forward_minus_infinity());
  }
  alive = (alive & 3) << 2;
  all_seen = false;
}

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::keep(int r, float maximum) {
  top[r] = maximum;
  shift[r] = maximum == forward_minus_infinity() ? 0.f : -maximum;
}

// A difference of scores as an exponent of 2.
template <class SHAPE>
__device__ __forceinline__ float forward_consumer<SHAPE>::octaves(float x) {
  if constexpr (SHAPE::extras & FORWARD_BIAS) return x * c.scores.unit;
  return x;
}

// What the exponential of a score of row r is taken of.
template <class SHAPE>
__device__ __forceinline__ float forward_consumer<SHAPE>::exponent(float score, int r) {
  if constexpr (SHAPE::extras) return octaves(score + shift[r]);
  return fmaf(score, c.scale_log2, shift[r]);
}

// The exponentials of a thread's scores, summed as softmax() does.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::sums(float (&t)[2]) {
  float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < scores; i += 2) {
    part[i & 3] += exp2_fast(exponent(s[i], i >> 1 & 1));
    part[(i & 3) + 1] += exp2_fast(exponent(s[i + 1], i >> 1 & 1));
  }
  t[0] = part[0] + part[1];
  t[1] = part[2] + part[3];
}

// Raises the maximum of rows whose sum of this step overflows under the kept one. All others keep it, so that they
// get the same bits. What overflows is told by the greatest score, but close to the limit by the sums themselves.
// Whether O must be scaled, by a.
template <class SHAPE>
template <bool CAREFUL>
__device__ __forceinline__ bool forward_consumer<SHAPE>::raise_maxima(float (&a)[2]) {
  float x[2];
  row_maxima(x);
  bool over[2], unsure = false, any = false;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float e = exponent(x[r], r);
    over[r] = e >= 128.f;
    unsure |= !over[r] && e > FORWARD_NEAR;
    x[r] = in_units(x[r]);
  }
  if (__any_sync(~0u, unsure)) {
    float t[2];
    sums(t);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      over[r] = __ballot_sync(~0u, t[r] == -forward_minus_infinity()) >> (lane & 28) & 15;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    a[r] = 1.f;
    if (over[r]) {
      a[r] = exp2_fast(octaves(top[r] - x[r]));
      if (CAREFUL && x[r] > top[r]) low[r] = 0.f;
      keep(r, x[r]);
      sum[r] *= a[r];
      any = true;
    }
  }
  // With extras the maximum is taken off a score before the difference gets its unit, so that it is exact.
  if (CAREFUL && !SHAPE::extras) settle_huge();
  return __any_sync(~0u, any);
}

// A maximum beyond 2^30 is rounded by more than an exponential can take: what is left of the greatest score is taken
// off all scores of the row. Without it the row would have no finite sum, and no bits to keep.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::settle_huge() {
  float most[2] = {forward_minus_infinity(), forward_minus_infinity()};
#pragma unroll
  for (int i = 0; i < scores; i++) {
    most[i >> 1 & 1] = fmaxf(most[i >> 1 & 1], exponent(s[i], i >> 1 & 1));
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float left = forward_quad_max(most[r]), size = fabsf(top[r]);
    // Only of the step that has the maximum: in the others `left` is as far below as the scores are.
    if (low[r] == 0.f && size > 0x1p30f && fabsf(left) > 100.f && fabsf(left) < size * 0x1p-22f) low[r] = left;
  }
}

template <class SHAPE>
template <bool CAREFUL>
__device__ __forceinline__ float forward_consumer<SHAPE>::exponential(int i) {
  const float x = exponent(s[i], i >> 1 & 1);
  return exp2_fast(CAREFUL && !SHAPE::extras ? x - low[i >> 1 & 1] : x);
}

// Masked scores are replaced, never added to: whatever they are, they vanish. Row by row, so that ptxas takes seven
// bits to predicates at a time.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::mask_scores(uint2 bits) {
  const float lowest = c.scale_log2 * forward_minus_infinity();  // which ptxas does not know
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int bit = 0; bit < scores / 2; bit++) {
      const uint32_t word = r ? bits.y : bits.x;
      float &score = s[4 * (bit >> 1) + 2 * r + (bit & 1)];
      if constexpr (SHAPE::extras) {
        score = word & 1u << bit ? score : forward_minus_infinity();
      } else {
        replace_unless(score, word, bit, c.scale_log2, lowest, bit + 32 * r);
      }
    }
  }
}

// S to P (halves, as the A operand) under the row's kept maximum. Whether O must be scaled, by a.
template <class SHAPE>
template <bool CAREFUL>
__device__ __forceinline__ bool forward_consumer<SHAPE>::softmax(bool wary, bool partial, uint2 bits,
                                                                 uint32_t (&p)[pairs], float (&a)[2]) {
  // Of parts, the product before is done; the careful pass has no registers for P beside S.
  constexpr bool packs_here = !SHAPE::packs_late || (SHAPE::blocks > 1 && !CAREFUL);
  if constexpr (SHAPE::extras) extend_scores();
  if (partial) mask_scores(bits);
  bool jumps = CAREFUL;
  if (wary || !all_seen) {
    const bool seen0 = !partial || bits.x, seen1 = !partial || bits.y;
    const bool meets = (top[0] == forward_minus_infinity() && seen0) || (top[1] == forward_minus_infinity() && seen1);
    if (wary || __any_sync(~0u, meets)) {  // a row without a maximum has nothing in sum and O yet
      float x[2];
      row_maxima(x);
      x[0] = in_units(x[0]), x[1] = in_units(x[1]);
      if (top[0] == forward_minus_infinity()) keep(0, x[0]);
      if (top[1] == forward_minus_infinity()) keep(1, x[1]);
      if constexpr (SHAPE::extras) note_alive(partial, bits);
      jumps |= wary && __any_sync(~0u, octaves(x[0] - top[0]) > FORWARD_JUMP || octaves(x[1] - top[1]) > FORWARD_JUMP);
      all_seen = __all_sync(~0u, top[0] != forward_minus_infinity() && top[1] != forward_minus_infinity());
    }
  }
  release_bias();
  bool rescale = false;
  if (jumps) rescale = raise_maxima<CAREFUL>(a);
  float t[4];
#pragma unroll
  for (int i = 0; i < scores; i += 2) {
    s[i] = exponential<CAREFUL>(i);
    s[i + 1] = exponential<CAREFUL>(i + 1);
    t[i & 3] = i < 4 ? s[i] : t[i & 3] + s[i];
    t[(i & 3) + 1] = i < 4 ? s[i + 1] : t[(i & 3) + 1] + s[i + 1];
    if (packs_here && !SHAPE::extras) p[i / 2] = pack_halves<type>(s[i], s[i + 1]);
  }
  if constexpr (SHAPE::extras) {
    drop();
    if (packs_here) pack(p);
  }
  t[0] += t[1], t[2] += t[3];
  // Rare. The branch has a second use: ptxas cannot move the wait for P V above it, and so not above the
  // exponentials, which would then no longer overlap with P V.
  if (__any_sync(~0u, t[0] > FORWARD_GROW || t[2] > FORWARD_GROW)) {
    float f[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint32_t quads = __ballot_sync(~0u, t[2 * r] > FORWARD_GROW);
      const float row = forward_quad_sum(t[2 * r]);
      const int e = quads >> (lane & 28) & 15 ? min((int)(__float_as_uint(row) >> 23) - 127, 126) : 0;
      f[r] = __uint_as_float((uint32_t)(127 - e) << 23);  // 2^-e
      if constexpr (SHAPE::extras) {                      // a huge maximum cannot be raised by e, but by what f says
        const float raised = top[r] + e * c.scores.octave;
        f[r] = exp2_fast(octaves(top[r] - raised));
        if (e) keep(r, raised);
        if (!e) f[r] = 1.f;
      } else if (e) {
        keep(r, top[r] + e);
      }
      a[r] = rescale ? a[r] * f[r] : f[r];
      sum[r] *= f[r];
      t[2 * r] *= f[r];
    }
#pragma unroll
    for (int i = 0; i < scores; i += 2) {
      s[i] *= f[i >> 1 & 1], s[i + 1] *= f[i >> 1 & 1];
      if (packs_here) p[i / 2] = pack_halves<type>(s[i], s[i + 1]);
    }
    rescale = true;
  }
  sum[0] += t[0];
  sum[1] += t[2];
  return rescale;
}

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::pack(uint32_t (&p)[pairs]) {
#pragma unroll
  for (int i = 0; i < scores; i += 2) p[i / 2] = pack_halves<type>(s[i], s[i + 1]);
}

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::pack_late(uint32_t (&p)[pairs]) {
  if constexpr (SHAPE::packs_late) pack(p);
}

#endif
