// products of the backward pass: of rows with rows, of pairs with columns, and what is not finite in them
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_PRODUCTS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_PRODUCTS_CUH
#include "kernels/cuda/portable_split.cuh"

// c = a b^T: 16 rows of one tile from `row` on, against all rows of another. SWAPPED: the forward makes it the other
// way round; the bits are the same.
template <class P, int ROW, bool SWAPPED, int BLOCKS>
static __device__ __forceinline__ void multiply_rows(typename P::real (&c)[BLOCKS][4], const char *own,
                                                     const float *own_scale, int row, const char *other,
                                                     const float *other_scale) {
  constexpr int STEPS = ROW / (int)sizeof(typename P::element) / P::DEPTH, CHAIN = P::CHAIN ? P::CHAIN : STEPS;
  const int lane = threadIdx.x & 31;
  if (CHAIN < STEPS) clear_sum(c);
#pragma unroll 1
  for (int first = 0; first < STEPS; first += CHAIN) {
    typename P::sum sum[BLOCKS];
    clear_sum(sum);
#pragma unroll 4
    for (int step = first; step < first + CHAIN; step++) {
      typename P::left a;
      typename P::right b[BLOCKS];
      P::template left_rows<ROW>(a, own + row * ROW, 0, step);
#pragma unroll
      for (int n = 0; n < BLOCKS; n += 2) {
        typename P::right pair[2];
        P::template right_rows<ROW>(pair, other, 8 * n, step);
        b[n] = pair[0], b[n + 1] = pair[1];
      }
#pragma unroll
      for (int term = 0; term < P::TERMS; term++)
#pragma unroll
        for (int n = 0; n < BLOCKS; n++) P::template multiply_term<SWAPPED>(sum[n], a, b[n], term);
    }
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const typename P::real made = unsplit<P>(sum[n].value(i), own_scale, row + lane / 4 + i / 2 * 8, other_scale,
                                                 8 * n + 2 * (lane & 3) + i % 2);
        c[n][i] = CHAIN < STEPS ? c[n][i] + made : made;
      }
  }
}

