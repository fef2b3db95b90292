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

// A row's sums, of which a lane has four columns.
typedef struct decoding_total {
  decoding_row all;
  float4 o;
} decoding_total;

// The sums of a row that the block's warps have handed over: number k is k * step rows behind number 0.
template <class C>
struct decoding_of_warps {
  enum { ABREAST = C::WIDTH > 128 ? 4 : 8 };  // loads
  const decoding_row *row;
  const float *columns;
  int step;

  __device__ __forceinline__ decoding_of_warps(const decoding_job &d, const decoding_shared<C> &shared, int of_row) {
    const int group = of_row / 16, down = of_row % 16;
    row = &shared.rows[group][down];
    // Lanes beyond the width read what others do.
    columns = shared.columns[group][down] + (4 * (threadIdx.x & 31) % C::PITCH ^ (down & 3) * 8);
    step = 16 * d.groups;
  }

  // The rows of the numbers from `first` on, one a lane, unless they are known, and columns of those from first + n on;
  // `here` of them in all.
  __device__ __forceinline__ void fetch(int first, int n, int here, decoding_row *own, uint4 (&x)[ABREAST]) const {
    const int lane = threadIdx.x & 31;
    if (own && lane < here) *own = row[(first + lane) * step];
#pragma unroll
    for (int i = 0; i < ABREAST; i++) {
      x[i] = {0, 0, 0, 0};
      if (n + i < here) x[i] = *(const uint4 *)(columns + (first + n + i) * step * C::PITCH);
    }
  }
  static __device__ __forceinline__ float value(uint32_t word) {
    return __uint_as_float(word);
  }
};

// Sums of a row on their way from block to block: a word is the complement of its bits, 0 until it is there. So a block
// that waits for a part reads nothing but the part, and no fence is needed.
static __device__ __forceinline__ uint32_t decoding_sent(float x) {
  // All bits set is a NaN, for which another does as well.
  return max(~__float_as_uint(x), 1u);
}

static __device__ __forceinline__ bool decoding_absent(const uint4 &x) {
  return !x.x | !x.y | !x.z | !x.w;
}

// A row's sums in memory: columns, 4 a lane, and a decoding_row.
template <class C>
struct decoding_part {
  uint4 columns[C::PITCH / 4], row;
};

// Where the block of a stretch leaves a row of the item that an earlier stretch begins.
template <class C>
static __device__ __forceinline__ decoding_part<C> *decoding_slot(const decoding_job &d, int stretch, int row,
                                                                  int column) {
  return (decoding_part<C> *)d.parts + (column / C::PITCH * d.rows + row) * (int)gridDim.x + stretch;
}

// The sums of a row that the blocks of the stretches behind an item's first leave.
template <class C>
struct decoding_of_blocks {
  enum { ABREAST = C::WIDTH > 128 ? 4 : 8 };
  decoding_part<C> *part;

  __device__ __forceinline__ decoding_of_blocks(const decoding_job &d, const decoding_split &split, int row, int column)
      : part(decoding_slot<C>(d, split.first + 1, row, column)) {}

  // The same. Waits until all are there.
  __device__ __forceinline__ void fetch(int first, int n, int here, decoding_row *own, uint4 (&x)[ABREAST]) const {
    const int lane = threadIdx.x & 31;
    uint4 *const row = &part[first + lane].row, *const columns = &part[first + n].columns[lane % (C::PITCH / 4)];
    enum { STEP = sizeof *part / sizeof *row };
    const bool reads_row = own && lane < here;
    uint4 rest = {1, 1, 1, 1};
    bool absent;
    do {
      const uint4 *const from = opaque(columns);
      if (reads_row) rest = load_relaxed_4(row);
#pragma unroll
      for (int i = 0; i < ABREAST; i++) {
        x[i] = {~0u, ~0u, ~0u, ~0u};
        if (n + i < here) x[i] = load_relaxed_4(from + i * STEP);
      }
      absent = decoding_absent(rest);
#pragma unroll
      for (int i = 0; i < ABREAST; i++) absent |= decoding_absent(x[i]);
    } while (__any_sync(~0u, absent));
    if (reads_row) *own = {value(rest.x), value(rest.y), ~rest.z};
  }
  // Zeros in place of so many parts, for the next launch.
  __device__ __forceinline__ void clear(int count) const {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int k = 0; k < count; k++) {
      store_relaxed_4(&part[k].columns[lane % (C::PITCH / 4)], {0, 0, 0, 0});
      if (lane == 0) store_relaxed_4(&part[k].row, {0, 0, 0, 0});
    }
  }
  static __device__ __forceinline__ float value(uint32_t word) {
    return __uint_as_float(~word);
  }
};

static __device__ __forceinline__ float4 decoding_scaled(float4 x, float by) {
  return make_float4(x.x * by, x.y * by, x.z * by, x.w * by);
}

