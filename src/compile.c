// compiles a mask expression to a plan: lists of runs of tiles for rows and for columns, patterns, sums
#include <string.h>

#include "memory.h"
#include "status.h"
#include "term.h"

/*  The way of it
 *
 *  A row of tiles is asked about in aligned groups of 2^level tiles, which the terms of the expression answer by
 *  interval arithmetic. A group that is MIXED is halved; a single tile that is still MIXED, or a group whose tiles are
 *  ALIKE, is drawn. So a causal mask costs the logarithm of its width per row of tiles, and L x S is never walked.
 */

// What kernels never read but the plan's sums are made of.
typedef struct pattern_sums {
  int64_t visible;
  uint64_t queries[SA_TILE / 64], keys[SA_TILE / 64];  // that take part in a visible pair
} pattern_sums;

typedef struct compiler {
  const char *function;
  int64_t queries, keys, row_tiles, col_tiles, planes;
  sa_terms terms;
  // The runs of all rows of tiles in ascending order; those of row r of the planes in turn are row_start[r] up to
  // row_start[r + 1].
  sa_run *runs;
  int64_t run_count, run_room;
  int64_t *row_start, row_count;
  sa_pattern *patterns;
  pattern_sums *sums;
  int64_t pattern_count, pattern_room, sums_room;
  int32_t *places;  // open addressing of patterns by their hash, at most half full: index + 1
  int64_t place_count;
  // Per column of tiles of all planes: its partial and full runs; first how many, then where the next one goes.
  int64_t (*columns)[2];
  int32_t *since;  // per column of tiles: the row in which its open run starts
} compiler;

/*  Patterns: equal ones are kept once  */

// EMPTY, FULL or MIXED.
static sa_verdict pattern_verdict(const sa_pattern *pattern) {
  uint64_t some = 0, every = ~UINT64_C(0);
  for (int key = 0; key < SA_TILE; key++)
    for (int word = 0; word < SA_TILE / 64; word++) {
      some |= pattern->word[key][word];
      every &= pattern->word[key][word];
    }
  return some == 0 ? EMPTY : every == ~UINT64_C(0) ? FULL : MIXED;
}

static int64_t count_bits(uint64_t bits) {
  bits -= bits >> 1 & 0x5555555555555555;
  bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333);
  bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f;
  return (int64_t)(bits * 0x0101010101010101 >> 56);
}

static pattern_sums sums_of(const sa_pattern *pattern) {
  pattern_sums sums = {0};
  for (int key = 0; key < SA_TILE; key++) {
    uint64_t seen = 0;
    for (int word = 0; word < SA_TILE / 64; word++) {
      sums.visible += count_bits(pattern->word[key][word]);
      sums.queries[word] |= pattern->word[key][word];
      seen |= pattern->word[key][word];
    }
    sums.keys[key / 64] |= (uint64_t)(seen != 0) << (key % 64);
  }
  return sums;
}

// Four sums side by side, so that the products do not wait for each other.
static uint64_t hash_of(const sa_pattern *pattern) {
  enum { SIDES = 4 };
  const uint64_t *word = &pattern->word[0][0];
  uint64_t sums[SIDES] = {1, 2, 3, 4};
  for (int k = 0; k < (int)(sizeof *pattern / 8); k += SIDES)
    for (int side = 0; side < SIDES; side++) {
      sums[side] = (sums[side] ^ word[k + side]) * 0x9e3779b97f4a7c15u;
      sums[side] ^= sums[side] >> 32;
    }
  return (sums[0] ^ sums[1] * 3 ^ sums[2] * 5 ^ sums[3] * 7) * 0x9e3779b97f4a7c15u >> 32;
}

static int32_t *place_of_pattern(const compiler *c, const sa_pattern *pattern) {
  for (uint64_t place = hash_of(pattern);; place++) {
    int32_t *at = &c->places[place & (uint64_t)(c->place_count - 1)];
    if (*at == 0 || memcmp(&c->patterns[*at - 1], pattern, sizeof *pattern) == 0) return at;
  }
}

