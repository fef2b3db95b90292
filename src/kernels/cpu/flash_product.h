// the products of attention by fused multiply-adds, for one REAL; part of flash_tile.h
//
// An ISA with matrix instructions has a file of its own with what is here: element, pack_query, query_room, rows_of,
// score_product, and what the two passes multiply by.

// What operands of products are made of.
typedef REAL NAME(element);

#include "kernels/cpu/flash_pairs.h"

#include "kernels/cpu/flash_strip.h"

#include "kernels/cpu/flash_few.h"

// The queries as the scores want them, times scale: packed, or, when they are few, as rows of whole vectors.
static void NAME(pack_query)(const NAME(block) * block, uint64_t skip, REAL *to) {
  const sa_operand *q = &block->p->q;
  const int width = (int)block->p->width;
  REAL rest;
  const REAL scale = NAME(scale_of_queries)(block, &rest);
  if (!block->few) {
    if (NAME(pairs)(block))
      NAME(pack_pairs)(q, block, width, scale, skip, to);
    else
      NAME(pack)(q, block, width, scale, NULL, skip, to);
    return;
  }
  for (int i = 0; i < NAME(FEW); i++, to += NAME(padded)(width)) {
    memset(to, 0, sizeof *to * NAME(columns)(width));
    if (i >= block->count || skip >> i & 1) continue;
    NAME(read_row)(NAME(row_at)(q, block, i), q->dtype, width, to);
    for (int d = 0; d < width; d++) to[d] *= scale;
    if (NAME(pairs)(block))
      NAME(narrow_row)(to, width);
    else if (NAME(split)(&block->p->k, width))
      NAME(split_row)(to, width);
  }
}

// What pack_query fills.
static int64_t NAME(query_room)(const sa_problem *p) {
  const int64_t packed = p->width * NAME(ROW), rows = NAME(FEW) * NAME(padded)(p->width);
  return packed > rows ? packed : rows;
}

// Whether rows of K or V can be read in place.
static bool NAME(reads_in_place)(const sa_operand *x, int width, bool whole_vectors) {
  return x->dtype == DTYPE && (!whole_vectors || width == NAME(columns)(width));
}

// `count` rows of K or V from `first` on: in place where the kernels can read them so, else converted into `room`.
static const REAL *NAME(rows_of)(const sa_operand *x, const NAME(block) * block, int64_t first, int count, int width,
                                 bool whole_vectors, REAL *room, int64_t *stride) {
  const int columns = NAME(columns)(width);
  const int64_t padded = NAME(padded)(width);
  if (NAME(reads_in_place)(x, width, whole_vectors)) {
    *stride = x->stride[2];
    return sa_at(x, block->batch, block->key_head, first, 0);
  }
  *stride = padded;
  for (int r = 0; r < count; r++) {
    REAL *row = room + (int64_t)r * padded;
    NAME(read_row)(sa_at(x, block->batch, block->key_head, first + r, 0), x->dtype, width, row);
    for (int d = width; d < columns; d++) row[d] = 0;
  }
  return room;
}

// A stretch's rows of K as score wants them; NULL: it reads them where they lie.
static const REAL *NAME(key_rows)(const NAME(block) * block, int64_t first, int count, REAL *room, int64_t *stride) {
  const sa_operand *k = &block->p->k;
  const int width = (int)block->p->width;
  *stride = 0;
  if (block->few ? NAME(readable)(k, width) : NAME(pairs)(block)) return NULL;
  return NAME(rows_of)(k, block, first, count, width, block->few, room, stride);
}

// Whether some element of so many rows of K or V is not finite.
static bool NAME(wild_rows)(const sa_operand *x, const NAME(block) * keys, int64_t first, int count, int width) {
  if (x->dtype == DTYPE) {
    return NAME(has_nonfinite)(sa_at(x, keys->batch, keys->key_head, first, 0), x->stride[2], count, width);
  }
  REAL room[SA_FUSED_WIDTH];
  bool wild = false;
  for (int r = 0; r < count && !wild; r++) {
    NAME(read_row)(sa_at(x, keys->batch, keys->key_head, first + r, 0), x->dtype, width, room);
    wild = NAME(has_nonfinite)(room, 0, 1, width);
  }
  return wild;
}

