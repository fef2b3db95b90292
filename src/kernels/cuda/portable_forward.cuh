// the forward pass on mma.sync: one kernel for every dtype, width and option; portable_forward_*.cu choose its shapes
//
// On an H200 at N8192: bf16 D128 372 TFLOP/s, causal 325, D64 294, D256 278; f32, N2048, D64 89 and D128 81.
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_CUH
#include <limits.h>

#include "kernels/cuda/portable_careful.cuh"
#include "kernels/cuda/portable_forward_gather.cuh"
#include "kernels/cuda/portable_forward_merge.cuh"

// Block `index` of the grid: its queries, and its part of their keys and of the columns of v.
template <class C>
static __device__ __forceinline__ forward_block block_of_grid(const forward_job &job, int64_t index) {
  const int value_part = (int)(index % job.value_parts);
  index /= job.value_parts;
  const int part = (int)(index % job.parts);
  forward_block block = block_of_item(job, index / job.parts, C::PACKED, C::QUERIES);
  block.part = part;
  block.value_part = value_part;
  if (job.parts > 1) {
    const int64_t all = block.tiles;
    block.first_tile = (int)(all * part / job.parts);
    block.tiles = (int)(all * (part + 1) / job.parts) - block.first_tile;
  }
  return block;
}

// Returns whether the block has to be done carefully; then it has written nothing.
template <class C, bool CAREFUL>
static __device__ __forceinline__ bool make_block(const forward_job &job, int64_t index) {
  typedef typename C::real real;
  char *const shared = dynamic_shared<char>();
  const forward_block block = block_of_grid<C>(job, index);
  if (block.query >= block_rows(job, C::PACKED)) return false;
  gathered<C> got;
  load_queries<C>(job, block, shared);
  copy_async_commit();
  gather<C, CAREFUL>(job, block, shared, got);
  if (__syncthreads_or(!CAREFUL && came_out_nonfinite(got))) {
    // What can leak, leaks through pairs that are masked; only f32 has another reason to look again (products_f32).
    if (C::products::SPLIT || job.p.bias.data || block_masked(job, block, C::PACKED)) return true;
  }
  if (job.parts > 1) {
    write_part<C>(job, block, got);
    return false;
  }
  real base[C::FOLD][2], factor[C::FOLD][2];
  end_rows<C>(job, block, got, base, factor);
  if (C::EXTRAS && job.p.weights.data && block.value_part == 0) keep_ends<C>(job, block, base, factor);
  write_out<C>(job, block, shared, got);
  return false;
}

template <class C>
__attribute__((noinline)) static __device__ void make_block_carefully(const forward_job &job, int64_t index) {
  make_block<C, true>(job, index);
}

template <class C>
static __global__ void __launch_bounds__(C::THREADS, C::RESIDENT)
    forward_kernel(const __grid_constant__ forward_job job) {
  dependents_launch();
  const bool suspect = make_block<C, false>(job, blockIdx.x);
  if constexpr (C::PACKED) {
    if (suspect) make_block_carefully<C>(job, blockIdx.x);
  } else if (threadIdx.x == 0 && job.suspects) {
    job.suspects[blockIdx.x] = suspect;
  }
}

template <class C>
static __global__ void __launch_bounds__(C::THREADS, C::RESIDENT)
    careful_forward_kernel(const __grid_constant__ forward_job job, int64_t blocks) {
  redo_suspects<C::THREADS>(job.suspects, blocks, [&](int64_t block) { make_block<C, true>(job, block); });
}

// Heads whose keys and values, of `head_bytes` each, fit half of the second-level cache; whole groups.
static int64_t forward_swath(const forward_job &job, int64_t heads, int64_t per_key_head, int64_t head_bytes,
                             int64_t cache_bytes) {
  int64_t fit = head_bytes ? cache_bytes / 2 / head_bytes : heads;
  if (fit < 1) fit = 1;
  fit *= per_key_head;
  const int64_t all = job.p.batch * heads;
  return fit < all ? fit : all;
}

// How many parts the keys are split into: enough to give every multiprocessor its blocks, none below `least` tiles.
static int forward_parts(const forward_job &job, int64_t items, int64_t resident, int64_t least) {
  const int64_t rows = job.plan.batch * job.plan.heads * job.plan.row_tiles;
  const int64_t tiles = rows ? (job.plan.partial + job.plan.full) / rows : 0;
  int64_t parts = items ? resident / items : 1;
  if (parts > tiles / least) parts = tiles / least;
  if (parts > MERGE_PARTS) parts = MERGE_PARTS;
  return parts > 1 ? (int)parts : 1;
}

