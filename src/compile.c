// compiles a mask expression to a plan: classifies ranges of tiles, draws the tiles that are neither empty nor full
#include <stdatomic.h>
#include <string.h>

#include "mask.h"
#include "memory.h"
#include "random.h"
#include "status.h"

/*  The way of it
 *
 *  The expression, causality, the window and the end of the sequence are listed as terms, operands before operators. A
 *  term is asked about the pairs of one row of tiles and an aligned group of 2^level columns of tiles, and answers by
 *  interval arithmetic. A group that is MIXED is halved; a single tile that is still MIXED, or a group whose tiles are
 *  ALIKE, is drawn: every term that matters gives its bits. So a causal mask costs the logarithm of its width per row
 *  of tiles, and L x S is never walked.
 */

// What is known of a rectangle of pairs; from AND's point of view the larger one wins, unless one is EMPTY.
typedef enum verdict {
  EMPTY,
  FULL,
  ALIKE,  // every key in it is seen by the same queries
  MIXED   // nothing
} verdict;

typedef struct term {
  sa_mask_kind kind;
  const sa_mask *mask;         // NULL: not of the mask
  int32_t operands[2];         // terms
  int64_t behind, ahead;       // of a band: queries [j - behind, j + ahead] see key j
  sa_corner corner;            // the rest: of the plane at hand
  const sa_id_range *queries;  // documents
  const sa_id_range *keys;
  const int32_t *query_number, *key_number;
  const uint64_t *bits;     // a grid
  verdict verdict;          // on the rectangle at hand
  bool needed;              // for drawing the tile at hand
  const sa_pattern *drawn;  // its bits
} term;

// What kernels never read but the plan's sums are made of.
typedef struct pattern_sums {
  int64_t visible;
  uint64_t queries[SA_TILE / 64], keys[SA_TILE / 64];  // that take part in a visible pair
} pattern_sums;

typedef struct compiler {
  const char *function;
  int64_t queries, keys, row_tiles, col_tiles, planes;
  term *terms;
  int64_t term_count, term_room;
  sa_pattern *drawings;  // one for each term
  // The runs of all rows of tiles in ascending order; those of row r of the planes in turn are row_start[r] up to
  // row_start[r + 1].
  sa_run *runs;
  int64_t run_count, run_room;
  int64_t *row_start, row_count;
  sa_pattern *patterns;
  pattern_sums *sums;
  int64_t pattern_count, pattern_room, sums_room;
  int32_t *places;  // open addressing of patterns by their hash, at most half full: index + 1
  int64_t place_count;
  // Per column of tiles of all planes: its partial and full runs; first how many, then where the next one goes.
  int64_t (*columns)[2];
  int32_t *since;  // per column of tiles: the row in which its open run starts
} compiler;

