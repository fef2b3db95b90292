// the bits of a tile, drawn term by term: of the first tile of a rectangle
#include "term.h"

#include <string.h>

#include "random.h"

// Queries [first, last) of a tile that starts at `origin`, as bits.
static void mark_queries(uint64_t words[SA_TILE / 64], int64_t first, int64_t last, int64_t origin) {
  for (int64_t w = 0; w < SA_TILE / 64; w++) {
    const int64_t start = sa_most(first - origin - 64 * w, 0), end = sa_least(last - origin - 64 * w, 64);
    words[w] = start < end ? sa_word_range(start, end) : 0;
  }
}

static void draw_spans(const sa_term *t, const sa_rectangle *r, sa_pattern *to) {
  for (int64_t key = 0; key < SA_TILE; key++) {
    const sa_span seen = sa_span_of(t, r->first_key + key);
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
  const sa_span columns = sa_grid_range(grid->kept[3], grid->size, r->first_key, r->first_key + SA_TILE);
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
