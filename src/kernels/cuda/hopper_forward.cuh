// forward attention on Hopper: TMA, wgmma and warp specialisation over the visible tiles of the plan
//
// A block per multiprocessor stays for the whole launch. Its work items are rows of tiles, 128 queries of one head,
// taken from one counter, those with most tiles first among heads whose K and V fit the second-level cache together.
// A step is KEYS keys of an item.
//
//   warpgroup 0     gives its registers away. Warp 0 loads: Q of an item, K, V and bits of its steps, in one stream
//                   across the items. Warp 1 finds the next item and its runs of tiles meanwhile. The other warps write
//                   the rows of tiles that see no key.
//   warpgroup 1, 2  64 queries each. S = Q K^T of a step is issued together with O += P V of the step before, whose P
//                   is in registers; the softmax of S runs under that product. The step that begins an item carries
//                   the last product of the item before, which leaves through shared memory under the other
//                   warpgroup's products.
//
//   widths      KEYS  Q slots, stages  registers: O, S, P twice  shared memory
//   64, 64      128   2, 2             32, 64, 64                117 KiB
//   96, 96      128   2, 2             48, 64, 64                213 KiB
//   128, 128    128   2, 2             64, 64, 64                213 KiB
//   192, 128    64    2, 2             64, 32, 32                197 KiB
//   192, 192    64    2, 2             96, 32, 32                213 KiB
//   256, 256    64    1, 2             128, 32 (P once: 16)      213 KiB, two registers spilled around an item's end
//
// Bias, softcap, ALiBi and dropout (hopper_scores.cuh) are kernels of their own, for widths of 64 and 128: one for each
// alone and one for all of them, since branches around code that is not run cost more than the code. With a bias, steps
// have 64 keys and the registers that frees hold the bias of a step: it is read straight into the places of the
// accumulators while the product is made; a bias of halves comes by TMA instead, 128 keys at once. Dropout draws its
// bits under the products too.
//
// The row maximum is only a guard against overflow: any m within 2^127 of the scores gives the same result up to
// rounding. It is taken from the first step in which a row sees a key and then kept; the sum of a step, needed anyway,
// tells when it has become too small (GROW), and then P, the sum and O are divided by a power of two. What a row gets
// depends on its own visible scores alone, not on the other rows of its warp.
//
// An item whose output is not finite is noted and done again by its block when all else is done, carefully: the same
// products in the same order, but with the elements of V that are not finite replaced by 0 and then added to the rows
// that see them, and with the maximum raised where the kept one would overflow. So rows that see nothing of the kind
// get the very bits of a clean run, and clean inputs pay for one test of O. A bias of -inf masks by itself as long as
// the product is finite; what a product that is not leaves behind ends in the careful path, too, where it is selected.
// A row is dead when it has no maximum at its end and saw no key while it had none: `alive`.
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_CUH
#include "kernels/cuda/device.cuh"
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
  // 128 * 40 + 256 * 232 are the 384 * 168 registers that a block is launched with.
  FORWARD_PRODUCER_REGISTERS = 40,
  FORWARD_CONSUMER_REGISTERS = 232,
  // Items on their way through a block at once. The next is found once this one is begun, which needs the buffer of Q
  // of the third before it; the one before that has then been written, so six would do.
  FORWARD_ITEMS = 8,
  FORWARD_GROUPS = 256,  // of heads, that are put in order
  // Named barriers.
  FORWARD_CLEANED = 1,
  FORWARD_ALL_DONE = 2,
  // Of a step.
  FORWARD_PARTIAL = 1,
  FORWARD_LAST = 2,
  FORWARD_SECOND_HALF = 4
};

// A thread's part of the sum of a step that makes it raise the row's maximum.
#define FORWARD_GROW 1024.f
// Above its maximum by less than this (log2), a score overflows neither by itself nor in a sum.
#define FORWARD_JUMP 100.f

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
  CUtensorMap q, k, v;
  sa_device_plan plan;
  sa_operand values, out, lse, dead, sinks;
  int32_t heads, key_heads, queries, keys, value_width;
  int32_t q_batch_step, q_head_step, k_batch_step, k_head_step, v_batch_step, v_head_step;
  float scale_log2;  // scale * log2(e), > 0
  // Work item w is of group w / group_items; a group is group_heads neighbouring heads of [batch, head].
  int32_t items, group_items, group_heads, ordered;
  int32_t *counter;       // two, zero before and after every launch
  int32_t *flagged_next;  // [items]: the list of a block's items to be done again
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
  // A step. With 128 keys there are no registers for a bias.
  static constexpr int keys = WIDTH <= 128 && (!(EXTRAS & FORWARD_BIAS) || stages_bias) ? 128 : 64;
  static constexpr int steps = SA_TILE / keys;  // a tile
  static constexpr int q_slots = WIDTH <= 192 && !(stages_bias && WIDTH > 64) ? 2 : 1;
  static constexpr int panels = (WIDTH + SA_PANEL - 1) / SA_PANEL;
  static constexpr int value_panels = (VALUE_WIDTH + SA_PANEL - 1) / SA_PANEL;
  // Registers do not suffice for P twice: P is packed once the product of the step before is done.
  static constexpr bool packs_late = VALUE_WIDTH > 192;
  static constexpr int panel_bytes = keys * SA_PANEL * 2, q_panel_bytes = SA_TILE * SA_PANEL * 2;
};

// An item on its way through the block.
typedef struct forward_item {
  int32_t work;  // -1: the end of the stream
  int32_t batch, head, key_head, tile;
  int32_t count;  // of runs
  const sa_run *runs;
  void *out;  // its first row
  float *lse;
  uint8_t *dead_rows;
  float sink;                   // in units of the scores, -inf when there are none
  uint16_t dead[SA_TILE / 16];  // a bit a query that sees no key or lies beyond the last
  float slope;                  // of ALiBi
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
  int32_t flagged;                                    // the first of the items to be done again, or -1
  int32_t flagged_number[FORWARD_ITEMS];   // 1 + the number of the newest flagged item among those of this slot
  uint32_t poisoned[2][SHAPE::keys / 32];  // keys of a step whose V was not finite
  alignas(8) uint64_t q_full[SHAPE::q_slots], q_empty[SHAPE::q_slots];
  uint64_t k_full[FORWARD_STAGES], k_empty[FORWARD_STAGES], v_full[FORWARD_STAGES], v_empty[FORWARD_STAGES];
  uint64_t found, begun;  // an item: by the warp that finds them, by the one that loads
};

// A place in a ring of buffers, and the parity of its mbarriers' phase.
template <int SIZE>
struct forward_ring {
  int at = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++at == SIZE) at = 0, parity ^= 1;
  }
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

// The warp that takes work items from the counter and looks them up, one ahead of the warp that loads.
template <class SHAPE>
struct forward_finder {
  const forward_call &c;
  forward_shared<SHAPE> &shared;
  const int lane = threadIdx.x % 32;
  int number = 0;  // of items found

  __device__ __forceinline__ forward_finder(const forward_call &call, forward_shared<SHAPE> &memory)
      : c(call), shared(memory) {}

