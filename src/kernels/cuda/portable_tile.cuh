// what the portable attention kernels share: products of a warp per dtype, tiles in shared memory, scores, dropout
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_TILE_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_TILE_CUH
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/operand.cuh"
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/ptx.cuh"
#include "random.h"

/*  Tiles
 *
 *  A tile is rows of an operand in shared memory, ROW bytes each (a multiple of 128): the elements beyond the operand's
 *  width, and the rows beyond its end, are 0. The 16-byte chunks of a row are swizzled, so that eight rows of one
 * chunk, and what the loads below read at once, lie in different banks.
 */

template <int ROW>
static __device__ __forceinline__ int tile_offset(int row, int chunk) {
  return row * ROW + ((chunk ^ (row & 7)) << 4);
}

// The rows of one (batch, head) of an operand.
typedef struct tile_source {
  const char *data;  // row 0
  int64_t stride;    // of rows, in bytes
  int64_t rows;
  int bytes;     // of a row
  bool aligned;  // every row, to 16 bytes
} tile_source;

// Whether every row starts at a multiple of 16 bytes.
static __host__ inline bool rows_aligned(const sa_operand &x, int element_bytes) {
  return ((uintptr_t)x.data | (uintptr_t)(x.stride[0] * element_bytes) | (uintptr_t)(x.stride[1] * element_bytes) |
          (uintptr_t)(x.stride[2] * element_bytes)) %
             16 ==
         0;
}

static __device__ __forceinline__ tile_source tile_source_of(const sa_operand &x, int element_bytes, int64_t batch,
                                                             int64_t head, int64_t rows, int64_t width, bool aligned) {
  tile_source source;
  source.data = (const char *)x.data + (batch * x.stride[0] + head * x.stride[1]) * element_bytes;
  source.stride = x.stride[2] * element_bytes;
  source.rows = rows;
  source.bytes = (int)width * element_bytes;
  source.aligned = aligned;
  return source;
}

// 16 bytes from an address that is only aligned to its elements, 0 from `bytes` on.
template <class Element>
static __device__ __forceinline__ uint4 read_unaligned(const char *from, int bytes) {
  union {
    uint4 all;
    uint16_t half[8];
    uint32_t word[4];
    uint64_t pair[2];
  } chunk;
  chunk.all = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int k = 0; k < 16 / (int)sizeof(Element); k++) {
    if ((k + 1) * (int)sizeof(Element) > bytes) continue;
    if (sizeof(Element) == 2) chunk.half[k] = ((const uint16_t *)from)[k];
    if (sizeof(Element) == 4) chunk.word[k & 3] = ((const uint32_t *)from)[k];
    if (sizeof(Element) == 8) chunk.pair[k & 1] = ((const uint64_t *)from)[k];
  }
  return chunk.all;
}

// The rows `from` on, `bytes` each, to a tile, by way of registers. Out of line, as it is rare.
template <class Element, int ROW, int ROWS, int THREADS>
__attribute__((noinline)) static __device__ void load_tile_slowly(char *tile, const char *from, int64_t stride,
                                                                  int rows, int bytes, int thread) {
  constexpr int CHUNKS = ROW / 16;
  for (int k = thread; k < ROWS * CHUNKS; k += THREADS) {
    const int row = k / CHUNKS, chunk = k % CHUNKS, rest = bytes - chunk * 16;
    const int here = row >= rows || rest < 0 ? 0 : rest < 16 ? rest : 16;
    *(uint4 *)(tile + tile_offset<ROW>(row, chunk)) =
        read_unaligned<Element>(here ? from + row * stride + chunk * 16 : NULL, here);
  }
}

