// the sums of dQ in memory, to which columns of keys add in turns
//
// Every column of keys that sees a row of tiles adds to the sums of its queries, those with most keys before them first
// (last, where rows are descended), so that the sums have the same bits every time. Each warp's part of a chunk of 64
// queries has a counter of who is done. The first stores, so that nobody has to fill with zeros; the last writes dQ,
// and the counter is 0 again. Blocks take their jobs from a counter as they start, in the order in which columns have
// their turns: a job waits only for jobs taken before it, by blocks that run or have ended, so the oldest unfinished
// job never waits and all come to an end, however many blocks a device has room for.
//
// The order of a chunk's accesses: stores and atomic adds of a warp -> __syncwarp -> store_release by lane 0 ->
// load_acquire that reads it, by each lane of the next one -> its adds, or loads.
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_SUMS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_SUMS_CUH
#include "kernels/cuda/portable_backward_products.cuh"
#include "kernels/cuda/portable_backward_steps.cuh"

// What the blocks of one call share.
typedef struct backward_sums {
  float *sums;     // [B H][chunk of queries][warp][element of the accumulators][lane]
  int *turn;       // [B H][chunk of queries][warp]: how many columns have added
  int *bad_query;  // [B H][chunk of queries]: whether dQ has something that is not finite
  int *bad_key;    // [job]: whether dK or dV has
  int *flagged;    // whether anything has
  int *next_job;   // of the launch, and of the careful one
  float scale_log2;
  int64_t jobs, mixed;  // key heads whose jobs are mixed, so that fewer wait for each other
  // Whether columns are taken from the first on, their rows from the last on; else the other way round. Where columns
  // get shorter, the longest are then begun first, and the blocks end at the same time.
  bool descending;
  int abreast;  // heads of a group that a job goes past, a row of tiles of each, before it comes to the next row
} backward_sums;

// A tile of a column of keys, as it is kept in shared memory.
typedef struct column_tile {
  int row, pattern;
  int turn;  // twice how many columns add to its row before this one, and 1 if none does after it
  // Of its two chunks: bits 0 and 1, whether some base is coarse; bits 2 and 3, whether dQ is flagged. From bit 4 on
  // which of the heads abreast it is of.
  int notes;
} column_tile;

// Tile number `place` of a column, of part `part` of PARTS that tiles are cut into. Columns come to a row soon after
// those before them, as rows ascend where columns descend, or are `descending` themselves.
template <int PARTS>
static __device__ __forceinline__ column_tile find_tile(const sa_device_plan &plan, int64_t plane, int column, int part,
                                                        int place, bool descending) {
  const int64_t *start = plan.col_start + plane * plan.col_tiles + column;
  const sa_run *run, *partial = plan.col_runs + start[0], *const end = plan.col_runs + start[1], *full = partial;
  while (full < end && full->pattern != SA_FULL) full++;
  const sa_run *const partial_end = full;
  for (;; place -= run->count) {
    run = full == end || (partial < partial_end && partial->first < full->first) ? partial++ : full++;
    if (place < run->count) break;
  }
  column_tile tile;
  tile.row = run->first + place;
  tile.pattern = run->pattern;
  start = plan.row_start + plane * plan.row_tiles + tile.row;
  int before = 0, all = 0;
  for (run = plan.row_runs + start[0]; run < plan.row_runs + start[1]; run++) {
    before += max(0, run->first + run->count - max(run->first, column + 1));
    all += run->count;
  }
  const int last_first = before * PARTS + PARTS - 1 - part;
  const int turn = descending ? all * PARTS - 1 - last_first : last_first;
  tile.turn = 2 * turn + (turn + 1 == all * PARTS);
  return tile;
}

// 0 for dQ of the rows of tiles of number `index`, `index` + `step` .. that see no key, to which nobody adds.
template <class Element, int THREADS>
static __device__ __forceinline__ void clear_unseen(const sa_problem &p, const sa_device_plan &plan, int64_t index,
                                                    int64_t step) {
  for (; index < p.batch * p.heads * plan.row_tiles; index += step) {
    const int64_t head = index / plan.row_tiles, row_tile = index % plan.row_tiles;
    const int64_t *start =
        plan.row_start + sa_device_plane(plan, head / p.heads, head % p.heads) * plan.row_tiles + row_tile;
    if (start[0] != start[1]) continue;
    const int64_t first = row_tile * SA_TILE, rows = min((int64_t)SA_TILE, p.queries - first);
    Element *dq = (Element *)p.dq.data + row_offset(p.dq, head / p.heads, head % p.heads, first);
    for (int64_t k = threadIdx.x; k < rows * p.width; k += THREADS)
      put_real(dq + k / p.width * p.dq.stride[2] + k % p.width, 0);
  }
}

#endif
