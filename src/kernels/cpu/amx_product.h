// the products of attention by the tiles of AMX, of bf16; part of flash_tile.h, in place of flash_product.h
//
// A tile is 16 rows of 64 bytes. C, of f32, takes A B, where A has 32 bf16 a row and B's rows hold pairs of them, one
// pair a column: 16 x 16 x 32 products in 16 cycles. Four tiles of C, two of A and two of B are the eight that there
// are: each loaded tile is used twice, and loads take half the time of the products.
//
// K and V are A as they lie (K Q^T and V dO^T), and turned once a call, their keys along the rows (V^T P^T and K^T
// dS^T); Q and dO are packed as B once a block. So P^T and dS^T, which the softmax leaves with a row per key, are B
// when two keys are a pair, and A (P dO and dS Q) when two queries are. They are split into two bf16, 16 bits of
// mantissa together, and each half meets the other operand: what bf16 gave, the products take exactly.

enum {
  AMX_SIDE = 16,
  AMX_DEPTH = 32,
  AMX_TILE = AMX_SIDE * AMX_DEPTH,
  AMX_QUERY_TILES = QUERIES / AMX_SIDE,
  AMX_QUERY_STEPS = QUERIES / AMX_DEPTH,
  AMX_STEPS = KEYS / AMX_DEPTH
};

// A problem, and what is shared by all its blocks: of each of these, bits of what sizes came up. Where nothing that was
// computed is of an ordinary size, AMX's loss of subnormal numbers may show (amx.c).
typedef enum amx_size { AMX_OUT, AMX_QUERY, AMX_DOUT, AMX_DSCORES, AMX_DQUERY, AMX_SIZES } amx_size;
typedef struct amx_problem {
  sa_problem base;
  uint16_t *turned;       // V or K: [B][Hkv][KEYS at a time][tiles of 16 columns][step][AMX_TILE]
  int64_t groups, tiles;  // how many times KEYS keys, and tiles of columns
  atomic_int sizes[AMX_SIZES];
} amx_problem;

static inline const amx_problem *amx_problem_of(const NAME(block) * block) {
  return (const amx_problem *)block->p;
}

static inline int amx_tiles(int64_t width) {
  return (int)((width + AMX_SIDE - 1) / AMX_SIDE);
}
static inline int amx_steps(int64_t depth) {
  return (int)((depth + AMX_DEPTH - 1) / AMX_DEPTH);
}
// Tiles of a block's queries, in twos.
static inline int amx_query_tiles(const NAME(block) * block) {
  return (block->vectors + 1) / 2 * 2;
}

static uint16_t *amx_take(sa_room *room, int64_t count) {
  return sa_room_take(room, count * (int64_t)sizeof(uint16_t));
}

// Notes the sizes of elements of a block.
static void amx_note(const NAME(block) * block, amx_size which, const REAL *rows, int64_t stride, int count,
                     int width) {
  NAME(note_sizes)(&((amx_problem *)block->p)->sizes[which], rows, stride, count, width);
}

static bool amx_ordinary(const amx_problem *problem, amx_size which) {
  return sa_ordinary(problem->sizes[which]);
}

// Where the tiles of an operand lie: bytes from `at` to a tile's next row, to the next tile along the side, to the next
// step along the depth, and to the other half of a split operand (0: it is whole).
typedef struct amx_operand {
  const void *at;
  int64_t row, tile, step, half;
} amx_operand;

