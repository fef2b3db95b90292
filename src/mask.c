// mask expressions: their constructors, which check and copy what they read, and the algebra
#include "mask.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "backend.h"
#include "cast.h"
#include "memory.h"
#include "status.h"
#include "tensor.h"

/*  Nodes  */

static int check_out(const char *function, sa_mask **out) {
  if (!out) return sa_fail(SA_INVALID, function, "out: is NULL, wanted a place for the mask");
  return SA_OK;
}

// A node with one holder that depends on nothing; NULL when memory is refused.
static sa_mask *new_mask(const char *function, const char *name, sa_mask_kind kind) {
  sa_mask *mask = sa_allocate_zeroed(function, sizeof *mask);
  if (!mask) return NULL;
  atomic_init(&mask->holders, 1);
  mask->kind = kind;
  mask->name = name;
  mask->batch = mask->heads = 1;
  return mask;
}

static void need_batch(sa_mask *mask, int64_t batch) {
  mask->batch = batch;
  mask->per_batch = batch != 1;
}

static void release_parts(sa_mask *mask) {
  sa_plans_drop(mask->plans, SA_PLANS_KEPT);
  if (mask->kind == SA_MASK_CORNER) {
    sa_release(mask->corners);
  } else if (mask->kind == SA_MASK_GRID) {
    sa_release(mask->grid.bits);
  } else if (mask->kind == SA_MASK_DOCUMENTS) {
    sa_release(mask->key_ids.number);
    sa_release(mask->key_ids.ranges);
    if (mask->shared) return;
    sa_release(mask->query_ids.number);
    sa_release(mask->query_ids.ranges);
  }
}

void sa_mask_retain(const sa_mask *mask) {
  if (mask) atomic_fetch_add_explicit(&((sa_mask *)mask)->holders, 1, memory_order_relaxed);
}

// Whether that was the last hold.
static bool let_go(sa_mask *mask) {
  return mask && atomic_fetch_sub_explicit(&mask->holders, 1, memory_order_acq_rel) == 1;
}

// A list instead of recursion: an expression may be deeper than the stack.
void sa_mask_release(sa_mask *mask) {
  sa_mask *dying = let_go(mask) ? mask : NULL;
  while (dying) {
    sa_mask *rest = dying->next;
    for (int k = 0; k < sa_operands(dying->kind); k++) {
      sa_mask *operand = (sa_mask *)dying->operands[k];
      if (!let_go(operand)) continue;
      operand->next = rest;
      rest = operand;
    }
    release_parts(dying);
    sa_release(dying);
    dying = rest;
  }
}

/*  Corners and bands  */

// `corners` to be filled by the caller.
static int new_corners(sa_mask **out, const char *function, const char *name, int64_t count) {
  sa_mask *mask = new_mask(function, name, SA_MASK_CORNER);
  if (!mask) return SA_NO_MEMORY;
  int64_t bytes;
  if (__builtin_mul_overflow(count, (int64_t)sizeof *mask->corners, &bytes)) bytes = INT64_MAX;
  mask->corners = sa_allocate(function, bytes);
  if (!mask->corners) {
    sa_mask_release(mask);
    return SA_NO_MEMORY;
  }
  need_batch(mask, count);
  *out = mask;
  return SA_OK;
}

// One corner that any sequence clips.
static int new_corner(sa_mask **out, const char *function, const char *name, sa_corner corner) {
  if (check_out(function, out)) return SA_INVALID;
  const int status = new_corners(out, function, name, 1);
  if (status) return status;
  (*out)->corners[0] = corner;
  (*out)->clipped = true;
  return SA_OK;
}

int sa_mask_all(sa_mask **out) {
  return new_corner(out, __func__, "all", (sa_corner){SA_UNBOUNDED, SA_UNBOUNDED, SA_UNBOUNDED});
}

int sa_mask_none(sa_mask **out) {
  return new_corner(out, __func__, "none", (sa_corner){0, 0, 0});
}

int sa_mask_global(sa_mask **out, int64_t count) {
  if (count < 0) return sa_fail(SA_INVALID, __func__, "count: is %lld, wanted at least 0", (long long)count);
  return new_corner(out, __func__, "global", (sa_corner){sa_bounded(count), SA_UNBOUNDED, sa_bounded(count)});
}

static int check_counts(const char *function, const char *argument, const int64_t *counts, int64_t count) {
  for (int64_t b = 0; b < count; b++)
    if (counts[b] < 0)
      return sa_fail(SA_INVALID, function, "%s: that of batch %lld of %lld is %lld, wanted at least 0", argument,
                     (long long)b + 1, (long long)count, (long long)counts[b]);
  return SA_OK;
}

