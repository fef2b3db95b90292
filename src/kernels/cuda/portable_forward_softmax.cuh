// a step of the forward pass between its products: scores, weights relative to a running peak, dropout
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_SOFTMAX_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_SOFTMAX_CUH
#include "kernels/cuda/portable_forward_block.cuh"

// Products into scores, -inf where masked; without EXTRAS they stay products. seen[fold][half]: bits 2 n + c of the
// step's blocks n; those whose bias is -inf are cleared.
template <class C>
static __device__ __forceinline__ void score(const score_rule<typename C::real> &rule, const forward_block &block,
                                             int64_t key, bool full, uint32_t (&seen)[C::FOLD][2],
                                             typename C::real (&s)[C::FOLD][C::BLOCKS][4]) {
  typedef typename C::real real;
  if (!C::EXTRAS && full) return;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++) {
    uint32_t visible = 0;
#pragma unroll
    for (int n = 0; n < C::BLOCKS; n++)
      visible |= ((seen[f][0] >> 2 * n & 3) | (seen[f][1] >> 2 * n & 3) << 2) << 4 * n;
    if (C::EXTRAS) {
      score_blocks<false>(rule, s[f], block.query + lane_row<C>(f, 0), key + 2 * (threadIdx.x & 3), full, visible,
                          (real(*)[1][4])NULL);
      if (!rule.bias) continue;
      seen[f][0] = seen[f][1] = 0;
#pragma unroll
      for (int n = 0; n < C::BLOCKS; n++) {
        seen[f][0] |= (visible >> 4 * n & 3) << 2 * n;
        seen[f][1] |= (visible >> (4 * n + 2) & 3) << 2 * n;
      }
    } else {
#pragma unroll
      for (int n = 0; n < C::BLOCKS; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) s[f][n][e] = visible >> (4 * n + e) & 1 ? s[f][n][e] : -(real)INFINITY;
    }
  }
}

// What a score of the lane's rows is multiplied by to be an exponent of 2.
template <class C>
static __device__ __forceinline__ void exponent_units(const score_rule<typename C::real> &rule, char *shared,
                                                      typename C::real (&unit)[C::FOLD][2]) {
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unit[f][half] = C::EXTRAS ? rule.unit : rule.factor;
      if (C::products::SPLIT && !C::EXTRAS) unit[f][half] *= query_scales<C>(shared)[lane_row<C>(f, half)];
    }
}

// Scores of the rows g (half 0) or g + 8 (half 1) of a fold into weights relative to the peak; factor is what a new
// peak costs the old sums. A peak is kept until a score exceeds it by a factor of 16 in the weights: so o is seldom
// rescaled. A NaN that the maximum passes over comes back with its power.
template <class C>
static __device__ __forceinline__ void soften_half(int f, int half, const typename C::real (&unit)[C::FOLD][2],
                                                   typename C::real (&s)[C::FOLD][C::BLOCKS][4], gathered<C> &got,
                                                   typename C::real (&factor)[C::FOLD][2]) {
  typedef typename C::real real;
  real peak = s[f][0][2 * half];
#pragma unroll
  for (int n = 0; n < C::BLOCKS; n++) peak = larger(peak, larger(s[f][n][2 * half], s[f][n][2 * half + 1]));
  peak = over_quad_max(peak);
  const real old = got.peak[f][half];
  if (!((peak - old) * unit[f][half] > 4)) peak = old;
  // A row that has seen nothing yet, or nothing but -inf, must not compute -inf - -inf.
  const real base = peak == -(real)INFINITY ? 0 : peak;
  factor[f][half] = peak == old ? 1 : exp2_of((old - base) * unit[f][half]);
  // One multiply-add; extras may hold numbers whose product with the unit overflows.
  const real top = base * unit[f][half];
  real sum = 0;
#pragma unroll
  for (int n = 0; n < C::BLOCKS; n++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const real x = s[f][n][2 * half + c];
      const real weight = exp2_of(C::EXTRAS ? (x - base) * unit[f][half] : x * unit[f][half] - top);
      s[f][n][2 * half + c] = weight;
      sum += weight;
    }
  got.sum[f][half] = got.sum[f][half] * factor[f][half] + sum;
  got.peak[f][half] = peak;
}

template <class C>
static __device__ __forceinline__ void soften(const typename C::real (&unit)[C::FOLD][2],
                                              typename C::real (&s)[C::FOLD][C::BLOCKS][4], gathered<C> &got,
                                              typename C::real (&factor)[C::FOLD][2]) {
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) soften_half<C>(f, half, unit, s, got, factor);
}

// A dropped weight is 0 whatever it was, NaN too. Two blocks are drawn at a time: all of them at once are a tenth of a
// kernel's code and no faster (an H200, N2048, us: bf16 D64 760 and 735, D128 936 and 816, two at a time 761 and 735,
// 841 and 832; odd numbers of keys 765 and 743, two at a time 822 and 798).
template <class C>
static __device__ __forceinline__ void drop(const dropout_rule &rule, const forward_block &block, int64_t key,
                                            typename C::real (&s)[C::FOLD][C::BLOCKS][4]) {
#pragma unroll
  for (int f = 0; f < C::FOLD; f++) {
    uint32_t kept = 0;
#pragma unroll 2
    for (int n = 0; n < C::BLOCKS; n++)
      kept |= kept_block<false>(rule, block.query + lane_row<C>(f, 0), key + 8 * n + 2 * (threadIdx.x & 3)) << 4 * n;
#pragma unroll
    for (int n = 0; n < C::BLOCKS; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) s[f][n][e] = kept >> (4 * n + e) & 1 ? s[f][n][e] : 0;
  }
}

#endif
