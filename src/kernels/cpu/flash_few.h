// the products of few queries (decoding), whose speed is to be that of memory, for one REAL; part of flash_product.h
//
// Scores are dot products along the width: vectors of K meet vectors of Q. o takes whole rows of V. Both are read once
// and where they lie, for four queries at a time, and halves become floats in registers. A vector of bf16 is one of
// words with two elements each: a shift and a mask make two vectors of floats of it, those of the even and of the odd
// elements, and Q and o are in that order then (`split`). In the second cache a key of 128 bf16 takes 25 ns with
// AVX-512; converting rows first took 75.
//
// Rows 8 KiB further on are called for, into the second cache, one line after the other and few at a time: in bursts
// the calls find the processor's buffers full, and in another order the hardware, which calls for the lines that
// follow, does not see that they do.
enum { NAME(AHEAD) = 8 << 10 };

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

// Those that are called for while they are read.
static NAME(raw_rows) NAME(rows_ahead)(const NAME(raw_rows) * rows) {
  NAME(raw_rows) ahead = *rows;
  if (rows->stride > 0) ahead.first += NAME(AHEAD) / rows->stride * rows->stride;
  return ahead;
}

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

// Scores of DOT_KEYS keys and DOT_QUERIES queries at once make LANES sums; interleaving and adding, log2(LANES) times
// over, leaves one of them in each lane.
enum { NAME(DOT_QUERIES) = LANES < 4 ? LANES : 4, NAME(DOT_KEYS) = LANES / NAME(DOT_QUERIES) };

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

// to[key][ROW] = K Q^T.
static inline __attribute__((always_inline)) void NAME(dots_of)(int dtype, const NAME(raw_rows) * key, int keys,
                                                                const REAL *query, int64_t query_stride, int queries,
                                                                int columns, REAL *to) {
  const int halves = dtype == SA_BF16 ? 2 : 1;
  const NAME(raw_rows) next = NAME(rows_ahead)(key);
  // From one line to that of the next key, and from these to the next ones.
  const bool dense = next.stride == columns * (VECTOR_BYTES / LANES) / halves;
  const int64_t across = dense ? VECTOR_BYTES : next.stride, onward = dense ? NAME(DOT_KEYS) * across : VECTOR_BYTES;
  for (int first = 0; first < keys; first += NAME(DOT_KEYS)) {
    const char *row[NAME(DOT_KEYS)], *call = next.first + first * next.stride;
#pragma GCC unroll 4
    for (int r = 0; r < NAME(DOT_KEYS); r++) row[r] = key->first + (first + r < keys ? first + r : first) * key->stride;
    for (int q = 0; q < queries; q += NAME(DOT_QUERIES)) {
      NAME(vector) sum[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) sum[i] = NAME(set)(0);
      int d = 0;
      do {
#pragma GCC unroll 4
        for (int r = 0; r < NAME(DOT_KEYS) && q == 0; r++) __builtin_prefetch(call + r * across, 0, 2);
        call += onward;
#pragma GCC unroll 2
        for (int half = 0; half < halves; half++, d += LANES) {
          NAME(vector) x[NAME(DOT_KEYS)];
#pragma GCC unroll 4
          for (int r = 0; r < NAME(DOT_KEYS); r++) x[r] = NAME(raw_vector)(dtype, row[r], d, half);
#pragma GCC unroll 4
          for (int i = 0; i < NAME(DOT_QUERIES); i++) {
            const NAME(vector) y = NAME(load)(query + (q + i) * query_stride + d);
#pragma GCC unroll 4
            for (int r = 0; r < NAME(DOT_KEYS); r++) {
              sum[r * NAME(DOT_QUERIES) + i] = NAME(fma)(x[r], y, sum[r * NAME(DOT_QUERIES) + i]);
            }
          }
        }
      } while (d < columns);
      const NAME(vector) sums = NAME(sums_of)(sum);
#pragma GCC unroll 4
      for (int r = 0; r < NAME(DOT_KEYS); r++) {
        if (first + r == keys) break;
        NAME(store_lanes)(sums, r * NAME(DOT_QUERIES), q == 0, to + (first + r) * NAME(ROW) + q);
      }
    }
  }
}

