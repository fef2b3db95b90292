// backward attention on Hopper for heads wider than 128: TMA, wgmma and warp specialisation over the visible tiles
//
// dK and dV of 64 keys fill the registers of two warpgroups, and the sums of dQ in f32 would be 1 KiB of traffic a
// query and step of 64 keys, 64 KB against 2560 cycles of products. So there are two passes, each of which makes its
// own S and dP: seven products instead of five, but no sums in memory, no turns, nothing to convert, and the bits of a
// result are the same every time. Before them hopper_backward_rows makes the row statistics. In both passes a block per
// multiprocessor stays for the whole launch and takes jobs, the longest of a head first, from one counter; warp 0 loads
// for warpgroups 1 and 2 in one stream across the jobs, and products of one warpgroup run under the arithmetic of the
// other.
//
//   hopper_wide_keys     A job is 64 keys of a key head with all queries that see them, 64 a step. Warpgroup 1 makes
//                        S^T = K Q^T, P^T and dV += P^T dO, warpgroup 2 dP^T = V dO^T, dS^T and dK += dS^T Q: a key per
//                        row, so that P^T and dS^T are multiplied from registers. What they exchange is P^T, in halves,
//                        each thread's to the same thread of the other.
//   hopper_wide_queries  A job is 128 queries of a head, 64 a warpgroup, with all keys that they see, 64 a step:
//                        S = Q K^T, dP = dO V^T, dQ += dS K with dS in registers. The next S and dQ run under the
//                        arithmetic of P.
//
//   widths    registers: keys' pass   queries' pass        shared memory: keys' pass        queries' pass
//   256, 256  dV or dK 128, S or dP   dQ 128, S 32, dP 32,  K, V, 2 x (Q, dO, P^T): 211 KiB  Q, dO, 2 x K, V: 226 KiB
//   192, 192  dV or dK 96, 32, 16     dQ 96, 32, 32, 16     3 x (Q, dO): 211 KiB             3 x K, 2 x V: 221 KiB
//   192, 128  dV 64, dK 96, 32, 16    the same              3 x (Q, dO): 179 KiB             3 x K, 2 x V: 189 KiB
//
// On an H100 width 256 reaches 418 TFLOP/s of five products (585 of the seven), 1.18 times cuDNN's, and 192 516.
//
// Gradients leave through the buffers of the operands of their shape: dK through K, dV through V, dQ through Q.
//
// A result that is not finite is noted, and last launches (CAREFUL) do its job again: the same products in the same
// order, but the elements of Q, dO and K that are not finite are replaced by 0 where they are multiplied by P or dS,
// and their products then added one by one where the pair is visible. So keys and rows that see nothing of the kind
// get the very bits of a clean run; clean inputs pay for a test of the results.
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WIDE_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WIDE_CUH
#include "kernels/cuda/hopper_backward_call.cuh"

enum {
  HOPPER_WIDE_THREADS = 384,
  // 128 * 40 + 256 * 232 are the 384 * 168 registers that a block is launched with.
  HOPPER_WIDE_PRODUCER_REGISTERS = 40,
  HOPPER_WIDE_CONSUMER_REGISTERS = 232,
  HOPPER_WIDE_ROWS = 64,  // of an operand that are loaded together
  HOPPER_WIDE_PANEL_BYTES = HOPPER_WIDE_ROWS * 128,
  HOPPER_WIDE_BITS = SA_TILE * SA_TILE / 8,  // bytes of a pattern
  // Named barriers; the last is two, one a warpgroup.
  HOPPER_WIDE_BOTH = 1,
  HOPPER_WIDE_WARPGROUP = 2
};

template <class T, int WIDTH, int VALUE_WIDTH>
struct hopper_wide_shape {
  using type = T;
  static constexpr int width = WIDTH, value_width = VALUE_WIDTH;
  static constexpr uint32_t k_bytes = WIDTH / SA_PANEL * HOPPER_WIDE_PANEL_BYTES,
                            v_bytes = VALUE_WIDTH / SA_PANEL * HOPPER_WIDE_PANEL_BYTES;  // 64 rows of K or Q; V or dO
};

// Shared memory of the pass over keys, from where it starts.
template <class SHAPE, bool CAREFUL>
struct hopper_wide_keys_memory : SHAPE {
  using S = SHAPE;
  static constexpr int slots = S::width > 192 ? 2 : 3;
  static constexpr uint32_t pairs_bytes = 64 * 64 * 2, bits_bytes = HOPPER_WIDE_BITS / 4;
  static constexpr uint32_t k = 0, v = k + S::k_bytes, q = v + S::v_bytes, dout = q + slots * S::k_bytes,
                            p = dout + slots * S::v_bytes, ds = p + 2 * pairs_bytes,
                            lse = ds + (CAREFUL ? pairs_bytes : 0), delta = lse + slots * 256,
                            bits = delta + slots * 256, step = bits + slots * bits_bytes, job = step + slots * 16,
                            bad_q = job + 2 * 16, bad_dout = bad_q + (CAREFUL ? 256 : 0),
                            job_full = bad_dout + (CAREFUL ? 256 : 0), job_empty = job_full + 16,
                            k_full = job_empty + 16, k_empty = k_full + 8, v_full = k_empty + 8, v_empty = v_full + 8,
                            p_full = v_empty + 8, p_empty = p_full + 16, q_full = p_empty + 16,
                            q_empty = q_full + 8 * slots, dout_full = q_empty + 8 * slots,
                            dout_empty = dout_full + 8 * slots, bytes = dout_empty + 8 * slots;
  static_assert(bytes <= 227 << 10, "shared memory of a block");
};

// The same of the pass over queries; Q and dO twice, one a warpgroup.
template <class SHAPE, bool CAREFUL>
struct hopper_wide_queries_memory : SHAPE {
  using S = SHAPE;
  static constexpr int k_slots = S::width > 192 ? 2 : 3, v_slots = S::width > 192 ? 1 : 2;
  static constexpr uint32_t q = 0, dout = q + 2 * S::k_bytes, k = dout + 2 * S::v_bytes, v = k + k_slots * S::k_bytes,
                            bits = v + v_slots * S::v_bytes, step = bits + v_slots * HOPPER_WIDE_BITS,
                            job = step + v_slots * 16, bad_k = job + 2 * 16, job_full = bad_k + (CAREFUL ? 256 : 0),
                            job_empty = job_full + 16, q_full = job_empty + 16, q_empty = q_full + 16,
                            dout_full = q_empty + 16, dout_empty = dout_full + 16, k_full = dout_empty + 16,
                            k_empty = k_full + 8 * k_slots, v_full = k_empty + 8 * k_slots,
                            v_empty = v_full + 8 * v_slots, bytes = v_empty + 8 * v_slots;
  static_assert(bytes <= 227 << 10, "shared memory of a block");
};

