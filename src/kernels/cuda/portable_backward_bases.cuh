// peaks and sums of rows whose LSE is too coarse to make weights of
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_BASES_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_BASES_CUH
#include "kernels/cuda/portable_backward_queries.cuh"
#include "kernels/cuda/portable_backward_rows.cuh"

// Bases of block `index` of queries, if some LSE there is too coarse: peaks and sums of those rows, as the forward
// found them. The others keep what they have, so that a NaN in one row's LSE changes no bit of its neighbours.
template <class P, int ROW, int WARPS, int STEP>
static __device__ __forceinline__ void make_bases(const sa_problem &p, const sa_device_plan &plan,
                                                  const backward_rows<typename P::real> &rows,
                                                  const backward_aligned &aligned, int64_t index) {
  typedef typename P::real Real;
  typedef typename P::element Element;
  constexpr int THREADS = 32 * WARPS, OWN = 16 * WARPS, BLOCKS = STEP / 8, EACH = sizeof(Element);
  char *const shared = dynamic_shared<char>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int64_t blocks = (int64_t)plan.row_tiles * (SA_TILE / OWN), head = index / blocks;
  query_block<WARPS> block;
  block.find(plan, head / p.heads, head % p.heads, index % blocks);
  if (block.first >= p.queries || !rows.coarse[(head * rows.padded + block.first) / BACKWARD_BLOCK]) return;
  const int64_t key_head = block.head / (p.heads / p.key_heads), query = block.first + warp * 16 + g;
  char *const queries = shared, *const keys = shared + OWN * ROW;
  float *const query_scale = (float *)(keys + STEP * ROW), *const key_scale = query_scale + OWN;
  const tile_source query_source = tile_source_of(p.q, EACH, block.batch, block.head, p.queries, p.width, aligned.q),
                    key_source = tile_source_of(p.k, EACH, block.batch, key_head, p.keys, p.width, aligned.k);
  load_tile<Element, ROW, OWN, THREADS>(queries, query_source, block.first, thread);
  if constexpr (P::SPLIT) {
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    split_tile<P, ROW, OWN, THREADS>(queries, query_scale, true, thread);
  }
  const score_rule<Real> rule = score_rule_of<Real>(p, block.batch, block.head);
  const auto some = [&](int pattern, int offset) { return block.template some<STEP>(pattern, offset); };

  Real peak[2] = {-(Real)INFINITY, -(Real)INFINITY}, sum[2] = {0, 0};
  step_walk walk = block.walk();
  int64_t first;
  int pattern, offset;
  while (next_step<STEP>(walk, p.keys, some, first, pattern, offset)) {
    __syncthreads();
    load_tile<Element, ROW, STEP, THREADS>(keys, key_source, first, thread);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if constexpr (P::SPLIT) {
      split_tile<P, ROW, STEP, THREADS>(keys, key_scale, true, thread);
      __syncthreads();
    }
    uint32_t visible = block.template visible<BLOCKS>(warp, pattern, offset);
    Real s[BLOCKS][4], slope[BLOCKS][4];
    multiply_rows<P, ROW, false>(s, queries, query_scale, warp * 16, keys, key_scale);
    make_scores<false>(rule, s, slope, query, first + 2 * t, visible);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Real top = peak[half], more = 0;
#pragma unroll
      for (int n = 0; n < BLOCKS; n++) top = fmax(top, fmax(s[n][2 * half], s[n][2 * half + 1]));
      top = fmax(top, __shfl_xor_sync(~0u, top, 1));
      top = fmax(top, __shfl_xor_sync(~0u, top, 2));
      const Real base = top == -(Real)INFINITY ? 0 : top;
#pragma unroll
      for (int n = 0; n < BLOCKS; n++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          more += weight_of(s[n][2 * half + i], base, rule.unit, visible >> (4 * n + 2 * half + i) & 1);
      sum[half] = sum[half] * exp2_of((peak[half] - base) * rule.unit) + more;
      peak[half] = top;
    }
  }
  copy_async_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    double total = sum[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const int64_t at = head * rows.padded + query + 8 * half;
    // So do rows without a key.
    if (t || query + 8 * half >= p.queries || rows.base[at] == (Real)INFINITY) continue;
    if (!is_coarse(read_operand(p.lse, row_offset(p.lse, block.batch, block.head, query + 8 * half)))) continue;
    // In natural units, in which a sink near the dtype's largest number does not overflow.
    const double natural = plain_scores(p) ? 0.6931471805599453 : 1;
    double top = peak[half] * natural, base = peak[half], own = 0, sink = -INFINITY;
    if (p.sinks.data) {
      sink = (Real)read_operand(p.sinks, block.head * p.sinks.stride[1]);
      if (sink > top || sink != sink) {
        top = sink;
        base = sink / natural;
      }
      own = exp(sink - top);
      total = total * exp(peak[half] * natural - top) + own;
    }
    // Visible scores that are all -inf leave a sum of 0: 0/0 is the NaN that the definition gives.
    rows.base[at] = total > 0 ? (Real)base : (Real)NAN;
    rows.factor[at] = total > 0 ? (Real)(1 / total) : 1;
    if (rows.sink_share) rows.sink_share[at] = sink == -INFINITY ? 0 : (Real)(own / total * -rows.delta[at]);
  }
}

template <class P, int ROW, int WARPS, int STEP>
static __global__ void __launch_bounds__(32 * WARPS)
    backward_bases(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                   const __grid_constant__ backward_rows<typename P::real> rows,
                   const __grid_constant__ backward_aligned aligned) {
  make_bases<P, ROW, WARPS, STEP>(p, plan, rows, aligned, blockIdx.x);
}

#endif
