// merging attention over parts of the keys, and its gradient, on the CPU: row by row in f64
#include <math.h>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/strided.h"

// Rows are counted in row-major order of the shape of an LSE. The last dim of outs runs along a row.
typedef struct job {
  int64_t parts, rows, width;
  const sa_tensor *const *outs, *const *lses, *const *douts, *const *dlses;
  const sa_tensor *out, *lse, *dout, *dlse;
} job;

enum { ROWS_PER_ITEM = 64 };

static int64_t size_of(const sa_tensor *t) {
  return sa_dtype_size(t->dtype);
}

static char *row_of(const sa_tensor *t, int dims, int64_t row) {
  int64_t offset = 0;
  for (int dim = dims - 1; dim >= 0; dim--) {
    offset += row % t->shape[dim] * t->stride[dim];
    row /= t->shape[dim];
  }
  return (char *)t->data + offset * size_of(t);
}

static double read_number(const sa_tensor *t, int64_t row) {
  double value;
  sa_cpu_cast(SA_F64, t->dtype)(&value, 1, row_of(t, t->ndim, row), 1, 1);
  return value;
}

static void write_number(const sa_tensor *t, int64_t row, double value) {
  sa_cpu_cast(t->dtype, SA_F64)(row_of(t, t->ndim, row), 1, &value, 1, 1);
}

// Entries first .. first + count - 1 of a row.
static const double *read_entries(double *buffer, const sa_tensor *t, int64_t row, int64_t first, int64_t count) {
  const int64_t step = t->stride[t->ndim - 1];
  return sa_piece_read(buffer, SA_F64, row_of(t, t->ndim - 1, row) + first * step * size_of(t), t->dtype, step, count);
}

static void write_entries(const sa_tensor *t, int64_t row, int64_t first, const double *from, int64_t count) {
  const int64_t step = t->stride[t->ndim - 1];
  sa_piece_write(row_of(t, t->ndim - 1, row) + first * step * size_of(t), t->dtype, step, from, SA_F64, count);
}

static int64_t piece(const job *j, int64_t first) {
  return j->width - first < SA_PIECE ? j->width - first : SA_PIECE;
}

static void zero_entries(const job *j, const sa_tensor *t, int64_t row) {
  static const double zeros[SA_PIECE];
  for (int64_t i = 0; i < j->width; i += SA_PIECE) write_entries(t, row, i, zeros, piece(j, i));
}

// log sum_p exp(lse_p). Only parts that saw something take part, so that -inf comes of nothing else.
static double merged_lse(const job *j, int64_t row) {
  double greatest = -INFINITY, sum = 0;
  bool dead = true;
  for (int64_t p = 0; p < j->parts; p++) {
    const double lse = read_number(j->lses[p], row);
    if (lse > greatest) greatest = lse;
    if (!(lse == -INFINITY)) dead = false;
  }
  if (dead) return -INFINITY;
  for (int64_t p = 0; p < j->parts; p++) {
    const double lse = read_number(j->lses[p], row);
    if (!(lse == -INFINITY)) sum += exp(lse - greatest);
  }
  return greatest + log(sum);
}

static void merge_row(const job *j, int64_t row) {
  const double merged = merged_lse(j, row);
  write_number(j->lse, row, merged);
  for (int64_t i = 0; i < j->width; i += SA_PIECE) {
    const int64_t count = piece(j, i);
    double sum[SA_PIECE] = {0}, buffer[SA_PIECE];
    for (int64_t p = 0; p < j->parts; p++) {
      const double lse = read_number(j->lses[p], row);
      if (lse == -INFINITY) continue;
      const double weight = exp(lse - merged);
      const double *out = read_entries(buffer, j->outs[p], row, i, count);
      for (int64_t k = 0; k < count; k++) sum[k] += weight * out[k];
    }
    write_entries(j->out, row, i, sum, count);
  }
}

// dout . out_p
static double projected(const job *j, int64_t part, int64_t row) {
  double sum = 0;
  for (int64_t i = 0; j->dout && i < j->width; i += SA_PIECE) {
    const int64_t count = piece(j, i);
    double out_buffer[SA_PIECE], dout_buffer[SA_PIECE];
    const double *out = read_entries(out_buffer, j->outs[part], row, i, count);
    const double *dout = read_entries(dout_buffer, j->dout, row, i, count);
    for (int64_t k = 0; k < count; k++) sum += dout[k] * out[k];
  }
  return sum;
}

// dout_p = w_p dout and dlse_p = w_p (dlse + dout . (out_p - out)), w_p = exp(lse_p - lse). lse and dout . out are made
// again from the parts: what the caller holds of them is rounded. A part, or a row, that saw nothing reads no slope.
static void merge_row_backward(const job *j, int64_t row) {
  const double merged = merged_lse(j, row);
  const double dlse = j->dlse && !(merged == -INFINITY) ? read_number(j->dlse, row) : 0;
  double out_slope = 0;
  for (int64_t p = 0; p < j->parts; p++) {
    const double lse = read_number(j->lses[p], row);
    if (!(lse == -INFINITY)) out_slope += exp(lse - merged) * projected(j, p, row);
  }
  for (int64_t p = 0; p < j->parts; p++) {
    const sa_tensor *dout_p = j->douts[p], *dlse_p = j->dlses[p];
    const double lse = read_number(j->lses[p], row);
    if (lse == -INFINITY) {
      if (dout_p) zero_entries(j, dout_p, row);
      if (dlse_p) write_number(dlse_p, row, 0);
      continue;
    }
    const double weight = exp(lse - merged);
    if (dlse_p) write_number(dlse_p, row, weight * (dlse + (projected(j, p, row) - out_slope)));
    if (dout_p && !j->dout) zero_entries(j, dout_p, row);
    for (int64_t i = 0; dout_p && j->dout && i < j->width; i += SA_PIECE) {
      const int64_t count = piece(j, i);
      double buffer[SA_PIECE], slopes[SA_PIECE];
      const double *dout = read_entries(buffer, j->dout, row, i, count);
      for (int64_t k = 0; k < count; k++) slopes[k] = weight * dout[k];
      write_entries(dout_p, row, i, slopes, count);
    }
  }
}

static void run_item(void *argument, int64_t item, int worker) {
  const job *j = argument;
  const int64_t first = item * ROWS_PER_ITEM;
  const int64_t last = j->rows - first < ROWS_PER_ITEM ? j->rows : first + ROWS_PER_ITEM;
  for (int64_t row = first; row < last; row++) {
    if (j->douts)
      merge_row_backward(j, row);
    else
      merge_row(j, row);
  }
}

static int run(job *j) {
  j->rows = sa_tensor_numel(j->lses[0]);
  j->width = j->outs[0]->shape[j->outs[0]->ndim - 1];
  const double flops = 4.0 * (double)j->rows * (double)j->parts * (double)(j->width + 8);
  sa_parallel(sa_workers(flops), (j->rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, run_item, j);
  return SA_OK;
}

int sa_cpu_merge(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts, const sa_tensor *out,
                 const sa_tensor *lse) {
  return run(&(job){.outs = outs, .lses = lses, .parts = parts, .out = out, .lse = lse});
}

int sa_cpu_merge_backward(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts,
                          const sa_tensor *out, const sa_tensor *lse, const sa_tensor *dout, const sa_tensor *dlse,
                          const sa_tensor *const *douts, const sa_tensor *const *dlses) {
  return run(
      &(job){.outs = outs, .lses = lses, .parts = parts, .dout = dout, .dlse = dlse, .douts = douts, .dlses = dlses});
}
