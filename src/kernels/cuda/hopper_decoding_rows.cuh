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

static __device__ __forceinline__ float decoding_number(uint32_t word) {
  return __uint_as_float(word);
}

// The sums of a row that the block's teams have handed over.
template <class C>
struct decoding_of_warps {
  enum { LANES = DECODING_WARPS, ABREAST = C::WIDTH > 128 ? 4 : 8 };  // loads
  const decoding_row *row;
  const float *columns;

  __device__ __forceinline__ decoding_of_warps(const decoding_job &d, const decoding_shared<C> &shared, int of_row) {
    const int first = of_row / 16 * d.teams, down = of_row % 16;
    row = &shared.rows[first][down];
    // Lanes beyond the width read what others do.
    columns = shared.columns[first][down] + (4 * (threadIdx.x & 31) % C::PITCH ^ (down & 3) * 8);
  }

  // The rows of the numbers from `first` on, one a lane of LANES, unless they are known, and columns of those from
  // first + n on; `here` of them in all.
  __device__ __forceinline__ void fetch(int first, int n, int here, decoding_row *own, uint4 (&x)[ABREAST]) const {
    const int lane = threadIdx.x % LANES;
    if (own && lane < here) *own = row[(first + lane) * 16];
#pragma unroll
    for (int i = 0; i < ABREAST; i++) {
      x[i] = {0, 0, 0, 0};
      if (n + i < here) x[i] = *(const uint4 *)(columns + (first + n + i) * 16 * C::PITCH);
    }
  }
};

// A number on its way from block to block: a word that is not 0, which it is until it is there. So a block that waits
// for a part reads nothing but the part, and no fence is needed.
static __device__ __forceinline__ uint32_t decoding_sent(float x) {
  // To a sum, -0 is as good as 0.
  return x == 0 ? 0x80000000u : __float_as_uint(x);
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
  return (decoding_part<C> *)d.parts + (column / C::PITCH * d.rows + row) * (int)(gridDim.x * gridDim.y) + stretch;
}

// The sums of a row that the blocks of the stretches behind an item's first leave.
template <class C>
struct decoding_of_blocks {
  enum { LANES = 32, ABREAST = C::WIDTH > 128 ? 4 : 8 };
  decoding_part<C> *part;

  __device__ __forceinline__ decoding_of_blocks(const decoding_job &d, const decoding_split &split, int row, int column)
      : part(decoding_slot<C>(d, split.first + 1, row, column)) {}

  // The same. Waits until all are there.
  __device__ __forceinline__ void fetch(int first, int n, int here, decoding_row *own, uint4 (&x)[ABREAST]) const {
    const int lane = threadIdx.x & 31;
    uint4 *const row = &part[first + lane].row, *const columns = &part[first + n].columns[lane % (C::PITCH / 4)];
    enum { STEP = sizeof *part / sizeof *row };
    const bool reads_row = own && lane < here;
    const uint32_t nothing = decoding_sent(0);
    uint4 rest = {1, 1, 1, 1};
    bool absent;
    do {
      const uint4 *const from = opaque(columns);
      if (reads_row) rest = load_relaxed_4(row);
#pragma unroll
      for (int i = 0; i < ABREAST; i++) {
        x[i] = {nothing, nothing, nothing, nothing};
        if (n + i < here) x[i] = load_relaxed_4(from + i * STEP);
      }
      absent = decoding_absent(rest);
#pragma unroll
      for (int i = 0; i < ABREAST; i++) absent |= decoding_absent(x[i]);
    } while (__any_sync(~0u, absent));
    if (reads_row) *own = {decoding_number(rest.x), decoding_number(rest.y), rest.z - 1};
  }
  // Zeros in place of so many parts, for the next launch.
  __device__ __forceinline__ void clear(int count) const {
    const int lane = threadIdx.x & 31;
#pragma unroll 1
    for (int k = lane; k < count; k += 32) store_relaxed_4(&part[k].row, {0, 0, 0, 0});
    uint4 *columns = &part->columns[lane % (C::PITCH / 4)];
    enum { STEP = sizeof *part / sizeof *columns };
#pragma unroll 4
    for (int k = 0; k < count; k++, columns += STEP) store_relaxed_4(columns, {0, 0, 0, 0});
  }
};

