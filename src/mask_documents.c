// masks of documents: ids, renumbered, and their ranges in tiles
#include "mask_new.h"
#include "memory.h"
#include "numbering.h"
#include "status.h"
#include "tensor.h"

static int64_t id_at(const sa_tensor *t, int64_t batch, int64_t position) {
  const int64_t at = (t->ndim == 2 ? batch * t->stride[0] : 0) + position * t->stride[t->ndim - 1];
  return t->dtype == SA_I32 ? ((const int32_t *)t->data)[at] : ((const int64_t *)t->data)[at];
}

// Sets ids->number. New ids get numbers when `add`, else -1.
static int number_ids(sa_ids *ids, const sa_tensor *t, sa_numbering *known, bool add, const char *function) {
  for (int64_t b = 0; b < ids->batch; b++) {
    int64_t last_id = -1, last_number = -1;
    for (int64_t i = 0; i < ids->count; i++) {
      const int64_t id = id_at(t, b, i);
      if (id != last_id && id >= 0) {
        last_id = id;
        last_number = sa_number_of(known, id);
        if (last_number < 0 && add) {
          last_number = known->count;
          if (sa_number(known, function, id, last_number)) return SA_NO_MEMORY;
        }
      }
      ids->number[b * ids->count + i] = id < 0 ? -1 : (int32_t)last_number;
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

static int read_ids(sa_ids *ids, const sa_tensor *t, sa_numbering *known, bool add, const char *function) {
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
  if (sa_mask_check_tensor(function, argument, t, 2)) return SA_INVALID;
  if (t->ndim < 1) return sa_fail(SA_INVALID, function, "%s: has 0 dims, wanted 1 or 2", argument);
  if (t->dtype != SA_I32 && t->dtype != SA_I64)
    return sa_fail(SA_INVALID, function, "%s: got %s, wanted i32 or i64", argument, sa_describe(t));
  if (sa_tensor_numel(t) > INT32_MAX)
    return sa_fail(SA_INVALID, function, "%s: got %s, wanted below 2^31 ids", argument, sa_describe(t));
  return SA_OK;
}

// From ids on the CPU; query_ids NULL: they are the keys'.
static int new_documents(sa_mask **out, const char *function, const sa_tensor *query_ids, const sa_tensor *key_ids) {
  const int64_t key_batch = key_ids->ndim == 2 ? key_ids->shape[0] : 1;
  const int64_t query_batch = query_ids && query_ids->ndim == 2 ? query_ids->shape[0] : 1;
  if (query_batch != 1 && key_batch != 1 && query_batch != key_batch)
    return sa_fail(SA_INVALID, function, "query_ids: has %lld batches, wanted 1 or %lld, as key_ids",
                   (long long)query_batch, (long long)key_batch);
  sa_mask *mask = sa_mask_new(function, "documents", SA_MASK_DOCUMENTS);
  if (!mask) return SA_NO_MEMORY;
  sa_mask_need_batch(mask, key_batch != 1 ? key_batch : query_batch);
  mask->shared = !query_ids;
  sa_numbering known = {NULL, 0, 0};
  int status = read_ids(&mask->key_ids, key_ids, &known, true, function);
  if (!status && query_ids) status = read_ids(&mask->query_ids, query_ids, &known, false, function);
  if (mask->shared) mask->query_ids = mask->key_ids;
  sa_numbering_release(&known);
  if (status) {
    sa_mask_release(mask);
    return status;
  }
  *out = mask;
  return SA_OK;
}

int sa_mask_documents(sa_mask **out, const sa_tensor *query_ids, const sa_tensor *key_ids) {
  if (sa_mask_check_out(__func__, out) || check_ids(__func__, "key_ids", key_ids)) return SA_INVALID;
  if (query_ids && check_ids(__func__, "query_ids", query_ids)) return SA_INVALID;
  sa_tensor keys = {0}, queries = {0};
  int status = sa_tensor_on_host(&keys, key_ids);
  if (!status && query_ids) status = sa_tensor_on_host(&queries, query_ids);
  if (!status) status = new_documents(out, __func__, query_ids ? &queries : NULL, &keys);
  sa_tensor_release(&keys);
  sa_tensor_release(&queries);
  return status;
}
