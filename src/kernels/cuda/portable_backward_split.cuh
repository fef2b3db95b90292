// rows of f32 that are split for the backward pass before its kernels load them
//
// Every block of keys reads all queries that see them: to split these each time took a fifth of its instructions. Split
// once, two operands at a time and so many heads that they take no more room than dQ, or 64 MiB, a row is read as it
// is multiplied.
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_SPLIT_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_SPLIT_CUH
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/portable_split.cuh"

// Q and dO, or K and V: [heads from first_head on][padded] rows of ROW bytes as split_rows leaves them, and their
// scales. NULL: blocks split what they load.
typedef struct split_operands {
  char *rows[2];
  float *scale[2];
  int64_t padded, first_head;
} split_operands;

// What split_operands are made of: of each batch so many heads, each of which meets `group` heads of queries.
typedef struct split_sources {
  sa_operand x[2];
  bool aligned[2], queries;
  int64_t heads, group, rows, width[2];
} split_sources;

// Whether somebody sees a tile of a head's rows: others are not loaded.
static __device__ __forceinline__ bool tile_is_seen(const sa_device_plan &plan, const split_sources &from,
                                                    int64_t batch, int64_t head, int64_t tile) {
  const int64_t *start = from.queries ? plan.row_start : plan.col_start;
  const int64_t tiles = from.queries ? plan.row_tiles : plan.col_tiles;
  for (int64_t query_head = head * from.group; query_head < (head + 1) * from.group; query_head++) {
    const int64_t at = sa_device_plane(plan, batch, query_head) * tiles + tile;
    if (start[at] < start[at + 1]) return true;
  }
  return false;
}

enum { SPLIT_ROWS = 32, SPLIT_THREADS = 128 };

template <class P, int ROW>
static __global__ void __launch_bounds__(SPLIT_THREADS)
    split_before(const __grid_constant__ sa_device_plan plan, const __grid_constant__ split_sources from,
                 const __grid_constant__ split_operands to) {
  constexpr int CHUNKS = ROW / 16;
  char *const tile = dynamic_shared<char>();
  float *const scale = (float *)(tile + SPLIT_ROWS * ROW);
  const int64_t blocks = to.padded / SPLIT_ROWS, place = blockIdx.x / blocks, head = to.first_head + place,
                first = blockIdx.x % blocks * SPLIT_ROWS, row = place * to.padded + first;
  const int which = blockIdx.y, thread = threadIdx.x;
  if (!tile_is_seen(plan, from, head / from.heads, head % from.heads, first / SA_TILE)) return;
  tile_source source = tile_source_of(from.x[which], sizeof(float), head / from.heads, head % from.heads, from.rows,
                                      from.width[which], from.aligned[which]);
  if (!from.x[which].data) source.rows = 0;
  load_tile<float, ROW, SPLIT_ROWS, SPLIT_THREADS>(tile, source, first, thread);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  split_tile<P, ROW, SPLIT_ROWS, SPLIT_THREADS>(tile, scale, false, thread);
  __syncthreads();
  for (int k = thread; k < SPLIT_ROWS * CHUNKS; k += SPLIT_THREADS)
    ((uint4 *)(to.rows[which] + row * ROW))[k] = *(const uint4 *)(tile + tile_offset<ROW>(k / CHUNKS, k % CHUNKS));
  if (thread < SPLIT_ROWS) to.scale[which][row + thread] = scale[thread];
}

// Starts copying STEP rows of a head into a tile, and their scales; as load_tile. All that a row is is known here:
// where it might be another's, a backward took 4 % longer.
template <int ROW, int STEP, int THREADS>
static __device__ __forceinline__ void load_split(char *tile, float *scale, const split_operands &from, int which,
                                                  int64_t head, int64_t first, int thread) {
  const int64_t row = (head - from.first_head) * from.padded + first;
  const tile_source source = {from.rows[which] + row * ROW, ROW, STEP, ROW, true};
  load_tile<float, ROW, STEP, THREADS>(tile, source, 0, thread);
  if (thread < STEP / 4) copy_async(shared_address(scale + 4 * thread), from.scale[which] + row + 4 * thread);
}

#endif
