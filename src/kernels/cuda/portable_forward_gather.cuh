// attention of a block of queries over its tiles, the fast way and the careful one
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_GATHER_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_FORWARD_GATHER_CUH
#include "kernels/cuda/portable_forward_products.cuh"
#include "kernels/cuda/portable_forward_softmax.cuh"

// What the careful pass keeps of a step, in memory: the fast one has it in registers, which cannot be indexed.
template <class C>
struct careful_step {
  typename C::products::total o[C::FOLD][C::COLUMNS];
  typename C::real weights[C::FOLD][C::BLOCKS][4];
  uint32_t seen[C::FOLD][2];
};

// The contributions of non-finite values to the rows that see them.
template <class C>
__attribute__((noinline)) static __device__ void add_nonfinite(careful_step<C> &step, const char *values,
                                                               int64_t stride, int columns, const uint32_t *bad) {
  typedef typename C::real real;
  const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  for (int key = 0; key < C::KEYS; key++) {
    if (!(bad[key / 32] >> key % 32 & 1)) continue;
    const int owner = 4 * g + key % 8 / 2, block = key / 8, c = key % 2;
    for (int f = 0; f < C::FOLD; f++)
      for (int half = 0; half < 2; half++) {
        const real weight = __shfl_sync(0xffffffff, step.weights[f][block][2 * half + c], owner);
        const uint32_t seen = __shfl_sync(0xffffffff, step.seen[f][half], owner);
        if (!(seen >> (2 * block + c) & 1)) continue;
        for (int n = 0; n < C::COLUMNS; n++)
          for (int e = 0; e < 2; e++) {
            const int column = 8 * n + 2 * t + e;
            if (column >= columns) continue;
            const real v = real_of(((const typename C::element *)(values + key * stride))[column]);
            if (!is_finite(v)) step.o[f][n].d[2 * half + e] += weight * v;
          }
      }
  }
}