// Room for one more element of `size` bytes; the array doubles.
static int make_room(const char *function, void *array, int64_t count, int64_t *room, int64_t size) {
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

/*  Terms  */

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static int64_t most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

static int add_term(compiler *c, term added) {
  const int status = make_room(c->function, &c->terms, c->term_count, &c->term_room, sizeof added);
  if (!status) c->terms[c->term_count++] = added;
  return status;
}

static int add_operator(compiler *c, sa_mask_kind kind, int64_t a, int64_t b) {
  return add_term(c, (term){.kind = kind, .operands = {(int32_t)a, (int32_t)b}});
}

static int add_band(compiler *c, const sa_mask *mask, sa_band band) {
  const int64_t diagonal = band.bottom_right ? c->keys - c->queries : 0;
  return add_term(
      c, (term){.kind = SA_MASK_BAND, .mask = mask, .behind = band.right + diagonal, .ahead = band.left - diagonal});
}

// The terms of masks, found by their address: a mask that is used in many places is one term.
typedef struct found_terms {
  struct found_term {
    const sa_mask *mask;  // NULL: a free place
    int64_t index;
  } * place;
  int64_t capacity;  // a power of two, more than twice the terms
  int64_t count;
} found_terms;

static struct found_term *place_of_mask(const found_terms *found, const sa_mask *mask) {
  uint64_t place = ((uint64_t)(uintptr_t)mask * 0x9e3779b97f4a7c15u) >> 32;
  for (;; place++) {
    struct found_term *at = &found->place[place & (uint64_t)(found->capacity - 1)];
    if (!at->mask || at->mask == mask) return at;
  }
}

static int note_term(compiler *c, found_terms *found, const sa_mask *mask, int64_t index) {
  if (2 * (found->count + 1) > found->capacity) {
    found_terms larger = {NULL, found->capacity ? 4 * found->capacity : 16, found->count};
    larger.place = sa_allocate_zeroed(c->function, larger.capacity * (int64_t)sizeof *larger.place);
    if (!larger.place) return SA_NO_MEMORY;
    for (int64_t k = 0; k < found->capacity; k++)
      if (found->place[k].mask) *place_of_mask(&larger, found->place[k].mask) = found->place[k];
    sa_release(found->place);
    *found = larger;
  }
  *place_of_mask(found, mask) = (struct found_term){mask, index};
  found->count++;
  return SA_OK;
}

static int64_t known_term(const found_terms *found, const sa_mask *mask) {
  if (!found->capacity) return -1;
  const struct found_term *at = place_of_mask(found, mask);
  return at->mask ? at->index : -1;
}

static int add_mask(compiler *c, const sa_mask *mask, const int64_t *operands) {
  if (sa_operands(mask->kind)) return add_operator(c, mask->kind, operands[0], operands[1]);
  if (mask->kind == SA_MASK_BAND) return add_band(c, mask, mask->band);
  return add_term(c, (term){.kind = mask->kind, .mask = mask});
}

// Adds the terms of `root`, which comes last. A list of masks to do instead of recursion: an expression may be deeper
// than the stack. The list holds a mask's operands above it; it is looked at again when they are done.
static int add_expression(compiler *c, const sa_mask *root) {
  found_terms found = {NULL, 0, 0};
  const sa_mask **open = NULL;
  int64_t open_count = 0, open_room = 0;
  int status = make_room(c->function, &open, open_count, &open_room, sizeof *open);
  if (!status) open[open_count++] = root;
  while (!status && open_count > 0) {
    const sa_mask *mask = open[open_count - 1];
    int64_t operands[2] = {0, 0};
    bool ready = true;
    for (int k = 0; k < sa_operands(mask->kind) && !status; k++) {
      operands[k] = known_term(&found, mask->operands[k]);
      if (operands[k] >= 0) continue;
      ready = false;
      status = make_room(c->function, &open, open_count, &open_room, sizeof *open);
      if (!status) open[open_count++] = mask->operands[k];
    }
    if (!ready || status) continue;
    open_count--;
    if (known_term(&found, mask) >= 0) continue;
    status = add_mask(c, mask, operands);
    if (!status) status = note_term(c, &found, mask, c->term_count - 1);
  }
  sa_release(found.place);
  sa_release(open);
  return status;
}

// The last term is what the plan shows.
static int add_terms(compiler *c, const sa_mask *mask, int causal, int64_t window_left, int64_t window_right) {
  // Pairs beyond the end of the sequence are masked.
  int status = add_term(c, (term){.kind = SA_MASK_CORNER, .corner = {c->keys, c->queries, 0}});
  if (!status && mask) {
    status = add_expression(c, mask);
    if (!status) status = add_operator(c, SA_MASK_AND, 0, c->term_count - 1);
  }
  // Causality is a window whose right side is 0.
  const bool bottom_right = causal == SA_BOTTOM_RIGHT;
  sa_band band = {window_left, window_right, bottom_right};
  if (causal != SA_NO_CAUSAL) band.right = 0;
  if (!status && (band.left < SA_UNBOUNDED || band.right < SA_UNBOUNDED)) {
    status = add_band(c, NULL, band);
    if (!status) status = add_operator(c, SA_MASK_AND, c->term_count - 2, c->term_count - 1);
  }
  return status;
}

/*  Whether the masks fit the sizes  */

static int check_batch(const char *function, const sa_mask *mask, const char *what, int64_t batch) {
  if (mask->batch == 1 || mask->batch == batch) return SA_OK;
  return sa_fail(SA_INVALID, function, "%s: has %s %lld, wanted 1 or %lld (the batch)", mask->name, what,
                 (long long)mask->batch, (long long)batch);
}

static int check_corners(const compiler *c, const sa_mask *mask) {
  for (int64_t b = 0; b < mask->batch && !mask->clipped; b++) {
    const sa_corner corner = mask->corners[b];
    const bool keys = corner.keys > c->keys;
    if (!keys && (corner.inside == SA_UNBOUNDED || corner.inside <= c->queries)) continue;
    return sa_fail(SA_INVALID, c->function, "%s: batch %lld of %lld has %lld %s, wanted at most %lld", mask->name,
                   (long long)b + 1, (long long)mask->batch, (long long)(keys ? corner.keys : corner.inside),
                   keys ? "keys" : "queries", (long long)(keys ? c->keys : c->queries));
  }
  return SA_OK;
}

static int check_documents(const compiler *c, const sa_mask *mask) {
  if (mask->key_ids.count != c->keys)
    return sa_fail(SA_INVALID, c->function, "documents: has ids of %lld keys, wanted %lld",
                   (long long)mask->key_ids.count, (long long)c->keys);
  if (mask->query_ids.count != c->queries)
    return sa_fail(SA_INVALID, c->function, "documents: has ids of %lld queries%s, wanted %lld",
                   (long long)mask->query_ids.count, mask->shared ? " (the same as of keys)" : "",
                   (long long)c->queries);
  return SA_OK;
}

static int check_grid(const compiler *c, const sa_mask *mask, int64_t batch, int64_t heads) {
  const sa_grid *grid = &mask->grid;
  const int64_t size = grid->size;
  const int64_t wanted[4] = {batch, heads, c->queries / size + (c->queries % size != 0),
                             c->keys / size + (c->keys % size != 0)};
  for (int k = 0; k < 4; k++)
    if (grid->shape[k] != 1 && grid->shape[k] != wanted[k])
      return sa_fail(SA_INVALID, c->function, "%s: has shape %s, wanted %s, or 1 for any of its dims", mask->name,
                     sa_describe_shape(4, grid->shape), sa_describe_shape(4, wanted));
  return SA_OK;
}

static int check_terms(const compiler *c, int64_t batch, int64_t heads) {
  int status = SA_OK;
  for (int64_t k = 0; k < c->term_count && !status; k++) {
    const sa_mask *mask = c->terms[k].mask;
    if (!mask) continue;
    if (mask->kind == SA_MASK_GRID) {
      status = check_grid(c, mask, batch, heads);
    } else if (mask->kind == SA_MASK_DOCUMENTS) {
      status = check_batch(c->function, mask, "ids for a batch of", batch);
      if (!status) status = check_documents(c, mask);
    } else if (mask->kind == SA_MASK_CORNER) {
      status = check_batch(c->function, mask, "lengths for a batch of", batch);
      if (!status) status = check_corners(c, mask);
    }
  }
  return status;
}

/*  What a term says of a rectangle: row tile `row`, column tiles [index << level, (index + 1) << level)  */

typedef struct rectangle {
  int64_t row, index;
  int level;
  int64_t first_query, last_query, first_key, last_key;  // half-open; may reach beyond the sequence
} rectangle;

// Queries [first, last) see a key; none do when first >= last.
typedef struct span {
  int64_t first, last;
} span;

static span span_of(const term *t, int64_t key) {
  if (t->kind == SA_MASK_BAND) return (span){key - t->behind, key + t->ahead + 1};
  return (span){0, key < t->corner.keys ? t->corner.inside : t->corner.outside};
}

// Both ends of a span move in one direction from key to key, so the first and the last key bound all between.
static verdict span_verdict(const term *t, const rectangle *r) {
  const span a = span_of(t, r->first_key), b = span_of(t, r->last_key - 1);
  if (most(a.last, b.last) <= r->first_query || least(a.first, b.first) >= r->last_query) return EMPTY;
  const int64_t a_first = most(a.first, r->first_query), a_last = least(a.last, r->last_query);
  const int64_t b_first = most(b.first, r->first_query), b_last = least(b.last, r->last_query);
  if (most(a_first, b_first) <= r->first_query && least(a_last, b_last) >= r->last_query) return FULL;
  return a_first == b_first && a_last == b_last ? ALIKE : MIXED;
}

static verdict document_verdict(const term *t, const rectangle *r) {
  const sa_id_range queries = t->queries[t->mask->query_ids.leaves + r->row];
  const sa_id_range keys = t->keys[(t->mask->key_ids.leaves >> r->level) + r->index];
  if (queries.low > keys.high || keys.low > queries.high) return EMPTY;
  if (keys.lowest != keys.high) return MIXED;
  return queries.lowest == queries.high && queries.high == keys.high ? FULL : ALIKE;
}

// Bits [first, last) of a word, 0 <= first < last <= 64.
static uint64_t word_range(int64_t first, int64_t last) {
  return (~UINT64_C(0) >> (64 - (last - first))) << first;
}

// The rows or columns of a grid that positions [first, last) lie in.
static span grid_range(int64_t count, int64_t size, int64_t first, int64_t last) {
  if (count == 1) return (span){0, 1};
  if (size == 1) return (span){first, least(last, count)};
  return (span){first / size, least((last + size - 1) / size, count)};
}

static verdict grid_verdict(const term *t, const rectangle *r) {
  const sa_grid *grid = &t->mask->grid;
  const span rows = grid_range(grid->kept[2], grid->size, r->first_query, r->last_query);
  const span columns = grid_range(grid->kept[3], grid->size, r->first_key, r->last_key);
  bool some = false, every = true;
  for (int64_t row = rows.first; row < rows.last; row++)
    for (int64_t word = columns.first / 64; word * 64 < columns.last; word++) {
      const uint64_t asked = word_range(most(columns.first - word * 64, 0), least(columns.last - word * 64, 64));
      const uint64_t bits = t->bits[row * grid->words + word] & asked;
      some |= bits != 0;
      every &= bits == asked;
      if (some && !every) return grid->kept[3] == 1 ? ALIKE : MIXED;
    }
  return some ? FULL : EMPTY;
}

static verdict random_verdict(const term *t) {
  const uint32_t threshold = t->mask->chance.threshold;
  return threshold == 0 ? EMPTY : threshold == 1 << 24 ? FULL : MIXED;
}

static verdict and_verdict(verdict a, verdict b) {
  if (a == EMPTY || b == EMPTY) return EMPTY;
  return a > b ? a : b;
}

static verdict or_verdict(verdict a, verdict b) {
  if (a == FULL || b == FULL) return FULL;
  return a > b ? a : b;
}

static verdict not_verdict(verdict a) {
  return a == EMPTY ? FULL : a == FULL ? EMPTY : a;
}

static verdict term_verdict(const compiler *c, const term *t, const rectangle *r) {
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
      return and_verdict(c->terms[t->operands[0]].verdict, c->terms[t->operands[1]].verdict);
    case SA_MASK_OR:
      return or_verdict(c->terms[t->operands[0]].verdict, c->terms[t->operands[1]].verdict);
    case SA_MASK_NOT:
      return not_verdict(c->terms[t->operands[0]].verdict);
  }
  return MIXED;
}

