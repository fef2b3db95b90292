// the products of few queries (decoding), whose speed is to be that of memory, for one REAL; part of flash_product.h
//
// Scores are dot products along the width: vectors of K meet vectors of Q. o takes whole rows of V. Both are read once
// and where they lie, for four queries at a time, and halves become floats in registers. A vector of bf16 is one of
// words with two elements each: a shift and a mask make two vectors of floats of it, those of the even and of the odd
// elements, and Q and o are in that order then (`split`). Where the processor multiplies pairs of bf16, scores are made
// of K and Q as they lie (flash_pairs.h).
//
// Prefetchers look at each page by itself and follow many at once, so some cores read several places faster than one:
// 16.8 GB/s in 16, 13 in one (Ice Lake); a Sapphire Rapids reads fastest in one. So a stretch is read in 4 or 8 streams
// at once, each a part of its rows of about a page. What is half a stretch further on in this order, V after K and the
// next stretch's K after V, is called for into the second cache meanwhile. A Zen 4 core waits for at most 24 lines of
// its first cache, 14 GB/s: called for into that one, decoding came to 13 GB/s on a core that reads 28, into the second
// one to 22. Two threads of a Sapphire Rapids are as fast either way.
//
// In bf16 the arithmetic alone, from the first cache, runs at 25 GB/s, 1.5 times what memory gives, and shows: a tenth
// less of it made decoding a tenth faster there. Tiles of AMX in its place (V as it lies, a weight beside a 0 for each
// column of a pair) ran at 45 GB/s from the second cache, but in memory's order at 0.74 to 0.87 of this one's speed,
// and at most 6 % faster when read in eight places; they were dropped.
enum { NAME(PAGE) = 4096, NAME(LEAST_STREAMS) = 4, NAME(MOST_STREAMS) = 8, NAME(HELD_ROWS) = 16 };

// Whether a row's elements are even before odd in Q or o.
static bool NAME(split)(const sa_operand *x, int64_t width) {
  return sizeof(REAL) == 4 && x->dtype == SA_BF16 && width % (2 * LANES) == 0;
}

// Whether rows can be read where they lie.
static bool NAME(readable)(const sa_operand *x, int64_t width) {
  const bool own = x->dtype == DTYPE, halves = sizeof(REAL) == 4 && x->dtype == SA_F16;
  return ((own || halves) && width % LANES == 0) || NAME(split)(x, width);
}

// Rows as they lie, `stride` bytes apart.
typedef struct NAME(raw_rows) {
  const char *first;
  int64_t stride;
  int dtype;
} NAME(raw_rows);

static NAME(raw_rows) NAME(raw_rows_of)(const sa_operand *x, const NAME(block) * block, int64_t first) {
  return (NAME(raw_rows)){sa_at(x, block->batch, block->key_head, first, 0), x->stride[2] * sa_size_of(x->dtype),
                          x->dtype};
}

// bf16 rows with 0 in place of what is not finite.
static NAME(raw_rows) NAME(finite_halves)(const NAME(raw_rows) * rows, int count, int width, void *room) {
  uint16_t *to = room;
  for (int r = 0; r < count; r++) {
    const uint16_t *row = (const uint16_t *)(const void *)(rows->first + r * rows->stride);
    for (int d = 0; d < width; d++) *to++ = (row[d] & 0x7f80) == 0x7f80 ? 0 : row[d];
  }
  return (NAME(raw_rows)){room, width * (int64_t)sizeof *to, SA_BF16};
}

// A vector of a row, or half of one that is split.
static inline __attribute__((always_inline)) NAME(vector)
    NAME(raw_vector)(int dtype, const char *row, int d, int half) {
#if MANTISSA_BITS == 23
  if (dtype == SA_BF16) {
    NAME(order) pairs;
    memcpy(&pairs, row + 2 * (d - half * LANES), sizeof pairs);
    return half ? (NAME(vector))(pairs & 0xffff0000) : (NAME(vector))(pairs << 16);
  }
  if (dtype == SA_F16) return (NAME(vector))widened_f16((const uint16_t *)row + d);
#endif
  return NAME(load)((const REAL *)row + d);
}

