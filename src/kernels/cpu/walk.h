// the visible part of a plan, as the stretches of keys that a block of queries has to look at
#ifndef SAFEATTN_KERNELS_CPU_WALK_H
#define SAFEATTN_KERNELS_CPU_WALK_H
#include "interrupt.h"
#include "plan.h"

// A block of queries is half a tile: as many as one word of a pattern has bits.
enum { QUERIES = 64, KEYS = SA_TILE };

// `count` keys from `first` on; visible to the block as `pattern` says, or, when that is NULL, to all its queries.
typedef struct sa_stretch {
  int64_t first;
  int count;
  const uint64_t (*pattern)[SA_TILE / 64];  // word of key r: pattern[r][half]
} sa_stretch;

typedef struct sa_walk {
  const sa_plan *plan;
  const sa_run *run, *end;
  int32_t tile;                  // of the run, next to be seen
  int32_t tile_first, tile_end;  // only these columns of tiles
  int half;                      // of the tile's queries the block is
  uint64_t queries;              // bits of the queries that the block has
} sa_walk;

static inline sa_walk sa_walk_start(const sa_plan *plan, int64_t plane, int64_t query, int count, int64_t tile_first,
                                    int64_t tile_end) {
  const int64_t row = plane * plan->row_tiles + query / SA_TILE;
  return (sa_walk){
      .plan = plan,
      .run = plan->row_runs + plan->row_start[row],
      .end = plan->row_runs + plan->row_start[row + 1],
      .tile_first = (int32_t)tile_first,
      .tile_end = (int32_t)tile_end,
      .half = (int)(query % SA_TILE / QUERIES),
      .queries = count == 64 ? ~UINT64_C(0) : (UINT64_C(1) << count) - 1,
  };
}

// What the block sees of `count` keys from `from` on: nothing, everything, or some pairs.
static inline void sa_walk_classify(const sa_pattern *pattern, int from, int count, int half, uint64_t queries,
                                    bool *any, bool *all) {
  uint64_t either = 0, both = queries;
  for (int key = from; key < from + count; key++) {
    either |= pattern->word[key][half];
    both &= pattern->word[key][half];
  }
  *any = (either & queries) != 0;
  *all = both == queries;
}

// The next stretch; false at the end, and when attention is interrupted. PARTIAL tiles are looked at in halves of 64
// keys, so that the empty half of a diagonal tile is skipped and a tail of keys, which only shortens the stretch, does
// not make a block pay for a mask.
static inline bool sa_walk_next(sa_walk *walk, sa_stretch *stretch) {
  if (sa_interrupt_pending()) return false;
  for (; walk->run < walk->end; walk->run++, walk->tile = 0) {
    const sa_run *run = walk->run;
    if (run->first + walk->tile < walk->tile_first) walk->tile = walk->tile_first - run->first;
    while (walk->tile < run->count && run->first + walk->tile < walk->tile_end) {
      const int64_t key = (int64_t)(run->first + walk->tile++) * SA_TILE;
      const int64_t left = walk->plan->keys - key;
      const int count = left < SA_TILE ? (int)left : SA_TILE;
      if (run->pattern == SA_FULL) {
        *stretch = (sa_stretch){key, count, NULL};
        return true;
      }
      const sa_pattern *pattern = walk->plan->patterns + run->pattern;
      const int low = count < 64 ? count : 64;
      bool any[2], all[2];
      sa_walk_classify(pattern, 0, low, walk->half, walk->queries, &any[0], &all[0]);
      sa_walk_classify(pattern, low, count - low, walk->half, walk->queries, &any[1], &all[1]);
      if (!any[0] && !any[1]) continue;
      const int from = any[0] ? 0 : low;
      const int to = any[1] ? count : low;
      const bool whole = (!any[0] || all[0]) && (!any[1] || all[1]);
      *stretch = (sa_stretch){key + from, to - from, whole ? NULL : pattern->word + from};
      return true;
    }
  }
  return false;
}

#endif
