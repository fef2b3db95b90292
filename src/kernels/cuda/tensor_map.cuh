// how TMA is told of a tensor of halves
#ifndef SAFEATTN_KERNELS_CUDA_TENSOR_MAP_CUH
#define SAFEATTN_KERNELS_CUDA_TENSOR_MAP_CUH
#include <cuda.h>

#include "kernels/cuda/device.cuh"

// A panel is 64 columns of halves, 128 bytes: the width of a box and of the swizzle.
enum { SA_PANEL = 64 };

// Whether TMA can read (or write) the tensor: rows of a positive stride, everything aligned to 16 bytes.
static inline bool sa_cuda_tensor_map_fits(const sa_operand *x, const int64_t shape[4]) {
  if ((uintptr_t)x->data % 16) return false;
  for (int d = 0; d < 3; d++) {
    if (shape[d] <= 1) continue;
    if (x->stride[d] % 8 || x->stride[d] < 0 || x->stride[d] >= (int64_t)1 << 39 || shape[d] > INT32_MAX) return false;
    if (d == 2 && x->stride[d] < shape[3]) return false;
  }
  return true;
}

// TMA wants strides above 0, so a dim that is broadcast (or of size 1) counts one element: its coordinate is to be
// multiplied by this.
static inline int sa_cuda_tensor_map_step(const sa_operand *x, const int64_t shape[4], int dim) {
  return shape[dim] > 1 && x->stride[dim] != 0;
}

// The map of [batch, head, row, column] (`shape`, columns contiguous) in boxes of `rows` x SA_PANEL, swizzled by 128
// bytes; what lies beyond is read as zeros. `fetched`: what the second-level cache gets from memory at a time.
static inline int sa_cuda_tensor_map(const char *function, CUtensorMap *map, const sa_operand *x,
                                     const int64_t shape[4], int rows,
                                     CUtensorMapL2promotion fetched = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  // Asked for once a process: the same address whichever thread is first.
  static decltype(&cuTensorMapEncodeTiled) encode = NULL;
  if (!encode) {
    cudaDriverEntryPointQueryResult found;
    void *entry = NULL;
    const int status = sa_cuda_check(
        function, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found));
    if (status) return status;
    encode = (decltype(encode))entry;
    if (!encode) return sa_cuda_check(function, cudaErrorSymbolNotFound);
  }
  cuuint64_t dims[4], strides[3];
  dims[0] = (cuuint64_t)shape[3];
  for (int d = 0; d < 3; d++) {
    const bool step = sa_cuda_tensor_map_step(x, shape, d);
    dims[3 - d] = step ? (cuuint64_t)shape[d] : 1;
    strides[2 - d] = step ? (cuuint64_t)x->stride[d] * 2 : (cuuint64_t)((shape[3] * 2 + 15) / 16 * 16);
  }
  const cuuint32_t box[4] = {SA_PANEL, (cuuint32_t)rows, 1, 1}, unit[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      x->dtype == SA_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult made = encode(map, type, 4, x->data, dims, strides, box, unit, CU_TENSOR_MAP_INTERLEAVE_NONE,
                               CU_TENSOR_MAP_SWIZZLE_128B, fetched, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? SA_OK : sa_cuda_check(function, cudaErrorInvalidValue);
}

#endif