// The keys whose pairs with the vector j of queries some product reads: nobody asks what the others are.
static inline sa_extent NAME(reach)(const sa_stretch *stretch, int j) {
  return stretch->outline ? stretch->outline->reach[j * LANES / REACH] : (sa_extent){0, stretch->count};
}

// The left side of a product with packed queries: rows as they are given, or, of `pairs` (NULL: not), as they lie, the
// sums times `rest`.
typedef struct NAME(left_rows) {
  const REAL *rows;
  int64_t stride;
  int width;
  const sa_operand *pairs;
  REAL rest;
} NAME(left_rows);

// K Q^T or V dO^T; in halves where results have the precision of the sums.
static void NAME(product_with_queries)(const NAME(block) * block, const sa_stretch *stretch, NAME(left_rows) left,
                                       const REAL *packed, REAL *to, REAL *peak) {
  const int columns = block->vectors * LANES, keys = stretch->count;
  const bool in_halves = sizeof(REAL) == 4 && block->p->dtype == DTYPE;
  const sa_product_start start = left.pairs ? SA_PAIRS : in_halves ? SA_IN_HALVES : SA_FROM_ZERO;
  if (left.pairs) {
    left.rows = sa_at(left.pairs, block->batch, block->key_head, stretch->first, 0);
    left.stride = left.pairs->stride[2] / 2;
    left.width /= 2;
  }
  if (stretch->outline) NAME(product_within)
  (stretch->outline->queries, false, left.rows, left.stride, 1, packed, NAME(ROW), to, NAME(ROW), keys, columns,
   left.width, start, &left.rest, stretch->forecast);
  else NAME(product)(left.rows, left.stride, 1, packed, NAME(ROW), to, NAME(ROW), keys, columns, left.width, start,
                     &left.rest, peak, stretch->forecast);
}

// S^T of a stretch, as K and Q alone give it. `peak` (NULL when queries are few) is raised to the largest of each
// query.
static void NAME(score_product)(const NAME(block) * block, const sa_stretch *stretch, const REAL *key,
                                int64_t key_stride, const REAL *packed_query, REAL *scores, REAL *peak) {
  if (block->few) {
    NAME(score_few)(block, stretch, key, key_stride, packed_query, false, scores);
    return;
  }
  REAL rest;
  NAME(scale_of_queries)(block, &rest);
  const NAME(left_rows) left = {key, key_stride, (int)block->p->width, NAME(pairs)(block) ? &block->p->k : NULL, rest};
  NAME(product_with_queries)(block, stretch, left, packed_query, scores, peak);
}

// What products read of keys besides K.
static void NAME(foresee_values)(sa_forecast *forecast, const NAME(block) * block, int64_t first, int64_t count) {
  const sa_operand *v = &block->p->v;
  const int64_t size = sa_size_of(v->dtype);
  sa_forecast_add(forecast, sa_at(v, block->batch, block->key_head, first, 0), v->stride[2] * size,
                  block->p->value_width * size, count);
}

// What the products of the forward need in a worker's room.
typedef struct NAME(forward_products) {
  REAL *rows;    // [STRETCH][width, padded]: K, where it cannot be read in place
  REAL *values;  // [STRETCH][value width, padded]: V, likewise
  REAL *finite;  // [STRETCH][value width, padded]: V for the careful path
} NAME(forward_products);

static NAME(forward_products) NAME(take_forward_products)(sa_room *room, const sa_problem *p) {
  const int64_t width = NAME(padded)(p->width), value_width = NAME(padded)(p->value_width);
  const bool in_place = NAME(reads_in_place)(&p->k, (int)p->width, p->queries <= NAME(FEW));
  const bool values_in_place = NAME(reads_in_place)(&p->v, (int)p->value_width, true);
  return (NAME(forward_products)){.rows = NAME(take)(room, in_place ? 0 : STRETCH * width),
                                  .values = NAME(take)(room, values_in_place ? 0 : STRETCH * value_width),
                                  .finite = NAME(take)(room, STRETCH * value_width)};
}

// What o takes of a block, in REAL.
static int64_t NAME(value_sums)(const sa_problem *p) {
  return QUERIES * NAME(padded)(p->value_width);
}