static int grow_places(compiler *c) {
  const int64_t count = c->place_count ? 2 * c->place_count : 16;
  int32_t *places = sa_allocate_zeroed(c->function, count * (int64_t)sizeof *places);
  if (!places) return SA_NO_MEMORY;
  sa_release(c->places);
  c->places = places;
  c->place_count = count;
  for (int64_t k = 0; k < c->pattern_count; k++) *place_of_pattern(c, &c->patterns[k]) = (int32_t)k + 1;
  return SA_OK;
}

static int keep_pattern(compiler *c, const sa_pattern *pattern, int32_t *index) {
  if (2 * (c->pattern_count + 1) > c->place_count && grow_places(c)) return SA_NO_MEMORY;
  int32_t *at = place_of_pattern(c, pattern);
  if (*at == 0) {
    if (c->pattern_count == INT32_MAX)
      return sa_fail(SA_INVALID, c->function, "mask: has more than 2^31 different tiles, wanted fewer");
    if (sa_make_room(c->function, &c->patterns, c->pattern_count, &c->pattern_room, sizeof *pattern) ||
        sa_make_room(c->function, &c->sums, c->pattern_count, &c->sums_room, sizeof *c->sums))
      return SA_NO_MEMORY;
    c->patterns[c->pattern_count] = *pattern;
    c->sums[c->pattern_count] = sums_of(pattern);
    *at = (int32_t)++c->pattern_count;
  }
  *index = *at - 1;
  return SA_OK;
}

/*  Rows of tiles  */

static int add_run(compiler *c, int64_t first, int64_t count, int32_t pattern) {
  sa_run *before = c->run_count > c->row_start[c->row_count] ? &c->runs[c->run_count - 1] : NULL;
  if (before && before->pattern == pattern && before->first + before->count == first) {
    before->count += (int32_t)count;
    return SA_OK;
  }
  const int status = sa_make_room(c->function, &c->runs, c->run_count, &c->run_room, sizeof *c->runs);
  if (!status) c->runs[c->run_count++] = (sa_run){(int32_t)first, (int32_t)count, pattern};
  return status;
}

// Adds the runs of column tiles [index << level, (index + 1) << level) of a row.
static int walk(compiler *c, int64_t row, int level, int64_t index) {
  const int64_t first = index << level, last = sa_least((index + 1) << level, c->col_tiles);
  if (first >= last) return SA_OK;
  const sa_rectangle r = {row, index, level, row * SA_TILE, (row + 1) * SA_TILE, first * SA_TILE, last * SA_TILE};
  sa_verdict seen = sa_terms_classify(&c->terms, &r);
  if (seen == MIXED && level > 0) {
    const int status = walk(c, row, level - 1, 2 * index);
    return status ? status : walk(c, row, level - 1, 2 * index + 1);
  }
  int32_t pattern = SA_FULL;
  if (seen >= ALIKE) {
    const sa_pattern *drawn = sa_terms_draw(&c->terms, &r);
    seen = pattern_verdict(drawn);
    if (seen == MIXED) {
      const int status = keep_pattern(c, drawn, &pattern);
      if (status) return status;
    }
  }
  return seen == EMPTY ? SA_OK : add_run(c, first, last - first, pattern);
}

static int compile_rows(compiler *c, int64_t batch, int64_t heads) {
  const int levels = sa_levels(c->col_tiles);
  c->row_start[0] = 0;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++) {
      sa_terms_enter(&c->terms, b, h);
      for (int64_t row = 0; row < c->row_tiles; row++) {
        const int status = walk(c, row, levels, 0);
        if (status) return status;
        c->row_start[++c->row_count] = c->run_count;
      }
    }
  return SA_OK;
}

/*  Columns of tiles
 *
 *  From one row to the next only the columns whose tile changes need a look, so the work is that of the runs that come
 *  out, not of the tiles.
 */

enum { PARTIAL_RUN = 0, FULL_RUN = 1, NO_TILE = -2 };