// A square of tiles of C, rows x columns of them, each 1 or 2. The compiler's own barriers, since it takes a tile's
// load for no reading of memory.
static inline __attribute__((always_inline)) void amx_square(int rows, int columns, const amx_operand *a,
                                                             const amx_operand *b, int steps, int halves, float *c,
                                                             int64_t c_row, bool from_zero) {
  const int64_t c_bytes = c_row * (int64_t)sizeof *c;
  float *below = c + AMX_SIDE * c_row;
  atomic_signal_fence(memory_order_seq_cst);
  if (from_zero) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, c_bytes);
    if (columns > 1) _tile_loadd(1, c + AMX_SIDE, c_bytes);
    if (rows > 1) _tile_loadd(2, below, c_bytes);
    if (rows > 1 && columns > 1) _tile_loadd(3, below + AMX_SIDE, c_bytes);
  }
  for (int half = 0; half < halves; half++) {
    const char *left = (const char *)a->at + half * a->half, *right = (const char *)b->at + half * b->half;
    for (int step = 0; step < steps; step++, left += a->step, right += b->step) {
      _tile_loadd(4, left, a->row);
      _tile_loadd(6, right, b->row);
      _tile_dpbf16ps(0, 4, 6);
      if (columns > 1) {
        _tile_loadd(7, right + b->tile, b->row);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (rows > 1) {
        _tile_loadd(5, left + a->tile, a->row);
        _tile_dpbf16ps(2, 5, 6);
        if (columns > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, c_bytes);
  if (columns > 1) _tile_stored(1, c + AMX_SIDE, c_bytes);
  if (rows > 1) _tile_stored(2, below, c_bytes);
  if (rows > 1 && columns > 1) _tile_stored(3, below + AMX_SIDE, c_bytes);
  atomic_signal_fence(memory_order_seq_cst);
}

// c = a b, or c += a b, of so many tiles of c. An element's sum runs over the depth in rising order, and then again
// with the lower halves of what is split, whichever square it is in.
static __attribute__((noinline)) void amx_product(amx_operand a, int rows, amx_operand b, int columns, int steps,
                                                  float *c, int64_t c_row, bool from_zero, sa_forecast *forecast) {
  const int halves = a.half || b.half ? 2 : 1;
  for (int i = 0; i < rows; i += 2) {
    amx_operand right = b;
    float *to = c + i * AMX_SIDE * c_row;
    for (int j = 0; j < columns; j += 2) {
      if (forecast) sa_forecast_call(forecast);
      if (rows - i > 1 && columns - j > 1)
        amx_square(2, 2, &a, &right, steps, halves, to, c_row, from_zero);
      else if (rows - i > 1)
        amx_square(2, 1, &a, &right, steps, halves, to, c_row, from_zero);
      else if (columns - j > 1)
        amx_square(1, 2, &a, &right, steps, halves, to, c_row, from_zero);
      else
        amx_square(1, 1, &a, &right, steps, halves, to, c_row, from_zero);
      right.at = (const char *)right.at + 2 * b.tile;
      to += 2 * AMX_SIDE;
    }
    a.at = (const char *)a.at + 2 * a.tile;
  }
}

// Packing

// A square of 16 x 16 words of 32 bits, transposed into a tile.
static inline void amx_turn(const void *from, int64_t from_row, uint16_t *tile) {
  NAME(vector) column[LANES];
  NAME(columns_of)((const REAL *)from, from_row, column);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) NAME(store)((REAL *)(void *)(tile + i * AMX_DEPTH), column[i]);
}

// Rows of Q or dO as B of products along the width: [step][AMX_QUERY_TILES][AMX_TILE], 0 beyond the block and the width
// and in the rows whose bit is set in `skip`. Whole tiles of rows are read where they lie: copied first they took three
// times as long.
static void amx_pack(const sa_operand *x, const NAME(block) * block, int width, uint64_t skip, uint16_t *to) {
  _Alignas(64) uint16_t rows[AMX_SIDE][SA_FUSED_WIDTH];
  const int steps = amx_steps(width);
  const bool in_place = block->each == block->count && width % AMX_DEPTH == 0 && x->stride[2] % 2 == 0;
  for (int tile = 0; tile < amx_query_tiles(block); tile++) {
    const int first = tile * AMX_SIDE;
    const uint16_t *from = rows[0];
    int64_t row = SA_FUSED_WIDTH / 2;  // in words of two elements
    if (in_place && first + AMX_SIDE <= block->count && !(skip >> first & 0xffff)) {
      from = NAME(row_at)(x, block, first);
      row = x->stride[2] / 2;
    }
    for (int i = 0; i < AMX_SIDE && from == rows[0]; i++) {
      const int query = first + i;
      const bool absent = query >= block->count || skip >> query & 1;
      if (!absent) memcpy(rows[i], NAME(row_at)(x, block, query), sizeof **rows * width);
      const int end = absent ? 0 : width;
      memset(rows[i] + end, 0, sizeof **rows * (steps * AMX_DEPTH - end));
    }
    for (int step = 0; step < steps; step++) {
      amx_turn(from + step * AMX_DEPTH, row, to + (step * AMX_QUERY_TILES + tile) * AMX_TILE);
    }
  }
}

static amx_operand amx_packed(const uint16_t *packed) {
  enum { BYTES = AMX_TILE * sizeof *packed };
  return (amx_operand){packed, BYTES / AMX_SIDE, BYTES, AMX_QUERY_TILES * BYTES, 0};
}

static bool amx_nonfinite(uint16_t x) {
  return (x & 0x7f80) == 0x7f80;
}

static bool amx_has_nonfinite(const uint16_t *row, int count) {
  int found = 0;
  for (int d = 0; d < count; d++) found |= amx_nonfinite(row[d]);
  return found;
}

// Copies with every non-finite element replaced by 0.
static void amx_finite_part(const uint16_t *from, int64_t count, uint16_t *to) {
  for (int64_t n = 0; n < count; n++) to[n] = amx_nonfinite(from[n]) ? 0 : from[n];
}

// 32 keys of K or V from `first` on as A with the keys along the rows, a step of each tile; 0 beyond the keys and the
// width. Two tiles at a time: what the two keys of a pair have, interleaved in quarters of vectors, is 16 columns of
// either half of the quarters.
static void amx_turn_keys(const sa_operand *x, int64_t batch, int64_t key_head, int64_t first, int count, int width,
                          uint16_t *to) {
  _Alignas(64) uint16_t pairs[2][AMX_SIDE][AMX_DEPTH];
  const uint16_t *rows = sa_at(x, batch, key_head, first, 0);
  const int64_t stride = x->stride[2];
  for (int d = 0; d < width; d += AMX_DEPTH, to += 2 * AMX_STEPS * AMX_TILE) {
    const __mmask32 within = width - d < AMX_DEPTH ? (__mmask32)((1u << (width - d)) - 1) : ~(__mmask32)0;
    for (int i = 0; i < AMX_SIDE; i++) {
      const uint16_t *even = rows + 2 * i * stride + d;
      const __m512i a = _mm512_maskz_loadu_epi16(2 * i < count ? within : 0, even);
      const __m512i b = _mm512_maskz_loadu_epi16(2 * i + 1 < count ? within : 0, even + stride);
      _mm512_store_si512(pairs[0][i], _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(pairs[1][i], _mm512_unpackhi_epi16(a, b));
    }
    for (int half = 0; half < 2; half++) {
      NAME(vector) column[LANES];
      NAME(columns_of)((const REAL *)(const void *)pairs[half], LANES, column);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        const int at = i / 4 * 8 + half * 4 + i % 4, tile = at / AMX_SIDE;
        if (d + tile * AMX_SIDE >= width) continue;
        NAME(store)((REAL *)(void *)(to + tile * AMX_STEPS * AMX_TILE + at % AMX_SIDE * AMX_DEPTH), column[i]);
      }
    }
  }
}

// The turned keys that a stretch is among: KEYS of them.
static const uint16_t *amx_turned_at(const NAME(block) * block, int64_t first) {
  const amx_problem *problem = amx_problem_of(block);
  const int64_t plane = block->batch * block->p->key_heads + block->key_head;
  return problem->turned + (plane * problem->groups + first / KEYS) * problem->tiles * AMX_STEPS * AMX_TILE;
}

// Tiles of a side one after another, each with its steps.
static amx_operand amx_turned(const uint16_t *turned, int steps, int64_t first) {
  enum { BYTES = AMX_TILE * sizeof *turned };
  return (amx_operand){turned + first % KEYS / AMX_DEPTH * AMX_TILE, BYTES / AMX_SIDE, steps * BYTES, BYTES, 0};
}

// What products read of keys besides K: what is turned, and of the backward V.
static void NAME(foresee_values)(sa_forecast *forecast, const NAME(block) * block, int64_t first, int64_t count) {
  const sa_problem *p = block->p;
  const int64_t bytes = amx_problem_of(block)->tiles * AMX_STEPS * AMX_TILE * (int64_t)sizeof(uint16_t);
  sa_forecast_add(forecast, amx_turned_at(block, first), bytes, bytes, (count + KEYS - 1) / KEYS);
  if (!p->dout.data) return;
  sa_forecast_add(forecast, sa_at(&p->v, block->batch, block->key_head, first, 0),
                  p->v.stride[2] * (int64_t)sizeof(uint16_t), p->value_width * (int64_t)sizeof(uint16_t), count);
}

// Two vectors as the halves of each other's words: `high` has both rounded to bf16, `low` what that left off, again as
// bf16. That is rounded by a multiplication: the addition to the bits, as for `high`, would turn some NaN into a number
// there too. The halves differ from what they are of by 2^-17 of it. An infinite number leaves nothing off.
static inline __attribute__((always_inline)) void amx_split(__m512 x, __m512 y, bool infinite, REAL *high, REAL *low) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32((int)0xffff0000);
  const __m512i a = _mm512_add_epi32(_mm512_castps_si512(x), half), b = _mm512_add_epi32(_mm512_castps_si512(y), half);
  _mm512_store_si512(high, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b));
  __m512 c = x - _mm512_castsi512_ps(_mm512_and_si512(a, upper));
  __m512 d = y - _mm512_castsi512_ps(_mm512_and_si512(b, upper));
  if (infinite) {
    c = _mm512_mask_mov_ps(c, _mm512_fpclass_ps_mask(x, 0x18), _mm512_setzero_ps());
    d = _mm512_mask_mov_ps(d, _mm512_fpclass_ps_mask(y, 0x18), _mm512_setzero_ps());
  }
  // Half a step of bf16, give or take a fifth.
  const __m512 up = _mm512_set1_ps(0x1.6a09e6p-9f);
  const __m512i e = _mm512_castps_si512(fma_f32(c, up, c)), f = _mm512_castps_si512(fma_f32(d, up, d));
  _mm512_store_si512(low, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(e, 16), f));
}

