// what a compiled mask looks like to a kernel
#ifndef SAFEATTN_PLAN_H
#define SAFEATTN_PLAN_H
#include "safeattn.h"

// Tiles are SA_TILE x SA_TILE pairs; a tile is EMPTY (in no list), FULL (every pair visible, no tail) or PARTIAL.
// A tail beyond L or S is a masked pair, so the last tiles of a ragged sequence are PARTIAL.
enum { SA_FULL = -1 };

// `count` neighbouring tiles from tile `first` on, all FULL, or all with the same pattern of visible pairs.
typedef struct sa_run {
  int32_t first, count, pattern;
} sa_run;

// One bit a pair, key-major: bit (query % 64) of word[key][query / 64], query and key counted inside the tile. The
// kernels of the CPU compute transposed scores, one vector along the queries per key, and read a vector's bits at once.
typedef struct sa_pattern {
  uint64_t word[SA_TILE][SA_TILE / 64];
} sa_pattern;

// What a device keeps with a plan (backend.h); newest first.
typedef struct sa_plan_copy {
  int32_t device;
  void *copy;
  void (*drop)(void *copy);
  struct sa_plan_copy *next;
} sa_plan_copy;

// A plane is one (batch, head); batch and heads are 1 when the mask does not depend on them.
struct sa_plan {
  int64_t batch, heads, queries, keys;
  int64_t row_tiles, col_tiles;  // ceil(queries / SA_TILE), ceil(keys / SA_TILE)
  // Per row of tiles: runs[row_start[plane * row_tiles + row] .. row_start[.. + 1]), PARTIAL before FULL, else
  // ascending.
  const int64_t *row_start;
  const sa_run *row_runs;
  // The same per column of tiles; `first` and `count` then count rows.
  const int64_t *col_start;
  const sa_run *col_runs;
  const sa_pattern *patterns;  // aligned to 64 bytes
  int64_t pattern_count;
  const uint64_t *dead_rows;   // per plane: ceil(queries / 64) words; a set bit is a query that sees no key
  const uint64_t *dead_keys;   // per plane: ceil(keys / 64) words
  const int64_t *row_visible;  // visible pairs per plane and row of tiles
  const int64_t *col_visible;  // visible pairs per plane and column of tiles
  int64_t visible, empty, partial, full;
  int64_t bytes;         // that the plan holds
  int64_t holders;       // atomic
  sa_plan_copy *copies;  // atomic
};

static inline int64_t sa_plan_plane(const sa_plan *plan, int64_t batch, int64_t head) {
  return (plan->batch == 1 ? 0 : batch) * plan->heads + (plan->heads == 1 ? 0 : head);
}

// Bits of the 64 rows from `query`, a multiple of 64, on that see no key.
static inline uint64_t sa_plan_dead_rows_at(const sa_plan *plan, int64_t plane, int64_t query) {
  return plan->dead_rows[plane * ((plan->queries + 63) / 64) + query / 64];
}

// Of sa_host (backend.h).
void *sa_plan_copy_on(const sa_plan *plan, int device);
void *sa_plan_attach_copy(const sa_plan *plan, int device, void *copy, void (*drop)(void *copy));

#endif
