// layer normalisation of the last dim and its gradient on the CPU: in f64, row by row
#include <math.h>
#include <string.h>

#include "kernels/cpu/line.h"
#include "kernels/cpu/operations.h"

typedef struct job {
  sa_line x, y;              // y is dx in the backward
  sa_line weight, bias, dy;  // data NULL: absent
  double epsilon;
  bool wants_dx;
} job;

enum {
  LANES = 8,   // partial sums side by side, so that one addition need not wait for the one before it
  BLOCKS = 64  // at most so many partial sums of dweight: a number of the shape, never of the threads
};

static void add_up(double lane[LANES], const double *v, int64_t count) {
  int64_t done = 0;
  for (; done + LANES <= count; done += LANES)
    for (int k = 0; k < LANES; k++) lane[k] += v[done + k];
  for (int k = 0; done < count; done++, k++) lane[k] += v[done];
}

static double total(double lane[LANES]) {
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int k = 0; k < half; k++) lane[k] += lane[k + half];
  return lane[0];
}

typedef struct moments {
  double mean, scale;  // scale = 1 / sqrt(variance + epsilon)
} moments;

// The variance in a second pass: from the sum of squares it would cancel.
static moments moments_of(const sa_line *x, double epsilon) {
  double buffer[SA_PIECE], squares[SA_PIECE], lane[LANES] = {0}, square_lane[LANES] = {0};
  const double length = (double)x->length;
  for (int64_t i = 0; i < x->length; i += SA_PIECE)
    add_up(lane, sa_line_read(buffer, SA_F64, x, i), sa_line_piece(x, i));
  const double mean = total(lane) / length;
  for (int64_t i = 0; i < x->length; i += SA_PIECE) {
    const double *v = sa_line_read(buffer, SA_F64, x, i);
    const int64_t count = sa_line_piece(x, i);
    for (int64_t k = 0; k < count; k++) squares[k] = (v[k] - mean) * (v[k] - mean);
    add_up(square_lane, squares, count);
  }
  return (moments){mean, 1 / sqrt(total(square_lane) / length + epsilon)};
}

static void forward_row(const job *j, const sa_line *x, const sa_line *y) {
  const moments m = moments_of(x, j->epsilon);
  for (int64_t i = 0; i < x->length; i += SA_PIECE) {
    double x_buffer[SA_PIECE], vector[SA_PIECE], out[SA_PIECE];
    const int64_t count = sa_line_piece(x, i);
    const double *v = sa_line_read(x_buffer, SA_F64, x, i);
    for (int64_t k = 0; k < count; k++) out[k] = (v[k] - m.mean) * m.scale;
    if (j->weight.data) {
      const double *weight = sa_line_read(vector, SA_F64, &j->weight, i);
      for (int64_t k = 0; k < count; k++) out[k] *= weight[k];
    }
    if (j->bias.data) {
      const double *bias = sa_line_read(vector, SA_F64, &j->bias, i);
      for (int64_t k = 0; k < count; k++) out[k] += bias[k];
    }
    sa_line_write(y, i, out, SA_F64);
  }
}

static void forward_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  const int64_t size = sa_dtype_size(j->x.dtype);
  for (int64_t i = 0; i < count; i++) {
    const sa_line y = sa_line_at(j->y, data[0] + i * step[0] * size);
    const sa_line x = sa_line_at(j->x, data[1] + i * step[1] * size);
    forward_row(j, &x, &y);
  }
}

static sa_line line_or_none(const sa_tensor *t) {
  return t ? sa_line_of(t, t->ndim - 1) : (sa_line){0};
}

int sa_cpu_layernorm(const sa_tensor *x, const sa_tensor *weight, const sa_tensor *bias, double epsilon,
                     const sa_tensor *y) {
  const int dim = x->ndim - 1;
  job j = {.x = sa_line_of(x, dim),
           .y = sa_line_of(y, dim),
           .weight = line_or_none(weight),
           .bias = line_or_none(bias),
           .epsilon = epsilon};
  const sa_strided walk = sa_strided_of(2, (const sa_tensor *[]){y, x}, UINT32_C(1) << dim, true);
  sa_strided_run_all(&walk, 8.0 * (double)(j.x.length + 1), forward_piece, &j);
  return SA_OK;
}

/*  The gradient  */

// One piece of a row: what was normalised, n = (x - mean) scale, and g = dy weight.
static int64_t read_slopes(const job *j, const sa_line *x, const sa_line *dy, moments m, int64_t first, double *n,
                           double *g) {
  double buffer[SA_PIECE];
  const int64_t count = sa_line_piece(x, first);
  const double *v = sa_line_read(buffer, SA_F64, x, first);
  for (int64_t k = 0; k < count; k++) n[k] = (v[k] - m.mean) * m.scale;
  const double *slopes = sa_line_read(buffer, SA_F64, dy, first);
  memcpy(g, slopes, (size_t)count * sizeof *g);
  if (j->weight.data) {
    const double *weight = sa_line_read(buffer, SA_F64, &j->weight, first);
    for (int64_t k = 0; k < count; k++) g[k] *= weight[k];
  }
  return count;
}

