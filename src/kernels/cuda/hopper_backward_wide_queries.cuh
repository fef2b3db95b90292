// dQ of heads wider than 128 on Hopper: the pass over queries (hopper_backward_wide.cuh)
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WIDE_QUERIES_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WIDE_QUERIES_CUH
#include "kernels/cuda/hopper_backward_wide_jobs.cuh"

// Shared memory of the pass over queries, from where it starts; Q and dO twice, one a warpgroup.
template <class SHAPE, bool CAREFUL>
struct hopper_wide_queries_memory : SHAPE {
  using S = SHAPE;
  static constexpr int k_slots = S::width > 192 ? 2 : 3, v_slots = S::width > 192 ? 1 : 2;
  static constexpr uint32_t q = 0, dout = q + 2 * S::k_bytes, k = dout + 2 * S::v_bytes, v = k + k_slots * S::k_bytes,
                            bits = v + v_slots * S::v_bytes, step = bits + v_slots * HOPPER_WIDE_BITS,
                            job = step + v_slots * 16, bad_k = job + 2 * 16, end = bad_k + (CAREFUL ? 256 : 0);
  static constexpr uint32_t job_full = HOPPER_WIDE_QUERIES_MBARRIERS, job_empty = job_full + 16,
                            q_full = job_empty + 16, q_empty = q_full + 16, dout_full = q_empty + 16,
                            dout_empty = dout_full + 16, k_full = dout_empty + 16, k_empty = k_full + 8 * k_slots,
                            v_full = k_empty + 8 * k_slots, v_empty = v_full + 8 * v_slots;
  static_assert(end <= HOPPER_WIDE_KEYS_MBARRIERS && v_empty + 8 * v_slots <= HOPPER_WIDE_BYTES, "");

  static __device__ __forceinline__ void init(uint32_t base) {
    hopper_block_slots(base + job_full, base + job_empty, 2, 8);
    hopper_block_slots(base + q_full, base + q_empty, 2, 1);
    hopper_block_slots(base + dout_full, base + dout_empty, 2, 4);
    hopper_block_slots(base + k_full, base + k_empty, k_slots, 8);
    hopper_block_slots(base + v_full, base + v_empty, v_slots, 8);
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

#endif
