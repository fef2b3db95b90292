// what the backward kernels of Hopper have in common: a call, the statistics of its rows, products, and what is done
// with elements that are not finite
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_CALL_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_CALL_CUH
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/hopper_scores.cuh"
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/ptx_hopper.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum {
  HOPPER_BACKWARD_ROWS_THREADS = 256,
  HOPPER_BACKWARD_HEADS = 256  // key heads that are put in order
};

// An LSE beyond this has an error of 6e-5 in f32, which the weights would inherit.
#define HOPPER_BACKWARD_COARSE 1024.f

// A call. Steps along a dim of Q, K, V or dO that is broadcast are 0, else 1 (tensor_map.cuh).
typedef struct hopper_backward_call {
  CUtensorMap q, k, v, dout, dq_map, dk, dv;
  sa_device_plan plan;
  sa_operand q_values, k_values, dout_values, out, lse, dlse, dq_out, dk_out, dv_out, sinks, dsinks;
  int32_t batch, heads, key_heads, queries, keys, width, value_width;
  int32_t group;   // heads that read one key head
  int32_t padded;  // queries, to whole tiles
  int32_t q_batch_step, q_head_step, k_batch_step, k_head_step, v_batch_step, v_head_step, dout_batch_step,
      dout_head_step;
  float scale, scale_log2;
  int32_t deterministic;
  // Jobs: `jobs` columns of key heads; those of `mixed` neighbouring key heads take turns, so that neighbours in the
  // order add to different sums. When `sorted`, neighbours are so by head_order.
  int32_t jobs, mixed, sorted;
  // Behind the first `lead` jobs as many from number `brought` on are taken, whose columns are shorter.
  int32_t lead, brought;
  // Whether, in order, columns are taken from the first on, their rows from the last on; else the other way round.
  // Where columns get shorter, the longest are then begun first, and the blocks end at the same time. `alternate`:
  // those of even numbers come before the others.
  int32_t descending, alternate;
  // Heads of a group that a job goes past, a row of tiles of each, before it comes to the next row.
  int32_t abreast;
  // Columns from number `whole` on, the last ones taken, are shared out in `parts` jobs, each of as many of their
  // tiles, so that the blocks end at the same time: first the first part of each, then the second, and so on.
  int32_t whole, parts;
  uint16_t head_order[HOPPER_BACKWARD_HEADS];
  float *dq;         // sums: chunks of [batch, head, padded / 64, width / 64], each [8][128][4] as wgmma leaves them
  float *lse_log2;   // [batch, head, padded], in the order of hopper_backward_slot: -lse, times lse_unit
  float *delta;      // likewise: rowsum(dO * O) - dLSE
  float *sink_part;  // [batch, head, padded / 64], or NULL
  float *part_sums;  // [shared column, warpgroup, dV or dK]: the sums of its first jobs, as the threads have them
  float lse_unit;    // log2(e), or 1 where scores are natural
  // Of extras (hopper_backward_extras.cuh). A weight is 2^((score + lse_log2) unit - log2_sum), where log2_sum is 0 but
  // for rows whose LSE is too large to tell the sum from the peak.
  hopper_scores scores;
  sa_operand dead, dalibi;
  float *log2_sum;    // likewise
  int32_t *coarse;    // [batch, head, padded / 64]: whether there are such rows; NULL: nobody asks
  float *slope_part;  // [batch, head, column of keys, 8 warps]: what they give to the slope, or NULL
  // Counters and notes, all 0 at first.
  int32_t *zeroed;
  int64_t zeroed_count;
  int32_t *next_job;   // of each launch that takes jobs, and of its careful one; the third: of the bias's gradient
  int32_t *flagged;    // whether anything is
  int32_t *bad_key;    // [batch, key head, column]; two a column where heads are wider than 128
  int32_t *bad_query;  // as chunks of dq; [batch, head, row of tiles] where heads are wider than 128
  int32_t *turn;       // likewise: how many have added
  int32_t *part_turn;  // as part_sums: how many of its jobs have added
} hopper_backward_call;