// A tile of o, DOT_QUERIES x `vectors`: times `factor` (NULL: 1), or from 0, and then its keys in rising order.
static inline __attribute__((always_inline)) void NAME(row_tile)(int dtype, int vectors, const NAME(raw_rows) * value,
                                                                 int keys, const REAL *weights, const REAL *factor,
                                                                 bool from_zero, int d, int columns, REAL *o,
                                                                 int64_t o_row) {
  const int halves = dtype == SA_BF16 ? 2 : 1;
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
  const NAME(raw_rows) next = NAME(rows_ahead)(value);
  const int64_t wide = vectors * VECTOR_BYTES / halves, at = d * (VECTOR_BYTES / LANES) / halves;
  const bool dense = next.stride == columns * (VECTOR_BYTES / LANES) / halves;
  const int64_t onward = dense ? wide : next.stride;
  const char *row = value->first, *call = next.first + (dense ? at * keys : at);
  for (int r = 0; r < keys; r++, row += value->stride, call += onward) {
#pragma GCC unroll 4
    for (int byte = 0; byte < wide; byte += 64) __builtin_prefetch(call + byte, 0, 2);
    NAME(vector) x[4];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) x[j] = NAME(raw_vector)(dtype, row, d + j * LANES, j % halves);
#pragma GCC unroll 4
    for (int i = 0; i < NAME(DOT_QUERIES); i++) {
      const NAME(vector) w = NAME(set)(weights[r * NAME(ROW) + i]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) sum[i][j] = NAME(fma)(w, x[j], sum[i][j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < NAME(DOT_QUERIES); i++) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) NAME(store)(o + i * o_row + d + j * LANES, sum[i][j]);
  }
}

// o = o * factor + P V (factor NULL: o starts), for some keys at a time, whose rows are then in the first cache.
static inline __attribute__((always_inline)) void NAME(add_rows_of)(int dtype, const NAME(raw_rows) * value, int keys,
                                                                    const REAL *weights, const REAL *factor,
                                                                    int queries, int columns, REAL *o, int64_t o_row) {
  enum { SOME = 32 };
  const int least = dtype == SA_BF16 ? 2 : 1;
  for (int first = 0; first < keys; first += SOME) {
    const NAME(raw_rows) some = {value->first + first * value->stride, value->stride, value->dtype};
    const int count = keys - first < SOME ? keys - first : SOME;
    for (int q = 0; q < queries; q += NAME(DOT_QUERIES)) {
      const REAL *weight = weights + first * NAME(ROW) + q, *times = factor && !first ? factor + q : NULL;
      REAL *to = o + q * o_row;
      int d = 0;
      for (; d + TILE_VECTORS * LANES <= columns; d += TILE_VECTORS * LANES) {
        NAME(row_tile)(dtype, TILE_VECTORS, &some, count, weight, times, !factor && !first, d, columns, to, o_row);
      }
      for (; d < columns; d += least * LANES) {
        NAME(row_tile)(dtype, least, &some, count, weight, times, !factor && !first, d, columns, to, o_row);
      }
    }
  }
}

// Functions for each dtype that rows can have.
#define SA_FEW(WHICH, OF)                                                                                              \
  static __attribute__((noinline)) void NAME(dots_##WHICH)(const NAME(raw_rows) * key, int keys, const REAL *query,    \
                                                           int64_t query_stride, int queries, int columns, REAL *to) { \
    NAME(dots_of)(OF, key, keys, query, query_stride, queries, columns, to);                                           \
  }                                                                                                                    \
  static __attribute__((noinline)) void NAME(add_rows_##WHICH)(const NAME(raw_rows) * value, int keys,                 \
                                                               const REAL *weights, const REAL *factor, int queries,   \
                                                               int columns, REAL *o, int64_t o_row) {                  \
    NAME(add_rows_of)(OF, value, keys, weights, factor, queries, columns, o, o_row);                                   \
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
#undef SA_FEW

// S^T of a stretch, 0 in the lanes beyond the queries. `key`: K's rows, converted, when they are not readable.
static void NAME(score_few)(const NAME(block) * block, const sa_stretch *stretch, const REAL *key, int64_t key_stride,
                            const REAL *query, REAL *scores) {
  const sa_problem *p = block->p;
  NAME(raw_rows) rows = {(const char *)key, key_stride * (int64_t)sizeof *key, DTYPE};
  if (NAME(readable)(&p->k, p->width)) rows = NAME(raw_rows_of)(&p->k, block, stretch->first);
  if (!p->width) {
    for (int r = 0; r < stretch->count; r++) memset(scores + r * NAME(ROW), 0, sizeof *scores * block->vectors * LANES);
    return;
  }
  SA_FEW_OF(dots, rows.dtype)
  (&rows, stretch->count, query, NAME(padded)(p->width), block->count, NAME(columns)(p->width), scores);
}

// o = o * factor + P V, V's rows as they lie or of REAL.
static void NAME(add_few_values)(const NAME(block) * block, const sa_stretch *stretch, const NAME(raw_rows) * value,
                                 const REAL *weights, const REAL *factor, REAL *o) {
  const sa_problem *p = block->p;
  SA_FEW_OF(add_rows, value->dtype)
  (value, stretch->count, weights, factor, block->count, NAME(columns)(p->value_width), o,
   NAME(padded)(p->value_width));
}
#undef SA_FEW_OF

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
