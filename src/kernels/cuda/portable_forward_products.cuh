// the two products of a step of the forward pass, with its keys and with its values
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_PRODUCTS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_PRODUCTS_CUH
#include "kernels/cuda/portable_forward_block.cuh"

// The products q.k of a warp's rows with the keys of a tile; without EXTRAS, products of split tiles lack the scale of
// their query.
template <class C>
static __device__ __forceinline__ void multiply_keys(char *shared, const char *keys,
                                                     typename C::real (&s)[C::FOLD][C::BLOCKS][4]) {
  typedef typename C::products P;
  typedef typename C::real real;
  const int row = (int)(threadIdx.x / 32) * 16 * C::FOLD, column = 2 * (int)(threadIdx.x & 3);
  constexpr int STEPS = C::WIDTH / P::DEPTH, CHAIN = P::CHAIN ? P::CHAIN : STEPS;
  if (CHAIN < STEPS) clear_sum(s);
#pragma unroll
  for (int first = 0; first < C::BLOCKS; first += C::ABREAST)
#pragma unroll 1
    for (int start = 0; start < STEPS; start += CHAIN) {
      typename P::sum sum[C::FOLD][C::ABREAST];
      clear_sum(sum);
      // Unrolled as far as the swizzle repeats itself, or twice that: more is code, not speed.
#pragma unroll C::UNROLLED
      for (int step = start; step < start + CHAIN; step++) {
        typename P::left a[C::FOLD];
#pragma unroll
        for (int f = 0; f < C::FOLD; f++) P::template left_rows<C::ROW>(a[f], shared + row * C::ROW, 16 * f, step);
#pragma unroll
        for (int n = 0; n < C::ABREAST; n += 2) {
          typename P::right b[2];
          P::template right_rows<C::ROW>(b, keys, 8 * (first + n), step);
#pragma unroll
          for (int term = 0; term < P::TERMS; term++)
#pragma unroll
            for (int f = 0; f < C::FOLD; f++) {
              P::template multiply_term<false>(sum[f][n], a[f], b[0], term);
              P::template multiply_term<false>(sum[f][n + 1], a[f], b[1], term);
            }
        }
      }
#pragma unroll
      for (int f = 0; f < C::FOLD; f++)
#pragma unroll
        for (int n = 0; n < C::ABREAST; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            real made = sum[f][n].value(e);
            if constexpr (P::SPLIT) {
              const real scale = key_scales<C>(shared)[8 * (first + n) + column + e % 2];
              made *= C::EXTRAS ? scale * query_scales<C>(shared)[lane_row<C>(f, e / 2)] : scale;
            }
            real &to = s[f][first + n][e];
            to = CHAIN < STEPS ? to + made : made;
          }
    }
}

// o = o * factor + weights * values of the tile; weights come in units.
template <class C>
static __device__ __forceinline__ void multiply_values(const typename C::products::left (&a)[C::FOLD][C::STEPS],
                                                       const char *values, const typename C::real (&factor)[C::FOLD][2],
                                                       const typename C::real (&unit)[C::FOLD][2],
                                                       typename C::products::total (&o)[C::FOLD][C::COLUMNS]) {
  typedef typename C::products P;
  bool moved = false;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++) moved |= factor[f][0] != 1 || factor[f][1] != 1;
  if (__any_sync(0xffffffff, moved)) {
#pragma unroll
    for (int f = 0; f < C::FOLD; f++)
#pragma unroll
      for (int n = 0; n < C::COLUMNS; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) o[f][n].d[e] *= factor[f][e / 2];
  }
  if constexpr (P::FRESH) {
#pragma unroll
    for (int n = 0; n < C::COLUMNS; n += 2) {
      typename P::sum sum[C::FOLD][2];
      clear_sum(sum);
#pragma unroll
      for (int step = 0; step < C::STEPS; step++) {
        typename P::right b[2];
        P::template right_columns<C::VALUE_ROW>(b, values, step * P::DEPTH, 8 * n);
#pragma unroll
        for (int term = 0; term < P::TERMS; term++)
#pragma unroll
          for (int f = 0; f < C::FOLD; f++) {
            P::template multiply_term<false>(sum[f][0], a[f][step], b[0], term);
            P::template multiply_term<false>(sum[f][1], a[f][step], b[1], term);
          }
      }
#pragma unroll
      for (int f = 0; f < C::FOLD; f++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          o[f][n].d[e] += sum[f][0].value(e) * unit[f][e / 2];
          o[f][n + 1].d[e] += sum[f][1].value(e) * unit[f][e / 2];
        }
    }
  } else {
#pragma unroll
    for (int step = 0; step < C::STEPS; step++)
#pragma unroll
      for (int n = 0; n < C::COLUMNS; n += 2) {
        typename P::right b[2];
        P::template right_columns<C::VALUE_ROW>(b, values, step * P::DEPTH, 8 * n);
#pragma unroll
        for (int f = 0; f < C::FOLD; f++)
#pragma unroll
          for (int next = 0; next < 2; next++)
#pragma unroll
            for (int term = 0; term < P::TERMS; term++)
              P::template multiply_term<false>(o[f][n + next], a[f][step], b[next], term);
      }
  }
}

// The weights of a step as the left side of the products with its values. They are never Inf, and a NaN is NaN in all
// columns, so there is nothing to be careful about.
template <class C>
static __device__ __forceinline__ void take_weights(const typename C::real (&s)[C::FOLD][C::BLOCKS][4], char *shared,
                                                    typename C::products::left (&a)[C::FOLD][C::STEPS],
                                                    typename C::real (&unit)[C::FOLD][2]) {
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
    left_of_blocks<typename C::products, C::BLOCKS, false>(a[f], s[f], value_scales<C>(shared) + 2 * (threadIdx.x & 3),
                                                           unit[f]);
}

#endif
