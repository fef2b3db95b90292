// products by strips of register tiles, for one REAL; part of flash_product.h

// How a product starts: from 0, from what c holds, or from that times a factor per row; or from 0, half of the
// steps after the other; or from 0, of words of two bf16 each, and all of it times one factor in the end.
#ifndef SAFEATTN_PRODUCT_START
#define SAFEATTN_PRODUCT_START
typedef enum sa_product_start { SA_FROM_ZERO, SA_FROM_SELF, SA_FROM_SCALED, SA_IN_HALVES, SA_PAIRS } sa_product_start;
#endif

// c + a b, of words that are floats or pairs.
static inline __attribute__((always_inline)) NAME(vector)
    NAME(multiply_add)(bool pairs, NAME(vector) a, NAME(vector) b, NAME(vector) c) {
#ifdef OWN_PAIRS
  if (pairs) return NAME(add_pairs)(c, a, b);
#endif
  return NAME(fma)(a, b, c);
}

// A strip of register tiles, one below the other: each is c[rows][vectors * LANES] = start + a b, where a's element
// (i, k) is a[i * a_stride + k], or a[i + k * ROW] when a is `turned`. Every accumulator is one chain of fused
// multiply-adds over k in rising order, so an element's bits do not depend on the tile that computed it: backward gets
// the very scores of the forward. In large tiles, and in float (`late`), it begins at 0 and meets what c holds on the
// way out: waiting for that first took 4 % of the backward, since multiply-adds in waiting leave the processor no room
// to look ahead, and a chain over all queries or keys errs 3 times as much. In tiles of 6 x 2 the additions that this
// takes cost nothing on a Zen 4 in float, and in double 3 % elsewhere. Four steps a turn, since counting takes a port
// of the multiply-adds at times: on an Ice Lake P V takes 2 % less (D64) to 4 % (D128). `peak` (may be NULL) is raised
// to the largest of each column on the way out, while the sums are still in registers.
//
// SA_IN_HALVES: each half of the steps is a chain, and the sums of the first are in c meanwhile. Scores and dP of f32
// err mostly by what a chain rounds off while its sum is large (docs/cpu.md).
static inline __attribute__((always_inline)) void NAME(strip)(bool turned, bool pairs, int rows, int vectors, int tiles,
                                                              const REAL *restrict a, int64_t a_stride,
                                                              const REAL *restrict b, int64_t b_row, REAL *restrict c,
                                                              int64_t c_row, int depth, sa_product_start start,
                                                              const REAL *restrict factor, REAL *restrict peak,
                                                              sa_forecast *restrict forecast) {
  enum { SHORT = 32 };
  const bool in_halves = start == SA_IN_HALVES;
  const bool late = TILE_VECTORS == 4 || sizeof(REAL) == 4;
  const int half = in_halves && depth > SHORT ? (depth / 2 + 3) / 4 * 4 : depth;
  for (int tile = 0; tile < tiles; tile++) {
    NAME(vector) sum[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) {
        sum[i][j] = NAME(set)(0);
        if (late || in_halves || start == SA_FROM_ZERO) continue;
        sum[i][j] = NAME(load)(c + i * c_row + j * LANES);
        if (turned && start == SA_FROM_SCALED) sum[i][j] = sum[i][j] * NAME(set)(factor[i]);
      }
    }
    const REAL *left = a, *right = b;
    const int stint = forecast && forecast->next < forecast->parts ? 16 : depth;
    for (int done = 0, end; done < depth; done = end) {
      if (in_halves && done == half) {
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
          for (int j = 0; j < vectors; j++) {
            NAME(store)(c + i * c_row + j * LANES, sum[i][j]);
            sum[i][j] = NAME(set)(0);
          }
        }
      }
      const int until = in_halves && done < half ? half : depth;
      end = until - done < stint ? until : done + stint;
      if (forecast) sa_forecast_call(forecast);
#pragma GCC unroll 4
      for (int k = done; k < end; k++) {
        NAME(vector) row[4];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) row[j] = NAME(load)(right + j * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
          const NAME(vector) x = NAME(set)(turned ? left[i] : left[i * a_stride]);
#pragma GCC unroll 4
          for (int j = 0; j < vectors; j++) sum[i][j] = NAME(multiply_add)(pairs, x, row[j], sum[i][j]);
        }
        left += turned ? NAME(ROW) : 1;
        right += b_row;
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) {
        REAL *at = c + i * c_row + j * LANES;
        if (late && turned && start == SA_FROM_SCALED)
          sum[i][j] = NAME(fma)(NAME(load)(at), NAME(set)(factor[i]), sum[i][j]);
        else if (pairs)
          sum[i][j] = sum[i][j] * NAME(set)(*factor);
        else if (in_halves ? half < depth : late && start != SA_FROM_ZERO)
          sum[i][j] = NAME(load)(at) + sum[i][j];
        NAME(store)(at, sum[i][j]);
      }
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
#define SA_STRIP_OF(WAY, TURNED, PAIRS, B_ROW, C_ROW, START, R, V)                                                  \
  static __attribute__((noinline)) void NAME(WAY##_##R##x##V)(                                                      \
      int tiles, const REAL *restrict a, int64_t a_stride, const REAL *restrict b, int64_t b_row, REAL *restrict c, \
      int64_t c_row, int depth, sa_product_start start, const REAL *factor, REAL *peak, sa_forecast *forecast) {    \
    NAME(strip)(TURNED, PAIRS, R, V, tiles, a, a_stride, b, B_ROW, c, C_ROW, depth, START, factor, peak, forecast); \
  }
