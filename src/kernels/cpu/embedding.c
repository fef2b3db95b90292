// rows of a table by their ids on the CPU
#include <string.h>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/strided.h"

/*  Ids  */

typedef struct search {
  int dtype;
  int64_t base, count;
  const int64_t *ignore;
  int64_t seen, at, value;  // at < 0: nothing found yet
} search;

static void search_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  search *s = argument;
  int64_t buffer[SA_PIECE];
  const int64_t *ids = sa_piece_read(buffer, SA_I64, data[0], s->dtype, step[0], count);
  for (int64_t i = 0; s->at < 0 && i < count; i++) {
    if (s->ignore && ids[i] == *s->ignore) continue;
    if (ids[i] >= s->base && (uint64_t)ids[i] - (uint64_t)s->base < (uint64_t)s->count) continue;
    s->at = s->seen + i;
    s->value = ids[i];
  }
  s->seen += count;
}

int64_t sa_cpu_stray_id(const sa_tensor *ids, int64_t base, int64_t count, const int64_t *ignore, int64_t *value) {
  search s = {.dtype = ids->dtype, .base = base, .count = count, .ignore = ignore, .at = -1};
  const sa_strided walk = sa_strided_of(1, &ids, 0, false);
  sa_strided_run(&walk, 0, walk.numel, search_piece, &s);
  *value = s.value;
  return s.at;
}

/*  Rows  */

typedef struct job {
  const sa_tensor *table;
  int ids_dtype, rows_dtype;
  int64_t base, width, rows_step;
} job;

static void gather_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  int64_t buffer[SA_PIECE];
  const int64_t *ids = sa_piece_read(buffer, SA_I64, data[1], j->ids_dtype, step[1], count);
  const sa_cast_row copy = sa_cpu_cast(j->rows_dtype, j->table->dtype);
  const int64_t size = sa_dtype_size(j->rows_dtype);
  for (int64_t i = 0; i < count; i++) {
    const char *row = (const char *)j->table->data + (ids[i] - j->base) * j->table->stride[0] * size;
    copy(data[0] + i * step[0] * size, j->rows_step, row, j->table->stride[1], j->width);
  }
}

int sa_cpu_embedding(const sa_tensor *table, const sa_tensor *ids, int64_t base, const sa_tensor *y) {
  job j = {.table = table,
           .ids_dtype = ids->dtype,
           .rows_dtype = y->dtype,
           .base = base,
           .width = table->shape[1],
           .rows_step = y->stride[y->ndim - 1]};
  const sa_strided walk = sa_strided_of(2, (const sa_tensor *[]){y, ids}, UINT32_C(1) << ids->ndim, true);
  sa_strided_run_all(&walk, (double)(j.width + 1), gather_piece, &j);
  return SA_OK;
}

// Adds rows of dy to those of the table, which then is f32 or f64.
static void scatter_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  int64_t buffer[SA_PIECE];
  double slopes[SA_PIECE];
  const int64_t *ids = sa_piece_read(buffer, SA_I64, data[1], j->ids_dtype, step[1], count);
  const int as = j->table->dtype;
  const int64_t size = sa_dtype_size(j->rows_dtype), to_step = j->table->stride[1];
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = (ids[i] - j->base) * j->table->stride[0];
    for (int64_t first = 0; first < j->width; first += SA_PIECE) {
      const int64_t width = j->width - first < SA_PIECE ? j->width - first : SA_PIECE;
      const char *from = data[0] + (i * step[0] + first * j->rows_step) * size;
      const void *dy = sa_piece_read(slopes, as, from, j->rows_dtype, j->rows_step, width);
      if (as == SA_F64) {
        double *to = (double *)j->table->data + row + first * to_step;
        for (int64_t k = 0; k < width; k++) to[k * to_step] += ((const double *)dy)[k];
      } else {
        float *to = (float *)j->table->data + row + first * to_step;
        for (int64_t k = 0; k < width; k++) to[k * to_step] += ((const float *)dy)[k];
      }
    }
  }
}

static void scatter(const sa_tensor *ids, int64_t base, const sa_tensor *dy, const sa_tensor *sums) {
  job j = {.table = sums,
           .ids_dtype = ids->dtype,
           .rows_dtype = dy->dtype,
           .base = base,
           .width = sums->shape[1],
           .rows_step = dy->stride[dy->ndim - 1]};
  const sa_strided walk = sa_strided_of(2, (const sa_tensor *[]){dy, ids}, UINT32_C(1) << ids->ndim, false);
  sa_strided_run(&walk, 0, walk.numel, scatter_piece, &j);
}

int sa_cpu_embedding_backward(const sa_tensor *ids, int64_t base, const sa_tensor *dy, const sa_tensor *dtable) {
  sa_tensor target = *dtable;
  if (sa_compute_dtype(dtable->dtype) == dtable->dtype) {
    sa_cpu_fill(&target, 0);
    scatter(ids, base, dy, &target);
    return SA_OK;
  }
  // A half table is summed in f32 beside it, to be rounded once.
  sa_tensor sums = {.dtype = SA_F32, .ndim = 2, .shape = {dtable->shape[0], dtable->shape[1]}};
  sums.stride[0] = sums.shape[1];
  sums.stride[1] = 1;
  sums.data = sa_allocate_zeroed("sa_embedding_backward", sa_tensor_numel(&sums) * (int64_t)sizeof(float));
  if (!sums.data) return SA_NO_MEMORY;
  scatter(ids, base, dy, &sums);
  const int status = sa_cpu_copy(&target, &sums);
  sa_release(sums.data);
  return status;
}