static int check_count(const char *function, const char *argument, const int64_t *counts, int64_t count) {
  if (count < 0) return sa_fail(SA_INVALID, function, "count: is %lld, wanted at least 0", (long long)count);
  if (!counts && count > 0)
    return sa_fail(SA_INVALID, function, "%s: is NULL, wanted %lld counts", argument, (long long)count);
  return check_counts(function, argument, counts, count);
}

int sa_mask_padding(sa_mask **out, const int64_t *key_lengths, const int64_t *query_lengths, int64_t count) {
  if (check_out(__func__, out) || check_count(__func__, "key_lengths", key_lengths, count)) return SA_INVALID;
  if (query_lengths && check_counts(__func__, "query_lengths", query_lengths, count)) return SA_INVALID;
  const int status = new_corners(out, __func__, "padding", count);
  if (status) return status;
  for (int64_t b = 0; b < count; b++)
    (*out)->corners[b] = (sa_corner){key_lengths[b], query_lengths ? query_lengths[b] : SA_UNBOUNDED, 0};
  return SA_OK;
}

int sa_mask_prefix(sa_mask **out, const int64_t *counts, int64_t count) {
  if (check_out(__func__, out) || check_count(__func__, "counts", counts, count)) return SA_INVALID;
  const int status = new_corners(out, __func__, "prefix", count);
  if (status) return status;
  for (int64_t b = 0; b < count; b++) (*out)->corners[b] = (sa_corner){sa_bounded(counts[b]), SA_UNBOUNDED, 0};
  (*out)->clipped = true;
  return SA_OK;
}

static int new_band(sa_mask **out, const char *function, const char *name, int64_t left, int64_t right, int align) {
  sa_mask *mask = new_mask(function, name, SA_MASK_BAND);
  if (!mask) return SA_NO_MEMORY;
  mask->band = (sa_band){sa_bounded(left), sa_bounded(right), align == SA_BOTTOM_RIGHT};
  *out = mask;
  return SA_OK;
}

int sa_mask_causal(sa_mask **out, int align) {
  if (check_out(__func__, out)) return SA_INVALID;
  if (align != SA_TOP_LEFT && align != SA_BOTTOM_RIGHT)
    return sa_fail(SA_INVALID, __func__, "align: is %d, wanted SA_TOP_LEFT (1) or SA_BOTTOM_RIGHT (2)", align);
  return new_band(out, __func__, "causal", -1, 0, align);
}

int sa_mask_window(sa_mask **out, int64_t left, int64_t right, int align) {
  if (check_out(__func__, out)) return SA_INVALID;
  if (align < SA_NO_CAUSAL || align > SA_BOTTOM_RIGHT)
    return sa_fail(SA_INVALID, __func__,
                   "align: is %d, wanted SA_NO_CAUSAL (0), SA_TOP_LEFT (1) or SA_BOTTOM_RIGHT (2)", align);
  return new_band(out, __func__, "window", left, right, align);
}

int sa_mask_random(sa_mask **out, double probability, uint64_t seed) {
  if (check_out(__func__, out)) return SA_INVALID;
  if (!(probability >= 0 && probability <= 1))
    return sa_fail(SA_INVALID, __func__, "probability: is %g, wanted 0 to 1", probability);
  sa_mask *mask = new_mask(__func__, "random", SA_MASK_RANDOM);
  if (!mask) return SA_NO_MEMORY;
  // n / 2^24 < probability is n < probability * 2^24, which no rounding touches.
  mask->chance = (sa_chance){(uint32_t)ceil(probability * (1 << 24)), seed};
  *out = mask;
  return SA_OK;
}

/*  What constructors read from tensors  */

static int check_tensor(const char *function, const char *argument, const sa_tensor *t, int most_dims) {
  const int status = sa_tensor_check(function, argument, t);
  if (status) return status;
  if (t->ndim > most_dims)
    return sa_fail(SA_INVALID, function, "%s: has %d dims, wanted at most %d", argument, (int)t->ndim, most_dims);
  return SA_OK;
}

/*  Grids of bits  */

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
  sa_mask *mask = new_mask(function, name, SA_MASK_GRID);
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
    return sa_fail(SA_INVALID, function, "%s: is %s, wanted bool%s", argument, sa_describe(t), advice);
  return SA_OK;
}