/*  Warp 0: the loads  */

// A job: a column of 64 keys or a row of tiles. Its steps are 0 when no query sees the keys, -1 when there is no job
// left.
typedef struct hopper_wide_job {
  int block, steps, batch, head;
} hopper_wide_job;

// The tiles of a list of runs, counted by a warp.
static __device__ __forceinline__ int hopper_wide_tiles(const sa_run *runs, const int64_t *start, int lane) {
  int tiles = 0;
#pragma unroll 1
  for (int64_t r = start[0] + lane; r < start[1]; r += 32) tiles += runs[r].count;
  return hopper_warp_sum(tiles);
}

// Calls load(first row or key, pattern) for the steps of a list of runs.
template <class Load>
static __device__ __forceinline__ void hopper_wide_each_step(const sa_run *runs, const int64_t *start, Load load) {
#pragma unroll 1
  for (int64_t r = start[0]; r < start[1]; r++) {
    const sa_run run = runs[r];
#pragma unroll 1
    for (int at = run.first * SA_TILE; at < (run.first + run.count) * SA_TILE; at += HOPPER_WIDE_ROWS) {
      load(at, run.pattern);
    }
  }
}

// 64 rows of `bytes` in all; one thread calls it.
template <uint32_t BYTES>
static __device__ __forceinline__ void hopper_wide_load(uint32_t to, const CUtensorMap *map, int row, int head,
                                                        int batch, uint32_t barrier) {
#pragma unroll
  for (uint32_t panel = 0; panel < BYTES / HOPPER_WIDE_PANEL_BYTES; panel++) {
    tma_load(to + panel * HOPPER_WIDE_PANEL_BYTES, map, panel * SA_PANEL, row, head, batch, barrier);
  }
}

// What both passes do about their jobs.
template <class MEMORY>
struct hopper_wide_producer {
  const hopper_backward_call &c;
  const uint32_t base;
  const int lane = threadIdx.x % 32;
  int jobs = 0, steps = 0;  // so far; jobs only those that have steps

  __device__ __forceinline__ hopper_wide_producer(const hopper_backward_call &call, uint32_t start)
      : c(call), base(start) {}

  __device__ __forceinline__ int take(int counter) const {
    int id = 0;
    if (lane == 0) id = atomicAdd(c.next_job + counter, 1);
    return __shfl_sync(~0u, id, 0);
  }

  // Hands job n to the warpgroups that multiply; one lane calls it.
  __device__ __forceinline__ void announce(int n, const hopper_wide_job &job) const {
    mbarrier_wait(base + MEMORY::job_empty + 8 * (n & 1), (n >> 1 & 1) ^ 1);
    shared_store_4i(base + MEMORY::job + 16 * (n & 1), job.block, job.steps, job.batch, job.head);
    mbarrier_arrive(base + MEMORY::job_full + 8 * (n & 1));
  }

  __device__ __forceinline__ void wait_empty(uint32_t barrier, int slot, int round) const {
    mbarrier_wait(base + barrier + 8 * slot, (round & 1) ^ 1);
  }
};

template <class SHAPE, bool CAREFUL>
struct hopper_wide_keys_producer : hopper_wide_producer<hopper_wide_keys_memory<SHAPE, CAREFUL>> {
  using M = hopper_wide_keys_memory<SHAPE, CAREFUL>;
  using B = hopper_wide_producer<M>;
  using B::B;
  using B::base, B::c, B::jobs, B::lane, B::steps;

  __device__ __forceinline__ const int64_t *runs_of(int batch, int head, int block) const {
    return c.plan.col_start + sa_device_plane(c.plan, batch, head) * c.plan.col_tiles + block / 2;
  }

  __device__ __forceinline__ hopper_wide_job next_job() const {
    const int blocks = 2 * c.plan.col_tiles;
#pragma unroll 1
    for (;;) {
      const int id = this->take(CAREFUL);
      if (id >= c.jobs) return {0, -1, 0, 0};
      const int flat = c.sorted ? c.head_order[id / blocks] : id / blocks, rank = id % blocks;
      hopper_wide_job job;
      job.batch = flat / c.key_heads;
      job.head = flat % c.key_heads;
      const int64_t plane = sa_device_plane(c.plan, job.batch, job.head * c.group);
      job.block = c.plan.col_order[plane * c.plan.col_tiles + rank / 2] * 2 + rank % 2;
      if (job.block * HOPPER_WIDE_ROWS >= c.keys || (CAREFUL && !c.bad_key[flat * blocks + job.block])) continue;
      job.steps = 0;
#pragma unroll 1
      for (int head = job.head * c.group; head < (job.head + 1) * c.group; head++) {
        job.steps += 2 * hopper_wide_tiles(c.plan.col_runs, runs_of(job.batch, head, job.block), lane);
      }
      return job;
    }
  }

  __device__ __forceinline__ void load_keys(const hopper_wide_job &job) const {
    this->wait_empty(M::k_empty, 0, jobs);
    mbarrier_arrive_expect(base + M::k_full, M::k_bytes);
    hopper_wide_load<M::k_bytes>(base + M::k, &c.k, job.block * HOPPER_WIDE_ROWS, job.head * c.k_head_step,
                                 job.batch * c.k_batch_step, base + M::k_full);
  }

  __device__ __forceinline__ void load_values(const hopper_wide_job &job) const {
    this->wait_empty(M::v_empty, 0, jobs);
    mbarrier_arrive_expect(base + M::v_full, M::v_bytes);
    hopper_wide_load<M::v_bytes>(base + M::v, &c.v, job.block * HOPPER_WIDE_ROWS, job.head * c.v_head_step,
                                 job.batch * c.v_batch_step, base + M::v_full);
  }

