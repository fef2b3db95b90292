// dK and dV of heads wider than 128 on Hopper: the pass over keys (hopper_backward_wide.cuh)
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WIDE_KEYS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WIDE_KEYS_CUH
#include "kernels/cuda/hopper_backward_wide_jobs.cuh"

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
                            end = bad_dout + (CAREFUL ? 256 : 0);
  static constexpr uint32_t job_full = HOPPER_WIDE_KEYS_MBARRIERS, job_empty = job_full + 16, k_full = job_empty + 16,
                            k_empty = k_full + 8, v_full = k_empty + 8, v_empty = v_full + 8, p_full = v_empty + 8,
                            p_empty = p_full + 16, q_full = p_empty + 16, q_empty = q_full + 8 * slots,
                            dout_full = q_empty + 8 * slots, dout_empty = dout_full + 8 * slots;
  static_assert(end <= HOPPER_WIDE_KEYS_MBARRIERS && dout_empty + 8 * slots <= HOPPER_WIDE_QUERIES_MBARRIERS, "");

  static __device__ __forceinline__ void init(uint32_t base) {
    hopper_block_slots(base + job_full, base + job_empty, 2, 8);
    hopper_block_slots(base + k_full, base + k_empty, 1, 1);
    hopper_block_slots(base + v_full, base + v_empty, 1, 1);
    hopper_block_mbarriers(base + p_full, 2, 4);
    hopper_block_mbarriers(base + p_empty, 2, 4);
    hopper_block_slots(base + q_full, base + q_empty, slots, 8);
    hopper_block_slots(base + dout_full, base + dout_empty, slots, 8);
  }
};

// Its two sides: `held`, of the job, and `walked`, in slots, of its steps. The product of the rows of a side is S or
// dP; the gradient of what is held is a product of P or dS and what is walked, and leaves through the buffer of the
// former.

template <class M>  // K and Q: S, dK
struct hopper_wide_scores_side {
  static constexpr int width = M::width;
  static constexpr uint32_t bytes = M::k_bytes, held = M::k, held_full = M::k_full, held_empty = M::k_empty,
                            walked = M::q, full = M::q_full, empty = M::q_empty, statistics = M::lse, bad = M::bad_q;
};

template <class M>  // V and dO: dP, dV
struct hopper_wide_values_side {
  static constexpr int width = M::value_width;
  static constexpr uint32_t bytes = M::v_bytes, held = M::v, held_full = M::v_full, held_empty = M::v_empty,
                            walked = M::dout, full = M::dout_full, empty = M::dout_empty, statistics = M::delta,
                            bad = M::bad_dout;
};

template <class SHAPE, bool CAREFUL>
struct hopper_wide_keys_producer : hopper_wide_producer<hopper_wide_keys_memory<SHAPE, CAREFUL>> {
  using M = hopper_wide_keys_memory<SHAPE, CAREFUL>;
  using B = hopper_wide_producer<M>;
  using SCORES = hopper_wide_scores_side<M>;
  using VALUES = hopper_wide_values_side<M>;
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
      const int span = c.mixed * blocks, first = id / span * c.mixed;
      const int heads = min(c.mixed, c.batch * c.key_heads - first), place = first + id % span % heads;
      const int flat = c.sorted ? c.head_order[place] : place, rank = id % span / heads;
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

  // The rows of K or V that a job holds.
  template <class SIDE>
  __device__ __forceinline__ void load_held(const hopper_wide_job &job, const CUtensorMap *map, int head_step,
                                            int batch_step) const {
    this->wait_empty(SIDE::held_empty, 0, jobs);
    mbarrier_arrive_expect(base + SIDE::held_full, SIDE::bytes);
    hopper_wide_load<SIDE::bytes>(base + SIDE::held, map, job.block * HOPPER_WIDE_ROWS, job.head * head_step,
                                  job.batch * batch_step, base + SIDE::held_full);
  }

  // Q or dO of a step and the statistics of its rows; `more` bytes are still to come.
  template <class SIDE>
  __device__ __forceinline__ void load_walked(const hopper_wide_job &job, const CUtensorMap *map, int head, int query,
                                              int head_step, int batch_step, const float *statistics, int more) const {
    const int slot = steps % M::slots;
    const uint32_t full = base + SIDE::full + 8 * slot;
    mbarrier_arrive_expect(full, SIDE::bytes + 256 + more);
    hopper_wide_load<SIDE::bytes>(base + SIDE::walked + slot * SIDE::bytes, map, query, head * head_step,
                                  job.batch * batch_step, full);
    const int64_t row = (int64_t)(job.batch * c.heads + head) * c.padded + query;
    bulk_load(base + SIDE::statistics + slot * 256, statistics + row, 256, full);
  }

