// copies on the CPU: every dtype to every other, over any strides
#include "kernels/cpu/copy.h"

#include "cast.h"

/*  Rows  */

// What an element is stored as, and how it is read into and written from the type that is computed with.
typedef float f32;
typedef double f64;
typedef uint16_t f16;
typedef uint16_t bf16;
typedef uint8_t bool8;
typedef int32_t i32;
typedef int64_t i64;

#define READ_f32(x) (x)
#define READ_f64(x) (x)
#define READ_f16(x) sa_f16_to_f32(x)
#define READ_bf16(x) sa_bf16_to_f32(x)
#define READ_bool8(x) ((int32_t)((x) != 0))  // borrowed memory may hold any byte
#define READ_i32(x) (x)
#define READ_i64(x) (x)

static inline uint16_t bf16_of_i32(int32_t x) {
  return sa_f64_to_bf16(x);
}
static inline int64_t i64_of_i64(int64_t x) {
  return x;
}

#define WRITE_f32(x) ((float)(x))
#define WRITE_f64(x) ((double)(x))
#define WRITE_f16(x) _Generic((x), float : sa_f32_to_f16, double : sa_f64_to_f16, default : sa_i64_to_f16)(x)
#define WRITE_bf16(x) \
  _Generic((x), float : sa_f32_to_bf16, double : sa_f64_to_bf16, int32_t : bf16_of_i32, default : sa_i64_to_bf16)(x)
#define WRITE_bool8(x) ((x) != 0)
#define WRITE_i32(x) _Generic((x), float : sa_f64_to_i32, double : sa_f64_to_i32, default : sa_i64_to_i32)(x)
#define WRITE_i64(x) _Generic((x), float : sa_f64_to_i64, double : sa_f64_to_i64, default : i64_of_i64)(x)

#define WITHOUT_CAST(TO, FROM, x) (x)
#define WITH_CAST(TO, FROM, x) WRITE_##TO(READ_##FROM(x))

// Unit steps have a loop of their own because only that is vectorised, and a repeated element is converted once.
#define ROW(NAME, TO, FROM, CONVERT)                                                                \
  static void NAME(void *to, int64_t to_step, const void *from, int64_t from_step, int64_t count) { \
    TO *restrict const t = to;                                                                      \
    const FROM *restrict const f = from;                                                            \
    if (to_step == 1 && from_step == 1) {                                                           \
      for (int64_t i = 0; i < count; i++) t[i] = (TO)CONVERT(TO, FROM, f[i]);                       \
    } else if (from_step == 0 && count > 0) {                                                       \
      const TO value = (TO)CONVERT(TO, FROM, f[0]);                                                 \
      for (int64_t i = 0; i < count; i++) t[i * to_step] = value;                                   \
    } else {                                                                                        \
      for (int64_t i = 0; i < count; i++) t[i * to_step] = (TO)CONVERT(TO, FROM, f[i * from_step]); \
    }                                                                                               \
  }
#define CAST(TO, FROM) ROW(FROM##_to_##TO, TO, FROM, WITH_CAST)

ROW(copy_f16, uint16_t, uint16_t, WITHOUT_CAST)  // of either 16-bit float: the very bits
CAST(f32, f32)
CAST(f32, f64)
CAST(f32, f16)
CAST(f32, bf16)
CAST(f32, bool8)
CAST(f32, i32)
CAST(f32, i64)
CAST(f64, f32)
CAST(f64, f64)
CAST(f64, f16)
CAST(f64, bf16)
CAST(f64, bool8)
CAST(f64, i32)
CAST(f64, i64)
CAST(f16, f32)
CAST(f16, f64)
CAST(f16, bf16)
CAST(f16, bool8)
CAST(f16, i32)
CAST(f16, i64)
CAST(bf16, f32)
CAST(bf16, f64)
CAST(bf16, f16)
CAST(bf16, bool8)
CAST(bf16, i32)
CAST(bf16, i64)
CAST(bool8, f32)
CAST(bool8, f64)
CAST(bool8, f16)
CAST(bool8, bf16)
CAST(bool8, bool8)
CAST(bool8, i32)
CAST(bool8, i64)
CAST(i32, f32)
CAST(i32, f64)
CAST(i32, f16)
CAST(i32, bf16)
CAST(i32, bool8)
CAST(i32, i32)
CAST(i32, i64)
CAST(i64, f32)
CAST(i64, f64)
CAST(i64, f16)
CAST(i64, bf16)
CAST(i64, bool8)
CAST(i64, i32)
CAST(i64, i64)

sa_cast_row sa_cpu_cast(int to, int from) {
  // In the order of sa_dtype.
  static const sa_cast_row rows[7][7] = {
      {f32_to_f32, f64_to_f32, f16_to_f32, bf16_to_f32, bool8_to_f32, i32_to_f32, i64_to_f32},
      {f32_to_f64, f64_to_f64, f16_to_f64, bf16_to_f64, bool8_to_f64, i32_to_f64, i64_to_f64},
      {f32_to_f16, f64_to_f16, copy_f16, bf16_to_f16, bool8_to_f16, i32_to_f16, i64_to_f16},
      {f32_to_bf16, f64_to_bf16, f16_to_bf16, copy_f16, bool8_to_bf16, i32_to_bf16, i64_to_bf16},
      {f32_to_bool8, f64_to_bool8, f16_to_bool8, bf16_to_bool8, bool8_to_bool8, i32_to_bool8, i64_to_bool8},
      {f32_to_i32, f64_to_i32, f16_to_i32, bf16_to_i32, bool8_to_i32, i32_to_i32, i64_to_i32},
      {f32_to_i64, f64_to_i64, f16_to_i64, bf16_to_i64, bool8_to_i64, i32_to_i64, i64_to_i64},
  };
  return rows[to][from];
}

