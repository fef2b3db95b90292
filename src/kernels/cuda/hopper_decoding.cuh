// attention of few queries over many keys on Hopper: bound by memory, so one ring of copies that never runs dry
//
// A block per multiprocessor has an equal share of all keys and values of all heads, wherever heads begin and end in
// it (unless a few blocks less can have whole heads, or heads blocks of their own). Two warps copy its share by TMA to
// a ring of 128 KiB, in steps of 16 KiB, in one stream across the heads: one K, one V. Eight others multiply by
// mma.sync, a step each in turn, every one with a softmax of its own: the queries of all heads that share a key head
// are the 16 rows of a product. Up to 64 rows are groups of 16, which as many warps multiply with the same step. At a
// head's end each hands its sums over in shared memory and goes on. More warps add them. Of a head that several blocks
// have, the one that begins it adds what the others leave in memory, word by word as it comes: nobody counts, and no
// fence is needed.
//
// Keys that live in the second-level cache come faster than a block goes through cold code: a hundred instructions
// between what a warp waits for and what others wait for are 0.3 us. So addresses are found before waits, not behind.
//
// What is masked cannot leak: a step that a mask cuts is looked through for what is not finite in V. If there is, these
// elements are 0 in the same products, and are then given to the rows that see them.
//
//   widths up to  keys a step  registers: O, Q                     warps that load, that end heads  shared memory
//   64            64           32, 16                              2, 6                             163 KiB
//   128           32           64, 32                              2, 6                             195 KiB
//   256           16           128, none: Q is in shared memory    2, 2                             226 KiB
//
// One query of 32:8 heads at width 128 on an H200, calls in a row and in a CUDA graph: 8192 keys in 11.8 and 10.2 us
// (cuDNN 11.2 in a graph), 131072 in 128 and 126 (127 to 129), 4.3 TB/s; 4 x 131072 in 478 and 477, 4.5.
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_DECODING_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_DECODING_CUH
#include "kernels/cuda/hopper_decoding_loads.cuh"
#include "kernels/cuda/hopper_decoding_rows.cuh"
#include "kernels/cuda/portable_forward_gather.cuh"

// The 16 rows of a warp as the left side of products with keys: in registers, or where Q is staged, in shared memory.
template <class C, bool STAGED = C::STAGES_QUERIES>
struct decoding_queries {
  typename C::products::left own[C::WIDTH / 16];
  __device__ __forceinline__ decoding_queries(decoding_shared<C> &, int) {}
  __device__ __forceinline__ typename C::products::left &step(int n) { return own[n]; }
};

// All warps of a group of rows leave the same there, after all of them have ended the item before.
template <class C>
struct decoding_queries<C, true> {
  typename C::products::left (*staged)[32];
  __device__ __forceinline__ decoding_queries(decoding_shared<C> &shared, int group) : staged(shared.queries[group]) {}
  __device__ __forceinline__ typename C::products::left &step(int n) { return staged[n][threadIdx.x & 31]; }
};

// Where a lane's rows of queries are, from its first column on; NULL where there is no row.
typedef struct decoding_rows {
  const uint16_t *half[2];
} decoding_rows;

static __device__ __forceinline__ decoding_rows decoding_rows_of(const decoding_job &d, int item, int group) {
  const sa_operand &q = d.forward.p.q;
  decoding_rows rows;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = group * 16 + (threadIdx.x & 31) / 4 + 8 * half;
    const decoding_query at = decoding_query_of(d, item, row);
    const int64_t first = row_offset(q, at.batch, at.head, at.query) + 2 * (threadIdx.x & 3);
    rows.half[half] = row < d.rows ? (const uint16_t *)q.data + first : NULL;
  }
  return rows;
}

// The width is a multiple of 8: all lanes have columns at the same places.
template <class C>
static __device__ __forceinline__ void decoding_load_queries(const decoding_job &d, const decoding_rows &rows,
                                                             decoding_queries<C> &q) {
  const int width = (int)d.forward.p.width;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t x[C::WIDTH / 8] = {};
    if (rows.half[half]) {
#pragma unroll
      for (int n = 0; n < C::WIDTH / 8; n++)
        if (8 * n < width) x[n] = *(const uint32_t *)(rows.half[half] + 8 * n);
    }
#pragma unroll
    for (int n = 0; n < C::WIDTH / 8; n++) q.step(n / 2).r[n % 2 * 2 + half] = x[n];
  }
}