// The same as add_values, of few queries.
static void NAME(add_few_rows)(const NAME(block) * block, const sa_stretch *stretch, const uint64_t *visible,
                               const REAL *weights, bool dense, const REAL *factor, const NAME(forward_products) * room,
                               REAL *o, REAL *leaked) {
  const sa_operand *v = &block->p->v;
  const int width = (int)block->p->value_width, keys = stretch->count;
  const int64_t padded = NAME(padded)(width);
  const bool readable = NAME(readable)(v, width);
  NAME(raw_rows) rows = NAME(raw_rows_of)(v, block, stretch->first);
  if (leaked || !readable) {
    int64_t stride;
    const REAL *value = NAME(rows_of)(v, block, stretch->first, keys, width, true, room->values, &stride);
    if (!readable) rows = (NAME(raw_rows)){(const char *)value, stride * (int64_t)sizeof *value, DTYPE};
    if (leaked && visible && NAME(has_nonfinite)(value, stride, keys, width)) {
      NAME(add_nonfinite)(block, keys, visible, weights, value, stride, width, padded, leaked);
      if (NAME(split)(v, width)) {
        rows = NAME(finite_halves)(&rows, keys, width, room->finite);
      } else {
        NAME(finite_part)(value, stride, keys, width, room->finite);
        rows = (NAME(raw_rows)){(const char *)room->finite, padded * (int64_t)sizeof *value, DTYPE};
      }
    }
  }
  NAME(add_few_values)(block, stretch, &rows, weights, dense, factor, o);
}

enum { NAME(WHOLE_LEAKS) = false };

// The most keys of a stretch where all are seen.
static int NAME(longest_stretch)(const sa_problem *p) {
  return STRETCH;
}

// All of a stretch at once for few queries, when its scores lie dense; false when they do not. `factor` is room.
static bool NAME(pass_whole)(const NAME(block) * block, const sa_stretch *stretch, const REAL *key, int64_t key_stride,
                             const REAL *query, const NAME(forward_products) * room, REAL *scores, REAL *factor,
                             bool started, NAME(gathered) * gathered, REAL *leaked) {
  if (!NAME(lies_dense)(block, stretch)) return false;
  NAME(score_few)(block, stretch, key, key_stride, query, true, scores);
  NAME(soften_few)(block, stretch->count, scores, gathered, factor);
  NAME(add_few_rows)(block, stretch, NULL, scores, true, started ? factor : NULL, room, gathered->o, NULL);
  gathered->alive = ~UINT64_C(0);
  return true;
}

// o = o * factor + P V, where `factor` is one of each query; NULL: o starts. With `leaked`, which gets what is not
// finite in V, P meets 0 in its place. Returns whether it can have leaked to who does not see it.
static bool NAME(add_values)(const NAME(block) * block, const sa_stretch *stretch, const uint64_t *visible,
                             const REAL *weights, const REAL *factor, const NAME(forward_products) * room, REAL *o,
                             REAL *leaked) {
  const int width = (int)block->p->value_width, columns = NAME(columns)(width);
  const int64_t padded = NAME(padded)(width);
  const sa_product_start start = factor ? SA_FROM_SCALED : SA_FROM_ZERO;
  if (block->few) {
    NAME(add_few_rows)(block, stretch, visible, weights, false, factor, room, o, leaked);
    return visible;
  }
  int64_t stride = padded;
  const REAL *value = room->values;
  if (!stretch->again || block->p->v.dtype == DTYPE) {
    value = NAME(rows_of)(&block->p->v, block, stretch->first, stretch->count, width, true, room->values, &stride);
  }
  if (leaked && visible && NAME(has_nonfinite)(value, stride, stretch->count, width)) {
    NAME(finite_part)(value, stride, stretch->count, width, room->finite);
    NAME(add_nonfinite)(block, stretch->count, visible, weights, value, stride, width, padded, leaked);
    value = room->finite;
    stride = padded;
  }
  if (stretch->outline) NAME(product_within)
  (stretch->outline->keys, true, weights, 1, NAME(ROW), value, stride, o, padded, block->count, columns, stretch->count,
   start, factor, stretch->forecast);
  else NAME(product)(weights, 1, NAME(ROW), value, stride, o, padded, block->count, columns, stretch->count, start,
                     factor, NULL, stretch->forecast);
  return visible;
}