  // With Q, the bits that the scores of its step need.
  __device__ __forceinline__ void load_queries(const hopper_wide_job &job, int head, int query, int pattern) const {
    const int slot = steps % M::slots;
    this->wait_empty(M::q_empty, slot, steps / M::slots);
    shared_store_4i(base + M::step + 16 * slot, pattern >= 0, query, head, 0);
    load_walked<SCORES>(job, &c.q, head, query, c.q_head_step, c.q_batch_step, c.lse_log2,
                        pattern >= 0 ? M::bits_bytes : 0);
    if (pattern < 0) return;
    bulk_load(base + M::bits + slot * M::bits_bytes,
              c.plan.col_bits + (int64_t)pattern * 512 + query / 64 % 2 * 256 + job.block % 2 * 128, M::bits_bytes,
              base + M::q_full + 8 * slot);
  }

  __device__ __forceinline__ void load_dout(const hopper_wide_job &job, int head, int query) const {
    this->wait_empty(M::dout_empty, steps % M::slots, steps / M::slots);
    load_walked<VALUES>(job, &c.dout, head, query, c.dout_head_step, c.dout_batch_step, c.delta, 0);
  }

  __device__ __forceinline__ void load_job(const hopper_wide_job &job) {
    bool first = true;
#pragma unroll 1
    for (int head = job.head * c.group; head < (job.head + 1) * c.group; head++) {
      hopper_wide_each_step(c.plan.col_runs, runs_of(job.batch, head, job.block), [&](int query, int pattern) {
        load_queries(job, head, query, pattern);
        if (first) load_held<SCORES>(job, &c.k, c.k_head_step, c.k_batch_step);
        load_dout(job, head, query);
        if (first) load_held<VALUES>(job, &c.v, c.v_head_step, c.v_batch_step);
        first = false;
        steps++;
      });
    }
    jobs++;
  }
};

// A warpgroup: a key per row, 64 queries of a step along the columns. SELF has its arithmetic and says which side PAIRS
// gives its product of scores, S or dP, and which side SUMS the rest of the product that its gradient adds up.
template <class SELF, class SHAPE, bool CAREFUL, template <class> class PAIRS, template <class> class SUMS>
struct hopper_wide_keys_consumer : hopper_wide_consumer<hopper_wide_keys_memory<SHAPE, CAREFUL>, CAREFUL> {
  using M = hopper_wide_keys_memory<SHAPE, CAREFUL>;
  using B = hopper_wide_consumer<M, CAREFUL>;
  using type = typename B::type;
  using P = PAIRS<M>;
  using D = SUMS<M>;
  using B::B;
  using B::base, B::c, B::job, B::lane, B::t, B::w;

  float sums[D::width / 2], x[32];  // the gradient; S or dP, then P or dS
  uint32_t pairs[16];               // the latter in halves

  __device__ __forceinline__ SELF &self() { return static_cast<SELF &>(*this); }

  static __device__ __forceinline__ int slot(int g) { return g % M::slots; }

  // S^T = K Q^T or dP^T = V dO^T.
  __device__ __forceinline__ void start_pairs(int g) {
    B::wait_full(P::full, slot(g), g / M::slots);
    wgmma_fence();
    hopper_product_rows_rows<type, P::width / 16, HOPPER_WIDE_PANEL_BYTES, HOPPER_WIDE_PANEL_BYTES>(
        x, wgmma_operand(base + P::held, 0), wgmma_operand(base + P::walked, 0) + slot(g) * (P::bytes >> 4));
    wgmma_commit();
  }

  // dV += P^T dO or dK += dS^T Q.
  __device__ __forceinline__ void start_sums(int g) {
    B::wait_full(D::full, slot(g), g / M::slots);
    wgmma_fence();
    hopper_product_registers<type, 4>(
        sums, pairs, wgmma_operand(base + D::walked, HOPPER_WIDE_PANEL_BYTES) + slot(g) * (D::bytes >> 4));
    wgmma_commit();
  }

  // The end of a step: the next S or dP, its arithmetic under the product of this step's sums.
  template <bool MORE>
  __device__ __forceinline__ void multiply(int g) {
    if constexpr (MORE) start_pairs(g + 1);
    start_sums(g);
    if constexpr (CAREFUL) {
      wgmma_wait<0>();
      self().repair(g);
    }
    if constexpr (MORE) {
      wgmma_wait<1>();
      self().prepare(g + 1);
    }
    wgmma_wait<0>();
    B::arrive(D::empty + 8 * slot(g));
  }