// Calls the queries of the block's next items, a few, to the first-level cache: in the stream of keys they would take
// microseconds.
template <class C>
static __device__ __forceinline__ void decoding_touch_queries(const decoding_job &d, decoding_shared<C> &shared,
                                                              int begun) {
  enum { LINES = C::WIDTH / 64, NEXT = 8 };
  const int last = shared.last_item < begun + NEXT ? shared.last_item : begun + NEXT;
  const sa_problem &p = d.forward.p;
  uint32_t touched = 0;
#pragma unroll 4
  for (int n = threadIdx.x & 31; n < (last - begun) * d.rows * LINES; n += 32) {
    const int row = n / LINES % d.rows, column = n % LINES * 64;
    const decoding_query at = decoding_query_of(d, begun + 1 + n / LINES / d.rows, row);
    if (column < p.width)
      touched ^= ((const uint16_t *)p.q.data)[row_offset(p.q, at.batch, at.head, at.query) + column];
  }
  shared.touched = touched;
}

// Where a lane's rows are among the 512 words of a pattern's bits; -1 where there is no row.
typedef struct decoding_bits {
  int word[2];
} decoding_bits;

static __device__ __forceinline__ decoding_bits decoding_bits_of(const decoding_job &d, int group) {
  decoding_bits bits;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = group * 16 + (int)(threadIdx.x & 31) / 4 + 8 * half;
    const int query = d.forward.packed ? row % (int)d.forward.p.queries : row;
    const int pair = query / 16 * 32 + query % 8 * 4 + (threadIdx.x & 3);
    bits.word[half] = row < d.rows ? 2 * pair + (query >> 3 & 1) : -1;
  }
  return bits;
}

// Whether the values of a step hold what is not finite.
template <class C>
static __device__ __forceinline__ bool decoding_nonfinite(const char *values) {
  uint32_t seen = 0;
#pragma unroll 4
  for (int at = (threadIdx.x & 31) * 16; at < C::STEP_BYTES / 2; at += 512) {
    const uint4 x = *(const uint4 *)(values + at);
    seen = note_nonfinite<typename C::element>(seen, x.x);
    seen = note_nonfinite<typename C::element>(seen, x.y);
    seen = note_nonfinite<typename C::element>(seen, x.z);
    seen = note_nonfinite<typename C::element>(seen, x.w);
  }
  return __any_sync(~0u, (seen & 0x7fff7fff) != 0);
}

template <class C>
static __device__ __forceinline__ void decoding_multiply_keys(decoding_queries<C> &q, const char *keys,
                                                              float (&s)[1][C::BLOCKS][4]) {
  typedef typename C::products P;
  typename P::sum sum[C::BLOCKS];
  clear_sum(sum);
#pragma unroll
  for (int step = 0; step < C::WIDTH / 16; step++) {
    const typename P::left a = q.step(step);
#pragma unroll
    for (int n = 0; n < C::BLOCKS; n += 2) {
      typename P::right b[2];
      P::template right_rows<2 * SA_PANEL>(b, keys, step / 4 * C::KEYS + 8 * n, step % 4);
      P::template multiply_term<false>(sum[n], a, b[0], 0);
      P::template multiply_term<false>(sum[n + 1], a, b[1], 0);
    }
  }
#pragma unroll
  for (int n = 0; n < C::BLOCKS; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) s[0][n][e] = sum[n].value(e);
}

template <class C>
static __device__ __forceinline__ void decoding_scale(const float (&factor)[1][2],
                                                      typename C::products::total (&o)[1][C::COLUMNS]) {
  if (!__any_sync(~0u, factor[0][0] != 1 || factor[0][1] != 1)) return;
#pragma unroll
  for (int n = 0; n < C::COLUMNS; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) o[0][n].d[e] *= factor[0][e / 2];
}

template <class C>
static __device__ __forceinline__ void decoding_multiply_values(const typename C::products::left (&a)[C::STEPS],
                                                                const char *values,
                                                                typename C::products::total (&o)[1][C::COLUMNS]) {
  typedef typename C::products P;
#pragma unroll
  for (int step = 0; step < C::STEPS; step++)
#pragma unroll
    for (int n = 0; n < C::COLUMNS; n += 2) {
      typename P::right b[2];
      P::template right_columns<2 * SA_PANEL>(b, values, step * P::DEPTH + n / 8 * C::KEYS, n % 8 * 8);
      P::template multiply_term<false>(o[0][n], a[step], b[0], 0);
      P::template multiply_term<false>(o[0][n + 1], a[step], b[1], 0);
    }
}

// 0 in place of the halves of a pair that are not finite.
template <class Element>
static __device__ __forceinline__ uint32_t decoding_finite(uint32_t pair) {
  const uint32_t exponent = std::is_same<Element, __half>::value ? 0x7c00 : 0x7f80;
  if ((pair & exponent) == exponent) pair &= 0xffff0000;
  if ((pair >> 16 & exponent) == exponent) pair &= 0xffff;
  return pair;
}