#ifdef OWN_PAIRS
#define SA_STRIP_OF_PAIRS(R, V) SA_STRIP_OF(pairs, false, true, NAME(ROW), NAME(ROW), SA_FROM_ZERO, R, V)
#else
#define SA_STRIP_OF_PAIRS(R, V)
#endif
#define SA_STRIP(R, V)                                                        \
  SA_STRIP_OF(strip, false, false, b_row, c_row, start, R, V)                 \
  SA_STRIP_OF(turned, true, false, b_row, c_row, start, R, V)                 \
  SA_STRIP_OF(scores, false, false, NAME(ROW), NAME(ROW), SA_FROM_ZERO, R, V) \
  SA_STRIP_OF(halves, false, false, NAME(ROW), NAME(ROW), SA_IN_HALVES, R, V) \
  SA_STRIP_OF_PAIRS(R, V)
#define SA_STRIPS(V) SA_STRIP(1, V) SA_STRIP(2, V) SA_STRIP(3, V) SA_STRIP(4, V) SA_STRIP(5, V) SA_STRIP(6, V)
SA_STRIPS(1)
SA_STRIPS(2)
#if TILE_VECTORS == 4
SA_STRIPS(3)
SA_STRIPS(4)
#endif
#undef SA_STRIPS
#undef SA_STRIP
#undef SA_STRIP_OF_PAIRS
#undef SA_STRIP_OF

typedef void (*NAME(strip_function))(int, const REAL *, int64_t, const REAL *, int64_t, REAL *, int64_t, int,
                                     sa_product_start, const REAL *, REAL *, sa_forecast *);
