// masks that are read as bits: dense and additive ones, blocks, and those written row by row
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "backend.h"
#include "cast.h"
#include "mask_new.h"
#include "memory.h"
#include "status.h"
#include "tensor.h"

// Which of `count` elements from `from` on are visible: 0 or 1 each.
typedef void (*flag_reader)(const void *from, int64_t stride, int64_t count, double at_most, uint8_t *flags);

static void read_bool(const void *from, int64_t stride, int64_t count, double at_most, uint8_t *flags) {
  const uint8_t *value = from;
  for (int64_t k = 0; k < count; k++) flags[k] = value[k * stride] != 0;
}

// NaN is not masked: a visible pair shows it.
#define DEFINE_FLOAT_READER(NAME, TYPE, TO_FLOAT)                                                     \
  static void NAME(const void *from, int64_t stride, int64_t count, double at_most, uint8_t *flags) { \
    const TYPE *value = from;                                                                         \
    if (stride == 1)                                                                                  \
      for (int64_t k = 0; k < count; k++) flags[k] = !(TO_FLOAT(value[k]) <= at_most);                \
    else                                                                                              \
      for (int64_t k = 0; k < count; k++) flags[k] = !(TO_FLOAT(value[k * stride]) <= at_most);       \
  }

DEFINE_FLOAT_READER(read_f32, float, )
DEFINE_FLOAT_READER(read_f64, double, )
DEFINE_FLOAT_READER(read_f16, uint16_t, sa_f16_to_f32)
DEFINE_FLOAT_READER(read_bf16, uint16_t, sa_bf16_to_f32)

static flag_reader float_reader(int dtype) {
  switch (dtype) {
    case SA_F32:
      return read_f32;
    case SA_F64:
      return read_f64;
    case SA_F16:
      return read_f16;
    case SA_BF16:
      return read_bf16;
    default:
      return NULL;
  }
}

// Zeroed bits; `shape` and `kept` are set.
static int allocate_bits(sa_grid *grid, const char *function) {
  grid->words = sa_tiles(grid->kept[3]) * (SA_TILE / 64);
  int64_t bytes = grid->words;
  for (int k = 0; k < 3; k++)
    if (__builtin_mul_overflow(bytes, grid->kept[k], &bytes)) bytes = INT64_MAX / 64;
  if (__builtin_mul_overflow(bytes, 8, &bytes)) bytes = INT64_MAX;
  grid->bits = sa_allocate_zeroed(function, bytes);
  return grid->bits ? SA_OK : SA_NO_MEMORY;
}

static uint64_t *grid_row(const sa_grid *grid, int64_t batch, int64_t head, int64_t row) {
  return grid->bits + ((batch * grid->kept[1] + head) * grid->kept[2] + row) * grid->words;
}

// What the bits of one plane are read from: element (row, column) is at row * stride[0] + column * stride[1].
typedef struct flag_source {
  const char *from;
  int64_t stride[2], size;  // elements, bytes
  flag_reader read;
  double at_most;
} flag_source;

// Up to 64 elements along `dim`, as bits.
static uint64_t read_word(const flag_source *source, int64_t row, int64_t column, int dim, int64_t count) {
  uint8_t flags[64];
  if (count < 64) memset(flags, 0, sizeof flags);
  const char *from = source->from + (row * source->stride[0] + column * source->stride[1]) * source->size;
  source->read(from, source->stride[dim], count, source->at_most, flags);
  return sa_pack_flags(flags);
}

static void pack_along_rows(const flag_source *source, uint64_t *to, int64_t rows, int64_t columns, int64_t words) {
  for (int64_t row = 0; row < rows; row++, to += words)
    for (int64_t column = 0; column < columns; column += 64)
      to[column / 64] = read_word(source, row, column, 1, columns - column < 64 ? columns - column : 64);
}

