// an expression as a list of terms: building it, classifying rectangles of pairs, drawing tiles
#include "term.h"

#include <string.h>

#include "memory.h"
#include "numbering.h"
#include "random.h"
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

static int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
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

/*  What a term says of a rectangle  */

// Queries [first, last) see a key; none do when first >= last.
typedef struct span {
  int64_t first, last;
} span;

static span span_of(const sa_term *t, int64_t key) {
  if (t->kind == SA_MASK_BAND) return (span){key - t->behind, key + t->ahead + 1};
  return (span){0, key < t->corner.keys ? t->corner.inside : t->corner.outside};
}

// Both ends of a span move in one direction from key to key, so the first and the last key bound all between.
static sa_verdict span_verdict(const sa_term *t, const sa_rectangle *r) {
  const span a = span_of(t, r->first_key), b = span_of(t, r->last_key - 1);
  if (most(a.last, b.last) <= r->first_query || sa_least(a.first, b.first) >= r->last_query) return EMPTY;
  const int64_t a_first = most(a.first, r->first_query), a_last = sa_least(a.last, r->last_query);
  const int64_t b_first = most(b.first, r->first_query), b_last = sa_least(b.last, r->last_query);
  if (most(a_first, b_first) <= r->first_query && sa_least(a_last, b_last) >= r->last_query) return FULL;
  return a_first == b_first && a_last == b_last ? ALIKE : MIXED;
}

static sa_verdict document_verdict(const sa_term *t, const sa_rectangle *r) {
  const sa_id_range queries = t->queries[t->mask->query_ids.leaves + r->row];
  const sa_id_range keys = t->keys[(t->mask->key_ids.leaves >> r->level) + r->index];
  if (queries.low > keys.high || keys.low > queries.high) return EMPTY;
  if (keys.lowest != keys.high) return MIXED;
  return queries.lowest == queries.high && queries.high == keys.high ? FULL : ALIKE;
}

// The rows or columns of a grid that positions [first, last) lie in.
static span grid_range(int64_t count, int64_t size, int64_t first, int64_t last) {
  if (count == 1) return (span){0, 1};
  if (size == 1) return (span){first, sa_least(last, count)};
  return (span){first / size, sa_least((last + size - 1) / size, count)};
}

static sa_verdict grid_verdict(const sa_term *t, const sa_rectangle *r) {
  const sa_grid *grid = &t->mask->grid;
  const span rows = grid_range(grid->kept[2], grid->size, r->first_query, r->last_query);
  const span columns = grid_range(grid->kept[3], grid->size, r->first_key, r->last_key);
  bool some = false, every = true;
  for (int64_t row = rows.first; row < rows.last; row++)
    for (int64_t word = columns.first / 64; word * 64 < columns.last; word++) {
      const uint64_t asked = sa_word_range(most(columns.first - word * 64, 0), sa_least(columns.last - word * 64, 64));
      const uint64_t bits = t->bits[row * grid->words + word] & asked;
      some |= bits != 0;
      every &= bits == asked;
      if (some && !every) return grid->kept[3] == 1 ? ALIKE : MIXED;
    }
  return some ? FULL : EMPTY;
}

static sa_verdict random_verdict(const sa_term *t) {
  const uint32_t threshold = t->mask->chance.threshold;
  return threshold == 0 ? EMPTY : threshold == 1 << 24 ? FULL : MIXED;
}

static sa_verdict and_verdict(sa_verdict a, sa_verdict b) {
  if (a == EMPTY || b == EMPTY) return EMPTY;
  return a > b ? a : b;
}

static sa_verdict or_verdict(sa_verdict a, sa_verdict b) {
  if (a == FULL || b == FULL) return FULL;
  return a > b ? a : b;
}

static sa_verdict not_verdict(sa_verdict a) {
  return a == EMPTY ? FULL : a == FULL ? EMPTY : a;
}

static sa_verdict term_verdict(const sa_terms *all, const sa_term *t, const sa_rectangle *r) {
  switch (t->kind) {
    case SA_MASK_BAND:
    case SA_MASK_CORNER:
      return span_verdict(t, r);
    case SA_MASK_DOCUMENTS:
      return document_verdict(t, r);
    case SA_MASK_GRID:
      return grid_verdict(t, r);
    case SA_MASK_RANDOM:
      return random_verdict(t);
    case SA_MASK_AND:
      return and_verdict(all->term[t->operands[0]].verdict, all->term[t->operands[1]].verdict);
    case SA_MASK_OR:
      return or_verdict(all->term[t->operands[0]].verdict, all->term[t->operands[1]].verdict);
    case SA_MASK_NOT:
      return not_verdict(all->term[t->operands[0]].verdict);
  }
  return MIXED;
}

