// products of a warp with tiles of f32, as sums of two f16 after a scale
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_SPLIT_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_SPLIT_CUH
#include "kernels/cuda/portable_products.cuh"

// f32 as a sum of two f16 after a scale: x = (big + small) scale to 2^-22 of x, and three of the four products. That is
// half the instructions of two tf32, which hold no more digits. A tile is split in place, once for all warps: f16 has
// no exponents to spare, so each row of it has a scale, a power of two. The hardware cuts off what a sum has beyond 24
// bits, always towards 0: so the small products have a sum of their own, long sums are made of fresh ones, and scores
// and dP get back what they lose in the mean (uncut).
struct products_f32 {
  typedef float element;
  typedef float real;
  typedef __half stored;
  enum { DEPTH = 16, FRESH = 1, SPLIT = 1, TERMS = 3, CHAIN = 0 };

  struct left {
    uint32_t big[4], small[4];
  };
  struct right {
    uint32_t big[2], small[2];
  };
  struct sum {
    float big[4], small[4];
    __device__ __forceinline__ float value(int n) const { return big[n] + small[n]; }
  };
  struct total {
    float d[4];
  };

  // The scale that takes numbers up to `top` below 2^11: what is 2^14 smaller still has all its digits, and sums times
  // one of the two scales do not overflow where the product does not.
  static __device__ __forceinline__ float scale_of(float top) {
    const uint32_t exponent = __float_as_uint(top) & 0x7f800000;
    return __uint_as_float((exponent > 11u << 23 ? exponent : 11u << 23) - (10u << 23));
  }

  // Of a power of two, as scale_of gives them.
  static __device__ __forceinline__ float inverse_of(float scale) {
    return __uint_as_float((254u << 23) - __float_as_uint(scale));
  }

  // NaN and Inf make small NaN. CAREFUL: they are the small part, which meets the big one of the other factor alone, as
  // its small one may be 0, or of the other sign. Beside them the big part is 1 with their sign, for an Inf of the
  // other factor to meet; what it adds to finite numbers is finite, in sums that are Inf or NaN, or 0 where a pair is
  // masked.
  template <bool CAREFUL>
  static __device__ __forceinline__ void split(float low, float high, uint32_t &big, uint32_t &small) {
    union {
      __half2 pair;
      uint32_t bits;
    } x, y;
    const bool low_finite = !CAREFUL || is_finite(low), high_finite = !CAREFUL || is_finite(high);
    x.pair = __floats2half2_rn(low_finite ? low : copysignf(1, low), high_finite ? high : copysignf(1, high));
    y.pair = __floats2half2_rn(low - __low2float(x.pair), high - __high2float(x.pair));
    big = x.bits, small = y.bits;
  }

  template <int ROW>
  static __device__ __forceinline__ void left_rows(left &a, const char *tile, int row, int step) {
    const uint32_t address = left_rows_address<ROW>(tile, row, step);
    load_matrices(a.big, address);
    load_matrices(a.small, address + ROW / 2);
  }

  template <int ROW>
  static __device__ __forceinline__ void right_rows(right (&b)[2], const char *tile, int row, int step) {
    const uint32_t address = right_rows_address<ROW>(tile, row, step);
    uint32_t big[4], small[4];
    load_matrices(big, address);
    load_matrices(small, address + ROW / 2);
    two_blocks(b[0].big, b[1].big, big);
    two_blocks(b[0].small, b[1].small, small);
  }

  template <int ROW>
  static __device__ __forceinline__ void right_columns(right (&b)[2], const char *tile, int row, int column) {
    const uint32_t address = right_columns_address<ROW>(tile, row, column);
    uint32_t big[4], small[4];
    load_matrices_transposed(big, address);
    load_matrices_transposed(small, address + ROW / 2);
    two_blocks(b[0].big, b[1].big, big);
    two_blocks(b[0].small, b[1].small, small);
  }

  // Of numbers that have been scaled.
  template <bool CAREFUL>
  static __device__ __forceinline__ void left_of(left &a, const float (*c)[4]) {
#pragma unroll
    for (int n = 0; n < 4; n++) split<CAREFUL>(c[n / 2][n % 2 * 2], c[n / 2][n % 2 * 2 + 1], a.big[n], a.small[n]);
  }

  template <bool SWAPPED>
  static __device__ __forceinline__ void multiply_term(sum &c, const left &a, const right &b, int term) {
    if (term == 0) mma_f16(c.small, SWAPPED ? a.big : a.small, SWAPPED ? b.small : b.big);
    if (term == 1) mma_f16(c.big, a.big, b.big);
    if (term == 2) mma_f16(c.small, SWAPPED ? a.small : a.big, SWAPPED ? b.big : b.small);
  }
};