// Whether what is not finite may have met a pair that is masked: else the careful launches have nothing to mend.
static inline bool hopper_backward_leaks(const hopper_backward_call &c) {
  return c.plan.partial || c.scores.bias.data;
}

// Row statistics lie so that the four rows of which a thread has accumulators in two neighbouring groups of eight are
// one load of 16 bytes.
static __device__ __forceinline__ int hopper_backward_slot(int row) {
  return (row & ~15) | (row % 8 / 2) * 4 | (row / 8 & 1) * 2 | (row & 1);
}

// Products of D[64][N], unrolled, none waits. Operands in shared memory that are K-major lie in panels PANEL_A, PANEL_B
// bytes apart.
template <class T, int STEPS, uint32_t PANEL_A, uint32_t PANEL_B, int N>
static __device__ __forceinline__ void hopper_product_rows_rows(float (&d)[N], uint32_t a, uint32_t b) {
  wgmma_first<T, 0, 0>(d, a, b);
#pragma unroll
  for (int k = 1; k < STEPS; k++) {
    wgmma<T, 0, 0>(d, a + ((k / 4 * PANEL_A + k % 4 * 32) >> 4), b + ((k / 4 * PANEL_B + k % 4 * 32) >> 4));
  }
}

// D += A B: A in registers, B MN-major.
template <class T, int STEPS, int N>
static __device__ __forceinline__ void hopper_product_registers(float (&d)[N], const uint32_t *a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < STEPS; k++) wgmma_rows<T, 1>(d, a + 4 * k, b + (k * 2048 >> 4));
}

// D += A B: A K-major, B MN-major.
template <class T, int STEPS, uint32_t PANEL_A, int N>
static __device__ __forceinline__ void hopper_product_rows_columns(float (&d)[N], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
    wgmma<T, 0, 1>(d, a + ((k / 4 * PANEL_A + k % 4 * 32) >> 4), b + (k * 2048 >> 4));
  }
}

// D = A B: both MN-major.
template <class T, int STEPS, int N>
static __device__ __forceinline__ void hopper_product_columns_columns(float (&d)[N], uint32_t a, uint32_t b) {
  wgmma_first<T, 1, 1>(d, a, b);
#pragma unroll
  for (int k = 1; k < STEPS; k++) wgmma<T, 1, 1>(d, a + (k * 2048 >> 4), b + (k * 2048 >> 4));
}

// The halves of a pair as floats.
template <class T>
static __device__ __forceinline__ float hopper_low(uint32_t pair) {
  if constexpr (std::is_same<T, __half>::value) {
    return __half2float(__ushort_as_half((unsigned short)pair));
  } else {
    return __uint_as_float(pair << 16);
  }
}

template <class T>
static __device__ __forceinline__ float hopper_high(uint32_t pair) {
  if constexpr (std::is_same<T, __half>::value) {
    return __half2float(__ushort_as_half((unsigned short)(pair >> 16)));
  } else {
    return __uint_as_float(pair & 0xffff0000u);
  }
}

template <class T>
static __device__ __forceinline__ bool hopper_nonfinite(uint32_t half) {
  const uint32_t exponent = std::is_same<T, __half>::value ? 0x7c00 : 0x7f80;
  return (half & exponent) == exponent;
}

// The pair with 0 for what is not finite.
template <class T>
static __device__ __forceinline__ uint32_t hopper_cleaned(uint32_t pair) {
  return (hopper_nonfinite<T>(pair) ? 0 : pair & 0xffffu) | (hopper_nonfinite<T>(pair >> 16) ? 0 : pair & 0xffff0000u);
}

