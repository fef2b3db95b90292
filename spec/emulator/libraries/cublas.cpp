// the few functions of cuBLAS that the CUDA part asks for, in plain loops: build/emulated/libcublas.so
#include <stddef.h>
#include <stdint.h>

#include "cast.h"
#include "runtime_api.h"

namespace {

enum { F32 = 0, F64 = 1, F16 = 2, BF16 = 14 };

double read(const void *from, int type, int64_t at) {
  switch (type) {
    case F64:
      return ((const double *)from)[at];
    case F16:
      return sa_f16_to_f32(((const uint16_t *)from)[at]);
    case BF16:
      return sa_bf16_to_f32(((const uint16_t *)from)[at]);
    default:
      return ((const float *)from)[at];
  }
}

void write(void *to, int type, int64_t at, double value) {
  switch (type) {
    case F64:
      ((double *)to)[at] = value;
      break;
    case F16:
      ((uint16_t *)to)[at] = sa_f64_to_f16(value);
      break;
    case BF16:
      ((uint16_t *)to)[at] = sa_f64_to_bf16(value);
      break;
    default:
      ((float *)to)[at] = (float)value;
  }
}

}  // namespace

extern "C" {

int cublasCreate_v2(void **handle) {
  static int there;
  *handle = &there;
  return 0;
}

int cublasSetStream_v2(void *, void *) {
  return 0;
}

int cublasSetWorkspace_v2(void *, void *, size_t) {
  return 0;
}

int cublasSetMathMode(void *, int) {
  return 0;
}

const char *cublasGetStatusString(int) {
  return "emulated";
}

// Matrices by columns; the scalars are 1 and 0.
int cublasGemmStridedBatchedEx_64(void *, int transposed_a, int transposed_b, int64_t m, int64_t n, int64_t k,
                                  const void *, const void *a, int a_type, int64_t a_step, long long a_batch,
                                  const void *b, int b_type, int64_t b_step, long long b_batch, const void *, void *c,
                                  int c_type, int64_t c_step, long long c_batch, int64_t count, int, int) {
  const emulator::device_access access;
  // 7: an argument is wrong
  if (a_step < (transposed_a ? k : m) || b_step < (transposed_b ? n : k) || c_step < m) return 7;
  for (int64_t batch = 0; batch < count; batch++)
    for (int64_t j = 0; j < n; j++)
      for (int64_t i = 0; i < m; i++) {
        double sum = 0;
        for (int64_t l = 0; l < k; l++)
          sum += read(a, a_type, batch * a_batch + (transposed_a ? i * a_step + l : l * a_step + i)) *
                 read(b, b_type, batch * b_batch + (transposed_b ? l * b_step + j : j * b_step + l));
        write(c, c_type, batch * c_batch + j * c_step + i, sum);
      }
  return 0;
}
}