int sa_mask_dense(sa_mask **out, const sa_tensor *visible) {
  if (check_out(__func__, out) || check_tensor(__func__, "visible", visible, 4) ||
      check_bool(__func__, "visible", visible, " (a float mask is a bias, or sa_mask_additive)"))
    return SA_INVALID;
  return new_grid(out, __func__, "dense", visible, 1, read_bool, 0);
}

int sa_mask_blocks(sa_mask **out, const sa_tensor *keep, int64_t size) {
  if (check_out(__func__, out) || check_tensor(__func__, "keep", keep, 4) || check_bool(__func__, "keep", keep, ""))
    return SA_INVALID;
  if (size < 1) return sa_fail(SA_INVALID, __func__, "size: is %lld, wanted at least 1", (long long)size);
  return new_grid(out, __func__, "blocks", keep, size, read_bool, 0);
}

int sa_mask_additive(sa_mask **out, const sa_tensor *bias, double at_most) {
  if (check_out(__func__, out) || check_tensor(__func__, "bias", bias, 4)) return SA_INVALID;
  const flag_reader read = float_reader(bias->dtype);
  if (!read)
    return sa_fail(SA_INVALID, __func__, "bias: is %s, wanted f32, f64, f16 or bf16 (for a bool: sa_mask_dense)",
                   sa_describe(bias));
  if (isnan(at_most)) return sa_fail(SA_INVALID, __func__, "at_most: is nan, wanted a number");
  return new_grid(out, __func__, "additive", bias, 1, read, at_most);
}

int sa_mask_bits(sa_mask **out, int64_t batch, int64_t heads, int64_t queries, int64_t keys) {
  if (check_out(__func__, out)) return SA_INVALID;
  const int64_t shape[4] = {batch, heads, queries, keys};
  static const char *const names[4] = {"batch", "heads", "queries", "keys"};
  for (int k = 0; k < 4; k++)
    if (shape[k] < 0)
      return sa_fail(SA_INVALID, __func__, "%s: is %lld, wanted at least 0", names[k], (long long)shape[k]);
  sa_mask *mask = new_mask(__func__, "bits", SA_MASK_GRID);
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
  need_batch(mask, batch);
  *out = mask;
  return SA_OK;
}

int sa_mask_bits_row(sa_mask *mask, int64_t batch, int64_t head, int64_t query, const uint8_t *visible) {
  if (!mask) return sa_fail(SA_INVALID, __func__, "mask: is NULL, wanted one made by sa_mask_bits");
  if (strcmp(mask->name, "bits") != 0)
    return sa_fail(SA_INVALID, __func__, "mask: is %s, wanted one made by sa_mask_bits", mask->name);
  if (atomic_load(&mask->in_use))
    return sa_fail(SA_INVALID, __func__, "mask: is in use, wanted one that is not planned or combined yet");
  const int64_t index[3] = {batch, head, query};
  static const char *const names[3] = {"batch", "head", "query"};
  for (int k = 0; k < 3; k++)
    if (index[k] < 0 || index[k] >= mask->grid.shape[k])
      return sa_fail(SA_INVALID, __func__, "%s: is %lld, wanted 0 to below %lld", names[k], (long long)index[k],
                     (long long)mask->grid.shape[k]);
  const int64_t keys = mask->grid.shape[3];
  if (!visible && keys > 0)
    return sa_fail(SA_INVALID, __func__, "visible: is NULL, wanted %lld flags", (long long)keys);
  uint64_t *row = grid_row(&mask->grid, batch, head, query);
  uint8_t flags[64] = {0};
  for (int64_t key = 0; key < keys; key += 64) {
    if (keys - key < 64) memset(flags, 0, sizeof flags);
    read_bool(visible + key, 1, keys - key < 64 ? keys - key : 64, 0, flags);
    row[key / 64] = sa_pack_flags(flags);
  }
  return SA_OK;
}

/*  Documents  */

// Ids and their numbers: open addressing, never more than half full. number 0 marks a free place, so it is kept + 1.
typedef struct numbering {
  struct numbered {
    int64_t id;
    int64_t number;
  } * place;
  int64_t capacity, count;  // capacity is a power of two
} numbering;

static struct numbered *place_of(const numbering *known, int64_t id) {
  // The high half of the product is well mixed; the low bits of ids that are multiples of something are not.
  uint64_t place = ((uint64_t)id * 0x9e3779b97f4a7c15u) >> 32;
  for (;; place++) {
    struct numbered *found = &known->place[place & (uint64_t)(known->capacity - 1)];
    if (found->number == 0 || found->id == id) return found;
  }
}