// The order in which a stretch's rows are read: at every step one of each stream. The last streams may be shorter.
typedef struct NAME(course) {
  int rows, streams, steps;
  int ahead;  // how many steps further on what is called for comes
} NAME(course);

// The streams are as many for K as for V, since that is the order of the weights.
static NAME(course) NAME(course_of)(const sa_problem *p, int rows, int64_t stride) {
  const int64_t bytes = rows * (p->width + p->value_width) * sa_size_of(p->k.dtype);
  int streams = NAME(LEAST_STREAMS);
  while (streams < NAME(MOST_STREAMS) && streams * 2 * (2 * NAME(PAGE)) <= bytes) streams *= 2;
  const int steps = (rows + streams - 1) / streams;
  return (NAME(course)){rows, streams, steps, stride > 0 ? (steps + 1) / 2 : 0};
}

// What is called for at a step: the first stream's row further on, or that of `next`, which goes on where these end.
static inline NAME(raw_rows)
    NAME(rows_ahead)(const NAME(course) * course, const NAME(raw_rows) * rows, const NAME(raw_rows) * next, int step) {
  const int later = step + course->ahead, beyond = later - course->steps;
  NAME(raw_rows) ahead = beyond < 0 ? *rows : *next;
  ahead.first += (beyond < 0 ? later : beyond) * ahead.stride;
  return ahead;
}

// Scores of DOT_KEYS keys and DOT_QUERIES queries at once make LANES sums, which end in one lane each.
enum { NAME(DOT_QUERIES) = LANES < 4 ? LANES : 4, NAME(DOT_KEYS) = LANES / NAME(DOT_QUERIES) };

// Where the scores of a stretch lie, or its weights, those of DOT_QUERIES queries of a key together: dense in the order
// in which keys are read, one such group of queries after the other, or in rows of ROW, one a key.
typedef struct NAME(few_layout) {
  int64_t stream, step, group;  // from one to the next
  bool dense;
} NAME(few_layout);

static NAME(few_layout) NAME(few_layout_of)(const NAME(course) * course, bool dense) {
  const int queries = NAME(DOT_QUERIES);
  if (!dense) return (NAME(few_layout)){course->steps * NAME(ROW), NAME(ROW), queries, false};
  return (NAME(few_layout)){queries, (int64_t)course->streams * queries, (int64_t)course->rows * queries, true};
}

// Stores DOT_QUERIES lanes of x from `from` on; as the `first` of a key, with 0 in the rest of a vector.
static inline __attribute__((always_inline)) void NAME(store_lanes)(NAME(vector) x, int from, bool first, REAL *to) {
  NAME(order) pick;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) pick[i] = i < NAME(DOT_QUERIES) ? (BITS)(from + i) : LANES;
  const NAME(vector) lanes = __builtin_shuffle(x, NAME(set)(0), pick);
  if (first)
    NAME(store)(to, lanes);
  else
    memcpy(to, &lanes, sizeof *to * NAME(DOT_QUERIES));
}