// Every term's verdict; returns the last one's.
static verdict classify(compiler *c, const rectangle *r) {
  for (int64_t k = 0; k < c->term_count; k++) c->terms[k].verdict = term_verdict(c, &c->terms[k], r);
  return c->terms[c->term_count - 1].verdict;
}

/*  The bits of a tile: of the rectangle's first column of tiles  */

// Queries [first, last) of a tile that starts at `origin`, as bits.
static void mark_queries(uint64_t words[SA_TILE / 64], int64_t first, int64_t last, int64_t origin) {
  for (int64_t w = 0; w < SA_TILE / 64; w++) {
    const int64_t start = most(first - origin - 64 * w, 0), end = least(last - origin - 64 * w, 64);
    words[w] = start < end ? word_range(start, end) : 0;
  }
}

static void draw_spans(const term *t, const rectangle *r, sa_pattern *to) {
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

static void draw_documents(const compiler *c, const term *t, const rectangle *r, sa_pattern *to) {
  int32_t queries[SA_TILE];
  for (int64_t i = 0; i < SA_TILE; i++)
    queries[i] = r->first_query + i < c->queries ? t->query_number[r->first_query + i] : -1;
  int32_t last_id = -1;
  uint64_t words[SA_TILE / 64] = {0};
  for (int64_t key = 0; key < SA_TILE; key++) {
    const int32_t id = r->first_key + key < c->keys ? t->key_number[r->first_key + key] : -1;
    if (id != last_id && id < 0) memset(words, 0, sizeof words);
    if (id != last_id && id >= 0) mark_id(words, queries, id);
    last_id = id;
    memcpy(to->word[key], words, sizeof words);
  }
}

// What a tile is before it is turned key-major: a row of bits for each query.
typedef uint64_t query_rows[SA_TILE][SA_TILE / 64];

// Bit k of row i becomes bit i of row k: ever smaller squares off the diagonal change places.
static void transpose64(uint64_t rows[64]) {
  uint64_t low = 0x00000000ffffffff;
  for (int half = 32; half; half >>= 1, low ^= low << half)
    for (int first = 0; first < 64; first += 2 * half)
      for (int row = first; row < first + half; row++) {
        const uint64_t swapped = (rows[row] >> half ^ rows[row + half]) & low;
        rows[row] ^= swapped << half;
        rows[row + half] ^= swapped;
      }
}

static void turn_key_major(query_rows from, sa_pattern *to) {
  for (int query_word = 0; query_word < SA_TILE / 64; query_word++)
    for (int key_word = 0; key_word < SA_TILE / 64; key_word++) {
      uint64_t square[64];
      for (int i = 0; i < 64; i++) square[i] = from[64 * query_word + i][key_word];
      transpose64(square);
      for (int i = 0; i < 64; i++) to->word[64 * key_word + i][query_word] = square[i];
    }
}

// Bits of the tile's keys in one row of a grid of blocks.
static void spread_blocks(uint64_t row[SA_TILE / 64], const sa_grid *grid, const uint64_t *bits, const rectangle *r) {
  memset(row, 0, SA_TILE / 8);
  const span columns = grid_range(grid->kept[3], grid->size, r->first_key, r->first_key + SA_TILE);
  for (int64_t column = columns.first; column < columns.last; column++) {
    if (!(bits[column / 64] >> (column % 64) & 1)) continue;
    uint64_t keys[SA_TILE / 64];
    mark_queries(keys, column * grid->size, (column + 1) * grid->size, r->first_key);
    for (int w = 0; w < SA_TILE / 64; w++) row[w] |= keys[w];
  }
}

static void read_grid_row(uint64_t row[SA_TILE / 64], const sa_grid *grid, const uint64_t *bits, const rectangle *r) {
  if (grid->kept[3] == 1)
    memset(row, bits[0] & 1 ? 0xff : 0, SA_TILE / 8);
  else if (grid->size == 1)
    memcpy(row, bits + r->first_key / 64, SA_TILE / 8);
  else
    spread_blocks(row, grid, bits, r);
}

static void draw_grid(const compiler *c, const term *t, const rectangle *r, sa_pattern *to) {
  const sa_grid *grid = &t->mask->grid;
  query_rows rows;
  int64_t last = -1;
  for (int64_t i = 0; i < SA_TILE; i++) {
    const int64_t query = least(r->first_query + i, c->queries - 1);
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

static void draw_random(const compiler *c, const term *t, const rectangle *r, sa_pattern *to) {
  query_rows rows;
  for (int64_t i = 0; i < SA_TILE; i++)
    draw_chances(rows[i], t->mask->chance, (uint64_t)(r->first_query + i) * (uint64_t)c->keys + (uint64_t)r->first_key);
  turn_key_major(rows, to);
}

#define FOR_EACH_WORD(TO, VALUE)          \
  for (int key = 0; key < SA_TILE; key++) \
    for (int word = 0; word < SA_TILE / 64; word++) (TO)->word[key][word] = (VALUE)

static const sa_pattern *draw_operator(const compiler *c, const term *t, sa_pattern *to) {
  const term *a = &c->terms[t->operands[0]], *b = &c->terms[t->operands[1]];
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

static const sa_pattern *draw_term(const compiler *c, const term *t, const rectangle *r, sa_pattern *to) {
  switch (t->kind) {
    case SA_MASK_BAND:
    case SA_MASK_CORNER:
      draw_spans(t, r, to);
      return to;
    case SA_MASK_DOCUMENTS:
      draw_documents(c, t, r, to);
      return to;
    case SA_MASK_GRID:
      draw_grid(c, t, r, to);
      return to;
    case SA_MASK_RANDOM:
      draw_random(c, t, r, to);
      return to;
    default:
      return draw_operator(c, t, to);
  }
}

// The bits of the last term, after `classify`: of the terms that it needs, from the operators down, those that are
// neither EMPTY nor FULL.
static const sa_pattern *draw(compiler *c, const rectangle *r) {
  const int64_t last = c->term_count - 1;
  for (int64_t k = 0; k < last; k++) c->terms[k].needed = false;
  c->terms[last].needed = true;
  for (int64_t k = last; k >= 0; k--)
    for (int operand = 0; c->terms[k].needed && operand < sa_operands(c->terms[k].kind); operand++) {
      term *t = &c->terms[c->terms[k].operands[operand]];
      t->needed |= t->verdict >= ALIKE;
    }
  for (int64_t k = 0; k <= last; k++)
    if (c->terms[k].needed) c->terms[k].drawn = draw_term(c, &c->terms[k], r, &c->drawings[k]);
  return c->terms[last].drawn;
}

/*  Patterns: equal ones are kept once  */

static int64_t count_bits(uint64_t bits) {
  bits -= bits >> 1 & 0x5555555555555555;
  bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333);
  bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f;
  return (int64_t)(bits * 0x0101010101010101 >> 56);
}

static pattern_sums sums_of(const sa_pattern *pattern) {
  pattern_sums sums = {0};
  for (int key = 0; key < SA_TILE; key++) {
    uint64_t seen = 0;
    for (int word = 0; word < SA_TILE / 64; word++) {
      sums.visible += count_bits(pattern->word[key][word]);
      sums.queries[word] |= pattern->word[key][word];
      seen |= pattern->word[key][word];
    }
    sums.keys[key / 64] |= (uint64_t)(seen != 0) << (key % 64);
  }
  return sums;
}

// EMPTY, FULL or MIXED.
static verdict pattern_verdict(const sa_pattern *pattern) {
  uint64_t some = 0, every = ~UINT64_C(0);
  for (int key = 0; key < SA_TILE; key++)
    for (int word = 0; word < SA_TILE / 64; word++) {
      some |= pattern->word[key][word];
      every &= pattern->word[key][word];
    }
  return some == 0 ? EMPTY : every == ~UINT64_C(0) ? FULL : MIXED;
}

// Four sums side by side, so that the products do not wait for each other.
static uint64_t hash_of(const sa_pattern *pattern) {
  enum { SIDES = 4 };
  const uint64_t *word = &pattern->word[0][0];
  uint64_t sums[SIDES] = {1, 2, 3, 4};
  for (int k = 0; k < (int)(sizeof *pattern / 8); k += SIDES)
    for (int side = 0; side < SIDES; side++) {
      sums[side] = (sums[side] ^ word[k + side]) * 0x9e3779b97f4a7c15u;
      sums[side] ^= sums[side] >> 32;
    }
  return (sums[0] ^ sums[1] * 3 ^ sums[2] * 5 ^ sums[3] * 7) * 0x9e3779b97f4a7c15u >> 32;
}

static int32_t *place_of_pattern(const compiler *c, const sa_pattern *pattern) {
  for (uint64_t place = hash_of(pattern);; place++) {
    int32_t *at = &c->places[place & (uint64_t)(c->place_count - 1)];
    if (*at == 0 || memcmp(&c->patterns[*at - 1], pattern, sizeof *pattern) == 0) return at;
  }
}

static int grow_places(compiler *c) {
  const int64_t count = c->place_count ? 2 * c->place_count : 16;
  int32_t *places = sa_allocate_zeroed(c->function, count * (int64_t)sizeof *places);
  if (!places) return SA_NO_MEMORY;
  sa_release(c->places);
  c->places = places;
  c->place_count = count;
  for (int64_t k = 0; k < c->pattern_count; k++) *place_of_pattern(c, &c->patterns[k]) = (int32_t)k + 1;
  return SA_OK;
}

static int keep_pattern(compiler *c, const sa_pattern *pattern, int32_t *index) {
  if (2 * (c->pattern_count + 1) > c->place_count && grow_places(c)) return SA_NO_MEMORY;
  int32_t *at = place_of_pattern(c, pattern);
  if (*at == 0) {
    if (c->pattern_count == INT32_MAX)
      return sa_fail(SA_INVALID, c->function, "mask: has more than 2^31 different tiles, wanted fewer");
    if (make_room(c->function, &c->patterns, c->pattern_count, &c->pattern_room, sizeof *pattern) ||
        make_room(c->function, &c->sums, c->pattern_count, &c->sums_room, sizeof *c->sums))
      return SA_NO_MEMORY;
    c->patterns[c->pattern_count] = *pattern;
    c->sums[c->pattern_count] = sums_of(pattern);
    *at = (int32_t)++c->pattern_count;
  }
  *index = *at - 1;
  return SA_OK;
}

/*  Rows of tiles  */

static int add_run(compiler *c, int64_t first, int64_t count, int32_t pattern) {
  sa_run *before = c->run_count > c->row_start[c->row_count] ? &c->runs[c->run_count - 1] : NULL;
  if (before && before->pattern == pattern && before->first + before->count == first) {
    before->count += (int32_t)count;
    return SA_OK;
  }
  const int status = make_room(c->function, &c->runs, c->run_count, &c->run_room, sizeof *c->runs);
  if (!status) c->runs[c->run_count++] = (sa_run){(int32_t)first, (int32_t)count, pattern};
  return status;
}

// Adds the runs of column tiles [index << level, (index + 1) << level) of a row.
static int walk(compiler *c, int64_t row, int level, int64_t index) {
  const int64_t first = index << level, last = least((index + 1) << level, c->col_tiles);
  if (first >= last) return SA_OK;
  const rectangle r = {row, index, level, row * SA_TILE, (row + 1) * SA_TILE, first * SA_TILE, last * SA_TILE};
  verdict seen = classify(c, &r);
  if (seen == MIXED && level > 0) {
    const int status = walk(c, row, level - 1, 2 * index);
    return status ? status : walk(c, row, level - 1, 2 * index + 1);
  }
  int32_t pattern = SA_FULL;
  if (seen >= ALIKE) {
    const sa_pattern *drawn = draw(c, &r);
    seen = pattern_verdict(drawn);
    if (seen == MIXED) {
      const int status = keep_pattern(c, drawn, &pattern);
      if (status) return status;
    }
  }
  return seen == EMPTY ? SA_OK : add_run(c, first, last - first, pattern);
}

static void enter_plane(compiler *c, int64_t batch, int64_t head) {
  for (int64_t k = 0; k < c->term_count; k++) {
    term *t = &c->terms[k];
    const sa_mask *mask = t->mask;
    if (!mask) continue;
    if (mask->kind == SA_MASK_CORNER) {
      t->corner = mask->corners[mask->per_batch ? batch : 0];
    } else if (mask->kind == SA_MASK_DOCUMENTS) {
      const int64_t query_batch = mask->query_ids.batch == 1 ? 0 : batch,
                    key_batch = mask->key_ids.batch == 1 ? 0 : batch;
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

static int compile_rows(compiler *c, int64_t batch, int64_t heads) {
  const int levels = sa_levels(c->col_tiles);
  c->row_start[0] = 0;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++) {
      enter_plane(c, b, h);
      for (int64_t row = 0; row < c->row_tiles; row++) {
        const int status = walk(c, row, levels, 0);
        if (status) return status;
        c->row_start[++c->row_count] = c->run_count;
      }
    }
  return SA_OK;
}

/*  Columns of tiles
 *
 *  From one row to the next only the columns whose tile changes need a look, so the work is that of the runs that come
 *  out, not of the tiles.
 */

enum { PARTIAL_RUN = 0, FULL_RUN = 1, NO_TILE = -2 };

// The columns [first, last) change from the tile `before` to another in `row`. A run that was open ends: it is counted,
// or, when there is a place for it, written.
static void change_columns(compiler *c, int64_t (*columns)[2], sa_run *to, int64_t first, int64_t last, int32_t before,
                           int64_t row) {
  for (int64_t column = first; column < last; column++) {
    if (before != NO_TILE) {
      int64_t *next = &columns[column][before == SA_FULL ? FULL_RUN : PARTIAL_RUN];
      if (to) to[*next] = (sa_run){c->since[column], (int32_t)row - c->since[column], before};
      ++*next;
    }
    c->since[column] = (int32_t)row;
  }
}

// A row of tiles as stretches of one tile, EMPTY ones included.
typedef struct stretches {
  const sa_run *run, *end;
  int64_t last;  // where the stretch at hand ends
  int32_t tile;
} stretches;

static void next_stretch(stretches *s, int64_t from, int64_t col_tiles) {
  if (s->run == s->end) {
    s->last = col_tiles;
    s->tile = NO_TILE;
  } else if (s->run->first > from) {
    s->last = s->run->first;
    s->tile = NO_TILE;
  } else {
    s->last = s->run->first + s->run->count;
    s->tile = s->run->pattern;
    s->run++;
  }
}

static void compare_rows(compiler *c, int64_t (*columns)[2], sa_run *to, stretches before, stretches now, int64_t row) {
  for (int64_t column = 0; column < c->col_tiles;) {
    if (before.last == column) next_stretch(&before, column, c->col_tiles);
    if (now.last == column) next_stretch(&now, column, c->col_tiles);
    const int64_t last = least(before.last, now.last);
    if (before.tile != now.tile) change_columns(c, columns, to, column, last, before.tile, row);
    column = last;
  }
}

// Counts the runs of the columns (to NULL), or writes them.
static void compile_columns(compiler *c, sa_run *to) {
  for (int64_t plane = 0; plane < c->planes; plane++) {
    stretches before = {0};
    for (int64_t row = 0; row <= c->row_tiles; row++) {
      stretches now = {0};
      if (row < c->row_tiles) {
        const int64_t *start = &c->row_start[plane * c->row_tiles + row];
        now.run = c->runs + start[0];
        now.end = c->runs + start[1];
      }
      compare_rows(c, c->columns + plane * c->col_tiles, to, before, now, row);
      before = now;
    }
  }
}

/*  The plan  */

// Lays out the parts of a plan in one allocation, each aligned to 64 bytes; with a NULL base it only measures.
typedef struct layout {
  char *base;
  int64_t bytes;
} layout;

static void *part(layout *l, int64_t count, int64_t size) {
  void *at = l->base ? l->base + l->bytes : NULL;
  l->bytes += (count * size + 63) / 64 * 64;
  return at;
}

static sa_plan *lay_out(const compiler *c, layout *l, int64_t col_runs) {
  sa_plan *plan = part(l, 1, sizeof *plan);
  sa_plan parts = {0};
  const int64_t rows = c->planes * c->row_tiles, columns = c->planes * c->col_tiles;
  parts.patterns = part(l, c->pattern_count, sizeof *parts.patterns);
  parts.row_start = part(l, rows + 1, sizeof *parts.row_start);
  parts.row_runs = part(l, c->run_count, sizeof *parts.row_runs);
  parts.col_start = part(l, columns + 1, sizeof *parts.col_start);
  parts.col_runs = part(l, col_runs, sizeof *parts.col_runs);
  parts.dead_rows = part(l, c->planes * ((c->queries + 63) / 64), sizeof *parts.dead_rows);
  parts.dead_keys = part(l, c->planes * ((c->keys + 63) / 64), sizeof *parts.dead_keys);
  parts.row_visible = part(l, rows, sizeof *parts.row_visible);
  parts.col_visible = part(l, columns, sizeof *parts.col_visible);
  if (plan) *plan = parts;
  return plan;
}

// Dead bits of the positions of a tile, given those that take part in a visible pair.
static void note_dead(uint64_t *dead, int64_t positions, int64_t tile, const uint64_t alive[SA_TILE / 64]) {
  for (int64_t word = 0; word < SA_TILE / 64; word++) {
    const int64_t first = tile * SA_TILE + 64 * word;
    if (first < positions) dead[first / 64] = ~alive[word] & word_range(0, least(positions - first, 64));
  }
}

// Visible pairs and dead positions of one row (or column) of tiles.
static int64_t sum_runs(const compiler *c, const sa_run *run, const sa_run *end, bool rows, int64_t positions,
                        int64_t tile, uint64_t *dead) {
  int64_t visible = 0;
  uint64_t alive[SA_TILE / 64] = {0};
  for (; run < end; run++) {
    static const pattern_sums full = {SA_TILE * SA_TILE, {~UINT64_C(0), ~UINT64_C(0)}, {~UINT64_C(0), ~UINT64_C(0)}};
    const pattern_sums *sums = run->pattern == SA_FULL ? &full : &c->sums[run->pattern];
    visible += run->count * sums->visible;
    for (int word = 0; word < SA_TILE / 64; word++) alive[word] |= rows ? sums->queries[word] : sums->keys[word];
  }
  note_dead(dead, positions, tile, alive);
  return visible;
}

// The plan is still the compiler's, so its parts may be written.
static void write_rows(const compiler *c, sa_plan *plan) {
  int64_t *start = (int64_t *)plan->row_start;
  sa_run *to = (sa_run *)plan->row_runs;
  memcpy(start, c->row_start, (size_t)(c->row_count + 1) * sizeof *start);
  for (int64_t row = 0; row < c->row_count; row++) {
    for (int64_t k = start[row]; k < start[row + 1]; k++)
      if (c->runs[k].pattern != SA_FULL) *to++ = c->runs[k], plan->partial += c->runs[k].count;
    for (int64_t k = start[row]; k < start[row + 1]; k++)
      if (c->runs[k].pattern == SA_FULL) *to++ = c->runs[k], plan->full += c->runs[k].count;
  }
  for (int64_t row = 0; row < c->row_count; row++) {
    const int64_t plane = row / c->row_tiles;
    const int64_t visible =
        sum_runs(c, plan->row_runs + start[row], plan->row_runs + start[row + 1], true, c->queries, row % c->row_tiles,
                 (uint64_t *)plan->dead_rows + plane * ((c->queries + 63) / 64));
    ((int64_t *)plan->row_visible)[row] = visible;
    plan->visible += visible;
  }
}

// Turns the counts of runs per column into places, and returns how many runs there are.
static int64_t place_columns(compiler *c) {
  int64_t place = 0;
  for (int64_t column = 0; column < c->planes * c->col_tiles; column++)
    for (int kind = PARTIAL_RUN; kind <= FULL_RUN; kind++) {
      const int64_t count = c->columns[column][kind];
      c->columns[column][kind] = place;
      place += count;
    }
  return place;
}

static void write_columns(compiler *c, sa_plan *plan, int64_t col_runs) {
  int64_t *start = (int64_t *)plan->col_start;
  const int64_t columns = c->planes * c->col_tiles;
  for (int64_t column = 0; column < columns; column++) start[column] = c->columns[column][PARTIAL_RUN];
  start[columns] = col_runs;
  compile_columns(c, (sa_run *)plan->col_runs);
  for (int64_t column = 0; column < columns; column++) {
    const int64_t plane = column / c->col_tiles;
    ((int64_t *)plan->col_visible)[column] =
        sum_runs(c, plan->col_runs + start[column], plan->col_runs + start[column + 1], false, c->keys,
                 column % c->col_tiles, (uint64_t *)plan->dead_keys + plane * ((c->keys + 63) / 64));
  }
}

static int write_plan(compiler *c, sa_plan **out, int64_t batch, int64_t heads) {
  compile_columns(c, NULL);
  const int64_t col_runs = place_columns(c);
  layout l = {NULL, 0};
  lay_out(c, &l, col_runs);
  l = (layout){sa_allocate(c->function, l.bytes), 0};
  if (!l.base) return SA_NO_MEMORY;
  sa_plan *plan = lay_out(c, &l, col_runs);
  plan->batch = batch;
  plan->heads = heads;
  plan->queries = c->queries;
  plan->keys = c->keys;
  plan->row_tiles = c->row_tiles;
  plan->col_tiles = c->col_tiles;
  plan->pattern_count = c->pattern_count;
  plan->bytes = l.bytes;
  plan->holders = 1;
  if (c->pattern_count)
    memcpy((sa_pattern *)plan->patterns, c->patterns, (size_t)c->pattern_count * sizeof *plan->patterns);
  write_rows(c, plan);
  write_columns(c, plan, col_runs);
  plan->empty = c->planes * c->row_tiles * c->col_tiles - plan->partial - plan->full;
  *out = plan;
  return SA_OK;
}

static int check_sizes(const compiler *c, int64_t batch, int64_t heads, int64_t *planes) {
  if (c->row_tiles > INT32_MAX || c->col_tiles > INT32_MAX)
    return sa_fail(SA_INVALID, c->function, "%s: are %lld, wanted at most %lld",
                   c->row_tiles > INT32_MAX ? "queries" : "keys",
                   (long long)(c->row_tiles > INT32_MAX ? c->queries : c->keys), (long long)INT32_MAX * SA_TILE);
  int64_t pairs;
  if (__builtin_mul_overflow(batch, heads, planes) || __builtin_mul_overflow(*planes, c->queries, &pairs) ||
      __builtin_mul_overflow(pairs, c->keys, &pairs))
    return sa_fail(SA_INVALID, c->function, "queries, keys: are %lld and %lld, wanted below 2^63 pairs in all",
                   (long long)c->queries, (long long)c->keys);
  const int64_t most_planes = (INT64_C(1) << 40) / (c->row_tiles + c->col_tiles + 1);
  if (*planes > most_planes)
    return sa_fail(SA_INVALID, c->function,
                   "mask: differs between %lld batches and %lld heads, wanted at most %lld of both", (long long)batch,
                   (long long)heads, (long long)most_planes);
  return SA_OK;
}

static int allocate_work(compiler *c) {
  c->drawings = sa_allocate(c->function, c->term_count * (int64_t)sizeof *c->drawings);
  c->row_start = sa_allocate(c->function, (c->planes * c->row_tiles + 1) * (int64_t)sizeof *c->row_start);
  c->columns = sa_allocate_zeroed(c->function, c->planes * c->col_tiles * (int64_t)sizeof *c->columns);
  c->since = sa_allocate(c->function, c->col_tiles * (int64_t)sizeof *c->since);
  return c->drawings && c->row_start && c->columns && c->since ? SA_OK : SA_NO_MEMORY;
}

static void release_work(compiler *c) {
  sa_release(c->terms);
  sa_release(c->drawings);
  sa_release(c->runs);
  sa_release(c->row_start);
  sa_release(c->patterns);
  sa_release(c->sums);
  sa_release(c->places);
  sa_release(c->columns);
  sa_release(c->since);
}

int sa_compile(sa_plan **out, const sa_mask *mask, int causal, int64_t window_left, int64_t window_right, int64_t batch,
               int64_t heads, int64_t queries, int64_t keys) {
  compiler c = {.function = "sa_mask_plan",
                .queries = queries,
                .keys = keys,
                .row_tiles = sa_tiles(queries),
                .col_tiles = sa_tiles(keys)};
  const int64_t own_batch = mask && mask->per_batch ? batch : 1, own_heads = mask && mask->per_head ? heads : 1;
  int status = check_sizes(&c, own_batch, own_heads, &c.planes);
  if (!status) status = add_terms(&c, mask, causal, window_left, window_right);
  if (!status) status = check_terms(&c, batch, heads);
  if (!status) status = allocate_work(&c);
  if (!status) status = compile_rows(&c, own_batch, own_heads);
  if (!status) status = write_plan(&c, out, own_batch, own_heads);
  release_work(&c);
  return status;
}