static int make_room(numbering *known, const char *function) {
  if (2 * (known->count + 1) <= known->capacity) return SA_OK;
  numbering larger = {NULL, known->capacity ? 4 * known->capacity : 64, known->count};
  larger.place = sa_allocate_zeroed(function, larger.capacity * (int64_t)sizeof *larger.place);
  if (!larger.place) return SA_NO_MEMORY;
  for (int64_t k = 0; k < known->capacity; k++)
    if (known->place[k].number) *place_of(&larger, known->place[k].id) = known->place[k];
  sa_release(known->place);
  *known = larger;
  return SA_OK;
}

static int64_t id_at(const sa_tensor *t, int64_t batch, int64_t position) {
  const int64_t at = (t->ndim == 2 ? batch * t->stride[0] : 0) + position * t->stride[t->ndim - 1];
  return t->dtype == SA_I32 ? ((const int32_t *)t->data)[at] : ((const int64_t *)t->data)[at];
}

// Sets ids->number. New ids get numbers when `add`, else -1.
static int number_ids(sa_ids *ids, const sa_tensor *t, numbering *known, bool add, const char *function) {
  for (int64_t b = 0; b < ids->batch; b++) {
    int64_t last_id = -1;
    int32_t last_number = -1;
    for (int64_t i = 0; i < ids->count; i++) {
      const int64_t id = id_at(t, b, i);
      if (id != last_id && id >= 0) {
        if (make_room(known, function)) return SA_NO_MEMORY;
        struct numbered *place = place_of(known, id);
        if (place->number == 0 && add) *place = (struct numbered){id, ++known->count};
        last_id = id;
        last_number = (int32_t)(place->number - 1);
      }
      ids->number[b * ids->count + i] = id < 0 ? -1 : last_number;
    }
  }
  return SA_OK;
}

static const sa_id_range no_ids = {INT32_MAX, -1, INT32_MAX};

static sa_id_range both_ranges(sa_id_range a, sa_id_range b) {
  return (sa_id_range){a.low < b.low ? a.low : b.low, a.high > b.high ? a.high : b.high,
                       a.lowest < b.lowest ? a.lowest : b.lowest};
}

static void find_ranges(sa_ids *ids) {
  for (int64_t b = 0; b < ids->batch; b++) {
    const int32_t *number = ids->number + b * ids->count;
    sa_id_range *range = ids->ranges + b * 2 * ids->leaves;
    for (int64_t k = 0; k < 2 * ids->leaves; k++) range[k] = no_ids;
    for (int64_t i = 0; i < ids->count; i++) {
      const int32_t n = number[i];
      sa_id_range *tile = &range[ids->leaves + i / SA_TILE];
      *tile = both_ranges(*tile, (sa_id_range){n < 0 ? INT32_MAX : n, n, n});
    }
    for (int64_t k = ids->leaves - 1; k > 0; k--) range[k] = both_ranges(range[2 * k], range[2 * k + 1]);
  }
}

static int read_ids(sa_ids *ids, const sa_tensor *t, numbering *known, bool add, const char *function) {
  ids->batch = t->ndim == 2 ? t->shape[0] : 1;
  ids->count = t->shape[t->ndim - 1];
  ids->leaves = (int64_t)1 << sa_levels(sa_tiles(ids->count));
  ids->number = sa_allocate(function, ids->batch * ids->count * (int64_t)sizeof *ids->number);
  ids->ranges = sa_allocate(function, ids->batch * 2 * ids->leaves * (int64_t)sizeof *ids->ranges);
  if (!ids->number || !ids->ranges || number_ids(ids, t, known, add, function)) return SA_NO_MEMORY;
  find_ranges(ids);
  return SA_OK;
}

static int check_ids(const char *function, const char *argument, const sa_tensor *t) {
  if (check_tensor(function, argument, t, 2)) return SA_INVALID;
  if (t->ndim < 1) return sa_fail(SA_INVALID, function, "%s: has 0 dims, wanted 1 or 2", argument);
  if (t->dtype != SA_I32 && t->dtype != SA_I64)
    return sa_fail(SA_INVALID, function, "%s: is %s, wanted i32 or i64", argument, sa_describe(t));
  if (sa_tensor_numel(t) > INT32_MAX)
    return sa_fail(SA_INVALID, function, "%s: is %s, wanted below 2^31 ids", argument, sa_describe(t));
  return SA_OK;
}

