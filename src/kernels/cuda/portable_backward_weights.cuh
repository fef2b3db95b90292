// products into weights, and the gradient of the weights into that of the scores
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_WEIGHTS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_WEIGHTS_CUH
#include "kernels/cuda/portable_backward_steps.cuh"
#include "kernels/cuda/portable_scores.cuh"

// Products in place become scores, with the options that act on them. Of an accumulator's 16 rows and 8 BLOCKS columns
// the lane's first element is (query, key), or with TRANSPOSED scores, whose rows are keys, (key, query). `slope`: the
// derivative of a softcap.
template <bool TRANSPOSED, class Real, int BLOCKS>
static __device__ __forceinline__ void make_scores(const score_rule<Real> &rule, Real (&c)[BLOCKS][4],
                                                   Real (&slope)[BLOCKS][4], int64_t query, int64_t key,
                                                   uint32_t &visible) {
  score_blocks<TRANSPOSED>(rule, c, query, key, false, visible, &slope);
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) slope[n][i] = 1 - slope[n][i] * slope[n][i];
}

// The bits of the pairs that dropout keeps, 4 n + i for element i of block n, drawn one after the other: all at once
// they are a tenth of a kernel's code (an H200, N2048, us: bf16 D64 2278 and 2253, D128 2907 and 2853, f32 D128 2597
// and 2471; one after the other 2321 and 2325, 2859 and 2816, 2535 and 2509).
template <bool TRANSPOSED, int BLOCKS>
static __device__ __forceinline__ uint32_t kept_pairs(const dropout_rule &rule, int64_t query, int64_t key) {
  uint32_t kept = 0;
#pragma unroll 1
  for (int n = 0; n < BLOCKS; n++) {
    kept |= kept_block<TRANSPOSED>(rule, query + (TRANSPOSED ? 8 * n : 0), key + (TRANSPOSED ? 0 : 8 * n)) << (4 * n);
  }
  return kept;
}

template <class Real>
static __device__ __forceinline__ Real weight_of(Real score, Real base, Real unit, bool visible) {
  // A base of NaN must not reach a masked pair.
  return visible ? exp2_of((score - base) * unit) : 0;
}

// Products in place become weights. base_of and factor_of (n, i) are those of the query of element i of block n;
// factors are only looked at when `factored`, as FACTORED always are. `full`: all pairs are visible.
template <bool GENERAL, bool TRANSPOSED, bool FACTORED, class Real, int BLOCKS, class Base, class Factor>
static __device__ __forceinline__ void make_weights(const score_rule<Real> &rule, Real (&c)[BLOCKS][4],
                                                    Real (&slope)[GENERAL ? BLOCKS : 1][4], int64_t query, int64_t key,
                                                    uint32_t &visible, bool full, bool factored, const Base &base_of,
                                                    const Factor &factor_of) {
  if constexpr (GENERAL) {
    make_scores<TRANSPOSED>(rule, c, slope, query, key, visible);
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) c[n][i] = weight_of(c[n][i], base_of(n, i), rule.unit, visible >> (4 * n + i) & 1);
  } else {
    // One multiply-add, as in the forward.
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        Real weight = exp2_of(c[n][i] * rule.factor - base_of(n, i));
        if (FACTORED) weight *= factor_of(n, i);
        c[n][i] = full || visible >> (4 * n + i) & 1 ? weight : 0;
      }
  }
  if (!factored || (FACTORED && !GENERAL)) return;
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) c[n][i] = visible >> (4 * n + i) & 1 ? c[n][i] * factor_of(n, i) : 0;
}

// dP in place becomes dS = P (dP - delta), 0 for masked pairs, with dropout's part in dP.
template <bool GENERAL, class Real, int BLOCKS, class Delta>
static __device__ __forceinline__ void differentiate_weights(const Real (&weights)[BLOCKS][4], Real (&ds)[BLOCKS][4],
                                                             uint32_t visible, bool full, uint32_t kept, Real more,
                                                             const Delta &delta_of) {
  if (!GENERAL && full) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) ds[n][i] = weights[n][i] * (ds[n][i] - delta_of(n, i));
    return;
  }
  // Which pairs are visible was asked for the weights, too. Kept in predicates from there on, beside those of dropout,
  // one was lost: of some pairs of f32 ptxas (CUDA 13.0) took the dropped for masked.
  if (GENERAL) visible = hidden(visible);
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const Real dweight = !GENERAL ? ds[n][i] : kept >> (4 * n + i) & 1 ? ds[n][i] * more : 0;
      ds[n][i] = visible >> (4 * n + i) & 1 ? weights[n][i] * (dweight - delta_of(n, i)) : 0;
    }
}

#endif