  // A bit for each of 16 queries from `row` on that sees no key, or is none.
  __device__ __forceinline__ uint16_t dead_rows(int batch, int head, int row) {
    if (row >= c.queries) return 0xffff;
    const int64_t words = (c.queries + 63) / 64;
    const uint64_t word = __ldg(c.plan.dead_rows + sa_device_plane(c.plan, batch, head) * words + row / 64);
    const uint32_t beyond = c.queries - row < 16 ? 0xffffu << (c.queries - row) : 0;
    return (uint16_t)(word >> row % 64 | beyond);
  }

  // Makes work item `work` the next of the stream, unless it sees no key.
  __device__ __forceinline__ bool publish(int work) {
    const uint32_t turn = (uint32_t)work / (uint32_t)c.group_items, i = work - turn * c.group_items;
    const uint32_t rank = i / (uint32_t)c.group_heads;
    const uint32_t flat = (c.ordered ? c.group_order[turn] : turn) * c.group_heads + (i - rank * c.group_heads);
    int batch = flat / (uint32_t)c.heads, head = flat - batch * c.heads;
    if (SHAPE::extras & FORWARD_BIAS && c.batches) head = flat / (uint32_t)c.batches, batch = flat - head * c.batches;
    const int64_t rows = forward_plane_rows(c, batch, head);
    const int tile = __ldg(c.plan.row_order + rows + rank);
    const int64_t first = __ldg(c.plan.row_start + rows + tile);
    const int count = (int)(__ldg(c.plan.row_start + rows + tile + 1) - first);
    if (count == 0) return false;
    forward_item &item = shared.item[number % FORWARD_ITEMS];
    const sa_run *runs = c.plan.row_runs + first;
    if (lane < count) shared.runs[number % 2][lane] = runs[lane];
    if (lane < SA_TILE / 16) item.dead[lane] = dead_rows(batch, head, tile * SA_TILE + lane * 16);
    if (lane == 0) {
      item.work = work;
      item.batch = batch;
      item.head = head;
      item.key_head = head / (c.heads / c.key_heads);
      item.tile = tile;
      item.count = count;
      item.runs = runs;
      item.out = (uint16_t *)c.out.data + forward_offset(c.out, batch, head, tile);
      item.lse = c.lse.data ? (float *)c.lse.data + forward_offset(c.lse, batch, head, tile) : NULL;
      item.dead_rows = c.dead.data ? (uint8_t *)c.dead.data + forward_offset(c.dead, batch, head, tile) : NULL;
      if (SHAPE::extras & FORWARD_ALIBI) item.slope = hopper_slope(c.scores, head);
      item.sink = SHAPE::extras ? forward_sink(c.sinks, head, c.scores.base) : forward_sink(c.sinks, head);
    }
    hand_over();
    return true;
  }

  __device__ __forceinline__ void publish_end() {
    if (lane == 0) shared.item[number % FORWARD_ITEMS].work = -1;
    hand_over();
  }

  __device__ __forceinline__ void hand_over() {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared.found));
    mbarrier_wait(shared_address(&shared.begun), number & 1);
    number++;
  }

  // Items that see no key are the last of their group, or nearly so: they are passed over one by one.
  __device__ __forceinline__ void run() {
    for (int work = blockIdx.x; work < c.items;) {
      publish(work);
      int fetched = 0;
      if (lane == 0) fetched = atomicAdd(c.counter, 1) + (int)gridDim.x;
      work = __shfl_sync(~0u, fetched, 0);
    }
    publish_end();
    // The last block out leaves the counters as it found them.
    if (lane == 0) {
      __threadfence();
      if (atomicAdd(c.counter + 1, 1) == (int)gridDim.x - 1) c.counter[0] = c.counter[1] = 0;
    }
    named_barrier_sync(FORWARD_ALL_DONE, FORWARD_DONE_THREADS);
    if (shared.flagged < 0) return;
    for (int work = shared.flagged; work >= 0; work = c.flagged_next[work]) publish(work);
    publish_end();
  }
};

// The warp that loads.
template <class SHAPE>
struct forward_loader {
  const forward_call &c;
  forward_shared<SHAPE> &shared;
  const int lane = threadIdx.x % 32;
  forward_ring<SHAPE::q_slots> q;
  forward_ring<FORWARD_STAGES> k, v;
  forward_ring<1> bias;
  int number = 0;  // of items sent

  __device__ __forceinline__ forward_loader(const forward_call &call, forward_shared<SHAPE> &memory)
      : c(call), shared(memory) {}

  // The item at hand.
  __device__ __forceinline__ const forward_item &item() { return shared.item[number % FORWARD_ITEMS]; }

  __device__ __forceinline__ void send_query() {
    mbarrier_wait(shared_address(&shared.q_empty[q.at]), q.parity ^ 1);
    if (lane == 0) {
      const uint32_t barrier = shared_address(&shared.q_full[q.at]);
      const uint64_t policy = cache_policy_first_out();
      mbarrier_arrive_expect(barrier, SHAPE::panels * SHAPE::q_panel_bytes);
#pragma unroll
      for (int panel = 0; panel < SHAPE::panels; panel++) {
        tma_load(shared_address(shared.q[q.at][panel]), &c.q, panel * SA_PANEL, item().tile * SA_TILE,
                 item().head * c.q_head_step, item().batch * c.q_batch_step, barrier, policy);
      }
    }
    __syncwarp();
    q.next();
  }

  __device__ __forceinline__ void send_keys(int key, int pattern, int step) {
    mbarrier_wait(shared_address(&shared.k_empty[k.at]), k.parity ^ 1);
    if (lane == 0) {
      const uint32_t barrier = shared_address(&shared.k_full[k.at]);
      const uint64_t policy = cache_policy_last_out();
      shared.step[k.at] = step;
      shared.key[k.at] = key;
      mbarrier_arrive_expect(barrier,
                             SHAPE::panels * SHAPE::panel_bytes + (pattern >= 0 ? (int)sizeof shared.bits[0] : 0));
#pragma unroll
      for (int panel = 0; panel < SHAPE::panels; panel++) {
        tma_load(shared_address(shared.k[k.at][panel]), &c.k, panel * SA_PANEL, key, item().key_head * c.k_head_step,
                 item().batch * c.k_batch_step, barrier, policy);
      }
      if (pattern >= 0) {
        bulk_load(shared_address(shared.bits[k.at]), c.plan.row_bits + (int64_t)pattern * 256, sizeof shared.bits[0],
                  barrier);
      }
    }
    __syncwarp();
    k.next();
  }

  // Of item `of`.
  __device__ __forceinline__ void send_values(int of, int key) {
    const forward_item &owner = shared.item[of % FORWARD_ITEMS];
    mbarrier_wait(shared_address(&shared.v_empty[v.at]), v.parity ^ 1);
    if (lane == 0) {
      const uint32_t barrier = shared_address(&shared.v_full[v.at]);
      const uint64_t policy = cache_policy_last_out();
      mbarrier_arrive_expect(barrier, SHAPE::value_panels * SHAPE::panel_bytes);
#pragma unroll
      for (int panel = 0; panel < SHAPE::value_panels; panel++) {
        tma_load(shared_address(shared.v[v.at][panel]), &c.v, panel * SA_PANEL, key, owner.key_head * c.v_head_step,
                 owner.batch * c.v_batch_step, barrier, policy);
      }
    }
    __syncwarp();
    v.next();
  }

