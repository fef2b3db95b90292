// the whole backward pass of a small problem of halves in one launch
//
// A launch takes the host 4 us, which is longer than a small problem takes on the device. So here every block finds for
// itself what it has to know of its queries (portable_backward_rows.cuh), into memory of its own, and then makes what
// one of backward_keys or of backward_queries would have made: no block waits for another, and what is read twice is
// little. A block has 64 keys, or 64 queries. On an H200 a call of [1, 8, 64, 64] takes the host 5.1 us instead of the
// 12.1 of three launches, and the device 17 us, as long as those took the host; with 128 queries, wider rows or grouped
// heads, which a block walks one after the other, it took the device 21 to 85 us: those are left to several launches.
//
// Kernels may spill: two bodies share the registers of the larger, and what they keep in memory is read once a step.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/portable_backward.cuh"
#include "kernels/cuda/portable_backward_rows.cuh"

enum {
  SMALL_WIDTH = 64,
  SMALL_WARPS = 4,
  SMALL_OWN = 16 * SMALL_WARPS,  // keys or queries of a block
  SMALL_STEP = 32,
  SMALL_STAGES = 2,
  SMALL_LANES = 2  // that prepare a query
};

template <class P>
struct small_shape {
  enum { ROW = SMALL_WIDTH * (int)sizeof(typename P::element) };
  typedef key_room<P, ROW, SMALL_WARPS, SMALL_STEP, SMALL_STAGES> keys;
  typedef query_room<P, ROW, SMALL_OWN, SMALL_STEP, SMALL_STAGES> queries;
  enum { SHARED = (int)keys::BYTES > (int)queries::BYTES ? (int)keys::BYTES : (int)queries::BYTES };
};

// Blocks of a head.
typedef struct small_blocks {
  int64_t keys, queries;

  __host__ __device__ int64_t all() const { return keys + queries; }
} small_blocks;

static __host__ __device__ inline small_blocks small_blocks_of(const sa_problem &p) {
  const int64_t row_tiles = (p.queries + SA_TILE - 1) / SA_TILE, col_tiles = (p.keys + SA_TILE - 1) / SA_TILE;
  return small_blocks{col_tiles * (SA_TILE / SMALL_OWN), row_tiles * (SA_TILE / SMALL_OWN)};
}

// Finds what has to be known of the queries of a head, counted over all batches.
template <class P>
static __device__ __forceinline__ void prepare_head(const sa_problem &p, const sa_device_plan &plan,
                                                    const backward_rows<typename P::real> &rows,
                                                    const backward_aligned &aligned, int64_t head) {
  static_assert((int)SMALL_OWN == BACKWARD_BLOCK, "all queries are in the first block");
  const int64_t block = head * (rows.padded / BACKWARD_BLOCK);
  const bool coarse = prepare_block<typename P::element, typename P::real, SMALL_LANES>(
      p, plan, rows, aligned.out && aligned.dout, block);
  __syncthreads();
  if (!coarse) return;
  make_bases<P, small_shape<P>::ROW, SMALL_WARPS, SMALL_STEP>(p, plan, rows, aligned, block);
  __syncthreads();
}

// Block `place` of a head. Returns whether it has to be done carefully; then it has written nothing.
template <class P, bool CAREFUL>
static __device__ __forceinline__ bool make_gradients(const sa_problem &p, const sa_device_plan &plan,
                                                      const backward_rows<typename P::real> &rows,
                                                      const backward_aligned &aligned, int64_t head, int64_t place) {
  constexpr int ROW = small_shape<P>::ROW;
  const small_blocks blocks = small_blocks_of(p);
  if (place < blocks.keys)
    return make_key_gradients<P, ROW, SMALL_WARPS, SMALL_STEP, SMALL_STAGES, SMALL_WIDTH, false, CAREFUL>(
        p, plan, rows, aligned, {}, head * blocks.keys + place);
  return make_query_gradients<P, ROW, SMALL_WARPS, SMALL_STEP, SMALL_STAGES, SMALL_WIDTH, false, CAREFUL>(
      p, plan, rows, aligned, {}, head * blocks.queries + place - blocks.keys);
}

template <class P>
__attribute__((noinline)) static __device__ void make_gradients_carefully(const sa_problem &p,
                                                                          const sa_device_plan &plan,
                                                                          const backward_rows<typename P::real> &rows,
                                                                          const backward_aligned &aligned, int64_t head,
                                                                          int64_t place) {
  make_gradients<P, true>(p, plan, rows, aligned, head, place);
}

template <class P>
static __global__ void __launch_bounds__(32 * SMALL_WARPS)
    backward_small(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                   const __grid_constant__ backward_rows<typename P::real> rows,
                   const __grid_constant__ backward_aligned aligned) {
  const small_blocks blocks = small_blocks_of(p);
  const int64_t head = blockIdx.x / blocks.all(), place = blockIdx.x % blocks.all();
  // The block's own memory, as if all heads were there: it has those of its head.
  const int64_t shift = (blockIdx.x - head) * rows.padded;
  backward_rows<typename P::real> own = {};
  own.padded = rows.padded;
  own.base = rows.base + shift;
  own.factor = rows.factor + shift;
  own.delta = rows.delta + shift;
  own.coarse = rows.coarse + shift / BACKWARD_BLOCK;
  prepare_head<P>(p, plan, own, aligned, head);
  if (make_gradients<P, false>(p, plan, own, aligned, head, place)) {
    // Its own copy, so that these stay in registers.
    const backward_rows<typename P::real> rest = own;
    make_gradients_carefully<P>(p, plan, rest, aligned, head, place);
  }
}

bool sa_cuda_portable_backward_small(const sa_problem *p) {
  if ((p->dtype != SA_BF16 && p->dtype != SA_F16) || p->width > SMALL_WIDTH || p->value_width > SMALL_WIDTH)
    return false;
  if (!plain_scores(*p) || p->dropout > 0 || p->dsinks.data) return false;
  if (!p->batch || p->heads != p->key_heads || !p->heads || !p->queries || !p->keys) return false;
  if (p->queries > SMALL_OWN || p->keys > SMALL_OWN) return false;
  // Two blocks fit a multiprocessor. Where some have to wait for others the device is what takes long.
  return p->batch * p->heads * small_blocks_of(*p).all() <= 2 * sa_cuda_properties_of(p->device)->processors;
}

template <class P>
static int launch_small(const backward_job &job) {
  const sa_problem &p = job.p;
  const small_blocks blocks = small_blocks_of(p);
  const int64_t grid = p.batch * p.heads * blocks.all(), count = grid * blocks.queries * BACKWARD_BLOCK;
  float *const memory =
      (float *)sa_cuda_scratch(backward_name, p.device, (3 * count + count / BACKWARD_BLOCK) * (int64_t)sizeof(float));
  if (!memory) return SA_NO_MEMORY;
  backward_rows<float> rows = {};
  rows.padded = blocks.queries * BACKWARD_BLOCK;
  rows.base = memory;
  rows.factor = rows.base + count;
  rows.delta = rows.factor + count;
  rows.coarse = (int *)(rows.delta + count);
  const int status = sa_cuda_launch(backward_name, backward_small<P>, dim3((unsigned)grid), dim3(32 * SMALL_WARPS),
                                    small_shape<P>::SHARED, job.stream, p, job.plan, rows, job.aligned);
  sa_cuda_scratch_release(p.device, memory);
  return status;
}

int sa_cuda_backward_small(const backward_job &job) {
  return job.p.dtype == SA_BF16 ? launch_small<products_bf16>(job) : launch_small<products_f16>(job);
}