  // All jobs, whose gradient is `to` times `factor`.
  __device__ __forceinline__ void run(const sa_operand &to, const CUtensorMap *map, int width, float factor) {
    int g = 0, parity = 0;  // steps are counted across the jobs: they name the slots
#pragma unroll 1
    for (int n = 0;; n++) {
      B::wait_job(n);
      if (job.y < 0) break;
      if (job.y == 0) {
        B::write_zeros(to, job.x * HOPPER_WIDE_ROWS, c.keys, width);
      } else {
        const int end = g + job.y;
#pragma unroll
        for (int i = 0; i < D::width / 2; i++) sums[i] = 0.f;
        mbarrier_wait(base + P::held_full, parity);
        parity ^= 1;
        start_pairs(g);
        wgmma_wait<0>();
        self().prepare(g);
        // The loop turns where nothing is in flight: ptxas serialises products whose result crosses a back edge and is
        // then read (C7514).
#pragma unroll 1
        for (; g + 1 < end; g++) self().template step<true>(g);
        self().template step<false>(g);
        self().wait_other(g);
        const bool bad = B::write(sums, factor, map, to.data, job.x * HOPPER_WIDE_ROWS, D::held, D::held_empty);
        if (!CAREFUL && bad) {
          c.bad_key[(job.z * c.key_heads + job.w) * 2 * c.plan.col_tiles + job.x] = *c.flagged = 1;
        }
        g++;
      }
      B::release_job(n);
    }
  }

  __device__ __forceinline__ bool masked(int g) const {
    return shared_load(base + M::step + 16 * slot(g));
  }

  // Masked entries become 0, whatever they held.
  __device__ __forceinline__ void select_visible(int g) {
    if (!masked(g)) return;
    const uint32_t bits = shared_load(base + M::bits + slot(g) * M::bits_bytes + t * 4);
#pragma unroll
    for (int i = 0; i < 32; i++) x[i] = bits >> i & 1 ? x[i] : 0.f;
  }

  // Calls use(group of eight queries, the statistics of this thread's two).
  template <class Use>
  __device__ __forceinline__ void each_statistic(int g, Use use) const {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float4 y = shared_load_4(base + P::statistics + slot(g) * 256 + j * 64 + lane % 4 * 16);
      use(2 * j, y.x, y.y);
      use(2 * j + 1, y.z, y.w);
    }
  }

  __device__ __forceinline__ void pack() {
#pragma unroll
    for (int i = 0; i < 16; i++) pairs[i] = pack_halves<type>(x[2 * i], x[2 * i + 1]);
  }

  // The careful launch, once S and dP of a step are there and its pairs stored: replaces what is not finite in the 64
  // rows whose product follows.
  __device__ __forceinline__ void clean(int g) const {
    B::both();
    if (t < 64) {
      const uint32_t at = base + D::walked + slot(g) * D::bytes;
      const bool bad = hopper_clean_row<type, D::width / SA_PANEL, 64>(at, at, t);
      shared_store(base + D::bad + 4 * t, bad);
    }
    async_proxy_fence();
    B::both();
  }

  // And then adds its products: of pairs stored at `from` and the rows of an operand.
  __device__ __forceinline__ void add_nonfinite(int g, uint32_t from, const sa_operand &operand, int width) {
    const int4 step = shared_load_4i(base + M::step + 16 * slot(g));
    const type *source = hopper_rows<type>(operand, job.z, step.z) + step.y * operand.stride[2] + lane % 4 * 2;
#pragma unroll 1
    for (int i = 0; i < 64; i++) {
      if (!shared_load(base + D::bad + 4 * i)) continue;
      uint32_t bits = ~0u;
      if (step.x) bits = shared_load(base + M::bits + slot(g) * M::bits_bytes + ((t & ~3) + i % 8 / 2) * 4);
      bits >>= i / 8 * 4 + i % 2;
      hopper_add_nonfinite(sums, source + i * operand.stride[2], width - lane % 4 * 2, B::stored(from, 0, i),
                           B::stored(from, 1, i), bits & 1, bits >> 2 & 1);
    }
    __syncwarp();
  }
};

