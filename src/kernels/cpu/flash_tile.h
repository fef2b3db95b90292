// register tiles, packing and score tiles, for one REAL; part of flash.h

// Rows of 64 queries lie this far apart: a cache line more than they need, because the lines of a column of tiles, a
// power of two apart, would all fall into a few sets of the first cache.
enum { NAME(ROW) = QUERIES + 64 / sizeof(REAL) };

// The columns that a row of so many elements takes in whole vectors, and how far apart such rows lie in a worker's own
// memory: likewise a line more where they would be a multiple of four lines apart.
static inline int NAME(columns)(int64_t width) {
  return (int)((width + LANES - 1) / LANES * LANES);
}
static inline int64_t NAME(padded)(int64_t width) {
  const int64_t columns = NAME(columns)(width), line = 64 / sizeof(REAL);
  return columns % (4 * line) ? columns : columns + line;
}

// How a product starts: from 0, from what c holds, or from that times a factor per row.
#ifndef SAFEATTN_PRODUCT_START
#define SAFEATTN_PRODUCT_START
typedef enum sa_product_start { SA_FROM_ZERO, SA_FROM_SELF, SA_FROM_SCALED } sa_product_start;
#endif

// A strip of register tiles, one below the other: each is c[rows][vectors * LANES] = start + a b, where a's element
// (i, k) is a[i * a_stride + k], or a[i + k * a_stride] when a is `turned`. Every accumulator is one chain of fused
// multiply-adds over k in rising order, so an element's bits do not depend on the tile that computed it: backward gets
// the very scores of the forward. `peak` (may be NULL) is raised to the largest of each column on the way out, while
// the sums are still in registers.
static inline __attribute__((always_inline)) void NAME(strip)(bool turned, int rows, int vectors, int tiles,
                                                              const REAL *restrict a, int64_t a_stride,
                                                              const REAL *restrict b, int64_t b_row, REAL *restrict c,
                                                              int64_t c_row, int depth, sa_product_start start,
                                                              const REAL *restrict factor, REAL *restrict peak) {
  for (int tile = 0; tile < tiles; tile++) {
    NAME(vector) sum[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) {
        sum[i][j] = NAME(set)(0);
        if (start != SA_FROM_ZERO) sum[i][j] = NAME(load)(c + i * c_row + j * LANES);
        if (turned && start == SA_FROM_SCALED) sum[i][j] = sum[i][j] * NAME(set)(factor[i]);
      }
    }
    const REAL *left = a, *right = b;
    for (int k = 0; k < depth; k++) {
      NAME(vector) row[4];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) row[j] = NAME(load)(right + j * LANES);
#pragma GCC unroll 6
      for (int i = 0; i < rows; i++) {
        const NAME(vector) x = NAME(set)(turned ? left[i] : left[i * a_stride]);
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) sum[i][j] = NAME(fma)(x, row[j], sum[i][j]);
      }
      left += turned ? a_stride : 1;
      right += b_row;
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) NAME(store)(c + i * c_row + j * LANES, sum[i][j]);
    }
    if (!turned && peak) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) {
        NAME(vector) top = NAME(load)(peak + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) top = NAME(max)(sum[i][j], top);
        NAME(store)(peak + j * LANES, top);
      }
    }
    a += turned ? rows : rows * a_stride;
    c += rows * c_row;
    if (turned && start == SA_FROM_SCALED) factor += rows;
  }
}

// One function a shape: inlined into a larger one, the 6 x 4 tile spilled 3 of its 24 accumulators. The strip's loop is
// inside, because a tile of 64 steps takes no longer than some 400 cycles, of which a call cost 30.
#define SA_STRIP(R, V)                                                                                              \
  static __attribute__((noinline)) void NAME(strip_##R##x##V)(                                                      \
      int tiles, const REAL *restrict a, int64_t a_stride, const REAL *restrict b, int64_t b_row, REAL *restrict c, \
      int64_t c_row, int depth, sa_product_start start, const REAL *factor, REAL *peak) {                           \
    NAME(strip)(false, R, V, tiles, a, a_stride, b, b_row, c, c_row, depth, start, factor, peak);                   \
  }                                                                                                                 \
  static __attribute__((noinline)) void NAME(turned_##R##x##V)(                                                     \
      int tiles, const REAL *restrict a, int64_t a_stride, const REAL *restrict b, int64_t b_row, REAL *restrict c, \
      int64_t c_row, int depth, sa_product_start start, const REAL *factor, REAL *peak) {                           \
    NAME(strip)(true, R, V, tiles, a, a_stride, b, b_row, c, c_row, depth, start, factor, peak);                    \
  }
