// a block of queries: where its rows lie, turned and finite parts of rows, and room, for one REAL; part of flash_tile.h

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
  if (block->each == block->count) return sa_at(x, block->batch, block->head, block->query + i, 0);
  return sa_at(x, block->batch, block->head + i / block->each, block->query + i % block->each, 0);
}

// A row as the kernels compute with it: where it lies, or converted into `room`.
static inline const REAL *NAME(row_of)(const void *from, int dtype, int width, REAL *room) {
  if (dtype == DTYPE) return from;
  NAME(read_row)(from, dtype, width, room);
  return room;
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
#if !defined(OWN_COLUMNS)
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
#endif

#if !defined(OWN_SUMS)
// The sum of each vector's lanes, vector i's in lane i. Interleaving the halves and adding, log2(LANES) times over.
static inline __attribute__((always_inline)) NAME(vector) NAME(sums_of)(NAME(vector) sum[LANES]) {
  const NAME(order) low = {SA_LOW}, high = {SA_HIGH};
#pragma GCC unroll 4
  for (int n = LANES / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
      sum[i] = __builtin_shuffle(sum[i], sum[i + n], low) + __builtin_shuffle(sum[i], sum[i + n], high);
    }
  }
  return sum[0];
}
#endif

// to = from, a square of LANES x LANES, transposed, each row times its factor.
static inline __attribute__((always_inline)) void NAME(transpose)(const REAL *from, int64_t from_row,
                                                                  NAME(vector) factor, REAL *to, int64_t to_row) {
  NAME(vector) column[LANES];
  NAME(columns_of)(from, from_row, column);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) NAME(store)(to + i * to_row, column[i] * factor);
}

// to[column][ROW] = rows, each times its factor, transposed: a vector's worth of rows, `from_row` apart.
static void NAME(turn)(const REAL *rows, int64_t from_row, int width, NAME(vector) factor, REAL *to) {
  int d = 0;
  for (; d + LANES <= width; d += LANES) NAME(transpose)(rows + d, from_row, factor, to + d * NAME(ROW), NAME(ROW));
  for (; d < width; d++) {
    for (int i = 0; i < LANES; i++) to[d * NAME(ROW) + i] = rows[i * from_row + d] * factor[i];
  }
}

// Whether some element is NaN or Inf: x * 0 is then not 0, and no sum with it is. (The compiler makes no vectors of
// such a sum, and of flags it adds up those of each row by itself.)
static bool NAME(has_nonfinite)(const REAL *rows, int64_t stride, int count, int width) {
  const NAME(vector) zero = NAME(set)(0);
  NAME(vector) sum[2] = {zero, zero};
  REAL rest = 0;
  for (int r = 0; r < count; r++, rows += stride) {
    int d = 0;
    for (; d + 2 * LANES <= width; d += 2 * LANES) {
      sum[0] = NAME(fma)(NAME(load)(rows + d), zero, sum[0]);
      sum[1] = NAME(fma)(NAME(load)(rows + d + LANES), zero, sum[1]);
    }
    for (; d < width; d++) rest += rows[d] * 0;
  }
  const uint64_t lanes = ((uint64_t)2 << (LANES - 1)) - 1;
  return NAME(below_or_equal)(sum[0] + sum[1], zero) != lanes || rest != 0;
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

// The contributions of non-finite values to the rows that see them: o += w v where v is NaN or Inf.
// `visible` NULL: all see them.
static void NAME(add_nonfinite)(const NAME(block) * block, int keys, const uint64_t *visible, const REAL *weights,
                                const REAL *value, int64_t value_stride, int width, int64_t padded, REAL *o) {
  for (int r = 0; r < keys; r++) {
    for (int d = 0; d < width; d++) {
      const REAL v = value[r * value_stride + d];
      if (v * 0 == 0) continue;
      for (int i = 0; i < block->count; i++) {
        if (!visible || visible[r] >> i & 1) o[i * padded + d] += weights[r * NAME(ROW) + i] * v;
      }
    }
  }
}

#include "kernels/cpu/flash_sizes.h"

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

// Where the rows of a gradient are gathered: all of their whole vectors, and, where rows of keys that are wanted end
// within a vector and are gathered in place, what is beyond the last whole one.
typedef struct NAME(gradient) {
  REAL *rows;
  int64_t row;  // from one to the next
  int columns;  // of `rows`
  REAL *tail;   // [LANES] a row; may be NULL
} NAME(gradient);

static void NAME(clear_rows)(const NAME(gradient) * gradient, int64_t first, int count) {
  for (int64_t r = first; r < first + count; r++) {
    memset(gradient->rows + r * gradient->row, 0, sizeof(REAL) * gradient->columns);
    if (gradient->tail) memset(gradient->tail + r * LANES, 0, sizeof(REAL) * LANES);
  }
}

// What a block of queries has gathered: o unnormalised, relative to the running peak.
typedef struct NAME(gathered) {
  REAL *o;         // [QUERIES][value width, padded to vectors]
  REAL *peak;      // [QUERIES], in the block's unit
  REAL *sum;       // [QUERIES]
  uint64_t alive;  // bits of the queries that saw a key
} NAME(gathered);