// Starts copying ROWS rows from `first` on into a tile; all THREADS threads call it. They are there after the threads'
// copy_async_commit, copy_async_wait and a barrier.
template <class Element, int ROW, int ROWS, int THREADS>
static __device__ __forceinline__ void load_tile(char *tile, const tile_source &source, int64_t first, int thread) {
  constexpr int CHUNKS = ROW / 16;
  const int64_t left = source.rows - first;
  const int rows = left < ROWS ? (int)left : ROWS;
  const char *from = source.data + first * source.stride;
  if constexpr (THREADS % CHUNKS == 0) {
    // A thread's chunk is the same in all its rows.
    constexpr int STEP = THREADS / CHUNKS;
    if (source.aligned) {
      const int chunk = thread % CHUNKS, row = thread / CHUNKS, rest = source.bytes - chunk * 16;
      const int bytes = rest < 0 ? 0 : rest < 16 ? rest : 16;
      const char *place = from + row * source.stride + chunk * 16;
#pragma unroll
      for (int k = row; k < row + ROWS; k += STEP, place += STEP * source.stride) {
        if (ROWS % STEP && k >= ROWS) break;
        const bool inside = k < rows && bytes > 0;
        copy_async(shared_address(tile + tile_offset<ROW>(k, chunk)), inside ? place : source.data, inside ? bytes : 0);
      }
      return;
    }
  }
  load_tile_slowly<Element, ROW, ROWS, THREADS>(tile, from, source.stride, rows, source.bytes, thread);
}

static __device__ __forceinline__ bool is_finite(float x) {
  return x * 0 == 0;
}

static __device__ __forceinline__ bool is_finite(double x) {
  return x * 0 == 0;
}

static __device__ __forceinline__ float real_of(float x) {
  return x;
}

static __device__ __forceinline__ double real_of(double x) {
  return x;
}

static __device__ __forceinline__ float real_of(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

static __device__ __forceinline__ float real_of(__half x) {
  return __half2float(x);
}

static __device__ __forceinline__ void put_real(float *to, float x) {
  *to = x;
}

static __device__ __forceinline__ void put_real(double *to, double x) {
  *to = x;
}

static __device__ __forceinline__ void put_real(__nv_bfloat16 *to, float x) {
  *to = __float2bfloat16_rn(x);
}

static __device__ __forceinline__ void put_real(__half *to, float x) {
  *to = __float2half_rn(x);
}

// Puts 0 in place of what is not finite in a tile, and sets row % 32 of bad[row / 32] for the rows that had it; the
// caller clears `bad` before, and puts a barrier before and behind.
template <class Element, int ROW, int ROWS, int THREADS>
static __device__ __forceinline__ void make_finite(char *tile, uint32_t *bad, int thread) {
  enum { CHUNKS = ROW / 16, ALL = ROWS * CHUNKS, EACH = 16 / sizeof(Element) };
  for (int k = thread; k < ALL; k += THREADS) {
    const int row = k / CHUNKS;
    Element *x = (Element *)(tile + tile_offset<ROW>(row, k % CHUNKS));
    bool found = false;
    for (int n = 0; n < EACH; n++) {
      if (is_finite(real_of(x[n]))) continue;
      x[n] = Element(0.f);
      found = true;
    }
    if (found) atomicOr(&bad[row / 32], 1u << (row % 32));
  }
}

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
 *                           those of other sums go between them
 *      multiply             sum += a b, all terms. SWAPPED: what is a here is b where the forward makes the same
 *                           product; the terms are added in its order, so that the bits are the same
 *      sum                  a block while it is summed; value(n) is its c[n]
 *      total                a block of a sum over tiles: its d[n] is c[n]. It is a sum, unless FRESH: then a total is
 *                           made of fresh sums, one a tile
 *
 *      stored      what a tile's elements are when they are multiplied: SPLIT products want split_tile first
 *
 *  CAREFUL is for operands that may hold NaN or Inf: f32 alone needs it (products_f32); without it such operands give
 *  NaN, never a number.
 */

template <int ROW>
static __device__ __forceinline__ uint32_t left_rows_address(const char *tile, int row, int step) {
  const int lane = threadIdx.x & 31;
  return shared_address(tile + tile_offset<ROW>(row + (lane & 15), 2 * step + (lane >> 4)));
}

template <int ROW>
static __device__ __forceinline__ uint32_t right_rows_address(const char *tile, int row, int step) {
  const int lane = threadIdx.x & 31;
  return shared_address(tile + tile_offset<ROW>(row + (lane & 7) + (lane >> 4 << 3), 2 * step + (lane >> 3 & 1)));
}

template <int ROW>
static __device__ __forceinline__ uint32_t right_columns_address(const char *tile, int row, int column) {
  const int lane = threadIdx.x & 31;
  return shared_address(tile + tile_offset<ROW>(row + (lane & 15), column / 8 + (lane >> 4)));
}

// What bf16 and f16 have in common.
struct products_16 {
  typedef float real;
  enum { DEPTH = 16, FRESH = 0, SPLIT = 0 };

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
    b[0].r[0] = r[0], b[0].r[1] = r[1], b[1].r[0] = r[2], b[1].r[1] = r[3];
  }

  template <int ROW>
  static __device__ __forceinline__ void right_columns(right (&b)[2], const char *tile, int row, int column) {
    uint32_t r[4];
    load_matrices_transposed(r, right_columns_address<ROW>(tile, row, column));
    b[0].r[0] = r[0], b[0].r[1] = r[1], b[1].r[0] = r[2], b[1].r[1] = r[3];
  }
};

