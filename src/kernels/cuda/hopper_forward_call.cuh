// what the forward on Hopper is launched with, and what the warps of a block share
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_CALL_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_CALL_CUH
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/hopper_block.cuh"
#include "kernels/cuda/hopper_scores.cuh"
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/ptx_hopper.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum {
  FORWARD_WARPGROUP = 128,
  FORWARD_CONSUMERS = 2,  // warpgroups of 64 queries
  FORWARD_THREADS = FORWARD_WARPGROUP * (1 + FORWARD_CONSUMERS),
  FORWARD_DONE_THREADS = FORWARD_CONSUMERS * FORWARD_WARPGROUP + 64,  // that agree on the end of the stream
  FORWARD_STAGES = 2,
  // Items on their way through a block at once. The next is found after this one is begun, which needs the buffer of Q
  // of the third before it; the one before that has then been written, so six would do.
  FORWARD_ITEMS = 8,
  FORWARD_NEVER = INT32_MAX,
  // So many items from the first that is not finite on may have begun before all warps knew.
  FORWARD_UNAWARE = 4,
  // So many launches a block begins wary after one in which its items jumped: such a workload jumps call after call,
  // and to find out takes a block its first item.
  FORWARD_WARY_LAUNCHES = 8,
  FORWARD_MEMORIES = 1024,  // of blocks
  FORWARD_GROUPS = 256,     // of heads, that are put in order
  // A block takes its next item when so many steps of the one at hand are left to load: soon enough to look it up, but
  // not so soon that a block has an item waiting for it that others are free for.
  FORWARD_AHEAD = 2,
  // Named barriers.
  FORWARD_CLEANED = 1,
  FORWARD_ALL_DONE = 2,
  FORWARD_TURNS = 3,  // and 4: a warpgroup's turn
  // Of a step.
  FORWARD_PARTIAL = 1,
  FORWARD_LAST = 2,
  FORWARD_SECOND_HALF = 4
};

// A thread's part of the sum of a step that makes it raise the row's maximum.
#define FORWARD_GROW 1024.f
// Above its maximum by less than this (log2), a score overflows neither by itself nor in a sum.
#define FORWARD_JUMP 100.f
// A thread's scores of a step, this far above the row's maximum, still have a finite sum.
#define FORWARD_NEAR 122.f

// What a kernel can do beyond the scale, as the template argument EXTRAS of forward_shape.
enum {
  FORWARD_SOFTCAP = 1,  // alone: up to HOPPER_SOFTCAP
  FORWARD_ALIBI = 2,
  FORWARD_DROPOUT = 4,
  FORWARD_HALF_BIAS = 8,  // alone: of q's dtype, by TMA
  FORWARD_FLOAT_BIAS = 16,
  FORWARD_BIAS = FORWARD_HALF_BIAS | FORWARD_FLOAT_BIAS,
  FORWARD_ANY = 31
};

// A launch. Steps along a dim of K, V or Q that is broadcast are 0, else 1 (tensor_map.cuh).
typedef struct forward_call {
  CUtensorMap q, k, v, o;  // o in boxes of a warp's rows
  sa_device_plan plan;
  sa_operand values, out, lse, dead, sinks;
  int32_t heads, key_heads, queries, keys, value_width;
  int32_t q_batch_step, q_head_step, k_batch_step, k_head_step, v_batch_step, v_head_step, o_batch_step, o_head_step;
  float scale_log2;  // scale * log2(e), > 0
  // Work item w is of group w / group_items; a group is group_heads neighbouring heads of [batch, head].
  int32_t items, group_items, group_heads, ordered;
  int32_t *counter;       // two, zero before and after every launch
  int32_t *flagged_next;  // [items]: the list of a block's items to be done carefully
  uint16_t group_order[FORWARD_GROUPS];
  // Extras. Where all batches have one bias, those of a head are neighbours in place of the heads of a batch: then
  // `batches` is their number, else 0.
  hopper_scores scores;
  int32_t batches;
  CUtensorMap bias;  // of halves; the steps along its dims are 0 where it is broadcast
  int32_t bias_batch_step, bias_head_step, bias_row_step;
} forward_call;

template <class T, int WIDTH, int VALUE_WIDTH, int EXTRAS = 0>
struct forward_shape {
  using type = T;
  static constexpr int width = WIDTH, value_width = VALUE_WIDTH;
  static constexpr int extras = EXTRAS;
  // Whether the bias of a step is brought to shared memory, for which Q gives up a slot.
  static constexpr bool stages_bias = EXTRAS == FORWARD_HALF_BIAS;
  static constexpr int blocks = WIDTH <= 64 && VALUE_WIDTH <= 64 && !EXTRAS ? 2 : 1;  // of a multiprocessor
  // 128 * 40 + 256 * 232 are the 384 * 168 registers that a block is launched with, 128 * 32 + 256 * 104 the 384 * 80
  // of one of two.
  static constexpr int producer_registers = blocks == 1 ? 40 : 32, consumer_registers = blocks == 1 ? 232 : 104;
  // A step. With 128 keys there are no registers for a bias.
  static constexpr int keys = WIDTH <= 128 && (!(EXTRAS & FORWARD_BIAS) || stages_bias) ? 128 : 64;
  static constexpr int steps = SA_TILE / keys;  // a tile
  static constexpr int parts = blocks;          // of a step, multiplied one after the other
  static constexpr int q_slots = WIDTH <= 192 && !(stages_bias && WIDTH > 64) && blocks == 1 ? 2 : 1;
  static constexpr int panels = (WIDTH + SA_PANEL - 1) / SA_PANEL;
  static constexpr int value_panels = (VALUE_WIDTH + SA_PANEL - 1) / SA_PANEL;
  // O leaves by TMA: its warps wait for one panel to be read, of more too long. Where two blocks share a multiprocessor
  // it gains nothing, and extras leave no registers for it.
  static constexpr bool sends_output = blocks == 1 && value_panels <= 2 && !EXTRAS;
  // The same have registers to keep in mind that scores jumped.
  static constexpr bool remembers = sends_output;
  // Registers do not suffice for P twice: P is packed once the product of the step before is done.
  static constexpr bool packs_late = VALUE_WIDTH > 192 || blocks > 1;
  static constexpr int panel_bytes = keys * SA_PANEL * 2, q_panel_bytes = SA_TILE * SA_PANEL * 2;
};