// Scores of DOT_KEYS rows and DOT_QUERIES queries: row r's of query i in lane r * DOT_QUERIES + i. `pairs`: of bf16, as
// they lie. `ahead`: what to call for meanwhile, a line of each row at a time; NULL: nothing.
static inline __attribute__((always_inline)) NAME(vector)
    NAME(dots)(int dtype, bool pairs, const char *const *row, const char *const *ahead, const REAL *query,
               int64_t query_stride, int columns) {
  const int halves = dtype == SA_BF16 ? 2 : 1, size = dtype == DTYPE ? sizeof(REAL) : 2;
  NAME(vector) sum[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) sum[i] = NAME(set)(0);
  int d = 0;
  do {
    if (ahead && (halves * LANES * size >= 64 || d * size % 64 == 0)) {
#pragma GCC unroll 4
      for (int r = 0; r < NAME(DOT_KEYS); r++) __builtin_prefetch(ahead[r] + d * size, 0, 2);
    }
#ifdef OWN_PAIRS
    if (pairs) {
      NAME(order) x[NAME(DOT_KEYS)], y;
#pragma GCC unroll 4
      for (int r = 0; r < NAME(DOT_KEYS); r++) memcpy(&x[r], row[r] + d * size, sizeof y);
#pragma GCC unroll 4
      for (int i = 0; i < NAME(DOT_QUERIES); i++) {
        memcpy(&y, (const char *)(query + i * query_stride) + d * size, sizeof y);
#pragma GCC unroll 4
        for (int r = 0; r < NAME(DOT_KEYS); r++) {
          NAME(vector) *to = &sum[r * NAME(DOT_QUERIES) + i];
          *to = NAME(add_pairs)(*to, (NAME(vector))x[r], (NAME(vector))y);
        }
      }
      d += 2 * LANES;
      continue;
    }
#endif
#pragma GCC unroll 2
    for (int half = 0; half < halves; half++, d += LANES) {
      NAME(vector) x[NAME(DOT_KEYS)];
#pragma GCC unroll 4
      for (int r = 0; r < NAME(DOT_KEYS); r++) x[r] = NAME(raw_vector)(dtype, row[r], d, half);
#pragma GCC unroll 4
      for (int i = 0; i < NAME(DOT_QUERIES); i++) {
        const NAME(vector) y = NAME(load)(query + i * query_stride + d);
#pragma GCC unroll 4
        for (int r = 0; r < NAME(DOT_KEYS); r++) {
          sum[r * NAME(DOT_QUERIES) + i] = NAME(fma)(x[r], y, sum[r * NAME(DOT_QUERIES) + i]);
        }
      }
    }
  } while (d < columns);
  return NAME(sums_of)(sum);
}

// S^T = K Q^T, with `pairs` times `rest`.
static inline __attribute__((always_inline)) void NAME(scores_of)(int dtype, bool pairs, const NAME(raw_rows) * key,
                                                                  const NAME(raw_rows) * next,
                                                                  const NAME(course) * course, const REAL *query,
                                                                  int64_t query_stride, int queries, int columns,
                                                                  REAL rest, const NAME(few_layout) * layout,
                                                                  REAL *to) {
  const bool even = course->rows == course->streams * course->steps;
  const int64_t across = course->steps * key->stride;
  for (int step = 0; step < course->steps; step++) {
    const NAME(raw_rows) ahead = NAME(rows_ahead)(course, key, next, step);
    const int64_t ahead_across = course->steps * ahead.stride;
    const char *first = key->first + step * key->stride, *called = ahead.first;
    for (int stream = 0; stream < course->streams; stream += NAME(DOT_KEYS)) {
      if (!even && stream * course->steps + step >= course->rows) break;
      const char *row[NAME(DOT_KEYS)], *call[NAME(DOT_KEYS)];
#pragma GCC unroll 4
      for (int r = 0; r < NAME(DOT_KEYS); r++, first += across, called += ahead_across) {
        row[r] = first;
        call[r] = called;
        if (!even && (stream + r) * course->steps + step >= course->rows) row[r] = key->first + step * key->stride;
      }
      for (int q = 0; q < queries; q += NAME(DOT_QUERIES)) {
        NAME(vector)
        scores = NAME(dots)(dtype, pairs, row, q ? NULL : call, query + q * query_stride, query_stride, columns);
        if (pairs) scores = scores * NAME(set)(rest);
        REAL *at = to + q / NAME(DOT_QUERIES) * layout->group + stream * layout->stream + step * layout->step;
        if (layout->dense) {
          NAME(store)(at, scores);
          continue;
        }
#pragma GCC unroll 4
        for (int r = 0; r < NAME(DOT_KEYS); r++, at += layout->stream) {
          if ((stream + r) * course->steps + step >= course->rows) break;
          NAME(store_lanes)(scores, r * NAME(DOT_QUERIES), q == 0, at);
        }
      }
    }
  }
}

