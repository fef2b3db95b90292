// sums, means and extremes over dims on the CPU: floats in f64, integers in i64, always in the same order
#include <math.h>
#include <string.h>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/strided.h"

enum { LANES = 8 };  // partial results side by side, so that one need not wait for the one before it

// into[i] becomes into[i] op x[i]
typedef void (*fold)(void *into, const void *x, int64_t count);

#define FOLD(NAME, TYPE, EXPRESSION)                                       \
  static void NAME##_##TYPE(void *into, const void *from, int64_t count) { \
    TYPE *restrict const kept = into;                                      \
    const TYPE *restrict const values = from;                              \
    for (int64_t i = 0; i < count; i++) {                                  \
      const TYPE a = kept[i], x = values[i];                               \
      kept[i] = EXPRESSION;                                                \
    }                                                                      \
  }
FOLD(sum, double, a + x)
FOLD(max, double, x > a || x != x ? x : a)  // a NaN stays: nothing is greater than it
FOLD(min, double, x < a || x != x ? x : a)
FOLD(sum, int64_t, (int64_t)((uint64_t)a + (uint64_t)x))
FOLD(max, int64_t, x > a ? x : a)
FOLD(min, int64_t, x < a ? x : a)

static const fold folds[2][SA_MIN + 1] = {{sum_double, sum_double, max_double, min_double},
                                          {sum_int64_t, sum_int64_t, max_int64_t, min_int64_t}};

typedef union value {
  double real;
  int64_t integer;
} value;

typedef struct job {
  int op, x_dtype, y_dtype;
  int compute;  // SA_F64 or SA_I64
  int64_t x_size, y_size;
  fold fold;
  value start;
  int64_t divisor;     // of a mean
  sa_strided reduced;  // what one result is made of, from its first element on
} job;

static void fill(value *to, value start, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = start;
}

static void put(const job *j, char *to, int64_t step, value *results, int64_t count) {
  if (j->op == SA_MEAN)
    for (int64_t i = 0; i < count; i++) results[i].real /= (double)j->divisor;
  sa_piece_write(to, j->y_dtype, step, results, j->compute, count);
}

/*  One result after the other: the reduced dims lie closest in memory  */

typedef struct along {
  const job *job;
  value lane[LANES];
} along;

static void fold_along(void *argument, char *const *data, const int64_t *step, int64_t count) {
  along *a = argument;
  value buffer[SA_PIECE];
  const value *x = sa_piece_read(buffer, a->job->compute, data[0], a->job->x_dtype, step[0], count);
  int64_t done = 0;
  if (a->job->fold == sum_double) {
    double lane[LANES];
    for (int k = 0; k < LANES; k++) lane[k] = a->lane[k].real;
    for (; done + LANES <= count; done += LANES)
      for (int k = 0; k < LANES; k++) lane[k] += x[done + k].real;
    for (int k = 0; k < LANES; k++) a->lane[k].real = lane[k];
  }
  for (; done < count; done += LANES) a->job->fold(a->lane, x + done, count - done < LANES ? count - done : LANES);
}

static value result_along(const job *j, char *first) {
  along a = {.job = j};
  fill(a.lane, j->start, LANES);
  sa_strided walk = j->reduced;
  walk.data[0] = first;
  sa_strided_run(&walk, 0, walk.numel, fold_along, &a);
  for (int half = LANES / 2; half > 0; half /= 2) j->fold(a.lane, a.lane + half, half);
  return a.lane[0];
}

/*  Many results at once: they lie closer than what each is made of  */

typedef struct across {
  const job *job;
  int64_t x_step, count;
  value results[SA_PIECE];
} across;

static void fold_across(void *argument, char *const *data, const int64_t *step, int64_t count) {
  across *a = argument;
  const job *j = a->job;
  value buffer[SA_PIECE];
  for (int64_t i = 0; i < count; i++) {
    const char *from = data[0] + i * step[0] * j->x_size;
    j->fold(a->results, sa_piece_read(buffer, j->compute, from, j->x_dtype, a->x_step, a->count), a->count);
  }
}

static void reduce_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  const int64_t reduced_step = j->reduced.step[0][j->reduced.ndim - 1];
  if (count >= LANES && step[1] < reduced_step) {
    across a = {.job = j, .x_step = step[1], .count = count};
    fill(a.results, j->start, count);
    sa_strided walk = j->reduced;
    walk.data[0] = data[1];
    sa_strided_run(&walk, 0, walk.numel, fold_across, &a);
    put(j, data[0], step[0], a.results, count);
    return;
  }
  for (int64_t i = 0; i < count; i++) {
    value result = result_along(j, data[1] + i * step[1] * j->x_size);
    put(j, data[0] + i * step[0] * j->y_size, 1, &result, 1);
  }
}

/*  The place of the first greatest  */

typedef struct greatest {
  const job *job;
  value best;
  int64_t at, seen;
} greatest;

static void find_greatest(void *argument, char *const *data, const int64_t *step, int64_t count) {
  greatest *g = argument;
  value buffer[SA_PIECE];
  const value *x = sa_piece_read(buffer, g->job->compute, data[0], g->job->x_dtype, step[0], count);
  for (int64_t i = 0; i < count; i++) {
    const bool better = g->job->compute == SA_I64
                            ? x[i].integer > g->best.integer
                            : x[i].real > g->best.real || (x[i].real != x[i].real && g->best.real == g->best.real);
    if (!better && g->at >= 0) continue;
    g->best = x[i];
    g->at = g->seen + i;
  }
  g->seen += count;
}

static void argmax_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  for (int64_t i = 0; i < count; i++) {
    greatest g = {.job = j, .best = j->start, .at = -1};
    sa_strided walk = j->reduced;
    walk.data[0] = data[1] + i * step[1] * j->x_size;
    sa_strided_run(&walk, 0, walk.numel, find_greatest, &g);
    ((int64_t *)data[0])[i * step[0]] = g.at;
  }
}

// What changes no result: 0, the least or the greatest.
static value start_of(int op, int compute) {
  if (compute == SA_F64) return (value){.real = op == SA_MIN ? INFINITY : op < SA_MAX ? 0 : -INFINITY};
  return (value){.integer = op == SA_MIN ? INT64_MAX : op < SA_MAX ? 0 : INT64_MIN};
}

int sa_cpu_reduce(int op, const sa_tensor *x, uint32_t dims, const sa_tensor *y) {
  job j = {.op = op, .x_dtype = x->dtype, .y_dtype = y->dtype};
  j.reduced = sa_strided_of(1, &x, ~dims, op != SA_ARGMAX);
  j.compute = x->dtype == SA_F64 || sa_compute_dtype(x->dtype) == SA_F32 ? SA_F64 : SA_I64;
  j.x_size = sa_dtype_size(x->dtype);
  j.y_size = sa_dtype_size(y->dtype);
  if (op != SA_ARGMAX) j.fold = folds[j.compute == SA_I64][op];
  j.start = start_of(op, j.compute);
  j.divisor = j.reduced.numel;
  const sa_strided walk = sa_strided_of(2, (const sa_tensor *[]){y, x}, dims, true);
  sa_strided_run_all(&walk, (double)j.reduced.numel, op == SA_ARGMAX ? argmax_piece : reduce_piece, &j);
  return SA_OK;
}
