// rows of any float dtype in, and out again, for the fused kernels; included once per ISA
#ifndef SAFEATTN_KERNELS_CPU_FLASH_ROWS_H
#define SAFEATTN_KERNELS_CPU_FLASH_ROWS_H
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cast.h"
#include "safeattn.h"

// A vector of halves as floats.
typedef float sa_floats __attribute__((vector_size(VECTOR_BYTES)));

static inline sa_floats widened_f16(const uint16_t *from) {
#if defined(__AVX512F__)
  return (sa_floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
  return (sa_floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
  sa_floats to;
  for (int i = 0; i < VECTOR_BYTES / 4; i++) to[i] = sa_f16_to_f32(from[i]);
  return to;
#endif
}

static inline void read_f16(const uint16_t *from, int count, float *to) {
  enum { FLOATS = VECTOR_BYTES / 4 };
  int d = 0;
  for (; d + FLOATS <= count; d += FLOATS) {
    const sa_floats x = widened_f16(from + d);
    memcpy(to + d, &x, sizeof x);
  }
  for (; d < count; d++) to[d] = sa_f16_to_f32(from[d]);
}

static inline void read_row_f32(const void *from, int dtype, int count, float *to) {
  const uint16_t *half = from;
  switch (dtype) {
    case SA_F32:
      memcpy(to, from, sizeof *to * count);
      break;
    case SA_F16:
      read_f16(half, count, to);
      break;
    case SA_BF16:
      // The bits alone: a signalling NaN may stay one, since arithmetic makes it quiet.
      for (int d = 0; d < count; d++) to[d] = sa_f32_of_bits((uint32_t)half[d] << 16);
      break;
    default:
      for (int d = 0; d < count; d++) to[d] = (float)((const double *)from)[d];
  }
}

static inline void write_row_f32(void *to, int dtype, int count, const float *from) {
  uint16_t *half = to;
  switch (dtype) {
    case SA_F32:
      memcpy(to, from, sizeof *from * count);
      break;
    case SA_F16:
      for (int d = 0; d < count; d++) half[d] = sa_f32_to_f16(from[d]);
      break;
    case SA_BF16:
      for (int d = 0; d < count; d++) half[d] = sa_f32_to_bf16(from[d]);
      break;
    default:
      for (int d = 0; d < count; d++) ((double *)to)[d] = from[d];
  }
}

// The work in f64 serves f64 alone; only a bias, sinks and slopes may be f32 beside it.
static inline void read_row_f64(const void *from, int dtype, int count, double *to) {
  if (dtype == SA_F64)
    memcpy(to, from, sizeof *to * count);
  else
    for (int d = 0; d < count; d++) to[d] = ((const float *)from)[d];
}

static inline void write_row_f64(void *to, int dtype, int count, const double *from) {
  if (dtype == SA_F64)
    memcpy(to, from, sizeof *from * count);
  else
    for (int d = 0; d < count; d++) ((float *)to)[d] = (float)from[d];
}

#endif