static __device__ __forceinline__ int hopper_warp_sum(int x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

static __device__ __forceinline__ float hopper_warp_sum_f(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

template <class T>
static __device__ __forceinline__ T *hopper_rows(const sa_operand &x, int batch, int head) {
  return (T *)x.data + batch * x.stride[0] + head * x.stride[1];
}

// Sums of a gradient, as halves, to panels in shared memory `panel` bytes apart; `to` is this lane's row of the first,
// as store_matrices wants it, and `piece` its swizzled first piece. Returns what note_nonfinite saw.
template <class T, int N>
static __device__ __forceinline__ uint32_t hopper_store_halves(const float (&x)[N], float factor, uint32_t to,
                                                               uint32_t piece, uint32_t panel) {
  uint32_t seen = 0;
#pragma unroll
  for (int k = 0; k < N / 8; k++) {
    uint32_t halves[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      halves[i] = pack_halves<T>(x[8 * k + 2 * i] * factor, x[8 * k + 2 * i + 1] * factor);
      seen = note_nonfinite<T>(seen, halves[i]);
    }
    store_matrices(to + k / 4 * panel + (piece ^ (k % 4 * 32)), halves);
  }
  return seen;
}

// A row of panels PANEL_ROWS rows high, from `from` to `to`, with 0 for what is not finite; whether there was any.
template <class T, int PANELS, int PANEL_ROWS>
static __device__ __forceinline__ bool hopper_clean_row(uint32_t from, uint32_t to, int row) {
  bool bad = false;
  for (int panel = 0; panel < PANELS; panel++) {
    for (int piece = 0; piece < 8; piece++) {
      const uint32_t at = (panel * PANEL_ROWS + row) * 128 + piece * 16;
      const int4 x = shared_load_4i(from + at);
      const int4 y =
          make_int4(hopper_cleaned<T>(x.x), hopper_cleaned<T>(x.y), hopper_cleaned<T>(x.z), hopper_cleaned<T>(x.w));
      bad |= x.x != y.x || x.y != y.y || x.z != y.z || x.w != y.w;
      shared_store_4i(to + at, y.x, y.y, y.z, y.w);
    }
  }
  return bad;
}

// Adds the products of a thread's two rows of sums with the elements of a row of Q, dO or K that are not finite.
// `source` is at the column of d[0], of which `columns` are left.
template <class T, int N>
static __device__ __forceinline__ void hopper_add_nonfinite(float (&d)[N], const T *source, int columns, float weight0,
                                                            float weight1, bool visible0, bool visible1) {
#pragma unroll
  for (int n = 0; n < N / 4; n++) {
    if (8 * n >= columns) continue;
    const uint32_t pair = *(const uint32_t *)(source + 8 * n);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t half = pair >> 16 * i & 0xffff;
      if (!hopper_nonfinite<T>(half)) continue;
      const float x = hopper_low<T>(half);
      if (visible0) d[4 * n + i] += weight0 * x;
      if (visible1) d[4 * n + 2 + i] += weight1 * x;
    }
  }
}

template <class T>
static __device__ __forceinline__ float hopper_backward_sink(const hopper_backward_call &c, int head) {
  const int64_t at = head * c.sinks.stride[1];
  return c.sinks.dtype == SA_F32 ? ((const float *)c.sinks.data)[at]
                                 : hopper_low<T>(((const uint16_t *)c.sinks.data)[at]);
}

// A sink's share of a row that sees keys. The LSE is off by up to 2^-21 of itself, so a sink that near has all of it: a
// huge one would have got 0, or Inf.
static __device__ __forceinline__ float hopper_backward_share(float sink, float lse) {
  const float above = sink - lse;
  return fabsf(above) <= fabsf(lse) * 0x1p-21f ? 1.f : expf(above);
}

// Whether the rows of a tile see no key.
static __device__ __forceinline__ bool hopper_backward_no_key(const hopper_backward_call &c, int batch, int head,
                                                              int row) {
  const int64_t *start = c.plan.row_start + sa_device_plane(c.plan, batch, head) * c.plan.row_tiles + row / SA_TILE;
  return start[0] == start[1];
}

// The rows of Q, 64 a block: their statistics, and the zeros that the launches after this one count on. The sums of dQ
// are zeroed where they are added to in any order; in order, dQ of rows to which nobody adds.
template <class T, int WIDTH>
__global__ void __launch_bounds__(HOPPER_BACKWARD_ROWS_THREADS)
    hopper_backward_rows(const __grid_constant__ hopper_backward_call c) {
  enum { LANES = WIDTH / 8, AT_ONCE = HOPPER_BACKWARD_ROWS_THREADS / LANES, ROUNDS = 64 / AT_ONCE };
  static_assert(ROUNDS * 4 == LANES, "a row for every fourth lane");
  __shared__ float part[HOPPER_BACKWARD_ROWS_THREADS / 32];
  dependents_launch();
  // From the last head to the first, whose rows are then in the cache when the next launch begins with them.
  const int block = gridDim.x - 1 - blockIdx.x;
  const int blocks = c.padded / 64, flat = block / blocks, first = block % blocks * 64;
  const int batch = flat / c.heads, head = flat % c.heads, lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
#pragma unroll 1
  for (int64_t n = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; n < c.zeroed_count;
       n += (int64_t)gridDim.x * blockDim.x) {
    c.zeroed[n] = 0;
  }
  const int rows = c.queries - first;  // of the tensor that are left, at times none
  uint64_t dead = ~(uint64_t)0;
  if (rows > 0) dead = c.plan.dead_rows[sa_device_plane(c.plan, batch, head) * ((c.queries + 63) / 64) + first / 64];
  if (rows > 0 && rows < 64) dead |= ~(uint64_t)0 << rows;
  dead >>= group;  // bit n AT_ONCE: of this thread's row of round n
  if (c.dead.data) {
    const bool *flags = hopper_rows<const bool>(c.dead, batch, head) + (first + group) * c.dead.stride[2];
#pragma unroll
    for (int n = 0; n < ROUNDS; n++) {
      if (n * AT_ONCE + group < rows && flags[n * AT_ONCE * c.dead.stride[2]]) dead |= (uint64_t)1 << n * AT_ONCE;
    }
  }
  const T *out = hopper_rows<T>(c.out, batch, head) + (first + group) * c.out.stride[2] + lane * 8;
  const T *dout = hopper_rows<T>(c.dout_values, batch, head) + (first + group) * c.dout_values.stride[2] + lane * 8;
  uint4 x[ROUNDS], y[ROUNDS];
#pragma unroll
  for (int n = 0; n < ROUNDS; n++) {
    x[n] = y[n] = make_uint4(0, 0, 0, 0);
    if (dead >> n * AT_ONCE & 1 || lane * 8 >= c.value_width) continue;
    x[n] = __ldcs((const uint4 *)(out + n * AT_ONCE * c.out.stride[2]));  // nobody else needs it in the cache
    y[n] = *(const uint4 *)(dout + n * AT_ONCE * c.dout_values.stride[2]);
  }
  // What is below is asked for while those are on their way. Every fourth lane ends with the sum of one of the rows.
  const int in_block = lane / 4 * AT_ONCE + group, row = first + in_block;
  const bool has_row = lane % 4 == 0, beyond = in_block >= rows;
  float lse = 0, dlse = 0;
  if (has_row && !beyond) {
    lse = ((const float *)c.lse.data)[batch * c.lse.stride[0] + head * c.lse.stride[1] + row * c.lse.stride[2]];
    if (c.dlse.data) {
      dlse = ((const float *)c.dlse.data)[batch * c.dlse.stride[0] + head * c.dlse.stride[1] + row * c.dlse.stride[2]];
    }
  }
  if (!c.deterministic) {
    float4 *sums = (float4 *)(c.dq + (int64_t)block * 64 * WIDTH);
#pragma unroll 1
    for (int n = threadIdx.x; n < 64 * WIDTH / 4; n += HOPPER_BACKWARD_ROWS_THREADS) sums[n] = make_float4(0, 0, 0, 0);
  } else if (c.dq_out.data && hopper_backward_no_key(c, batch, head, first)) {
    T *dq = hopper_rows<T>(c.dq_out, batch, head) + first * c.dq_out.stride[2] + lane * 8;
#pragma unroll 1
    for (int n = group; n < min(64, rows); n += AT_ONCE) {
      if (lane * 8 < c.width) *(uint4 *)(dq + n * c.dq_out.stride[2]) = make_uint4(0, 0, 0, 0);
    }
  }
  float sum[ROUNDS];
#pragma unroll
  for (int n = 0; n < ROUNDS; n++) {
    const uint32_t *a = (const uint32_t *)&x[n], *b = (const uint32_t *)&y[n];
    sum[n] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      sum[n] = fmaf(hopper_low<T>(a[i]), hopper_low<T>(b[i]), fmaf(hopper_high<T>(a[i]), hopper_high<T>(b[i]), sum[n]));
    }
  }
  // Half of the lanes give away the first half of the rows, the others the second, and so on until each has one.
#pragma unroll
  for (int half = ROUNDS / 2, lanes = LANES / 2; half > 0; half /= 2, lanes /= 2) {
#pragma unroll
    for (int n = 0; n < half; n++) {
      const float lower = sum[n], upper = sum[n + half];
      sum[n] = (lane & lanes ? upper : lower) + __shfl_xor_sync(~0u, lane & lanes ? lower : upper, lanes);
    }
  }
#pragma unroll
  for (int lanes = 2; lanes > 0; lanes /= 2) sum[0] += __shfl_xor_sync(~0u, sum[0], lanes);
  float sink_sum = 0;
  int coarse = 0;
  if (has_row) {
    const bool is_dead = dead >> lane / 4 * AT_ONCE & 1;
    const float delta = sum[0] - dlse;  // of a dead row nothing was read
    const float scaled = lse * c.lse_unit;
    coarse = !is_dead && fabsf(scaled) > HOPPER_BACKWARD_COARSE;
    const bool again = c.coarse && coarse && fabsf(scaled) < INFINITY;  // by hopper_backward_bases
    if (c.sink_part && !beyond && !again) {
      // A dead row is all sink, if there is one.
      const float sink = hopper_backward_sink<T>(c, head);
      const float share = !is_dead ? hopper_backward_share(sink, lse) : sink == -INFINITY ? 0.f : 1.f;
      sink_sum = -share * delta;
    }
    const int64_t at = (int64_t)flat * c.padded + hopper_backward_slot(row);
    // Visible scores that are all -inf are NaN; a dead row has no pair that is not masked, this only keeps it tidy.
    c.lse_log2[at] = is_dead ? -INFINITY : lse == -INFINITY ? NAN : -scaled;
    c.delta[at] = is_dead ? 0.f : delta;
    if (c.log2_sum) c.log2_sum[at] = 0;
  }
  if (c.coarse) {
    coarse = __syncthreads_or(coarse);
    if (threadIdx.x == 0) c.coarse[block] = coarse;
  }
  if (!c.sink_part) return;
  sink_sum = hopper_warp_sum_f(sink_sum);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sink_sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int n = 1; n < HOPPER_BACKWARD_ROWS_THREADS / 32; n++) sink_sum += part[n];
  c.sink_part[block] = sink_sum;
}

// A head a block: the sum of what its rows gave the sink.
template <class T>
__global__ void __launch_bounds__(32) hopper_backward_sinks(const __grid_constant__ hopper_backward_call c) {
  const int head = blockIdx.x, blocks = c.padded / 64;
  float sum = 0;
  for (int64_t n = threadIdx.x; n < (int64_t)c.batch * blocks; n += 32) {
    sum += c.sink_part[(n / blocks * c.heads + head) * blocks + n % blocks];
  }
  sum = hopper_warp_sum_f(sum);
  if (threadIdx.x > 0) return;
  if (c.dsinks.dtype == SA_F32) {
    ((float *)c.dsinks.data)[head * c.dsinks.stride[1]] = sum;
  } else {
    ((uint16_t *)c.dsinks.data)[head * c.dsinks.stride[1]] = (uint16_t)pack_halves<T>(sum, 0.f);
  }
}

#endif