/*  Tensors  */

// The dims of a copy: without those of size 1, and with neighbours that are one stretch of memory on both sides joined.
typedef struct copy_dims {
  sa_cast_row row;
  int64_t to_bytes, from_bytes;  // of an element
  int count;
  bool transposes;  // the last two dims are contiguous in `from` and in `to`
  int64_t size[SA_MAX_DIMS], to_step[SA_MAX_DIMS], from_step[SA_MAX_DIMS];
} copy_dims;

static void swap(int64_t *values, int a, int b) {
  const int64_t value = values[a];
  values[a] = values[b];
  values[b] = value;
}

static void swap_dims(copy_dims *d, int a, int b) {
  swap(d->size, a, b);
  swap(d->to_step, a, b);
  swap(d->from_step, a, b);
}

// By the steps of `to`, largest first, so that writing runs through memory in order.
static void sort_dims(copy_dims *d, const sa_tensor *to, const sa_tensor *from) {
  for (int dim = 0; dim < to->ndim; dim++) {
    if (to->shape[dim] == 1) continue;
    d->size[d->count] = to->shape[dim];
    d->to_step[d->count] = to->stride[dim];
    d->from_step[d->count] = from->stride[dim];
    for (int k = d->count++; k > 0 && d->to_step[k] > d->to_step[k - 1]; k--) swap_dims(d, k, k - 1);
  }
}

static void join_dims(copy_dims *d) {
  int last = 0;
  for (int dim = 1; dim < d->count; dim++) {
    const int64_t size = d->size[dim];
    const bool joins = d->to_step[last] == d->to_step[dim] * size && d->from_step[last] == d->from_step[dim] * size;
    if (!joins) last++;
    d->size[last] = joins ? d->size[last] * size : size;
    d->to_step[last] = d->to_step[dim];
    d->from_step[last] = d->from_step[dim];
  }
  if (d->count) d->count = last + 1;
}

// Moves the dim along which `from` is contiguous next to the last one, which it is to be transposed with.
static void find_transpose(copy_dims *d) {
  const int last = d->count - 1;
  if (last < 1 || d->from_step[last] <= 1) return;
  for (int dim = 0; dim < last; dim++) {
    if (d->from_step[dim] != 1) continue;
    swap_dims(d, dim, last - 1);
    d->transposes = true;
    return;
  }
}

// In squares that stay in the first-level cache on both sides: reading down a column wastes no line that it fetched.
static void copy_transposed(const copy_dims *d, char *to, const char *from) {
  enum { SQUARE = 32 };
  const int row = d->count - 2, column = d->count - 1;
  for (int64_t y = 0; y < d->size[row]; y += SQUARE)
    for (int64_t x = 0; x < d->size[column]; x += SQUARE) {
      const int64_t bottom = y + SQUARE < d->size[row] ? y + SQUARE : d->size[row];
      const int64_t width = x + SQUARE < d->size[column] ? SQUARE : d->size[column] - x;
      for (int64_t r = y; r < bottom; r++)
        d->row(to + (r * d->to_step[row] + x * d->to_step[column]) * d->to_bytes, d->to_step[column],
               from + (r * d->from_step[row] + x * d->from_step[column]) * d->from_bytes, d->from_step[column], width);
    }
}

static void copy_from_dim(const copy_dims *d, int dim, char *to, const char *from) {
  const int left = d->count - dim;
  if (left == 1) {
    d->row(to, d->to_step[dim], from, d->from_step[dim], d->size[dim]);
  } else if (left == 2 && d->transposes) {
    copy_transposed(d, to, from);
  } else {
    for (int64_t i = 0; i < d->size[dim]; i++)
      copy_from_dim(d, dim + 1, to + i * d->to_step[dim] * d->to_bytes, from + i * d->from_step[dim] * d->from_bytes);
  }
}

int sa_cpu_copy(sa_tensor *to, const sa_tensor *from) {
  const int64_t numel = sa_tensor_numel(to);
  const sa_cast_row row = sa_cpu_cast(to->dtype, from->dtype);
  if (numel <= 1) {
    row(to->data, 1, from->data, 1, numel);
    return SA_OK;
  }
  copy_dims d = {.row = row, .to_bytes = sa_dtype_size(to->dtype), .from_bytes = sa_dtype_size(from->dtype)};
  sort_dims(&d, to, from);
  join_dims(&d);
  find_transpose(&d);
  copy_from_dim(&d, 0, to->data, from->data);
  return SA_OK;
}

int sa_cpu_fill(sa_tensor *t, double value) {
  // One element of t's dtype, repeated along every dim.
  int64_t element;
  sa_cpu_cast(t->dtype, SA_F64)(&element, 1, &value, 1, 1);
  sa_tensor repeated = *t;
  repeated.data = &element;
  for (int dim = 0; dim < t->ndim; dim++) repeated.stride[dim] = 0;
  return sa_cpu_copy(t, &repeated);
}