  // Q of a step, the statistics and bits that its scores need.
  __device__ __forceinline__ void load_queries(const hopper_wide_job &job, int head, int query, int pattern) const {
    const int slot = steps % M::slots;
    const uint32_t full = base + M::q_full + 8 * slot;
    this->wait_empty(M::q_empty, slot, steps / M::slots);
    shared_store_4i(base + M::step + 16 * slot, pattern >= 0, query, head, 0);
    mbarrier_arrive_expect(full, M::k_bytes + 256 + (pattern >= 0 ? M::bits_bytes : 0));
    hopper_wide_load<M::k_bytes>(base + M::q + slot * M::k_bytes, &c.q, query, head * c.q_head_step,
                                 job.batch * c.q_batch_step, full);
    const int64_t row = (int64_t)(job.batch * c.heads + head) * c.padded + query;
    bulk_load(base + M::lse + slot * 256, c.lse_log2 + row, 256, full);
    if (pattern < 0) return;
    bulk_load(base + M::bits + slot * M::bits_bytes,
              c.plan.col_bits + (int64_t)pattern * 512 + query / 64 % 2 * 256 + job.block % 2 * 128, M::bits_bytes,
              full);
  }

  __device__ __forceinline__ void load_dout(const hopper_wide_job &job, int head, int query) const {
    const int slot = steps % M::slots;
    const uint32_t full = base + M::dout_full + 8 * slot;
    this->wait_empty(M::dout_empty, slot, steps / M::slots);
    mbarrier_arrive_expect(full, M::v_bytes + 256);
    hopper_wide_load<M::v_bytes>(base + M::dout + slot * M::v_bytes, &c.dout, query, head * c.dout_head_step,
                                 job.batch * c.dout_batch_step, full);
    const int64_t row = (int64_t)(job.batch * c.heads + head) * c.padded + query;
    bulk_load(base + M::delta + slot * 256, c.delta + row, 256, full);
  }

  __device__ __forceinline__ void load_job(const hopper_wide_job &job) {
    bool first = true;
#pragma unroll 1
    for (int head = job.head * c.group; head < (job.head + 1) * c.group; head++) {
      hopper_wide_each_step(c.plan.col_runs, runs_of(job.batch, head, job.block), [&](int query, int pattern) {
        load_queries(job, head, query, pattern);
        if (first) load_keys(job);
        load_dout(job, head, query);
        if (first) load_values(job);
        first = false;
        steps++;
      });
    }
    jobs++;
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int n = 0;; n++) {
      const hopper_wide_job job = next_job();
      if (lane == 0) this->announce(n, job);
      if (job.steps < 0) return;
      if (lane == 0 && job.steps > 0) load_job(job);
      __syncwarp();
    }
  }
};

template <class SHAPE, bool CAREFUL>
struct hopper_wide_queries_producer : hopper_wide_producer<hopper_wide_queries_memory<SHAPE, CAREFUL>> {
  using M = hopper_wide_queries_memory<SHAPE, CAREFUL>;
  using B = hopper_wide_producer<M>;
  using B::B;
  using B::base, B::c, B::jobs, B::lane, B::steps;

  __device__ __forceinline__ const int64_t *runs_of(const hopper_wide_job &job) const {
    return c.plan.row_start + sa_device_plane(c.plan, job.batch, job.head) * c.plan.row_tiles + job.block;
  }

  __device__ __forceinline__ hopper_wide_job next_job() const {
    const int blocks = c.plan.row_tiles;
#pragma unroll 1
    for (;;) {
      const int id = this->take(2 + CAREFUL);
      if (id >= c.batch * c.heads * blocks) return {0, -1, 0, 0};
      const int key_flat = id / blocks / c.group, in_group = id / blocks % c.group;
      const int flat = (c.sorted ? c.head_order[key_flat] : key_flat) * c.group + in_group;
      hopper_wide_job job;
      job.batch = flat / c.heads;
      job.head = flat % c.heads;
      job.block = c.plan.row_order[sa_device_plane(c.plan, job.batch, job.head) * blocks + id % blocks];
      if (CAREFUL && !c.bad_query[flat * blocks + job.block]) continue;
      job.steps = 2 * hopper_wide_tiles(c.plan.row_runs, runs_of(job), lane);
      // hopper_backward_rows has written the zeros of rows that see nothing.
      if (job.steps > 0) return job;
    }
  }

  __device__ __forceinline__ void load_queries(const hopper_wide_job &job, int w) const {
    const uint32_t full = base + M::q_full + 8 * w;
    this->wait_empty(M::q_empty, w, jobs);
    mbarrier_arrive_expect(full, M::k_bytes);
    hopper_wide_load<M::k_bytes>(base + M::q + w * M::k_bytes, &c.q, job.block * SA_TILE + w * HOPPER_WIDE_ROWS,
                                 job.head * c.q_head_step, job.batch * c.q_batch_step, full);
  }

  __device__ __forceinline__ void load_dout(const hopper_wide_job &job, int w) const {
    const uint32_t full = base + M::dout_full + 8 * w;
    this->wait_empty(M::dout_empty, w, jobs);
    mbarrier_arrive_expect(full, M::v_bytes);
    hopper_wide_load<M::v_bytes>(base + M::dout + w * M::v_bytes, &c.dout, job.block * SA_TILE + w * HOPPER_WIDE_ROWS,
                                 job.head * c.dout_head_step, job.batch * c.dout_batch_step, full);
  }

  __device__ __forceinline__ void load_keys(const hopper_wide_job &job, int key) const {
    const int slot = steps % M::k_slots;
    const uint32_t full = base + M::k_full + 8 * slot;
    this->wait_empty(M::k_empty, slot, steps / M::k_slots);
    mbarrier_arrive_expect(full, M::k_bytes);
    hopper_wide_load<M::k_bytes>(base + M::k + slot * M::k_bytes, &c.k, key, job.head / c.group * c.k_head_step,
                                 job.batch * c.k_batch_step, full);
  }