// For columns whose elements are neighbours in memory: along the rows every element would cost a cache line. One block
// of columns after the other, so that memory is read in its order.
static void pack_along_columns(const flag_source *source, uint64_t *to, int64_t rows, int64_t columns, int64_t words) {
  for (int64_t column = 0; column < columns; column += 64)
    for (int64_t row = 0; row < rows; row += 64) {
      const int64_t height = rows - row < 64 ? rows - row : 64, width = columns - column < 64 ? columns - column : 64;
      uint64_t square[64] = {0};
      for (int64_t k = 0; k < width; k++) square[k] = read_word(source, row, column + k, 0, height);
      sa_transpose64(square);
      for (int64_t k = 0; k < height; k++) to[(row + k) * words + column / 64] = square[k];
    }
}

static void pack_plane(const sa_grid *grid, const flag_source *source, int64_t batch, int64_t head) {
  const bool along_rows = source->stride[1] <= source->stride[0] || grid->kept[2] == 1;
  (along_rows ? pack_along_rows : pack_along_columns)(source, grid_row(grid, batch, head, 0), grid->kept[2],
                                                      grid->kept[3], grid->words);
}

// The planes of a tensor that is not on the CPU are packed where they are, and only the bits come here.
static int pack_plane_there(const char *function, const sa_grid *grid, const sa_tensor *t, const int64_t *stride,
                            double at_most, int64_t batch, int64_t head) {
  const sa_backend *backend = sa_backend_of(function, t->device);
  if (!backend) return SA_NO_DEVICE;
  const sa_tensor matrix = {
      .data = (char *)t->data + (batch * stride[0] + head * stride[1]) * sa_dtype_size(t->dtype),
      .dtype = t->dtype,
      .device = t->device,
      .ndim = 2,
      .shape = {grid->kept[2], grid->kept[3]},
      .stride = {stride[2], stride[3]},
  };
  return backend->pack(&matrix, at_most, grid_row(grid, batch, head, 0), grid->words);
}

static int new_grid(sa_mask **out, const char *function, const char *name, const sa_tensor *t, int64_t size,
                    flag_reader read, double at_most) {
  sa_mask *mask = sa_mask_new(function, name, SA_MASK_GRID);
  if (!mask) return SA_NO_MEMORY;
  sa_grid *grid = &mask->grid;
  grid->size = size;
  int64_t stride[4] = {0};
  for (int k = 0; k < 4; k++) {
    const int dim = t->ndim - 4 + k;
    grid->shape[k] = dim < 0 ? 1 : t->shape[dim];
    stride[k] = dim < 0 ? 0 : t->stride[dim];
    grid->kept[k] = stride[k] == 0 && grid->shape[k] > 1 ? 1 : grid->shape[k];
  }
  if (allocate_bits(grid, function)) {
    sa_mask_release(mask);
    return SA_NO_MEMORY;
  }
  int status = SA_OK;
  for (int64_t b = 0; !status && b < grid->kept[0]; b++)
    for (int64_t h = 0; !status && h < grid->kept[1]; h++) {
      if (t->device != SA_CPU) {
        status = pack_plane_there(function, grid, t, stride, at_most, b, h);
        continue;
      }
      const int64_t element = sa_dtype_size(t->dtype);
      const char *from = (const char *)t->data + (b * stride[0] + h * stride[1]) * element;
      const flag_source source = {from, {stride[2], stride[3]}, element, read, at_most};
      pack_plane(grid, &source, b, h);
    }
  if (status) {
    sa_mask_release(mask);
    return status;
  }
  mask->batch = grid->shape[0];
  mask->heads = grid->shape[1];
  mask->per_batch = grid->kept[0] != 1;
  mask->per_head = grid->kept[1] != 1;
  *out = mask;
  return SA_OK;
}

static int check_bool(const char *function, const char *argument, const sa_tensor *t, const char *advice) {
  if (t->dtype != SA_BOOL)
    return sa_fail(SA_INVALID, function, "%s: got %s, wanted bool%s", argument, sa_describe(t), advice);
  return SA_OK;
}

int sa_mask_dense(sa_mask **out, const sa_tensor *visible) {
  if (sa_mask_check_out(__func__, out) || sa_mask_check_tensor(__func__, "visible", visible, 4) ||
      check_bool(__func__, "visible", visible, " (a float mask is a bias, or sa_mask_additive)"))
    return SA_INVALID;
  return new_grid(out, __func__, "dense", visible, 1, read_bool, 0);
}