// dx = scale (g - mean of g - n mean of g n)
static void slope_row(const job *j, const sa_line *x, const sa_line *dy, const sa_line *dx, moments m) {
  double n[SA_PIECE], g[SA_PIECE], lane[LANES] = {0}, product_lane[LANES] = {0};
  const double length = (double)x->length;
  for (int64_t i = 0; i < x->length; i += SA_PIECE) {
    const int64_t count = read_slopes(j, x, dy, m, i, n, g);
    add_up(lane, g, count);
    for (int64_t k = 0; k < count; k++) g[k] *= n[k];
    add_up(product_lane, g, count);
  }
  const double mean = total(lane) / length, product_mean = total(product_lane) / length;
  for (int64_t i = 0; i < x->length; i += SA_PIECE) {
    const int64_t count = read_slopes(j, x, dy, m, i, n, g);
    for (int64_t k = 0; k < count; k++) g[k] = m.scale * (g[k] - mean - n[k] * product_mean);
    sa_line_write(dx, i, g, SA_F64);
  }
}

static void add_to_sums(const job *j, const sa_line *x, const sa_line *dy, moments m, double *sums) {
  double x_buffer[SA_PIECE], dy_buffer[SA_PIECE];
  for (int64_t i = 0; i < x->length; i += SA_PIECE) {
    const int64_t count = sa_line_piece(x, i);
    const double *v = sa_line_read(x_buffer, SA_F64, x, i), *slopes = sa_line_read(dy_buffer, SA_F64, dy, i);
    double *dweight = sums + i, *dbias = sums + x->length + i;
    for (int64_t k = 0; k < count; k++) {
      dweight[k] += slopes[k] * ((v[k] - m.mean) * m.scale);
      dbias[k] += slopes[k];
    }
  }
}

typedef struct block_job {
  const job *job;
  const sa_strided *walk;
  int64_t rows;  // of a block
  double *sums;  // of the block at hand
} block_job;

static void slope_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const block_job *b = argument;
  const job *j = b->job;
  const int64_t size = sa_dtype_size(j->x.dtype);
  for (int64_t i = 0; i < count; i++) {
    const sa_line x = sa_line_at(j->x, data[1] + i * step[1] * size);
    const sa_line dy = sa_line_at(j->dy, data[2] + i * step[2] * size);
    const moments m = moments_of(&x, j->epsilon);
    if (b->sums) add_to_sums(j, &x, &dy, m, b->sums);
    if (j->wants_dx) {
      const sa_line dx = sa_line_at(j->y, data[0] + i * step[0] * size);
      slope_row(j, &x, &dy, &dx, m);
    }
  }
}

static void run_block(void *argument, int64_t block, int worker) {
  block_job b = *(const block_job *)argument;
  if (b.sums) b.sums += block * 2 * b.job->x.length;
  const int64_t first = block * b.rows, rest = b.walk->numel - first;
  sa_strided_run(b.walk, first, first + (rest < b.rows ? rest : b.rows), slope_piece, &b);
}

// The partial sums of all blocks, in their order, into t.
static void finish_sums(const double *sums, int64_t blocks, int64_t length, const sa_tensor *t) {
  const sa_line line = sa_line_of(t, 0);
  for (int64_t i = 0; i < length; i += SA_PIECE) {
    double sum[SA_PIECE] = {0};
    const int64_t count = sa_line_piece(&line, i);
    for (int64_t block = 0; block < blocks; block++)
      for (int64_t k = 0; k < count; k++) sum[k] += sums[block * 2 * length + i + k];
    sa_line_write(&line, i, sum, SA_F64);
  }
}

int sa_cpu_layernorm_backward(const sa_tensor *x, const sa_tensor *weight, double epsilon, const sa_tensor *dy,
                              const sa_tensor *dx, const sa_tensor *dweight, const sa_tensor *dbias) {
  const int dim = x->ndim - 1;
  const int64_t length = x->shape[dim];
  const job j = {.x = sa_line_of(x, dim),
                 .dy = sa_line_of(dy, dim),
                 .y = dx ? sa_line_of(dx, dim) : (sa_line){0},
                 .weight = line_or_none(weight),
                 .epsilon = epsilon,
                 .wants_dx = dx};
  const sa_strided walk = sa_strided_of(3, (const sa_tensor *[]){dx ? dx : x, x, dy}, UINT32_C(1) << dim, false);
  // At least 16 rows a block, so that summing up the sums is the smaller part.
  const int64_t least = (walk.numel + BLOCKS - 1) / BLOCKS;
  block_job b = {.job = &j, .walk = &walk, .rows = least < 16 ? 16 : least};
  const int64_t blocks = (walk.numel + b.rows - 1) / b.rows;
  const bool wants_sums = dweight || dbias;
  if (wants_sums) {
    b.sums = sa_allocate_zeroed("sa_layernorm_backward", blocks * 2 * length * (int64_t)sizeof(double));
    if (!b.sums) return SA_NO_MEMORY;
  }
  sa_parallel(sa_workers(16.0 * (double)walk.numel * (double)length), blocks, run_block, &b);
  if (dweight) finish_sums(b.sums, blocks, length, dweight);
  if (dbias) finish_sums(b.sums + length, blocks, length, dbias);
  sa_release(b.sums);
  return SA_OK;
}