// Words of a row's record (plan.cuh): those that an item begins with, and its runs.
enum { FORWARD_RECORDED = offsetof(sa_device_row, run) / 4, FORWARD_RECORD = offsetof(sa_device_row, unused) / 4 };

// An item on its way through the block. What it begins with is the record of its row of tiles but for the runs.
typedef struct forward_item {
  int32_t tile, runs, tiles, first_run;
  int64_t first;
  uint16_t dead[SA_TILE / 16];
  int32_t work;  // -1: the end of the stream
  int32_t batch, head, key_head;
  void *out;  // the first row of its head, as of the others
  float *lse;
  uint8_t *dead_rows;
  float sink;   // in units of the scores, -inf when there are none
  float slope;  // of ALiBi
} forward_item;

// The bias of a step: panels of 64 keys.
template <class SHAPE, bool STAGED = SHAPE::stages_bias>
struct forward_bias {};
template <class SHAPE>
struct forward_bias<SHAPE, true> {
  alignas(1024) uint8_t bias[SHAPE::keys / SA_PANEL][SHAPE::q_panel_bytes];
  alignas(8) uint64_t bias_full, bias_empty;
};

template <class SHAPE>
struct forward_shared : forward_bias<SHAPE> {
  alignas(1024) uint8_t q[SHAPE::q_slots][SHAPE::panels][SHAPE::q_panel_bytes];
  alignas(1024) uint8_t k[FORWARD_STAGES][SHAPE::panels][SHAPE::panel_bytes];
  alignas(1024) uint8_t v[FORWARD_STAGES][SHAPE::value_panels][SHAPE::panel_bytes];
  alignas(1024) uint8_t out[FORWARD_CONSUMERS * 4][16 * SA_PANEL * 2];  // a warp's rows of O on their way out
  alignas(16) uint2 bits[FORWARD_STAGES][256];
  forward_item item[FORWARD_ITEMS];
  sa_run runs[2][32];                                 // the first of an item
  int32_t step[FORWARD_STAGES], key[FORWARD_STAGES];  // of which kind, and its first key
  int32_t wary;                            // the number of the first item that was not finite, or FORWARD_NEVER
  int32_t again[FORWARD_ITEMS];            // 1 + an item that the stream takes again, or 0
  int32_t flagged;                         // the first of the items to be done carefully, or -1
  int32_t flagged_number[FORWARD_ITEMS];   // 1 + the number of the newest flagged item among those of this slot
  uint32_t poisoned[2][SHAPE::keys / 32];  // keys of a step whose V was not finite
  alignas(8) uint64_t q_full[SHAPE::q_slots], q_empty[SHAPE::q_slots];
  uint64_t k_full[FORWARD_STAGES], k_empty[FORWARD_STAGES], v_full[FORWARD_STAGES], v_empty[FORWARD_STAGES];
  alignas(16) uint32_t zeros[SHAPE::value_width / 2];  // a row of a tile that sees no key
  uint64_t found, asked;  // an item by the warp that finds them, for one by the warp that loads
};

static __device__ __forceinline__ float forward_minus_infinity() {
  return __int_as_float(0xff800000);
}

static __device__ __forceinline__ float forward_quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

static __device__ __forceinline__ float forward_quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

static __device__ __forceinline__ int64_t forward_plane_rows(const forward_call &c, int batch, int head) {
  return sa_device_plane(c.plan, batch, head) * c.plan.row_tiles;
}

// The logit of a head's sink, in units of log2 unless others are asked for; -inf when there are no sinks.
static __device__ __forceinline__ float forward_sink(const sa_operand &sinks, int head, float unit = 1.44269504f) {
  if (!sinks.data) return forward_minus_infinity();
  const int64_t at = head * sinks.stride[1];
  float x;
  if (sinks.dtype == SA_F32) {
    x = ((const float *)sinks.data)[at];
  } else if (sinks.dtype == SA_BF16) {
    x = __bfloat162float(((const __nv_bfloat16 *)sinks.data)[at]);
  } else {
    x = __half2float(((const __half *)sinks.data)[at]);
  }
  return x * unit;
}

// The first row of a tile, in elements of `x`.
static __device__ __forceinline__ int64_t forward_offset(const sa_operand &x, int batch, int head, int tile) {
  return batch * x.stride[0] + head * x.stride[1] + (int64_t)tile * SA_TILE * x.stride[2];
}

#endif
