// the tiles of a row or a column of the plan, one after the other
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_WALK_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_WALK_CUH
#include "kernels/cuda/plan.cuh"

// The tiles of one row (or column) of tiles of the plan, in the order of its list: number `first` to `first` + `count`.
// A run is read while the one before it is walked, so that its latency is not seen.
typedef struct tile_walk {
  const sa_run *next;  // run to read
  sa_run coming;       // read ahead
  int tile, pattern;   // of what comes now
  int in_run;          // tiles of the run still to come, that one included
  int left;            // the same of all
} tile_walk;

static __device__ __forceinline__ void walk_take_run(tile_walk &walk) {
  walk.tile = walk.coming.first;
  walk.pattern = walk.coming.pattern;
  walk.in_run = walk.coming.count;
  if (walk.left > walk.in_run) walk.coming = *walk.next++;
}

static __device__ __forceinline__ int count_tiles(const sa_run *runs, int64_t count) {
  int tiles = 0;
  for (int64_t k = 0; k < count; k++) tiles += runs[k].count;
  return tiles;
}

// Whether some of the runs are of tiles of which some pairs are not visible.
static __device__ __forceinline__ bool some_masked(const sa_run *runs, int64_t count) {
  bool found = false;
  for (int64_t k = 0; k < count; k++) found |= runs[k].pattern != SA_FULL;
  return found;
}

static __device__ __forceinline__ tile_walk walk_start(const sa_run *runs, int first, int count) {
  tile_walk walk = {runs, {0, 0, 0}, 0, 0, 0, count};
  if (!count) return walk;
  sa_run run = *walk.next++;
  while (first >= run.count) {
    first -= run.count;
    run = *walk.next++;
  }
  walk.coming = {run.first + first, run.count - first, run.pattern};
  walk_take_run(walk);
  return walk;
}

// Only while walk.left > 0.
static __device__ __forceinline__ void walk_advance(tile_walk &walk) {
  if (--walk.left == 0) return;
  if (--walk.in_run)
    walk.tile++;
  else
    walk_take_run(walk);
}

#endif
