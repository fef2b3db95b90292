// dense masks that lie on a CUDA device, packed to the bits that plans are made of, by ballots
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/values.cuh"

static __device__ __forceinline__ bool visible(bool x, double) {
  return x;
}
// NaN is not masked: a visible pair shows it.
template <class T>
static __device__ __forceinline__ bool visible(T x, double at_most) {
  return !((double)sa_wide(x) <= at_most);
}

// A warp makes words of 32 bits, one after the other along a row.
template <class T>
static __global__ void __launch_bounds__(256)
    ballot_kernel(const T *from, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, double at_most,
                  uint32_t *bits, int64_t words) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = (int64_t)gridDim.x * (blockDim.x / 32), count = rows * words;
  for (int64_t word = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; word < count; word += warps) {
    const int64_t row = word / words, column = (word - row * words) * 32 + lane;
    const bool is = column < columns && visible(from[row * row_step + column * column_step], at_most);
    const uint32_t ballot = __ballot_sync(0xffffffffu, is);
    if (lane == 0) bits[word] = ballot;
  }
}

// The same for bools that lie one after the other: a thread reads 16 of them at once and makes 16 bits.
static __global__ void __launch_bounds__(256)
    sixteens_kernel(const uint4 *from, int64_t rows, int64_t row_step, uint16_t *bits, int64_t pieces, int64_t words) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x, count = rows * words;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t row = i / words, piece = i - row * words;
    if (piece >= pieces) {
      bits[i] = 0;
      continue;
    }
    const uint4 x = from[row * row_step + piece];
    const uint32_t four[4] = {x.x, x.y, x.z, x.w};
    uint32_t result = 0;
    for (int k = 0; k < 4; k++) {
      // Bytes are 0 or 1: the product brings bit 0 of byte n to bit 24 + n.
      const uint32_t gathered = ((four[k] & 0x01010101u) * 0x01020408u) >> 24 & 15;
      result |= gathered << (4 * k);
    }
    bits[i] = (uint16_t)result;
  }
}

// Rows that fit the 16 bytes of a load.
static bool in_sixteens(const sa_tensor *m) {
  return m->dtype == SA_BOOL && m->stride[1] == 1 && m->shape[1] % 16 == 0 && (uintptr_t)m->data % 16 == 0 &&
         (m->shape[0] == 1 || m->stride[0] % 16 == 0);
}

static int launch(const char *name, const sa_tensor *m, double at_most, uint64_t *bits, int64_t words,
                  cudaStream_t stream) {
  const int64_t rows = m->shape[0], columns = m->shape[1];
  if (in_sixteens(m))
    return sa_cuda_launch(name, sixteens_kernel, dim3((unsigned)sa_cuda_blocks(m->device, rows * words * 4)), dim3(256),
                          0, stream, (const uint4 *)m->data, rows, m->stride[0] / 16, (uint16_t *)bits, columns / 16,
                          words * 4);
  const auto run = [&](auto type) {
    using T = decltype(type);
    return sa_cuda_launch(name, ballot_kernel<T>, dim3((unsigned)sa_cuda_blocks(m->device, rows * words * 64)),
                          dim3(256), 0, stream, (const T *)m->data, rows, columns, m->stride[0], m->stride[1], at_most,
                          (uint32_t *)bits, words * 2);
  };
  return m->dtype == SA_BOOL ? run(bool()) : sa_with_float(m->dtype, run);
}

int sa_cuda_pack(const sa_tensor *matrix, double at_most, uint64_t *bits, int64_t words) {
  static const char *const name = "sa_mask_dense";
  const int64_t bytes = matrix->shape[0] * words * 8;
  if (bytes == 0) return SA_OK;
  cudaStream_t stream;
  int status = sa_cuda_use(name, matrix->device, &stream);
  if (status) return status;
  uint64_t *there = (uint64_t *)sa_cuda_scratch(name, matrix->device, bytes);
  if (!there) return SA_NO_MEMORY;
  status = launch(name, matrix, at_most, there, words, stream);
  if (!status)
    status = sa_cuda_check(name, cudaMemcpyAsync(bits, there, (size_t)bytes, cudaMemcpyDeviceToHost, stream));
  if (!status) status = sa_cuda_check(name, cudaStreamSynchronize(stream));
  sa_cuda_scratch_release(matrix->device, there);
  return status;
}
