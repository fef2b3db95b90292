// one block of queries of the forward pass: its place, its rows, its steps through the keys
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_BLOCK_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_BLOCK_CUH
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/portable_scores.cuh"
#include "kernels/cuda/portable_split.cuh"
#include "kernels/cuda/portable_walk.cuh"

// What a launch knows. An item is a block of queries of one head (of one key head, when packed).
typedef struct forward_job {
  sa_problem p;
  sa_device_plan plan;
  tile_source q, k, v;  // of the first head
  bool out_aligned;
  int64_t group;        // query heads that share a key head
  int64_t items;        // of all
  int64_t swath;        // heads whose blocks run together, since their keys and values fit the second-level cache
  int64_t blocks;       // of queries, per head
  int32_t parts;        // the keys are split into
  int32_t value_parts;  // the columns of v are split into
  int32_t queries;      // of a block
  int32_t width;        // columns that are gathered of a query
  bool packed;
  uint8_t *suspects;  // by block of the grid: whether it is to be done carefully; NULL: none
  // What the parts gathered, [item * parts + part][query of the block]; NULL when the keys are not split.
  void *part_out, *part_peak, *part_sum;
  uint8_t *part_alive;
  void *row_base, *row_factor;  // of each query, when weights are wanted (portable_forward_weights.cu)
} forward_job;

// Whether the kernels without EXTRAS do. They multiply by the scale at the end, which must not turn peaks around, nor
// -inf into NaN.
static inline bool plain_forward(const sa_problem &p) {
  return plain_scores(p) && p.scale >= 0x1p-16 && !(p.dropout > 0) && !p.weights.data;
}

static const char forward_name[] = "sa_forward";

// Of portable_forward_<dtype>.cu.
template <class P>
int sa_cuda_forward(forward_job &job, cudaStream_t stream);

// Of portable_forward_weights.cu: writes the weights, when all else is done.
int sa_cuda_forward_weights(forward_job job, cudaStream_t stream);

// FOLD times 16 queries a warp, KEYS keys a step. With one STAGE of shared memory keys are loaded while values are
// multiplied, and the other way round; with two, both are loaded a step ahead. PACKED: the queries of all heads that
// share a key head are the rows of a block, which reads keys and values once for all of them.
template <class Products, int WIDTH_, int VALUE_WIDTH_, int FOLD_, int WARPS_, int KEYS_, int STAGES_, int RESIDENT_,
          bool EXTRAS_, bool PACKED_>
struct forward_shape {
  typedef Products products;
  typedef typename Products::element element;
  typedef typename Products::real real;
  static constexpr int WIDTH = WIDTH_, VALUE_WIDTH = VALUE_WIDTH_, FOLD = FOLD_, WARPS = WARPS_, KEYS = KEYS_;
  static constexpr int STAGES = STAGES_;
  static constexpr int RESIDENT = RESIDENT_;  // blocks a multiprocessor
  static constexpr bool EXTRAS = EXTRAS_, PACKED = PACKED_;
  static constexpr int THREADS = 32 * WARPS, QUERIES = 16 * FOLD * WARPS;
  static constexpr int ROW = WIDTH * (int)sizeof(element), VALUE_ROW = VALUE_WIDTH * (int)sizeof(element);
  static constexpr int UNROLLED = WIDTH / Products::DEPTH < 8 ? WIDTH / Products::DEPTH : 8;
  // Blocks of scores that are summed side by side: as many as o leaves registers for.
  static constexpr int ABREAST = !Products::SPLIT || FOLD == 1           ? KEYS / 8
                                 : (VALUE_WIDTH > 64 ? 2 : 4) < KEYS / 8 ? (VALUE_WIDTH > 64 ? 2 : 4)
                                                                         : KEYS / 8;
  static constexpr int BLOCKS = KEYS / 8, STEPS = KEYS / Products::DEPTH, COLUMNS = VALUE_WIDTH / 8;
  static constexpr int KEY_TILE = QUERIES * ROW, VALUE_TILE = KEY_TILE + KEYS * ROW, STAGE = KEYS * (ROW + VALUE_ROW);
  static constexpr int BAD = KEY_TILE + STAGES * STAGE;
  // Scales of the rows of Q, of a step's keys and of its values.
  static constexpr int SCALES = BAD + 16, SHARED = SCALES + (Products::SPLIT ? (QUERIES + 2 * KEYS) * 4 : 0);
};