// The columns [first, last) change from the tile `before` to another in `row`. A run that was open ends: it is counted,
// or, when there is a place for it, written.
static void change_columns(compiler *c, int64_t (*columns)[2], sa_run *to, int64_t first, int64_t last, int32_t before,
                           int64_t row) {
  for (int64_t column = first; column < last; column++) {
    if (before != NO_TILE) {
      int64_t *next = &columns[column][before == SA_FULL ? FULL_RUN : PARTIAL_RUN];
      if (to) to[*next] = (sa_run){c->since[column], (int32_t)row - c->since[column], before};
      ++*next;
    }
    c->since[column] = (int32_t)row;
  }
}

// A row of tiles as stretches of one tile, EMPTY ones included.
typedef struct stretches {
  const sa_run *run, *end;
  int64_t last;  // where the stretch at hand ends
  int32_t tile;
} stretches;

static void next_stretch(stretches *s, int64_t from, int64_t col_tiles) {
  if (s->run == s->end) {
    s->last = col_tiles;
    s->tile = NO_TILE;
  } else if (s->run->first > from) {
    s->last = s->run->first;
    s->tile = NO_TILE;
  } else {
    s->last = s->run->first + s->run->count;
    s->tile = s->run->pattern;
    s->run++;
  }
}

static void compare_rows(compiler *c, int64_t (*columns)[2], sa_run *to, stretches before, stretches now, int64_t row) {
  for (int64_t column = 0; column < c->col_tiles;) {
    if (before.last == column) next_stretch(&before, column, c->col_tiles);
    if (now.last == column) next_stretch(&now, column, c->col_tiles);
    const int64_t last = sa_least(before.last, now.last);
    if (before.tile != now.tile) change_columns(c, columns, to, column, last, before.tile, row);
    column = last;
  }
}

// Counts the runs of the columns (to NULL), or writes them.
static void compile_columns(compiler *c, sa_run *to) {
  for (int64_t plane = 0; plane < c->planes; plane++) {
    stretches before = {0};
    for (int64_t row = 0; row <= c->row_tiles; row++) {
      stretches now = {0};
      if (row < c->row_tiles) {
        const int64_t *start = &c->row_start[plane * c->row_tiles + row];
        now.run = c->runs + start[0];
        now.end = c->runs + start[1];
      }
      compare_rows(c, c->columns + plane * c->col_tiles, to, before, now, row);
      before = now;
    }
  }
}

/*  The plan  */

// Lays out the parts of a plan in one allocation, each aligned to 64 bytes; with a NULL base it only measures.
typedef struct layout {
  char *base;
  int64_t bytes;
} layout;

static void *part(layout *l, int64_t count, int64_t size) {
  void *at = l->base ? l->base + l->bytes : NULL;
  l->bytes += (count * size + 63) / 64 * 64;
  return at;
}

static sa_plan *lay_out(const compiler *c, layout *l, int64_t col_runs) {
  sa_plan *plan = part(l, 1, sizeof *plan);
  sa_plan parts = {0};
  const int64_t rows = c->planes * c->row_tiles, columns = c->planes * c->col_tiles;
  parts.patterns = part(l, c->pattern_count, sizeof *parts.patterns);
  parts.row_start = part(l, rows + 1, sizeof *parts.row_start);
  parts.row_runs = part(l, c->run_count, sizeof *parts.row_runs);
  parts.col_start = part(l, columns + 1, sizeof *parts.col_start);
  parts.col_runs = part(l, col_runs, sizeof *parts.col_runs);
  parts.dead_rows = part(l, c->planes * ((c->queries + 63) / 64), sizeof *parts.dead_rows);
  parts.dead_keys = part(l, c->planes * ((c->keys + 63) / 64), sizeof *parts.dead_keys);
  parts.row_visible = part(l, rows, sizeof *parts.row_visible);
  parts.col_visible = part(l, columns, sizeof *parts.col_visible);
  if (plan) *plan = parts;
  return plan;
}