// P^T or dS^T as B, two keys a pair: `to` (which may be `pairs`) gets the higher halves of two rows in the first, the
// lower ones in the second; 0 beyond the keys and the block. No more memory is touched than the scores have.
static void amx_split_keys(const NAME(block) * block, int keys, const REAL *pairs, bool infinite, REAL *to) {
  const int tiles = amx_query_tiles(block);
  const NAME(vector) zero = NAME(set)(0);
  for (int r = 0; r < amx_steps(keys) * AMX_DEPTH; r += 2) {
    const REAL *from = pairs + r * NAME(ROW);
    REAL *high = to + r * NAME(ROW), *low = high + NAME(ROW);
    if (r + 1 < keys) {
      for (int j = 0; j < block->vectors * LANES; j += LANES) {
        amx_split(NAME(load)(from + j), NAME(load)(from + NAME(ROW) + j), infinite, high + j, low + j);
      }
    } else {
      for (int j = 0; j < block->vectors * LANES; j += LANES) {
        amx_split(r < keys ? NAME(load)(from + j) : zero, zero, infinite, high + j, low + j);
      }
    }
    if (block->vectors < tiles) {
      NAME(store)(high + block->vectors * LANES, zero);
      NAME(store)(low + block->vectors * LANES, zero);
    }
  }
}

static amx_operand amx_split_b(const REAL *split) {
  enum { ROW_BYTES = NAME(ROW) * sizeof *split };
  return (amx_operand){split, 2 * ROW_BYTES, LANES * sizeof *split, AMX_DEPTH * ROW_BYTES, ROW_BYTES};
}