// to += pairs rows: accumulator blocks against all rows of a tile, for SLICE of its columns from `column` on.
template <class P, int ROW, int SLICE, int BLOCKS>
static __device__ __forceinline__ void multiply_columns(typename P::real (&to)[SLICE / 8][4],
                                                        const typename P::real (&pairs)[BLOCKS][4], const char *tile,
                                                        const float *scale, int column, bool careful) {
  constexpr int STEPS = BLOCKS * 8 / P::DEPTH;
  typename P::left a[STEPS];
  typename P::real unit[2];
  if (P::SPLIT && careful)
    left_of_blocks<P, BLOCKS, P::SPLIT>(a, pairs, scale + 2 * (threadIdx.x & 3), unit);
  else
    left_of_blocks<P, BLOCKS, false>(a, pairs, scale + 2 * (threadIdx.x & 3), unit);
  // In f64 a sum over all queries or keys that runs through one accumulator has twice the error of one whose tiles are
  // summed first.
  constexpr bool FRESH = P::FRESH || sizeof(typename P::real) == 8;
  // Sums that are made side by side: a product waits for the one before it of the same sum, 30 cycles or so.
  constexpr int ABREAST = FRESH ? 4 : 8;
#pragma unroll
  for (int first = 0; first < SLICE / 8; first += ABREAST) {
    typename P::sum sum[ABREAST];
    clear_sum(sum);
    if constexpr (!FRESH) {
#pragma unroll
      for (int n = 0; n < ABREAST; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[n].d[i] = to[first + n][i];
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      typename P::right b[ABREAST];
#pragma unroll
      for (int n = 0; n < ABREAST; n += 2) {
        typename P::right pair[2];
        P::template right_columns<ROW>(pair, tile, step * P::DEPTH, column + 8 * (first + n));
        b[n] = pair[0], b[n + 1] = pair[1];
      }
#pragma unroll
      for (int term = 0; term < P::TERMS; term++)
#pragma unroll
        for (int n = 0; n < ABREAST; n++) P::template multiply_term<false>(sum[n], a[step], b[n], term);
    }
#pragma unroll
    for (int n = 0; n < ABREAST; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        to[first + n][i] = FRESH ? to[first + n][i] + sum[n].value(i) * unit[i / 2] : sum[n].value(i);
  }
}

// What give_nonfinite works on, in memory: registers cannot be indexed.
template <class Real, int BLOCKS, int SLICE>
struct nonfinite_gift {
  Real to[SLICE / 8][4], pairs[BLOCKS][4];
};

template <class P, int BLOCKS, int SLICE>
__attribute__((noinline)) static __device__ void give_nonfinite_slowly(
    nonfinite_gift<typename P::real, BLOCKS, SLICE> &gift, uint32_t visible, const uint32_t *bad, const char *rows,
    int64_t stride, int columns) {
  typedef typename P::real Real;
  const int lane = threadIdx.x & 31, t = lane & 3;
  for (int row = 0; row < 8 * BLOCKS; row++) {
    if (!(bad[row / 32] >> (row % 32) & 1)) continue;
    const int from = (lane & 28) | (row % 8 / 2);
    const Real top = __shfl_sync(~0u, gift.pairs[row / 8][row % 2], from);
    const Real bottom = __shfl_sync(~0u, gift.pairs[row / 8][row % 2 + 2], from);
    const uint32_t seen = __shfl_sync(~0u, visible, from) >> (row / 8 * 4 + row % 2);
    const typename P::element *x = (const typename P::element *)(rows + row * stride);
#pragma unroll 1
    for (int n = 0; n < SLICE / 8; n++)
      for (int i = 0; i < 2; i++) {
        const int d = 8 * n + 2 * t + i;
        if (d >= columns) continue;
        const Real value = real_of(x[d]);
        if (is_finite(value)) continue;
        if (seen & 1) gift.to[n][i] += top * value;
        if (seen & 4) gift.to[n][i + 2] += bottom * value;
      }
  }
}

// What is not finite in a tile, given to the pairs that see it: to += pairs rows, for those elements of the rows marked
// in `bad`; their values are read again from where the tile came from. Bits 4 n + i of `visible` are pairs[n][i]'s.
template <class P, int SLICE, int BLOCKS>
static __device__ __forceinline__ void give_nonfinite(typename P::real (&to)[SLICE / 8][4],
                                                      const typename P::real (&pairs)[BLOCKS][4], uint32_t visible,
                                                      const uint32_t *bad, const tile_source &source, int64_t first,
                                                      int column) {
  constexpr int EACH = sizeof(typename P::element);
  nonfinite_gift<typename P::real, BLOCKS, SLICE> gift;
  memcpy(gift.to, to, sizeof gift.to);
  memcpy(gift.pairs, pairs, sizeof gift.pairs);
  give_nonfinite_slowly<P, BLOCKS, SLICE>(gift, visible, bad, source.data + first * source.stride + column * EACH,
                                          source.stride, source.bytes / EACH - column);
  memcpy(to, gift.to, sizeof gift.to);
}

template <class Real, int BLOCKS>
static __device__ __forceinline__ bool all_finite(const Real (&x)[BLOCKS][4]) {
  finite_test<Real> test;
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) test.note(x[n][i], i);
  return test.passed();
}

// Writes a warp's accumulators: rows `row` + g and + 8 of `count`, columns from `column` on; two at once where they can
// be.
template <class Element, class Real, int BLOCKS>
static __device__ __forceinline__ void write_rows(const sa_operand &to, int64_t batch, int64_t head, int64_t row,
                                                  int64_t count, int64_t width, int column, Real factor,
                                                  const Real (&x)[BLOCKS][4]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  struct alignas(2 * sizeof(Element)) element_pair {
    Element x[2];
  };
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t at = row + g + 8 * half;
    if (at >= count) continue;
    Element *line =
        (Element *)to.data + batch * to.stride[0] + head * to.stride[1] + at * to.stride[2] + column + 2 * t;
    const int rest = (int)width - column - 2 * t;
    const bool pairs = (uintptr_t)line % sizeof(element_pair) == 0;
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
      element_pair pair;
      put_real(&pair.x[0], x[n][2 * half] * factor);
      put_real(&pair.x[1], x[n][2 * half + 1] * factor);
      if (pairs && 8 * n + 1 < rest) {
        *(element_pair *)(line + 8 * n) = pair;
      } else {
        if (8 * n < rest) line[8 * n] = pair.x[0];
        if (8 * n + 1 < rest) line[8 * n + 1] = pair.x[1];
      }
    }
  }
}

#endif