#define SA_STRIP_ROW(WAY, V)                                                                             \
  {                                                                                                      \
    NULL, NAME(WAY##_1x##V), NAME(WAY##_2x##V), NAME(WAY##_3x##V), NAME(WAY##_4x##V), NAME(WAY##_5x##V), \
        NAME(WAY##_6x##V)                                                                                \
  }
#if TILE_VECTORS == 4
#define SA_STRIP_TABLE(WAY) \
  { {NULL}, SA_STRIP_ROW(WAY, 1), SA_STRIP_ROW(WAY, 2), SA_STRIP_ROW(WAY, 3), SA_STRIP_ROW(WAY, 4) }
#else
#define SA_STRIP_TABLE(WAY) \
  { {NULL}, SA_STRIP_ROW(WAY, 1), SA_STRIP_ROW(WAY, 2) }
#endif
// By the way that a product is made, vectors and rows.
static const NAME(strip_function) NAME(strips)[][TILE_VECTORS + 1][7] = {
    SA_STRIP_TABLE(strip), SA_STRIP_TABLE(turned), SA_STRIP_TABLE(scores), SA_STRIP_TABLE(halves),
#ifdef OWN_PAIRS
    SA_STRIP_TABLE(pairs),
#endif
};
#undef SA_STRIP_TABLE
#undef SA_STRIP_ROW

// Scores have a way of their own: their packed right side and they themselves are rows of ROW, of which a compiler need
// not have counted. Counting takes ports of the multiply-adds. Products in halves, and of pairs, are always so.
static int NAME(way)(bool turned, int64_t b_row, int64_t c_row, sa_product_start start) {
#ifdef OWN_PAIRS
  if (start == SA_PAIRS) return 4;
#endif
  if (turned) return 1;
  if (start == SA_IN_HALVES) return 3;
  return b_row == NAME(ROW) && c_row == NAME(ROW) && start == SA_FROM_ZERO ? 2 : 0;
}

// How many vectors the next tile takes of so many columns.
static int NAME(tile_vectors)(int columns) {
  return columns < TILE_VECTORS * LANES ? columns / LANES : TILE_VECTORS;
}

// c[rows][columns] = start + a b, columns a multiple of LANES; a's element (i, k) at a[i * a_row + k * a_step], one of
// the two being 1. `peak` is for an a with a_step 1. Every column of tiles reads all of a block of a's rows, which
// therefore is to stay in the first cache beside a column of b: with all rows at once AVX2 lost 8 % in double.
static void NAME(product)(const REAL *a, int64_t a_row, int64_t a_step, const REAL *b, int64_t b_row, REAL *c,
                          int64_t c_row, int rows, int columns, int depth, sa_product_start start, const REAL *factor,
                          REAL *peak, sa_forecast *forecast) {
  enum { CACHED = 18 << 10 };
  const bool turned = a_step != 1;
  const int64_t a_stride = turned ? a_step : a_row;
  const int fitting = depth ? CACHED / (int)sizeof(REAL) / depth : rows;
  const int block = fitting >= rows ? rows : fitting < 12 ? 12 : fitting / 6 * 6;
  for (int row = 0; row < rows; row += block) {
    const int count = rows - row < block ? rows - row : block;
    // Tiles of 6 rows and what is left; so few rows that their sums do not keep the multipliers busy share six more.
    struct {
      int height, tiles;
    } strip[] = {{6, count / 6}, {count % 6, 1}, {0, 1}};
    if (strip[1].height && strip[1].height * TILE_VECTORS <= 8 && strip[0].tiles) {
      strip[0].tiles--;
      strip[2].height = (strip[1].height + 6) / 2;
      strip[1].height += 6 - strip[2].height;
    }
    for (int column = 0, vectors; column < columns; column += vectors * LANES) {
      vectors = NAME(tile_vectors)(columns - column);
      const NAME(strip_function) *strips = NAME(strips)[NAME(way)(turned, b_row, c_row, start)][vectors];
      REAL *top = peak ? peak + column : NULL;
      for (int i = 0, at = row; i < 3; at += strip[i].height * strip[i].tiles, i++) {
        if (!strip[i].height || !strip[i].tiles) continue;
        strips[strip[i].height](strip[i].tiles, a + at * a_row, a_stride, b + column, b_row, c + at * c_row + column,
                                c_row, depth, start, start == SA_FROM_SCALED ? factor + at : factor, top, forecast);
      }
    }
  }
}

// The same within an outline: every ROWS rows of c have an extent of columns (the others stay what they are) or, when
// `along` the depth, of steps.
static void NAME(product_within)(const sa_extent *extent, bool along, const REAL *a, int64_t a_row, int64_t a_step,
                                 const REAL *b, int64_t b_row, REAL *c, int64_t c_row, int rows, int columns, int depth,
                                 sa_product_start start, const REAL *factor, sa_forecast *forecast) {
  const bool turned = a_step != 1;
  for (int row = 0; row < rows; row += ROWS, extent++) {
    const int height = rows - row < ROWS ? rows - row : ROWS;
    const int step = along ? extent->first : 0, steps = along ? extent->end - extent->first : depth;
    const int end = along ? columns : NAME(columns)(extent->end);
    if (!steps && start == SA_FROM_SELF) continue;
    for (int column = along ? 0 : extent->first / LANES * LANES, vectors; column < end; column += vectors * LANES) {
      vectors = NAME(tile_vectors)(end - column);
      NAME(strips)
      [NAME(way)(turned, b_row, c_row, start)][vectors][height](
          1, a + row * a_row + step * a_step, turned ? a_step : a_row, b + step * b_row + column, b_row,
          c + row * c_row + column, c_row, steps, start, start == SA_FROM_SCALED ? factor + row : factor, NULL,
          forecast);
    }
  }
}

// to[dim][ROW] = factor * rows of x, transposed, 0 beyond the block and in the rows whose bit is set in `skip`.
// `factors` (may be NULL): one more of each row.
static void NAME(pack)(const sa_operand *x, const NAME(block) * block, int width, REAL factor, const REAL *factors,
                       uint64_t skip, REAL *to) {
  const uint64_t lanes = ((uint64_t)2 << (LANES - 1)) - 1;
  const bool in_place = x->dtype == DTYPE && block->each == block->count;
  REAL rows[LANES * SA_FUSED_WIDTH];
  for (int first = 0; first < block->vectors * LANES; first += LANES) {
    NAME(vector) by = NAME(set)(factor);
    if (factors) by = by * NAME(load)(factors + first);
    if (in_place && first + LANES <= block->count && !(skip >> first & lanes)) {
      NAME(turn)(NAME(row_at)(x, block, first), x->stride[2], width, by, to + first);
      continue;
    }
    for (int i = 0; i < LANES; i++) {
      const bool absent = first + i >= block->count || skip >> (first + i) & 1;
      REAL *row = rows + i * SA_FUSED_WIDTH;
      if (absent)
        memset(row, 0, sizeof *row * width);
      else
        NAME(read_row)
      (NAME(row_at)(x, block, first + i), x->dtype, width, row);
    }
    NAME(turn)(rows, SA_FUSED_WIDTH, width, by, to + first);
  }
}
