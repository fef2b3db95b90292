// products of a warp with tiles of bf16, f16 and f64; f32 is in portable_split.cuh
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_PRODUCTS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_PRODUCTS_CUH
#include "kernels/cuda/portable_tile.cuh"

/*  Products
 *
 *  A dtype's products give a warp c += a b, where the accumulator c is blocks of 16 x 8: with g = lane / 4, t = lane %
 * 4 a lane holds c[0], c[1] = (g, 2t), (g, 2t + 1) and c[2], c[3] = (g + 8, 2t), (g + 8, 2t + 1), whatever the dtype.
 * One step is DEPTH deep.
 *
 *      left      a, 16 rows x DEPTH         right     b, DEPTH x 8 columns
 *
 *      left_rows<ROW>       a = 16 rows of a tile, from `row` on, and its columns DEPTH * step ..
 *      left_of              a = accumulator blocks (DEPTH / 8 of them, side by side) rounded to the dtype
 *      right_rows<ROW>      b[0], b[1] = the transposes of 16 rows of a tile, from `row` on, columns DEPTH * step ..
 *      right_columns<ROW>   b[0], b[1] = DEPTH rows of a tile, from `row` on, and its columns `column` .. + 15
 *      multiply_term        adds term number `term` of TERMS of a b to a sum; terms of one sum wait for each other, so
 *                           those of other sums go between them. SWAPPED: what is a here is b where the forward makes
 *                           the same product; the terms are added in its order, so that the bits are the same
 *      sum                  a block while it is summed; value(n) is its c[n]
 *      total                a block of a sum over tiles: its d[n] is c[n]. It is a sum, unless FRESH: then a total is
 *                           made of fresh sums, one a tile
 *
 *      `row` is a multiple of 8, `column` of 16; both are best constant, the warp's own rows in the address of the
 * tile.
 *
 *      CHAIN       how many steps of rows times rows are one sum, added to those before it; 0: all. In f64 a chain
 *                  of 128 terms errs twice as much as four of 32
 *
 *      stored      what a tile's elements are when they are multiplied: SPLIT products want split_tile first
 *
 *  CAREFUL is for operands that may hold NaN or Inf: f32 alone needs it (products_f32); without it such operands give
 *  NaN, never a number.
 */

template <int ROW>
static __device__ __forceinline__ uint32_t left_rows_address(const char *tile, int row, int step) {
  const int lane = threadIdx.x & 31;
  return tile_address<ROW>(shared_address(tile + tile_offset<ROW>(lane & 15, lane >> 4)), row, 2 * step);
}

template <int ROW>
static __device__ __forceinline__ uint32_t right_rows_address(const char *tile, int row, int step) {
  const int lane = threadIdx.x & 31;
  return tile_address<ROW>(shared_address(tile + tile_offset<ROW>((lane & 7) + (lane >> 4 << 3), lane >> 3 & 1)), row,
                           2 * step);
}

template <int ROW>
static __device__ __forceinline__ uint32_t right_columns_address(const char *tile, int row, int column) {
  const int lane = threadIdx.x & 31;
  return tile_address<ROW>(shared_address(tile + tile_offset<ROW>(lane & 15, lane >> 4)), row, column / 8);
}

// The two right sides that four matrices, loaded at once, are.
static __device__ __forceinline__ void two_blocks(uint32_t (&first)[2], uint32_t (&second)[2], const uint32_t (&r)[4]) {
  first[0] = r[0], first[1] = r[1], second[0] = r[2], second[1] = r[3];
}

// Two numbers rounded to a half type, the first in the lower half.
static __device__ __forceinline__ __nv_bfloat162 halves_of(float low, float high, __nv_bfloat16) {
  return __floats2bfloat162_rn(low, high);
}

static __device__ __forceinline__ __half2 halves_of(float low, float high, __half) {
  return __floats2half2_rn(low, high);
}

static __device__ __forceinline__ void multiply_halves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                       __nv_bfloat16) {
  mma_bf16(d, a, b);
}

static __device__ __forceinline__ void multiply_halves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                       __half) {
  mma_f16(d, a, b);
}

// bf16 and f16.
template <class Half>
struct products_16 {
  typedef Half element;
  typedef float real;
  typedef element stored;
  enum { DEPTH = 16, FRESH = 0, SPLIT = 0, TERMS = 1, CHAIN = 0 };