sa_verdict sa_terms_classify(sa_terms *all, const sa_rectangle *r) {
  for (int64_t k = 0; k < all->count; k++) all->term[k].verdict = term_verdict(all, &all->term[k], r);
  return all->term[all->count - 1].verdict;
}

/*  The bits of a tile: of the rectangle's first column of tiles  */

// Queries [first, last) of a tile that starts at `origin`, as bits.
static void mark_queries(uint64_t words[SA_TILE / 64], int64_t first, int64_t last, int64_t origin) {
  for (int64_t w = 0; w < SA_TILE / 64; w++) {
    const int64_t start = most(first - origin - 64 * w, 0), end = sa_least(last - origin - 64 * w, 64);
    words[w] = start < end ? sa_word_range(start, end) : 0;
  }
}

static void draw_spans(const sa_term *t, const sa_rectangle *r, sa_pattern *to) {
  for (int64_t key = 0; key < SA_TILE; key++) {
    const span seen = span_of(t, r->first_key + key);
    mark_queries(to->word[key], seen.first, seen.last, r->first_query);
  }
}

// The queries of one id. Flags first: the comparisons then go many at a time.
static void mark_id(uint64_t words[SA_TILE / 64], const int32_t *ids, int32_t id) {
  uint8_t flags[SA_TILE];
  for (int i = 0; i < SA_TILE; i++) flags[i] = ids[i] == id;
  for (int w = 0; w < SA_TILE / 64; w++) words[w] = sa_pack_flags(flags + 64 * w);
}

static void draw_documents(const sa_terms *all, const sa_term *t, const sa_rectangle *r, sa_pattern *to) {
  int32_t queries[SA_TILE];
  for (int64_t i = 0; i < SA_TILE; i++)
    queries[i] = r->first_query + i < all->queries ? t->query_number[r->first_query + i] : -1;
  int32_t last_id = -1;
  uint64_t words[SA_TILE / 64] = {0};
  for (int64_t key = 0; key < SA_TILE; key++) {
    const int32_t id = r->first_key + key < all->keys ? t->key_number[r->first_key + key] : -1;
    if (id != last_id && id < 0) memset(words, 0, sizeof words);
    if (id != last_id && id >= 0) mark_id(words, queries, id);
    last_id = id;
    memcpy(to->word[key], words, sizeof words);
  }
}

// What a tile is before it is turned key-major: a row of bits for each query.
typedef uint64_t query_rows[SA_TILE][SA_TILE / 64];

static void turn_key_major(query_rows from, sa_pattern *to) {
  for (int query_word = 0; query_word < SA_TILE / 64; query_word++)
    for (int key_word = 0; key_word < SA_TILE / 64; key_word++) {
      uint64_t square[64];
      for (int i = 0; i < 64; i++) square[i] = from[64 * query_word + i][key_word];
      sa_transpose64(square);
      for (int i = 0; i < 64; i++) to->word[64 * key_word + i][query_word] = square[i];
    }
}

// Bits of the tile's keys in one row of a grid of blocks.
static void spread_blocks(uint64_t row[SA_TILE / 64], const sa_grid *grid, const uint64_t *bits,
                          const sa_rectangle *r) {
  memset(row, 0, SA_TILE / 8);
  const span columns = grid_range(grid->kept[3], grid->size, r->first_key, r->first_key + SA_TILE);
  for (int64_t column = columns.first; column < columns.last; column++) {
    if (!(bits[column / 64] >> (column % 64) & 1)) continue;
    uint64_t keys[SA_TILE / 64];
    mark_queries(keys, column * grid->size, (column + 1) * grid->size, r->first_key);
    for (int w = 0; w < SA_TILE / 64; w++) row[w] |= keys[w];
  }
}

static void read_grid_row(uint64_t row[SA_TILE / 64], const sa_grid *grid, const uint64_t *bits,
                          const sa_rectangle *r) {
  if (grid->kept[3] == 1)
    memset(row, bits[0] & 1 ? 0xff : 0, SA_TILE / 8);
  else if (grid->size == 1)
    memcpy(row, bits + r->first_key / 64, SA_TILE / 8);
  else
    spread_blocks(row, grid, bits, r);
}

