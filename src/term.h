// the parts of an expression that is being compiled: what they say of a rectangle of pairs, and its bits
#ifndef SAFEATTN_TERM_H
#define SAFEATTN_TERM_H
#include "mask.h"

// What is known of a rectangle of pairs. Combined, the later of two wins, but for EMPTY in an AND and FULL in an OR.
typedef enum sa_verdict {
  EMPTY,
  FULL,
  ALIKE,  // every key in it is seen by the same queries
  MIXED   // nothing
} sa_verdict;

typedef struct sa_term {
  sa_mask_kind kind;
  const sa_mask *mask;    // NULL: not of the mask
  int32_t operands[2];    // terms before this one
  int64_t behind, ahead;  // of a band: queries [j - behind, j + ahead] see key j
  sa_corner corner;       // from here on: of the plane at hand
  const sa_id_range *queries, *keys;
  const int32_t *query_number, *key_number;
  const uint64_t *bits;
  sa_verdict verdict;       // on the rectangle at hand
  bool needed;              // to draw the tile at hand
  const sa_pattern *drawn;  // its bits
} sa_term;

// An expression, causality, window and the end of the sequence, operands before operators: the last is their AND.
typedef struct sa_terms {
  const char *function;  // for messages
  int64_t queries, keys;
  sa_term *term;
  int64_t count, room;
  sa_pattern *drawings;  // one for each term
} sa_terms;

// Row tile `row`, column tiles [index << level, (index + 1) << level) as far as there are any.
typedef struct sa_rectangle {
  int64_t row, index;
  int level;
  int64_t first_query, last_query, first_key, last_key;  // half-open; may reach beyond the sequence
} sa_rectangle;

// `function`, `queries` and `keys` are set, the rest is zero. Finds out whether the mask fits the sizes. After a
// failure, too, what was built must be released.
int sa_terms_build(sa_terms *all, const sa_mask *mask, int causal, int64_t window_left, int64_t window_right,
                   int64_t batch, int64_t heads);
void sa_terms_release(sa_terms *all);

// What follows is about this batch and head.
void sa_terms_enter(sa_terms *all, int64_t batch, int64_t head);

sa_verdict sa_terms_classify(sa_terms *all, const sa_rectangle *r);

// The bits of the rectangle's first tile, after sa_terms_classify gave ALIKE or MIXED.
const sa_pattern *sa_terms_draw(sa_terms *all, const sa_rectangle *r);

// Room for one more element of `size` bytes in the array that the pointer at `array` points to; it doubles.
int sa_make_room(const char *function, void *array, int64_t count, int64_t *room, int64_t size);

static inline int64_t sa_least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static inline int64_t sa_most(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// Queries [first, last) see a key; none do when first >= last.
typedef struct sa_span {
  int64_t first, last;
} sa_span;

static inline sa_span sa_span_of(const sa_term *t, int64_t key) {
  if (t->kind == SA_MASK_BAND) return (sa_span){key - t->behind, key + t->ahead + 1};
  return (sa_span){0, key < t->corner.keys ? t->corner.inside : t->corner.outside};
}

// The rows or columns of a grid that positions [first, last) lie in.
static inline sa_span sa_grid_range(int64_t count, int64_t size, int64_t first, int64_t last) {
  if (count == 1) return (sa_span){0, 1};
  if (size == 1) return (sa_span){first, sa_least(last, count)};
  return (sa_span){first / size, sa_least((last + size - 1) / size, count)};
}

// Bits [first, last) of a word, 0 <= first < last <= 64.
static inline uint64_t sa_word_range(int64_t first, int64_t last) {
  return (~UINT64_C(0) >> (64 - (last - first))) << first;
}

#endif