  struct left {
    uint32_t r[4];
  };
  struct right {
    uint32_t r[2];
  };
  struct sum {
    float d[4];
    __device__ __forceinline__ float value(int n) const { return d[n]; }
  };
  typedef sum total;

  template <int ROW>
  static __device__ __forceinline__ void left_rows(left &a, const char *tile, int row, int step) {
    load_matrices(a.r, left_rows_address<ROW>(tile, row, step));
  }

  template <int ROW>
  static __device__ __forceinline__ void right_rows(right (&b)[2], const char *tile, int row, int step) {
    uint32_t r[4];
    load_matrices(r, right_rows_address<ROW>(tile, row, step));
    two_blocks(b[0].r, b[1].r, r);
  }

  template <int ROW>
  static __device__ __forceinline__ void right_columns(right (&b)[2], const char *tile, int row, int column) {
    uint32_t r[4];
    load_matrices_transposed(r, right_columns_address<ROW>(tile, row, column));
    two_blocks(b[0].r, b[1].r, r);
  }

  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    union {
      decltype(halves_of(0, 0, Half())) pair;
      uint32_t bits;
    } x;
    x.pair = halves_of(low, high, Half());
    return x.bits;
  }

  template <bool>
  static __device__ __forceinline__ void left_of(left &a, const float (*c)[4]) {
#pragma unroll
    for (int n = 0; n < 4; n++) a.r[n] = pack(c[n / 2][n % 2 * 2], c[n / 2][n % 2 * 2 + 1]);
  }

  template <bool SWAPPED>
  static __device__ __forceinline__ void multiply_term(sum &c, const left &a, const right &b, int) {
    multiply_halves(c.d, a.r, b.r, Half());
  }
};

typedef products_16<__nv_bfloat16> products_bf16;
typedef products_16<__half> products_f16;

// Of the eight elements of a step a lane has the neighbours 2t and 2t + 1, one for each of two products.
struct products_f64 {
  typedef double element;
  typedef double real;
  typedef double stored;
  enum { DEPTH = 8, FRESH = 0, SPLIT = 0, TERMS = 2, CHAIN = 4 };

  struct left {
    double r[4];
  };
  struct right {
    double r[2];
  };
  struct sum {
    double d[4];
    __device__ __forceinline__ double value(int n) const { return d[n]; }
  };
  typedef sum total;

  template <int ROW>
  static __device__ __forceinline__ void left_rows(left &a, const char *tile, int row, int step) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    const double2 top = *(const double2 *)(tile + tile_offset<ROW>(row + g, 4 * step + t));
    const double2 bottom = *(const double2 *)(tile + tile_offset<ROW>(row + g + 8, 4 * step + t));
    a.r[0] = top.x, a.r[1] = top.y, a.r[2] = bottom.x, a.r[3] = bottom.y;
  }

  template <int ROW>
  static __device__ __forceinline__ void right_rows(right (&b)[2], const char *tile, int row, int step) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const double2 pair = *(const double2 *)(tile + tile_offset<ROW>(row + 8 * n + g, 4 * step + t));
      b[n].r[0] = pair.x, b[n].r[1] = pair.y;
    }
  }

  template <int ROW>
  static __device__ __forceinline__ void right_columns(right (&b)[2], const char *tile, int row, int column) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int to = column + n / 2 * 8 + g;
      b[n / 2].r[n % 2] = *(const double *)(tile + tile_offset<ROW>(row + 2 * t + n % 2, to / 2) + to % 2 * 8);
    }
  }

  template <bool>
  static __device__ __forceinline__ void left_of(left &a, const double (*c)[4]) {
#pragma unroll
    for (int n = 0; n < 4; n++) a.r[n] = c[0][n];
  }

  template <bool SWAPPED>
  static __device__ __forceinline__ void multiply_term(sum &c, const left &a, const right &b, int term) {
    double top[2] = {c.d[0], c.d[1]}, bottom[2] = {c.d[2], c.d[3]};
    mma_f64(top, a.r[term], b.r[term]);
    mma_f64(bottom, a.r[term + 2], b.r[term]);
    c.d[0] = top[0], c.d[1] = top[1], c.d[2] = bottom[0], c.d[3] = bottom[1];
  }
};

template <class Sum>
static __device__ __forceinline__ void clear_sum(Sum &c) {
  memset(&c, 0, sizeof c);
}

#endif