  // Of the item at hand.
  __device__ __forceinline__ void send_bias(int key) {
    if constexpr (SHAPE::stages_bias) {
      mbarrier_wait(shared_address(&shared.bias_empty), bias.parity ^ 1);
      if (lane == 0) {
        const uint32_t barrier = shared_address(&shared.bias_full);
        mbarrier_arrive_expect(barrier, sizeof shared.bias);
#pragma unroll
        for (int panel = 0; panel < SHAPE::keys / SA_PANEL; panel++) {
          tma_load(shared_address(shared.bias[panel]), &c.bias, key + panel * SA_PANEL,
                   item().tile * SA_TILE * c.bias_row_step, item().head * c.bias_head_step,
                   item().batch * c.bias_batch_step, barrier);
        }
      }
      __syncwarp();
      bias.next();
    }
  }

  // False at the end of the stream.
  __device__ __forceinline__ bool begin_item() {
    mbarrier_wait(shared_address(&shared.found), number & 1);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared.begun));
    return item().work >= 0;
  }

  __device__ __forceinline__ void send_end() {
    mbarrier_wait(shared_address(&shared.q_empty[q.at]), q.parity ^ 1);
    if (lane == 0) mbarrier_arrive(shared_address(&shared.q_full[q.at]));
    __syncwarp();
    q.next();
    number++;
  }

  // Q, K0, K1, V0, K2, V1 ... across the items without a break.
  __device__ __forceinline__ void stream() {
    int owner = 0, values = -1;  // item and first key of the values that are still to be sent
    for (; begin_item(); number++) {
      send_query();
      const int runs = item().count;
      for (int r = 0; r < runs; r++) {
        const sa_run run = r < 32 ? shared.runs[number % 2][r] : item().runs[r];
        const int steps = run.count * SHAPE::steps;
        for (int n = 0; n < steps; n++) {
          const int key = run.first * SA_TILE + n * SHAPE::keys;
          send_keys(key, run.pattern,
                    (run.pattern >= 0 ? FORWARD_PARTIAL : 0) | (r == runs - 1 && n == steps - 1 ? FORWARD_LAST : 0) |
                        (n % SHAPE::steps ? FORWARD_SECOND_HALF : 0));
          if (values >= 0) send_values(owner, values);
          send_bias(key);
          owner = number;
          values = key;
        }
      }
    }
    if (values >= 0) send_values(owner, values);
    send_end();
  }

  __device__ __forceinline__ void run() {
    for (bool again = true; again;) {
      stream();
      again = false;
      if (!careful) {
        named_barrier_sync(FORWARD_ALL_DONE, FORWARD_DONE_THREADS);
        again = careful = shared.flagged >= 0;
      }
    }
  }

  bool careful = false;
};

// The producer warpgroup's idle warps write the rows of tiles that see no key at all.
static __device__ __forceinline__ void forward_fill_dead(const forward_call &c, int warp, int warps) {
  const int lane = threadIdx.x % 32;
  for (int64_t base = ((int64_t)blockIdx.x * warps + warp) * 32; base < c.items;
       base += (int64_t)gridDim.x * warps * 32) {
    const int mine = (int)base + lane;
    bool none = false;
    if (mine < c.items) {
      const int flat = mine / c.plan.row_tiles, tile = mine % c.plan.row_tiles;
      const int64_t *start = c.plan.row_start + forward_plane_rows(c, flat / c.heads, flat % c.heads) + tile;
      none = __ldg(start) == __ldg(start + 1);
    }
    for (uint32_t found = __ballot_sync(~0u, none); found; found &= found - 1) {
      const int at = (int)base + __ffs(found) - 1;
      const int flat = at / c.plan.row_tiles, tile = at % c.plan.row_tiles;
      const int batch = flat / c.heads, head = flat % c.heads;
      const int rows = min(SA_TILE, c.queries - tile * SA_TILE), pieces = c.value_width / 8;
      uint16_t *out = (uint16_t *)c.out.data + forward_offset(c.out, batch, head, tile);
#pragma unroll 1
      for (int x = lane; x < rows * pieces; x += 32) {
        *(uint4 *)(out + x / pieces * c.out.stride[2] + x % pieces * 8) = make_uint4(0, 0, 0, 0);
      }
      float *lse = (float *)c.lse.data + forward_offset(c.lse, batch, head, tile);
      uint8_t *dead = (uint8_t *)c.dead.data + forward_offset(c.dead, batch, head, tile);
#pragma unroll 1
      for (int r = lane; r < rows; r += 32) {
        if (c.lse.data) lse[r * c.lse.stride[2]] = forward_sink(c.sinks, head) * 0.69314718f;
        if (c.dead.data) dead[r * c.dead.stride[2]] = 1;
      }
    }
  }
}

// A thread of the two warpgroups that multiply. Its rows of the warp's 16 are lane / 4 (index 0) and lane / 4 + 8 (1).
template <class SHAPE>
struct forward_consumer {
  static constexpr int scores = SHAPE::keys / 2, pairs = SHAPE::keys / 4, outs = SHAPE::value_width / 2;
  using type = typename SHAPE::type;

  const forward_call &c;
  forward_shared<SHAPE> &shared;
  const int group = threadIdx.x / FORWARD_WARPGROUP - 1, warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  float s[scores], o[outs];
  float top[2];           // the kept maximum, in units of log2
  float shift[2];         // its negative, or 0 while it is -inf
  float sum[2];           // this thread's part
  float low[2];           // what the careful path takes off the scores besides: the rounding of a huge maximum
  bool all_seen;          // every row of the warp has a maximum
  int32_t alive;          // rows that saw a key whose bias is not -inf while they had no maximum: bits 0 and 1
  int number = 0;         // of the item at hand
  int done, done_before;  // its steps, and those of the item before
  bool last, begins;      // the step at hand is its item's last, begins an item
  forward_ring<SHAPE::q_slots> q;
  forward_ring<FORWARD_STAGES> k, v;
  forward_ring<1> staged;  // bias

  // Extras: the thread's first key of the step, the bias of the step (of halves, two a register) and which weights
  // dropout keeps.
  int first_key;
  uint32_t bias[SHAPE::extras & FORWARD_FLOAT_BIAS ? scores : scores / 2], kept[(scores + 31) / 32];

  __device__ __forceinline__ forward_consumer(const forward_call &call, forward_shared<SHAPE> &memory)
      : c(call), shared(memory) {}