// Attention of the block over its tiles. CAREFUL is for blocks that came out non-finite: the same products in the
// same order, with the non-finite elements of V 0, and then these given to the rows that see them. So a row that sees
// none gets the very bits that any finite V would have given.
template <class C, bool CAREFUL>
static __device__ __forceinline__ void gather(const forward_job &job, const forward_block &block, char *shared,
                                              gathered<C> &got) {
  typedef typename C::products P;
  typedef typename C::element element;
  typedef typename C::real real;
  const sa_problem &p = job.p;
  uint32_t *const bad = (uint32_t *)(shared + C::BAD);  // rows of the values' tile
  clear_sum(got.o);
  got.alive = 0;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      got.peak[f][half] = -(real)INFINITY;
      got.sum[f][half] = 0;
    }
  forward_step step = {walk_start(block.runs, block.first_tile, block.tiles), 0};
  if (!step.walk.left) {
    copy_async_wait<0>();  // the queries' place is where out goes
    __syncthreads();
    return;
  }

  const score_rule<real> rule = score_rule_of<real>(p, block.batch, block.head);
  const dropout_rule dropout = dropout_rule_of(p, block.batch, block.head);
  // All but the place is the same in every block, and stays in the constant bank.
  tile_source keys = job.k, values = job.v;
  keys.data += (block.batch * p.k.stride[0] + block.key_head * p.k.stride[1]) * (int64_t)sizeof(element);
  values.data += (block.batch * p.v.stride[0] + block.key_head * p.v.stride[1]) * (int64_t)sizeof(element);
  if (C::VALUE_WIDTH < C::WIDTH) {
    values.data += block.value_part * C::VALUE_ROW;
    values.bytes -= block.value_part * C::VALUE_ROW;
    if (values.bytes > C::VALUE_ROW) values.bytes = C::VALUE_ROW;
  }

  load_tile<element, C::ROW, C::KEYS, C::THREADS>(shared + C::KEY_TILE, keys, step_key<C>(step), threadIdx.x);
  if (C::STAGES > 1)
    load_tile<element, C::VALUE_ROW, C::KEYS, C::THREADS>(shared + C::VALUE_TILE, values, step_key<C>(step),
                                                          threadIdx.x);
  copy_async_commit();
  char *stage = shared;
  uint32_t bits[C::FOLD][2] = {};
  load_bits<C>(job, block, step.walk.pattern, bits);
  bool first = true;
  for (;;) {
    const int64_t key = step_key<C>(step);
    const bool full = step.walk.pattern == SA_FULL;
    uint32_t seen[C::FOLD][2], any = 0;
#pragma unroll
    for (int f = 0; f < C::FOLD; f++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        seen[f][half] = full ? ~0u : bits[f][half] >> (step.piece * (C::KEYS / 4));
        any |= seen[f][half] &= (uint32_t)((1ull << C::KEYS / 4) - 1);
      }
    // For rows that see nothing here, nothing changes.
    const bool idle = !full && !__any_sync(0xffffffff, any != 0);

    copy_async_wait<0>();
    __syncthreads();
    if (CAREFUL && threadIdx.x < (C::KEYS + 31) / 32) bad[threadIdx.x] = 0;
    if (step_advance<C>(step, p.keys) && step.walk.left) load_bits<C>(job, block, step.walk.pattern, bits);
    char *const key_tile = stage + C::KEY_TILE, *const value_tile = stage + C::VALUE_TILE;
    if (C::STAGES > 1) {
      stage = stage == shared ? shared + C::STAGE : shared;
      if (step.walk.left) {
        load_tile<element, C::ROW, C::KEYS, C::THREADS>(stage + C::KEY_TILE, keys, step_key<C>(step), threadIdx.x);
        load_tile<element, C::VALUE_ROW, C::KEYS, C::THREADS>(stage + C::VALUE_TILE, values, step_key<C>(step),
                                                              threadIdx.x);
      }
    } else {
      load_tile<element, C::VALUE_ROW, C::KEYS, C::THREADS>(value_tile, values, key, threadIdx.x);
    }
    copy_async_commit();

    if constexpr (P::SPLIT) {
      if (first) split_tile<P, C::ROW, C::QUERIES, C::THREADS>(shared, query_scales<C>(shared), CAREFUL, threadIdx.x);
      split_tile<P, C::ROW, C::KEYS, C::THREADS>(key_tile, key_scales<C>(shared), CAREFUL, threadIdx.x);
      if (C::STAGES > 1)
        split_tile<P, C::VALUE_ROW, C::KEYS, C::THREADS>(value_tile, value_scales<C>(shared), CAREFUL, threadIdx.x);
      __syncthreads();
      first = false;
    }

    real factor[C::FOLD][2], unit[C::FOLD][2];
    typename P::left weights[C::FOLD][C::STEPS];
    careful_step<C> kept;
    real s[C::FOLD][C::BLOCKS][4];
    if (!idle) {
      multiply_keys<C>(shared, key_tile, s);
      score<C>(rule, block, key, full, seen, s);
#pragma unroll
      for (int f = 0; f < C::FOLD; f++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          if (seen[f][half]) got.alive |= 1u << (2 * f + half);
      real exponent[C::FOLD][2];
      exponent_units<C>(rule, shared, exponent);
      soften<C>(exponent, s, got, factor);
      if (C::EXTRAS && dropout.threshold) drop<C>(dropout, block, key, s);
      if (CAREFUL) {
        memcpy(kept.weights, s, sizeof kept.weights);
        memcpy(kept.seen, seen, sizeof kept.seen);
      }
      if (!P::SPLIT) take_weights<C>(s, shared, weights, unit);
    }

    if (C::STAGES == 1) {
      copy_async_wait<0>();
      __syncthreads();
      if (step.walk.left)
        load_tile<element, C::ROW, C::KEYS, C::THREADS>(key_tile, keys, step_key<C>(step), threadIdx.x);
      copy_async_commit();
      if constexpr (P::SPLIT) {
        split_tile<P, C::VALUE_ROW, C::KEYS, C::THREADS>(value_tile, value_scales<C>(shared), CAREFUL, threadIdx.x);
        __syncthreads();
      }
    }
    if (CAREFUL) {
      if (C::STAGES > 1) __syncthreads();
      make_finite<typename P::stored, C::VALUE_ROW, C::KEYS, C::THREADS>(value_tile, bad, threadIdx.x);
      __syncthreads();
    }
    if (!idle) {
      if (P::SPLIT) take_weights<C>(s, shared, weights, unit);
      multiply_values<C>(weights, value_tile, factor, unit, got.o);
      if (CAREFUL) {
        memcpy(kept.o, got.o, sizeof kept.o);
        add_nonfinite<C>(kept, values.data + key * values.stride, values.stride, values.bytes / (int)sizeof(element),
                         bad);
        memcpy(got.o, kept.o, sizeof kept.o);
      }
    }
    if (!step.walk.left) break;
  }
  if (C::EXTRAS) return;
  real exponent[C::FOLD][2];
  exponent_units<C>(rule, shared, exponent);
#pragma unroll
  for (int f = 0; f < C::FOLD; f++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (got.peak[f][half] != -(real)INFINITY) got.peak[f][half] *= exponent[f][half];
}

template <class C>
static __device__ __forceinline__ bool came_out_nonfinite(const gathered<C> &got) {
  finite_test<typename C::real> test;
#pragma unroll
  for (int f = 0; f < C::FOLD; f++) {
    test.note(got.sum[f][0], 0);
    test.note(got.sum[f][1], 1);
#pragma unroll
    for (int n = 0; n < C::COLUMNS; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) test.note(got.o[f][n].d[e], e);
  }
  return !test.passed();
}

#endif