// The same as A: query i of 32 beside query i + 16, the higher halves of two vectors in the first, the lower in the
// second. What is behind the last query may be NaN, where a key holds it or an infinity, and is left out.
static void amx_split_queries(const NAME(block) * block, int keys, const REAL *pairs, bool infinite, REAL *to) {
  const uint64_t queries = block->count < QUERIES ? (UINT64_C(1) << block->count) - 1 : ~UINT64_C(0);
  const int used = amx_query_tiles(block) * LANES;
  for (int r = 0; r < keys; r++, pairs += NAME(ROW), to += NAME(ROW)) {
    for (int j = 0; j < used; j += 2 * LANES) {
      const __m512 x = _mm512_maskz_load_ps((__mmask16)(queries >> j), pairs + j);
      const __m512 y = _mm512_maskz_load_ps((__mmask16)(queries >> (j + LANES)), pairs + j + LANES);
      amx_split(x, y, infinite, to + j, to + j + LANES);
    }
  }
  for (int r = keys; r < amx_tiles(keys) * AMX_SIDE; r++, to += NAME(ROW)) memset(to, 0, sizeof *to * used);
}

static amx_operand amx_split_a(const REAL *split) {
  enum { ROW_BYTES = NAME(ROW) * sizeof *split };
  return (amx_operand){split, ROW_BYTES, AMX_SIDE * ROW_BYTES, 2 * LANES * sizeof *split, LANES * sizeof *split};
}

// A stretch's rows in float, for what is not finite in them.
static void amx_read_rows(const sa_operand *x, const NAME(block) * block, const sa_stretch *stretch, int width,
                          REAL *to) {
  for (int r = 0; r < stretch->count; r++, to += NAME(padded)(width)) {
    NAME(read_row)(sa_at(x, block->batch, block->key_head, stretch->first + r, 0), x->dtype, width, to);
  }
}

static bool amx_rows_nonfinite(const sa_operand *x, const NAME(block) * block, int64_t first, int count, int width) {
  bool found = false;
  for (int r = 0; r < count && !found; r++) {
    found = amx_has_nonfinite(sa_at(x, block->batch, block->key_head, first + r, 0), width);
  }
  return found;
}

// Rows of queries from the sums [column][ROW] of their transpose, added to what is there when `more`.
static void amx_turn_back(const NAME(block) * block, const REAL *sums, int width, bool more, REAL *rows) {
  for (int j = 0; j < block->vectors; j++) {
    for (int tile = 0; tile < amx_tiles(width); tile++) {
      NAME(vector) column[LANES];
      NAME(columns_of)(sums + tile * AMX_SIDE * NAME(ROW) + j * LANES, NAME(ROW), column);
      REAL *to = rows + j * LANES * NAME(padded)(width) + tile * LANES;
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++, to += NAME(padded)(width)) {
        if (more) column[i] = column[i] + NAME(load)(to);
        NAME(store)(to, column[i]);
      }
    }
  }
}

// Scores

typedef uint16_t NAME(element);

static void NAME(pack_query)(const NAME(block) * block, uint64_t skip, uint16_t *to) {
  amx_pack(&block->p->q, block, (int)block->p->width, skip, to);
}

static int64_t NAME(query_room)(const sa_problem *p) {
  return (int64_t)amx_steps(p->width) * AMX_QUERY_TILES * AMX_TILE;
}

// Rows as A of products along the width, in twos of tiles: in place where no step and no tile ends beyond them, else
// copied, with 0 where they end.
static const uint16_t *NAME(rows_of)(const sa_operand *x, const NAME(block) * block, int64_t first, int count,
                                     int width, bool whole_vectors, uint16_t *room, int64_t *stride) {
  const int columns = amx_steps(width) * AMX_DEPTH, rows = amx_steps(count) * AMX_DEPTH;
  if (columns == width && rows == count) {
    *stride = x->stride[2];
    return sa_at(x, block->batch, block->key_head, first, 0);
  }
  *stride = columns;
  memset(room, 0, sizeof *room * rows * columns);
  for (int r = 0; r < count; r++) {
    memcpy(room + r * columns, sa_at(x, block->batch, block->key_head, first + r, 0), sizeof *room * width);
  }
  return room;
}

static const uint16_t *NAME(key_rows)(const NAME(block) * block, int64_t first, int count, uint16_t *room,
                                      int64_t *stride) {
  return NAME(rows_of)(&block->p->k, block, first, count, (int)block->p->width, false, room, stride);
}

static amx_operand amx_rows(const uint16_t *rows, int64_t stride) {
  const int64_t row = stride * (int64_t)sizeof *rows;
  return (amx_operand){rows, row, AMX_SIDE * row, AMX_DEPTH * sizeof *rows, 0};
}

// Scales rows of S^T, and raises `peak` (may be NULL) to the largest of each query.
static void amx_scale(const NAME(block) * block, int keys, REAL *scores, REAL *peak) {
  const NAME(vector) scale = NAME(set)((REAL)(block->p->scale * (block->plain ? 1.4426950408889634 : 1)));
  for (int j = 0; j < block->vectors; j++) {
    NAME(vector) top = peak ? NAME(load)(peak + j * LANES) : scale;
    REAL *column = scores + j * LANES;
    for (int r = 0; r < keys; r++, column += NAME(ROW)) {
      const NAME(vector) s = NAME(load)(column) * scale;
      NAME(store)(column, s);
      top = NAME(max)(s, top);
    }
    if (peak) NAME(store)(peak + j * LANES, top);
  }
}