#define SA_STRIPS(V) SA_STRIP(1, V) SA_STRIP(2, V) SA_STRIP(3, V) SA_STRIP(4, V) SA_STRIP(5, V) SA_STRIP(6, V)
SA_STRIPS(1)
SA_STRIPS(2)
#if TILE_VECTORS == 4
SA_STRIPS(4)
#endif
#undef SA_STRIPS
#undef SA_STRIP

typedef void (*NAME(strip_function))(int, const REAL *, int64_t, const REAL *, int64_t, REAL *, int64_t, int,
                                     sa_product_start, const REAL *, REAL *);
#define SA_STRIP_ROW(WAY, V)                                                                             \
  {                                                                                                      \
    NULL, NAME(WAY##_1x##V), NAME(WAY##_2x##V), NAME(WAY##_3x##V), NAME(WAY##_4x##V), NAME(WAY##_5x##V), \
        NAME(WAY##_6x##V)                                                                                \
  }
static const NAME(strip_function) NAME(strips)[2][TILE_VECTORS == 4 ? 3 : 2][7] = {
    {SA_STRIP_ROW(strip, 1), SA_STRIP_ROW(strip, 2),
#if TILE_VECTORS == 4
     SA_STRIP_ROW(strip, 4)
#endif
    },
    {SA_STRIP_ROW(turned, 1), SA_STRIP_ROW(turned, 2),
#if TILE_VECTORS == 4
     SA_STRIP_ROW(turned, 4)
#endif
    },
};
#undef SA_STRIP_ROW

// c[rows][columns] = start + a b, columns a multiple of LANES; a's element (i, k) at a[i * a_row + k * a_step], one of
// the two being 1. `peak` is for an a with a_step 1. Every column of tiles reads all of a block of a's rows, which
// therefore is to stay in the first cache beside a column of b: with all rows at once AVX2 lost 8 % in double.
static void NAME(product)(const REAL *a, int64_t a_row, int64_t a_step, const REAL *b, int64_t b_row, REAL *c,
                          int64_t c_row, int rows, int columns, int depth, sa_product_start start, const REAL *factor,
                          REAL *peak) {
  enum { CACHED = 18 << 10 };
  const bool turned = a_step != 1;
  const int64_t a_stride = turned ? a_step : a_row;
  const int fitting = depth ? CACHED / (int)sizeof(REAL) / depth : rows;
  const int block = fitting >= rows ? rows : fitting < 12 ? 12 : fitting / 6 * 6;
  for (int row = 0; row < rows; row += block) {
    const int count = rows - row < block ? rows - row : block;
    const int whole = count / 6, rest = count % 6;
    for (int column = 0; column < columns;) {
      int shape = TILE_VECTORS == 4 ? 2 : 1;
      while ((LANES << shape) > columns - column) shape--;
      const NAME(strip_function) *strips = NAME(strips)[turned][shape];
      REAL *top = peak ? peak + column : NULL;
      if (whole) {
        strips[6](whole, a + row * a_row, a_stride, b + column, b_row, c + row * c_row + column, c_row, depth, start,
                  factor ? factor + row : NULL, top);
      }
      if (rest) {
        const int last = row + whole * 6;
        strips[rest](1, a + last * a_row, a_stride, b + column, b_row, c + last * c_row + column, c_row, depth, start,
                     factor ? factor + last : NULL, top);
      }
      column += LANES << shape;
    }
  }
}

// From so many queries on, products by tiles cost no more than dot products, whose speed is that of memory.
enum { NAME(FEW) = 8 };

// One block of queries of one head, and how its scores are made.
typedef struct NAME(block) {
  const sa_problem *p;
  int64_t batch, head, key_head, plane, query;
  int count;    // queries, at most QUERIES
  int each;     // of one head: a block may hold those of several neighbouring heads, one head after the other
  int vectors;  // of queries
  bool few;     // queries: scores are then dot products along the width
  bool plain;   // scores are q . k alone; they then carry log2 e in Q's scale
  REAL unit;    // times this, a difference of scores is an exponent of 2
  REAL slope;   // of ALiBi
} NAME(block);

// How many heads a block holds: all that read one key head, when their queries are few and see the same keys, so that K
// and V are read once for all of them. At least 1, also where there are no heads at all.
static int64_t NAME(heads_together)(const sa_problem *p) {
  const int64_t group = p->heads / p->key_heads;
  const bool alone = p->bias.data || p->alibi.data || p->weights.data || p->dropout > 0 || p->plan->heads != 1;
  return alone || group == 0 || p->queries * group > QUERIES / 2 ? 1 : group;
}

static NAME(block) NAME(block_at)(const sa_problem *p, int64_t batch, int64_t head, int64_t index, int64_t heads) {
  const int64_t query = index * QUERIES;
  const int64_t left = p->queries - query;
  const int each = left < QUERIES ? (int)left : QUERIES, count = each * (int)heads;
  const bool plain = !p->bias.data && !p->alibi.data && p->softcap == 0;
  NAME(block)
  block = {
      .p = p,
      .batch = batch,
      .head = head,
      .key_head = head / (p->heads / p->key_heads),
      .plane = sa_plan_plane(p->plan, batch, head),
      .query = query,
      .count = count,
      .each = each,
      .vectors = (count + LANES - 1) / LANES,
      // By the shape alone, so that forward and backward agree to the bit.
      .few = p->queries * (p->heads / p->key_heads) <= NAME(FEW),
      .plain = plain,
      // In base 2 a bias of the dtype's minimum would overflow to -inf, which is a different number; so scores that
      // take a bias stay in natural units, and one multiplication more turns differences into exponents.
      .unit = plain ? 1 : (REAL)1.4426950408889634,
      .slope = 0,
  };
  if (p->alibi.data) NAME(read_row)(sa_at(&p->alibi, 0, head, 0, 0), p->alibi.dtype, 1, &block.slope);
  return block;
}

// Where row i of a block lies.
static inline void *NAME(row_at)(const sa_operand *x, const NAME(block) * block, int i) {
  return sa_at(x, block->batch, block->head + i / block->each, block->query + i % block->each, 0);
}

// What interleaves the low and the high halves of two vectors.
typedef BITS NAME(order) __attribute__((vector_size(LANES * sizeof(REAL))));
#if LANES == 2
#define SA_LOW 0, 2
#define SA_HIGH 1, 3
#elif LANES == 4
#define SA_LOW 0, 4, 1, 5
#define SA_HIGH 2, 6, 3, 7
#elif LANES == 8
#define SA_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define SA_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define SA_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SA_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif
// The columns of a square of LANES x LANES. Interleaving every row with the one half the square below it, log2(LANES)
// times over, is a transposition.
static inline __attribute__((always_inline)) void NAME(columns_of)(const REAL *from, int64_t from_row,
                                                                   NAME(vector) column[LANES]) {
  const NAME(order) low = {SA_LOW}, high = {SA_HIGH};
  NAME(vector) next[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) column[i] = NAME(load)(from + i * from_row);
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      next[2 * i] = __builtin_shuffle(column[i], column[i + LANES / 2], low);
      next[2 * i + 1] = __builtin_shuffle(column[i], column[i + LANES / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) column[i] = next[i];
  }
}

// to = from, a square of LANES x LANES, transposed, times factor.
static inline void NAME(transpose)(const REAL *from, int64_t from_row, REAL factor, REAL *to, int64_t to_row) {
  NAME(vector) column[LANES];
  NAME(columns_of)(from, from_row, column);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) NAME(store)(to + i * to_row, column[i] * NAME(set)(factor));
}

// to[column][ROW] = factor * rows, transposed: a vector's worth of rows, `from_row` apart.
static void NAME(turn)(const REAL *rows, int64_t from_row, int width, REAL factor, REAL *to) {
  int d = 0;
  for (; d + LANES <= width; d += LANES) NAME(transpose)(rows + d, from_row, factor, to + d * NAME(ROW), NAME(ROW));
  for (; d < width; d++) {
    for (int i = 0; i < LANES; i++) to[d * NAME(ROW) + i] = rows[i * from_row + d] * factor;
  }
}

// to[dim][ROW] = factor * rows of x, transposed, 0 beyond the block and in the rows whose bit is set in `skip`.
static void NAME(pack)(const sa_operand *x, const NAME(block) * block, int width, REAL factor, uint64_t skip,
                       REAL *to) {
  REAL rows[LANES * SA_FUSED_WIDTH];
  for (int first = 0; first < block->vectors * LANES; first += LANES) {
    for (int i = 0; i < LANES; i++) {
      const bool absent = first + i >= block->count || skip >> (first + i) & 1;
      REAL *row = rows + i * SA_FUSED_WIDTH;
      if (absent)
        memset(row, 0, sizeof *row * width);
      else
        NAME(read_row)
      (NAME(row_at)(x, block, first + i), x->dtype, width, row);
    }
    NAME(turn)(rows, SA_FUSED_WIDTH, width, factor, to + first);
  }
}

// The queries as the scores want them, times scale: packed, or, when they are few, as rows of whole vectors.
static void NAME(pack_query)(const NAME(block) * block, uint64_t skip, REAL *to) {
  const sa_operand *q = &block->p->q;
  const int width = (int)block->p->width;
  const REAL scale = (REAL)(block->p->scale * (block->plain ? 1.4426950408889634 : 1));
  if (!block->few) {
    NAME(pack)(q, block, width, scale, skip, to);
    return;
  }
  for (int i = 0; i < NAME(FEW); i++, to += NAME(padded)(width)) {
    memset(to, 0, sizeof *to * NAME(columns)(width));
    if (i >= block->count || skip >> i & 1) continue;
    NAME(read_row)(NAME(row_at)(q, block, i), q->dtype, width, to);
    for (int d = 0; d < width; d++) to[d] *= scale;
  }
}

// Rows that are wanted soon, one for each key that dot products are at.
#ifndef SAFEATTN_AHEAD
#define SAFEATTN_AHEAD
typedef struct sa_ahead {
  const char *first;
  int64_t row, bytes;  // from one to the next, and of each
} sa_ahead;

static inline void sa_call_row(const sa_ahead *ahead, int key) {
  const char *row = ahead->first + key * ahead->row;
  for (int64_t byte = 0; byte < ahead->bytes; byte += 64) __builtin_prefetch(row + byte);
}
#endif

// Scores of few queries, to[key][ROW], as dot products along the width: vectors of K meet vectors of Q, and K, which
// comes from memory, is read once. LANES sums at a time; interleaving and adding, log2(LANES) times over, leaves one
// sum in each lane. Several rows of K at once are more than the hardware foresees (half of the memory's speed), so K
// and V are called for ahead, row by row.
enum { NAME(DOT_QUERIES) = LANES < 4 ? LANES : 4, NAME(DOT_KEYS) = LANES / NAME(DOT_QUERIES) };

static __attribute__((noinline)) void NAME(dots)(const REAL *key, int64_t key_stride, int keys, const REAL *query,
                                                 int64_t query_stride, int queries, int columns, REAL *to,
                                                 const sa_ahead *next_key, const sa_ahead *next_value) {
  const NAME(order) low = {SA_LOW}, high = {SA_HIGH};
  for (int q = 0; q < queries; q += NAME(DOT_QUERIES), query += NAME(DOT_QUERIES) * query_stride) {
    for (int first = 0; first < keys; first += NAME(DOT_KEYS)) {
      NAME(vector) sum[LANES];
      const REAL *row[NAME(DOT_KEYS)];
#pragma GCC unroll 4
      for (int r = 0; r < NAME(DOT_KEYS); r++) row[r] = key + (first + r < keys ? first + r : first) * key_stride;
      for (int r = first; q == 0 && r < keys && r < first + NAME(DOT_KEYS); r++) {
        sa_call_row(next_key, r);
        sa_call_row(next_value, r);
      }
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) sum[i] = NAME(set)(0);
      for (int d = 0; d < columns; d += LANES) {
        NAME(vector) x[NAME(DOT_KEYS)];
#pragma GCC unroll 4
        for (int r = 0; r < NAME(DOT_KEYS); r++) x[r] = NAME(load)(row[r] + d);
#pragma GCC unroll 4
        for (int i = 0; i < NAME(DOT_QUERIES); i++) {
          const NAME(vector) y = NAME(load)(query + i * query_stride + d);
#pragma GCC unroll 4
          for (int r = 0; r < NAME(DOT_KEYS); r++) {
            sum[r * NAME(DOT_QUERIES) + i] = NAME(fma)(x[r], y, sum[r * NAME(DOT_QUERIES) + i]);
          }
        }
      }
#pragma GCC unroll 4
      for (int n = LANES / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
          sum[i] = __builtin_shuffle(sum[i], sum[i + n], low) + __builtin_shuffle(sum[i], sum[i + n], high);
        }
      }
      REAL lanes[LANES];
      NAME(store)(lanes, sum[0]);
      for (int r = 0; r < NAME(DOT_KEYS) && first + r < keys; r++) {
        memcpy(to + (first + r) * NAME(ROW) + q, lanes + r * NAME(DOT_QUERIES), sizeof *to * NAME(DOT_QUERIES));
      }
    }
  }
}
#undef SA_LOW
#undef SA_HIGH

