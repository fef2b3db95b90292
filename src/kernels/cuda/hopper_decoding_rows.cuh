// how the rows of few queries end: what a block's warps gathered is added, then what blocks did, and out is written
//
// This code runs once or twice a block, so what it takes is mostly the way of its instructions from memory: it is made
// to be short.
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_DECODING_ROWS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_DECODING_ROWS_CUH
#include "kernels/cuda/hopper_decoding_loads.cuh"
#include "kernels/cuda/portable_numbers.cuh"

static __device__ __forceinline__ void decoding_meet() {
  named_barrier_sync(DECODING_MEET, DECODING_THREADS);
}

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
__attribute__((noinline)) static __device__ void decoding_end_row(const decoding_job &d, const decoding_sums &from,
                                                                  int item, int row, int column, decoding_row *left) {
  typedef typename C::element element;
  const int lane = threadIdx.x & 31;
  column += 4 * lane;
  decoding_row all = {-INFINITY, 0, 0};
  float4 o = make_float4(0, 0, 0, 0);
  // Lanes beyond the width read what others do.
  const float *const number_0 = from.columns + ((4 * lane % C::WIDTH) ^ from.swizzle);
  const int apart = from.step * from.pitch;
  const float *later = number_0 - from.back * from.pitch;
  // 32 at a time, each time brought to the greatest peak so far: what each is multiplied by is found by a lane.
#pragma unroll 1
  for (int first = 0; first < from.count; first += 32) {
    const int k = first + lane;
    decoding_row own = {-INFINITY, 0, 0};
    if (k < from.count) own = from.row[k * from.step - (k ? from.back : 0)];
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
    const int here = from.count - first < 32 ? from.count - first : 32;
#pragma unroll 4
    for (int n = 0; n < here; n++, later += apart) {
      const float factor = __shfl_sync(~0u, by, n);
      const float4 x = *(const float4 *)(n || first ? later : number_0);
      o.x += x.x * factor, o.y += x.y * factor, o.z += x.z * factor, o.w += x.w * factor;
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

// All parts of an item.
template <class C>
static __device__ __forceinline__ void decoding_merge(const decoding_job &d, const decoding_split &split) {
  // The first part is one that ends its block; from there to the next one's beginning is one slot, then two.
  const decoding_row *slot = decoding_slot(d, split.first, true);
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < d.rows; row += DECODING_WARPS)
#pragma unroll 1
    for (int column = 0; column < C::WIDTH; column += 128) {
      const decoding_sums from = {slot + row,   d.part_out + (slot - d.part_row + row) * C::WIDTH + column,
                                  C::WIDTH,     0,
                                  split.parts,  2 * d.groups * 16,
                                  d.groups * 16};
      decoding_end_row<C>(d, from, split.item, row, column, NULL);
    }
}

// Ends an item, as far as this block has it: all warps that multiply call it. `begun`: the one that the block begins
// with.
template <class C>
static __device__ __forceinline__ void decoding_end_item(const decoding_job &d, decoding_shared<C> &shared, int item,
                                                         int begun, const gathered<C> &got) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float sum = over_quad_sum(got.sum[0][half]);
    const uint32_t alive = __ballot_sync(~0u, got.alive >> half & 1) >> (lane & 28) & 15;
    const float peak = got.peak[0][half];
    if (t == 0) shared.rows[warp][g + 8 * half] = {peak == -INFINITY ? peak : peak * d.factor, sum, alive};
  }
  const int2 units = shared.item_units[item % DECODING_ITEMS];
  const decoding_split split = decoding_split_of(d, item, units.x, units.y);
  decoding_row *const slot = split.parts == 1 ? NULL : decoding_slot(d, blockIdx.x, (int)blockIdx.x == split.first);
#pragma unroll
  for (int round = 0; round < C::ROUNDS; round++) {
#pragma unroll
    for (int n = 0; n < C::PITCH / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float *o = got.o[0][round * (C::PITCH / 8) + n].d + 2 * half;
        *(float2 *)&shared.columns[warp][g + 8 * half][(8 * n + 2 * t) ^ (g & 3) * 8] = make_float2(o[0], o[1]);
      }
    decoding_meet();
#pragma unroll 1
    for (int row = warp; row < d.rows; row += DECODING_WARPS) {
      const int group = row / 16, down = row % 16;
      const decoding_sums from = {&shared.rows[group][down],
                                  shared.columns[group][down],
                                  C::PITCH,
                                  (down & 3) * 8,
                                  DECODING_WARPS / d.groups,
                                  16 * d.groups,
                                  0};
      decoding_end_row<C>(d, from, item, row, round * C::PITCH, slot ? slot + row : NULL);
    }
    decoding_meet();
  }
  if (slot) named_barrier_arrive(DECODING_PARTED + (item != begun), DECODING_THREADS + 32);
}

// By the warp that counts the parts of items, so that the others need not wait for it: as soon as they are written.
template <class C>
static __device__ __forceinline__ void decoding_count(const decoding_job &d, decoding_shared<C> &shared,
                                                      const decoding_place &begun, const decoding_place &ended) {
  for (int n = 0; n < 2; n++) {
    const decoding_place &place = n ? ended : begun;
    decoding_split split = decoding_split_of(d, place.item, place.first, place.end);
    if (n && ended.item == begun.item) split.parts = 1;
    if (split.parts > 1) {
      named_barrier_meet(DECODING_PARTED + n, DECODING_THREADS + 32);
      int before = 0;
      if ((threadIdx.x & 31) == 0) {
        __threadfence();
        before = atomicAdd(&d.counters[split.first], 1);
        __threadfence();
        if (before == split.parts - 1) d.counters[split.first] = 0;
      }
      if (__shfl_sync(~0u, before, 0) != split.parts - 1) split.parts = 1;
    }
    if ((threadIdx.x & 31) == 0) shared.split[n] = split;
  }
  named_barrier_meet(DECODING_COUNTED, DECODING_THREADS + 32);
}

// Merges the items of which the block had the last part, when all its own are done.
template <class C>
static __device__ __forceinline__ void decoding_merge_counted(const decoding_job &d, decoding_shared<C> &shared) {
  named_barrier_meet(DECODING_COUNTED, DECODING_THREADS + 32);
#pragma unroll 1
  for (int n = 0; n < 2; n++)
    if (shared.split[n].parts > 1) decoding_merge<C>(d, shared.split[n]);
}

#endif