int sa_mask_blocks(sa_mask **out, const sa_tensor *keep, int64_t size) {
  if (sa_mask_check_out(__func__, out) || sa_mask_check_tensor(__func__, "keep", keep, 4) ||
      check_bool(__func__, "keep", keep, ""))
    return SA_INVALID;
  if (size < 1) return sa_fail(SA_INVALID, __func__, "size: got %lld, wanted at least 1", (long long)size);
  return new_grid(out, __func__, "blocks", keep, size, read_bool, 0);
}

int sa_mask_additive(sa_mask **out, const sa_tensor *bias, double at_most) {
  if (sa_mask_check_out(__func__, out) || sa_mask_check_tensor(__func__, "bias", bias, 4)) return SA_INVALID;
  const flag_reader read = float_reader(bias->dtype);
  if (!read)
    return sa_fail(SA_INVALID, __func__, "bias: got %s, wanted f32, f64, f16 or bf16 (for a bool: sa_mask_dense)",
                   sa_describe(bias));
  if (isnan(at_most)) return sa_fail(SA_INVALID, __func__, "at_most: got nan, wanted a number");
  return new_grid(out, __func__, "additive", bias, 1, read, at_most);
}

int sa_mask_bits(sa_mask **out, int64_t batch, int64_t heads, int64_t queries, int64_t keys) {
  if (sa_mask_check_out(__func__, out)) return SA_INVALID;
  const int64_t shape[4] = {batch, heads, queries, keys};
  static const char *const names[4] = {"batch", "heads", "queries", "keys"};
  for (int k = 0; k < 4; k++)
    if (shape[k] < 0)
      return sa_fail(SA_INVALID, __func__, "%s: got %lld, wanted at least 0", names[k], (long long)shape[k]);
  sa_mask *mask = sa_mask_new(__func__, "bits", SA_MASK_GRID);
  if (!mask) return SA_NO_MEMORY;
  mask->grid.size = 1;
  memcpy(mask->grid.shape, shape, sizeof shape);
  memcpy(mask->grid.kept, shape, sizeof shape);
  if (allocate_bits(&mask->grid, __func__)) {
    sa_mask_release(mask);
    return SA_NO_MEMORY;
  }
  mask->heads = heads;
  mask->per_head = heads != 1;
  sa_mask_need_batch(mask, batch);
  *out = mask;
  return SA_OK;
}

int sa_mask_bits_row(sa_mask *mask, int64_t batch, int64_t head, int64_t query, const uint8_t *visible) {
  if (!mask) return sa_fail(SA_INVALID, __func__, "mask: got NULL, wanted one made by sa_mask_bits");
  if (strcmp(mask->name, "bits") != 0)
    return sa_fail(SA_INVALID, __func__, "mask: got %s, wanted one made by sa_mask_bits", mask->name);
  if (atomic_load(&mask->in_use))
    return sa_fail(SA_INVALID, __func__, "mask: got one in use, wanted one that is not planned or combined yet");
  const int64_t index[3] = {batch, head, query};
  static const char *const names[3] = {"batch", "head", "query"};
  for (int k = 0; k < 3; k++)
    if (index[k] < 0 || index[k] >= mask->grid.shape[k])
      return sa_fail(SA_INVALID, __func__, "%s: got %lld, wanted 0 to below %lld", names[k], (long long)index[k],
                     (long long)mask->grid.shape[k]);
  const int64_t keys = mask->grid.shape[3];
  if (!visible && keys > 0)
    return sa_fail(SA_INVALID, __func__, "visible: got NULL, wanted %lld flags", (long long)keys);
  uint64_t *row = grid_row(&mask->grid, batch, head, query);
  uint8_t flags[64] = {0};
  for (int64_t key = 0; key < keys; key += 64) {
    if (keys - key < 64) memset(flags, 0, sizeof flags);
    read_bool(visible + key, 1, keys - key < 64 ? keys - key : 64, 0, flags);
    row[key / 64] = sa_pack_flags(flags);
  }
  return SA_OK;
}
