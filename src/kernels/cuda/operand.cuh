// elements of an operand of any float dtype, read and written as doubles
#ifndef SAFEATTN_KERNELS_CUDA_OPERAND_CUH
#define SAFEATTN_KERNELS_CUDA_OPERAND_CUH
#include "backend.h"
#include "cast.h"

static __device__ __forceinline__ double read_operand(const sa_operand &x, int64_t offset) {
  switch (x.dtype) {
    case SA_F32:
      return ((const float *)x.data)[offset];
    case SA_F16:
      return sa_f16_to_f32(((const uint16_t *)x.data)[offset]);
    case SA_BF16:
      return sa_bf16_to_f32(((const uint16_t *)x.data)[offset]);
    default:
      return ((const double *)x.data)[offset];
  }
}

// Rounded once, whatever the dtype.
static __device__ __forceinline__ void write_operand(const sa_operand &x, int64_t offset, double value) {
  switch (x.dtype) {
    case SA_F32:
      ((float *)x.data)[offset] = (float)value;
      break;
    case SA_F16:
      ((uint16_t *)x.data)[offset] = sa_f64_to_f16(value);
      break;
    case SA_BF16:
      ((uint16_t *)x.data)[offset] = sa_f64_to_bf16(value);
      break;
    default:
      ((double *)x.data)[offset] = value;
  }
}

#endif
