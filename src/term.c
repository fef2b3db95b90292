// an expression as a list of terms: building it, and whether it fits the sizes
#include "term.h"

#include <string.h>

#include "memory.h"
#include "numbering.h"
#include "status.h"

int sa_make_room(const char *function, void *array, int64_t count, int64_t *room, int64_t size) {
  if (count < *room) return SA_OK;
  const int64_t larger = *room ? 2 * *room : 8;
  void *old, *grown = sa_allocate(function, larger * size);
  if (!grown) return SA_NO_MEMORY;
  memcpy(&old, array, sizeof old);
  if (count) memcpy(grown, old, (size_t)(count * size));
  sa_release(old);
  memcpy(array, &grown, sizeof grown);
  *room = larger;
  return SA_OK;
}

/*  The list  */

static int add_term(sa_terms *all, sa_term added) {
  const int status = sa_make_room(all->function, &all->term, all->count, &all->room, sizeof added);
  if (!status) all->term[all->count++] = added;
  return status;
}

static int add_operator(sa_terms *all, sa_mask_kind kind, int64_t a, int64_t b) {
  return add_term(all, (sa_term){.kind = kind, .operands = {(int32_t)a, (int32_t)b}});
}

static int add_band(sa_terms *all, const sa_mask *mask, sa_band band) {
  const int64_t diagonal = band.bottom_right ? all->keys - all->queries : 0;
  return add_term(
      all,
      (sa_term){.kind = SA_MASK_BAND, .mask = mask, .behind = band.right + diagonal, .ahead = band.left - diagonal});
}

static int add_mask(sa_terms *all, const sa_mask *mask, const int64_t *operands) {
  if (sa_operands(mask->kind)) return add_operator(all, mask->kind, operands[0], operands[1]);
  if (mask->kind == SA_MASK_BAND) return add_band(all, mask, mask->band);
  return add_term(all, (sa_term){.kind = mask->kind, .mask = mask});
}

// A mask that is used in many places is one term, found by the mask's address.
static int64_t known_term(const sa_numbering *found, const sa_mask *mask) {
  return sa_number_of(found, (int64_t)(intptr_t)mask);
}

// Adds the terms of `root`, which comes last. A list of masks to do instead of recursion: an expression may be deeper
// than the stack. The list holds a mask's operands above it; it is looked at again when they are done.
static int add_expression(sa_terms *all, const sa_mask *root) {
  sa_numbering found = {NULL, 0, 0};
  const sa_mask **open = NULL;
  int64_t open_count = 0, open_room = 0;
  int status = sa_make_room(all->function, &open, open_count, &open_room, sizeof *open);
  if (!status) open[open_count++] = root;
  while (!status && open_count > 0) {
    const sa_mask *mask = open[open_count - 1];
    int64_t operands[2] = {0, 0};
    bool ready = true;
    for (int k = 0; k < sa_operands(mask->kind) && !status; k++) {
      operands[k] = known_term(&found, mask->operands[k]);
      if (operands[k] >= 0) continue;
      ready = false;
      status = sa_make_room(all->function, &open, open_count, &open_room, sizeof *open);
      if (!status) open[open_count++] = mask->operands[k];
    }
    if (!ready || status) continue;
    open_count--;
    if (known_term(&found, mask) >= 0) continue;
    status = add_mask(all, mask, operands);
    if (!status) status = sa_number(&found, all->function, (int64_t)(intptr_t)mask, all->count - 1);
  }
  sa_numbering_release(&found);
  sa_release(open);
  return status;
}

/*  Whether the masks fit the sizes  */

static int check_batch(const char *function, const sa_mask *mask, const char *what, int64_t batch) {
  if (mask->batch == 1 || mask->batch == batch) return SA_OK;
  return sa_fail(SA_INVALID, function, "mask: %s has %lld %s, wanted 1 or as many as batches: %lld", mask->name,
                 (long long)mask->batch, what, (long long)batch);
}

static int check_corners(const sa_terms *all, const sa_mask *mask) {
  for (int64_t b = 0; b < mask->batch && !mask->clipped; b++) {
    const sa_corner corner = mask->corners[b];
    const bool keys = corner.keys > all->keys;
    if (!keys && (corner.inside == SA_UNBOUNDED || corner.inside <= all->queries)) continue;
    return sa_fail(SA_INVALID, all->function, "mask: %s: batch %lld of %lld has %lld %s, wanted at most %lld",
                   mask->name, (long long)b + 1, (long long)mask->batch,
                   (long long)(keys ? corner.keys : corner.inside), keys ? "keys" : "queries",
                   (long long)(keys ? all->keys : all->queries));
  }
  return SA_OK;
}