// The blocks of the grid, and those again that have to be done carefully.
template <class C>
static int launch_blocks(forward_job &job, cudaStream_t stream) {
  const int device = job.p.device;
  const int64_t blocks = job.items * job.parts * job.value_parts;
  if (blocks > INT_MAX) return sa_cuda_host->fail(SA_UNSUPPORTED, forward_name, "q: has too many heads and queries");
  const bool careful = !C::PACKED && (C::products::SPLIT || job.p.bias.data || job.plan.partial);
  if (careful) {
    job.suspects = (uint8_t *)sa_cuda_scratch(forward_name, device, blocks);
    if (!job.suspects) return SA_NO_MEMORY;
  }
  int status =
      sa_cuda_launch(forward_name, forward_kernel<C>, dim3((unsigned)blocks), dim3(C::THREADS), C::SHARED, stream, job);
  if constexpr (!C::PACKED) {
    if (!status && careful)
      status =
          sa_cuda_launch<true>(forward_name, careful_forward_kernel<C>, dim3(redo_grid(device, blocks, C::RESIDENT)),
                               dim3(C::THREADS), C::SHARED, stream, job, blocks);
  }
  if (careful) sa_cuda_scratch_release(device, job.suspects);
  return status;
}

template <class C>
static int launch_forward(forward_job &job, cudaStream_t stream) {
  typedef typename C::real real;
  const sa_problem &p = job.p;
  const sa_cuda_properties *device = sa_cuda_properties_of(p.device);
  const int64_t heads = C::PACKED ? p.key_heads : p.heads;
  job.blocks = C::PACKED ? (job.group * p.queries + C::QUERIES - 1) / C::QUERIES
                         : (int64_t)job.plan.row_tiles * (SA_TILE / C::QUERIES);
  job.items = p.batch * heads * job.blocks;
  job.swath =
      forward_swath(job, heads, C::PACKED ? 1 : job.group,
                    p.keys * (p.width + p.value_width) * (int64_t)sizeof(typename C::element), device->cache_bytes);
  job.value_parts = p.value_width > C::VALUE_WIDTH ? (int)((p.value_width + C::VALUE_WIDTH - 1) / C::VALUE_WIDTH) : 1;
  job.queries = C::QUERIES;
  job.width = C::VALUE_WIDTH * job.value_parts;
  job.packed = C::PACKED;
  job.parts =
      p.weights.data ? 1 : forward_parts(job, job.items, (int64_t)device->processors * C::RESIDENT, C::PACKED ? 1 : 2);
  char *memory = NULL;
  if (job.parts > 1) {
    const int64_t rows = job.items * job.parts * C::QUERIES, width = job.width;
    memory = (char *)sa_cuda_scratch(forward_name, p.device, rows * ((width + 2) * (int64_t)sizeof(real) + 1));
    if (!memory) return SA_NO_MEMORY;
    job.part_out = memory;
    job.part_peak = (real *)memory + rows * width;
    job.part_sum = (real *)job.part_peak + rows;
    job.part_alive = (uint8_t *)((real *)job.part_sum + rows);
  }
  if (p.weights.data) {
    const int64_t rows = p.batch * p.heads * p.queries;
    memory = (char *)sa_cuda_scratch(forward_name, p.device, 2 * rows * (int64_t)sizeof(real));
    if (!memory) return SA_NO_MEMORY;
    job.row_base = memory;
    job.row_factor = (real *)memory + rows;
  }
  int status = launch_blocks<C>(job, stream);
  if (!status && job.parts > 1)
    status = sa_cuda_launch(forward_name, merge_kernel<typename C::products, C::WIDTH>,
                            dim3((unsigned)(job.items * C::QUERIES)), dim3(32 * MERGE_WARPS), 0, stream, job);
  if (!status && p.weights.data) status = sa_cuda_forward_weights(job, stream);
  if (memory) sa_cuda_scratch_release(p.device, memory);
  return status;
}

// The shapes for a dtype and a width that those of q and v are padded to. A block has at most 97 KiB of shared memory,
// which every device has.
template <class P, int WIDTH, bool EXTRAS>
struct forward_choice;

