// the visible part of a plan, as the stretches of keys that a block of queries has to look at
#ifndef SAFEATTN_KERNELS_CPU_WALK_H
#define SAFEATTN_KERNELS_CPU_WALK_H
#include "interrupt.h"
#include "plan.h"

// A block of queries is half a tile: as many as one word of a pattern has bits. Keys come in stretches of up to KEYS,
// and masks are looked at in segments of 64 keys. Up to GROUP blocks go along the same keys together.
enum { QUERIES = 64, KEYS = SA_TILE, SEGMENT = 64, SEGMENTS = SA_TILE / SEGMENT, GROUP = 8 };

// Rows of memory that will be wanted, in their order. Products call for their lines into the second cache, a few every
// some steps: a call that finds the processor's buffers for misses full holds up all that comes after it.
typedef struct sa_forecast {
  struct {
    const char *row;
    int64_t stride, bytes, rows;
  } part[8];
  int next, parts;
  int64_t called;  // bytes of the next part's row
} sa_forecast;

static inline void sa_forecast_add(sa_forecast *forecast, const void *row, int64_t stride, int64_t bytes,
                                   int64_t rows) {
  if (rows <= 0 || bytes <= 0 || forecast->parts == 8) return;
  forecast->part[forecast->parts].row = row;
  forecast->part[forecast->parts].stride = stride;
  forecast->part[forecast->parts].bytes = bytes;
  forecast->part[forecast->parts++].rows = rows;
}

// What is not called for yet of another's parts, from part `first` on.
static inline void sa_forecast_append(sa_forecast *forecast, const sa_forecast *other, int first) {
  for (int n = other->next > first ? other->next : first; n < other->parts && forecast->parts < 8; n++) {
    forecast->part[forecast->parts++] = other->part[n];
  }
}

static inline __attribute__((always_inline)) void sa_forecast_call(sa_forecast *forecast) {
  for (int line = 0; line < 6 && forecast->next < forecast->parts; line++) {
    __typeof__(&forecast->part[0]) part = &forecast->part[forecast->next];
    __builtin_prefetch(part->row + forecast->called, 0, 2);
    forecast->called += 64;
    if (forecast->called < part->bytes) continue;
    forecast->called = 0;
    part->row += part->stride;
    if (--part->rows == 0) forecast->next++;
  }
}

// Which pairs of a masked stretch products can leave out: those outside of what every ROWS rows of a register tile see
// some of.
enum { ROWS = 6, REACH = 16 };
typedef struct sa_extent {
  int first, end;
} sa_extent;
typedef struct sa_outline {
  sa_extent queries[KEYS / ROWS + 1], keys[QUERIES / ROWS + 1];  // that so many keys see, and so many queries
  sa_extent reach[QUERIES / REACH];  // keys whose pairs with every REACH queries some product reads
} sa_outline;

static inline void sa_extend(sa_extent *extent, int first, int end) {
  if (first < extent->first) extent->first = first;
  if (end > extent->end) extent->end = end;
}

// What the products along keys and those along queries read of an outline, for every REACH queries.
static inline void sa_draw_reach(int keys, int queries, sa_outline *outline) {
  for (int at = 0; at < QUERIES / REACH; at++) outline->reach[at] = (sa_extent){keys, 0};
  for (int i = 0; i < queries; i += ROWS) {
    const sa_extent seen = outline->keys[i / ROWS];
    const int last = i + ROWS < queries ? i + ROWS - 1 : queries - 1;
    if (!seen.end) continue;
    for (int at = i / REACH; at <= last / REACH; at++) sa_extend(&outline->reach[at], seen.first, seen.end);
  }
  for (int r = 0; r < keys; r += ROWS) {
    const sa_extent seers = outline->queries[r / ROWS];
    const int end = r + ROWS < keys ? r + ROWS : keys;
    if (!seers.end) continue;
    for (int at = seers.first / REACH; at <= (seers.end - 1) / REACH; at++) sa_extend(&outline->reach[at], r, end);
  }
}

// `count` keys from `first` on; visible to the block as `pattern` says, or, when that is NULL, to all its queries.
typedef struct sa_stretch {
  int64_t first;
  int count;
  const uint64_t (*pattern)[SA_TILE / 64];  // word of key r: pattern[r][half]
  bool again;                               // the same keys as the stretch that the worker had before
  sa_forecast *forecast;                    // what to call for meanwhile; may be NULL
  const sa_outline *outline;                // what products can leave out; may be NULL
} sa_stretch;

