// the weights p_ij of the forward pass on mma.sync: the scores again, against what the whole rows came to
//
// A kernel for a dtype and width, whatever the options: asked for by those who look at weights, they are limited by
// their stores. As a part of the forward kernels this was a third of the code of twelve of them, and as fast (an H200,
// B1 H8 N2048, us a call: bf16 D64 234, D128 269, f32 D128 594; now 245, 270, 601). The scores have the forward's bits,
// so rows sum to 1 as far as rounding lets them.
//
// They may spill what rare calls save (unaligned rows).
#include <limits.h>

#include "kernels/cuda/portable_forward_products.cuh"
#include "kernels/cuda/portable_forward_softmax.cuh"

// Up to 64 queries, as far as 97 KiB of shared memory take them, and no values.
template <class P, int WIDTH>
struct weights_choice {
  static constexpr int BYTES = (int)sizeof(typename P::element), ROW = WIDTH * BYTES;
  static constexpr int KEYS = ROW <= 256 ? 64 : ROW <= 512 ? 32 : 16;
  typedef forward_shape<P, WIDTH, 0, 1, ROW <= 1024 ? 4 : 1, KEYS, 1, 1, true, false> shape;
};

template <class C>
static __device__ __forceinline__ void clear_weights(const forward_job &job, const forward_block &block) {
  typedef typename C::element element;
  const sa_operand &x = job.p.weights;
  element *to = (element *)x.data + row_offset(x, block.batch, block.head, 0);
  for (int row = 0; row < C::QUERIES && block.query + row < job.p.queries; row++)
    for (int64_t key = threadIdx.x; key < job.p.keys; key += C::THREADS)
      put_real(&to[(block.query + row) * x.stride[2] + key * x.stride[3]], (typename C::real)0);
}

// Those of a step, of pairs that are seen.
template <class C>
static __device__ __forceinline__ void write_weights(const forward_job &job, const forward_block &block, int64_t key,
                                                     typename C::real unit, const uint32_t (&seen)[1][2],
                                                     const typename C::real (&s)[1][C::BLOCKS][4],
                                                     const typename C::real (&base)[2],
                                                     const typename C::real (&factor)[2]) {
  typedef typename C::element element;
  const sa_operand &x = job.p.weights;
  element *to = (element *)x.data + row_offset(x, block.batch, block.head, 0);
#pragma unroll
  for (int n = 0; n < C::BLOCKS; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int half = e / 2;
      const int64_t query = block.query + lane_row<C>(0, half), at = key + 8 * n + 2 * (threadIdx.x & 3) + e % 2;
      if (query >= job.p.queries || !(seen[0][half] >> (2 * n + e % 2) & 1)) continue;
      put_real(&to[query * x.stride[2] + at * x.stride[3]], exp2_of((s[0][n][e] - base[half]) * unit) * factor[half]);
    }
}

template <class C>
static __global__ void __launch_bounds__(C::THREADS) weights_kernel(const __grid_constant__ forward_job job) {
  typedef typename C::products P;
  typedef typename C::element element;
  typedef typename C::real real;
  const sa_problem &p = job.p;
  char *const shared = dynamic_shared<char>(), *const key_tile = shared + C::KEY_TILE;
  const forward_block block = block_of_item(job, blockIdx.x, false, C::QUERIES);
  if (block.query >= p.queries) return;
  load_queries<C>(job, block, shared);
  copy_async_commit();
  clear_weights<C>(job, block);
  copy_async_wait<0>();
  __syncthreads();
  if constexpr (P::SPLIT)
    split_tile<P, C::ROW, C::QUERIES, C::THREADS>(shared, query_scales<C>(shared), true, threadIdx.x);

  real base[2], factor[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t query = block.query + lane_row<C>(0, half);
    const int64_t row = kept_row(job, block, query < p.queries ? query : p.queries - 1);
    base[half] = ((const real *)job.row_base)[row];
    factor[half] = ((const real *)job.row_factor)[row];
  }
  const score_rule<real> rule = score_rule_of<real>(p, block.batch, block.head);
  tile_source keys = job.k;
  keys.data += (block.batch * p.k.stride[0] + block.key_head * p.k.stride[1]) * (int64_t)sizeof(element);
  forward_step step = {walk_start(block.runs, 0, block.tiles), 0};
  uint32_t bits[1][2] = {};
  for (bool entered = true; step.walk.left;) {
    if (entered) load_bits<C>(job, block, step.walk.pattern, bits);
    const int64_t key = step_key<C>(step);
    const bool full = step.walk.pattern == SA_FULL;
    load_tile<element, C::ROW, C::KEYS, C::THREADS>(key_tile, keys, key, threadIdx.x);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if constexpr (P::SPLIT) {
      split_tile<P, C::ROW, C::KEYS, C::THREADS>(key_tile, key_scales<C>(shared), true, threadIdx.x);
      __syncthreads();
    }
    uint32_t seen[1][2];
#pragma unroll
    for (int half = 0; half < 2; half++) seen[0][half] = full ? ~0u : bits[0][half] >> (step.piece * (C::KEYS / 4));
    real s[1][C::BLOCKS][4];
    multiply_keys<C>(shared, key_tile, s);
    score<C>(rule, block, key, full, seen, s);
    write_weights<C>(job, block, key, rule.unit, seen, s, base, factor);
    entered = step_advance<C>(step, p.keys);
    __syncthreads();
  }
}

template <class C>
static int launch_shape(forward_job &job, cudaStream_t stream) {
  job.blocks = (int64_t)job.plan.row_tiles * (SA_TILE / C::QUERIES);
  const int64_t grid = job.p.batch * job.p.heads * job.blocks;
  if (grid > INT_MAX) return sa_cuda_host->fail(SA_UNSUPPORTED, forward_name, "q: has too many heads and queries");
  return sa_cuda_launch(forward_name, weights_kernel<C>, dim3((unsigned)grid), dim3(C::THREADS), C::SHARED, stream,
                        job);
}

template <class P>
static int launch_weights(forward_job &job, cudaStream_t stream) {
  if (job.p.width <= 64) return launch_shape<typename weights_choice<P, 64>::shape>(job, stream);
  if (job.p.width <= 128) return launch_shape<typename weights_choice<P, 128>::shape>(job, stream);
  return launch_shape<typename weights_choice<P, 256>::shape>(job, stream);
}

int sa_cuda_forward_weights(forward_job job, cudaStream_t stream) {
  switch (job.p.dtype) {
    case SA_BF16:
      return launch_weights<products_bf16>(job, stream);
    case SA_F16:
      return launch_weights<products_f16>(job, stream);
    case SA_F32:
      return launch_weights<products_f32>(job, stream);
    default:
      return launch_weights<products_f64>(job, stream);
  }
}