// Half types have two times 16 queries a warp where o leaves room: keys and values are read half as often then. One
// stage is 3 % faster than two at 128: two blocks of a multiprocessor hide what one waits for.
template <class P, int WIDTH, bool EXTRAS>
struct forward_choice_halves {
  static constexpr bool LARGE = WIDTH > 128;
  static constexpr int FOLD = EXTRAS || LARGE ? 1 : 2, KEYS = LARGE ? 32 : 64,
                       STAGES = FOLD == 2 && WIDTH == 128 ? 1 : 2, PACKED_RESIDENT = LARGE ? 3 : 6;
  typedef forward_shape<P, WIDTH, WIDTH, FOLD, 4, KEYS, STAGES, 2, EXTRAS, false> whole;
  typedef forward_shape<P, WIDTH, WIDTH, 1, 1, 64, 1, PACKED_RESIDENT, false, true> packed;
};

template <int WIDTH, bool EXTRAS>
struct forward_choice<products_bf16, WIDTH, EXTRAS> : forward_choice_halves<products_bf16, WIDTH, EXTRAS> {};

template <int WIDTH, bool EXTRAS>
struct forward_choice<products_f16, WIDTH, EXTRAS> : forward_choice_halves<products_f16, WIDTH, EXTRAS> {};

// Twice 16 queries a warp halve what splitting keys and values costs.
template <int WIDTH, bool EXTRAS>
struct forward_choice<products_f32, WIDTH, EXTRAS> {
  typedef products_f32 P;
  static constexpr bool DOUBLE = WIDTH < 256 && !EXTRAS;
  static constexpr int FOLD = DOUBLE ? 2 : 1, STAGES = WIDTH == 256 || (DOUBLE && WIDTH == 128) ? 1 : 2;
  static constexpr int KEYS = WIDTH == 64 ? 64 : WIDTH == 128 ? 32 : 16;
  static constexpr int RESIDENT = WIDTH == 256 ? 1 : 2, PACKED_RESIDENT = WIDTH == 256 ? 2 : 5;
  typedef forward_shape<P, WIDTH, WIDTH, FOLD, 4, KEYS, STAGES, RESIDENT, EXTRAS, false> whole;
  typedef forward_shape<P, WIDTH, WIDTH, 1, 1, 32, 1, PACKED_RESIDENT, false, true> packed;
};

// Of 256 columns o would not fit the registers. One kernel for all options is enough.
template <int WIDTH, bool EXTRAS>
struct forward_choice<products_f64, WIDTH, EXTRAS> {
  typedef products_f64 P;
  static constexpr int VALUE_WIDTH = WIDTH == 256 ? 128 : WIDTH, KEYS = WIDTH == 64 ? 32 : 16;
  static constexpr int WARPS = WIDTH == 256 ? 1 : 4, PACKED_RESIDENT = WIDTH == 256 ? 2 : 4;
  typedef forward_shape<P, WIDTH, VALUE_WIDTH, 1, WARPS, KEYS, 1, 1, true, false> whole;
  typedef forward_shape<P, WIDTH, VALUE_WIDTH, 1, 1, 16, 1, PACKED_RESIDENT, false, true> packed;
};

// Few enough queries for their heads to share blocks, and nothing but a mask.
static inline bool forward_packs(const forward_job &job) {
  const sa_problem &p = job.p;
  return plain_forward(p) && job.plan.heads == 1 && job.plan.row_tiles == 1 && job.group * p.queries <= 64;
}

template <class P, int WIDTH>
static int forward_of_width(forward_job &job, cudaStream_t stream) {
  if (forward_packs(job)) return launch_forward<typename forward_choice<P, WIDTH, false>::packed>(job, stream);
  if (plain_forward(job.p)) return launch_forward<typename forward_choice<P, WIDTH, false>::whole>(job, stream);
  return launch_forward<typename forward_choice<P, WIDTH, true>::whole>(job, stream);
}

template <class P>
int sa_cuda_forward(forward_job &job, cudaStream_t stream) {
  const int64_t width = job.p.width > job.p.value_width ? job.p.width : job.p.value_width;
  if (width <= 64) return forward_of_width<P, 64>(job, stream);
  if (width <= 128) return forward_of_width<P, 128>(job, stream);
  return forward_of_width<P, 256>(job, stream);
}

#endif
