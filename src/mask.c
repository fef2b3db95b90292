// mask expressions: their nodes, those of a few numbers (causal, window, padding, ...), and the algebra
#include "mask.h"

#include <math.h>
#include <stdatomic.h>

#include "mask_new.h"
#include "memory.h"
#include "status.h"
#include "tensor.h"

/*  Nodes  */

int sa_mask_check_out(const char *function, sa_mask **out) {
  if (!out) return sa_fail(SA_INVALID, function, "out: got NULL, wanted a place for the mask");
  return SA_OK;
}

int sa_mask_check_tensor(const char *function, const char *argument, const sa_tensor *t, int most_dims) {
  const int status = sa_tensor_check(function, argument, t);
  if (status) return status;
  if (t->ndim > most_dims)
    return sa_fail(SA_INVALID, function, "%s: has %d dims, wanted at most %d", argument, (int)t->ndim, most_dims);
  return SA_OK;
}

sa_mask *sa_mask_new(const char *function, const char *name, sa_mask_kind kind) {
  sa_mask *mask = sa_allocate_zeroed(function, sizeof *mask);
  if (!mask) return NULL;
  atomic_init(&mask->holders, 1);
  mask->kind = kind;
  mask->name = name;
  mask->batch = mask->heads = 1;
  return mask;
}

void sa_mask_need_batch(sa_mask *mask, int64_t batch) {
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
  sa_mask *mask = sa_mask_new(function, name, SA_MASK_CORNER);
  if (!mask) return SA_NO_MEMORY;
  int64_t bytes;
  if (__builtin_mul_overflow(count, (int64_t)sizeof *mask->corners, &bytes)) bytes = INT64_MAX;
  mask->corners = sa_allocate(function, bytes);
  if (!mask->corners) {
    sa_mask_release(mask);
    return SA_NO_MEMORY;
  }
  sa_mask_need_batch(mask, count);
  *out = mask;
  return SA_OK;
}

// One corner that any sequence clips.
static int new_corner(sa_mask **out, const char *function, const char *name, sa_corner corner) {
  if (sa_mask_check_out(function, out)) return SA_INVALID;
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
  if (count < 0) return sa_fail(SA_INVALID, __func__, "count: got %lld, wanted at least 0", (long long)count);
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
  if (count < 0) return sa_fail(SA_INVALID, function, "count: got %lld, wanted at least 0", (long long)count);
  if (!counts && count > 0)
    return sa_fail(SA_INVALID, function, "%s: got NULL, wanted %lld counts", argument, (long long)count);
  return check_counts(function, argument, counts, count);
}

int sa_mask_padding(sa_mask **out, const int64_t *key_lengths, const int64_t *query_lengths, int64_t count) {
  if (sa_mask_check_out(__func__, out) || check_count(__func__, "key_lengths", key_lengths, count)) return SA_INVALID;
  if (query_lengths && check_counts(__func__, "query_lengths", query_lengths, count)) return SA_INVALID;
  const int status = new_corners(out, __func__, "padding", count);
  if (status) return status;
  for (int64_t b = 0; b < count; b++)
    (*out)->corners[b] = (sa_corner){key_lengths[b], query_lengths ? query_lengths[b] : SA_UNBOUNDED, 0};
  return SA_OK;
}

int sa_mask_prefix(sa_mask **out, const int64_t *counts, int64_t count) {
  if (sa_mask_check_out(__func__, out) || check_count(__func__, "counts", counts, count)) return SA_INVALID;
  const int status = new_corners(out, __func__, "prefix", count);
  if (status) return status;
  for (int64_t b = 0; b < count; b++) (*out)->corners[b] = (sa_corner){sa_bounded(counts[b]), SA_UNBOUNDED, 0};
  (*out)->clipped = true;
  return SA_OK;
}

static int new_band(sa_mask **out, const char *function, const char *name, int64_t left, int64_t right, int align) {
  sa_mask *mask = sa_mask_new(function, name, SA_MASK_BAND);
  if (!mask) return SA_NO_MEMORY;
  mask->band = (sa_band){sa_bounded(left), sa_bounded(right), align == SA_BOTTOM_RIGHT};
  *out = mask;
  return SA_OK;
}

int sa_mask_causal(sa_mask **out, int align) {
  if (sa_mask_check_out(__func__, out)) return SA_INVALID;
  if (align != SA_TOP_LEFT && align != SA_BOTTOM_RIGHT)
    return sa_fail(SA_INVALID, __func__, "align: got %d, wanted SA_TOP_LEFT (1) or SA_BOTTOM_RIGHT (2)", align);
  return new_band(out, __func__, "causal", -1, 0, align);
}

int sa_mask_window(sa_mask **out, int64_t left, int64_t right, int align) {
  if (sa_mask_check_out(__func__, out)) return SA_INVALID;
  if (align < SA_NO_CAUSAL || align > SA_BOTTOM_RIGHT)
    return sa_fail(SA_INVALID, __func__,
                   "align: got %d, wanted SA_NO_CAUSAL (0), SA_TOP_LEFT (1) or SA_BOTTOM_RIGHT (2)", align);
  return new_band(out, __func__, "window", left, right, align);
}

int sa_mask_random(sa_mask **out, double probability, uint64_t seed) {
  if (sa_mask_check_out(__func__, out)) return SA_INVALID;
  if (!(probability >= 0 && probability <= 1))
    return sa_fail(SA_INVALID, __func__, "probability: got %g, wanted 0 to 1", probability);
  sa_mask *mask = sa_mask_new(__func__, "random", SA_MASK_RANDOM);
  if (!mask) return SA_NO_MEMORY;
  // n / 2^24 < probability is n < probability * 2^24, which no rounding touches.
  mask->chance = (sa_chance){(uint32_t)ceil(probability * (1 << 24)), seed};
  *out = mask;
  return SA_OK;
}

/*  The algebra  */

static int check_operand(const char *function, const char *argument, const sa_mask *mask) {
  if (!mask) return sa_fail(SA_INVALID, function, "%s: got NULL, wanted a mask", argument);
  return SA_OK;
}

static int check_agree(const char *function, const char *dim, int64_t a, int64_t b) {
  if (a != 1 && b != 1 && a != b)
    return sa_fail(SA_INVALID, function, "b: got one for %lld %s, wanted 1 or %lld, as a", (long long)b, dim,
                   (long long)a);
  return SA_OK;
}

// b is NULL for an operator of one operand.
static int new_combination(sa_mask **out, const char *function, const char *name, sa_mask_kind kind, const sa_mask *a,
                           const sa_mask *b) {
  sa_mask *mask = sa_mask_new(function, name, kind);
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
  if (sa_mask_check_out(function, out) || check_operand(function, "a", a) || check_operand(function, "b", b) ||
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
  if (sa_mask_check_out(__func__, out) || check_operand(__func__, "a", a)) return SA_INVALID;
  return new_combination(out, __func__, "not", SA_MASK_NOT, a, NULL);
}
