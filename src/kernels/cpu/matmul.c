// products of matrices on the CPU: OpenBLAS, and plain loops for tiny ones and where there is no BLAS
#include "matmul.h"

#include <limits.h>
#include <string.h>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/strided.h"

// Products of fewer multiplications than this cost less than a call of OpenBLAS.
enum { TINY = 4096 };

// One matrix of a batch, as it lies or packed.
typedef struct matrix {
  int dtype;
  int64_t rows, columns, row_step, column_step;
  void *packed;             // room for a row-major copy in the type of computation; NULL: it is read as it lies
  const char *packed_from;  // whose copy is there
} matrix;

typedef struct job {
  int compute;  // SA_F32 or SA_F64
  bool plain;
  matrix a, b, y;
} job;

/*  Plain loops  */

enum { ROW_BLOCK = 4, COLUMN_BLOCK = 32, INNER_BLOCK = 256 };  // a block of b is 32 KB (f32), its sums 512 bytes

typedef struct operands {
  const void *a, *b;
  void *y;
  int64_t m, n, k;
  int64_t a_row, a_column, b_row, b_column, y_row, y_column;
} operands;

// Adds to y the rows `i`.. and columns `j`.. of a block of the inner dim; the first block sets y.
#define PLAIN(T)                                                                                               \
  static void block_##T(const operands *o, int64_t i, int64_t rows, int64_t j, int64_t columns, int64_t first, \
                        int64_t last) {                                                                        \
    const T *const a = o->a, *const b = o->b;                                                                  \
    T *const y = o->y;                                                                                         \
    T sum[ROW_BLOCK][COLUMN_BLOCK] = {{0}};                                                                    \
    for (int64_t k = first; k < last; k++) {                                                                   \
      const T *const b_row = b + k * o->b_row + j * o->b_column;                                               \
      for (int64_t r = 0; r < rows; r++) {                                                                     \
        const T factor = a[(i + r) * o->a_row + k * o->a_column];                                              \
        if (o->b_column == 1) {                                                                                \
          for (int64_t c = 0; c < columns; c++) sum[r][c] += factor * b_row[c];                                \
        } else {                                                                                               \
          for (int64_t c = 0; c < columns; c++) sum[r][c] += factor * b_row[c * o->b_column];                  \
        }                                                                                                      \
      }                                                                                                        \
    }                                                                                                          \
    for (int64_t r = 0; r < rows; r++) {                                                                       \
      for (int64_t c = 0; c < columns; c++) {                                                                  \
        T *const to = y + (i + r) * o->y_row + (j + c) * o->y_column;                                          \
        *to = first == 0 ? sum[r][c] : *to + sum[r][c];                                                        \
      }                                                                                                        \
    }                                                                                                          \
  }                                                                                                            \
  static void plain_##T(const operands *o) {                                                                   \
    for (int64_t j = 0; j < o->n; j += COLUMN_BLOCK) {                                                         \
      const int64_t columns = o->n - j < COLUMN_BLOCK ? o->n - j : COLUMN_BLOCK;                               \
      for (int64_t first = 0; first < o->k; first += INNER_BLOCK) {                                            \
        const int64_t last = o->k - first < INNER_BLOCK ? o->k : first + INNER_BLOCK;                          \
        for (int64_t i = 0; i < o->m; i += ROW_BLOCK)                                                          \
          block_##T(o, i, o->m - i < ROW_BLOCK ? o->m - i : ROW_BLOCK, j, columns, first, last);               \
      }                                                                                                        \
    }                                                                                                          \
  }
PLAIN(float)
PLAIN(double)

/*  OpenBLAS  */

// How BLAS can read a matrix where it lies: by rows, or by columns. A repeated or overlapping row is neither.
static bool lies_by_rows(const matrix *m) {
  return (m->columns <= 1 || m->column_step == 1) &&
         (m->rows <= 1 || (m->row_step >= m->columns && m->row_step <= INT_MAX));
}
static bool lies_by_columns(const matrix *m) {
  const matrix flipped = {
      .rows = m->columns, .columns = m->rows, .row_step = m->column_step, .column_step = m->row_step};
  return lies_by_rows(&flipped);
}

// BLAS wants at least the length of a row, even of a single one.
static int leading(int64_t count, int64_t step, int64_t length) {
  const int64_t least = length < 1 ? 1 : length;
  return (int)(count > 1 ? step : least);
}

static bool by_blas(const job *j, const operands *o) {
  const matrix a = {.rows = o->m, .columns = o->k, .row_step = o->a_row, .column_step = o->a_column};
  const matrix b = {.rows = o->k, .columns = o->n, .row_step = o->b_row, .column_step = o->b_column};
  sa_product p = {.m = (int)o->m, .n = (int)o->n, .k = (int)o->k};
  p.a_transposed = !lies_by_rows(&a);
  p.b_transposed = !lies_by_rows(&b);
  p.a_step = p.a_transposed ? leading(a.columns, a.column_step, a.rows) : leading(a.rows, a.row_step, a.columns);
  p.b_step = p.b_transposed ? leading(b.columns, b.column_step, b.rows) : leading(b.rows, b.row_step, b.columns);
  p.y_step = leading(o->m, o->y_row, o->n);
  return j->compute == SA_F64 ? sa_blas_f64(&p, o->a, o->b, o->y) : sa_blas_f32(&p, o->a, o->b, o->y);
}

/*  The batch  */