  __device__ __forceinline__ void release(uint64_t &barrier) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&barrier));
  }

  // S = Q K^T of the step in stage k.
  __device__ __forceinline__ void issue_scores() {
    uint32_t a[1] = {wgmma_operand(shared_address(shared.q[q.at][0]) + group * (SHAPE::q_panel_bytes / 2), 0)};
    const uint32_t b = wgmma_operand(shared_address(shared.k[k.at][0]), 0);
    // With one slot the sums of a and its steps would be kept in registers for good, which do not suffice.
    if (SHAPE::q_slots == 1) pin(a);
    wgmma_first<type, 0, 0>(s, a[0], b);
#pragma unroll
    for (int x = 1; x < SHAPE::width / 16; x++) {
      wgmma<type, 0, 0>(s, a[0] + x / 4 * (SHAPE::q_panel_bytes >> 4) + x % 4 * (32 >> 4),
                        b + x / 4 * (SHAPE::panel_bytes >> 4) + x % 4 * (32 >> 4));
    }
    wgmma_commit();
  }

  // O += P V of the step in stage v; O = P V for the first of an item.
  __device__ __forceinline__ void issue_output(uint32_t (&p)[pairs], int accumulate) {
    const uint32_t b = wgmma_operand(shared_address(shared.v[v.at][0]), SHAPE::panel_bytes);
#pragma unroll
    for (int x = 0; x < SHAPE::keys / 16; x++) {
      wgmma_rows<type, 1>(o, p + 4 * x, b + x * (2048 >> 4), x == 0 ? accumulate : 1);
    }
    wgmma_commit();
  }

  // This thread's bits of the step in stage k, of its two rows; all ones when the tile is FULL.
  __device__ __forceinline__ uint2 read_bits(int step) {
    uint2 bits = shared.bits[k.at][warp * 32 + lane];
    if (SHAPE::steps > 1 && (step & FORWARD_SECOND_HALF)) bits = make_uint2(bits.x >> 16, bits.y >> 16);
    if (SHAPE::steps > 1) bits = make_uint2(bits.x & 0xffff, bits.y & 0xffff);
    return bits;
  }

  // The greatest score of each row, in the units of the maximum.
  __device__ __forceinline__ void row_maxima(float (&x)[2]) {
    float t[4];
#pragma unroll
    for (int i = 0; i < 4; i++) t[i] = fmaxf(s[i], s[i + 4]);
#pragma unroll
    for (int i = 8; i < scores; i++) t[i % 4] = fmaxf(t[i % 4], s[i]);
    x[0] = forward_quad_max(fmaxf(t[0], t[1])) * (SHAPE::extras ? 1.f : c.scale_log2);
    x[1] = forward_quad_max(fmaxf(t[2], t[3])) * (SHAPE::extras ? 1.f : c.scale_log2);
  }

  __device__ __forceinline__ void keep(int r, float maximum) {
    top[r] = maximum;
    shift[r] = maximum == forward_minus_infinity() ? 0.f : -maximum;
  }

  // Whether the call wants what the kernel can do; a kernel for one thing alone is called for it.
  __device__ __forceinline__ bool wants(int extra, bool wanted) {
    return SHAPE::extras & extra && ((SHAPE::extras & ~extra) == 0 || wanted);
  }

  __device__ __forceinline__ bool has_bias() {
    return wants(FORWARD_BIAS, c.scores.bias.data);
  }

  // A difference of scores as an exponent of 2.
  __device__ __forceinline__ float octaves(float x) {
    if constexpr (SHAPE::extras & FORWARD_BIAS) return x * c.scores.unit;
    return x;
  }

  // What the exponential of a score is taken of.
  __device__ __forceinline__ float exponent(int i) {
    if constexpr (SHAPE::extras) return octaves(s[i] + shift[i >> 1 & 1]);
    return fmaf(s[i], c.scale_log2, shift[i >> 1 & 1]);
  }

  // The exponentials of a thread's scores, summed as softmax() does.
  __device__ __forceinline__ void sums(float (&t)[2]) {
    float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < scores; i += 2) {
      part[i & 3] += exp2_fast(exponent(i));
      part[(i & 3) + 1] += exp2_fast(exponent(i + 1));
    }
    t[0] = part[0] + part[1];
    t[1] = part[2] + part[3];
  }

  // Raises the maximum of rows whose sum of this step overflows under the kept one. All others keep it, so that they
  // get the same bits. Whether O must be scaled, by a.
  template <bool CAREFUL>
  __device__ __forceinline__ bool raise_maxima(float (&a)[2]) {
    float x[2], t[2];
    row_maxima(x);
    sums(t);
    bool any = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint32_t quads = __ballot_sync(~0u, t[r] == -forward_minus_infinity());
      a[r] = 1.f;
      if (quads >> (lane & 28) & 15) {
        a[r] = exp2_fast(octaves(top[r] - x[r]));
        if (CAREFUL && x[r] > top[r]) low[r] = 0.f;
        keep(r, x[r]);
        sum[r] *= a[r];
        any = true;
      }
    }
    // With extras the maximum is taken off a score before the difference gets its unit, so that it is exact.
    if (CAREFUL && !SHAPE::extras) settle_huge();
    return __any_sync(~0u, any);
  }

  // A maximum beyond 2^30 is rounded by more than an exponential can take: what is left of the greatest score is taken
  // off all scores of the row. Without it the row would have no finite sum, and no bits to keep.
  __device__ __forceinline__ void settle_huge() {
    float most[2] = {forward_minus_infinity(), forward_minus_infinity()};
#pragma unroll
    for (int i = 0; i < scores; i++) {
      most[i >> 1 & 1] = fmaxf(most[i >> 1 & 1], fmaf(s[i], c.scale_log2, shift[i >> 1 & 1]));
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float left = forward_quad_max(most[r]), size = fabsf(top[r]);
      // Only of the step that has the maximum: in the others `left` is as far below as the scores are.
      if (low[r] == 0.f && size > 0x1p30f && fabsf(left) > 100.f && fabsf(left) < size * 0x1p-22f) low[r] = left;
    }
  }

  template <bool CAREFUL>
  __device__ __forceinline__ float exponential(int i) {
    const float x = exponent(i);
    return exp2_fast(CAREFUL && !SHAPE::extras ? x - low[i >> 1 & 1] : x);
  }

  // Extras. The bias of the step in stage k is on its way while the product is made.
  __device__ __forceinline__ void meet_step() {
    const hopper_scores &rule = c.scores;
    first_key = shared.key[k.at] + 2 * (lane & 3);
    if constexpr (SHAPE::extras & FORWARD_BIAS && !SHAPE::stages_bias) {
      if (!has_bias()) return;
      const bool whole = wants(FORWARD_BIAS, rule.bias_pairs) && first_key - 2 * (lane & 3) + SHAPE::keys <= c.keys;
      if (is_float_bias()) {
        whole ? load_bias<uint32_t, true>() : load_bias<uint32_t, false>();
      } else {
        whole ? load_bias<uint16_t, true>() : load_bias<uint16_t, false>();
      }
    }
  }

  __device__ __forceinline__ bool is_float_bias() {
    return SHAPE::extras & FORWARD_FLOAT_BIAS && wants(FORWARD_FLOAT_BIAS, c.scores.bias.dtype == SA_F32);
  }

  // The first of this thread's two queries.
  __device__ __forceinline__ int query() {
    return shared.item[number % FORWARD_ITEMS].tile * SA_TILE + warp * 16 + lane / 4;
  }

  // PAIRS: two neighbouring keys are read at once. Otherwise the last key is read for those beyond it; the last row is
  // read for those beyond it always.
  template <class E, bool PAIRS>
  __device__ __forceinline__ void load_bias() {
    const forward_item &item = shared.item[number % FORWARD_ITEMS];
    const sa_operand &x = c.scores.bias;
    const E *rows[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      rows[r] = (const E *)x.data + item.batch * x.stride[0] + item.head * x.stride[1] +
                min(query() + 8 * r, c.queries - 1) * x.stride[2];
      if (PAIRS) rows[r] += first_key;
    }
#pragma unroll
    for (int n = 0; n < scores / 2; n++) {
      const E *row = rows[n & 1];
      const int key = n / 2 * 8, one = min(first_key + key, c.keys - 1), two = min(first_key + key + 1, c.keys - 1);
      if constexpr (sizeof(E) == 4 && PAIRS) {
        const uint2 both = __ldg((const uint2 *)(row + key));
        bias[2 * n] = both.x, bias[2 * n + 1] = both.y;
      } else if constexpr (PAIRS) {
        bias[n] = __ldg((const uint32_t *)(row + key));
      } else if constexpr (sizeof(E) == 4) {
        bias[2 * n] = __ldg(row + one * x.stride[3]), bias[2 * n + 1] = __ldg(row + two * x.stride[3]);
      } else {
        bias[n] = __ldg(row + one * x.stride[3]) | (uint32_t)__ldg(row + two * x.stride[3]) << 16;
      }
    }
  }

  template <class E>
  __device__ __forceinline__ float bias_of(int i) {
    if constexpr (sizeof(E) == 4) return __uint_as_float(bias[i]);
    return half_value((uint16_t)(i & 1 ? bias[i / 2] >> 16 : bias[i / 2]));
  }

  // The bias of 16 keys, of which the first is 16 * x of the step, from shared memory to its place.
  __device__ __forceinline__ void fetch_bias(int x) {
    if constexpr (SHAPE::stages_bias) {
      const int row = (warp * 16 + (lane & 15)) * c.bias_row_step, piece = 2 * x + (lane >> 4);
      uint32_t four[4];
      load_matrices(four, shared_address(shared.bias[piece / 8]) + row * 128 + (((piece ^ row) & 7) << 4));
#pragma unroll
      for (int i = 0; i < 4; i++) bias[4 * x + i] = four[i];
    }
  }

  __device__ __forceinline__ void await_bias() {
    if constexpr (SHAPE::stages_bias) mbarrier_wait(shared_address(&shared.bias_full), staged.parity);
  }

  __device__ __forceinline__ void release_bias() {
    if constexpr (SHAPE::stages_bias) {
      release(shared.bias_empty);
      staged.next();
    }
  }

  // Key - query - diagonal of a score.
  __device__ __forceinline__ float apart(int i) {
    return (float)(first_key - query() - c.scores.diagonal) + (float)(i / 4 * 8 + (i & 1) - (i & 2) * 4);
  }

  // ALiBi's slope of the item; 0 without.
  __device__ __forceinline__ float slope_of_item() {
    return SHAPE::extras & FORWARD_ALIBI ? shared.item[number % FORWARD_ITEMS].slope : 0.f;
  }

  template <class E>
  __device__ __forceinline__ void add_bias() {
    const float slope = slope_of_item();
    if (slope != 0.f) {
#pragma unroll
      for (int i = 0; i < scores; i++)
        s[i] = hopper_score(c.scores, s[i], hopper_extra(bias_of<E>(i), slope, apart(i)));
    } else {
#pragma unroll
      for (int i = 0; i < scores; i++) {
        if (i % 8 == 0) fetch_bias(i / 8);
        s[i] = hopper_score(c.scores, s[i], bias_of<E>(i));
      }
    }
  }

  // Products to scores. Where the bias is -inf a finite product becomes -inf; what a product that is not finite becomes
  // ends in the careful path.
  __device__ __forceinline__ void extend_scores() {
    const hopper_scores &rule = c.scores;
    if (wants(FORWARD_SOFTCAP, rule.capped == 1)) {
#pragma unroll
      for (int i = 0; i < scores; i++) s[i] = hopper_capped<true>(rule, s[i]);
    } else if (SHAPE::extras == FORWARD_ANY && rule.capped) {
#pragma unroll
      for (int i = 0; i < scores; i++) s[i] = hopper_capped<false>(rule, s[i]);
    }
    const float slope = slope_of_item();
    if (has_bias()) {
      await_bias();
      is_float_bias() ? add_bias<uint32_t>() : add_bias<uint16_t>();
    } else if (slope != 0.f) {
#pragma unroll
      for (int i = 0; i < scores; i++) s[i] = hopper_score(rule, s[i], hopper_extra(0.f, slope, apart(i)));
    } else {
#pragma unroll
      for (int i = 0; i < scores; i++) s[i] = hopper_score(rule, s[i], 0.f);
    }
  }

  // The bits of a step without the pairs whose bias is -inf.
  __device__ __forceinline__ uint2 biased_bits(bool partial, uint2 bits) {
    const bool wide = is_float_bias();
    await_bias();
    if (!partial) bits = make_uint2(~0u, ~0u);
#pragma unroll
    for (int i = 0; i < scores; i++) {
      if (i % 8 == 0) fetch_bias(i / 8);
      const float x = wide ? bias_of<uint32_t>(i) : bias_of<uint16_t>(i);
      const uint32_t bit = x == forward_minus_infinity() ? 1u << (2 * (i >> 2) + (i & 1)) : 0;
      (i & 2 ? bits.y : bits.x) &= ~bit;
    }
    return make_uint2(bits.x & (uint32_t)((1ull << scores / 2) - 1), bits.y & (uint32_t)((1ull << scores / 2) - 1));
  }

  // Rows without a maximum that see a key all the same: their scores are -inf or NaN.
  __device__ __forceinline__ void note_alive(bool partial, uint2 bits) {
    if (!has_bias()) return;
    const uint2 seen = biased_bits(partial, bits);
    alive |= (seen.x != 0) | (seen.y != 0) << 1;
  }

  __device__ __forceinline__ bool drops() {
    return wants(FORWARD_DROPOUT, c.scores.threshold);
  }

  // Which weights of the step dropout keeps, a bit for each score. Lanes 2 n and 2 n + 1 share the blocks of four
  // weights: each draws every second one for both.
  __device__ __forceinline__ void draw() {
    const hopper_scores &rule = c.scores;
    if (!drops()) return;
    const forward_item &item = shared.item[number % FORWARD_ITEMS];
    const uint64_t first = hopper_first_weight(rule, item.batch, c.heads, item.head) + first_key;
    const uint64_t weights[2] = {first + (uint64_t)query() * c.keys, first + (uint64_t)(query() + 8) * c.keys};
    if (c.keys % 4 == 0) {
      const int odd = lane & 1;
#pragma unroll
      for (int w = 0; w < scores / 32; w++) {
        uint32_t other = 0;
        kept[w] = 0;
#pragma unroll 4
        for (int x = 0; x < 8; x++) {
          const int j = x / 2 * 2 + odd, r = x & 1;
          const uint32_t four = hopper_kept_block(rule, (weights[r] + 64 * w + 8 * j) / 4);
          kept[w] |= (odd ? four >> 2 : four & 3) << (4 * j + 2 * r);
          other |= (odd ? four & 3 : four >> 2) << (4 * j + 2 * r);
        }
        kept[w] |= __shfl_xor_sync(~0u, other, 1);
      }
    } else {
#pragma unroll
      for (int w = 0; w < scores / 32; w++) {
        kept[w] = 0;
#pragma unroll 1
        for (int i = 0; i < 32; i++) {
          const uint64_t weight = (i & 2 ? weights[1] : weights[0]) + 64 * w + i / 4 * 8 + (i & 1);
          kept[w] |= (uint32_t)hopper_keeps(rule, weight) << i;
        }
      }
    }
  }

  __device__ __forceinline__ void drop() {
    if (!drops()) return;
#pragma unroll
    for (int i = 0; i < scores; i++) s[i] = kept[i / 32] >> i % 32 & 1 ? s[i] : 0.f;
  }

  // S to P (halves, as the A operand) under the row's kept maximum. Whether O must be scaled, by a.
  template <bool CAREFUL>
  __device__ __forceinline__ bool softmax(bool fresh, bool wary, bool partial, uint2 bits, uint32_t (&p)[pairs],
                                          float (&a)[2]) {
    if constexpr (SHAPE::extras) extend_scores();
    if (partial) {  // selected, never added: whatever a masked score is, it vanishes
#pragma unroll
      for (int i = 0; i < scores; i++) {
        const uint32_t word = i & 2 ? bits.y : bits.x;
        s[i] = word & 1u << (2 * (i >> 2) + (i & 1)) ? s[i] : forward_minus_infinity();
      }
    }
    if (fresh) {
      sum[0] = sum[1] = 0.f;
      if (CAREFUL) low[0] = low[1] = 0.f;
      keep(0, forward_minus_infinity()), keep(1, forward_minus_infinity());
      if (SHAPE::extras) alive = 0;
    }
    bool look = fresh || wary;
    if (!look && !all_seen) {
      look = __any_sync(~0u, (top[0] == forward_minus_infinity() && (!partial || bits.x)) ||
                                 (top[1] == forward_minus_infinity() && (!partial || bits.y)));
    }
    bool jumps = CAREFUL;
    if (look) {  // a row without a maximum has nothing in sum and O yet
      float x[2];
      row_maxima(x);
      if (top[0] == forward_minus_infinity()) keep(0, x[0]);
      if (top[1] == forward_minus_infinity()) keep(1, x[1]);
      if constexpr (SHAPE::extras) note_alive(partial, bits);
      jumps |= wary && __any_sync(~0u, octaves(x[0] - top[0]) > FORWARD_JUMP || octaves(x[1] - top[1]) > FORWARD_JUMP);
      all_seen = __all_sync(~0u, top[0] != forward_minus_infinity() && top[1] != forward_minus_infinity());
    }
    release_bias();
    bool rescale = false;
    if (jumps) rescale = raise_maxima<CAREFUL>(a);
    float t[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < scores; i += 2) {
      s[i] = exponential<CAREFUL>(i);
      s[i + 1] = exponential<CAREFUL>(i + 1);
      t[i & 3] += s[i], t[(i & 3) + 1] += s[i + 1];
      if (!SHAPE::packs_late && !SHAPE::extras) p[i / 2] = pack_halves<type>(s[i], s[i + 1]);
    }
    if constexpr (SHAPE::extras) {
      drop();
      if (!SHAPE::packs_late) pack(p);
    }
    t[0] += t[1], t[2] += t[3];
    // Rare. The branch has a second use: ptxas cannot move the wait for P V above it, and so not above the
    // exponentials, which would then no longer overlap with P V.
    if (__any_sync(~0u, t[0] > FORWARD_GROW || t[2] > FORWARD_GROW)) {
      float f[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const uint32_t quads = __ballot_sync(~0u, t[2 * r] > FORWARD_GROW);
        const float row = forward_quad_sum(t[2 * r]);
        const int e = quads >> (lane & 28) & 15 ? min((int)(__float_as_uint(row) >> 23) - 127, 126) : 0;
        f[r] = __uint_as_float((uint32_t)(127 - e) << 23);  // 2^-e
        if constexpr (SHAPE::extras) {                      // a huge maximum cannot be raised by e, but by what f says
          const float raised = top[r] + e * c.scores.octave;
          f[r] = exp2_fast(octaves(top[r] - raised));
          if (e) keep(r, raised);
          if (!e) f[r] = 1.f;
        } else if (e) {
          keep(r, top[r] + e);
        }
        a[r] = rescale ? a[r] * f[r] : f[r];
        sum[r] *= f[r];
        t[2 * r] *= f[r];
      }
#pragma unroll
      for (int i = 0; i < scores; i += 2) {
        s[i] *= f[i >> 1 & 1], s[i + 1] *= f[i >> 1 & 1];
        if (!SHAPE::packs_late) p[i / 2] = pack_halves<type>(s[i], s[i + 1]);
      }
      rescale = true;
    }
    sum[0] += t[0];
    sum[1] += t[2];
    return rescale;
  }

  __device__ __forceinline__ void pack(uint32_t (&p)[pairs]) {
#pragma unroll
    for (int i = 0; i < scores; i += 2) p[i / 2] = pack_halves<type>(s[i], s[i + 1]);
  }

  __device__ __forceinline__ void pack_late(uint32_t (&p)[pairs]) {
    if constexpr (SHAPE::packs_late) pack(p);
  }

  __device__ __forceinline__ void scale_output(const float (&a)[2]) {
#pragma unroll
    for (int i = 0; i < outs; i++) o[i] *= a[i >> 1 & 1];
  }

  // Writes the rows of item `of`, whose maxima and sums are given, and notes the item when they are not finite.
  // `lives`: its bits of `alive`.
  __device__ __forceinline__ void write_item(int of, const float (&maximum)[2], const float (&part)[2], int lives,
                                             bool note) {
    const forward_item &item = shared.item[of % FORWARD_ITEMS];
    const int rows = min(c.queries - item.tile * SA_TILE - warp * 16, 16);  // of the warp; none or less beyond the end
    const uint32_t dead_bits = item.dead[warp];
    bool dead[2], bad = false;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = lane / 4 + 8 * r;
      dead[r] = dead_bits >> row & 1;
      if constexpr (SHAPE::extras) {
        const uint32_t quads = __ballot_sync(~0u, lives >> r & 1);
        if (has_bias()) dead[r] = maximum[r] == forward_minus_infinity() && !(quads >> (lane & 28) & 15);
      }
      const float sink = item.sink;
      float total = forward_quad_sum(part[r]), base = maximum[r], weight = 1.f;
      if (sink != forward_minus_infinity()) {  // its share of the sum, under the greater of both maxima
        base = fmaxf(base, sink);
        weight = exp2_fast(octaves(maximum[r] - base));
        total = total * weight + exp2_fast(octaves(sink - base));
      }
      factor[r] = weight / total;
      if (SHAPE::extras) factor[r] *= c.scores.kept;
      bad |= !dead[r] && !(total < -forward_minus_infinity());
      // Visible scores that are all -inf have no sum and no softmax.
      const float log_total = SHAPE::extras ? __log2f(total) * c.scores.octave : __log2f(total);
      const float lse = dead[r] ? sink : total == 0.f ? __int_as_float(0x7fffffff) : base + log_total;
      if (lane % 4 == 0 && row < rows) {
        const float natural = SHAPE::extras ? c.scores.natural : 0.69314718f;
        if (item.lse) item.lse[(warp * 16 + row) * c.lse.stride[2]] = lse * natural;
        if (item.dead_rows) item.dead_rows[(warp * 16 + row) * c.dead.stride[2]] = dead[r];
      }
    }
    // This thread writes 16 bytes of every fourth row.
    const int stride = (int)c.out.stride[2];
    type *out = (type *)item.out + (warp * 16 + (lane >> 3)) * stride + (lane & 7) * 8;
    const uint32_t buffer = shared_address(shared.out[warp]);
    uint32_t seen = 0;
