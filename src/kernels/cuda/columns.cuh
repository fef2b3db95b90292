// what the columns of tiles of a plan are like, by which backward kernels choose the order of their jobs
#ifndef SAFEATTN_KERNELS_CUDA_COLUMNS_CUH
#define SAFEATTN_KERNELS_CUDA_COLUMNS_CUH
#include "plan.h"

static inline int64_t sa_lists_in_use(const int64_t *start, int64_t count) {
  int64_t used = 0;
  for (int64_t n = 0; n < count; n++) used += start[n + 1] > start[n];
  return used;
}

// The tiles there would be if all columns that see anything saw the same rows.
static inline int64_t sa_tiles_of_alike(const sa_plan *plan) {
  int64_t tiles = 0;
  for (int64_t plane = 0; plane < plan->batch * plan->heads; plane++) {
    tiles += sa_lists_in_use(plan->row_start + plane * plan->row_tiles, plan->row_tiles) *
             sa_lists_in_use(plan->col_start + plane * plan->col_tiles, plan->col_tiles);
  }
  return tiles;
}

// Whether most columns see the same rows.
static inline bool sa_columns_alike(const sa_plan *plan) {
  return (plan->partial + plan->full) * 4 > sa_tiles_of_alike(plan) * 3;
}

// Whether columns get shorter from the first to the last, as causal ones do, and past `group` heads have at least
// `tiles` tiles each, in the mean.
static inline bool sa_columns_shrink(const sa_plan *plan, int64_t group, int64_t tiles) {
  const int64_t columns = plan->col_tiles, all = plan->batch * plan->heads * columns;
  int64_t visible[2] = {0, 0};
  if ((plan->partial + plan->full) * group < tiles * all) return false;
  for (int64_t n = 0; n < all; n++) visible[n % columns * 2 / columns] += plan->col_visible[n];
  return visible[0] >= 2 * visible[1] && !sa_columns_alike(plan);
}

#endif
