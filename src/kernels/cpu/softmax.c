// the stand-alone safe softmax and its gradient on the CPU
//
// A line is what one softmax runs along. Whether it is dead is asked of its entries (all are -inf), never of its
// greatest one alone: a line of NaN and -inf has no greatest entry either, and must stay NaN.
#include <math.h>

#include "kernels/cpu/exp.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/strided.h"

#pragma GCC optimize("no-trapping-math")  // choices of two values become vectors; nobody reads the flags

enum { LANES = 16 };  // partial results side by side, so that one need not wait for the one before it

typedef struct job {
  int dtype, dead_rows;
  int64_t size;                              // bytes of an element
  int64_t length;                            // of a line
  int64_t x_step, y_step, dy_step, dx_step;  // along a line, in elements
} job;

#define REAL float
#define REAL_DTYPE SA_F32
#define WEIGHT sa_weight_f32
#define NAME(name) name##_f32
#include "kernels/cpu/softmax_lines.h"

#define REAL double
#define REAL_DTYPE SA_F64
#define WEIGHT sa_weight_f64
#define NAME(name) name##_f64
#include "kernels/cpu/softmax_lines.h"

int sa_cpu_softmax(const sa_tensor *x, int dim, int dead_rows, const sa_tensor *y) {
  job j = {.dtype = x->dtype,
           .dead_rows = dead_rows,
           .size = sa_dtype_size(x->dtype),
           .length = x->shape[dim],
           .x_step = x->stride[dim],
           .y_step = y->stride[dim]};
  const sa_strided walk = sa_strided_of(2, (const sa_tensor *[]){y, x}, UINT32_C(1) << dim, true);
  sa_strided_run_all(&walk, 8.0 * (double)(j.length + 1), x->dtype == SA_F64 ? forward_f64 : forward_f32, &j);
  return SA_OK;
}

int sa_cpu_softmax_backward(const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, int dim, int dead_rows,
                            const sa_tensor *dx) {
  job j = {.dtype = x->dtype,
           .dead_rows = dead_rows,
           .size = sa_dtype_size(x->dtype),
           .length = x->shape[dim],
           .x_step = x->stride[dim],
           .y_step = y->stride[dim],
           .dy_step = dy->stride[dim],
           .dx_step = dx->stride[dim]};
  const sa_strided walk = sa_strided_of(4, (const sa_tensor *[]){dx, x, y, dy}, UINT32_C(1) << dim, true);
  sa_strided_run_all(&walk, 4.0 * (double)(j.length + 1), x->dtype == SA_F64 ? backward_f64 : backward_f32, &j);
  return SA_OK;
}
