// register tiles, packing and score tiles, for one REAL; part of flash.h

// How a product starts: from 0, from what c holds, or from that times a factor per row.
#ifndef SAFEATTN_PRODUCT_START
#define SAFEATTN_PRODUCT_START
typedef enum sa_product_start { SA_FROM_ZERO, SA_FROM_SELF, SA_FROM_SCALED } sa_product_start;
#endif

// c[rows][vectors * LANES] = start + a b, a's element (i, k) at a[i * a_row + k * a_step]. Every accumulator is one
// chain of fused multiply-adds over k in rising order, so an element's bits do not depend on the tile that computed it:
// backward gets the very scores of the forward.
static inline __attribute__((always_inline)) void NAME(tile)(int rows, int vectors, const REAL *restrict a,
                                                             int64_t a_row, int64_t a_step, const REAL *restrict b,
                                                             int64_t b_row, REAL *restrict c, int64_t c_row, int depth,
                                                             sa_product_start start, const REAL *factor) {
  NAME(vector) sum[6][4];
#pragma GCC unroll 6
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) {
      sum[i][j] = NAME(set)(0);
      if (start != SA_FROM_ZERO) sum[i][j] = NAME(load)(c + i * c_row + j * LANES);
      if (start == SA_FROM_SCALED) sum[i][j] = sum[i][j] * NAME(set)(factor[i]);
    }
  }
  for (int k = 0; k < depth; k++) {
    NAME(vector) right[4];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) right[j] = NAME(load)(b + k * b_row + j * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
      const NAME(vector) left = NAME(set)(a[i * a_row + k * a_step]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) sum[i][j] = NAME(fma)(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) NAME(store)(c + i * c_row + j * LANES, sum[i][j]);
  }
}

// One function a shape: inlined into a larger one, the 6 x 4 tile spilled 3 of its 24 accumulators.
#define SA_TILE_SHAPE(R, V)                                                                                           \
  static __attribute__((noinline)) void NAME(tile_##R##x##V)(                                                         \
      const REAL *restrict a, int64_t a_row, int64_t a_step, const REAL *restrict b, int64_t b_row, REAL *restrict c, \
      int64_t c_row, int depth, sa_product_start start, const REAL *factor) {                                         \
    NAME(tile)(R, V, a, a_row, a_step, b, b_row, c, c_row, depth, start, factor);                                     \
  }
#define SA_TILE_SHAPES(V) \
  SA_TILE_SHAPE(1, V)     \
  SA_TILE_SHAPE(2, V) SA_TILE_SHAPE(3, V) SA_TILE_SHAPE(4, V) SA_TILE_SHAPE(5, V) SA_TILE_SHAPE(6, V)
SA_TILE_SHAPES(1)
SA_TILE_SHAPES(2)
#if TILE_VECTORS == 4
SA_TILE_SHAPES(4)
#endif
#undef SA_TILE_SHAPES
#undef SA_TILE_SHAPE

typedef void (*NAME(tile_function))(const REAL *, int64_t, int64_t, const REAL *, int64_t, REAL *, int64_t, int,
                                    sa_product_start, const REAL *);
