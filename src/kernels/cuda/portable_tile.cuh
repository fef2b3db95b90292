// rows of operands as tiles in shared memory, and what is not finite in them
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_TILE_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_TILE_CUH
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/operand.cuh"
#include "kernels/cuda/portable_numbers.cuh"

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
  int bytes;   // of a row
  bool whole;  // every row is whole chunks of 16 bytes, aligned to 16
} tile_source;

// Whether every row starts at a multiple of 16 bytes.
static __host__ inline bool rows_aligned(const sa_operand &x, int element_bytes) {
  return ((uintptr_t)x.data | (uintptr_t)(x.stride[0] * element_bytes) | (uintptr_t)(x.stride[1] * element_bytes) |
          (uintptr_t)(x.stride[2] * element_bytes)) %
             16 ==
         0;
}

static __host__ __device__ inline tile_source tile_source_of(const sa_operand &x, int element_bytes, int64_t batch,
                                                             int64_t head, int64_t rows, int64_t width, bool aligned) {
  tile_source source;
  source.data = (const char *)x.data + (batch * x.stride[0] + head * x.stride[1]) * element_bytes;
  source.stride = x.stride[2] * element_bytes;
  source.rows = rows;
  source.bytes = (int)width * element_bytes;
  source.whole = aligned && source.bytes % 16 == 0;
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

// The address in shared memory that lies `rows` (a multiple of 8, unless the row at `at` is 0 to 7 and their sum is)
// and `chunks` (a multiple of 2, or what has no bit in common with the chunk at `at`) from the place at `at` of a tile,
// which begins at a multiple of 128. What is constant here is free: an immediate of the instruction that uses it, and
// one of few exclusive ors.
template <int ROW>
static __device__ __forceinline__ uint32_t tile_address(uint32_t at, int rows, int chunks) {
  return (at ^ (uint32_t)((rows ^ chunks) & 7) << 4) + rows * ROW + (chunks & ~7) * 16;
}

// Starts copying ROWS rows from `first` on into a tile; all THREADS threads call it. They are there after the threads'
// copy_async_commit, copy_async_wait and a barrier.
template <class Element, int ROW, int ROWS, int THREADS>
static __device__ __forceinline__ void load_tile(char *tile, const tile_source &source, int64_t first, int thread) {
  constexpr int CHUNKS = ROW / 16;
  const int64_t left = source.rows - first;
  const char *from = source.data + first * source.stride;
  if constexpr (THREADS % CHUNKS == 0) {
    // A thread's chunk is the same in all its rows.
    constexpr int STEP = THREADS / CHUNKS, COPIES = (ROWS + STEP - 1) / STEP;
    if (source.whole) {
      const int chunk = thread % CHUNKS, row = thread / CHUNKS;
      const bool none = chunk * 16 >= source.bytes;
      const char *place = from + row * source.stride + chunk * 16;
      const uint32_t to = shared_address(tile + tile_offset<ROW>(row, chunk));
      if (ROWS % STEP == 0 && left >= ROWS) {
#pragma unroll
        for (int n = 0; n < COPIES; n++, place += STEP * source.stride)
          copy_async(tile_address<ROW>(to, n * STEP, 0), place, none);
      } else {
#pragma unroll 1
        for (int k = row; k < ROWS; k += STEP, place += STEP * source.stride)
          copy_async(shared_address(tile + tile_offset<ROW>(k, chunk)), place, none || k >= left);
      }
      return;
    }
  }
  load_tile_slowly<Element, ROW, ROWS, THREADS>(tile, from, source.stride, left < ROWS ? (int)left : ROWS, source.bytes,
                                                thread);
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

#endif