// The matrix at `from` as the loops can read it.
static const void *read_matrix(const job *j, matrix *m, const char *from, int64_t *row_step, int64_t *column_step) {
  *row_step = m->packed ? m->columns : m->row_step;
  *column_step = m->packed ? 1 : m->column_step;
  if (!m->packed) return from;
  if (m->packed_from != from) {
    const sa_cast_row cast = sa_cpu_cast(j->compute, m->dtype);
    const int64_t size = sa_dtype_size(m->dtype), packed_row = m->columns * sa_dtype_size(j->compute);
    for (int64_t r = 0; r < m->rows; r++)
      cast((char *)m->packed + r * packed_row, 1, from + r * m->row_step * size, m->column_step, m->columns);
    m->packed_from = from;
  }
  return m->packed;
}

static void write_matrix(const job *j, char *to) {
  const matrix *y = &j->y;
  const sa_cast_row cast = sa_cpu_cast(y->dtype, j->compute);
  const int64_t size = sa_dtype_size(y->dtype), packed_row = y->columns * sa_dtype_size(j->compute);
  for (int64_t r = 0; r < y->rows; r++)
    cast(to + r * y->row_step * size, y->column_step, (char *)y->packed + r * packed_row, 1, y->columns);
}

static void multiply_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  job *j = argument;
  const int64_t size = sa_dtype_size(j->y.dtype);
  for (int64_t i = 0; i < count; i++) {
    char *y = data[0] + i * step[0] * size;
    operands o = {.m = j->a.rows, .n = j->b.columns, .k = j->a.columns, .y = j->y.packed ? j->y.packed : y};
    o.a = read_matrix(j, &j->a, data[1] + i * step[1] * size, &o.a_row, &o.a_column);
    o.b = read_matrix(j, &j->b, data[2] + i * step[2] * size, &o.b_row, &o.b_column);
    o.y_row = j->y.packed ? j->y.columns : j->y.row_step;
    o.y_column = j->y.packed ? 1 : j->y.column_step;
    if (j->plain || !by_blas(j, &o)) (j->compute == SA_F64 ? plain_double : plain_float)(&o);
    if (j->y.packed) write_matrix(j, y);
  }
}

static matrix matrix_of(const sa_tensor *t) {
  const int last = t->ndim - 1;
  return (matrix){.dtype = t->dtype,
                  .rows = t->shape[last - 1],
                  .columns = t->shape[last],
                  .row_step = t->stride[last - 1],
                  .column_step = t->stride[last]};
}

// The batch of t and its rows as one long matrix, when its rows lie evenly. An activation [B,L,E] times a weight [E,F]
// is then one product of B*L rows.
static bool join_batch(const sa_tensor *t, matrix *joined) {
  *joined = matrix_of(t);
  for (int dim = t->ndim - 3; dim >= 0; dim--) {
    if (t->shape[dim] == 1) continue;
    if (joined->rows == 1)
      joined->row_step = t->stride[dim];
    else if (t->stride[dim] != joined->rows * joined->row_step)
      return false;
    joined->rows *= t->shape[dim];
  }
  return true;
}

static bool repeats_batch(const sa_tensor *t) {
  for (int dim = 0; dim < t->ndim - 2; dim++)
    if (t->shape[dim] > 1 && t->stride[dim] != 0) return false;
  return true;
}

static int allocate_packed(const job *j, matrix *m) {
  m->packed = sa_allocate("sa_matmul", m->rows * m->columns * sa_dtype_size(j->compute));
  return m->packed ? SA_OK : SA_NO_MEMORY;
}

int sa_cpu_matmul(const sa_tensor *a, const sa_tensor *b, const sa_tensor *y) {
  if (sa_tensor_numel(y) == 0) return SA_OK;
  job j = {.compute = sa_compute_dtype(y->dtype), .a = matrix_of(a), .b = matrix_of(b), .y = matrix_of(y)};
  if (j.a.columns == 0) {
    sa_tensor zeros = *y;
    return sa_cpu_fill(&zeros, 0);
  }
  matrix long_a, long_y;
  const bool one = repeats_batch(b) && join_batch(a, &long_a) && join_batch(y, &long_y);
  if (one) {
    j.a = long_a;
    j.y = long_y;
  }
  const double multiplications = (double)j.a.rows * (double)j.a.columns * (double)j.b.columns;
  const bool fits = j.a.rows <= INT_MAX && j.a.columns <= INT_MAX && j.b.columns <= INT_MAX;
  j.plain = multiplications < TINY || !fits;
  const bool halves = y->dtype != j.compute;
  int status = SA_OK;
  if (halves || (!j.plain && !lies_by_rows(&j.a) && !lies_by_columns(&j.a))) status = allocate_packed(&j, &j.a);
  if (!status && (halves || (!j.plain && !lies_by_rows(&j.b) && !lies_by_columns(&j.b))))
    status = allocate_packed(&j, &j.b);
  if (!status && (halves || (!j.plain && !lies_by_rows(&j.y)))) status = allocate_packed(&j, &j.y);
  if (!status) {
    const sa_strided batch = sa_strided_of(3, (const sa_tensor *[]){y, a, b}, UINT32_C(3) << (y->ndim - 2), false);
    if (one)
      sa_strided_run(&batch, 0, 1, multiply_piece, &j);
    else if (j.plain && !halves)
      sa_strided_run_all(&batch, 2 * multiplications, multiply_piece, &j);
    else
      sa_strided_run(&batch, 0, batch.numel, multiply_piece, &j);
  }
  sa_release(j.a.packed);
  sa_release(j.b.packed);
  sa_release(j.y.packed);
  return status;
}
