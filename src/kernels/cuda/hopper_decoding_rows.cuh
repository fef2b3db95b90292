// how the rows of few queries end: what a block's warps gathered is added, then what blocks did, and out is written
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_DECODING_ROWS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_DECODING_ROWS_CUH
#include "kernels/cuda/hopper_decoding_loads.cuh"
#include "kernels/cuda/portable_numbers.cuh"

// Row of an item -> head and query.
typedef struct decoding_query {
  int batch, head, query;
} decoding_query;

static __device__ __forceinline__ decoding_query decoding_query_of(const decoding_job &d, int item, int row) {
  decoding_query at;
  at.batch = item / d.heads;
  const int head = item - at.batch * d.heads, down = row / (int)d.forward.p.queries;
  at.query = row - down * (int)d.forward.p.queries;
  at.head = head * (d.forward.packed ? (int)d.forward.group : 1) + down;
  return at;
}

// Where the sums of 128 columns of a row lie, of `count` warps or blocks: number k is k * step rows behind number 0,
// less `back` but for that.
typedef struct decoding_sums {
  const decoding_row *row;
  const float *columns;
  int pitch;    // of rows of columns
  int swizzle;  // of columns
  int count, step, back;
} decoding_sums;

static __device__ __forceinline__ float4 decoding_scaled(float4 x, float by) {
  return make_float4(x.x * by, x.y * by, x.z * by, x.w * by);
}

// Adds the sums of a row, by a warp, and either writes what has come to its end (`left` is NULL), or leaves it for
// another block. A lane has four columns.
//
// Sinks are in natural units, in which one near the dtype's largest number does not overflow.
template <class C>
static __device__ __forceinline__ void decoding_end_row(const decoding_job &d, const decoding_sums &from, int item,
                                                        int row, int column, decoding_row *left) {
  typedef typename C::element element;
  enum { ABREAST = C::WIDTH > 128 ? 4 : 8 };  // loads
  const int lane = threadIdx.x & 31;
  column += 4 * lane;
  decoding_row all = {-INFINITY, 0, 0};
  float4 o = make_float4(0, 0, 0, 0);
  // Lanes beyond the width read what others do.
  const float *const columns = from.columns + ((4 * lane % C::WIDTH) ^ from.swizzle);
  // 32 at a time, each time brought to the greatest peak so far: what each is multiplied by is found by a lane, while
  // the first columns are on their way.
#pragma unroll 1
  for (int first = 0; first < from.count; first += 32) {
    const int here = from.count - first < 32 ? from.count - first : 32;
    float4 x[ABREAST];
    const auto fetch = [&](int n) {
#pragma unroll
      for (int i = 0; i < ABREAST; i++) {
        const int k = first + n + i;
        x[i] = make_float4(0, 0, 0, 0);
        if (n + i < here) x[i] = *(const float4 *)(columns + (k * from.step - (k ? from.back : 0)) * from.pitch);
      }
    };
    decoding_row own = {-INFINITY, 0, 0};
    if (lane < here) own = from.row[(first + lane) * from.step - (first + lane ? from.back : 0)];
    fetch(0);
    float peak = larger(own.peak, all.peak);
#pragma unroll
    for (int distance = 16; distance; distance /= 2) peak = larger(peak, __shfl_xor_sync(~0u, peak, distance));
    // One that saw nothing has a peak of -inf, so its factor is 0, and sums of 0.
    const float base = peak == -INFINITY ? 0 : peak, by = exp2_of(own.peak - base), before = exp2_of(all.peak - base);
    float sum = own.sum * by;
#pragma unroll
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    all.sum = all.sum * before + sum;
    all.peak = peak;
    all.alive |= __any_sync(~0u, own.alive != 0);
    o = decoding_scaled(o, before);
#pragma unroll 1
    for (int n = 0;;) {
#pragma unroll
      for (int i = 0; i < ABREAST; i++) {
        const float factor = __shfl_sync(~0u, by, n + i);
        o.x += x[i].x * factor, o.y += x[i].y * factor, o.z += x[i].z * factor, o.w += x[i].w * factor;
      }
      if ((n += ABREAST) >= here) break;
      fetch(n);
    }
  }
  if (left) {
    const int64_t at = left - d.part_row;
    if (column < C::WIDTH) *(float4 *)(d.part_out + at * C::WIDTH + column) = o;
    if (column == 0) *left = all;
    return;
  }
  const sa_problem &p = d.forward.p;
  const decoding_query to = decoding_query_of(d, item, row);
  const float natural = all.peak * 0.69314718f;
  float top = natural, scale = 1, sink = -INFINITY;
  if (p.sinks.data) {
    const int64_t at = to.head * p.sinks.stride[1];
    sink = p.sinks.dtype == SA_F32 ? ((const float *)p.sinks.data)[at] : real_of(((const element *)p.sinks.data)[at]);
    if (!(sink <= top)) top = sink;
    scale = exp2_of((natural - top) * 1.44269504f);
    all.sum = all.sum * scale + exp2_of((sink - top) * 1.44269504f);
  }
  float lse = top + __log2f(all.sum) * 0.69314718f;
  scale *= reciprocal_fast(all.sum);
  // Visible scores that are all -inf leave a sum of 0: 0/0 is the NaN that the definition gives.
  if (!(all.sum > 0)) lse = scale = all.sum * NAN;
  if (!all.alive) lse = sink;
  if (column == 0) {
    if (p.lse.data) ((float *)p.lse.data)[row_offset(p.lse, to.batch, to.head, to.query)] = lse;
    if (p.dead.data) ((bool *)p.dead.data)[row_offset(p.dead, to.batch, to.head, to.query)] = !all.alive;
  }
  if (column >= p.value_width) return;
  o = all.alive ? decoding_scaled(o, scale) : make_float4(0, 0, 0, 0);
  struct alignas(8) {
    element x[4];
  } out;
  put_real(&out.x[0], o.x);
  put_real(&out.x[1], o.y);
  put_real(&out.x[2], o.z);
  put_real(&out.x[3], o.w);
  element *at = (element *)p.out.data + row_offset(p.out, to.batch, to.head, to.query) + column;
  if (d.forward.out_aligned) {
    *(decltype(out) *)at = out;
  } else {
#pragma unroll 1
    for (int n = 0; n < 4; n++) at[n] = out.x[n];
  }
}

