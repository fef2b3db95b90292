// the warps of the forward on Hopper that find work, load it, and write rows of tiles that see no key
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_PRODUCER_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_PRODUCER_CUH
#include "kernels/cuda/hopper_forward_call.cuh"

// How many launches more a block begins wary. No bit of a result depends on it, so launches in several streams may
// share it.
template <class SHAPE>
__device__ int32_t forward_wary_launches[FORWARD_MEMORIES];

// The warp that takes work items from the counter and looks them up, shortly before the warp that loads needs them.
template <class SHAPE>
struct forward_finder {
  const forward_call &c;
  forward_shared<SHAPE> &shared;
  const int lane = threadIdx.x % 32;
  int number = 0;   // of items found
  int waiting = 0;  // the lane's of the items to be taken again, as in `again`
  int32_t &wary_next = forward_wary_launches<SHAPE>[blockIdx.x % FORWARD_MEMORIES];
  const int32_t wary_launches = SHAPE::remembers ? wary_next : 0;

  __device__ __forceinline__ forward_finder(const forward_call &call, forward_shared<SHAPE> &memory)
      : c(call), shared(memory) {}

  // Makes work item `work` the next of the stream, unless it sees no key.
  __device__ __forceinline__ bool publish(int work) {
    const uint32_t turn = (uint32_t)work / (uint32_t)c.group_items, i = work - turn * c.group_items;
    const uint32_t rank = i / (uint32_t)c.group_heads;
    const uint32_t flat = (c.ordered ? c.group_order[turn] : turn) * c.group_heads + (i - rank * c.group_heads);
    int batch = flat / (uint32_t)c.heads, head = flat - batch * c.heads;
    if (SHAPE::extras & FORWARD_BIAS && c.batches) head = flat / (uint32_t)c.batches, batch = flat - head * c.batches;
    const sa_device_row *record = c.plan.row_records + forward_plane_rows(c, batch, head) + rank;
    static_assert(sizeof *record == 32 * sizeof(int32_t), "a word a lane");
    const int32_t word = __ldg((const int32_t *)record + lane);  // what finding an item waits for
    forward_item &item = shared.item[number % FORWARD_ITEMS];
    if (lane == 0) {
      item.work = work;
      item.batch = batch;
      item.head = head;
      item.key_head = head / (c.heads / c.key_heads);
      item.out = (uint16_t *)c.out.data + forward_offset(c.out, batch, head, 0);
      item.lse = c.lse.data ? (float *)c.lse.data + forward_offset(c.lse, batch, head, 0) : NULL;
      item.dead_rows = c.dead.data ? (uint8_t *)c.dead.data + forward_offset(c.dead, batch, head, 0) : NULL;
      if (SHAPE::extras & FORWARD_ALIBI) item.slope = hopper_slope(c.scores, head);
      item.sink = SHAPE::extras ? forward_sink(c.sinks, head, c.scores.base) : forward_sink(c.sinks, head);
    }
    const int count = __shfl_sync(~0u, word, offsetof(sa_device_row, runs) / 4);
    if (count == 0) return false;
    sa_run *const runs = shared.runs[number % 2];
    if (lane < FORWARD_RECORDED) {
      ((int32_t *)&item)[lane] = word;
    } else if (lane < FORWARD_RECORD) {
      ((int32_t *)runs)[lane - FORWARD_RECORDED] = word;
    }
    if (count > SA_RECORDED_RUNS) {
      const uint32_t low = __shfl_sync(~0u, word, offsetof(sa_device_row, first) / 4);
      const uint32_t high = __shfl_sync(~0u, word, offsetof(sa_device_row, first) / 4 + 1);
      const int64_t first = (int64_t)((uint64_t)high << 32 | low);
      if (lane >= SA_RECORDED_RUNS && lane < count) runs[lane] = c.plan.row_runs[first + lane];
    }
    hand_over();
    return true;
  }

  __device__ __forceinline__ void publish_end() {
    if (lane == 0) shared.item[number % FORWARD_ITEMS].work = -1;
    hand_over();
  }

