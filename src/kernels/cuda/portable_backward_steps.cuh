// what the backward pass knows of each query, and its steps through a list of tiles
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_STEPS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_STEPS_CUH
#include "kernels/cuda/portable_walk.cuh"

enum { BACKWARD_BLOCK = 64 };  // queries that share a flag

// What is known of each query, [B H][padded]. Weights are P = exp2((s - base) unit) factor: the LSE does for base, with
// a factor of 1, unless it is too large to hold the logarithm of the sum beside the peak. In f32 and f64 the base is a
// whole number among the scores, mostly 0, so that no digit is lost in a difference, and the factor is the rest.
// Queries without a key and those beyond L have a base of +inf, so P = 0.
template <class Real>
struct backward_rows {
  int64_t padded;  // queries, to whole tiles of the plan
  Real *base, *factor;
  Real *delta;         // dO . o - dLSE
  Real *sink_share;    // of dSinks; NULL: not wanted
  Real *slope_share;   // of dAlibi; NULL: not wanted
  float dweight_gain;  // of dP: uncut
  int *coarse;         // per BACKWARD_BLOCK: whether some base is still to be found from the scores
};

typedef struct backward_aligned {
  bool q, k, v, dout, out;  // rows_aligned
} backward_aligned;

// Queries (or keys) `first` .. of a list of tiles, in steps of STEP, without those in which no pair is visible.
typedef struct step_walk {
  tile_walk tiles;
  int offset;  // in the tile that comes next
} step_walk;

static __device__ __forceinline__ step_walk steps_of(const sa_run *runs, int64_t count) {
  step_walk walk;
  walk.tiles = walk_start(runs, 0, count_tiles(runs, count));
  walk.offset = 0;
  return walk;
}

// The next step before `end` for which some(pattern, offset in the tile) holds, or false.
template <int STEP, class Some>
static __device__ __forceinline__ bool next_step(step_walk &walk, int64_t end, const Some &some, int64_t &first,
                                                 int &pattern, int &offset) {
  while (walk.tiles.left) {
    while (walk.offset < SA_TILE) {
      offset = walk.offset;
      pattern = walk.tiles.pattern;
      first = (int64_t)walk.tiles.tile * SA_TILE + offset;
      walk.offset += STEP;
      if (first < end && (pattern == SA_FULL || some(pattern, offset))) return true;
    }
    walk_advance(walk.tiles);
    walk.offset = 0;
  }
  return false;
}

#endif