// A tile of o, DOT_QUERIES x `vectors`, from column d on: times `factor` (NULL: 1), or from 0, and then the rows of the
// steps [from, end). `ahead`: whether to call for what comes.
static inline __attribute__((always_inline)) void NAME(row_tile)(int dtype, int vectors, const NAME(raw_rows) * value,
                                                                 const NAME(raw_rows) * next,
                                                                 const NAME(course) * course, int from, int end,
                                                                 bool ahead, const NAME(few_layout) * layout,
                                                                 const REAL *weights, const REAL *factor,
                                                                 bool from_zero, int d, REAL *o, int64_t o_row) {
  const int halves = dtype == SA_BF16 ? 2 : 1, size = dtype == DTYPE ? sizeof(REAL) : 2;
  NAME(vector) sum[NAME(DOT_QUERIES)][4];
#pragma GCC unroll 4
  for (int i = 0; i < NAME(DOT_QUERIES); i++) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
      sum[i][j] = NAME(set)(0);
      if (!from_zero) sum[i][j] = NAME(load)(o + i * o_row + d + j * LANES);
      if (factor) sum[i][j] = sum[i][j] * NAME(set)(factor[i]);
    }
  }
  const int64_t across = course->steps * value->stride;
  const char *first = value->first + from * value->stride + d * size;
  const REAL *weights_first = weights + from * layout->step;
  NAME(raw_rows) call = {0};
  for (int step = from; step < end; step++) {
    if (step == from || step == course->steps - course->ahead) call = NAME(rows_ahead)(course, value, next, step);
    const char *row = first, *called = call.first + d * size;
    const REAL *weight = weights_first;
    for (int at = step; at < course->rows; at += course->steps) {
      if (ahead) {
#pragma GCC unroll 4
        for (int byte = 0; byte < vectors * LANES * size; byte += 64) __builtin_prefetch(called + byte, 0, 2);
      }
      NAME(vector) x[4];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) x[j] = NAME(raw_vector)(dtype, row, j * LANES, j % halves);
#pragma GCC unroll 4
      for (int i = 0; i < NAME(DOT_QUERIES); i++) {
        const NAME(vector) w = NAME(set)(weight[i]);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) sum[i][j] = NAME(fma)(w, x[j], sum[i][j]);
      }
      row += across;
      called += course->steps * call.stride;
      weight += layout->stream;
    }
    first += value->stride;
    call.first += call.stride;
    weights_first += layout->step;
  }
#pragma GCC unroll 4
  for (int i = 0; i < NAME(DOT_QUERIES); i++) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) NAME(store)(o + i * o_row + d + j * LANES, sum[i][j]);
  }
}

// o = o * factor + P V (factor NULL: o starts), for some rows at a time, which are then in the first cache.
static inline __attribute__((always_inline)) void NAME(rows_added)(int dtype, const NAME(raw_rows) * value,
                                                                   const NAME(raw_rows) * next,
                                                                   const NAME(course) * course,
                                                                   const NAME(few_layout) * layout, const REAL *weights,
                                                                   const REAL *factor, int queries, int columns,
                                                                   REAL *o, int64_t o_row) {
  const int least = dtype == SA_BF16 ? 2 : 1, some = NAME(HELD_ROWS) / course->streams;
  for (int from = 0; from < course->steps; from += some) {
    const int end = from + some < course->steps ? from + some : course->steps;
    const REAL *weight = weights;
    for (int q = 0; q < queries; q += NAME(DOT_QUERIES), weight += layout->group) {
      const REAL *times = factor && !from ? factor + q : NULL;
      const bool from_zero = !factor && !from;
      REAL *to = o + q * o_row;
      int d = 0;
      for (; d + TILE_VECTORS * LANES <= columns; d += TILE_VECTORS * LANES) {
        NAME(row_tile)
        (dtype, TILE_VECTORS, value, next, course, from, end, !q, layout, weight, times, from_zero, d, to, o_row);
      }
      for (; d < columns; d += least * LANES) {
        NAME(row_tile)
        (dtype, least, value, next, course, from, end, !q, layout, weight, times, from_zero, d, to, o_row);
      }
    }
  }
}

// Functions for each dtype that rows can have, and for pairs of bf16.
#define SA_FEW_SCORES(WHICH, OF, PAIRS)                                                                        \
  static __attribute__((noinline)) void NAME(scores_##WHICH)(                                                  \
      const NAME(raw_rows) * key, const NAME(raw_rows) * next, const NAME(course) * course, const REAL *query, \
      int64_t query_stride, int queries, int columns, REAL rest, const NAME(few_layout) * layout, REAL * to) { \
    NAME(scores_of)(OF, PAIRS, key, next, course, query, query_stride, queries, columns, rest, layout, to);    \
  }