static __device__ __forceinline__ float4 decoding_scaled(float4 x, float by) {
  return make_float4(x.x * by, x.y * by, x.z * by, x.w * by);
}

// Adds `count` sums of a row, by a warp: LANES at a time, each time brought to the greatest peak so far. What each is
// multiplied by is found by a lane, while the first columns are on their way.
template <class Source>
static __device__ __forceinline__ void decoding_add(const Source &from, int count, decoding_total &total) {
  enum { LANES = Source::LANES, ABREAST = Source::ABREAST };
#pragma unroll 1
  for (int first = 0; first < count; first += LANES) {
    const int here = count - first < LANES ? count - first : LANES;
    decoding_row own = {-INFINITY, 0, 0};
    uint4 x[ABREAST];
    float4 &o = total.o;
    from.fetch(first, 0, here, &own, x);
    float peak = larger(own.peak, total.all.peak);
#pragma unroll
    for (int distance = LANES / 2; distance; distance /= 2) peak = larger(peak, __shfl_xor_sync(~0u, peak, distance));
    // One that saw nothing has a peak of -inf, so its factor is 0, and sums of 0.
    const float base = peak == -INFINITY ? 0 : peak, by = exp2_of(own.peak - base);
    const float before = exp2_of(total.all.peak - base);
    float sum = own.sum * by;
#pragma unroll
    for (int distance = LANES / 2; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    total.all.sum = total.all.sum * before + sum;
    total.all.peak = peak;
    total.all.alive |= __any_sync(~0u, own.alive != 0);
    o = decoding_scaled(o, before);
#pragma unroll 1
    for (int n = 0;;) {
#pragma unroll
      for (int i = 0; i < ABREAST; i++) {
        const float factor = __shfl_sync(~0u, by, n + i);
        o.x += decoding_number(x[i].x) * factor, o.y += decoding_number(x[i].y) * factor;
        o.z += decoding_number(x[i].z) * factor, o.w += decoding_number(x[i].w) * factor;
      }
      if ((n += ABREAST) >= here) break;
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
    store_relaxed_4(&part->row, {decoding_sent(total.all.peak), decoding_sent(total.all.sum), total.all.alive + 1, 1});
}

// Where a row's results go: a lane's four columns, and what the first lane writes, NULL where nobody wants it. And the
// row's sink, -inf without.
template <class C>
struct decoding_target {
  typename C::element *out;
  float *lse;
  bool *dead;
  float sink;
};

template <class C>
static __device__ __forceinline__ decoding_target<C> decoding_target_of(const decoding_job &d, int item, int row,
                                                                        int column) {
  typedef typename C::element element;
  const sa_problem &p = d.forward.p;
  const decoding_query at = decoding_query_of(d, item, row);
  decoding_target<C> to = {(element *)p.out.data + row_offset(p.out, at.batch, at.head, at.query) + column, NULL, NULL,
                           -INFINITY};
  if (p.lse.data && column == 0) to.lse = (float *)p.lse.data + row_offset(p.lse, at.batch, at.head, at.query);
  if (p.dead.data && column == 0) to.dead = (bool *)p.dead.data + row_offset(p.dead, at.batch, at.head, at.query);
  if (p.sinks.data) {
    const int64_t sink = at.head * p.sinks.stride[1];
    to.sink =
        p.sinks.dtype == SA_F32 ? ((const float *)p.sinks.data)[sink] : real_of(((const element *)p.sinks.data)[sink]);
  }
  return to;
}

// Writes a row that has come to its end.
//
// Sinks are in natural units, in which one near the dtype's largest number does not overflow.
template <class C>
static __device__ __forceinline__ void decoding_end_row(const decoding_job &d, decoding_total &total,
                                                        const decoding_target<C> &to, int column) {
  decoding_row &all = total.all;
  const float natural = all.peak * 0.69314718f;
  float top = natural, scale = 1;
  if (d.forward.p.sinks.data) {
    if (!(to.sink <= top)) top = to.sink;
    scale = exp2_of((natural - top) * 1.44269504f);
    all.sum = all.sum * scale + exp2_of((to.sink - top) * 1.44269504f);
  }
  float lse = top + __log2f(all.sum) * 0.69314718f;
  scale *= reciprocal_fast(all.sum);
  // Visible scores that are all -inf leave a sum of 0: 0/0 is the NaN that the definition gives.
  if (!(all.sum > 0)) lse = scale = all.sum * NAN;
  if (!all.alive) lse = to.sink;
  if (to.lse) *to.lse = lse;
  if (to.dead) *to.dead = !all.alive;
  if (column >= (int)d.forward.p.value_width) return;
  const float4 o = all.alive ? decoding_scaled(total.o, scale) : make_float4(0, 0, 0, 0);
  const uint2 out = {C::products::pack(o.x, o.y), C::products::pack(o.z, o.w)};
  if (d.forward.out_aligned) {
    *(uint2 *)to.out = out;
  } else {
    uint16_t *const at = (uint16_t *)to.out;
    at[0] = (uint16_t)out.x, at[1] = (uint16_t)(out.x >> 16);
    at[2] = (uint16_t)out.y, at[3] = (uint16_t)(out.y >> 16);
  }
}

// The items of the block, from `item` on, by the warps that end them: each has some of the rows. They add the sums of
// the warps that multiply. Of an item that several blocks have, the one that begins it, whose last item it is, adds
// what the others leave. Where its first row goes a warp finds while keys are multiplied.
template <class C>
static __device__ __forceinline__ void decoding_end_items(const decoding_job &d, decoding_shared<C> &shared, int item) {
  const int warp = threadIdx.x / 32 - DECODING_WARPS - DECODING_LOADERS, stretch = decoding_stretch();
  uint32_t parity = 0;
  if (warp >= d.rows) return;
  for (; item <= shared.last_item; item++) {
#pragma unroll 1
    for (int first = 0; first < C::WIDTH; first += C::PITCH, parity ^= 1) {
      const int column = first + 4 * (threadIdx.x & 31);
#pragma unroll 1
      for (int row = warp; row < d.rows; row += C::ENDING_WARPS) {
        const decoding_target<C> to = decoding_target_of<C>(d, item, row, column);
        mbarrier_wait(shared_address(&shared.summed), parity);
        const decoding_split split = shared.split[item % DECODING_ITEMS];
        decoding_total total = {{-INFINITY, 0, 0}, make_float4(0, 0, 0, 0)};
        decoding_add(decoding_of_warps<C>(d, shared, row), d.teams, total);
        if (split.first != stretch) {
          decoding_leave<C>(decoding_slot<C>(d, stretch, row, first), total);
        } else {
          const decoding_of_blocks<C> others(d, split, row, first);
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

// Hands a warp's sums of an item to the warps that end it, when these have taken those of the item before. Columns of
// neighbouring rows are swapped, 8 for 8 of 32, so that lanes meet in no bank.
template <class C>
static __device__ __forceinline__ void decoding_hand_over(const decoding_job &d, decoding_shared<C> &shared,
                                                          const gathered<C> &got, uint32_t &parity) {
  const int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4, group = decoding_group(d);
  const int slot = group * d.teams + decoding_team(d);
#pragma unroll
  for (int round = 0; round < C::ROUNDS; round++, parity ^= 1) {
    mbarrier_wait(shared_address(&shared.taken), parity ^ 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (round) break;
      const float sum = over_quad_sum(got.sum[0][half]), peak = got.peak[0][half];
      const uint32_t alive = __ballot_sync(~0u, got.alive >> half & 1) >> (lane & 28) & 15;
      if (t == 0) shared.rows[slot][g + 8 * half] = {peak == -INFINITY ? peak : peak * d.factor, sum, alive};
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (16 * group + g + 8 * half >= d.rows) break;
#pragma unroll
      for (int n = 0; n < 4; n++) {
        float *const to = &shared.columns[slot][g + 8 * half][8 * (n ^ (g & 3)) + 2 * t];
#pragma unroll
        for (int k = n; k < C::PITCH / 8; k += 4) {
          const float *o = got.o[0][round * (C::PITCH / 8) + k].d + 2 * half;
          *(float2 *)(to + 8 * (k - n)) = make_float2(o[0], o[1]);
        }
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared.summed));
  }
}

#endif