// The same as decoding_multiply_values, but for elements of V that are not finite: 0 in the products, they are then
// added to the rows that see them. So a row that sees none gets the very bits that any finite V would have given.
template <class C>
__attribute__((noinline)) static __device__ void decoding_multiply_carefully(careful_step<C> &kept,
                                                                             const typename C::products::left *a,
                                                                             const char *tile, const char *values,
                                                                             int64_t stride, int columns) {
  typedef typename C::products P;
  for (int step = 0; step < C::STEPS; step++)
    for (int n = 0; n < C::COLUMNS; n += 2) {
      typename P::right b[2];
      P::template right_columns<2 * SA_PANEL>(b, tile, step * P::DEPTH + n / 8 * C::KEYS, n % 8 * 8);
      for (int next = 0; next < 2; next++) {
        for (int r = 0; r < 2; r++) b[next].r[r] = decoding_finite<typename C::element>(b[next].r[r]);
        P::template multiply_term<false>(kept.o[0][n + next], a[step], b[next], 0);
      }
    }
  uint32_t bad[(C::KEYS + 31) / 32] = {};
  for (int key = 0; key < C::KEYS; key++) {
    bool found = false;
    for (int column = threadIdx.x & 31; column < columns; column += 32)
      found |= !is_finite(real_of(((const typename C::element *)(values + key * stride))[column]));
    if (__any_sync(~0u, found)) bad[key / 32] |= 1u << key % 32;
  }
  add_nonfinite<C>(kept, values, stride, columns, bad);
}

// One step: its weights relative to the rows' peaks, and its values.
template <class C>
static __device__ __forceinline__ void decoding_multiply(const decoding_job &d, decoding_queries<C> &q,
                                                         const decoding_bits &bits, const decoding_step &at,
                                                         const char *step, gathered<C> &got) {
  typedef typename C::products P;
  const bool full = at.pattern == SA_FULL;
  const char *const values = step + C::STEP_BYTES / 2;
  uint32_t seen[1][2] = {{~0u, ~0u}};
  if (!full) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t *words = (const uint32_t *)d.forward.plan.row_bits + (int64_t)at.pattern * 512;
      const uint32_t word = bits.word[half] < 0 ? 0 : words[bits.word[half]];
      seen[0][half] = word >> at.key % SA_TILE / 4 & (uint32_t)((1ull << C::KEYS / 4) - 1);
    }
    // For rows that see nothing here, nothing changes.
    if (!__any_sync(~0u, (seen[0][0] | seen[0][1]) != 0)) return;
  }
  float s[1][C::BLOCKS][4], factor[1][2];
  decoding_multiply_keys<C>(q, step, s);
  score<C>(score_rule<float>(), forward_block(), at.key, full, seen, s);
  if (seen[0][0]) got.alive |= 1;
  if (seen[0][1]) got.alive |= 2;
  const float exponent[1][2] = {{d.factor, d.factor}};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    factor[0][half] = 1;
    if (half && d.rows <= 8) break;  // there is no such row
    const bool first = got.peak[0][half] == -INFINITY;
    soften_half<C>(0, half, exponent, s, got, factor);
    if (first) factor[0][half] = 1;  // there is nothing to be scaled
  }
  typename P::left weights[C::STEPS];
#pragma unroll
  for (int n = 0; n < C::STEPS; n++) P::template left_of<false>(weights[n], &s[0][2 * n]);
  decoding_scale<C>(factor, got.o);
  if (!full && decoding_nonfinite<C>(values)) {
    careful_step<C> kept;
    typename P::left left[C::STEPS];
    memcpy(kept.o, got.o, sizeof kept.o);
    memcpy(kept.weights, s, sizeof kept.weights);
    memcpy(kept.seen, seen, sizeof kept.seen);
    memcpy(left, weights, sizeof left);
    const tile_source &v = d.forward.v;
    const sa_problem &p = d.forward.p;
    const int64_t batch = at.item / d.heads;
    int64_t head = at.item % d.heads;
    if (!d.forward.packed) head /= d.forward.group;
    const char *from = v.data + (batch * p.v.stride[0] + head * p.v.stride[1]) * 2 + at.key * v.stride;
    decoding_multiply_carefully<C>(kept, left, values, from, v.stride, v.bytes / 2);
    memcpy(got.o, kept.o, sizeof kept.o);
  } else {
    decoding_multiply_values<C>(weights, values, got.o);
  }
}