// Dead bits of the positions of a tile, given those that take part in a visible pair.
static void note_dead(uint64_t *dead, int64_t positions, int64_t tile, const uint64_t alive[SA_TILE / 64]) {
  for (int64_t word = 0; word < SA_TILE / 64; word++) {
    const int64_t first = tile * SA_TILE + 64 * word;
    if (first < positions) dead[first / 64] = ~alive[word] & sa_word_range(0, sa_least(positions - first, 64));
  }
}

// Visible pairs and dead positions of one row (or column) of tiles.
static int64_t sum_runs(const compiler *c, const sa_run *run, const sa_run *end, bool rows, int64_t positions,
                        int64_t tile, uint64_t *dead) {
  int64_t visible = 0;
  uint64_t alive[SA_TILE / 64] = {0};
  for (; run < end; run++) {
    static const pattern_sums full = {SA_TILE * SA_TILE, {~UINT64_C(0), ~UINT64_C(0)}, {~UINT64_C(0), ~UINT64_C(0)}};
    const pattern_sums *sums = run->pattern == SA_FULL ? &full : &c->sums[run->pattern];
    visible += run->count * sums->visible;
    for (int word = 0; word < SA_TILE / 64; word++) alive[word] |= rows ? sums->queries[word] : sums->keys[word];
  }
  note_dead(dead, positions, tile, alive);
  return visible;
}

// The plan is still the compiler's, so its parts may be written.
static void write_rows(const compiler *c, sa_plan *plan) {
  int64_t *start = (int64_t *)plan->row_start;
  sa_run *to = (sa_run *)plan->row_runs;
  memcpy(start, c->row_start, (size_t)(c->row_count + 1) * sizeof *start);
  for (int64_t row = 0; row < c->row_count; row++) {
    for (int64_t k = start[row]; k < start[row + 1]; k++)
      if (c->runs[k].pattern != SA_FULL) *to++ = c->runs[k], plan->partial += c->runs[k].count;
    for (int64_t k = start[row]; k < start[row + 1]; k++)
      if (c->runs[k].pattern == SA_FULL) *to++ = c->runs[k], plan->full += c->runs[k].count;
  }
  for (int64_t row = 0; row < c->row_count; row++) {
    const int64_t plane = row / c->row_tiles;
    const int64_t visible =
        sum_runs(c, plan->row_runs + start[row], plan->row_runs + start[row + 1], true, c->queries, row % c->row_tiles,
                 (uint64_t *)plan->dead_rows + plane * ((c->queries + 63) / 64));
    ((int64_t *)plan->row_visible)[row] = visible;
    plan->visible += visible;
  }
}

// Turns the counts of runs per column into places, and returns how many runs there are.
static int64_t place_columns(compiler *c) {
  int64_t place = 0;
  for (int64_t column = 0; column < c->planes * c->col_tiles; column++)
    for (int kind = PARTIAL_RUN; kind <= FULL_RUN; kind++) {
      const int64_t count = c->columns[column][kind];
      c->columns[column][kind] = place;
      place += count;
    }
  return place;
}

static void write_columns(compiler *c, sa_plan *plan, int64_t col_runs) {
  int64_t *start = (int64_t *)plan->col_start;
  const int64_t columns = c->planes * c->col_tiles;
  for (int64_t column = 0; column < columns; column++) start[column] = c->columns[column][PARTIAL_RUN];
  start[columns] = col_runs;
  compile_columns(c, (sa_run *)plan->col_runs);
  for (int64_t column = 0; column < columns; column++) {
    const int64_t plane = column / c->col_tiles;
    ((int64_t *)plan->col_visible)[column] =
        sum_runs(c, plan->col_runs + start[column], plan->col_runs + start[column + 1], false, c->keys,
                 column % c->col_tiles, (uint64_t *)plan->dead_keys + plane * ((c->keys + 63) / 64));
  }
}