// Whether V of a stretch can have leaked: something in it is not finite, and some of its pairs are masked.
static bool NAME(can_leak)(const NAME(block) * block, const sa_stretch *stretch) {
  const sa_problem *p = block->p;
  if (!stretch->pattern && !p->bias.data) return false;
  return NAME(wild_rows)(&p->v, block, stretch->first, stretch->count, (int)p->value_width);
}

// After the last stretch: o as rows of queries, which it is here all along, but for the order of a row.
static void NAME(close_values)(const NAME(block) * block, const NAME(forward_products) * room, REAL *o) {
  const int width = (int)block->p->value_width;
  if (!block->few || !NAME(split)(&block->p->v, width)) return;
  for (int i = 0; i < block->count; i++) NAME(join_row)(o + i * NAME(padded)(width), width);
}

// Whether something that products gathered for o is not finite.
static bool NAME(sums_nonfinite)(const NAME(block) * block, const REAL *o) {
  const int width = (int)block->p->value_width;
  return NAME(has_nonfinite)(o, NAME(padded)(width), block->count, width);
}

// Writes outputs straight from what products gathered; false: they are to be closed, which here is little work.
static bool NAME(write_sums)(const NAME(block) * block, const NAME(gathered) * gathered, const REAL *scale) {
  return false;
}

// What the products of the backward need in a worker's room. V is done with before K's finite part is wanted.
typedef struct NAME(backward_products) {
  REAL *packed_dout;  // [value width][ROW], for dP; with `pairs` half of it, as pack_pairs does
  bool pairs;
  REAL *key_rows;    // [keys][width, padded]: K, where it cannot be read in place
  REAL *other_rows;  // [keys][either width, padded]: V, likewise; or the finite part of a K that is read in place
} NAME(backward_products);

static NAME(backward_products) NAME(take_backward_products)(sa_room *room, const sa_problem *p, int keys, bool pairs) {
  const int64_t width = NAME(padded)(p->width), value_width = NAME(padded)(p->value_width);
  const bool in_place = NAME(reads_in_place)(&p->k, (int)p->width, true);
  const bool values_in_place = NAME(reads_in_place)(&p->v, (int)p->value_width, false);
  const int64_t finite = in_place ? width : 0, values = values_in_place ? 0 : value_width;
  return (NAME(backward_products)){.packed_dout = NAME(take)(room, p->value_width * NAME(ROW)),
                                   .pairs = pairs,
                                   .key_rows = NAME(take)(room, in_place ? 0 : keys * width),
                                   .other_rows = NAME(take)(room, keys * (finite > values ? finite : values))};
}

static bool NAME(wild_keys)(const NAME(block) * keys, int64_t first, int count) {
  return NAME(wild_rows)(&keys->p->k, keys, first, count, (int)keys->p->width);
}

// Whether dO is packed times the scale of the scores, which dQ and dK then need no pass for; what is added to scores
// has gradients that want dS as it is.
static bool NAME(scales_dout)(const sa_problem *p) {
  return !p->bias.data && !p->alibi.data;
}

static double NAME(scale_of_dout)(const sa_problem *p) {
  return NAME(scales_dout)(p) ? p->scale : 1;
}

// Before a block of queries: what dO is to be packed to, each row times its factor. `query` and `dout` are its rows,
// finite.
static void NAME(open_queries)(const NAME(block) * block, uint64_t dead, const REAL *query, const REAL *dout,
                               const REAL *factors, const NAME(backward_products) * products) {
  const sa_problem *p = block->p;
  const int width = (int)p->value_width;
  const uint64_t skip = p->dout.data ? dead : ~UINT64_C(0);
  const double factor = NAME(scale_of_dout)(p);
  REAL rest;
  if (products->pairs)
    NAME(pack_pairs)(&p->dout, block, width, NAME(power_of_two_in)(factor, &rest), skip, products->packed_dout);
  else
    NAME(pack)(&p->dout, block, width, (REAL)factor, factors, skip, products->packed_dout);
}