template <class C>
static __device__ __forceinline__ void decoding_clear(gathered<C> &got) {
  clear_sum(got.o);
  got.alive = 0;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    got.peak[0][half] = -INFINITY;
    got.sum[0][half] = 0;
  }
}

// As many warps as an item has groups of rows are a team; the teams take steps in turn. A slot of the ring is always
// the same team's: one that came to another's could take the end of a phase before for that of its own.
template <class C>
static __device__ __forceinline__ void decoding_consume(const decoding_job &d, decoding_shared<C> &shared, int item) {
  const int group = decoding_group(d);
  const decoding_bits bits = decoding_bits_of(d, group);
  const decoding_units units = decoding_units_of(d);
  const int steps = units.end - units.first;
  uint32_t handed = 0;
  gathered<C> got;
  decoding_queries<C> q(shared, group);
  decoding_clear(got);
  const decoding_rows rows = decoding_rows_of(d, item, group);
  dependency_wait();
  // At once: behind the keys that are called for meanwhile they would take longer.
  decoding_load_queries<C>(d, rows, q);
  for (int step = decoding_team(d);; step += d.teams) {
    const int slot = step % C::SLOTS;
    decoding_step at = {0, 0, shared.last_item + 1};
    if (step < steps) {
      mbarrier_wait(shared_address(&shared.full[slot]), step / C::SLOTS & 1);
      at = shared.step[slot];
    }
    if (item < at.item) {
      do {
        decoding_hand_over<C>(d, shared, got, handed);
        decoding_clear(got);
      } while (++item < at.item);
      if (step >= steps) break;
      // Where the warps share the queries, all must have ended the item before.
      if (C::STAGES_QUERIES) mbarrier_wait(shared_address(&shared.summed), handed ^ 1);
      decoding_load_queries<C>(d, decoding_rows_of(d, item, group), q);
    }
    if (at.pattern != DECODING_NOTHING) decoding_multiply<C>(d, q, bits, at, (const char *)shared.ring[slot], got);
    __syncwarp();
    if ((threadIdx.x & 31) == 0) mbarrier_arrive(shared_address(&shared.empty[slot]));
  }
}

template <class C>
__global__ void __launch_bounds__(C::ALL_THREADS, 1) hopper_decoding_kernel(const __grid_constant__ decoding_job d) {
  decoding_shared<C> &shared = *dynamic_shared<decoding_shared<C>>();
  const decoding_units units = decoding_units_of(d);
  const decoding_place place = decoding_find_place<C>(d, units.first);
  // By warps that have nothing else to do before the first copy.
  if (threadIdx.x == 0) {
    hopper_block_mbarriers(shared_address(shared.full), C::SLOTS, DECODING_LOADERS);
    hopper_block_mbarriers(shared_address(shared.empty), C::SLOTS, d.groups);
    mbarrier_init(shared_address(&shared.summed), DECODING_WARPS);
    mbarrier_init(shared_address(&shared.taken), d.rows < C::ENDING_WARPS ? d.rows : C::ENDING_WARPS);
    mbarrier_init_fence();
  } else if (threadIdx.x == DECODING_THREADS) {
    tma_prefetch(&d.k);
    tma_prefetch(&d.v);
  } else if (threadIdx.x >= C::ALL_THREADS - 32) {
    const int last_item = decoding_find_place<C>(d, units.end - 1).item;
    if (threadIdx.x % 32 == 0) {
      shared.split[place.item % DECODING_ITEMS] = decoding_split_of(d, place.first, place.end);
      shared.last_item = last_item;
    }
  }
  __syncthreads();
  // The next launch may be brought to the device at once: its blocks wait for room, and for all that this one writes.
  dependents_launch();
  if (threadIdx.x < DECODING_THREADS) {
    registers_take<C::MULTIPLYING_REGISTERS>();
    decoding_consume<C>(d, shared, place.item);
  } else {
    registers_give_back<C::ENDING_REGISTERS>();
    if (threadIdx.x < DECODING_THREADS + 32 * DECODING_LOADERS) {
      decoding_load<C>(d, shared, place);
    } else {
      dependency_wait();
      if (threadIdx.x >= C::ALL_THREADS - 32) decoding_touch_queries<C>(d, shared, place.item);
      decoding_end_items<C>(d, shared, place.item);
    }
  }
}

template <class C>
int hopper_decoding_launch(const char *function, const decoding_job &d, dim3 grid, cudaStream_t stream) {
  return sa_cuda_launch<true>(function, hopper_decoding_kernel<C>, grid, dim3(C::ALL_THREADS),
                              sizeof(decoding_shared<C>), stream, d);
}

#endif