// Calls for the part of the bias that the next stretch reads and that belongs to queries [first, end). Its rows are
// pages apart, too far for the hardware to foresee, and all at once they would wait for one another.
static void NAME(call_bias)(const NAME(block) * block, const sa_stretch *stretch, int first, int end) {
  const sa_operand *bias = &block->p->bias;
  const int64_t bytes = stretch->count * sa_size_of(bias->dtype);
  for (int i = first; i < end && i < block->count; i++) {
    const char *row = sa_at(bias, block->batch, block->head, block->query + i, stretch->first);
    for (int64_t byte = bytes; byte < 2 * bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

// Two tiles of keys at a time, scaled while the processor multiplies the next.
static void NAME(score_product)(const NAME(block) * block, const sa_stretch *stretch, const uint16_t *key,
                                int64_t stride, const uint16_t *packed_query, REAL *scores, REAL *peak) {
  const int keys = stretch->count, steps = amx_steps(block->p->width);
  const bool calls = block->p->bias.data && block->p->bias.stride[3];
  for (int r = 0; r < keys; r += AMX_DEPTH) {
    amx_product(amx_rows(key + r * stride, stride), 2, amx_packed(packed_query), amx_query_tiles(block), steps,
                scores + r * NAME(ROW), NAME(ROW), true, NULL);
    if (r) amx_scale(block, AMX_DEPTH, scores + (r - AMX_DEPTH) * NAME(ROW), peak);
    if (calls) NAME(call_bias)(block, stretch, r * QUERIES / keys, (r + AMX_DEPTH) * QUERIES / keys);
  }
  const int last = (amx_steps(keys) - 1) * AMX_DEPTH;
  amx_scale(block, keys - last, scores + last * NAME(ROW), peak);
}

// Forward

typedef struct NAME(forward_products) {
  uint16_t *rows;    // [KEYS][width, in steps]: K, where it cannot be read in place
  uint16_t *finite;  // turned values, for the careful path
  REAL *values;      // [KEYS][value width, padded]: V in float, for the careful path
  REAL *turned;      // [value width, in tiles][ROW]: o transposed, while it is turned back
  // Of a run of keys, as amx_run has them.
  REAL *strips[2];
  uint16_t *weights[2];
} NAME(forward_products);

static NAME(forward_products) NAME(take_forward_products)(sa_room *room, const sa_problem *p) {
  const int64_t columns = amx_tiles(p->value_width) * AMX_SIDE;
  return (NAME(forward_products)){
      .rows = amx_take(room, KEYS * amx_steps(p->width) * AMX_DEPTH),
      .finite = amx_take(room, KEYS * columns),
      .values = NAME(take)(room, KEYS * NAME(padded)(p->value_width)),
      .turned = NAME(take)(room, columns * NAME(ROW)),
      .strips = {NAME(take)(room, AMX_DEPTH * QUERIES), NAME(take)(room, AMX_DEPTH * QUERIES)},
      .weights = {amx_take(room, 2 * KEYS * QUERIES), amx_take(room, 2 * KEYS * QUERIES)},
  };
}

// What o takes of a block, in REAL: transposed while it is gathered, then as rows.
static int64_t NAME(value_sums)(const sa_problem *p) {
  const int64_t turned = amx_tiles(p->value_width) * AMX_SIDE * NAME(ROW),
                rows = QUERIES * NAME(padded)(p->value_width);
  return turned > rows ? turned : rows;
}

// What is not finite in V shows in everybody's sums: a weight's lower half may be 0, and 0 * Inf is NaN. So it may have
// leaked where nothing is masked, too.
enum { NAME(WHOLE_LEAKS) = true };

static bool NAME(can_leak)(const NAME(block) * block, const sa_stretch *stretch) {
  return amx_rows_nonfinite(&block->p->v, block, stretch->first, stretch->count, (int)block->p->value_width);
}

// What is not finite in V, to who sees it.
static void amx_add_nonfinite(const NAME(block) * block, const sa_stretch *stretch, const uint64_t *visible,
                              const REAL *weights, const NAME(forward_products) * room, REAL *leaked) {
  const int width = (int)block->p->value_width;
  const int64_t padded = NAME(padded)(width);
  amx_read_rows(&block->p->v, block, stretch, width, room->values);
  NAME(add_nonfinite)(block, stretch->count, visible, weights, room->values, padded, width, padded, leaked);
  amx_note(block, AMX_OUT, leaked, padded, block->count, width);
}

#include "kernels/cpu/amx_run.h"

static void NAME(see)(const NAME(block) * block, const sa_stretch *stretch, uint64_t *visible);

// Whether stretches are passed as runs: where scores are q . k alone, and V fills its tiles in twos.
static bool amx_runs(const sa_problem *p) {
  const bool plain = !p->bias.data && !p->alibi.data && p->softcap == 0 && !(p->dropout > 0);
  return plain && p->scale > 0 && p->value_width % (2 * AMX_SIDE) == 0;
}

// The most keys of a stretch where all are seen; no more than KEYS where they have to be copied.
static int NAME(longest_stretch)(const sa_problem *p) {
  return amx_runs(p) && p->width % AMX_DEPTH == 0 ? AMX_RUN : STRETCH;
}

// What is not finite in V of a run, to who sees it. How large the weights are is all the same to it.
static void amx_add_nonfinite_run(const NAME(block) * block, const sa_stretch *stretch, const uint64_t *visible,
                                  const amx_run *run, const NAME(forward_products) * room, REAL *scores, REAL *leaked) {
  for (int r = 0; r < stretch->count; r++) {
    const uint16_t *pairs = amx_weights_of(run, r / AMX_STRIP) + r % AMX_STRIP / 2 * AMX_DEPTH + r % 2;
    for (int i = 0; i < block->count; i++) {
      scores[r * NAME(ROW) + i] = sa_f32_of_bits((uint32_t)pairs[i / AMX_SIDE * AMX_TILE + i % AMX_SIDE * 2] << 16);
    }
  }
  amx_add_nonfinite(block, stretch, visible, scores, room, leaked);
}

// A stretch as a run; where `leaked` gets what is not finite in V, as runs of the keys that are turned together.
static bool NAME(pass_whole)(const NAME(block) * block, const sa_stretch *stretch, const NAME(element) * key,
                             int64_t key_stride, const NAME(element) * query, const NAME(forward_products) * room,
                             REAL *scores, REAL *factor, bool started, NAME(gathered) * gathered, REAL *leaked) {
  if (!amx_runs(block->p)) return false;
  // Keys beyond the last, where a strip ends beyond it, are rows of zeros that nobody sees.
  uint64_t visible[KEYS];
  const bool masked = stretch->pattern || stretch->count % AMX_STRIP;
  if (masked) {
    if (stretch->pattern) NAME(see)(block, stretch, visible);
    for (int r = 0; !stretch->pattern && r < stretch->count; r++) visible[r] = ~UINT64_C(0);
    for (int r = stretch->count; r < KEYS; r++) visible[r] = 0;
    for (int r = 0; r < stretch->count; r++) gathered->alive |= visible[r];
  } else {
    gathered->alive = ~UINT64_C(0);
  }
  amx_run run = {
      .block = block,
      .gathered = gathered,
      .query = query,
      .key_row = key_stride * (int64_t)sizeof *key,
      .tiles = amx_query_tiles(block),
      .value_tiles = amx_tiles(block->p->value_width),
      .steps = amx_steps(block->p->width),
      .started = started,
      .forecast = stretch->forecast,
      .strips = {room->strips[0], room->strips[1]},
      .weights = {room->weights[0], room->weights[1]},
  };
  for (int done = 0; done < stretch->count;) {
    sa_stretch part = {.first = stretch->first + done, .count = stretch->count - done};
    run.first = (int)(part.first % KEYS);
    if (leaked && part.count > KEYS - run.first) part.count = KEYS - run.first;
    run.key = key + done * key_stride;
    run.values = amx_turned_at(block, part.first);
    const bool wild = leaked && NAME(can_leak)(block, &part);
    if (wild) {
      amx_finite_part(run.values, (int64_t)run.value_tiles * AMX_STEPS * AMX_TILE, room->finite);
      run.values = room->finite;
    }
    const int strips = amx_steps(part.count);
    if (masked)
      amx_pass_masked(&run, strips, visible);
    else
      amx_pass_seen(&run, strips);
    if (wild) amx_add_nonfinite_run(block, &part, masked ? visible : NULL, &run, room, scores, leaked);
    done += part.count;
  }
  return true;
}

// o is gathered transposed, [value width, in tiles][ROW], until it is closed.
static bool NAME(add_values)(const NAME(block) * block, const sa_stretch *stretch, const uint64_t *visible,
                             REAL *weights, const REAL *factor, const NAME(forward_products) * room, REAL *o,
                             REAL *leaked) {
  const int width = (int)block->p->value_width, keys = stretch->count, tiles = amx_tiles(width);
  const uint16_t *value = amx_turned_at(block, stretch->first);
  if (leaked && amx_rows_nonfinite(&block->p->v, block, stretch->first, keys, width)) {
    amx_add_nonfinite(block, stretch, visible, weights, room, leaked);
    amx_finite_part(value, (int64_t)tiles * AMX_STEPS * AMX_TILE, room->finite);
    value = room->finite;
  }
  for (int d = 0; factor && d < tiles * AMX_SIDE; d++) {
    for (int j = 0; j < block->vectors * LANES; j += LANES) {
      REAL *sums = o + d * NAME(ROW) + j;
      NAME(store)(sums, NAME(load)(sums) * NAME(load)(factor + j));
    }
  }
  amx_split_keys(block, keys, weights, false, weights);
  amx_product(amx_turned(value, AMX_STEPS, stretch->first), tiles, amx_split_b(weights), amx_query_tiles(block),
              amx_steps(keys), o, NAME(ROW), !factor, NULL);

  return true;
}

// The keys whose pairs with a vector of queries products read: all.
static inline sa_extent NAME(reach)(const sa_stretch *stretch, int j) {
  return (sa_extent){0, stretch->count};
}

static void NAME(close_values)(const NAME(block) * block, const NAME(forward_products) * room, REAL *o) {
  const int width = (int)block->p->value_width;
  memcpy(room->turned, o, sizeof *o * amx_tiles(width) * AMX_SIDE * NAME(ROW));
  amx_turn_back(block, room->turned, width, false, o);
  amx_note(block, AMX_OUT, o, NAME(padded)(width), block->count, width);
}

static bool NAME(sums_nonfinite)(const NAME(block) * block, const REAL *o) {
  return NAME(has_nonfinite)(o, NAME(ROW), (int)block->p->value_width, block->count);
}

// A vector as bf16, rounded as sa_f32_to_bf16 does it.
static inline __m256i amx_rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
}

// Outputs from the transposed sums, turned, scaled and rounded in registers: by way of rows in float it took twice as
// long. Dead rows are 0.
static bool NAME(write_sums)(const NAME(block) * block, const NAME(gathered) * gathered, const REAL *scale) {
  const sa_operand *out = &block->p->out;
  const int width = (int)block->p->value_width;
  if (block->each != block->count) return false;
  amx_note(block, AMX_OUT, gathered->o, NAME(ROW), width, block->count);
  for (int first = 0; first < block->count; first += LANES) {
    const int rows = block->count - first < LANES ? block->count - first : LANES;
    for (int d = 0; d < width; d += AMX_SIDE) {
      const __mmask16 within = width - d < AMX_SIDE ? (__mmask16)((1 << (width - d)) - 1) : (__mmask16)~0;
      uint16_t *to = (uint16_t *)NAME(row_at)(out, block, first) + d;
      NAME(vector) column[LANES];
      NAME(columns_of)(gathered->o + d * NAME(ROW) + first, NAME(ROW), column);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++, to += out->stride[2]) {
        if (i >= rows) break;
        const __mmask16 alive = (__mmask16)(0 - (gathered->alive >> (first + i) & 1));
        const __m512 scaled = _mm512_maskz_mul_ps(alive, column[i], NAME(set)(scale[first + i]));
        _mm256_mask_storeu_epi16(to, within, amx_rounded(scaled));
      }
    }
  }
  return true;
}

// Backward

typedef struct NAME(backward_products) {
  uint16_t *packed_dout;               // as amx_pack does, for dP
  uint16_t *key_rows, *value_rows;     // [keys][width, in steps]: where they cannot be read in place
  uint16_t *query_pairs, *dout_pairs;  // as B of products along the queries: [tile of columns][step][AMX_TILE]
  REAL *split;                         // [keys][ROW]: dS^T
  REAL *keys;                          // [keys][width, padded]: K in float, where it is not finite
  REAL *turned;                        // [width, in tiles][ROW]: dQ transposed
} NAME(backward_products);

static NAME(backward_products) NAME(take_backward_products)(sa_room *room, const sa_problem *p, int keys, bool pairs) {
  const int64_t columns = amx_tiles(p->width) * AMX_SIDE, value_columns = amx_tiles(p->value_width) * AMX_SIDE;
  const int64_t depth = amx_steps(p->width) * AMX_DEPTH, value_depth = amx_steps(p->value_width) * AMX_DEPTH;
  // K in float comes where rows of K and V have been done with.
  const int64_t halves = keys * (depth + value_depth) / 2, floats = keys * NAME(padded)(p->width);
  REAL *rows = NAME(take)(room, halves > floats ? halves : floats);
  return (NAME(backward_products)){
      .packed_dout = amx_take(room, QUERIES * value_depth),
      .key_rows = (uint16_t *)rows,
      .value_rows = (uint16_t *)rows + keys * depth,
      .query_pairs = amx_take(room, QUERIES * columns),
      .dout_pairs = amx_take(room, QUERIES * value_columns),
      .split = NAME(take)(room, keys * NAME(ROW)),
      .keys = rows,
      .turned = NAME(take)(room, columns * NAME(ROW)),
  };
}

static bool NAME(wild_keys)(const NAME(block) * keys, int64_t first, int count) {
  return amx_rows_nonfinite(&keys->p->k, keys, first, count, (int)keys->p->width);
}

// Rows in float whose elements are bf16, as B of products along the queries, in the order of amx_split_queries.
static void amx_pair_queries(const NAME(block) * block, const REAL *rows, int width, uint16_t *to) {
  const int64_t padded = NAME(padded)(width);
  const __m512 zero = _mm512_setzero_ps();
  const int tiles = amx_tiles(width);
  for (int i = 0; i < QUERIES; i++) {
    if (i % AMX_DEPTH >= AMX_SIDE) continue;
    for (int tile = 0; tile < tiles; tile++) {
      const REAL *from = rows + i * padded + tile * LANES;
      const __m512 x = i < block->count ? NAME(load)(from) : zero;
      const __m512 y = i + AMX_SIDE < block->count ? NAME(load)(from + AMX_SIDE * padded) : zero;
      _mm512_store_si512(
          to + (tile * AMX_QUERY_STEPS + i / AMX_DEPTH) * AMX_TILE + i % AMX_DEPTH * AMX_DEPTH,
          _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(x), 16), _mm512_castps_si512(y)));
    }
  }
}