#pragma unroll
    for (int panel = 0; panel < SHAPE::value_panels; panel++) {
      if (panel) __syncwarp();
        // Two groups of 8 columns at a time, each of 8 rows and 8 rows below.
#pragma unroll
      for (int x = 0; x < 8 && panel * 8 + x < SHAPE::value_width / 8; x += 2) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int r = i & 1, e = 4 * (panel * 8 + x + (i >> 1)) + 2 * r;
          w[i] = dead[r] ? 0 : pack_halves<type>(o[e] * factor[r], o[e + 1] * factor[r]);
          seen = note_nonfinite<type>(seen, w[i]);
        }
        const int row = lane & 15, piece = x + (lane >> 4);
        store_matrices(buffer + row * 128 + ((piece ^ (row & 7)) << 4), w);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = i * 4 + (lane >> 3), piece = lane & 7;
        const uint4 x = *(const uint4 *)(shared.out[warp] + row * 128 + ((piece ^ (row & 7)) << 4));
        if (row < rows && panel * SA_PANEL + piece * 8 < c.value_width) {
          *(uint4 *)(out + i * 4 * stride + panel * SA_PANEL) = x;
        }
      }
    }
    bad |= (seen & 0x7fff7fff) != 0;
    if (note && __any_sync(~0u, bad) && lane == 0) note_item(of, item.work);
    __syncwarp();
  }

  // Eight warps may find the same item; the first puts it on the list.
  __device__ __forceinline__ void note_item(int of, int work) {
    if (atomicMax(&shared.flagged_number[of % FORWARD_ITEMS], of + 1) > of) return;
    c.flagged_next[work] = atomicExch(&shared.flagged, work);
  }

  // Goes to the item that comes next; false at the end of the stream.
  __device__ __forceinline__ bool next_item() {
    mbarrier_wait(shared_address(&shared.q_full[q.at]), q.parity);
    if (shared.item[number % FORWARD_ITEMS].work >= 0) {
      done_before = done;
      done = 0;
      return true;
    }
    release(shared.q_empty[q.at]);
    q.next();
    number++;
    return false;
  }

  // Goes to the next step; false at the end of the stream.
  __device__ __forceinline__ bool advance() {
    begins = last;
    if (!begins) return true;
    q.next();
    number++;
    return next_item();
  }

  // S of a step is there: its buffers are free.
  __device__ __forceinline__ void release_keys(int step) {
    release(shared.k_empty[k.at]);
    k.next();
    last = step & FORWARD_LAST;
    if (last) release(shared.q_empty[q.at]);
  }

  __device__ __forceinline__ void release_values() {
    release(shared.v_empty[v.at]);
    v.next();
  }

  // S = Q K^T together with O += P V of the step before, and the softmax of S under the latter.
  __device__ __forceinline__ void step(uint32_t (&p_before)[pairs], uint32_t (&p)[pairs]) {
    const int accumulate = begins ? done_before > 1 : done > 1;
    mbarrier_wait(shared_address(&shared.k_full[k.at]), k.parity);
    if constexpr (SHAPE::extras) meet_step();
    pin(s), pin(o), pin(p_before);
    wgmma_fence();
    issue_scores();
    mbarrier_wait(shared_address(&shared.v_full[v.at]), v.parity);
    wgmma_fence();
    issue_output(p_before, accumulate);
    if constexpr (SHAPE::extras) draw();
    const int kind = shared.step[k.at];
    const uint2 bits = read_bits(kind);
    // Once an item of the block had to be noted, the maximum of every step is looked at, so that a workload whose
    // scores jump often is not done twice. The bits are the same.
    const bool wary = shared.flagged >= 0;
    wgmma_wait<1>();
    pin(s);
    release_keys(kind);
    done++;
    float a[2];
    const float top_before[2] = {top[0], top[1]}, sum_before[2] = {sum[0], sum[1]};
    const int alive_before = SHAPE::extras ? alive : 0;
    const bool rescale = softmax<false>(begins, wary, kind & FORWARD_PARTIAL, bits, p, a);
    wgmma_wait<0>();
    pin(o), pin(p_before);
    release_values();
    pack_late(p);
    if (begins) {
      write_item(number - 1, top_before, sum_before, alive_before, true);
    } else if (rescale) {
      scale_output(a);
    }
  }

  __device__ __forceinline__ void finish(uint32_t (&p)[pairs]) {
    mbarrier_wait(shared_address(&shared.v_full[v.at]), v.parity);
    pin(o), pin(p);
    wgmma_fence();
    issue_output(p, done > 1);
    wgmma_wait<0>();
    pin(o), pin(p);
    release_values();
    write_item(number - 2, top, sum, SHAPE::extras ? alive : 0, true);  // the end of the stream was counted too
  }

  __device__ __forceinline__ void run() {
    if (!next_item()) return;
    uint32_t p[pairs], p_second[pairs];  // one is read by P V while the other is written
    uint32_t(&p_other)[pairs] = SHAPE::packs_late ? p : p_second;
    float a[2];
    const int kind = lone_scores();
    const uint2 bits = read_bits(kind);
    release_keys(kind);
    done = 1;
    softmax<false>(true, false, kind & FORWARD_PARTIAL, bits, p, a);
    pack_late(p);
#pragma unroll
    for (int i = 0; i < outs; i++) o[i] = 0.f;
    for (;;) {
      if (!advance()) {
        finish(p);
        break;
      }
      step(p, p_other);
      if (!advance()) {
        finish(p_other);
        break;
      }
      step(p_other, p);
    }
  }

  // S = Q K^T with nothing beside it. What kind of step it is.
  __device__ __forceinline__ int lone_scores() {
    mbarrier_wait(shared_address(&shared.k_full[k.at]), k.parity);
    if constexpr (SHAPE::extras) {
      meet_step();
      draw();
    }
    pin(s);
    wgmma_fence();
    issue_scores();
    wgmma_wait<0>();
    pin(s);
    return shared.step[k.at];
  }

  // The items that were noted, one product after the other: run() as to order and bits.
  __device__ __forceinline__ void run_careful() {
    while (next_item()) {
      do {
        const int kind = lone_scores(), key = shared.key[k.at];
        uint2 bits = read_bits(kind);
        bool partial = kind & FORWARD_PARTIAL;
        release_keys(kind);
        if constexpr (SHAPE::extras) {
          if (has_bias()) bits = biased_bits(partial, bits), partial = true;
        }
        uint32_t p[pairs];
        float a[2];
        if (softmax<true>(done == 0, true, partial, bits, p, a) && done > 0) scale_output(a);
        pack_late(p);
        mbarrier_wait(shared_address(&shared.v_full[v.at]), v.parity);
        clean_values();
        pin(o), pin(p);
        wgmma_fence();
        issue_output(p, done > 0);
        wgmma_wait<0>();
        pin(o), pin(p);
        add_poison(key, partial, bits);
        release_values();
        done++;
      } while (!last);
      write_item(number, top, sum, alive, false);
      q.next();
      number++;
    }
  }

  static __device__ __forceinline__ bool is_nonfinite(uint32_t half) {
    constexpr uint32_t exponent = std::is_same<type, __half>::value ? 0x7c00 : 0x7f80;
    return (half & exponent) == exponent;
  }

  // Replaces the elements of V in stage v that are not finite by 0, and notes their keys.
  __device__ __forceinline__ void clean_values() {
    constexpr int threads = FORWARD_CONSUMERS * FORWARD_WARPGROUP;
    const int thread = threadIdx.x - FORWARD_WARPGROUP;
    for (int x = thread; x < SHAPE::value_panels * SHAPE::panel_bytes / 4; x += threads) {
      uint32_t *pair = (uint32_t *)shared.v[v.at][0] + x;
      const bool low = is_nonfinite(*pair), high = is_nonfinite(*pair >> 16);
      if (!low && !high) continue;
      *pair &= (low ? 0 : 0xffffu) | (high ? 0 : 0xffff0000u);
      const int key = x / (SA_PANEL / 2) % SHAPE::keys;
      atomicOr(&shared.poisoned[v.at][key / 32], 1u << key % 32);
    }
    async_proxy_fence();
    named_barrier_sync(FORWARD_CLEANED, threads);
    // Everyone is past the step before, whose notes are now taken away.
    if (thread < SHAPE::keys / 32) shared.poisoned[v.at ^ 1][thread] = 0;
    named_barrier_sync(FORWARD_CLEANED, threads);
  }

  // Adds what clean_values() took away to the rows that see it: a visible NaN or Inf makes the sum so, however small
  // its weight.
  __device__ __forceinline__ void add_poison(int first_key, bool partial, uint2 bits) {
    const forward_item &item = shared.item[number % FORWARD_ITEMS];
    for (int word = 0; word < SHAPE::keys / 32; word++) {
      for (uint32_t found = shared.poisoned[v.at][word]; found; found &= found - 1) {
        const int key = word * 32 + __ffs(found) - 1;
        const int source = (lane & 28) | key % 8 / 2, bit = key / 8 * 2 + key % 2;
        const uint32_t seen0 = __shfl_sync(~0u, bits.x, source) >> bit & 1;
        const uint32_t seen1 = __shfl_sync(~0u, bits.y, source) >> bit & 1;
        // Of dropped weights, which are 0, comes NaN.
        uint32_t keeps = ~0u;
        if constexpr (SHAPE::extras & FORWARD_DROPOUT) {
          if (drops()) {
            const uint32_t mine = SHAPE::keys == 128 && key >= 64 ? kept[(scores - 1) / 32] : kept[0];
            keeps = __shfl_sync(~0u, mine, source) >> (key % 64 / 8 * 4 + key % 2);
          }
        }
        const uint16_t *row = (const uint16_t *)c.values.data + item.batch * c.values.stride[0] +
                              item.key_head * c.values.stride[1] + ((int64_t)first_key + key) * c.values.stride[2];
#pragma unroll
        for (int x = 0; x < outs / 4; x++) {
          const int column = 8 * x + 2 * (lane & 3);
          const uint32_t pair = column < c.value_width ? *(const uint32_t *)(row + column) : 0;
          if (!is_nonfinite(pair) && !is_nonfinite(pair >> 16)) continue;
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const uint32_t half = i & 1 ? pair >> 16 : pair & 0xffff;
            if (is_nonfinite(half) && (!partial || (i & 2 ? seen1 : seen0))) {
              o[4 * x + i] += keeps >> (i & 2) & 1 ? half_value(half) : 0.f * half_value(half);
            }
          }
        }
      }
    }
  }

  static __device__ __forceinline__ float half_value(uint16_t half) {
    if constexpr (std::is_same<type, __half>::value) {
      return __half2float(__ushort_as_half(half));
    } else {
      return __uint_as_float((uint32_t)half << 16);
    }
  }
};

