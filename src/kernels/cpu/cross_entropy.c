// the loss of a row of logits whose right answer is an id, and its gradient, on the CPU
#include <math.h>

#include "kernels/cpu/functions.h"
#include "kernels/cpu/line.h"
#include "kernels/cpu/operations.h"

enum { LANES = 16 };  // partial results side by side, so that one need not wait for the one before it

#define REAL double
#define REAL_DTYPE SA_F64
#define WEIGHT sa_weight_f64
#define NAME(name) name##_f64
#include "kernels/cpu/line_weights.h"
#undef REAL
#undef REAL_DTYPE
#undef WEIGHT
#undef NAME

#define REAL float
#define REAL_DTYPE SA_F32
#define WEIGHT sa_weight_f32
#define NAME(name) name##_f32
#include "kernels/cpu/line_weights.h"

typedef struct job {
  sa_line x, dx;
  int ids_dtype;
  int64_t base, ignore;
} job;

// Of one row: loss = log(sum) - (x[id] - greatest), and the weights exp(x - greatest) have that sum.
typedef struct row_sum {
  double greatest, sum;
} row_sum;

typedef float f32;
typedef double f64;

#define ROW(T, DTYPE)                                                                         \
  static row_sum sum_row_##T(const sa_line *x) {                                              \
    T buffer[SA_PIECE], weights[SA_PIECE];                                                    \
    double lane[LANES] = {0};                                                                 \
    const T greatest = greatest_##T(x);                                                       \
    for (int64_t i = 0; i < x->length; i += SA_PIECE) {                                       \
      const int64_t count = sa_line_piece(x, i);                                              \
      weigh_##T(sa_line_read(buffer, DTYPE, x, i), greatest, weights, count);                 \
      add_up_##T(lane, weights, count);                                                       \
    }                                                                                         \
    return (row_sum){greatest, total_##T(lane)};                                              \
  }                                                                                           \
  /* dx = dloss softmax(x) */                                                                 \
  static void slope_row_##T(const sa_line *x, row_sum row, double dloss, const sa_line *dx) { \
    T x_buffer[SA_PIECE], dx_buffer[SA_PIECE];                                                \
    const T factor = (T)(dloss / row.sum);                                                    \
    for (int64_t i = 0; i < x->length; i += SA_PIECE) {                                       \
      const int64_t count = sa_line_piece(x, i);                                              \
      T *const out = sa_line_target(dx_buffer, DTYPE, dx, i);                                 \
      weigh_##T(sa_line_read(x_buffer, DTYPE, x, i), (T)row.greatest, out, count);            \
      _Pragma("GCC ivdep") for (int64_t k = 0; k < count; k++) out[k] *= factor;              \
      sa_line_write(dx, i, out, DTYPE);                                                       \
    }                                                                                         \
  }
ROW(f32, SA_F32)
ROW(f64, SA_F64)

static double read_number(const void *from, int dtype) {
  double value;
  sa_cpu_cast(SA_F64, dtype)(&value, 1, from, 1, 1);
  return value;
}

static int64_t read_id(const void *from, int dtype) {
  return dtype == SA_I64 ? *(const int64_t *)from : *(const int32_t *)from;
}

static row_sum sum_row(const sa_line *x) {
  return x->dtype == SA_F64 ? sum_row_f64(x) : sum_row_f32(x);
}

static void loss_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  const int dtype = j->x.dtype;
  const int64_t size = sa_dtype_size(dtype), id_size = sa_dtype_size(j->ids_dtype);
  for (int64_t i = 0; i < count; i++) {
    const int64_t id = read_id(data[2] + i * step[2] * id_size, j->ids_dtype);
    double loss = 0;
    if (id != j->ignore) {
      const sa_line x = sa_line_at(j->x, data[1] + i * step[1] * size);
      const row_sum row = sum_row(&x);
      loss = log(row.sum) - (read_number(sa_line_entry(&x, id - j->base), dtype) - row.greatest);
    }
    sa_cpu_cast(dtype, SA_F64)(data[0] + i * step[0] * size, 1, &loss, 1, 1);
  }
}

// dx = dloss (softmax(x) - 1 at the id)
static void slope_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  const int dtype = j->x.dtype;
  const int64_t size = sa_dtype_size(dtype), id_size = sa_dtype_size(j->ids_dtype);
  for (int64_t i = 0; i < count; i++) {
    const sa_line dx = sa_line_at(j->dx, data[0] + i * step[0] * size);
    const int64_t id = read_id(data[2] + i * step[2] * id_size, j->ids_dtype);
    if (id == j->ignore) {
      sa_line_fill(&dx, 0);
      continue;
    }
    const sa_line x = sa_line_at(j->x, data[1] + i * step[1] * size);
    const double dloss = read_number(data[3] + i * step[3] * size, dtype);
    const row_sum row = sum_row(&x);
    (dtype == SA_F64 ? slope_row_f64 : slope_row_f32)(&x, row, dloss, &dx);
    const double weight = exp(read_number(sa_line_entry(&x, id - j->base), dtype) - row.greatest);
    const double slope = dloss * (weight / row.sum - 1);
    sa_cpu_cast(dtype, SA_F64)(sa_line_entry(&dx, id - j->base), 1, &slope, 1, 1);
  }
}

int sa_cpu_cross_entropy(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore,
                         const sa_tensor *loss) {
  job j = {.x = sa_line_of(x, x->ndim - 1), .ids_dtype = ids->dtype, .base = base, .ignore = ignore};
  const sa_strided walk = sa_strided_of(3, (const sa_tensor *[]){loss, x, ids}, 0, true);
  sa_strided_run_all(&walk, 8.0 * (double)(j.x.length + 1), loss_piece, &j);
  return SA_OK;
}

int sa_cpu_cross_entropy_backward(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore,
                                  const sa_tensor *dloss, const sa_tensor *dx) {
  const int dim = x->ndim - 1;
  job j = {.x = sa_line_of(x, dim), .dx = sa_line_of(dx, dim), .ids_dtype = ids->dtype, .base = base, .ignore = ignore};
  const sa_strided walk = sa_strided_of(4, (const sa_tensor *[]){dx, x, ids, dloss}, UINT32_C(1) << dim, true);
  sa_strided_run_all(&walk, 16.0 * (double)(j.x.length + 1), slope_piece, &j);
  return SA_OK;
}