#define SA_FEW(WHICH, OF)                                                                                          \
  SA_FEW_SCORES(WHICH, OF, false)                                                                                  \
  static __attribute__((noinline)) void NAME(rows_added_##WHICH)(                                                  \
      const NAME(raw_rows) * value, const NAME(raw_rows) * next, const NAME(course) * course,                      \
      const NAME(few_layout) * layout, const REAL *weights, const REAL *factor, int queries, int columns, REAL *o, \
      int64_t o_row) {                                                                                             \
    NAME(rows_added)(OF, value, next, course, layout, weights, factor, queries, columns, o, o_row);                \
  }
SA_FEW(own, DTYPE)
#if MANTISSA_BITS == 23
SA_FEW(f16, SA_F16)
SA_FEW(bf16, SA_BF16)
#define SA_FEW_OF(NAME_OF, DTYPE_OF) \
  (DTYPE_OF == SA_BF16 ? NAME(NAME_OF##_bf16) : DTYPE_OF == SA_F16 ? NAME(NAME_OF##_f16) : NAME(NAME_OF##_own))
#else
#define SA_FEW_OF(NAME_OF, DTYPE_OF) NAME(NAME_OF##_own)
#endif
#ifdef OWN_PAIRS
SA_FEW_SCORES(pairs, SA_BF16, true)
#define SA_FEW_SCORES_OF(PAIRS, DTYPE_OF) (PAIRS ? NAME(scores_pairs) : SA_FEW_OF(scores, DTYPE_OF))
#else
#define SA_FEW_SCORES_OF(PAIRS, DTYPE_OF) SA_FEW_OF(scores, DTYPE_OF)
#endif
#undef SA_FEW_SCORES
#undef SA_FEW

// Whether a stretch's scores lie dense: nothing looks at them but the softmax, and they are whole vectors.
static bool NAME(lies_dense)(const NAME(block) * block, const sa_stretch *stretch) {
  return block->few && block->plain && !stretch->pattern && !(block->p->dropout > 0) && stretch->count % SEGMENT == 0;
}

// S^T of a stretch, 0 in the lanes beyond the queries. `key`: K's rows, converted, when they are not readable.
static void NAME(score_few)(const NAME(block) * block, const sa_stretch *stretch, const REAL *key, int64_t key_stride,
                            const REAL *query, bool dense, REAL *scores) {
  const sa_problem *p = block->p;
  NAME(raw_rows) rows = {(const char *)key, key_stride * (int64_t)sizeof *key, DTYPE};
  if (NAME(readable)(&p->k, p->width)) rows = NAME(raw_rows_of)(&p->k, block, stretch->first);
  if (!p->width) {
    memset(scores, 0, sizeof *scores * stretch->count * NAME(ROW));
    return;
  }
  const NAME(raw_rows) next = NAME(raw_rows_of)(&p->v, block, stretch->first);
  const NAME(course) course = NAME(course_of)(p, stretch->count, rows.stride);
  const NAME(few_layout) layout = NAME(few_layout_of)(&course, dense);
  REAL rest;
  NAME(scale_of_queries)(block, &rest);
  SA_FEW_SCORES_OF(NAME(pairs)(block), rows.dtype)
  (&rows, &next, &course, query, NAME(padded)(p->width), block->count, NAME(columns)(p->width), rest, &layout, scores);
}

// o = o * factor + P V, V's rows as they lie or of REAL.
static void NAME(add_few_values)(const NAME(block) * block, const sa_stretch *stretch, const NAME(raw_rows) * value,
                                 const REAL *weights, bool dense, const REAL *factor, REAL *o) {
  const sa_problem *p = block->p;
  const NAME(raw_rows) next = NAME(raw_rows_of)(&p->k, block, stretch->first + stretch->count);
  const NAME(course) course = NAME(course_of)(p, stretch->count, value->stride);
  const NAME(few_layout) layout = NAME(few_layout_of)(&course, dense);
  SA_FEW_OF(rows_added, value->dtype)
  (value, &next, &course, &layout, weights, factor, block->count, NAME(columns)(p->value_width), o,
   NAME(padded)(p->value_width));
}
#undef SA_FEW_OF
#undef SA_FEW_SCORES_OF

// Lane i of the result is lane i + by, going round.
static inline __attribute__((always_inline)) NAME(vector) NAME(rotated)(NAME(vector) x, int by) {
  NAME(order) pick;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) pick[i] = (BITS)((i + by) % LANES);
  return __builtin_shuffle(x, pick);
}

// What DOT_QUERIES queries have, in the lanes of each.
static inline __attribute__((always_inline)) NAME(vector) NAME(spread)(const REAL *from) {
  NAME(order) pick;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) pick[i] = (BITS)(i % NAME(DOT_QUERIES));
  return __builtin_shuffle(NAME(load)(from), pick);
}