// One block's place.
typedef struct forward_block {
  int64_t item, batch, head, key_head, plane;
  int64_t query;       // the first; of the packed rows, when packed
  const sa_run *runs;  // of its row of tiles
  int first_tile, tiles;
  int part, value_part;
} forward_block;

// Item -> head and block of queries: swath by swath, the longest rows of tiles first, neighbouring heads together.
static __device__ __forceinline__ forward_block block_of_item(const forward_job &job, int64_t item, bool packed,
                                                              int queries) {
  const sa_problem &p = job.p;
  const int64_t heads = packed ? p.key_heads : p.heads, all = p.batch * heads;
  const int64_t swath = item / (job.swath * job.blocks), first = swath * job.swath;
  const int64_t here = all - first < job.swath ? all - first : job.swath, rest = item - first * job.blocks;
  const int64_t index = first + rest % here, rank = rest / here;
  forward_block block;
  block.item = item;
  block.batch = index / heads;
  if (packed) {
    block.key_head = index % heads;
    block.head = block.key_head * job.group;
  } else {
    block.head = index % heads;
    block.key_head = block.head / job.group;
  }
  block.plane = sa_device_plane(job.plan, block.batch, block.head);
  int64_t row = 0;
  if (packed) {
    block.query = rank * queries;
  } else {
    const int each = SA_TILE / queries;
    row = job.plan.row_order[block.plane * job.plan.row_tiles + rank / each];
    block.query = row * SA_TILE + rank % each * queries;
  }
  const int64_t *start = job.plan.row_start + block.plane * job.plan.row_tiles + row;
  block.runs = job.plan.row_runs + start[0];
  block.first_tile = 0;
  block.tiles = count_tiles(block.runs, start[1] - start[0]);
  block.part = block.value_part = 0;
  return block;
}

// Whether some pair of the block's row of tiles is not visible.
static __device__ __forceinline__ bool block_masked(const forward_job &job, const forward_block &block, bool packed) {
  const int64_t row = packed ? 0 : block.query / SA_TILE;
  const int64_t *start = job.plan.row_start + block.plane * job.plan.row_tiles + row;
  return some_masked(block.runs, start[1] - start[0]);
}

static __device__ __forceinline__ int64_t block_rows(const forward_job &job, bool packed) {
  return packed ? job.group * job.p.queries : job.p.queries;
}

// Row of the block -> head and query.
static __device__ __forceinline__ void place_row(const forward_job &job, const forward_block &block, bool packed,
                                                 int row, int64_t &head, int64_t &query) {
  const int64_t at = block.query + row;
  head = packed ? block.head + at / job.p.queries : block.head;
  query = packed ? at % job.p.queries : at;
}

// Where the ends of a query are kept.
static __device__ __forceinline__ int64_t kept_row(const forward_job &job, const forward_block &block, int64_t query) {
  return (block.batch * job.p.heads + block.head) * job.p.queries + query;
}

// The row of the block that this lane has as g + 8 * half of its warp's 16 rows number `fold`.
template <class C>
static __device__ __forceinline__ int lane_row(int fold, int half) {
  return (int)(threadIdx.x / 32) * 16 * C::FOLD + 16 * fold + (int)(threadIdx.x & 31) / 4 + 8 * half;
}