// dP^T = V dO^T.
static void NAME(dweight_product)(const NAME(block) * block, const sa_stretch *stretch,
                                  const NAME(backward_products) * products, REAL *dweights) {
  const sa_problem *p = block->p;
  const sa_operand *v = &p->v;
  NAME(left_rows) left = {.width = (int)p->value_width, .pairs = products->pairs ? v : NULL};
  if (products->pairs)
    NAME(power_of_two_in)(NAME(scale_of_dout)(p), &left.rest);
  else
    left.rows =
        NAME(rows_of)(v, block, stretch->first, stretch->count, left.width, false, products->other_rows, &left.stride);
  NAME(product_with_queries)(block, stretch, left, products->packed_dout, dweights, NULL);
}

// What a stretch adds to `columns` of a gradient of its keys.
static void NAME(add_columns)(const NAME(block) * block, const sa_stretch *stretch, const REAL *pairs, const REAL *rows,
                              int64_t stride, bool fresh, REAL *to, int64_t to_row, int columns) {
  const sa_product_start start = fresh ? SA_FROM_ZERO : SA_FROM_SELF;
  if (stretch->outline) NAME(product_within)
  (stretch->outline->queries, true, pairs, NAME(ROW), 1, rows, stride, to, to_row, stretch->count, columns,
   block->count, start, NULL, stretch->forecast);
  else NAME(product)(pairs, NAME(ROW), 1, rows, stride, to, to_row, stretch->count, columns, block->count, start, NULL,
                     NULL, stretch->forecast);
}

// dV += P^T dO, or dK += dS^T Q, from row `first` of the gradient on; or without what was there, when it is `fresh`.
static void NAME(add_to_keys)(const NAME(block) * block, const sa_stretch *stretch, const REAL *pairs, const REAL *rows,
                              int64_t stride, bool fresh, const NAME(gradient) * to, int64_t first) {
  NAME(add_columns)
  (block, stretch, pairs, rows, stride, fresh, to->rows + first * to->row, to->row, to->columns);
  if (!to->tail) return;
  NAME(add_columns)
  (block, stretch, pairs, rows + to->columns, stride, fresh, to->tail + first * LANES, LANES, LANES);
}

static void NAME(add_dvalues)(const NAME(block) * block, const sa_stretch *stretch, const REAL *weights,
                              const REAL *dout, int64_t stride, bool fresh, const NAME(backward_products) * products,
                              const NAME(gradient) * to, int64_t first) {
  NAME(add_to_keys)(block, stretch, weights, dout, stride, fresh, to, first);
}

static void NAME(add_dkeys)(const NAME(block) * block, const sa_stretch *stretch, const REAL *dscores,
                            const REAL *query, int64_t stride, bool fresh, const NAME(backward_products) * products,
                            const NAME(gradient) * to, int64_t first) {
  NAME(add_to_keys)(block, stretch, dscores, query, stride, fresh, to, first);
}

// dQ += dS K, or dS K alone when it is the `first`. What is not finite in K, when it is `wild`, reaches who sees it.
static void NAME(add_dqueries)(const NAME(block) * block, const sa_stretch *stretch, const uint64_t *visible,
                               const REAL *key, int64_t stride, const REAL *dscores, bool wild, bool first,
                               const NAME(backward_products) * products, const NAME(gradient) * to) {
  const int width = (int)block->p->width, keys = stretch->count;
  const bool apart = wild && visible && NAME(has_nonfinite)(key, stride, keys, width);
  REAL *finite = NAME(reads_in_place)(&block->p->k, width, true) ? products->other_rows : products->key_rows;
  if (first && apart) NAME(clear_rows)(to, 0, block->count);
  if (apart) {
    NAME(add_nonfinite)(block, keys, visible, dscores, key, stride, width, to->row, to->rows);
    NAME(finite_part)(key, stride, keys, width, finite);
  }
  const sa_product_start start = first && !apart ? SA_FROM_ZERO : SA_FROM_SELF;
  if (apart) {
    key = finite;
    stride = NAME(padded)(width);
  }
  if (stretch->outline) NAME(product_within)
  (stretch->outline->keys, true, dscores, 1, NAME(ROW), key, stride, to->rows, to->row, block->count, to->columns, keys,
   start, NULL, stretch->forecast);
  else NAME(product)(dscores, 1, NAME(ROW), key, stride, to->rows, to->row, block->count, to->columns, keys, start,
                     NULL, NULL, stretch->forecast);
}

// After the last stretch of a block: dQ as rows of queries, likewise.
static void NAME(close_queries)(const NAME(block) * block, const NAME(backward_products) * products, REAL *dquery) {}