template <class SHAPE>
__global__ void __launch_bounds__(FORWARD_THREADS, 1) hopper_forward_kernel(const __grid_constant__ forward_call c) {
  forward_shared<SHAPE> &shared = *dynamic_shared<forward_shared<SHAPE>>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < SHAPE::q_slots; i++) {
      mbarrier_init(shared_address(&shared.q_full[i]), 1);
      mbarrier_init(shared_address(&shared.q_empty[i]), FORWARD_CONSUMERS * 4);
    }
    for (int i = 0; i < FORWARD_STAGES; i++) {
      mbarrier_init(shared_address(&shared.k_full[i]), 1);
      mbarrier_init(shared_address(&shared.k_empty[i]), FORWARD_CONSUMERS * 4);
      mbarrier_init(shared_address(&shared.v_full[i]), 1);
      mbarrier_init(shared_address(&shared.v_empty[i]), FORWARD_CONSUMERS * 4);
    }
    if constexpr (SHAPE::stages_bias) {
      mbarrier_init(shared_address(&shared.bias_full), 1);
      mbarrier_init(shared_address(&shared.bias_empty), FORWARD_CONSUMERS * 4);
    }
    mbarrier_init(shared_address(&shared.found), 1);
    mbarrier_init(shared_address(&shared.begun), 1);
    mbarrier_init_fence();
    shared.flagged = -1;
    for (int i = 0; i < FORWARD_ITEMS; i++) shared.flagged_number[i] = 0;
    for (int i = 0; i < 2 * SHAPE::keys / 32; i++) shared.poisoned[0][i] = 0;
  }
  __syncthreads();
  if (threadIdx.x < FORWARD_WARPGROUP) {
    registers_give_back<FORWARD_PRODUCER_REGISTERS>();
    if (threadIdx.x < 32) {
      forward_loader<SHAPE>(c, shared).run();
    } else if (threadIdx.x < 64) {
      forward_finder<SHAPE>(c, shared).run();
    } else {
      forward_fill_dead(c, threadIdx.x / 32 - 2, 2);
    }
  } else {
    registers_take<FORWARD_CONSUMER_REGISTERS>();
    forward_consumer<SHAPE> consumer(c, shared);
    consumer.run();
    named_barrier_sync(FORWARD_ALL_DONE, FORWARD_DONE_THREADS);
    if (shared.flagged >= 0) consumer.run_careful();
  }
}

// One of these is instantiated in each of the hopper_forward_*.cu, which take a minute to compile.
template <class SHAPE>
int hopper_forward_launch(const char *function, const forward_call &c, int blocks, cudaStream_t stream) {
  return sa_cuda_launch(function, hopper_forward_kernel<SHAPE>, dim3(blocks), dim3(FORWARD_THREADS),
                        sizeof(forward_shared<SHAPE>), stream, c);
}

#endif
