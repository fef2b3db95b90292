// the gradient of the bias, tile by tile
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_BIAS_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_BIAS_CUH
#include "kernels/cuda/portable_backward_queries.cuh"

// What the blocks of dBias are: tiles of the bias, each a sum over the dims that it is broadcast along. `parts` blocks
// share such a sum; each writes what it found to parts[part][bias], or to dBias when it is alone.
template <class Real>
struct bias_sums {
  int64_t size[4];   // batches, heads, blocks of queries, steps of keys
  int64_t tiles[4];  // the same of the bias: 1 where it is broadcast
  int64_t parts;
  int64_t count;  // elements of the bias
  Real *sums;     // NULL: dBias itself
};

template <class P, int ROW, int WARPS, int STEP>
static __global__ void __launch_bounds__(32 * WARPS)
    backward_bias(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                  const __grid_constant__ backward_rows<typename P::real> rows,
                  const __grid_constant__ backward_aligned aligned,
                  const __grid_constant__ bias_sums<typename P::real> sums) {
  typedef typename P::real Real;
  typedef typename P::element Element;
  typedef query_room<P, ROW, 16 * WARPS, STEP, 1> room;
  constexpr int THREADS = 32 * WARPS, OWN = 16 * WARPS, BLOCKS = STEP / 8, EACH = sizeof(Element);
  static_assert(OWN * STEP * sizeof(Real) <= room::STAGES_AT, "a tile of dS lies where Q and dO were");
  char *const shared = dynamic_shared<char>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, g = lane >> 2, t = lane & 3;
  char *const queries = shared, *const douts = shared + room::OWN_TILE, *const keys = shared + room::STAGES_AT,
              *const values = keys + room::STEP_TILE;
  const query_scales scales(shared + room::SCALES_AT, OWN, STEP);

  int64_t rest = blockIdx.x, at[4];
  const int64_t part = rest % sums.parts;
  rest /= sums.parts;
  for (int d = 3; d >= 0; d--) {
    at[d] = rest % sums.tiles[d];
    rest /= sums.tiles[d];
  }
  int64_t loop[4], turns = 1;
  for (int d = 0; d < 4; d++) turns *= loop[d] = sums.size[d] / sums.tiles[d];

  Real total[BLOCKS][4];
  memset(total, 0, sizeof total);
  for (int64_t turn = turns * part / sums.parts; turn < turns * (part + 1) / sums.parts; turn++) {
    int64_t index[4], left = turn;
    for (int d = 3; d >= 0; d--) {
      index[d] = at[d] + left % loop[d];
      left /= loop[d];
    }
    const int64_t batch = index[0], head = index[1], first_query = index[2] * OWN, first_key = index[3] * STEP;
    const int64_t row_tile = first_query / SA_TILE, col_tile = first_key / SA_TILE,
                  *start = plan.row_start + sa_device_plane(plan, batch, head) * plan.row_tiles + row_tile;
    int64_t run = start[0];
    while (run < start[1] &&
           !(plan.row_runs[run].first <= col_tile && col_tile < plan.row_runs[run].first + plan.row_runs[run].count))
      run++;
    if (run == start[1]) continue;
    query_block<WARPS> block = {&plan, batch, head, first_query, row_tile};
    const int pattern = plan.row_runs[run].pattern, offset = (int)(first_key % SA_TILE);
    if (pattern != SA_FULL && !block.template some<STEP>(pattern, offset)) continue;

    const int64_t key_head = head / (p.heads / p.key_heads);
    tile_source dout_source = tile_source_of(p.dout, EACH, batch, head, p.queries, p.value_width, aligned.dout);
    if (!p.dout.data) dout_source.rows = 0;
    __syncthreads();
    load_tile<Element, ROW, OWN, THREADS>(
        queries, tile_source_of(p.q, EACH, batch, head, p.queries, p.width, aligned.q), first_query, thread);
    load_tile<Element, ROW, OWN, THREADS>(douts, dout_source, first_query, thread);
    load_tile<Element, ROW, STEP, THREADS>(keys, tile_source_of(p.k, EACH, batch, key_head, p.keys, p.width, aligned.k),
                                           first_key, thread);
    load_tile<Element, ROW, STEP, THREADS>(
        values, tile_source_of(p.v, EACH, batch, key_head, p.keys, p.value_width, aligned.v), first_key, thread);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if constexpr (P::SPLIT) {
      split_tile<P, ROW, OWN, THREADS>(queries, scales.query, true, thread);
      split_tile<P, ROW, OWN, THREADS>(douts, scales.dout, true, thread, rows.dweight_gain);
      split_tile<P, ROW, STEP, THREADS>(keys, scales.key, true, thread);
      split_tile<P, ROW, STEP, THREADS>(values, scales.value, true, thread);
      __syncthreads();
    }
    const int64_t query = first_query + warp * 16 + g, key = first_key + 2 * t;
    lane_rows<Real> mine;
    mine.read(rows, (batch * p.heads + head) * rows.padded + query);
    // Factors come last: that is one product a pair, and no selection.
    mine.coarse = false;
    uint32_t visible = block.template visible<BLOCKS>(warp, pattern, offset);
    Real ds[BLOCKS][4], slope[BLOCKS][4];
    differentiate_step<P, ROW, true, false>(p, score_rule_of<Real>(p, batch, head), mine, queries, douts, keys, values,
                                            scales, batch, head, query, key, false, visible, ds, slope);
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) total[n][i] += ds[n][i] * mine.factor[i / 2];
  }

  // Through shared memory, where sums over queries and keys are made in order.
  Real *const tile = (Real *)shared;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) tile[(warp * 16 + g + i / 2 * 8) * STEP + 8 * n + 2 * t + i % 2] = total[n][i];
  __syncthreads();
  const int64_t *shape = p.bias_shape, first_row = at[2] * OWN, first_column = at[3] * STEP;
  const int over_rows = shape[2] == 1 ? OWN : 1, over_columns = shape[3] == 1 ? STEP : 1;
  for (int k = thread; k < OWN / over_rows * (STEP / over_columns); k += THREADS) {
    const int row = k / (STEP / over_columns), column = k % (STEP / over_columns);
    if (first_row + row >= shape[2] || first_column + column >= shape[3]) continue;
    Real sum = 0;
    for (int i = 0; i < over_rows; i++)
      for (int j = 0; j < over_columns; j++) sum += tile[(row + i) * STEP + column + j];
    if (sums.sums) {
      const int64_t element =
          ((at[0] * shape[1] + at[1]) * shape[2] + first_row + row) * shape[3] + first_column + column;
      sums.sums[part * sums.count + element] = sum;
    } else {
      write_operand(p.dbias,
                    at[0] * p.dbias.stride[0] + at[1] * p.dbias.stride[1] + (first_row + row) * p.dbias.stride[2] +
                        (first_column + column) * p.dbias.stride[3],
                    (double)sum);
    }
  }
}

#endif