  // V of a step, and the bits of its tile.
  __device__ __forceinline__ void load_values(const hopper_wide_job &job, int key, int pattern) const {
    const int slot = steps % M::v_slots;
    const uint32_t full = base + M::v_full + 8 * slot;
    this->wait_empty(M::v_empty, slot, steps / M::v_slots);
    shared_store_4i(base + M::step + 16 * slot, pattern >= 0, key, 0, 0);
    mbarrier_arrive_expect(full, M::v_bytes + (pattern >= 0 ? HOPPER_WIDE_BITS : 0));
    hopper_wide_load<M::v_bytes>(base + M::v + slot * M::v_bytes, &c.v, key, job.head / c.group * c.v_head_step,
                                 job.batch * c.v_batch_step, full);
    if (pattern < 0) return;
    bulk_load(base + M::bits + slot * HOPPER_WIDE_BITS, c.plan.row_bits + (int64_t)pattern * 256, HOPPER_WIDE_BITS,
              full);
  }

  // What is free first comes first: Q of the job before is there until its dQ has left.
  __device__ __forceinline__ void load_job(const hopper_wide_job &job) {
    bool first = true;
    hopper_wide_each_step(c.plan.row_runs, runs_of(job), [&](int key, int pattern) {
      load_keys(job, key);
      for (int w = 0; w < 2 && first; w++) load_dout(job, w);
      load_values(job, key, pattern);
      for (int w = 0; w < 2 && first; w++) load_queries(job, w);
      first = false;
      steps++;
    });
    jobs++;
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int n = 0;; n++) {
      const hopper_wide_job job = next_job();
      if (lane == 0) this->announce(n, job);
      if (job.steps < 0) return;
      if (lane == 0 && job.steps > 0) load_job(job);
      __syncwarp();
    }
  }
};

/*  Warpgroups 1 and 2  */

// A thread of a warpgroup that multiplies. Its rows of the warpgroup's 64 are row() and row() + 8.
template <class MEMORY, bool CAREFUL>
struct hopper_wide_consumer {
  using M = MEMORY;
  using type = typename M::type;

  const hopper_backward_call &c;
  const uint32_t base;
  const int lane = threadIdx.x % 32, w = threadIdx.x / 128 - 1, t = threadIdx.x % 128, warp = threadIdx.x % 128 / 32;
  int4 job;  // hopper_wide_job

  __device__ __forceinline__ hopper_wide_consumer(const hopper_backward_call &call, uint32_t start)
      : c(call), base(start) {}

  __device__ __forceinline__ int row() const { return warp * 16 + lane / 4; }

  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    if (lane == 0) mbarrier_arrive(base + barrier);
  }

  __device__ __forceinline__ void wait_full(uint32_t barrier, int slot, int round) const {
    mbarrier_wait(base + barrier + 8 * slot, round & 1);
  }

  __device__ __forceinline__ void wait_job(int n) {
    wait_full(M::job_full, n & 1, n >> 1);
    job = shared_load_4i(base + M::job + 16 * (n & 1));
  }

  __device__ __forceinline__ void release_job(int n) const {
    __syncwarp();
    arrive(M::job_empty + 8 * (n & 1));
  }

  __device__ __forceinline__ void both() const { named_barrier_sync(HOPPER_WIDE_BOTH, 256); }

  // Pairs of halves, each thread its own: in shared memory as [4][128] pieces of 16 bytes.
  __device__ __forceinline__ void store_pairs(uint32_t to, const uint32_t (&x)[16]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      shared_store_4i(base + to + i * 2048 + t * 16, x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    }
  }

  // What a row (this thread's, `down` 0 or 1) has in stored pairs for a column.
  __device__ __forceinline__ float stored(uint32_t from, int down, int column) const {
    const int i = column / 8 * 2 + down, owner = (t & ~3) + column % 8 / 2;
    const uint32_t pair = shared_load(base + from + i / 4 * 2048 + owner * 16 + i % 4 * 4);
    return column & 1 ? hopper_high<type>(pair) : hopper_low<type>(pair);
  }

  // Rows of a gradient, 64 of `rows`, written as halves: zeros, where nothing is visible.
  __device__ __forceinline__ void write_zeros(const sa_operand &to, int first, int rows, int width) const {
    const int row = first + t / 2;
    if (!to.data || row >= rows) return;
    type *at = hopper_rows<type>(to, job.z, job.w) + row * to.stride[2];
    for (int piece = t % 2; piece < width / 8; piece += 2) *(uint4 *)(at + piece * 8) = make_uint4(0, 0, 0, 0);
  }

  // Sums as halves to the buffer at `through`, and from there to rows `first` .. of a gradient; whoever waits at
  // `empty` may then have the buffer. Says whether a result is not finite.
  template <int N>
  __device__ __forceinline__ bool write(const float (&x)[N], float factor, const CUtensorMap *map, bool wanted,
                                        int first, uint32_t through, uint32_t empty) const {
    const uint32_t to = base + through + (warp * 16 + (lane & 15)) * 128, piece = (lane >> 4 ^ (lane & 7)) << 4;
    const uint32_t seen = hopper_store_halves<type>(x, factor, to, piece, HOPPER_WIDE_PANEL_BYTES);
    async_proxy_fence();
    named_barrier_sync(HOPPER_WIDE_WARPGROUP + w, 128);
    if (t == 0) {
#pragma unroll
      for (int panel = 0; panel < N / 32; panel++) {
        if (!wanted) continue;
        tma_store(map, panel * SA_PANEL, first, job.w, job.z, base + through + panel * HOPPER_WIDE_PANEL_BYTES);
      }
      bulk_commit();
      bulk_wait_read<0>();
      mbarrier_arrive(base + empty);
    }
    __syncwarp();
    return seen != 0;
  }
};

// What the two warpgroups of the pass over keys have in common: a key per row, 64 queries of a step along the columns.
template <class SHAPE, bool CAREFUL>
struct hopper_wide_keys_consumer : hopper_wide_consumer<hopper_wide_keys_memory<SHAPE, CAREFUL>, CAREFUL> {
  using M = hopper_wide_keys_memory<SHAPE, CAREFUL>;
  using B = hopper_wide_consumer<M, CAREFUL>;
  using type = typename B::type;
  using B::B;
  using B::base, B::c, B::job, B::lane, B::t, B::w;

  __device__ __forceinline__ bool masked(int g) const { return shared_load(base + M::step + 16 * (g % M::slots)); }

  // Masked entries become 0, whatever they held.
  __device__ __forceinline__ void select_visible(float (&x)[32], int g) const {
    if (!masked(g)) return;
    const uint32_t bits = shared_load(base + M::bits + g % M::slots * M::bits_bytes + t * 4);
#pragma unroll
    for (int i = 0; i < 32; i++) x[i] = bits >> i & 1 ? x[i] : 0.f;
  }