struct products_bf16 : products_16 {
  typedef __nv_bfloat16 element;
  typedef element stored;
  enum { DTYPE = SA_BF16 };

  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    union {
      __nv_bfloat162 pair;
      uint32_t bits;
    } x;
    x.pair = __floats2bfloat162_rn(low, high);
    return x.bits;
  }

  template <bool>
  static __device__ __forceinline__ void left_of(left &a, const float (*c)[4]) {
    a.r[0] = pack(c[0][0], c[0][1]), a.r[1] = pack(c[0][2], c[0][3]);
    a.r[2] = pack(c[1][0], c[1][1]), a.r[3] = pack(c[1][2], c[1][3]);
  }

  enum { TERMS = 1 };
  template <bool SWAPPED>
  static __device__ __forceinline__ void multiply_term(sum &c, const left &a, const right &b, int) {
    mma_bf16(c.d, a.r, b.r);
  }

  template <bool SWAPPED = false>
  static __device__ __forceinline__ void multiply(sum &c, const left &a, const right &b) {
    mma_bf16(c.d, a.r, b.r);
  }
};

struct products_f16 : products_16 {
  typedef __half element;
  typedef element stored;
  enum { DTYPE = SA_F16 };

  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    union {
      __half2 pair;
      uint32_t bits;
    } x;
    x.pair = __floats2half2_rn(low, high);
    return x.bits;
  }

  template <bool>
  static __device__ __forceinline__ void left_of(left &a, const float (*c)[4]) {
    a.r[0] = pack(c[0][0], c[0][1]), a.r[1] = pack(c[0][2], c[0][3]);
    a.r[2] = pack(c[1][0], c[1][1]), a.r[3] = pack(c[1][2], c[1][3]);
  }

  enum { TERMS = 1 };
  template <bool SWAPPED>
  static __device__ __forceinline__ void multiply_term(sum &c, const left &a, const right &b, int) {
    mma_f16(c.d, a.r, b.r);
  }

  template <bool SWAPPED = false>
  static __device__ __forceinline__ void multiply(sum &c, const left &a, const right &b) {
    mma_f16(c.d, a.r, b.r);
  }
};

// f32 as a sum of two f16 after a scale: x = (big + small) scale to 2^-22 of x, and three of the four products. That is
// half the instructions of two tf32, which hold no more digits. A tile is split in place, once for all warps: f16 has
// no exponents to spare, so each row of it has a scale, a power of two. The hardware cuts off what a sum has beyond 24
// bits, always towards 0: so the small products have a sum of their own, and long sums are made of fresh ones.
struct products_f32 {
  typedef float element;
  typedef float real;
  typedef __half stored;
  enum { DTYPE = SA_F32, DEPTH = 16, FRESH = 1, SPLIT = 1 };

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

  // NaN and Inf make small NaN. CAREFUL: they are the small part, which meets the big one of the other factor alone:
  // its small one may be 0, or of the other sign. (Inf times Inf is NaN then.)
  template <bool CAREFUL>
  static __device__ __forceinline__ void split(float low, float high, uint32_t &big, uint32_t &small) {
    union {
      __half2 pair;
      uint32_t bits;
    } x, y;
    const bool low_finite = !CAREFUL || is_finite(low), high_finite = !CAREFUL || is_finite(high);
    x.pair = __floats2half2_rn(low_finite ? low : 0, high_finite ? high : 0);
    y.pair = __floats2half2_rn(low - __low2float(x.pair), high - __high2float(x.pair));
    big = x.bits, small = y.bits;
  }