// Warpgroup 1: P and dV.
template <class SHAPE, bool CAREFUL>
struct hopper_wide_dv : hopper_wide_keys_consumer<hopper_wide_dv<SHAPE, CAREFUL>, SHAPE, CAREFUL,
                                                  hopper_wide_scores_side, hopper_wide_values_side> {
  using B = hopper_wide_keys_consumer<hopper_wide_dv, SHAPE, CAREFUL, hopper_wide_scores_side, hopper_wide_values_side>;
  using M = typename B::M;
  using B::B;
  using B::base, B::c, B::pairs, B::x;

  // P.
  __device__ __forceinline__ void prepare(int g) {
    B::each_statistic(g, [&](int j, float minus0, float minus1) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        x[4 * j + i] = exp2_fast(fmaf(x[4 * j + i], c.scale_log2, i & 1 ? minus1 : minus0));
      }
    });
    B::select_visible(g);
  }

  static __device__ __forceinline__ uint32_t pairs_at(int g) {
    return M::p + (g & 1) * M::pairs_bytes;
  }

  // P to the other warpgroup, the next S, dV.
  template <bool MORE>
  __device__ __forceinline__ void step(int g) {
    B::pack();
    mbarrier_wait(base + M::p_empty + 8 * (g & 1), (g >> 1 & 1) ^ 1);
    B::store_pairs(pairs_at(g), pairs);
    __syncwarp();
    B::arrive(M::p_full + 8 * (g & 1));
    if constexpr (CAREFUL) {
      B::clean(g);
    } else {
      B::arrive(M::q_empty + 8 * B::slot(g));
    }
    B::template multiply<MORE>(g);
  }

  __device__ __forceinline__ void repair(int g) {
    B::add_nonfinite(g, pairs_at(g), c.dout_values, c.value_width);
    B::arrive(M::q_empty + 8 * B::slot(g));
  }

  // The other warpgroup, which has read the last P, is done with V.
  __device__ __forceinline__ void wait_other(int g) const {
    mbarrier_wait(base + M::p_empty + 8 * (g & 1), g >> 1 & 1);
  }

  __device__ __forceinline__ void run() {
    B::run(c.dv_out, &c.dv, c.value_width, 1.f);
  }
};

// Warpgroup 2: dS and dK.
template <class SHAPE, bool CAREFUL>
struct hopper_wide_dk : hopper_wide_keys_consumer<hopper_wide_dk<SHAPE, CAREFUL>, SHAPE, CAREFUL,
                                                  hopper_wide_values_side, hopper_wide_scores_side> {
  using B = hopper_wide_keys_consumer<hopper_wide_dk, SHAPE, CAREFUL, hopper_wide_values_side, hopper_wide_scores_side>;
  using M = typename B::M;
  using type = typename B::type;
  using B::B;
  using B::base, B::c, B::pairs, B::t, B::x;

  // dP - delta: the last that needs dO of the step.
  __device__ __forceinline__ void prepare(int g) {
    B::each_statistic(g, [&](int j, float delta0, float delta1) {
#pragma unroll
      for (int i = 0; i < 4; i++) x[4 * j + i] -= i & 1 ? delta1 : delta0;
    });
    __syncwarp();
    B::arrive(M::dout_empty + 8 * B::slot(g));
  }

  // dS, the next dP, dK.
  template <bool MORE>
  __device__ __forceinline__ void step(int g) {
    B::wait_full(M::p_full, g & 1, g >> 1);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int4 p = shared_load_4i(base + M::p + (g & 1) * M::pairs_bytes + i * 2048 + t * 16);
      const uint32_t weights[4] = {(uint32_t)p.x, (uint32_t)p.y, (uint32_t)p.z, (uint32_t)p.w};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        x[8 * i + 2 * k] *= hopper_low<type>(weights[k]);
        x[8 * i + 2 * k + 1] *= hopper_high<type>(weights[k]);
      }
    }
    __syncwarp();
    B::arrive(M::p_empty + 8 * (g & 1));
    B::select_visible(g);  // again: 0 * NaN must be 0 here
    B::pack();
    if constexpr (CAREFUL) {
      B::store_pairs(M::ds, pairs);
      B::clean(g);
    }
    B::template multiply<MORE>(g);
  }

  __device__ __forceinline__ void repair(int g) {
    B::add_nonfinite(g, M::ds, c.q_values, c.width);
    named_barrier_sync(HOPPER_WIDE_WARPGROUP + B::w, 128);  // nobody stores the next dS before
  }

  // The other warpgroup, which has sent the last P, is done with K.
  __device__ __forceinline__ void wait_other(int) const {}

  __device__ __forceinline__ void run() {
    B::run(c.dk_out, &c.dk, c.width, c.scale);
  }
};

#endif