static bool NAME(dweight_pairs)(const sa_problem *p) {
  return false;
}

// What is bf16 stays as it is.
static bool NAME(scales_dout)(const sa_problem *p) {
  return false;
}

// Notes the sizes of a block's Q or dO, whose finite part `rows` are.
static void amx_note_queries(const NAME(block) * block, amx_size which, const sa_operand *x, const REAL *rows,
                             int width, uint64_t dead) {
  amx_problem *problem = (amx_problem *)block->p;
  amx_note(block, which, rows, NAME(padded)(width), block->count, width);
  if (!x->data || atomic_load_explicit(&problem->sizes[which], memory_order_relaxed) & SA_ORDINARY) return;
  for (int i = 0; i < block->count; i++) {
    if (dead >> i & 1 || !amx_has_nonfinite(NAME(row_at)(x, block, i), width)) continue;
    atomic_fetch_or_explicit(&problem->sizes[which], SA_NONFINITE, memory_order_relaxed);
    return;
  }
}

// As in flash_product.h; of half types, whose weights take the factors themselves: `factors` is NULL.
static void NAME(open_queries)(const NAME(block) * block, uint64_t dead, const REAL *query, const REAL *dout,
                               const REAL *factors, const NAME(backward_products) * products) {
  const sa_problem *p = block->p;
  const int width = (int)p->width, value_width = (int)p->value_width;
  amx_pack(&p->dout, block, value_width, p->dout.data ? dead : ~UINT64_C(0), products->packed_dout);
  amx_pair_queries(block, query, width, products->query_pairs);
  amx_pair_queries(block, dout, value_width, products->dout_pairs);
  amx_note_queries(block, AMX_QUERY, &p->q, query, width, dead);
  amx_note_queries(block, AMX_DOUT, &p->dout, dout, value_width, dead);
}