  // Calls use(group of eight queries, the statistics of this thread's two) for the row statistics at `from`.
  template <class Use>
  __device__ __forceinline__ void each_statistic(uint32_t from, int g, Use use) const {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float4 x = shared_load_4(base + from + g % M::slots * 256 + j * 64 + lane % 4 * 16);
      use(2 * j, x.x, x.y);
      use(2 * j + 1, x.z, x.w);
    }
  }

  __device__ __forceinline__ void note(bool bad) const {
    if (!CAREFUL && bad) {
      c.bad_key[(job.z * c.key_heads + job.w) * 2 * c.plan.col_tiles + job.x] = *c.flagged = 1;
    }
  }

  // The careful launch, once S and dP of a step are there and its pairs stored: replaces what is not finite in the 64
  // rows at `at`, whose products follow.
  template <int PANELS>
  __device__ __forceinline__ void clean(uint32_t at, uint32_t notes) const {
    B::both();
    if (t < 64) {
      const bool bad = hopper_clean_row<type, PANELS, 64>(base + at, base + at, t);
      shared_store(base + notes + 4 * t, bad);
    }
    async_proxy_fence();
    B::both();
  }

  // And then adds its products: of stored pairs and the rows of an operand.
  template <int N>
  __device__ __forceinline__ void repair(float (&d)[N], int g, uint32_t pairs, uint32_t notes,
                                         const sa_operand &operand, int width) const {
    const int4 step = shared_load_4i(base + M::step + 16 * (g % M::slots));
    const type *source = hopper_rows<type>(operand, job.z, step.z) + step.y * operand.stride[2] + lane % 4 * 2;
#pragma unroll 1
    for (int i = 0; i < 64; i++) {
      if (!shared_load(base + notes + 4 * i)) continue;
      uint32_t bits = ~0u;
      if (step.x) bits = shared_load(base + M::bits + g % M::slots * M::bits_bytes + ((t & ~3) + i % 8 / 2) * 4);
      bits >>= i / 8 * 4 + i % 2;
      hopper_add_nonfinite(d, source + i * operand.stride[2], width - lane % 4 * 2, B::stored(pairs, 0, i),
                           B::stored(pairs, 1, i), bits & 1, bits >> 2 & 1);
    }
    __syncwarp();
  }
};

// Warpgroup 1 of the pass over keys: P and dV.
template <class SHAPE, bool CAREFUL>
struct hopper_wide_dv : hopper_wide_keys_consumer<SHAPE, CAREFUL> {
  using B = hopper_wide_keys_consumer<SHAPE, CAREFUL>;
  using M = typename B::M;
  using type = typename B::type;
  using B::B;
  using B::base, B::c, B::job;

  float dv[M::value_width / 2], s[32];
  uint32_t p[16];

  // S^T = K Q^T.
  __device__ __forceinline__ void start_scores(int g) {
    B::wait_full(M::q_full, g % M::slots, g / M::slots);
    wgmma_fence();
    hopper_product_rows_rows<type, M::width / 16, HOPPER_WIDE_PANEL_BYTES, HOPPER_WIDE_PANEL_BYTES>(
        s, wgmma_operand(base + M::k, 0), wgmma_operand(base + M::q, 0) + g % M::slots * (M::k_bytes >> 4));
    wgmma_commit();
  }

  // dV += P^T dO.
  __device__ __forceinline__ void start_dv(int g) {
    B::wait_full(M::dout_full, g % M::slots, g / M::slots);
    wgmma_fence();
    hopper_product_registers<type, 4>(
        dv, p, wgmma_operand(base + M::dout, HOPPER_WIDE_PANEL_BYTES) + g % M::slots * (M::v_bytes >> 4));
    wgmma_commit();
  }

  __device__ __forceinline__ void probabilities(int g) {
    B::each_statistic(M::lse, g, [&](int j, float minus0, float minus1) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        s[4 * j + i] = exp2_fast(fmaf(s[4 * j + i], c.scale_log2, i & 1 ? minus1 : minus0));
      }
    });
    B::select_visible(s, g);
  }

  __device__ __forceinline__ uint32_t pairs(int g) const {
    return M::p + (g & 1) * M::pairs_bytes;
  }

  // P to the other warpgroup, the next S, dV; P of the next step under dV.
  template <bool MORE>
  __device__ __forceinline__ void step(int g) {
    const uint32_t q_empty = M::q_empty + 8 * (g % M::slots);
#pragma unroll
    for (int i = 0; i < 16; i++) p[i] = pack_halves<type>(s[2 * i], s[2 * i + 1]);
    mbarrier_wait(base + M::p_empty + 8 * (g & 1), (g >> 1 & 1) ^ 1);
    B::store_pairs(pairs(g), p);
    __syncwarp();
    B::arrive(M::p_full + 8 * (g & 1));
    if constexpr (CAREFUL) {
      B::template clean<M::value_width / SA_PANEL>(M::dout + g % M::slots * M::v_bytes, M::bad_dout);
    } else {
      B::arrive(q_empty);
    }
    if constexpr (MORE) start_scores(g + 1);
    start_dv(g);
    if constexpr (CAREFUL) {
      wgmma_wait<0>();
      B::repair(dv, g, pairs(g), M::bad_dout, c.dout_values, c.value_width);
      B::arrive(q_empty);
    }
    if constexpr (MORE) {
      wgmma_wait<1>();
      probabilities(g + 1);
    }
    wgmma_wait<0>();
    B::arrive(M::dout_empty + 8 * (g % M::slots));
  }

  __device__ __forceinline__ void run() {
    int g = 0, parity = 0;  // steps are counted across the jobs: they name the slots
#pragma unroll 1
    for (int n = 0;; n++) {
      B::wait_job(n);
      if (job.y < 0) break;
      if (job.y == 0) {
        B::write_zeros(c.dv_out, job.x * HOPPER_WIDE_ROWS, c.keys, c.value_width);
      } else {
        const int end = g + job.y;
#pragma unroll
        for (int i = 0; i < M::value_width / 2; i++) dv[i] = 0.f;
        mbarrier_wait(base + M::k_full, parity);
        parity ^= 1;
        start_scores(g);
        wgmma_wait<0>();
        probabilities(g);
        // The loop turns where nothing is in flight: ptxas serialises products whose result crosses a back edge and is
        // then read (C7514).
#pragma unroll 1
        for (; g + 1 < end; g++) step<true>(g);
        step<false>(g);
        // The other warpgroup, which has read the last P, is done with V.
        mbarrier_wait(base + M::p_empty + 8 * (g & 1), g >> 1 & 1);
        B::note(B::write(dv, 1.f, &c.dv, c.dv_out.data, job.x * HOPPER_WIDE_ROWS, M::v, M::v_empty));
        g++;
      }
      B::release_job(n);
    }
  }
};