  template <int ROW>
  static __device__ __forceinline__ void left_rows(left &a, const char *tile, int row, int step) {
    const uint32_t address = left_rows_address<ROW>(tile, row, step);
    load_matrices(a.big, address);
    load_matrices(a.small, address + ROW / 2);
  }

  static __device__ __forceinline__ void part(right (&b)[2], const uint32_t (&big)[4], const uint32_t (&small)[4]) {
#pragma unroll
    for (int n = 0; n < 4; n++) b[n / 2].big[n % 2] = big[n], b[n / 2].small[n % 2] = small[n];
  }

  template <int ROW>
  static __device__ __forceinline__ void right_rows(right (&b)[2], const char *tile, int row, int step) {
    const uint32_t address = right_rows_address<ROW>(tile, row, step);
    uint32_t big[4], small[4];
    load_matrices(big, address);
    load_matrices(small, address + ROW / 2);
    part(b, big, small);
  }

  template <int ROW>
  static __device__ __forceinline__ void right_columns(right (&b)[2], const char *tile, int row, int column) {
    const uint32_t address = right_columns_address<ROW>(tile, row, column);
    uint32_t big[4], small[4];
    load_matrices_transposed(big, address);
    load_matrices_transposed(small, address + ROW / 2);
    part(b, big, small);
  }

  // Of numbers that have been scaled.
  template <bool CAREFUL>
  static __device__ __forceinline__ void left_of(left &a, const float (*c)[4]) {
#pragma unroll
    for (int n = 0; n < 4; n++) split<CAREFUL>(c[n / 2][n % 2 * 2], c[n / 2][n % 2 * 2 + 1], a.big[n], a.small[n]);
  }

  enum { TERMS = 3 };
  template <bool SWAPPED>
  static __device__ __forceinline__ void multiply_term(sum &c, const left &a, const right &b, int term) {
    if (term == 0) mma_f16(c.small, SWAPPED ? a.big : a.small, SWAPPED ? b.small : b.big);
    if (term == 1) mma_f16(c.big, a.big, b.big);
    if (term == 2) mma_f16(c.small, SWAPPED ? a.small : a.big, SWAPPED ? b.big : b.small);
  }

  template <bool SWAPPED = false>
  static __device__ __forceinline__ void multiply(sum &c, const left &a, const right &b) {
#pragma unroll
    for (int term = 0; term < TERMS; term++) multiply_term<SWAPPED>(c, a, b, term);
  }
};

// Of the eight elements of a step a lane has the neighbours 2t and 2t + 1, one for each of two products.
struct products_f64 {
  typedef double element;
  typedef double real;
  typedef double stored;
  enum { DTYPE = SA_F64, DEPTH = 8, FRESH = 0, SPLIT = 0 };

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

  enum { TERMS = 2 };
  template <bool SWAPPED>
  static __device__ __forceinline__ void multiply_term(sum &c, const left &a, const right &b, int term) {
    double top[2] = {c.d[0], c.d[1]}, bottom[2] = {c.d[2], c.d[3]};
    mma_f64(top, a.r[term], b.r[term]);
    mma_f64(bottom, a.r[term + 2], b.r[term]);
    c.d[0] = top[0], c.d[1] = top[1], c.d[2] = bottom[0], c.d[3] = bottom[1];
  }

  template <bool SWAPPED = false>
  static __device__ __forceinline__ void multiply(sum &c, const left &a, const right &b) {
    multiply_term<SWAPPED>(c, a, b, 0);
    multiply_term<SWAPPED>(c, a, b, 1);
  }
};

template <class Sum>
static __device__ __forceinline__ void clear_sum(Sum &c) {
  memset(&c, 0, sizeof c);
}