static void NAME(dweight_product)(const NAME(block) * block, const sa_stretch *stretch,
                                  const NAME(backward_products) * products, REAL *dweights) {
  const int width = (int)block->p->value_width, keys = stretch->count;
  int64_t stride;
  const uint16_t *value =
      NAME(rows_of)(&block->p->v, block, stretch->first, keys, width, true, products->value_rows, &stride);
  amx_product(amx_rows(value, stride), 2 * amx_steps(keys), amx_packed(products->packed_dout), amx_query_tiles(block),
              amx_steps(width), dweights, NAME(ROW), true, stretch->forecast);
}

// dK or dV += dS^T or P^T by rows of queries.
static void amx_add_to_keys(const NAME(block) * block, const sa_stretch *stretch, const REAL *split,
                            const uint16_t *query_pairs, int width, bool fresh, const NAME(gradient) * to,
                            int64_t first) {
  amx_product(amx_split_a(split), amx_tiles(stretch->count), amx_turned(query_pairs, AMX_QUERY_STEPS, 0),
              amx_tiles(width), amx_steps(block->count), to->rows + first * to->row, to->row, fresh, stretch->forecast);
}

static void NAME(add_dvalues)(const NAME(block) * block, const sa_stretch *stretch, REAL *weights, const REAL *dout,
                              int64_t stride, bool fresh, const NAME(backward_products) * products,
                              const NAME(gradient) * to, int64_t first) {
  amx_split_queries(block, stretch->count, weights, true, weights);
  amx_add_to_keys(block, stretch, weights, products->dout_pairs, (int)block->p->value_width, fresh, to, first);
}