  __device__ __forceinline__ void hand_over() {
    if (number == 0 && lane == 0 && wary_launches > 0) shared.wary = 0;
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared_address(&shared.found));
    mbarrier_wait(shared_address(&shared.asked), number & 1);
    number++;
  }

  // An item that the stream takes again, or -1.
  __device__ __forceinline__ int take_again() {
    if (lane < FORWARD_ITEMS && !waiting) waiting = atomicExch(&shared.again[lane], 0);
    const uint32_t found = __ballot_sync(~0u, waiting);
    if (!found) return -1;
    const int from = __ffs(found) - 1, work = __shfl_sync(~0u, waiting, from) - 1;
    if (lane == from) waiting = 0;
    return work;
  }

  __device__ __forceinline__ int take() {
    int work = take_again();
    if (work >= 0) return work;
    if (lane == 0) work = atomicAdd(c.counter, 1) + (int)gridDim.x;
    return __shfl_sync(~0u, work, 0);
  }

  // An item to be done carefully, or -1.
  __device__ __forceinline__ int take_careful() {
    const int again = take_again(), work = again >= 0 ? again : shared.flagged;
    __syncwarp();
    if (again < 0 && work >= 0 && lane == 0) shared.flagged = c.flagged_next[work];
    __syncwarp();
    return work;
  }

  // Items that see no key are the last of their group, or nearly so: they are passed over one by one.
  __device__ __forceinline__ void run() {
    for (int work = blockIdx.x; work < c.items; work = take()) publish(work);
    publish_end();
    // The last block out leaves the counters as it found them.
    if (lane == 0) {
      __threadfence();
      if (atomicAdd(c.counter + 1, 1) == (int)gridDim.x - 1) c.counter[0] = c.counter[1] = 0;
    }
    named_barrier_meet(FORWARD_ALL_DONE, FORWARD_DONE_THREADS);
    if (shared.wary == FORWARD_NEVER) return;
    if (SHAPE::remembers && lane == 0) {
      if (wary_launches > 0) {
        wary_next = wary_launches - 1;
      } else if (shared.flagged < 0) {  // items that are to be done carefully were not finite for another reason
        wary_next = FORWARD_WARY_LAUNCHES;
      }
    }
    for (int work = take_careful(); work >= 0; work = take_careful()) publish(work);
    publish_end();
  }
};

// The warp that loads. Its first lane alone waits for a buffer: what it then sends may end the next phase before
// another lane has looked at this one.
template <class SHAPE>
struct forward_loader {
  const forward_call &c;
  forward_shared<SHAPE> &shared;
  const int lane = threadIdx.x % 32;
  hopper_ring<SHAPE::q_slots> q;
  hopper_ring<FORWARD_STAGES> k, v;
  hopper_ring<1> bias;
  int number = 0;  // of items sent
  int left;        // steps of the item at hand that are not sent, or fewer

  __device__ __forceinline__ forward_loader(const forward_call &call, forward_shared<SHAPE> &memory)
      : c(call), shared(memory) {}

  // The item at hand.
  __device__ __forceinline__ const forward_item &item() { return shared.item[number % FORWARD_ITEMS]; }

