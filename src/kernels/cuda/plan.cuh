// a compiled mask on the device: what the attention kernels read
#ifndef SAFEATTN_KERNELS_CUDA_PLAN_CUH
#define SAFEATTN_KERNELS_CUDA_PLAN_CUH
#include <cuda_runtime.h>

#include "plan.h"

// What a warp that takes a row of tiles has to know of it, 32 words, so that its lanes find all of it in one load.
enum { SA_RECORDED_RUNS = 7 };
typedef struct sa_device_row {
  int32_t tile, runs, tiles;
  // The run to begin with: where several PARTIAL ones come before a FULL one, as at the ends of a window, the FULL one,
  // so that every row has a maximum after the first step.
  int32_t first_run;
  int64_t first;                 // its runs are row_runs[first ..]
  uint64_t dead[SA_TILE / 64];   // a bit a query that sees no key or lies beyond the last
  sa_run run[SA_RECORDED_RUNS];  // the first of them
  int32_t unused;
} sa_device_row;

// The plan of plan.h, uploaded once (mask.cu) and kept with it. Every pointer is device memory. A plane is one (batch,
// head) of the mask; batch and heads are 1 when the mask does not depend on them.
//
// Bits are in the order of the accumulators of mma.sync and wgmma, so that a thread reads its own in one or two loads:
//
//   row_bits  scores S = Q K^T, queries along the rows. [pattern][query / 16][lane]: .x belongs to query lane / 4 of
//   the
//             group of 16, .y to query lane / 4 + 8; bit 2 j + c is key 8 j + 2 (lane % 4) + c of the tile, j = 0
//             .. 15.
//   col_bits  transposed scores S^T = K Q^T, keys along the rows. [pattern][query / 64][key / 64][thread], thread =
//             (key % 64) / 16 * 32 + lane, lane = key % 8 * 4 + query % 8 / 2; bit (query % 64) / 8 * 4 +
//             (key % 16) / 8 * 2 + query % 2.
typedef struct sa_device_plan {
  int64_t batch, heads, queries, keys;
  int32_t row_tiles, col_tiles;
  const int64_t *row_start;  // as in sa_plan
  const sa_run *row_runs;    // PARTIAL before FULL, else ascending
  const int64_t *col_start;
  const sa_run *col_runs;
  const uint2 *row_bits;      // 256 a pattern: 2 KiB
  const uint32_t *col_bits;   // 512 a pattern: 2 KiB
  const uint64_t *dead_rows;  // as in sa_plan
  const uint64_t *dead_keys;
  const int32_t *row_order;        // per plane: its rows of tiles, those with most tiles first
  const int32_t *col_order;        // per plane: its columns of tiles, likewise
  int64_t visible, partial, full;  // over all planes
  const int64_t *row_before;       // per row of tiles, and at the end: tiles of all rows before, one for a row of none
  const int64_t *run_before;       // per run of a row: tiles of its row before
  int64_t listed;                  // the last of row_before
  const sa_device_row *row_records;  // per plane: its rows of tiles, in row_order
} sa_device_plan;

static __host__ __device__ inline int64_t sa_device_plane(const sa_device_plan &plan, int64_t batch, int64_t head) {
  return (plan.batch == 1 ? 0 : batch) * plan.heads + (plan.heads == 1 ? 0 : head);
}

// The copy of `plan` on the device that the calling thread has made current, uploaded on the first call. NULL when that
// failed; the host has been told why, in the name of `function`.
const sa_device_plan *sa_cuda_plan(const char *function, const sa_plan *plan, int device);

#endif