// Draws the outline of so many words of so many queries; false when that would leave out little.
static inline bool sa_draw_outline(const uint64_t *words, int keys, int queries, sa_outline *outline) {
  const int groups = (queries + ROWS - 1) / ROWS;
  const uint64_t group = (UINT64_C(1) << ROWS) - 1, all = queries < 64 ? (UINT64_C(1) << queries) - 1 : ~UINT64_C(0);
  int left = 0;
  for (int r = 0; r < keys; r += ROWS) {
    uint64_t either = 0;
    for (int i = r; i < r + ROWS && i < keys; i++) either |= words[i];
    either &= all;
    sa_extent *extent = &outline->queries[r / ROWS];
    *extent = (sa_extent){0, 0};
    if (either) *extent = (sa_extent){__builtin_ctzll(either), 64 - __builtin_clzll(either)};
    left += extent->end - extent->first;
  }
  if (left * ROWS * 8 > keys * queries * 7) return false;
  for (int n = 0; n < groups; n++) outline->keys[n] = (sa_extent){0, 0};
  uint64_t seen = ~all;
  for (int r = keys - 1; r >= 0 && ~seen; r--) {
    for (uint64_t seers = words[r] & ~seen; seers; seers &= ~seen) {
      const int n = __builtin_ctzll(seers) / ROWS;
      outline->keys[n].end = r + 1;
      seen |= group << n * ROWS;
    }
  }
  seen = ~all;
  for (int r = 0; r < keys && ~seen; r++) {
    for (uint64_t seers = words[r] & ~seen; seers; seers &= ~seen) {
      const int n = __builtin_ctzll(seers) / ROWS;
      outline->keys[n].first = r;
      seen |= group << n * ROWS;
    }
  }
  sa_draw_reach(keys, queries, outline);
  return true;
}

typedef struct sa_walk {
  const sa_plan *plan;
  const sa_run *run, *end;
  int64_t segment, segment_end;  // of the run: next to be seen, and where it ends
  int32_t tile_first, tile_end;  // only these columns of tiles
  int most;                      // keys of a stretch: SEGMENT or KEYS
  int half;                      // of the tile's queries the block is
  uint64_t queries;              // bits of the queries that the block has
} sa_walk;

// Where in its run the walk begins and ends: what lies outside the wanted columns of tiles is left out.
static inline void sa_walk_enter(sa_walk *walk) {
  if (walk->run == walk->end) return;
  const int32_t before = walk->tile_first - walk->run->first, within = walk->tile_end - walk->run->first;
  walk->segment = (int64_t)(before > 0 ? before : 0) * SEGMENTS;
  walk->segment_end = (int64_t)(within < walk->run->count ? within : walk->run->count) * SEGMENTS;
}

static inline sa_walk sa_walk_start(const sa_plan *plan, int64_t plane, int64_t query, int count, int64_t tile_first,
                                    int64_t tile_end, int most) {
  const int64_t row = plane * plan->row_tiles + query / SA_TILE;
  sa_walk walk = {
      .plan = plan,
      .run = plan->row_runs + plan->row_start[row],
      .end = plan->row_runs + plan->row_start[row + 1],
      .tile_first = (int32_t)tile_first,
      .tile_end = (int32_t)tile_end,
      .most = most,
      .half = (int)(query % SA_TILE / QUERIES),
      .queries = count == 64 ? ~UINT64_C(0) : (UINT64_C(1) << count) - 1,
  };
  sa_walk_enter(&walk);
  return walk;
}

typedef enum sa_sight { SA_SEES_NONE, SA_SEES_SOME, SA_SEES_ALL } sa_sight;

// What a block sees of `count` keys.
static inline sa_sight sa_walk_look(const uint64_t (*pattern)[SA_TILE / 64], int count, int half, uint64_t queries) {
  uint64_t either = 0, both = queries;
  for (int key = 0; key < count; key++) {
    either |= pattern[key][half];
    both &= pattern[key][half];
  }
  return !(either & queries) ? SA_SEES_NONE : both == queries ? SA_SEES_ALL : SA_SEES_SOME;
}

// The next stretch; false at the end, and when attention is interrupted. PARTIAL tiles are looked at in segments, so
// that the empty half of a diagonal tile is skipped and a tail of keys, which only shortens the stretch, does not make
// a block pay for a mask.
static inline bool sa_walk_next(sa_walk *walk, sa_stretch *stretch) {
  if (sa_interrupt_pending()) return false;
  for (; walk->run < walk->end; walk->run++, sa_walk_enter(walk)) {
    while (walk->segment < walk->segment_end) {
      const int64_t segment = walk->segment, key = (int64_t)walk->run->first * SA_TILE + segment * SEGMENT;
      const int64_t left = walk->plan->keys - key;
      if (walk->run->pattern == SA_FULL) {
        const int64_t rest = (walk->segment_end - segment) * SEGMENT;
        const int count = rest < walk->most ? (int)rest : walk->most;
        walk->segment += count / SEGMENT;
        *stretch = (sa_stretch){.first = key, .count = count};
        return true;
      }
      walk->segment++;
      if (left <= 0) continue;
      const int offset = (int)(segment % SEGMENTS) * SEGMENT;
      const uint64_t(*pattern)[SA_TILE / 64] = walk->plan->patterns[walk->run->pattern].word + offset;
      int count = left < SEGMENT ? (int)left : SEGMENT;
      const sa_sight sight = sa_walk_look(pattern, count, walk->half, walk->queries);
      if (sight == SA_SEES_NONE) continue;
      if (walk->most > SEGMENT && offset == 0 && left > SEGMENT) {
        const int more = left < SA_TILE ? (int)left - SEGMENT : SA_TILE - SEGMENT;
        if (sa_walk_look(pattern + SEGMENT, more, walk->half, walk->queries) == sight) {
          walk->segment++;
          count += more;
        }
      }
      *stretch = (sa_stretch){.first = key, .count = count, .pattern = sight == SA_SEES_ALL ? NULL : pattern};
      return true;
    }
  }
  return false;
}

#endif