// P^T in place of S^T that lies dense, with the running peak, sum and the factor that the old peak costs, as `soften`
// does it where every query has a column of vectors.
static void NAME(soften_few)(const NAME(block) * block, int keys, REAL *scores, NAME(gathered) * gathered,
                             REAL *factor) {
  const NAME(vector) lowest = NAME(set)(-(REAL)INFINITY);
  const int some = NAME(DOT_QUERIES) * sizeof(REAL);
  for (int q = 0; q < block->count; q += NAME(DOT_QUERIES), scores += keys * NAME(DOT_QUERIES)) {
    const NAME(vector) old = NAME(spread)(gathered->peak + q);
    NAME(vector) tops[4] = {old, old, old, old}, sums[4] = {NAME(set)(0), NAME(set)(0), NAME(set)(0), NAME(set)(0)};
    REAL *const end = scores + keys * NAME(DOT_QUERIES);
    for (const REAL *at = scores; at < end; at += 4 * LANES) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) tops[k] = NAME(max)(NAME(load)(at + k * LANES), tops[k]);
    }
    NAME(vector) top = NAME(max)(NAME(max)(tops[0], tops[1]), NAME(max)(tops[2], tops[3]));
#pragma GCC unroll 4
    for (int n = NAME(DOT_QUERIES); n < LANES; n *= 2) top = NAME(max)(NAME(rotated)(top, n), top);
    const NAME(vector) base = NAME(select)(NAME(below_or_equal)(top, lowest), NAME(set)(0), top);
    const NAME(vector) decay = NAME(exp2)(old - base);
    for (REAL *at = scores; at < end; at += 4 * LANES) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        const NAME(vector) w = NAME(exp2)(NAME(load)(at + k * LANES) - base);
        NAME(store)(at + k * LANES, w);
        sums[k] = sums[k] + w;
      }
    }
    NAME(vector) total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma GCC unroll 4
    for (int n = NAME(DOT_QUERIES); n < LANES; n *= 2) total = total + NAME(rotated)(total, n);
    total = NAME(fma)(NAME(spread)(gathered->sum + q), decay, total);
    memcpy(gathered->peak + q, &top, some);
    memcpy(gathered->sum + q, &total, some);
    memcpy(factor + q, &decay, some);
  }
}

// Rows of Q in the order of K's elements, and rows of o out of that of V's.
static void NAME(split_row)(REAL *row, int width) {
  for (int d = 0; d < width; d += 2 * LANES) {
    REAL even[LANES], odd[LANES];
    for (int i = 0; i < LANES; i++) {
      even[i] = row[d + 2 * i];
      odd[i] = row[d + 2 * i + 1];
    }
    memcpy(row + d, even, sizeof even);
    memcpy(row + d + LANES, odd, sizeof odd);
  }
}

static void NAME(join_row)(REAL *row, int width) {
  const NAME(order) low = {SA_LOW}, high = {SA_HIGH};
  for (int d = 0; d < width; d += 2 * LANES) {
    const NAME(vector) even = NAME(load)(row + d), odd = NAME(load)(row + d + LANES);
    NAME(store)(row + d, __builtin_shuffle(even, odd, low));
    NAME(store)(row + d + LANES, __builtin_shuffle(even, odd, high));
  }
}
