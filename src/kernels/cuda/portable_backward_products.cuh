// products of the backward pass: of rows with rows, of pairs with columns, and what is not finite in them
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_PRODUCTS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_PRODUCTS_CUH
#include "kernels/cuda/portable_split.cuh"

// c = a b^T: 16 rows of one tile from `row` on, against all rows of another. SWAPPED: the forward makes it the other
// way round; the bits are the same.
template <class P, int ROW, int BLOCKS, bool SWAPPED>
static __device__ __forceinline__ void multiply_rows(typename P::real (&c)[BLOCKS][4], const char *own,
                                                     const float *own_scale, int row, const char *other,
                                                     const float *other_scale) {
  constexpr int STEPS = ROW / (int)sizeof(typename P::element) / P::DEPTH;
  typename P::sum sum[BLOCKS];
#pragma unroll
  for (int n = 0; n < BLOCKS; n++) clear_sum(sum[n]);
#pragma unroll 4
  for (int step = 0; step < STEPS; step++) {
    typename P::left a;
    typename P::right b[BLOCKS];
    P::template left_rows<ROW>(a, own, row, step);
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
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      c[n][i] = unsplit<P>(sum[n].value(i), own_scale, row + lane / 4 + i / 2 * 8, other_scale,
                           8 * n + 2 * (lane & 3) + i % 2);
}

// to += pairs rows: accumulator blocks against all rows of a tile, for SLICE of its columns from `column` on.
template <class P, int ROW, int BLOCKS, int SLICE>
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
  // Sums that are made side by side: a product waits for the one before it of the same sum, 30 cycles or so.
  constexpr int ABREAST = P::FRESH ? 4 : 8;
#pragma unroll
  for (int first = 0; first < SLICE / 8; first += ABREAST) {
    typename P::sum sum[ABREAST];
#pragma unroll
    for (int n = 0; n < ABREAST; n++) {
      clear_sum(sum[n]);
      if constexpr (!P::FRESH) {
#pragma unroll
        for (int i = 0; i < 4; i++) sum[n].d[i] = to[first + n][i];
      }
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
        to[first + n][i] = P::FRESH ? to[first + n][i] + sum[n].value(i) * unit[i / 2] : sum[n].value(i);
  }
}

// What is not finite in a tile, given to the pairs that see it: to += pairs rows, for those elements of the rows marked
// in `bad`; their values are read again from where the tile came from. Bits 4 n + i of `visible` are pairs[n][i]'s.
template <class P, int BLOCKS, int SLICE>
static __device__ __forceinline__ void give_nonfinite(typename P::real (&to)[SLICE / 8][4],
                                                      const typename P::real (&pairs)[BLOCKS][4], uint32_t visible,
                                                      const uint32_t *bad, const tile_source &source, int64_t first,
                                                      int column) {
  typedef typename P::real Real;
  typedef typename P::element Element;
  const int lane = threadIdx.x & 31, t = lane & 3;
  for (int row = 0; row < 8 * BLOCKS; row++) {
    if (!(bad[row / 32] >> (row % 32) & 1)) continue;
    const int from = (lane & 28) | (row % 8 / 2);
    Real top = 0, bottom = 0;
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
      if (row / 8 != n) continue;
      top = row & 1 ? pairs[n][1] : pairs[n][0];
      bottom = row & 1 ? pairs[n][3] : pairs[n][2];
    }
    top = __shfl_sync(~0u, top, from);
    bottom = __shfl_sync(~0u, bottom, from);
    const uint32_t seen = __shfl_sync(~0u, visible, from) >> (row / 8 * 4 + row % 2);
    const Element *x = (const Element *)(source.data + (first + row) * source.stride);
#pragma unroll
    for (int n = 0; n < SLICE / 8; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int d = column + 8 * n + 2 * t + i;
        if ((d + 1) * (int)sizeof(Element) > source.bytes) continue;
        const Real value = real_of(x[d]);
        if (is_finite(value)) continue;
        if (seen & 1) to[n][i] += top * value;
        if (seen & 4) to[n][i + 2] += bottom * value;
      }
    }
  }
}

template <class Real, int SLICE>
static __device__ __forceinline__ bool all_finite(const Real (&x)[SLICE][4]) {
  bool finite = true;
#pragma unroll
  for (int n = 0; n < SLICE; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) finite = finite && is_finite(x[n][i]);
  return finite;
}

// Writes a warp's accumulators: rows `row` + g and + 8 of `count`, columns from `column` on.
template <class Element, class Real, int BLOCKS>
static __device__ __forceinline__ void write_rows(const sa_operand &to, int64_t batch, int64_t head, int64_t row,
                                                  int64_t count, int64_t width, int column, Real factor,
                                                  const Real (&x)[BLOCKS][4]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t at = row + g + 8 * half;
    if (at >= count) continue;
    Element *line = (Element *)to.data + batch * to.stride[0] + head * to.stride[1] + at * to.stride[2];
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int d = column + 8 * n + 2 * t + i;
        if (d < width) put_real(line + d, x[n][2 * half + i] * factor);
      }
    }
  }
}

#endif