#define SA_TILE_ROW(V) \
  { NULL, NAME(tile_1x##V), NAME(tile_2x##V), NAME(tile_3x##V), NAME(tile_4x##V), NAME(tile_5x##V), NAME(tile_6x##V) }
static const NAME(tile_function) NAME(tiles)[][7] = {
    SA_TILE_ROW(1),
    SA_TILE_ROW(2),
#if TILE_VECTORS == 4
    SA_TILE_ROW(4),
#endif
};
#undef SA_TILE_ROW

// c[rows][columns] = start + a b, columns a multiple of LANES.
static void NAME(product)(const REAL *a, int64_t a_row, int64_t a_step, const REAL *b, int64_t b_row, REAL *c,
                          int64_t c_row, int rows, int columns, int depth, sa_product_start start, const REAL *factor) {
  for (int column = 0; column < columns;) {
    int shape = TILE_VECTORS == 4 ? 2 : 1;
    while ((LANES << shape) > columns - column) shape--;
    for (int row = 0; row < rows;) {
      const int count = rows - row < 6 ? rows - row : 6;
      NAME(tiles)
      [shape][count](a + row * a_row, a_row, a_step, b + column, b_row, c + row * c_row + column, c_row, depth, start,
                     factor ? factor + row : NULL);
      row += count;
    }
    column += LANES << shape;
  }
}

// One block of queries of one head, and how its scores are made.
typedef struct NAME(block) {
  const sa_problem *p;
  int64_t batch, head, key_head, plane, query;
  int count;    // queries, at most QUERIES
  int vectors;  // of queries
  bool plain;   // scores are q . k alone; they then carry log2 e in Q's scale
  REAL unit;    // times this, a difference of scores is an exponent of 2
  REAL slope;   // of ALiBi
} NAME(block);

static NAME(block) NAME(block_at)(const sa_problem *p, int64_t batch, int64_t head, int64_t index) {
  const int64_t query = index * QUERIES;
  const int64_t left = p->queries - query;
  const int count = left < QUERIES ? (int)left : QUERIES;
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
      .vectors = (count + LANES - 1) / LANES,
      .plain = plain,
      // In base 2 a bias of the dtype's minimum would overflow to -inf, which is a different number; so scores that
      // take a bias stay in natural units, and one multiplication more turns differences into exponents.
      .unit = plain ? 1 : (REAL)1.4426950408889634,
      .slope = 0,
  };
  if (p->alibi.data) NAME(read_row)(sa_at(&p->alibi, 0, head, 0, 0), p->alibi.dtype, 1, &block.slope);
  return block;
}

// to[dim][QUERIES] = factor * rows of x, transposed, 0 beyond the block and in the rows whose bit is set in `skip`.
static void NAME(pack)(const sa_operand *x, const NAME(block) * block, int width, REAL factor, uint64_t skip,
                       REAL *to) {
  REAL row[SA_FUSED_WIDTH];
  for (int i = 0; i < block->vectors * LANES; i++) {
    const bool absent = i >= block->count || skip >> i & 1;
    if (absent)
      memset(row, 0, sizeof *row * width);
    else
      NAME(read_row)(sa_at(x, block->batch, block->head, block->query + i, 0), x->dtype, width, row);
    for (int d = 0; d < width; d++) to[d * QUERIES + i] = row[d] * factor;
  }
}

// `count` rows of K or V from `first` on: in place where the kernels can read them so, else converted into `room`.
static const REAL *NAME(rows_of)(const sa_operand *x, const NAME(block) * block, int64_t first, int count, int width,
                                 bool whole_vectors, REAL *room, int64_t *stride) {
  const int padded = (width + LANES - 1) / LANES * LANES;
  if (x->dtype == DTYPE && (!whole_vectors || width == padded)) {
    *stride = x->stride[2];
    return sa_at(x, block->batch, block->key_head, first, 0);
  }
  *stride = padded;
  for (int r = 0; r < count; r++) {
    REAL *row = room + (int64_t)r * padded;
    NAME(read_row)(sa_at(x, block->batch, block->key_head, first + r, 0), x->dtype, width, row);
    for (int d = width; d < padded; d++) row[d] = 0;
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
  const int padded = (width + LANES - 1) / LANES * LANES;
  for (int r = 0; r < count; r++) {
    for (int d = 0; d < padded; d++) {
      const REAL x = d < width ? rows[r * stride + d] : 0;
      to[(int64_t)r * padded + d] = x * 0 == 0 ? x : 0;
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
  REAL *scores;       // [KEYS][QUERIES]: S^T, then P^T
  REAL *bias;         // [KEYS][QUERIES]
  REAL *capped;       // [KEYS][QUERIES]: tanh(s / softcap), when the backward wants it
  uint64_t *visible;  // [KEYS]
  uint64_t *kept;     // [KEYS]: what dropout keeps
} NAME(stretch_room);

// Reads a row-major tile of the bias transposed.
static void NAME(load_bias)(const NAME(block) * block, const sa_stretch *stretch, REAL *to) {
  const sa_operand *bias = &block->p->bias;
  REAL row[KEYS];
  for (int i = 0; i < block->count; i++) {
    const void *from = sa_at(bias, block->batch, block->head, block->query + i, stretch->first);
    if (bias->stride[3]) {
      NAME(read_row)(from, bias->dtype, stretch->count, row);
    } else {
      NAME(read_row)(from, bias->dtype, 1, row);
      for (int r = 1; r < stretch->count; r++) row[r] = row[0];
    }
    for (int r = 0; r < stretch->count; r++) to[r * QUERIES + i] = row[r];
  }
  for (int i = block->count; i < block->vectors * LANES; i++) {
    for (int r = 0; r < stretch->count; r++) to[r * QUERIES + i] = 0;
  }
}

// S^T of a stretch into room->scores, masked pairs -inf, in the block's unit. `peak` (may be NULL) is raised to the
// largest score of each query. Returns the words of visible pairs, or NULL when every pair is visible.
static const uint64_t *NAME(score)(const NAME(block) * block, const sa_stretch *stretch, const REAL *key,
                                   int64_t key_stride, const REAL *packed_query, const NAME(stretch_room) * room,
                                   NAME(vector) * peak) {
  const sa_problem *p = block->p;
  const int columns = block->vectors * LANES;
  NAME(product)
  (key, key_stride, 1, packed_query, QUERIES, room->scores, QUERIES, stretch->count, columns, (int)p->width,
   SA_FROM_ZERO, NULL);
  const bool masked = stretch->pattern || p->bias.data;
  if (masked) {
    const int half = (int)(block->query % SA_TILE / QUERIES);
    for (int r = 0; r < stretch->count; r++) {
      room->visible[r] = stretch->pattern ? stretch->pattern[r][half] : ~UINT64_C(0);
    }
  }
  if (!masked && block->plain && !peak) return NULL;
  if (p->bias.data) NAME(load_bias)(block, stretch, room->bias);
  const NAME(vector) nothing = NAME(set)(-(REAL)INFINITY);
  const NAME(vector) cap = NAME(set)((REAL)p->softcap), slope = NAME(set)(block->slope);
  REAL lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = (REAL)i;
  for (int j = 0; j < block->vectors; j++) {
    NAME(vector) top = peak ? peak[j] : nothing;
    // Counted from the block's first query, so that distances stay exact however long the sequence.
    const NAME(vector) offset = NAME(load)(lanes) + NAME(set)((REAL)(j * LANES));
    const int64_t origin = block->query + p->diagonal;
    REAL *column = room->scores + j * LANES;
    for (int r = 0; r < stretch->count; r++, column += QUERIES) {
      NAME(vector) s = NAME(load)(column);
      if (!block->plain) {
        if (p->softcap > 0) {
          const NAME(vector) bounded = NAME(tanh)(s / cap);
          if (room->capped) NAME(store)(room->capped + r * QUERIES + j * LANES, bounded);
          s = bounded * cap;
        }
        if (p->bias.data) {
          const NAME(vector) b = NAME(load)(room->bias + r * QUERIES + j * LANES);
          room->visible[r] &= ~(NAME(below_or_equal)(b, nothing) << (j * LANES));
          s = s + b;
        }
        if (p->alibi.data) s = s - slope * NAME(magnitude)(NAME(set)((REAL)(stretch->first + r - origin)) - offset);
      }
      if (masked) s = NAME(select)(room->visible[r] >> (j * LANES), s, nothing);
      // A NaN never becomes the peak (max keeps its second operand); it makes its row NaN through the sum.
      top = NAME(max)(s, top);
      if (masked || !block->plain) NAME(store)(column, s);
    }
    if (peak) peak[j] = top;
  }
  return masked ? room->visible : NULL;
}

// The words of the pairs that dropout keeps, one word of queries per key.
static void NAME(keep)(const NAME(block) * block, const sa_stretch *stretch, uint64_t *kept) {
  const sa_problem *p = block->p;
  const uint64_t row = (uint64_t)((block->batch * p->heads + block->head) * p->queries + block->query);
  sa_kept_words(p->seed, sa_dropout_threshold(p->dropout), row * (uint64_t)p->keys + (uint64_t)stretch->first,
                (uint64_t)p->keys, block->count, stretch->count, kept);
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
    for (int r = 0; r < keys; r++, column += QUERIES) {
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

static NAME(stretch_room) NAME(take_stretch)(sa_room *room, const sa_problem *p, bool backward) {
  NAME(stretch_room) stretch = {.scores = NAME(take)(room, KEYS * QUERIES)};
  if (p->bias.data) stretch.bias = NAME(take)(room, KEYS * QUERIES);
  if (backward && p->softcap > 0) stretch.capped = NAME(take)(room, KEYS * QUERIES);
  stretch.visible = sa_room_take(room, KEYS * sizeof(uint64_t));
  stretch.kept = sa_room_take(room, KEYS * sizeof(uint64_t));
  return stretch;
}