template <class C>
static __device__ __forceinline__ void load_queries(const forward_job &job, const forward_block &block, char *tile) {
  typedef typename C::element element;
  const sa_problem &p = job.p;
  if constexpr (!C::PACKED) {
    tile_source source = job.q;
    source.data += (block.batch * p.q.stride[0] + block.head * p.q.stride[1]) * (int64_t)sizeof(element);
    load_tile<element, C::ROW, C::QUERIES, C::THREADS>(tile, source, block.query, threadIdx.x);
  } else {
    enum { CHUNKS = C::ROW / 16 };
    for (int k = threadIdx.x; k < C::QUERIES * CHUNKS; k += C::THREADS) {
      const int row = k / CHUNKS, chunk = k % CHUNKS;
      int64_t head, query;
      place_row(job, block, C::PACKED, row, head, query);
      int bytes = (int)p.width * (int)sizeof(element) - chunk * 16;
      if (bytes < 0 || block.query + row >= block_rows(job, C::PACKED)) bytes = 0;
      const int64_t offset = row_offset(p.q, block.batch, head, query);
      const char *from = (const char *)p.q.data + (bytes ? offset * (int64_t)sizeof(element) + chunk * 16 : 0);
      *(uint4 *)(tile + tile_offset<C::ROW>(row, chunk)) = read_unaligned<element>(from, bytes);
    }
  }
}

// What a warp's rows have gathered: o unnormalised, relative to the running peak; sums are this lane's share.
template <class C>
struct gathered {
  typename C::products::total o[C::FOLD][C::COLUMNS];
  typename C::real peak[C::FOLD][2], sum[C::FOLD][2];
  uint32_t alive;  // bit 2 * fold + half: this lane saw a visible pair of that row
};

// This lane's visible pairs of a tile: bits[fold][half], as in the plan's row_bits.
template <class C>
static __device__ __forceinline__ void load_bits(const forward_job &job, const forward_block &block, int pattern,
                                                 uint32_t (&bits)[C::FOLD][2]) {
  if (pattern == SA_FULL) return;
  const uint2 *of_pattern = job.plan.row_bits + (int64_t)pattern * 256;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++) {
    if (C::PACKED) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = lane_row<C>(f, half);
        int64_t head, query;
        place_row(job, block, C::PACKED, row, head, query);
        const uint2 pair = of_pattern[query / 16 * 32 + query % 8 * 4 + (threadIdx.x & 3)];
        bits[f][half] = block.query + row >= block_rows(job, C::PACKED) ? 0 : query & 8 ? pair.y : pair.x;
      }
    } else {
      const int row = (int)(block.query % SA_TILE) + lane_row<C>(f, 0);
      const uint2 pair = of_pattern[row / 16 * 32 + (threadIdx.x & 31)];
      bits[f][0] = pair.x, bits[f][1] = pair.y;
    }
  }
}

// Where this block is in its list of tiles.
typedef struct forward_step {
  tile_walk walk;
  int piece;  // of KEYS keys
} forward_step;

template <class C>
static __device__ __forceinline__ int64_t step_key(const forward_step &step) {
  return (int64_t)step.walk.tile * SA_TILE + step.piece * C::KEYS;
}

// Returns whether the next step is in another tile. Pieces that lie beyond the last key are passed over.
template <class C>
static __device__ __forceinline__ bool step_advance(forward_step &step, int64_t keys) {
  step.piece++;
  if (step.piece < SA_TILE / C::KEYS && step_key<C>(step) < keys) return false;
  step.piece = 0;
  walk_advance(step.walk);
  return true;
}

// The scales of a block's queries, keys and values.
template <class C>
static __device__ __forceinline__ float *query_scales(char *shared) {
  return (float *)(shared + C::SCALES);
}

template <class C>
static __device__ __forceinline__ float *key_scales(char *shared) {
  return query_scales<C>(shared) + C::QUERIES;
}

template <class C>
static __device__ __forceinline__ float *value_scales(char *shared) {
  return key_scales<C>(shared) + C::KEYS;
}

#endif