static void draw_grid(const sa_terms *all, const sa_term *t, const sa_rectangle *r, sa_pattern *to) {
  const sa_grid *grid = &t->mask->grid;
  query_rows rows;
  int64_t last = -1;
  for (int64_t i = 0; i < SA_TILE; i++) {
    const int64_t query = sa_least(r->first_query + i, all->queries - 1);
    const int64_t row = grid->kept[2] == 1 ? 0 : grid->size == 1 ? query : query / grid->size;
    if (row == last)
      memcpy(rows[i], rows[i - 1], sizeof rows[i]);
    else
      read_grid_row(rows[i], grid, t->bits + row * grid->words, r);
    last = row;
  }
  turn_key_major(rows, to);
}

// Visible pairs of one query: words `first` up to `first` + 127 of the seed's stream, which come four at a time.
static void draw_chances(uint64_t row[SA_TILE / 64], sa_chance chance, uint64_t first) {
  enum { BLOCKS = SA_TILE / 4 + 1 };
  uint32_t words[4][BLOCKS];
  uint8_t flags[4 * BLOCKS];
  sa_random_blocks(chance.seed, first / 4, 1, BLOCKS, words[0], words[1], words[2], words[3]);
  for (int k = 0; k < 4 * BLOCKS; k++) flags[k] = words[k % 4][k / 4] >> 8 < chance.threshold;
  for (int w = 0; w < SA_TILE / 64; w++) row[w] = sa_pack_flags(flags + first % 4 + 64 * w);
}

static void draw_random(const sa_terms *all, const sa_term *t, const sa_rectangle *r, sa_pattern *to) {
  query_rows rows;
  for (int64_t i = 0; i < SA_TILE; i++)
    draw_chances(rows[i], t->mask->chance,
                 (uint64_t)(r->first_query + i) * (uint64_t)all->keys + (uint64_t)r->first_key);
  turn_key_major(rows, to);
}

#define FOR_EACH_WORD(TO, VALUE)          \
  for (int key = 0; key < SA_TILE; key++) \
    for (int word = 0; word < SA_TILE / 64; word++) (TO)->word[key][word] = (VALUE)

static const sa_pattern *draw_operator(const sa_terms *all, const sa_term *t, sa_pattern *to) {
  const sa_term *a = &all->term[t->operands[0]], *b = &all->term[t->operands[1]];
  if (t->kind == SA_MASK_NOT) {
    FOR_EACH_WORD(to, ~a->drawn->word[key][word]);
    return to;
  }
  // One that is EMPTY (in an OR) or FULL (in an AND) was not drawn, and the other is the result.
  if (a->verdict < ALIKE) return b->drawn;
  if (b->verdict < ALIKE) return a->drawn;
  if (t->kind == SA_MASK_AND)
    FOR_EACH_WORD(to, a->drawn->word[key][word] & b->drawn->word[key][word]);
  else
    FOR_EACH_WORD(to, a->drawn->word[key][word] | b->drawn->word[key][word]);
  return to;
}

static const sa_pattern *draw_term(const sa_terms *all, const sa_term *t, const sa_rectangle *r, sa_pattern *to) {
  switch (t->kind) {
    case SA_MASK_BAND:
    case SA_MASK_CORNER:
      draw_spans(t, r, to);
      return to;
    case SA_MASK_DOCUMENTS:
      draw_documents(all, t, r, to);
      return to;
    case SA_MASK_GRID:
      draw_grid(all, t, r, to);
      return to;
    case SA_MASK_RANDOM:
      draw_random(all, t, r, to);
      return to;
    default:
      return draw_operator(all, t, to);
  }
}

// Only terms that the last one needs are drawn, and of those not the EMPTY and FULL ones.
const sa_pattern *sa_terms_draw(sa_terms *all, const sa_rectangle *r) {
  const int64_t last = all->count - 1;
  for (int64_t k = 0; k < last; k++) all->term[k].needed = false;
  all->term[last].needed = true;
  for (int64_t k = last; k >= 0; k--)
    for (int operand = 0; all->term[k].needed && operand < sa_operands(all->term[k].kind); operand++) {
      sa_term *t = &all->term[all->term[k].operands[operand]];
      t->needed |= t->verdict >= ALIKE;
    }
  for (int64_t k = 0; k <= last; k++)
    if (all->term[k].needed) all->term[k].drawn = draw_term(all, &all->term[k], r, &all->drawings[k]);
  return all->term[last].drawn;
}