// From ids on the CPU; query_ids NULL: they are the keys'.
static int new_documents(sa_mask **out, const char *function, const sa_tensor *query_ids, const sa_tensor *key_ids) {
  const int64_t key_batch = key_ids->ndim == 2 ? key_ids->shape[0] : 1;
  const int64_t query_batch = query_ids && query_ids->ndim == 2 ? query_ids->shape[0] : 1;
  if (query_batch != 1 && key_batch != 1 && query_batch != key_batch)
    return sa_fail(SA_INVALID, function, "query_ids: has %lld batches, wanted 1 or %lld, as key_ids",
                   (long long)query_batch, (long long)key_batch);
  sa_mask *mask = new_mask(function, "documents", SA_MASK_DOCUMENTS);
  if (!mask) return SA_NO_MEMORY;
  need_batch(mask, key_batch != 1 ? key_batch : query_batch);
  mask->shared = !query_ids;
  numbering known = {NULL, 0, 0};
  int status = read_ids(&mask->key_ids, key_ids, &known, true, function);
  if (!status && query_ids) status = read_ids(&mask->query_ids, query_ids, &known, false, function);
  if (mask->shared) mask->query_ids = mask->key_ids;
  sa_release(known.place);
  if (status) {
    sa_mask_release(mask);
    return status;
  }
  *out = mask;
  return SA_OK;
}

int sa_mask_documents(sa_mask **out, const sa_tensor *query_ids, const sa_tensor *key_ids) {
  if (check_out(__func__, out) || check_ids(__func__, "key_ids", key_ids)) return SA_INVALID;
  if (query_ids && check_ids(__func__, "query_ids", query_ids)) return SA_INVALID;
  sa_tensor keys = {0}, queries = {0};
  int status = sa_tensor_on_host(&keys, key_ids);
  if (!status && query_ids) status = sa_tensor_on_host(&queries, query_ids);
  if (!status) status = new_documents(out, __func__, query_ids ? &queries : NULL, &keys);
  sa_tensor_release(&keys);
  sa_tensor_release(&queries);
  return status;
}

/*  The algebra  */

static int check_operand(const char *function, const char *argument, const sa_mask *mask) {
  if (!mask) return sa_fail(SA_INVALID, function, "%s: is NULL, wanted a mask", argument);
  return SA_OK;
}

static int check_agree(const char *function, const char *dim, int64_t a, int64_t b) {
  if (a != 1 && b != 1 && a != b)
    return sa_fail(SA_INVALID, function, "b: is for %lld %s, wanted 1 or %lld, as a", (long long)b, dim, (long long)a);
  return SA_OK;
}

// b is NULL for an operator of one operand.
static int new_combination(sa_mask **out, const char *function, const char *name, sa_mask_kind kind, const sa_mask *a,
                           const sa_mask *b) {
  sa_mask *mask = new_mask(function, name, kind);
  if (!mask) return SA_NO_MEMORY;
  const sa_mask *operands[2] = {a, b};
  for (int k = 0; k < 2 && operands[k]; k++) {
    const sa_mask *operand = operands[k];
    sa_mask_retain(operand);
    atomic_store(&((sa_mask *)operand)->in_use, true);
    mask->operands[k] = operand;
    if (operand->batch != 1) mask->batch = operand->batch;
    if (operand->heads != 1) mask->heads = operand->heads;
    mask->per_batch |= operand->per_batch;
    mask->per_head |= operand->per_head;
  }
  *out = mask;
  return SA_OK;
}

static int combine(sa_mask **out, const char *function, const char *name, sa_mask_kind kind, const sa_mask *a,
                   const sa_mask *b) {
  if (check_out(function, out) || check_operand(function, "a", a) || check_operand(function, "b", b) ||
      check_agree(function, "batches", a->batch, b->batch) || check_agree(function, "heads", a->heads, b->heads))
    return SA_INVALID;
  return new_combination(out, function, name, kind, a, b);
}

int sa_mask_and(sa_mask **out, const sa_mask *a, const sa_mask *b) {
  return combine(out, __func__, "and", SA_MASK_AND, a, b);
}

int sa_mask_or(sa_mask **out, const sa_mask *a, const sa_mask *b) {
  return combine(out, __func__, "or", SA_MASK_OR, a, b);
}

int sa_mask_not(sa_mask **out, const sa_mask *a) {
  if (check_out(__func__, out) || check_operand(__func__, "a", a)) return SA_INVALID;
  return new_combination(out, __func__, "not", SA_MASK_NOT, a, NULL);
}