// Splits the rows of a tile of products that want it, in place: the first half of a row becomes the big parts, the
// second the small ones; scale[row] is what they are to be multiplied by, times `times`. CAREFUL as in
// products_f32. All THREADS threads call it, with a barrier before and behind.
template <class P, int ROW, int ROWS, int THREADS, bool CAREFUL>
static __device__ __forceinline__ void split_rows(char *tile, float *scale, float times, int thread) {
  // 16 elements of a row a lane: two pieces of eight.
  constexpr int LANES = ROW / 64, AT_ONCE = THREADS / LANES < ROWS ? THREADS / LANES : ROWS;
  const int part = thread % LANES, first = thread / LANES;
  if (AT_ONCE == ROWS && first >= ROWS) return;
    // Two at a time hide the latency of shared memory; more are code, not speed.
#pragma unroll 2
  for (int turn = 0; turn < ROWS / AT_ONCE; turn++) {
    const int row = first + turn * AT_ONCE;
    float x[4][4], tops[4] = {0, 0, 0, 0};
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const float4 four = *(const float4 *)(tile + tile_offset<ROW>(row, 2 * (part + n / 2 * LANES) + n % 2));
      x[n][0] = four.x, x[n][1] = four.y, x[n][2] = four.z, x[n][3] = four.w;
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (!CAREFUL || is_finite(x[n][i])) tops[n] = fmaxf(tops[n], fabsf(x[n][i]));
    }
    float top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
#pragma unroll
    for (int distance = LANES / 2; distance; distance /= 2)
      top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, distance));
    const float by = P::scale_of(top), inverse = P::inverse_of(by);
    if (part == 0) scale[row] = by * times;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 2; n++) {
      uint32_t big[4], small[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float *two = &x[2 * n + i / 2][i % 2 * 2];
        P::template split<CAREFUL>(two[0] * inverse, two[1] * inverse, big[i], small[i]);
      }
      const int chunk = part + n * LANES;
      *(uint4 *)(tile + tile_offset<ROW>(row, chunk)) = make_uint4(big[0], big[1], big[2], big[3]);
      *(uint4 *)(tile + tile_offset<ROW>(row, 2 * LANES + chunk)) = make_uint4(small[0], small[1], small[2], small[3]);
    }
  }
}

template <class P, int ROW, int ROWS, int THREADS>
__attribute__((noinline)) static __device__ void split_rows_carefully(char *tile, float *scale, float times,
                                                                      int thread) {
  split_rows<P, ROW, ROWS, THREADS, true>(tile, scale, times, thread);
}

template <class P, int ROW, int ROWS, int THREADS>
static __device__ __forceinline__ void split_tile(char *tile, float *scale, bool careful, int thread, float times = 1) {
  if constexpr (P::SPLIT) {
    if (careful)
      split_rows_carefully<P, ROW, ROWS, THREADS>(tile, scale, times, thread);
    else
      split_rows<P, ROW, ROWS, THREADS, false>(tile, scale, times, thread);
  }
}

// A product of two split tiles' rows: number `row` of the one, `column` of the other.
template <class P>
static __device__ __forceinline__ typename P::real unsplit(typename P::real product, const float *row_scale, int row,
                                                           const float *column_scale, int column) {
  if constexpr (P::SPLIT)
    // The scales first: alone, one may be out of all proportion to the product.
    return product * (row_scale[row] * column_scale[column]);
  else
    return product;
}

// Accumulator blocks as the left side of products with the rows of a tile, whose scales begin at `scale` for this
// lane's columns of the blocks. What comes out is to be multiplied by unit[0] in the lane's row g, by unit[1] in g + 8.
template <class P, int BLOCKS, bool CAREFUL>
static __device__ __forceinline__ void left_of_blocks(typename P::left (&a)[BLOCKS * 8 / P::DEPTH],
                                                      const typename P::real (&c)[BLOCKS][4], const float *scale,
                                                      typename P::real (&unit)[2]) {
  constexpr int TAKEN = P::DEPTH / 8;
  if constexpr (P::SPLIT) {
    float scaled[BLOCKS][4], top[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        scaled[n][i] = c[n][i] * scale[8 * n + i % 2];
        if (!CAREFUL || is_finite(scaled[n][i])) top[i / 2] = fmaxf(top[i / 2], fabsf(scaled[n][i]));
      }
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffff, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(0xffffffff, top[half], 2));
      unit[half] = P::scale_of(top[half]);
      inverse[half] = P::inverse_of(unit[half]);
    }
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) scaled[n][i] *= inverse[i / 2];
#pragma unroll
    for (int step = 0; step < BLOCKS / TAKEN; step++) P::template left_of<CAREFUL>(a[step], &scaled[step * TAKEN]);
  } else {
#pragma unroll
    for (int step = 0; step < BLOCKS / TAKEN; step++) P::template left_of<CAREFUL>(a[step], &c[step * TAKEN]);
    unit[0] = unit[1] = 1;
  }
}

#endif
