// what few queries against many keys are launched with on Hopper, how keys are shared out, what a block's warps share
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_DECODING_CALL_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_DECODING_CALL_CUH
#include "kernels/cuda/hopper_block.cuh"
#include "kernels/cuda/portable_forward_block.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum {
  DECODING_WARPS = 8,  // that multiply
  DECODING_THREADS = 32 * DECODING_WARPS,
  // That load, one K, one V: with one warp 8192 keys take 0.7 us longer, with four 0.8.
  DECODING_LOADERS = 2,
  DECODING_ROWS = 64,                  // of an item at most
  DECODING_RUNS = 4,                   // of tiles that travel with the launch
  DECODING_RING = 128 << 10,           // 48 KiB would do for memory; the rest is for warps that are late
  DECODING_ITEMS = 16,                 // items on their way through a block: more than steps in its ring
  DECODING_ROW_WORDS = 2 * (128 + 4),  // of a row on its way from block to block, at most
  DECODING_NOTHING = -2                // in place of the pattern of a step: there is nothing to load
};

// An item is the queries of all heads that share a key head (packed), or of one head where masks differ from head to
// head: rows of one product, in groups of 16. It is as many units as its list of tiles has steps of KEYS keys, at least
// one tile's. All units of all items in a row are shared out evenly, or, where each has as many blocks of its own,
// those of each item: a stretch a block.
//
// Items are [cycles][planes of the plan][repeats], in the order of batches and heads.
typedef struct decoding_job {
  CUtensorMap k, v;
  forward_job forward;
  int32_t k_batch_step, k_head_step, v_batch_step, v_head_step;  // 0 along dims that are broadcast, else 1
  int32_t heads;                                                 // items of a batch
  int32_t rows, groups, teams;                                   // of an item; teams of `groups` warps
  int32_t planes, repeats;
  int32_t tiles;      // of an item where there is one plane
  int32_t run_count;  // of the runs here, where there is one plane that has no more
  sa_run runs[DECODING_RUNS];
  int32_t cycle;          // units of all planes with their repeats
  bool together;          // whether each item has as many blocks of its own, a row of the grid
  int32_t span;           // units that are shared out among a row of the grid: an item's, or all
  int32_t share, longer;  // units of a block, and how many of a row's blocks, the first, have one more
  float factor;           // of products, to be exponents of 2
  // What stretches leave of the item that an earlier one begins; zeros before and after a launch.
  uint4 *parts;
} decoding_job;

// What a row has gathered beside its columns.
typedef struct decoding_row {
  float peak, sum;  // an exponent of 2; of weights relative to it
  uint32_t alive;   // whether it saw a key
} decoding_row;

// A warp's group of rows, and its team. Both numbers are powers of two, which are DECODING_WARPS together.
static __device__ __forceinline__ int decoding_group(const decoding_job &d) {
  return (int)(threadIdx.x / 32) & (d.groups - 1);
}

static __device__ __forceinline__ int decoding_team(const decoding_job &d) {
  return (int)(threadIdx.x / 32 * d.teams / DECODING_WARPS);
}

// The stretch of this block. A block waits for those of later stretches, which must have begun: they are of lower
// numbers.
static __device__ __forceinline__ int decoding_stretch() {
  return (int)(gridDim.x * (gridDim.y - blockIdx.y) - 1 - blockIdx.x);
}

// The item of a block that has it together with others.
static __device__ __forceinline__ int decoding_own_item() {
  return (int)(gridDim.y - 1 - blockIdx.y);
}

// The units of this block.
typedef struct decoding_units {
  int first, end;
} decoding_units;

static __device__ __forceinline__ decoding_units decoding_units_of(const decoding_job &d) {
  const int within = (int)(gridDim.x - 1 - blockIdx.x), longer = within < d.longer;
  const int first = decoding_own_item() * d.span + within * d.share + (longer ? within : d.longer);
  return {first, first + d.share + longer};
}

// The stretch that holds a unit, where all are one span.
static __device__ __forceinline__ int decoding_stretch_of(const decoding_job &d, int unit) {
  const int of_longer = d.longer * (d.share + 1);
  return unit < of_longer ? unit / (d.share + 1) : d.longer + (unit - of_longer) / d.share;
}

// The stretches that have parts of an item: the first of them, and how many.
typedef struct decoding_split {
  int first, parts;
} decoding_split;

static __device__ __forceinline__ decoding_split decoding_split_of(const decoding_job &d, int first_unit,
                                                                   int end_unit) {
  if (d.together) return {decoding_own_item() * (int)gridDim.x, (int)gridDim.x};
  const int first = decoding_stretch_of(d, first_unit);
  return {first, decoding_stretch_of(d, end_unit - 1) - first + 1};
}

// The widths are padded to WIDTH. A step's keys, and its values behind them, are panels of 64 columns.
template <class Products, int WIDTH>
struct decoding_shape : forward_shape<Products, WIDTH, WIDTH, 1, 1, 4096 / WIDTH, 1, 1, false, true> {
  static constexpr int KEYS = 4096 / WIDTH;
  static constexpr int PANELS = WIDTH / SA_PANEL, PANEL_BYTES = KEYS * SA_PANEL * 2;
  // Wider than 128, Q does not fit the registers beside O.
  static constexpr bool STAGES_QUERIES = WIDTH > 128;
  // Beside those that multiply and load. All these have the fewer registers the more they are: 256 * 168 + 256 * 88 are
  // 512 * 128, 256 * 216 + 128 * 72 are 384 * 168.
  static constexpr int ENDING_WARPS = WIDTH > 128 ? 2 : 6;
  static constexpr int ALL_THREADS = DECODING_THREADS + 32 * (DECODING_LOADERS + ENDING_WARPS);
  static constexpr int MULTIPLYING_REGISTERS = WIDTH > 128 ? 216 : 168;
  static constexpr int ENDING_REGISTERS = WIDTH > 128 ? 72 : 88;
  static constexpr int STEP_BYTES = 2 * PANELS * PANEL_BYTES;
  static constexpr int SLOTS = DECODING_RING / STEP_BYTES;
  // Columns of the warps' rows that are added at a time.
  static constexpr int PITCH = WIDTH < 128 ? WIDTH : 128, ROUNDS = WIDTH / PITCH;
  static_assert(SLOTS >= DECODING_WARPS, "a slot for every warp");
  static constexpr int PIECES = SA_TILE / KEYS;  // units of a tile
};

typedef struct alignas(16) decoding_step {
  int32_t key, pattern, item;
} decoding_step;

// Q of an item, as the lanes of a warp have it on the left of products.
template <class C, bool STAGED = C::STAGES_QUERIES>
struct decoding_staged {};
template <class C>
struct decoding_staged<C, true> {
  alignas(16) typename C::products::left queries[DECODING_ROWS / 16][C::WIDTH / 16][32];
};

template <class C>
struct decoding_shared : decoding_staged<C> {
  alignas(1024) uint8_t ring[C::SLOTS][C::STEP_BYTES];
  alignas(16) float columns[DECODING_WARPS][16][C::PITCH];  // of the warps' rows on their way into one
  alignas(16) decoding_step step[C::SLOTS];
  decoding_row rows[DECODING_WARPS][16];  // both [group][team]
  alignas(8) uint64_t full[C::SLOTS], empty[C::SLOTS];
  uint64_t summed, taken;  // all warps' sums of an item are there, or PITCH columns of them; they have been added
  decoding_split split[DECODING_ITEMS];
  int32_t last_item;
  uint32_t touched;  // what decoding_touch_queries read
};

#endif
