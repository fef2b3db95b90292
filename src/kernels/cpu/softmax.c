// the stand-alone safe softmax and its gradient on the CPU
//
// A line is what one softmax runs along. Whether it is dead is asked of its entries (all are -inf), never of its
// greatest one alone: a line of NaN and -inf has no greatest entry either, and must stay NaN.
#include <math.h>

#include "kernels/cpu/functions.h"
#include "kernels/cpu/line.h"
#include "kernels/cpu/operations.h"

enum { LANES = 16 };  // partial results side by side, so that one need not wait for the one before it

typedef struct job {
  int dead_rows;
  sa_line x, y, dy, dx;
} job;

static double dead_value(int64_t length, int dead_rows) {
  return dead_rows == SA_ZERO ? 0 : dead_rows == SA_NAN ? NAN : 1.0 / (double)length;
}

#define REAL double
#define REAL_DTYPE SA_F64
#define WEIGHT sa_weight_f64
#define NAME(name) name##_f64
#include "kernels/cpu/line_weights.h"
#include "kernels/cpu/softmax_lines.h"
#undef REAL
#undef REAL_DTYPE
#undef WEIGHT
#undef NAME

#define REAL float
#define REAL_DTYPE SA_F32
#define WEIGHT sa_weight_f32
#define NAME(name) name##_f32
#include "kernels/cpu/line_weights.h"
#include "kernels/cpu/softmax_lines.h"

int sa_cpu_softmax(const sa_tensor *x, int dim, int dead_rows, const sa_tensor *y) {
  job j = {.dead_rows = dead_rows, .x = sa_line_of(x, dim), .y = sa_line_of(y, dim)};
  const sa_strided walk = sa_strided_of(2, (const sa_tensor *[]){y, x}, UINT32_C(1) << dim, true);
  sa_strided_run_all(&walk, 8.0 * (double)(j.x.length + 1), x->dtype == SA_F64 ? forward_f64 : forward_f32, &j);
  return SA_OK;
}

int sa_cpu_softmax_backward(const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, int dim, int dead_rows,
                            const sa_tensor *dx) {
  job j = {.dead_rows = dead_rows,
           .x = sa_line_of(x, dim),
           .y = sa_line_of(y, dim),
           .dy = sa_line_of(dy, dim),
           .dx = sa_line_of(dx, dim)};
  const sa_strided walk = sa_strided_of(4, (const sa_tensor *[]){dx, x, y, dy}, UINT32_C(1) << dim, true);
  sa_strided_run_all(&walk, 4.0 * (double)(j.x.length + 1), x->dtype == SA_F64 ? backward_f64 : backward_f32, &j);
  return SA_OK;
}
