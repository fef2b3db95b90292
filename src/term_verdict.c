// what terms say of a rectangle of pairs: that none is visible, or all, or some
#include "term.h"

// Both ends of a span move in one direction from key to key, so the first and the last key bound all between.
static sa_verdict span_verdict(const sa_term *t, const sa_rectangle *r) {
  const sa_span a = sa_span_of(t, r->first_key), b = sa_span_of(t, r->last_key - 1);
  if (sa_most(a.last, b.last) <= r->first_query || sa_least(a.first, b.first) >= r->last_query) return EMPTY;
  const int64_t a_first = sa_most(a.first, r->first_query), a_last = sa_least(a.last, r->last_query);
  const int64_t b_first = sa_most(b.first, r->first_query), b_last = sa_least(b.last, r->last_query);
  if (sa_most(a_first, b_first) <= r->first_query && sa_least(a_last, b_last) >= r->last_query) return FULL;
  return a_first == b_first && a_last == b_last ? ALIKE : MIXED;
}

static sa_verdict document_verdict(const sa_term *t, const sa_rectangle *r) {
  const sa_id_range queries = t->queries[t->mask->query_ids.leaves + r->row];
  const sa_id_range keys = t->keys[(t->mask->key_ids.leaves >> r->level) + r->index];
  if (queries.low > keys.high || keys.low > queries.high) return EMPTY;
  if (keys.lowest != keys.high) return MIXED;
  return queries.lowest == queries.high && queries.high == keys.high ? FULL : ALIKE;
}

static sa_verdict grid_verdict(const sa_term *t, const sa_rectangle *r) {
  const sa_grid *grid = &t->mask->grid;
  const sa_span rows = sa_grid_range(grid->kept[2], grid->size, r->first_query, r->last_query);
  const sa_span columns = sa_grid_range(grid->kept[3], grid->size, r->first_key, r->last_key);
  bool some = false, every = true;
  for (int64_t row = rows.first; row < rows.last; row++)
    for (int64_t word = columns.first / 64; word * 64 < columns.last; word++) {
      const uint64_t asked =
          sa_word_range(sa_most(columns.first - word * 64, 0), sa_least(columns.last - word * 64, 64));
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