// Warpgroup 2 of the pass over keys: dS and dK.
template <class SHAPE, bool CAREFUL>
struct hopper_wide_dk : hopper_wide_keys_consumer<SHAPE, CAREFUL> {
  using B = hopper_wide_keys_consumer<SHAPE, CAREFUL>;
  using M = typename B::M;
  using type = typename B::type;
  using B::B;
  using B::base, B::c, B::job, B::t;

  float dk[M::width / 2], dp[32];
  uint32_t ds[16];

  // dP^T = V dO^T.
  __device__ __forceinline__ void start_dp(int g) {
    B::wait_full(M::dout_full, g % M::slots, g / M::slots);
    wgmma_fence();
    hopper_product_rows_rows<type, M::value_width / 16, HOPPER_WIDE_PANEL_BYTES, HOPPER_WIDE_PANEL_BYTES>(
        dp, wgmma_operand(base + M::v, 0), wgmma_operand(base + M::dout, 0) + g % M::slots * (M::v_bytes >> 4));
    wgmma_commit();
  }

  // dK += dS^T Q.
  __device__ __forceinline__ void start_dk(int g) {
    B::wait_full(M::q_full, g % M::slots, g / M::slots);
    wgmma_fence();
    hopper_product_registers<type, 4>(
        dk, ds, wgmma_operand(base + M::q, HOPPER_WIDE_PANEL_BYTES) + g % M::slots * (M::k_bytes >> 4));
    wgmma_commit();
  }

  // dP - delta: the last that needs dO of the step.
  __device__ __forceinline__ void differences(int g) {
    B::each_statistic(M::delta, g, [&](int j, float delta0, float delta1) {
#pragma unroll
      for (int i = 0; i < 4; i++) dp[4 * j + i] -= i & 1 ? delta1 : delta0;
    });
    __syncwarp();
    B::arrive(M::dout_empty + 8 * (g % M::slots));
  }

  // dS, the next dP, dK.
  template <bool MORE>
  __device__ __forceinline__ void step(int g) {
    B::wait_full(M::p_full, g & 1, g >> 1);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int4 p = shared_load_4i(base + M::p + (g & 1) * M::pairs_bytes + i * 2048 + t * 16);
      const uint32_t pairs[4] = {(uint32_t)p.x, (uint32_t)p.y, (uint32_t)p.z, (uint32_t)p.w};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        dp[8 * i + 2 * k] *= hopper_low<type>(pairs[k]);
        dp[8 * i + 2 * k + 1] *= hopper_high<type>(pairs[k]);
      }
    }
    __syncwarp();
    B::arrive(M::p_empty + 8 * (g & 1));
    B::select_visible(dp, g);  // again: 0 * NaN must be 0 here
#pragma unroll
    for (int i = 0; i < 16; i++) ds[i] = pack_halves<type>(dp[2 * i], dp[2 * i + 1]);
    if constexpr (CAREFUL) {
      B::store_pairs(M::ds, ds);
      B::template clean<M::width / SA_PANEL>(M::q + g % M::slots * M::k_bytes, M::bad_q);
    }
    if constexpr (MORE) start_dp(g + 1);
    start_dk(g);
    if constexpr (CAREFUL) {
      wgmma_wait<0>();
      B::repair(dk, g, M::ds, M::bad_q, c.q_values, c.width);
      named_barrier_sync(HOPPER_WIDE_WARPGROUP + B::w, 128);  // nobody stores the next dS before
    }
    if constexpr (MORE) {
      wgmma_wait<1>();
      differences(g + 1);
    }
    wgmma_wait<0>();
    B::arrive(M::q_empty + 8 * (g % M::slots));
  }

  __device__ __forceinline__ void run() {
    int g = 0, parity = 0;
#pragma unroll 1
    for (int n = 0;; n++) {
      B::wait_job(n);
      if (job.y < 0) break;
      if (job.y == 0) {
        B::write_zeros(c.dk_out, job.x * HOPPER_WIDE_ROWS, c.keys, c.width);
      } else {
        const int end = g + job.y;
#pragma unroll
        for (int i = 0; i < M::width / 2; i++) dk[i] = 0.f;
        mbarrier_wait(base + M::v_full, parity);
        parity ^= 1;
        start_dp(g);
        wgmma_wait<0>();
        differences(g);
#pragma unroll 1
        for (; g + 1 < end; g++) step<true>(g);
        step<false>(g++);
        // The other warpgroup, which has sent the last P, is done with K.
        B::note(B::write(dk, c.scale, &c.dk, c.dk_out.data, job.x * HOPPER_WIDE_ROWS, M::k, M::k_empty));
      }
      B::release_job(n);
    }
  }
};

// A warpgroup of the pass over queries: dQ of 64 of them, a query per row, 64 keys of a step along the columns.
template <class SHAPE, bool CAREFUL>
struct hopper_wide_dq : hopper_wide_consumer<hopper_wide_queries_memory<SHAPE, CAREFUL>, CAREFUL> {
  using M = hopper_wide_queries_memory<SHAPE, CAREFUL>;
  using B = hopper_wide_consumer<M, CAREFUL>;
  using type = typename B::type;
  using B::B;
  using B::base, B::c, B::job, B::lane, B::t, B::w, B::warp;

  float dq[M::width / 2], s[32], dp[32];
  uint32_t ds[16];
  float minus[2], delta[2];  // of the thread's rows: -lse * log2(e), and delta