static int check_documents(const sa_terms *all, const sa_mask *mask) {
  if (mask->key_ids.count != all->keys)
    return sa_fail(SA_INVALID, all->function, "mask: documents has ids of %lld keys, wanted %lld",
                   (long long)mask->key_ids.count, (long long)all->keys);
  if (mask->query_ids.count != all->queries)
    return sa_fail(SA_INVALID, all->function, "mask: documents has ids of %lld queries%s, wanted %lld",
                   (long long)mask->query_ids.count, mask->shared ? " (the same as of keys)" : "",
                   (long long)all->queries);
  return SA_OK;
}

static int check_grid(const sa_terms *all, const sa_mask *mask, int64_t batch, int64_t heads) {
  const sa_grid *grid = &mask->grid;
  const int64_t size = grid->size;
  const int64_t wanted[4] = {batch, heads, all->queries / size + (all->queries % size != 0),
                             all->keys / size + (all->keys % size != 0)};
  for (int k = 0; k < 4; k++)
    if (grid->shape[k] != 1 && grid->shape[k] != wanted[k])
      return sa_fail(SA_INVALID, all->function, "mask: %s has shape %s, wanted %s, or 1 for any of its dims",
                     mask->name, sa_describe_shape(4, grid->shape), sa_describe_shape(4, wanted));
  return SA_OK;
}

static int check_terms(const sa_terms *all, int64_t batch, int64_t heads) {
  int status = SA_OK;
  for (int64_t k = 0; k < all->count && !status; k++) {
    const sa_mask *mask = all->term[k].mask;
    if (!mask) continue;
    if (mask->kind == SA_MASK_GRID) {
      status = check_grid(all, mask, batch, heads);
    } else if (mask->kind == SA_MASK_DOCUMENTS) {
      status = check_batch(all->function, mask, "rows of ids", batch);
      if (!status) status = check_documents(all, mask);
    } else if (mask->kind == SA_MASK_CORNER) {
      status = check_batch(all->function, mask, "lengths", batch);
      if (!status) status = check_corners(all, mask);
    }
  }
  return status;
}

static int add_terms(sa_terms *all, const sa_mask *mask, int causal, int64_t window_left, int64_t window_right) {
  // Pairs beyond the end of the sequence are masked.
  int status = add_term(all, (sa_term){.kind = SA_MASK_CORNER, .corner = {all->keys, all->queries, 0}});
  if (!status && mask) {
    status = add_expression(all, mask);
    if (!status) status = add_operator(all, SA_MASK_AND, 0, all->count - 1);
  }
  // Causality is a window whose right side is 0.
  const bool bottom_right = causal == SA_BOTTOM_RIGHT;
  sa_band band = {window_left, window_right, bottom_right};
  if (causal != SA_NO_CAUSAL) band.right = 0;
  if (!status && (band.left < SA_UNBOUNDED || band.right < SA_UNBOUNDED)) {
    status = add_band(all, NULL, band);
    if (!status) status = add_operator(all, SA_MASK_AND, all->count - 2, all->count - 1);
  }
  return status;
}

int sa_terms_build(sa_terms *all, const sa_mask *mask, int causal, int64_t window_left, int64_t window_right,
                   int64_t batch, int64_t heads) {
  int status = add_terms(all, mask, causal, window_left, window_right);
  if (!status) status = check_terms(all, batch, heads);
  if (status) return status;
  all->drawings = sa_allocate(all->function, all->count * (int64_t)sizeof *all->drawings);
  return all->drawings ? SA_OK : SA_NO_MEMORY;
}

void sa_terms_release(sa_terms *all) {
  sa_release(all->term);
  sa_release(all->drawings);
}

void sa_terms_enter(sa_terms *all, int64_t batch, int64_t head) {
  for (int64_t k = 0; k < all->count; k++) {
    sa_term *t = &all->term[k];
    const sa_mask *mask = t->mask;
    if (!mask) continue;
    if (mask->kind == SA_MASK_CORNER) {
      t->corner = mask->corners[mask->per_batch ? batch : 0];
    } else if (mask->kind == SA_MASK_DOCUMENTS) {
      const int64_t query_batch = mask->query_ids.batch == 1 ? 0 : batch;
      const int64_t key_batch = mask->key_ids.batch == 1 ? 0 : batch;
      t->queries = mask->query_ids.ranges + query_batch * 2 * mask->query_ids.leaves;
      t->keys = mask->key_ids.ranges + key_batch * 2 * mask->key_ids.leaves;
      t->query_number = mask->query_ids.number + query_batch * mask->query_ids.count;
      t->key_number = mask->key_ids.number + key_batch * mask->key_ids.count;
    } else if (mask->kind == SA_MASK_GRID) {
      const sa_grid *grid = &mask->grid;
      const int64_t plane = (mask->per_batch ? batch : 0) * grid->kept[1] + (mask->per_head ? head : 0);
      t->bits = grid->bits + plane * grid->kept[2] * grid->words;
    }
  }
}