static int write_plan(compiler *c, sa_plan **out, int64_t batch, int64_t heads) {
  compile_columns(c, NULL);
  const int64_t col_runs = place_columns(c);
  layout l = {NULL, 0};
  lay_out(c, &l, col_runs);
  l = (layout){sa_allocate(c->function, l.bytes), 0};
  if (!l.base) return SA_NO_MEMORY;
  sa_plan *plan = lay_out(c, &l, col_runs);
  plan->batch = batch;
  plan->heads = heads;
  plan->queries = c->queries;
  plan->keys = c->keys;
  plan->row_tiles = c->row_tiles;
  plan->col_tiles = c->col_tiles;
  plan->pattern_count = c->pattern_count;
  plan->bytes = l.bytes;
  plan->holders = 1;
  plan->copies = NULL;
  if (c->pattern_count)
    memcpy((sa_pattern *)plan->patterns, c->patterns, (size_t)c->pattern_count * sizeof *plan->patterns);
  write_rows(c, plan);
  write_columns(c, plan, col_runs);
  plan->empty = c->planes * c->row_tiles * c->col_tiles - plan->partial - plan->full;
  *out = plan;
  return SA_OK;
}

static int check_sizes(const compiler *c, int64_t batch, int64_t heads, int64_t *planes) {
  if (c->row_tiles > INT32_MAX || c->col_tiles > INT32_MAX)
    return sa_fail(SA_INVALID, c->function, "%s: got %lld, wanted at most %lld",
                   c->row_tiles > INT32_MAX ? "queries" : "keys",
                   (long long)(c->row_tiles > INT32_MAX ? c->queries : c->keys), (long long)INT32_MAX * SA_TILE);
  int64_t pairs;
  if (__builtin_mul_overflow(batch, heads, planes) || __builtin_mul_overflow(*planes, c->queries, &pairs) ||
      __builtin_mul_overflow(pairs, c->keys, &pairs))
    return sa_fail(SA_INVALID, c->function, "queries, keys: got %lld and %lld, wanted below 2^63 pairs in all",
                   (long long)c->queries, (long long)c->keys);
  const int64_t most_planes = (INT64_C(1) << 40) / (c->row_tiles + c->col_tiles + 1);
  if (*planes > most_planes)
    return sa_fail(SA_INVALID, c->function,
                   "mask: differs between %lld batches and %lld heads, wanted at most %lld of both", (long long)batch,
                   (long long)heads, (long long)most_planes);
  return SA_OK;
}

static int allocate_work(compiler *c) {
  c->row_start = sa_allocate(c->function, (c->planes * c->row_tiles + 1) * (int64_t)sizeof *c->row_start);
  c->columns = sa_allocate_zeroed(c->function, c->planes * c->col_tiles * (int64_t)sizeof *c->columns);
  c->since = sa_allocate(c->function, c->col_tiles * (int64_t)sizeof *c->since);
  return c->row_start && c->columns && c->since ? SA_OK : SA_NO_MEMORY;
}

static void release_work(compiler *c) {
  sa_terms_release(&c->terms);
  sa_release(c->runs);
  sa_release(c->row_start);
  sa_release(c->patterns);
  sa_release(c->sums);
  sa_release(c->places);
  sa_release(c->columns);
  sa_release(c->since);
}

int sa_compile(sa_plan **out, const sa_mask *mask, int causal, int64_t window_left, int64_t window_right, int64_t batch,
               int64_t heads, int64_t queries, int64_t keys) {
  compiler c = {.function = "sa_mask_plan",
                .queries = queries,
                .keys = keys,
                .row_tiles = sa_tiles(queries),
                .col_tiles = sa_tiles(keys)};
  c.terms = (sa_terms){.function = c.function, .queries = queries, .keys = keys};
  const int64_t own_batch = mask && mask->per_batch ? batch : 1, own_heads = mask && mask->per_head ? heads : 1;
  int status = check_sizes(&c, own_batch, own_heads, &c.planes);
  if (!status) status = sa_terms_build(&c.terms, mask, causal, window_left, window_right, batch, heads);
  if (!status) status = allocate_work(&c);
  if (!status) status = compile_rows(&c, own_batch, own_heads);
  if (!status) status = write_plan(&c, out, own_batch, own_heads);
  release_work(&c);
  return status;
}