  // S = Q K^T.
  __device__ __forceinline__ void start_scores(int g) {
    B::wait_full(M::k_full, g % M::k_slots, g / M::k_slots);
    wgmma_fence();
    hopper_product_rows_rows<type, M::width / 16, HOPPER_WIDE_PANEL_BYTES, HOPPER_WIDE_PANEL_BYTES>(
        s, wgmma_operand(base + M::q, 0) + w * (M::k_bytes >> 4),
        wgmma_operand(base + M::k, 0) + g % M::k_slots * (M::k_bytes >> 4));
    wgmma_commit();
  }

  // dP = dO V^T.
  __device__ __forceinline__ void start_dp(int g) {
    B::wait_full(M::v_full, g % M::v_slots, g / M::v_slots);
    wgmma_fence();
    hopper_product_rows_rows<type, M::value_width / 16, HOPPER_WIDE_PANEL_BYTES, HOPPER_WIDE_PANEL_BYTES>(
        dp, wgmma_operand(base + M::dout, 0) + w * (M::v_bytes >> 4),
        wgmma_operand(base + M::v, 0) + g % M::v_slots * (M::v_bytes >> 4));
    wgmma_commit();
  }

  // dQ += dS K.
  __device__ __forceinline__ void start_dq(int g) {
    wgmma_fence();
    hopper_product_registers<type, 4>(
        dq, ds, wgmma_operand(base + M::k, HOPPER_WIDE_PANEL_BYTES) + g % M::k_slots * (M::k_bytes >> 4));
    wgmma_commit();
  }

  __device__ __forceinline__ void probabilities() {
#pragma unroll
    for (int i = 0; i < 32; i++) s[i] = exp2_fast(fmaf(s[i], c.scale_log2, minus[i / 2 & 1]));
  }

  // Bits of this thread's rows and the 64 keys of a step, if it has any.
  __device__ __forceinline__ uint32_t bits_at(int g) const {
    return base + M::bits + g % M::v_slots * HOPPER_WIDE_BITS + (w * 4 + warp) * 256;
  }

  // Masked pairs become 0 here, whatever P and dP held.
  __device__ __forceinline__ void gradients(int g) {
#pragma unroll
    for (int i = 0; i < 32; i++) s[i] *= dp[i] - delta[i / 2 & 1];
    if (shared_load(base + M::step + 16 * (g % M::v_slots))) {
      const int shift = shared_load(base + M::step + 16 * (g % M::v_slots) + 4) % SA_TILE / 4;
      const uint32_t upper = shared_load(bits_at(g) + lane * 8) >> shift,
                     lower = shared_load(bits_at(g) + lane * 8 + 4) >> shift;
#pragma unroll
      for (int i = 0; i < 32; i++) s[i] = (i & 2 ? lower : upper) >> (i / 4 * 2 + i % 2) & 1 ? s[i] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < 16; i++) ds[i] = pack_halves<type>(s[2 * i], s[2 * i + 1]);
  }