// `count` rows of K or V from `first` on: in place where the kernels can read them so, else converted into `room`.
static const REAL *NAME(rows_of)(const sa_operand *x, const NAME(block) * block, int64_t first, int count, int width,
                                 bool whole_vectors, REAL *room, int64_t *stride) {
  const int columns = NAME(columns)(width);
  const int64_t padded = NAME(padded)(width);
  if (x->dtype == DTYPE && (!whole_vectors || width == columns)) {
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

// Whether some element is NaN or Inf: x * 0 is then not 0. (An or over flags is a loop that the compiler turns into
// vectors; a sum of x * 0 is not, and took 3 % of the forward.)
static bool NAME(has_nonfinite)(const REAL *rows, int64_t stride, int count, int width) {
  int found = 0;
  for (int r = 0; r < count; r++) {
    for (int d = 0; d < width; d++) found |= rows[r * stride + d] * 0 != 0;
  }
  return found;
}

// Copies rows with every non-finite element replaced by 0.
static void NAME(finite_part)(const REAL *rows, int64_t stride, int count, int width, REAL *to) {
  const int columns = NAME(columns)(width);
  for (int r = 0; r < count; r++) {
    for (int d = 0; d < columns; d++) {
      const REAL x = d < width ? rows[r * stride + d] : 0;
      to[r * NAME(padded)(width) + d] = x * 0 == 0 ? x : 0;
    }
  }
}

// tanh to about 2 ulp: a series near 0, where the quotient would cancel, and (1 - e^-2x) / (1 + e^-2x) beyond.
static inline NAME(vector) NAME(tanh)(NAME(vector) x) {
  const NAME(vector) one = NAME(set)(1), size = NAME(magnitude)(x);
  const NAME(vector) decay = NAME(exp2)(size * NAME(set)((REAL)-2.885390081777926815));
  const NAME(vector) far = (one - decay) / (one + decay);
  const NAME(vector) square = x * x;
  static const REAL terms[] = {NAME(TANH_TERMS)};
  NAME(vector) series = NAME(set)(terms[0]);
  for (int k = 1; k < (int)(sizeof terms / sizeof *terms); k++) series = NAME(fma)(series, square, NAME(set)(terms[k]));
  const NAME(vector) near = NAME(fma)(series * square, x, x);
  const NAME(vector) signed_far = NAME(select)(NAME(below_or_equal)(NAME(set)(0), x), far, -far);
  return NAME(select)(NAME(below_or_equal)(NAME(set)((REAL)0.4), size), signed_far, near);
}

// Room for one stretch of keys against one block.
typedef struct NAME(stretch_room) {
  REAL *scores;       // [KEYS][ROW]: S^T, then P^T
  REAL *bias;         // [KEYS][ROW]
  REAL *capped;       // [KEYS][ROW]: tanh(s / softcap), when the backward wants it
  uint64_t *visible;  // [KEYS]
  uint64_t *kept;     // [KEYS]: what dropout keeps
} NAME(stretch_room);

// Whether some element is -inf.
static bool NAME(has_lowest)(const REAL *row, int count) {
  int found = 0;
  for (int r = 0; r < count; r++) found |= row[r] == -(REAL)INFINITY;
  return found;
}

// Reads a row-major tile of the bias transposed; 0 beyond the block. Returns whether it masks some pair.
static bool NAME(load_bias)(const NAME(block) * block, const sa_stretch *stretch, REAL *to) {
  const sa_operand *bias = &block->p->bias;
  const int count = stretch->count;
  REAL rows[LANES * KEYS];
  bool masks = false;
  for (int first = 0; first < block->vectors * LANES; first += LANES) {
    if (bias->dtype == DTYPE && bias->stride[3] && first + LANES <= block->count) {
      const REAL *from = sa_at(bias, block->batch, block->head, block->query + first, stretch->first);
      for (int i = 0; i < LANES; i++) masks |= NAME(has_lowest)(from + i * bias->stride[2], count);
      NAME(turn)(from, bias->stride[2], count, 1, to + first);
      continue;
    }
    for (int i = 0; i < LANES; i++) {
      REAL *row = rows + i * KEYS;
      if (first + i >= block->count) {
        memset(row, 0, sizeof *row * count);
        continue;
      }
      const void *from = sa_at(bias, block->batch, block->head, block->query + first + i, stretch->first);
      NAME(read_row)(from, bias->dtype, bias->stride[3] ? count : 1, row);
      for (int r = 1; r < count && !bias->stride[3]; r++) row[r] = row[0];
      masks |= NAME(has_lowest)(row, count);
    }
    NAME(turn)(rows, KEYS, count, 1, to + first);
  }
  return masks;
}

// S^T of a stretch for few queries, 0 in the lanes beyond them. V's rows are called for, which are wanted next, and K's
// some rows further on; where K is converted, which has been done for this stretch, those of the next.
static void NAME(score_few)(const NAME(block) * block, const sa_stretch *stretch, const REAL *key, int64_t key_stride,
                            const REAL *query, REAL *scores) {
  const sa_problem *p = block->p;
  const int64_t key_bytes = sa_size_of(p->k.dtype), value_bytes = sa_size_of(p->v.dtype);
  const int64_t further = p->k.dtype == DTYPE ? 8 : stretch->count;
  const sa_ahead next_key = {sa_at(&p->k, block->batch, block->key_head, stretch->first + further, 0),
                             p->k.stride[2] * key_bytes, p->width * key_bytes},
                 next_value = {sa_at(&p->v, block->batch, block->key_head, stretch->first, 0),
                               p->v.stride[2] * value_bytes, p->value_width * value_bytes};
  for (int r = 0; r < stretch->count; r++) {
    for (int i = 0; i < block->vectors * LANES; i += LANES) NAME(store)(scores + r * NAME(ROW) + i, NAME(set)(0));
  }
  NAME(dots)
  (key, key_stride, stretch->count, query, NAME(padded)(p->width), block->count, NAME(columns)(p->width), scores,
   &next_key, &next_value);
}

// The word of a pattern that holds a key's bits for the block: those of one head, for each of its heads.
static inline uint64_t NAME(visible_word)(const NAME(block) * block, const uint64_t *words) {
  const uint64_t word = words[block->query % SA_TILE / QUERIES];
  if (block->each == block->count) return word;
  const uint64_t own = word & ((UINT64_C(1) << block->each) - 1);
  uint64_t all = 0;
  for (int i = 0; i < block->count; i += block->each) all |= own << i;
  return all;
}

// The stretch's rows of a bias that can be added as it lies: whole squares of the work's own dtype, and nothing else to
// do with the scores than to add it. Else NULL.
static const REAL *NAME(plain_bias)(const NAME(block) * block, const sa_stretch *stretch) {
  const sa_problem *p = block->p;
  const sa_operand *bias = &p->bias;
  if (!bias->data || bias->dtype != DTYPE || !bias->stride[3] || stretch->pattern) return NULL;
  if (p->softcap > 0 || p->alibi.data || block->count % LANES || stretch->count % LANES) return NULL;
  const REAL *rows = sa_at(bias, block->batch, block->head, block->query, stretch->first);
  for (int i = 0; i < block->count; i++) {
    if (NAME(has_lowest)(rows + i * bias->stride[2], stretch->count)) return NULL;
  }
  return rows;
}

// S^T += bias^T, square by square; `peak` (may be NULL) is raised to the largest of each query.
static void NAME(add_bias)(const NAME(block) * block, int keys, const REAL *rows, int64_t row, REAL *scores,
                           REAL *peak) {
  for (int first = 0; first < block->count; first += LANES, rows += LANES * row) {
    NAME(vector) top = NAME(set)(-(REAL)INFINITY);
    if (peak) top = NAME(load)(peak + first);
    for (int r = 0; r < keys; r += LANES) {
      NAME(vector) column[LANES];
      NAME(columns_of)(rows + r, row, column);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        REAL *at = scores + (r + i) * NAME(ROW) + first;
        const NAME(vector) s = NAME(load)(at) + column[i];
        NAME(store)(at, s);
        top = NAME(max)(s, top);
      }
    }
    if (peak) NAME(store)(peak + first, top);
  }
}

// Calls for the part of the bias that the next stretch reads and that belongs to queries [first, end). Its rows are
// pages apart, too far for the hardware to foresee, and all at once they would wait for one another.
static void NAME(call_bias)(const NAME(block) * block, const sa_stretch *stretch, int first, int end) {
  const sa_operand *bias = &block->p->bias;
  const int64_t bytes = stretch->count * sa_size_of(bias->dtype);
  for (int i = first; i < end && i < block->count; i++) {
    const char *row = sa_at(bias, block->batch, block->head, block->query + i, stretch->first);
    for (int64_t byte = bytes; byte < 2 * bytes; byte += 64) __builtin_prefetch(row + byte);
  }
}

// S^T of a stretch, as K and Q alone give it.
static void NAME(score_product)(const NAME(block) * block, const sa_stretch *stretch, const REAL *key,
                                int64_t key_stride, const REAL *packed_query, REAL *scores, REAL *peak) {
  const int columns = block->vectors * LANES, keys = stretch->count;
  const bool calls = block->p->bias.data && block->p->bias.stride[3];
  const int step = calls ? 12 : keys;
  for (int r = 0; r < keys; r += step) {
    const int rows = keys - r < step ? keys - r : step;
    NAME(product)
    (key + r * key_stride, key_stride, 1, packed_query, NAME(ROW), scores + r * NAME(ROW), NAME(ROW), rows, columns,
     (int)block->p->width, SA_FROM_ZERO, NULL, peak);
    if (calls) NAME(call_bias)(block, stretch, r * QUERIES / keys, (r + rows) * QUERIES / keys);
  }
}

// S^T of a stretch into room->scores, masked pairs -inf, in the block's unit. `peak` (may be NULL) is raised to the
// largest score of each query. Returns the words of visible pairs, or NULL when every pair is visible.
static const uint64_t *NAME(score)(const NAME(block) * block, const sa_stretch *stretch, const REAL *key,
                                   int64_t key_stride, const REAL *packed_query, const NAME(stretch_room) * room,
                                   REAL *peak) {
  const sa_problem *p = block->p;
  const REAL *plain_bias = NAME(plain_bias)(block, stretch);
  const bool hides = p->bias.data && !plain_bias && NAME(load_bias)(block, stretch, room->bias);
  const bool masked = stretch->pattern || hides, final = !masked && block->plain;
  if (block->few) {
    NAME(score_few)(block, stretch, key, key_stride, packed_query, room->scores);
  } else {
    NAME(score_product)(block, stretch, key, key_stride, packed_query, room->scores, final ? peak : NULL);
    if (final) return NULL;
  }
  if (plain_bias) {
    NAME(add_bias)(block, stretch->count, plain_bias, p->bias.stride[2], room->scores, peak);
    return NULL;
  }
  if (masked) {
    for (int r = 0; r < stretch->count; r++) {
      room->visible[r] = stretch->pattern ? NAME(visible_word)(block, stretch->pattern[r]) : ~UINT64_C(0);
    }
  }
  const NAME(vector) nothing = NAME(set)(-(REAL)INFINITY);
  const NAME(vector) cap = NAME(set)((REAL)p->softcap), slope = NAME(set)(block->slope);
  REAL lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = (REAL)i;
  for (int j = 0; j < block->vectors; j++) {
    NAME(vector) top = peak ? NAME(load)(peak + j * LANES) : nothing;
    // Counted from the block's first query, so that distances stay exact however long the sequence.
    const NAME(vector) offset = NAME(load)(lanes) + NAME(set)((REAL)(j * LANES));
    const int64_t origin = block->query + p->diagonal;
    REAL *column = room->scores + j * LANES;
    for (int r = 0; r < stretch->count; r++, column += NAME(ROW)) {
      NAME(vector) s = NAME(load)(column);
      if (!block->plain) {
        if (p->softcap > 0) {
          const NAME(vector) bounded = NAME(tanh)(s / cap);
          if (room->capped) NAME(store)(room->capped + r * NAME(ROW) + j * LANES, bounded);
          s = bounded * cap;
        }
        if (p->bias.data) {
          const NAME(vector) b = NAME(load)(room->bias + r * NAME(ROW) + j * LANES);
          if (hides) room->visible[r] &= ~(NAME(below_or_equal)(b, nothing) << (j * LANES));
          s = s + b;
        }
        if (p->alibi.data) s = s - slope * NAME(magnitude)(NAME(set)((REAL)(stretch->first + r - origin)) - offset);
      }
      if (masked) s = NAME(select)(room->visible[r] >> (j * LANES), s, nothing);
      // A NaN never becomes the peak (max keeps its second operand); it makes its row NaN through the sum.
      top = NAME(max)(s, top);
      NAME(store)(column, s);
    }
    if (peak) NAME(store)(peak + j * LANES, top);
  }
  return masked ? room->visible : NULL;
}

// The words of the pairs that dropout keeps, one word of queries per key; NULL when it keeps all.
static const uint64_t *NAME(keep)(const NAME(block) * block, const sa_stretch *stretch,
                                  const NAME(stretch_room) * room) {
  const sa_problem *p = block->p;
  if (!(p->dropout > 0)) return NULL;
  const uint64_t row = (uint64_t)((block->batch * p->heads + block->head) * p->queries + block->query);
  sa_kept_words(p->seed, sa_dropout_threshold(p->dropout), row * (uint64_t)p->keys + (uint64_t)stretch->first,
                (uint64_t)p->keys, block->count, stretch->count, room->kept);
  return room->kept;
}

// P^T in place of S^T: exp2((s - base) * unit) * factor per row (factor NULL: 1), masked pairs 0. Rows without a key
// have a base of +inf.
static void NAME(weigh)(const NAME(block) * block, int keys, const uint64_t *visible, const REAL *base,
                        const REAL *factor, REAL *scores) {
  const NAME(vector) unit = NAME(set)(block->unit), zero = NAME(set)(0);
  for (int j = 0; j < block->vectors; j++) {
    const NAME(vector) from = NAME(load)(base + j * LANES);
    const NAME(vector) times = factor ? NAME(load)(factor + j * LANES) : NAME(set)(1);
    REAL *column = scores + j * LANES;
    for (int r = 0; r < keys; r++, column += NAME(ROW)) {
      NAME(vector) x = NAME(load)(column) - from;
      if (!block->plain) x = x * unit;
      NAME(vector) w = NAME(exp2)(x);
      if (factor) w = w * times;
      NAME(store)(column, visible ? NAME(select)(visible[r] >> (j * LANES), w, zero) : w);
    }
  }
}

// Hands out parts of a worker's room. With no memory behind it, it measures.
#ifndef SAFEATTN_ROOM
#define SAFEATTN_ROOM
typedef struct sa_room {
  char *memory;
  int64_t used;
} sa_room;

static inline void *sa_room_take(sa_room *room, int64_t bytes) {
  void *taken = room->memory ? room->memory + room->used : NULL;
  room->used += (bytes + 63) / 64 * 64;
  return taken;
}
#endif

static REAL *NAME(take)(sa_room *room, int64_t count) {
  return sa_room_take(room, count * (int64_t)sizeof(REAL));
}

// What pack_query fills.
static int64_t NAME(query_room)(const sa_problem *p) {
  const int64_t packed = p->width * NAME(ROW), rows = NAME(FEW) * NAME(padded)(p->width);
  return packed > rows ? packed : rows;
}

static NAME(stretch_room) NAME(take_stretch)(sa_room *room, const sa_problem *p, bool backward) {
  NAME(stretch_room) stretch = {.scores = NAME(take)(room, KEYS * NAME(ROW))};
  if (p->bias.data) stretch.bias = NAME(take)(room, KEYS * NAME(ROW));
  if (backward && p->softcap > 0) stretch.capped = NAME(take)(room, KEYS * NAME(ROW));
  stretch.visible = sa_room_take(room, KEYS * sizeof(uint64_t));
  stretch.kept = sa_room_take(room, KEYS * sizeof(uint64_t));
  return stretch;
}