// Where a block leaves row 0 of an item that others have too. A block has at most two of these: the one it begins with,
// and the one it ends with, of which it is the first.
static __device__ __forceinline__ decoding_row *decoding_slot(const decoding_job &d, int block, bool ends) {
  return d.part_row + (2 * block + ends) * d.groups * 16;
}

// A row's sums of the block's warps, of the columns that they have handed over.
template <class C>
static __device__ __forceinline__ decoding_sums decoding_of_warps(const decoding_job &d,
                                                                  const decoding_shared<C> &shared, int row) {
  const int group = row / 16, down = row % 16;
  return {&shared.rows[group][down], shared.columns[group][down], C::PITCH, (down & 3) * 8, d.teams, 16 * d.groups, 0};
}

// A row's sums of the blocks that have parts of it. The first part is one that ends its block; from there to the next
// one's beginning is one slot, then two.
template <class C>
static __device__ __forceinline__ decoding_sums decoding_of_blocks(const decoding_job &d, const decoding_split &split,
                                                                   int row, int column) {
  const decoding_row *const from = decoding_slot(d, split.first, true) + row;
  return {
      from,         d.part_out + (from - d.part_row) * C::WIDTH + column, C::WIDTH, 0, split.parts, 2 * d.groups * 16,
      d.groups * 16};
}

// Counts a part of an item, which the warp has written; whether it is the last to come.
static __device__ __forceinline__ bool decoding_count(int32_t *counter, int parts) {
  int before = 0;
  __syncwarp();
  if ((threadIdx.x & 31) == 0) {
    before = add_ordered(counter, 1);
    if (before == parts - 1) *counter = 0;
  }
  return __shfl_sync(~0u, before, 0) == parts - 1;
}

// The items of the block, from `item` on, by the warps that end them: each has some of the rows. They add the sums of
// the warps that multiply, and of an item that other blocks have too the sums of all when theirs are the last to come.
template <class C>
static __device__ __forceinline__ void decoding_end_items(const decoding_job &d, decoding_shared<C> &shared, int item) {
  const int warp = threadIdx.x / 32 - DECODING_WARPS - C::LOADING_WARPS;
  uint32_t parity = 0;
  if (warp >= d.rows) return;
  for (; item <= shared.last_item; item++) {
    mbarrier_wait(shared_address(&shared.summed), parity);
    const decoding_split split = shared.split[item % DECODING_ITEMS];
    decoding_row *const part = split.parts == 1 ? NULL : decoding_slot(d, blockIdx.x, (int)blockIdx.x == split.first);
#pragma unroll 1
    for (bool all = false;; all = true) {
#pragma unroll 1
      for (int column = 0; column < C::WIDTH; column += C::PITCH) {
        if (!all) mbarrier_wait(shared_address(&shared.summed), parity);
#pragma unroll 1
        for (int row = warp; row < d.rows; row += C::ENDING_WARPS)
          decoding_end_row<C>(d,
                              all ? decoding_of_blocks<C>(d, split, row, column) : decoding_of_warps<C>(d, shared, row),
                              item, row, column, all || !part ? NULL : part + row);
        if (all) continue;
        __syncwarp();
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(shared_address(&shared.taken));
        parity ^= 1;
      }
      if (all || !part) break;
      if (!decoding_count(d.counters + split.first * DECODING_ENDING_WARPS + warp, split.parts)) break;
    }
  }
}

// Hands a warp's sums of an item to the warps that end it, when these have taken those of the item before.
template <class C>
static __device__ __forceinline__ void decoding_hand_over(const decoding_job &d, decoding_shared<C> &shared, int group,
                                                          const gathered<C> &got, uint32_t &parity) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int round = 0; round < C::ROUNDS; round++, parity ^= 1) {
    mbarrier_wait(shared_address(&shared.taken), parity ^ 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (round) break;
      const float sum = over_quad_sum(got.sum[0][half]), peak = got.peak[0][half];
      const uint32_t alive = __ballot_sync(~0u, got.alive >> half & 1) >> (lane & 28) & 15;
      if (t == 0) shared.rows[warp][g + 8 * half] = {peak == -INFINITY ? peak : peak * d.factor, sum, alive};
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (16 * group + g + 8 * half >= d.rows) break;
#pragma unroll
      for (int n = 0; n < C::PITCH / 8; n++) {
        const float *o = got.o[0][round * (C::PITCH / 8) + n].d + 2 * half;
        *(float2 *)&shared.columns[warp][g + 8 * half][(8 * n + 2 * t) ^ (g & 3) * 8] = make_float2(o[0], o[1]);
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared.summed));
  }
}

#endif