// Splits the rows of a tile of products that want it, in place: the first half of a row becomes the big parts, the
// second the small ones; scale[row] is what they are to be multiplied by. CAREFUL as in products_f32. All THREADS
// threads call it, with a barrier before and behind.
template <class P, int ROW, int ROWS, int THREADS, bool CAREFUL>
static __device__ __forceinline__ void split_rows(char *tile, float *scale, int thread) {
  // 16 elements of a row a lane: two pieces of eight.
  constexpr int LANES = ROW / 64, AT_ONCE = THREADS / LANES < ROWS ? THREADS / LANES : ROWS;
  const int part = thread % LANES, first = thread / LANES;
  if (AT_ONCE == ROWS && first >= ROWS) return;
#pragma unroll
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
    if (part == 0) scale[row] = by;
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
__attribute__((noinline)) static __device__ void split_rows_carefully(char *tile, float *scale, int thread) {
  split_rows<P, ROW, ROWS, THREADS, true>(tile, scale, thread);
}

template <class P, int ROW, int ROWS, int THREADS>
static __device__ __forceinline__ void split_tile(char *tile, float *scale, bool careful, int thread) {
  if constexpr (P::SPLIT) {
    if (careful)
      split_rows_carefully<P, ROW, ROWS, THREADS>(tile, scale, thread);
    else
      split_rows<P, ROW, ROWS, THREADS, false>(tile, scale, thread);
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

/*  Tiles of the plan  */

// The tiles of one row (or column) of tiles of the plan, in the order of its list: number `first` to `first` + `count`.
// A run is read while the one before it is walked, so that its latency is not seen.
typedef struct tile_walk {
  const sa_run *next;  // run to read
  sa_run coming;       // read ahead
  int tile, pattern;   // of what comes now
  int in_run;          // tiles of the run still to come, that one included
  int left;            // the same of all
} tile_walk;

static __device__ __forceinline__ void walk_take_run(tile_walk &walk) {
  walk.tile = walk.coming.first;
  walk.pattern = walk.coming.pattern;
  walk.in_run = walk.coming.count;
  if (walk.left > walk.in_run) walk.coming = *walk.next++;
}

static __device__ __forceinline__ int count_tiles(const sa_run *runs, int64_t count) {
  int tiles = 0;
  for (int64_t k = 0; k < count; k++) tiles += runs[k].count;
  return tiles;
}

static __device__ __forceinline__ tile_walk walk_start(const sa_run *runs, int first, int count) {
  tile_walk walk = {runs, {0, 0, 0}, 0, 0, 0, count};
  if (!count) return walk;
  sa_run run = *walk.next++;
  while (first >= run.count) {
    first -= run.count;
    run = *walk.next++;
  }
  walk.coming = {run.first + first, run.count - first, run.pattern};
  walk_take_run(walk);
  return walk;
}

// Only while walk.left > 0.
static __device__ __forceinline__ void walk_advance(tile_walk &walk) {
  if (--walk.left == 0) return;
  if (--walk.in_run)
    walk.tile++;
  else
    walk_take_run(walk);
}

/*  Scores  */

static __device__ __forceinline__ float exp2_of(float x) {
  return exp2_fast(x);
}

static __device__ __forceinline__ double exp2_of(double x) {
  return exp2(x);
}

// How the products q.k of one head become scores: in base 2 when scale is all there is (`plain`), so that 2^x gives
// weights; in natural units with softcap, bias or ALiBi, where base 2 would make -inf of a bias of the dtype's minimum.
// A difference of scores times `unit` is an exponent of 2.
template <class Real>
struct score_rule {
  Real factor, unit, softcap, slope;
  Real inside;       // 1 / softcap
  bool coarse_cap;   // of a half type, whose scores may err by 1.5e-7 of the softcap
  const void *bias;  // NULL: none; of the real's dtype, or of a 16-bit one
  int bias_dtype;
  bool bias_pairs;                // two neighbouring keys of it, an even one first, can be read at once
  int64_t bias_row, bias_column;  // strides, of queries and keys
  int64_t diagonal;
};

static __host__ __device__ inline bool plain_scores(const sa_problem &p) {
  return !p.bias.data && !p.alibi.data && !(p.softcap > 0);
}

template <class Real>
static __device__ __forceinline__ score_rule<Real> score_rule_of(const sa_problem &p, int64_t batch, int64_t head) {
  const double log2e = 1.4426950408889634;
  const bool plain = plain_scores(p);
  score_rule<Real> rule;
  // Without a width a product is an empty sum, whatever 1/sqrt(0) makes of the scale.
  rule.factor = p.width ? (Real)(plain ? p.scale * log2e : p.scale) : 0;
  rule.unit = plain ? 1 : (Real)log2e;
  rule.softcap = (Real)p.softcap;
  rule.inside = p.softcap > 0 ? (Real)(1 / p.softcap) : 0;
  rule.coarse_cap = (p.dtype == SA_F16 || p.dtype == SA_BF16) && p.softcap <= 100;
  rule.slope = p.alibi.data ? (Real)read_operand(p.alibi, head * p.alibi.stride[1]) : 0;
  rule.bias = NULL;
  rule.bias_pairs = false;
  rule.bias_dtype = p.bias.dtype;
  rule.bias_row = p.bias.stride[2];
  rule.bias_column = p.bias.stride[3];
  rule.diagonal = p.diagonal;
  if (p.bias.data) {
    const int bytes = p.bias.dtype == SA_F64 ? 8 : p.bias.dtype == SA_F32 ? 4 : 2;
    rule.bias = (const char *)p.bias.data + (batch * p.bias.stride[0] + head * p.bias.stride[1]) * bytes;
    rule.bias_pairs =
        rule.bias_column == 1 && rule.bias_row % 2 == 0 && p.keys % 2 == 0 && (uintptr_t)rule.bias % (2 * bytes) == 0;
  }
  return rule;
}

// The biases of a block: element n lies `down` (n / 2) and `right` (n % 2) from `at`. Those of masked pairs are not
// read.
template <class Real, class Element>
static __device__ __forceinline__ void read_bias(const Element *at, int64_t right, int64_t down, bool pairs,
                                                 uint32_t visible, Real (&bias)[4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const Element *from = at + half * down;
    const uint32_t seen = visible >> 2 * half & 3;
    if (pairs && sizeof(Element) < 8) {
      struct alignas(2 * sizeof(Element)) {
        Element x[2];
      } pair = {{Element(0.f), Element(0.f)}};
      if (seen) pair = *(const decltype(pair) *)from;
      bias[2 * half] = seen & 1 ? (Real)real_of(pair.x[0]) : 0;
      bias[2 * half + 1] = seen & 2 ? (Real)real_of(pair.x[1]) : 0;
    } else {
      bias[2 * half] = seen & 1 ? (Real)real_of(from[0]) : 0;
      bias[2 * half + 1] = seen & 2 ? (Real)real_of(from[right]) : 0;
    }
  }
}

template <bool TRANSPOSED, class Real>
static __device__ __forceinline__ void bias_block(const score_rule<Real> &rule, int64_t query, int64_t key,
                                                  uint32_t visible, Real (&bias)[4]) {
  const int64_t offset = query * rule.bias_row + key * rule.bias_column;
  const int64_t right = TRANSPOSED ? rule.bias_row : rule.bias_column,
                down = 8 * (TRANSPOSED ? rule.bias_column : rule.bias_row);
  const bool pairs = !TRANSPOSED && rule.bias_pairs;
  if (rule.bias_dtype == SA_F16)
    read_bias((const __half *)rule.bias + offset, right, down, pairs, visible, bias);
  else if (rule.bias_dtype == SA_BF16)
    read_bias((const __nv_bfloat16 *)rule.bias + offset, right, down, pairs, visible, bias);
  else if (rule.bias_dtype == SA_F32)
    read_bias((const float *)rule.bias + offset, right, down, pairs, visible, bias);
  else
    read_bias((const double *)rule.bias + offset, right, down, pairs, visible, bias);
}

// key - query - d of a block's first element; ALiBi multiplies the size of such numbers, which are exact in f32 up to
// 2^24. That of element n is alibi_distance<TRANSPOSED>(apart, n).
template <class Real>
static __device__ __forceinline__ Real alibi_apart(const score_rule<Real> &rule, int64_t query, int64_t key) {
  return (Real)(key - query - rule.diagonal);
}

template <bool TRANSPOSED, class Real>
static __device__ __forceinline__ Real alibi_distance(Real apart, int n) {
  const int down = n / 2 * 8, right = n % 2;
  return fabs(apart + (Real)(TRANSPOSED ? down - right : right - down));
}

static __device__ __forceinline__ float tanh_of(const score_rule<float> &rule, float x) {
  if (!rule.coarse_cap) return tanhf(x);
  // 1 - 2 / (e^2x + 1), an error of 1.5e-7 whatever x is.
  return 1 - __fdividef(2.f, exp2_fast(x * 2.8853900817779268f) + 1);
}

static __device__ __forceinline__ double tanh_of(const score_rule<double> &, double x) {
  return tanh(x);
}

// Products in place become scores, -inf where masked: blocks side by side, of which the first element is (query, key),
// or, with TRANSPOSED scores, whose rows are keys, (key, query). Bit 4 n + i of `visible` is element i of block n;
// those whose bias is -inf are cleared. `full`: all are visible. capped[n], of as many blocks as there are: tanh(s /
// softcap), 0 without. Each option goes over all blocks, so that none waits for the one before.
template <bool TRANSPOSED, class Real, int BLOCKS, int CAPPED>
static __device__ __forceinline__ void score_blocks(const score_rule<Real> &rule, Real (&c)[BLOCKS][4], int64_t query,
                                                    int64_t key, bool full, uint32_t &visible,
                                                    Real (*capped)[CAPPED][4]) {
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      c[n][i] *= rule.factor;
      if (capped) (*capped)[n % CAPPED][i] = 0;
    }
  if (rule.softcap > 0) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const Real inside = tanh_of(rule, c[n][i] * rule.inside);
        if (capped) (*capped)[n % CAPPED][i] = inside;
        c[n][i] = rule.softcap * inside;
      }
  }
  if (rule.bias) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
      Real bias[4];
      bias_block<TRANSPOSED>(rule, query + (TRANSPOSED ? 8 * n : 0), key + (TRANSPOSED ? 0 : 8 * n), visible >> 4 * n,
                             bias);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (bias[i] == -(Real)INFINITY) visible &= ~(1u << (4 * n + i));
        c[n][i] += bias[i];
      }
    }
  }
  if (rule.slope != 0) {
    const Real first = alibi_apart(rule, query, key);
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
      const Real apart = first + (Real)(TRANSPOSED ? -8 * n : 8 * n);
#pragma unroll
      for (int i = 0; i < 4; i++) c[n][i] -= rule.slope * alibi_distance<TRANSPOSED>(apart, i);
    }
  }
  if (full && !rule.bias) return;
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (!(visible >> (4 * n + i) & 1)) c[n][i] = -(Real)INFINITY;
}