  // dS, the next S, dQ; P of the next step under dQ, then dP.
  template <bool MORE>
  __device__ __forceinline__ void step(int g) {
    gradients(g);
    if constexpr (CAREFUL) {
      clean(g);
    } else {
      release_values(g);
    }
    if constexpr (MORE) start_scores(g + 1);
    start_dq(g);
    if constexpr (CAREFUL) {
      wgmma_wait<0>();
      repair(g);
      release_values(g);
    }
    if constexpr (MORE) {
      wgmma_wait<1>();
      probabilities();
      start_dp(g + 1);
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    B::arrive(M::k_empty + 8 * (g % M::k_slots));
    if constexpr (MORE) wgmma_wait<0>();
  }

  __device__ __forceinline__ void release_values(int g) const {
    __syncwarp();
    B::arrive(M::v_empty + 8 * (g % M::v_slots));
  }

  __device__ __forceinline__ void load_statistics() {
    const int64_t at = (int64_t)(job.z * c.heads + job.w) * c.padded +
                       hopper_backward_slot(job.x * SA_TILE + w * HOPPER_WIDE_ROWS + B::row());
#pragma unroll
    for (int i = 0; i < 2; i++) {
      minus[i] = c.lse_log2[at + 2 * i];
      delta[i] = c.delta[at + 2 * i];
    }
  }

  __device__ __forceinline__ void run() {
    int g = 0, parity = 0;
#pragma unroll 1
    for (int n = 0;; n++) {
      B::wait_job(n);
      if (job.y < 0) break;
      const int first = job.x * SA_TILE + w * HOPPER_WIDE_ROWS;
      const int end = g + job.y;
#pragma unroll
      for (int i = 0; i < M::width / 2; i++) dq[i] = 0.f;
      load_statistics();
      mbarrier_wait(base + M::q_full + 8 * w, parity);
      start_scores(g);
      mbarrier_wait(base + M::dout_full + 8 * w, parity);
      start_dp(g);
      parity ^= 1;
      wgmma_wait<1>();
      probabilities();
      wgmma_wait<0>();
      // The loop turns where nothing is in flight (C7514).
#pragma unroll 1
      for (; g + 1 < end; g++) step<true>(g);
      B::arrive(M::dout_empty + 8 * w);
      step<false>(g++);
      const bool bad = B::write(dq, c.scale, &c.dq_map, true, first, M::q + w * M::k_bytes, M::q_empty + 8 * w);
      if (!CAREFUL && bad) {
        c.bad_query[(job.z * c.heads + job.w) * c.plan.row_tiles + job.x] = *c.flagged = 1;
      }
      B::release_job(n);
    }
  }

  // The careful launch. V is not needed any more once both warpgroups have dP: its buffer takes dS.

  __device__ __forceinline__ uint32_t pairs(int g) const {
    return M::v + g % M::v_slots * M::v_bytes + w * 8192;
  }

  __device__ __forceinline__ void clean(int g) const {
    const uint32_t at = base + M::k + g % M::k_slots * M::k_bytes;
    B::both();
    B::store_pairs(pairs(g), ds);
    if (w == 0 && t < 64) {
      const bool bad = hopper_clean_row<type, M::width / SA_PANEL, 64>(at, at, t);
      shared_store(base + M::bad_k + 4 * t, bad);
    }
    async_proxy_fence();
    B::both();
  }

  __device__ __forceinline__ void repair(int g) {
    const int4 step = shared_load_4i(base + M::step + 16 * (g % M::v_slots));
    const int64_t stride = c.k_values.stride[2];
    const type *source = hopper_rows<type>(c.k_values, job.z, job.w / c.group) + step.y * stride + lane % 4 * 2;
#pragma unroll 1
    for (int j = 0; j < 64; j++) {
      if (!shared_load(base + M::bad_k + 4 * j)) continue;
      bool visible[2] = {true, true};
      for (int down = 0; down < 2 && step.x; down++) {
        const uint32_t bits = shared_load(bits_at(g) + (lane & ~3) * 8 + j % 8 / 2 * 8 + down * 4);
        visible[down] = bits >> (step.y % SA_TILE / 4 + j / 8 * 2 + j % 2) & 1;
      }
      hopper_add_nonfinite(dq, source + j * stride, c.width - lane % 4 * 2, B::stored(pairs(g), 0, j),
                           B::stored(pairs(g), 1, j), visible[0], visible[1]);
    }
    async_proxy_fence();
  }
};

/*  The launches  */

template <class SHAPE, bool CAREFUL>
__global__ void __launch_bounds__(HOPPER_WIDE_THREADS, 1)
    hopper_wide_keys(const __grid_constant__ hopper_backward_call c) {
  using M = hopper_wide_keys_memory<SHAPE, CAREFUL>;
  const uint8_t *memory = dynamic_shared<uint8_t>();
  const uint32_t base = dynamic_shared_address(memory);
  const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
  if (CAREFUL && !*c.flagged) return;

  if (threadIdx.x == 0) {
    if (shared_address(memory) != base) __trap();
    mbarrier_init(base + M::k_full, 1);
    mbarrier_init(base + M::v_full, 1);
    mbarrier_init(base + M::k_empty, 1);
    mbarrier_init(base + M::v_empty, 1);
    for (int i = 0; i < 2; i++) {
      mbarrier_init(base + M::job_full + 8 * i, 1);
      mbarrier_init(base + M::job_empty + 8 * i, 8);
      mbarrier_init(base + M::p_full + 8 * i, 4);
      mbarrier_init(base + M::p_empty + 8 * i, 4);
    }
    for (int i = 0; i < M::slots; i++) {
      mbarrier_init(base + M::q_full + 8 * i, 1);
      mbarrier_init(base + M::q_empty + 8 * i, 8);
      mbarrier_init(base + M::dout_full + 8 * i, 1);
      mbarrier_init(base + M::dout_empty + 8 * i, 8);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp < 4) {
    registers_give_back<HOPPER_WIDE_PRODUCER_REGISTERS>();
    if (warp == 0) hopper_wide_keys_producer<SHAPE, CAREFUL>(c, base).run();
  } else {
    registers_take<HOPPER_WIDE_CONSUMER_REGISTERS>();
    if (warp < 8) {
      hopper_wide_dv<SHAPE, CAREFUL>(c, base).run();
    } else {
      hopper_wide_dk<SHAPE, CAREFUL>(c, base).run();
    }
  }
}

template <class SHAPE, bool CAREFUL>
__global__ void __launch_bounds__(HOPPER_WIDE_THREADS, 1)
    hopper_wide_queries(const __grid_constant__ hopper_backward_call c) {
  using M = hopper_wide_queries_memory<SHAPE, CAREFUL>;
  const uint8_t *memory = dynamic_shared<uint8_t>();
  const uint32_t base = dynamic_shared_address(memory);
  const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
  if (CAREFUL && !*c.flagged) return;

  if (threadIdx.x == 0) {
    if (shared_address(memory) != base) __trap();
    for (int i = 0; i < 2; i++) {
      mbarrier_init(base + M::job_full + 8 * i, 1);
      mbarrier_init(base + M::job_empty + 8 * i, 8);
      mbarrier_init(base + M::q_full + 8 * i, 1);
      mbarrier_init(base + M::q_empty + 8 * i, 1);
      mbarrier_init(base + M::dout_full + 8 * i, 1);
      mbarrier_init(base + M::dout_empty + 8 * i, 4);
    }
    for (int i = 0; i < M::k_slots; i++) {
      mbarrier_init(base + M::k_full + 8 * i, 1);
      mbarrier_init(base + M::k_empty + 8 * i, 8);
    }
    for (int i = 0; i < M::v_slots; i++) {
      mbarrier_init(base + M::v_full + 8 * i, 1);
      mbarrier_init(base + M::v_empty + 8 * i, 8);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp < 4) {
    registers_give_back<HOPPER_WIDE_PRODUCER_REGISTERS>();
    if (warp == 0) hopper_wide_queries_producer<SHAPE, CAREFUL>(c, base).run();
  } else {
    registers_take<HOPPER_WIDE_CONSUMER_REGISTERS>();
    hopper_wide_dq<SHAPE, CAREFUL>(c, base).run();
  }
}

// Both passes and their careful ones, after the row statistics.
template <class SHAPE>
int hopper_wide_passes(const char *function, const hopper_backward_call &c, int processors, cudaStream_t stream) {
  const int row_tiles = c.batch * c.heads * c.plan.row_tiles;
  const unsigned key_blocks = (unsigned)(c.jobs < processors ? c.jobs : processors);
  const unsigned query_blocks = (unsigned)(row_tiles < processors ? row_tiles : processors);
  const bool keys = c.dk_out.data || c.dv_out.data, queries = c.dq_out.data;
  int status = SA_OK;
  if (keys) {
    status = sa_cuda_launch(function, hopper_wide_keys<SHAPE, false>, key_blocks, HOPPER_WIDE_THREADS,
                            hopper_wide_keys_memory<SHAPE, false>::bytes, stream, c);
  }
  if (!status && queries) {
    status = sa_cuda_launch(function, hopper_wide_queries<SHAPE, false>, query_blocks, HOPPER_WIDE_THREADS,
                            hopper_wide_queries_memory<SHAPE, false>::bytes, stream, c);
  }
  if (!status && keys) {
    status = sa_cuda_launch(function, hopper_wide_keys<SHAPE, true>, key_blocks, HOPPER_WIDE_THREADS,
                            hopper_wide_keys_memory<SHAPE, true>::bytes, stream, c);
  }
  if (!status && queries) {
    status = sa_cuda_launch(function, hopper_wide_queries<SHAPE, true>, query_blocks, HOPPER_WIDE_THREADS,
                            hopper_wide_queries_memory<SHAPE, true>::bytes, stream, c);
  }
  return status;
}

#endif