static void NAME(add_dkeys)(const NAME(block) * block, const sa_stretch *stretch, const REAL *dscores,
                            const REAL *query, int64_t stride, bool fresh, const NAME(backward_products) * products,
                            const NAME(gradient) * to, int64_t first) {
  amx_note(block, AMX_DSCORES, dscores, NAME(ROW), stretch->count, block->count);
  amx_split_queries(block, stretch->count, dscores, true, products->split);
  amx_add_to_keys(block, stretch, products->split, products->query_pairs, (int)block->p->width, fresh, to, first);
}

// `to` gathers what is not finite, until the block is closed.
static void NAME(add_dqueries)(const NAME(block) * block, const sa_stretch *stretch, const uint64_t *visible,
                               const uint16_t *key, int64_t stride, REAL *dscores, bool wild, bool first,
                               const NAME(backward_products) * products, const NAME(gradient) * to) {
  const int width = (int)block->p->width, keys = stretch->count, tiles = amx_tiles(width);
  const int64_t padded = NAME(padded)(width);
  if (first) NAME(clear_rows)(to, 0, block->count);
  if (wild && amx_rows_nonfinite(&block->p->k, block, stretch->first, keys, width)) {
    amx_read_rows(&block->p->k, block, stretch, width, products->keys);
    NAME(add_nonfinite)(block, keys, visible, dscores, products->keys, padded, width, to->row, to->rows);
  }
  amx_note(block, AMX_DSCORES, dscores, NAME(ROW), keys, block->count);
  amx_split_keys(block, keys, dscores, true, dscores);
  amx_product(amx_turned(amx_turned_at(block, stretch->first), AMX_STEPS, stretch->first), tiles, amx_split_b(dscores),
              amx_query_tiles(block), amx_steps(keys), products->turned, NAME(ROW), first, stretch->forecast);
}

static void NAME(close_queries)(const NAME(block) * block, const NAME(backward_products) * products, REAL *dquery) {
  const int width = (int)block->p->width;
  amx_turn_back(block, products->turned, width, true, dquery);
  amx_note(block, AMX_DQUERY, dquery, NAME(padded)(width), block->count, width);
}