  __device__ __forceinline__ void send_query() {
    if (lane == 0) {
      mbarrier_wait(shared_address(&shared.q_empty[q.at]), q.parity ^ 1);
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
    if (lane == 0) {
      mbarrier_wait(shared_address(&shared.k_empty[k.at]), k.parity ^ 1);
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
    if (lane == 0) {
      mbarrier_wait(shared_address(&shared.v_empty[v.at]), v.parity ^ 1);
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
      if (lane == 0) {
        mbarrier_wait(shared_address(&shared.bias_empty), bias.parity ^ 1);
        const uint32_t barrier = shared_address(&shared.bias_full);
        mbarrier_arrive_expect(barrier, c.bias_row_step ? (int)sizeof shared.bias : SHAPE::keys * 2);
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
    const bool more = item().work >= 0;
    left = more ? item().tiles * SHAPE::steps : 0;
    __syncwarp();
    if (left <= FORWARD_AHEAD) ask_next();
    return more;
  }

  // The next item may be taken from the counter.
  __device__ __forceinline__ void ask_next() {
    if (lane == 0) mbarrier_arrive(shared_address(&shared.asked));
  }

  __device__ __forceinline__ void count_step() {
    if (--left == FORWARD_AHEAD) ask_next();
  }

  __device__ __forceinline__ void send_end() {
    if (lane == 0) {
      mbarrier_wait(shared_address(&shared.q_empty[q.at]), q.parity ^ 1);
      mbarrier_arrive(shared_address(&shared.q_full[q.at]));
    }
    __syncwarp();
    q.next();
    number++;
  }

  // Q, K0, K1, V0, K2, V1 ... across the items without a break.
  __device__ __forceinline__ void stream() {
    int owner = 0, values = -1;  // item and first key of the values that are still to be sent
    for (; begin_item(); number++) {
      send_query();
      const int runs = item().runs;
      for (int x = 0, r = item().first_run; x < runs; x++, r = r + 1 == runs ? 0 : r + 1) {
        const sa_run run = r < 32 ? shared.runs[number % 2][r] : c.plan.row_runs[item().first + r];
        const int steps = run.count * SHAPE::steps;
        for (int n = 0; n < steps; n++) {
          const int key = run.first * SA_TILE + n * SHAPE::keys;
          count_step();
          send_keys(key, run.pattern,
                    (run.pattern >= 0 ? FORWARD_PARTIAL : 0) | (x == runs - 1 && n == steps - 1 ? FORWARD_LAST : 0) |
                        (n % SHAPE::steps ? FORWARD_SECOND_HALF : 0));
          if (SHAPE::blocks > 1) {
            send_values(number, key);
            continue;
          }
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
        named_barrier_meet(FORWARD_ALL_DONE, FORWARD_DONE_THREADS);
        again = careful = shared.wary != FORWARD_NEVER;
      }
    }
  }

  bool careful = false;
};

// The producer warpgroup's idle warps write the rows of tiles that see no key at all, from a row of zeros in shared
// memory.
static __device__ __forceinline__ void forward_fill_dead(const forward_call &c, uint32_t zeros, int warp, int warps) {
  const int lane = threadIdx.x % 32;
  warp += blockIdx.x * warps, warps *= gridDim.x;
  // Neighbouring tiles, of which those that see no key are many at once, go to different blocks.
  for (int64_t base = warp; base < c.items; base += (int64_t)warps * 32) {
    const int64_t mine = base + (int64_t)lane * warps;
    bool none = false;
    if (mine < c.items) {
      const int flat = mine / c.plan.row_tiles, tile = mine % c.plan.row_tiles;
      const int64_t *start = c.plan.row_start + forward_plane_rows(c, flat / c.heads, flat % c.heads) + tile;
      none = __ldg(start) == __ldg(start + 1);
    }
    for (uint32_t found = __ballot_sync(~0u, none); found; found &= found - 1) {
      const int at = (int)base + (__ffs(found) - 1) * warps;
      const int flat = at / c.plan.row_tiles, tile = at % c.plan.row_tiles;
      const int batch = flat / c.heads, head = flat % c.heads;
      const int rows = min(SA_TILE, c.queries - tile * SA_TILE);
      uint16_t *out = (uint16_t *)c.out.data + forward_offset(c.out, batch, head, tile);
#pragma unroll 1
      for (int r = lane; r < rows; r += 32) bulk_store(out + r * c.out.stride[2], zeros, c.value_width * 2);
      bulk_commit();
      float *lse = (float *)c.lse.data + forward_offset(c.lse, batch, head, tile);
      uint8_t *dead = (uint8_t *)c.dead.data + forward_offset(c.dead, batch, head, tile);
#pragma unroll 1
      for (int r = lane; r < rows; r += 32) {
        if (c.lse.data) lse[r * c.lse.stride[2]] = forward_sink(c.sinks, head) * 0.69314718f;
        if (c.dead.data) dead[r * c.dead.stride[2]] = 1;
      }
    }
  }
  bulk_wait_read<0>();
}

#endif