// Adds `count` sums of a row, by a warp: 32 at a time, each time brought to the greatest peak so far. What each is
// multiplied by is found by a lane, while the first columns are on their way.
template <class Source>
static __device__ __forceinline__ void decoding_add(const Source &from, int count, decoding_total &total) {
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const int here = count - first < 32 ? count - first : 32;
    decoding_row own = {-INFINITY, 0, 0};
    uint4 x[Source::ABREAST];
    float4 &o = total.o;
    from.fetch(first, 0, here, &own, x);
    float peak = larger(own.peak, total.all.peak);
#pragma unroll
    for (int distance = 16; distance; distance /= 2) peak = larger(peak, __shfl_xor_sync(~0u, peak, distance));
    // One that saw nothing has a peak of -inf, so its factor is 0, and sums of 0.
    const float base = peak == -INFINITY ? 0 : peak, by = exp2_of(own.peak - base);
    const float before = exp2_of(total.all.peak - base);
    float sum = own.sum * by;
#pragma unroll
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    total.all.sum = total.all.sum * before + sum;
    total.all.peak = peak;
    total.all.alive |= __any_sync(~0u, own.alive != 0);
    o = decoding_scaled(o, before);
#pragma unroll 1
    for (int n = 0;;) {
#pragma unroll
      for (int i = 0; i < Source::ABREAST; i++) {
        const float factor = __shfl_sync(~0u, by, n + i);
        o.x += Source::value(x[i].x) * factor, o.y += Source::value(x[i].y) * factor;
        o.z += Source::value(x[i].z) * factor, o.w += Source::value(x[i].w) * factor;
      }
      if ((n += Source::ABREAST) >= here) break;
      from.fetch(first, n, here, NULL, x);
    }
  }
}

// Leaves a row's sums for another block.
template <class C>
static __device__ __forceinline__ void decoding_leave(decoding_part<C> *part, const decoding_total &total) {
  const int lane = threadIdx.x & 31;
  const float4 &o = total.o;
  if (4 * lane < C::PITCH)
    store_relaxed_4(&part->columns[lane],
                    {decoding_sent(o.x), decoding_sent(o.y), decoding_sent(o.z), decoding_sent(o.w)});
  if (lane == 0)
    store_relaxed_4(&part->row, {decoding_sent(total.all.peak), decoding_sent(total.all.sum), ~total.all.alive, 1});
}

// Where a row's results go, found while its last sums are waited for.
typedef struct decoding_target {
  int head;
  int64_t out, lse, dead;
} decoding_target;

static __device__ __forceinline__ decoding_target decoding_target_of(const decoding_job &d, int item, int row) {
  const sa_problem &p = d.forward.p;
  const decoding_query at = decoding_query_of(d, item, row);
  return {at.head, row_offset(p.out, at.batch, at.head, at.query), row_offset(p.lse, at.batch, at.head, at.query),
          row_offset(p.dead, at.batch, at.head, at.query)};
}

// Writes a row that has come to its end.
//
// Sinks are in natural units, in which one near the dtype's largest number does not overflow.
template <class C>
static __device__ __forceinline__ void decoding_end_row(const decoding_job &d, decoding_total &total,
                                                        const decoding_target &to, int column) {
  typedef typename C::element element;
  decoding_row &all = total.all;
  column += 4 * (threadIdx.x & 31);
  const sa_problem &p = d.forward.p;
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
    if (p.lse.data) ((float *)p.lse.data)[to.lse] = lse;
    if (p.dead.data) ((bool *)p.dead.data)[to.dead] = !all.alive;
  }
  if (column >= p.value_width) return;
  const float4 o = all.alive ? decoding_scaled(total.o, scale) : make_float4(0, 0, 0, 0);
  struct alignas(8) {
    element x[4];
  } out;
  put_real(&out.x[0], o.x);
  put_real(&out.x[1], o.y);
  put_real(&out.x[2], o.z);
  put_real(&out.x[3], o.w);
  element *at = (element *)p.out.data + to.out + column;
  if (d.forward.out_aligned) {
    *(decltype(out) *)at = out;
  } else {
#pragma unroll 1
    for (int n = 0; n < 4; n++) at[n] = out.x[n];
  }
}

// The items of the block, from `item` on, by the warps that end them: each has some of the rows. They add the sums of
// the warps that multiply. Of an item that several blocks have, the one that begins it, whose last item it is, adds
// what the others leave.
template <class C>
static __device__ __forceinline__ void decoding_end_items(const decoding_job &d, decoding_shared<C> &shared, int item) {
  const int warp = threadIdx.x / 32 - DECODING_WARPS - C::LOADING_WARPS, stretch = decoding_stretch();
  uint32_t parity = 0;
  if (warp >= d.rows) return;
  for (; item <= shared.last_item; item++) {
#pragma unroll 1
    for (int column = 0; column < C::WIDTH; column += C::PITCH, parity ^= 1) {
      mbarrier_wait(shared_address(&shared.summed), parity);
      const decoding_split split = shared.split[item % DECODING_ITEMS];
#pragma unroll 1
      for (int row = warp; row < d.rows; row += C::ENDING_WARPS) {
        decoding_total total = {{-INFINITY, 0, 0}, make_float4(0, 0, 0, 0)};
        decoding_add(decoding_of_warps<C>(d, shared, row), d.teams, total);
        if (split.first != stretch) {
          decoding_leave<C>(decoding_slot<C>(d, stretch, row, column), total);
        } else {
          const decoding_of_blocks<C> others(d, split, row, column);
          const decoding_target to = decoding_target_of(d, item, row);
          decoding_add(others, split.parts - 1, total);
          decoding_end_row<C>(d, total, to, column);
          others.clear(split.parts - 1);
        }
      }
      __syncwarp();
      if ((threadIdx.x & 31) == 0) mbarrier_arrive(shared_address(&shared.taken));
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