/*  Dropout  */

typedef struct dropout_rule {
  uint64_t seed, first;  // index of the head's pair (0, 0)
  int64_t keys;
  uint32_t threshold;  // 0: off
} dropout_rule;

static __device__ __forceinline__ dropout_rule dropout_rule_of(const sa_problem &p, int64_t batch, int64_t head) {
  dropout_rule rule;
  rule.seed = p.seed;
  rule.first = (uint64_t)(batch * p.heads + head) * (uint64_t)p.queries * (uint64_t)p.keys;
  rule.keys = p.keys;
  rule.threshold = sa_dropout_threshold(p.dropout);
  return rule;
}

// Which elements of a block are kept: bit n is c[n]'s, the block as score_block has it.
template <bool TRANSPOSED>
static __device__ __forceinline__ uint32_t kept_block(const dropout_rule &rule, int64_t query, int64_t key) {
  uint32_t kept = 0;
#pragma unroll
  for (int row = 0; row < 2; row++) {
    const int64_t i = query + (TRANSPOSED ? 0 : 8 * row), j = key + (TRANSPOSED ? 8 * row : 0);
    const uint64_t index = rule.first + (uint64_t)i * (uint64_t)rule.keys + (uint64_t)j;
    uint32_t word[2];
    if (!TRANSPOSED && index % 2 == 0) {
      const sa_words words = sa_random_block(rule.seed, index / 4);
      word[0] = index & 2 ? words.word[2] : words.word[0];
      word[1] = index & 2 ? words.word[3] : words.word[1];
    } else {
      word[0] = sa_random_word(rule.seed, index);
      word[1] = sa_random_word(rule.seed, index + (TRANSPOSED ? (uint64_t)rule.keys : 1));
    }
    kept |= (uint32_t)(word[0] >= rule.threshold) << (2 * row) | (uint32_t)(word[1] >= rule.threshold) << (2 * row + 1);
  }
  return kept;
}

#endif
