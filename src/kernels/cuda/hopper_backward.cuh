// backward attention on Hopper: TMA, wgmma and warp specialisation over the visible tiles of the plan
//
// hopper_backward_rows makes the row statistics, hopper_backward_tiles all gradients: a block per multiprocessor stays
// for the whole launch and takes jobs from one counter. A job is a column of tiles, 128 keys of a key head, with all
// queries that see them, so that dK and dV stay in registers: of one head of the group after the other, or, where
// columns get shorter, past a row of tiles of all heads before the next. The last columns of long groups are shared
// out, a job a head, and so are those that would be alone in a last round, by their tiles: each adds its dV and dK, in
// memory, to those of the jobs before, in their order, and the last one's leave. A step is a tile of 64 queries (128 at
// width 64). Sums of dQ that are made in any order become halves in a launch after it.
//
//   warpgroup 0     gives its registers away. Warp 0 loads in one stream across the jobs: K, V of a job, Q, dO, row
//                   statistics and bits of its steps; it writes the zeros of keys that no query sees. Warps 1 and 2 add
//                   the dQ that warpgroups 1 and 2 leave in shared memory to the sums in memory. Warp 3 looks up whose
//                   turn it is to add.
//   warpgroup 1, 2  64 keys each. S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T have a key per row; dV += P^T dO
//                   with P^T in registers; at width 128, without extras, dK += dS^T Q with dS^T where P^T was, else,
//                   and in the first and the last step of a job, in shared memory; dQ = dS K with dS in shared memory.
//                   dV runs under the arithmetic of dS, dK while dQ is handed over, the next S and dP under the other
//                   warpgroup's exponentials, which without extras are made by turns; dQ comes one step late, so that
//                   the warpgroups, each of which needs the other's half of dS, may drift half a step apart.
//
// The producer's 24 registers may spill a few words in code that waits most of the time, the consumers at width 128 a
// dozen where a job ends; their loop does not.
//
//   width  queries a step  registers: dK, dV, S, dP, P  shared memory
//   64     128             32, 32, 64, 64, 32           221 KiB
//   128    64              64, 64, 32, 32, 16           221 KiB
//
// Shared memory: K, V, three slots of Q and two of dO (Q of a step is still read by its dK when the one after the next
// must load), two of dS, one of dQ, a box of zeros. At width 128 P stays in the registers of S until dS is made of it;
// at width 64, and with extras, there are none for it, and dS is made from the very halves of P that dV was made from,
// which costs a fifth more rounding in dQ and dK (2.9e-3 instead of 2.35e-3 of their norm).
//
// Extras (bias, softcap, ALiBi, dropout) are compiled into kernels of their own, one each and one for all, of width 128
// alone. P then goes two ways, as dropout is part of dV's and the softcap's derivative of dS's; the bias of a step is
// read into registers before its scores are there, for which dP is started after P.
//
// A column or a chunk whose result is not finite is noted, and a last launch (CAREFUL) does all columns that touch one
// again: the same products in the same order, but the elements of Q, dO and K that are not finite are replaced by 0
// where they are multiplied by P or dS, and their products then added one by one where the pair is visible. So keys and
// rows that see nothing of the kind get the very bits of a clean run; clean inputs pay for a test of the results, and,
// where some pair may be masked, for that launch. Both launches are brought to the device early and wait there for the
// one before them to end.
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_CUH
#include "kernels/cuda/hopper_backward_repairs.cuh"
#include "kernels/cuda/hopper_backward_sums.cuh"
#include "kernels/cuda/hopper_block.cuh"

// The two warpgroups that multiply.
template <class SHAPE, bool CAREFUL>
struct hopper_backward_consumer : hopper_backward_repairs<SHAPE, CAREFUL> {
  using base_type = hopper_backward_repairs<SHAPE, CAREFUL>;
  using base_type::add_slope;
  using base_type::arrive;
  using base_type::base;
  using base_type::c;
  using base_type::clean_keys;
  using base_type::clean_queries;
  using base_type::dk;
  using base_type::dp;
  using base_type::draw;
  using base_type::dv;
  using base_type::job;
  using base_type::kept;
  using base_type::lane;
  using base_type::p;
  using base_type::pairs;
  using base_type::read_bias;
  using base_type::repair_dk;
  using base_type::repair_dq;
  using base_type::repair_dv;
  using base_type::s;
  using base_type::select_seen;
  using base_type::select_visible;
  using base_type::slab;
  using base_type::slope_head;
  using base_type::store_pairs;
  using base_type::store_piece;
  using base_type::store_row;
  using base_type::stores_read;
  using base_type::sums;
  using base_type::t;
  using base_type::w;
  using base_type::weigh;
  using base_type::weights;
  using base_type::write_slope;
  using typename base_type::type;

  __device__ __forceinline__ hopper_backward_consumer(const hopper_backward_call &call, uint32_t start, int group)
      : base_type(call, start, group) {}

  // S^T = K Q^T.
  __device__ __forceinline__ void start_scores(int g) {
    const int slot = g % SHAPE::q_slots;
    mbarrier_wait(base + SHAPE::q_full + 8 * slot, g / SHAPE::q_slots & 1);
    wgmma_fence();
    hopper_product_rows_rows<type, SHAPE::width / 16, SHAPE::panel_bytes, SHAPE::queries * 128>(
        s, wgmma_operand(base + SHAPE::k, 0) + slab(),
        wgmma_operand(base + SHAPE::q, 0) + slot * (SHAPE::query_bytes >> 4));
    wgmma_commit();
  }

  // dP^T = V dO^T.
  __device__ __forceinline__ void start_dp(int g) {
    const int slot = g % SHAPE::dout_slots;
    mbarrier_wait(base + SHAPE::dout_full + 8 * slot, g / SHAPE::dout_slots & 1);
    wgmma_fence();
    hopper_product_rows_rows<type, SHAPE::width / 16, SHAPE::panel_bytes, SHAPE::queries * 128>(
        dp, wgmma_operand(base + SHAPE::v, 0) + slab(),
        wgmma_operand(base + SHAPE::dout, 0) + slot * (SHAPE::query_bytes >> 4));
    wgmma_commit();
  }

  // dV += P^T dO.
  __device__ __forceinline__ void start_dv(int g) {
    wgmma_fence();
    hopper_product_registers<type, SHAPE::queries / 16>(
        dv, p,
        wgmma_operand(base + SHAPE::dout, SHAPE::queries * 128) + g % SHAPE::dout_slots * (SHAPE::query_bytes >> 4));
    wgmma_commit();
  }

  // dK += dS^T Q, dS^T where P was or in shared memory.
  template <bool IN_P>
  __device__ __forceinline__ void start_dk(int g) {
    const uint32_t q =
        wgmma_operand(base + SHAPE::q, SHAPE::queries * 128) + g % SHAPE::q_slots * (SHAPE::query_bytes >> 4);
    wgmma_fence();
    if constexpr (IN_P) {
      hopper_product_registers<type, SHAPE::queries / 16>(dk, p, q);
    } else {
      hopper_product_rows_columns<type, SHAPE::queries / 16, SHAPE::panel_bytes>(
          dk, wgmma_operand(base + SHAPE::ds, 0) + slab() + (g & 1) * (SHAPE::ds_bytes >> 4), q);
    }
    wgmma_commit();
  }

  // dQ = dS K of 64 queries and 64 columns, once the other warpgroup's half of dS is there.
  __device__ __forceinline__ void start_dq(float (&dq)[32], int g) {
    const uint32_t half = 2 * slab();
    mbarrier_wait(base + SHAPE::ds_done + 16 * (1 - w) + 8 * (g & 1), g >> 1 & 1);
    wgmma_fence();
    hopper_product_columns_columns<type, SA_TILE / 16>(
        dq,
        wgmma_operand(base + SHAPE::ds, SHAPE::panel_bytes) + (SHAPE::width == 64 ? half : 0) +
            (g & 1) * (SHAPE::ds_bytes >> 4),
        wgmma_operand(base + (CAREFUL ? SHAPE::clean_k : SHAPE::k), SHAPE::panel_bytes) +
            (SHAPE::width == 64 ? 0 : half));
    wgmma_commit();
  }

  __device__ __forceinline__ void hand_over(float (&dq)[32]) {
    named_barrier_sync(HOPPER_BACKWARD_DQ_EMPTY + w, 160);
    const int4 last = CAREFUL ? make_int4(-1, 0, 0, 0) : shared_load_4i(base + SHAPE::last + 16 * w);
    // Without being told that this is rare, ptxas spills more around it: a whole call takes 2 to 4 % longer.
    if (__builtin_expect(last.x >= 0, 0)) {
      complete_dq(dq, last.x, last.y);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        shared_store_4(base + SHAPE::dq + w * SHAPE::dq_bytes + i * 2048 + t * 16, dq[4 * i], dq[4 * i + 1],
                       dq[4 * i + 2], dq[4 * i + 3]);
      }
    }
    async_proxy_fence();
    named_barrier_arrive(HOPPER_BACKWARD_DQ_FULL + w, 160);
  }

  // dQ that is the last to its sums: added to them in registers, and left as halves.
  __device__ __forceinline__ void complete_dq(float (&dq)[32], int chunk, bool sums) {
    const float4 *from = (const float4 *)(c.dq + (int64_t)chunk * 4096) + t;
    if (sums) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float4 x = __ldcg(from + i * 128);
        dq[4 * i] += x.x;
        dq[4 * i + 1] += x.y;
        dq[4 * i + 2] += x.z;
        dq[4 * i + 3] += x.w;
      }
    }
    // store_row counts from the rows of both warpgroups.
    if (hopper_store_halves<type>(dq, c.scale, base + SHAPE::dq + w * (SHAPE::dq_bytes - SHAPE::slab_bytes) + store_row,
                                  store_piece, 0))
      c.bad_query[chunk] = *c.flagged = 1;
  }

  // The second half of a step: P, under dP and dK of the step before. dV is left running. IN_P: S was begun behind dK.
  template <bool FIRST, bool IN_P = false>
  __device__ __forceinline__ void probabilities(int g) {
    constexpr bool turn = SHAPE::by_turns && (IN_P || SHAPE::width == 64);
    const int slot = g % SHAPE::q_slots;
    if constexpr (SHAPE::biased || SHAPE::extras & HOPPER_BACKWARD_DROPOUT) {
      if constexpr (SHAPE::biased) read_bias(g);
      draw(g);
      wgmma_wait<CAREFUL || FIRST ? 0 : 1>();  // S is there
      weigh(g);
      start_dp(g);  // so late that the bias or what is drawn has its registers before
      if constexpr (CAREFUL) wgmma_wait<0>();
    } else if constexpr (SHAPE::extras) {
      start_dp(g);
      draw(g);
      wgmma_wait<CAREFUL ? 0 : FIRST ? 1 : 2>();  // S is there
      weigh(g);
    } else {
      start_dp(g);
      wgmma_wait<CAREFUL ? 0 : FIRST || IN_P ? 1 : 2>();  // S is there
      if constexpr (turn) named_barrier_sync(HOPPER_BACKWARD_EXPONENTIALS + w, 256);
#pragma unroll
      for (int j = 0; j < SHAPE::queries / 16; j++) {
        const float4 lse = shared_load_4(base + SHAPE::lse + slot * SHAPE::queries * 4 + j * 64 + (lane & 3) * 16);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float minus = i < 4 ? (i & 1 ? lse.y : lse.x) : (i & 1 ? lse.w : lse.z);
          s[8 * j + i] = exp2_fast(fmaf(s[8 * j + i], c.scale_log2, minus));
        }
      }
      select_visible(s, slot);
#pragma unroll
      for (int i = 0; i < pairs; i++) p[i] = pack_halves<type>(s[2 * i], s[2 * i + 1]);
      if constexpr (turn) named_barrier_arrive(HOPPER_BACKWARD_EXPONENTIALS + 1 - w, 256);
    }
    if constexpr (CAREFUL) clean_queries(g);
    start_dv(g);
    if constexpr (CAREFUL) {
      wgmma_wait<0>();
      repair_dv(g);
    } else {
      wgmma_wait<1>();  // dP and dK of the step before are there
      if (!FIRST) arrive(SHAPE::q_empty + 8 * ((g - 1) % SHAPE::q_slots));
    }
  }

  // The first half: dS, then dQ of the step before, whose other half has had a whole step to arrive, dK and the next S,
  // or the next S and then dK, which waits for dS to be in shared memory.
  template <bool FIRST, bool MORE>
  __device__ __forceinline__ void gradients(int g) {
    constexpr bool in_p = SHAPE::ds_in_p && !FIRST && MORE;
    const int slot = g % SHAPE::q_slots, dout_slot = g % SHAPE::dout_slots;
    uint32_t own[in_p ? 1 : pairs], *ds = in_p ? p : own;
#pragma unroll
    for (int j = 0; j < SHAPE::queries / 16; j++) {
      const float4 delta =
          shared_load_4(base + SHAPE::delta + dout_slot * SHAPE::queries * 4 + j * 64 + (lane & 3) * 16);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int x = 8 * j + i;
        float probability = s[x];
        if constexpr (SHAPE::rounds_weights) {
          const uint32_t pair = SHAPE::splits ? weights[x / 2] : p[x / 2];
          probability = x & 1 ? hopper_high<type>(pair) : hopper_low<type>(pair);
        }
        if constexpr (SHAPE::splits) dp[x] = kept[x / 32] >> x % 32 & 1 ? dp[x] * c.scores.kept : 0.f;
        dp[x] = probability * (dp[x] - (i < 4 ? (i & 1 ? delta.y : delta.x) : (i & 1 ? delta.w : delta.z)));
      }
    }
    // Again: 0 * NaN must be 0 here.
    if constexpr (SHAPE::extras) {
      select_seen(dp);
      if (!CAREFUL && SHAPE::extras & HOPPER_BACKWARD_ALIBI && c.slope_part) add_slope(g);
    } else {
      select_visible(dp, slot);
    }
    if constexpr (in_p) {
      wgmma_wait<0>();  // dV is there
      arrive(SHAPE::dout_empty + 8 * dout_slot);
    }
#pragma unroll
    for (int i = 0; i < pairs; i++) ds[i] = pack_halves<type>(dp[2 * i], dp[2 * i + 1]);
    float dq[32];
    if constexpr (FIRST) {
      stores_read();
    } else {
      start_dq(dq, g - 1);
    }
    if constexpr (in_p) {
      start_dk<true>(g);
      store_pairs(g, ds);
      wgmma_wait<1>();  // dQ of the step before is there
      // So late that there is nothing to wait for. The warps of this warpgroup meet at dQ's buffer before the next dQ.
      async_proxy_fence();
      __syncwarp();
      arrive(SHAPE::ds_done + 16 * w + 8 * (g & 1));  // dS of this step may be read; the other buffer is free
      hand_over(dq);
      start_scores(g + 1);  // behind dQ, whose way it would slow down with operands on theirs
      return;
    }
    store_pairs(g, ds);
    async_proxy_fence();
    wgmma_wait<FIRST ? 0 : 1>();  // dV is there
    arrive(SHAPE::dout_empty + 8 * dout_slot);
    if constexpr (MORE) {
      start_scores(g + 1);
    } else if constexpr (!CAREFUL) {
      arrive(SHAPE::v_empty);
    }
    named_barrier_sync(HOPPER_BACKWARD_WARPGROUP + w, 128);
    start_dk<false>(g);
    if constexpr (CAREFUL) {
      wgmma_wait<0>();
      repair_dk(g);
    } else if constexpr (!FIRST) {
      wgmma_wait<MORE ? 2 : 1>();  // dQ of the step before is there
    }
    arrive(SHAPE::ds_done + 16 * w + 8 * (g & 1));
    if constexpr (!FIRST) hand_over(dq);
  }

  // Of a column that is shared out, a job adds its dV and dK to those of the ones before it, which were taken before.
  // Returns whether they are whole.
  __device__ __forceinline__ bool add_parts(int shared, int part) {
    int *turn = c.part_turn + shared * 2 + w;
    float4 *at = (float4 *)c.part_sums + (int64_t)(shared * 2 + w) * (2 * sums / 4 * 128) + t;
    const int before = CAREFUL ? c.parts - 1 : 0;  // it counts on from where the first launch ended
    if (part > 0) {
      if (t == 0) {
        while (load_acquire(turn) != before + part) {
        }
      }
      named_barrier_sync(HOPPER_BACKWARD_WARPGROUP + w, 128);
      add_part(dv, at);
      add_part(dk, at + sums / 4 * 128);
    }
    if (part + 1 == c.parts) return true;
    store_part(dv, at);
    store_part(dk, at + sums / 4 * 128);
    named_barrier_sync(HOPPER_BACKWARD_WARPGROUP + w, 128);
    if (t == 0) store_release(turn, before + part + 1);
    return false;
  }

  static __device__ __forceinline__ void add_part(float (&x)[sums], const float4 *from) {
#pragma unroll
    for (int i = 0; i < sums / 4; i++) {
      const float4 y = __ldcg(from + i * 128);
      x[4 * i] += y.x;
      x[4 * i + 1] += y.y;
      x[4 * i + 2] += y.z;
      x[4 * i + 3] += y.w;
    }
  }

  static __device__ __forceinline__ void store_part(const float (&x)[sums], float4 *to) {
#pragma unroll
    for (int i = 0; i < sums / 4; i++) to[i * 128] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  }

  // dV and then dK leave through this warpgroup's rows of the buffers of dS. That of dQ would only be free once its
  // last sums are on their way, 4000 cycles later where jobs are short.
  __device__ __forceinline__ void finish(int n) {
    const int shared = shared_load(base + SHAPE::job + 32 * (n & 1) + 28);
    if (shared >= 0 && !add_parts(shared, shared_load(base + SHAPE::job + 32 * (n & 1) + 24))) return;
    named_barrier_sync(HOPPER_BACKWARD_BOTH, 256);  // the other warpgroup has read dS for its last dQ
    uint32_t seen = hopper_store_halves<type>(dv, 1.f, base + SHAPE::ds + store_row, store_piece, SHAPE::panel_bytes);
    send_gradient(&c.dv, c.dv_out.data);
    stores_read();
    seen |= hopper_store_halves<type>(dk, c.scale, base + SHAPE::ds + store_row, store_piece, SHAPE::panel_bytes);
    if (!CAREFUL && seen) {
      c.bad_key[(job.z * c.key_heads + job.w) * c.plan.col_tiles + job.x] = *c.flagged = 1;
    }
    send_gradient(&c.dk, c.dk_out.data);
  }

  __device__ __forceinline__ void send_gradient(const CUtensorMap *map, bool wanted) {
    async_proxy_fence();
    named_barrier_sync(HOPPER_BACKWARD_WARPGROUP + w, 128);
    if (t > 0 || !wanted) return;
#pragma unroll
    for (int panel = 0; panel < SHAPE::panels; panel++) {
      tma_store(map, panel * SA_PANEL, job.x * SA_TILE + w * 64, job.w, job.z,
                base + SHAPE::ds + panel * SHAPE::panel_bytes + w * SHAPE::slab_bytes);
    }
    bulk_commit();
  }

  // dQ of a step, with nothing beside it; `last`: K is not needed any more.
  __device__ __forceinline__ void finish_dq(int g, bool last) {
    float dq[32];
    start_dq(dq, g);
    wgmma_wait<0>();
    if constexpr (CAREFUL) {
      repair_dq(dq, g);
      if (last) arrive(SHAPE::v_empty);
    }
    if (last) arrive(SHAPE::k_empty);
    arrive(SHAPE::q_empty + 8 * (g % SHAPE::q_slots));
    hand_over(dq);
  }

  __device__ __forceinline__ void run() {
    int g = 0, kv_parity = 0;  // steps are counted across the jobs: they name the slots
    if (SHAPE::by_turns && w == 1) named_barrier_arrive(HOPPER_BACKWARD_EXPONENTIALS, 256);
#pragma unroll 1
    for (int n = 0;; n++) {
      mbarrier_wait(base + SHAPE::job_full + 8 * (n & 1), n >> 1 & 1);
      job = shared_load_4i(base + SHAPE::job + 32 * (n & 1));
      if (job.y < 0) break;
      if (!SHAPE::loader_clears && job.y == 0) {
        hopper_backward_clear<type>(c, job.x, job.z, job.w, w * 128 + t, 256);
      } else {
        const int end = g + job.y;
#pragma unroll
        for (int i = 0; i < sums; i++) dk[i] = dv[i] = 0.f;
        slope_head = -1;
        mbarrier_wait(base + SHAPE::k_full, kv_parity);
        if constexpr (CAREFUL) {
          clean_keys();
          mbarrier_wait(base + SHAPE::v_full, kv_parity);
#pragma unroll 1
          for (; g < end; g++) {
            start_scores(g);
            probabilities<true>(g);
            gradients<true, false>(g);
            finish_dq(g, g + 1 == end);
          }
        } else {
          // The loop turns where only dV and dK are in flight: ptxas serialises products whose result crosses a back
          // edge and is then read (C7514).
          start_scores(g);
          mbarrier_wait(base + SHAPE::v_full, kv_parity);
          probabilities<true>(g);
          if (job.y == 1) {
            gradients<true, false>(g++);
          } else {
            gradients<true, true>(g++);
            probabilities<false>(g);
#pragma unroll 1
            for (; g + 1 < end; g++) {
              gradients<false, true>(g);
              probabilities<false, SHAPE::ds_in_p>(g + 1);
            }
            gradients<false, false>(g++);
          }
          finish_dq(g - 1, true);
        }
        kv_parity ^= 1;
        if constexpr (SHAPE::extras & HOPPER_BACKWARD_ALIBI && !CAREFUL) {
          if (c.slope_part) write_slope(-1);
        }
        finish(n);
      }
      __syncwarp();
      arrive(SHAPE::job_empty + 8 * (n & 1));
    }
    if (t == 0) bulk_wait_read<0>();
  }
};

template <class T, int WIDTH, bool CAREFUL, int EXTRAS>
__global__ void __launch_bounds__(HOPPER_BACKWARD_THREADS, 1)
    hopper_backward_tiles(const __grid_constant__ hopper_backward_call c) {
  using SHAPE = hopper_backward_shape<T, WIDTH, CAREFUL, EXTRAS>;
  const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
  if (CAREFUL) {
    dependency_wait();
    if (!*c.flagged) return;
  } else {
    dependents_launch();
  }
  const uint32_t base = hopper_block_memory();
  if (threadIdx.x == 0) {
    hopper_block_slots(base + SHAPE::k_full, base + SHAPE::k_empty, 1, 8);
    hopper_block_slots(base + SHAPE::v_full, base + SHAPE::v_empty, 1, 8);
    hopper_block_slots(base + SHAPE::job_full, base + SHAPE::job_empty, 2, 8 + 3);
    hopper_block_mbarriers(base + SHAPE::ds_done, 4, 4);
    hopper_block_slots(base + SHAPE::q_full, base + SHAPE::q_empty, SHAPE::q_slots, 8);
    hopper_block_slots(base + SHAPE::dout_full, base + SHAPE::dout_empty, SHAPE::dout_slots, 8);
    hopper_block_slots(base + SHAPE::turn_full, base + SHAPE::turn_empty, HOPPER_BACKWARD_TURNS, 2);
    mbarrier_init_fence();
  }
  if constexpr (SHAPE::zeros_bytes > 0) {
    for (uint32_t n = threadIdx.x * 16; n < SHAPE::zeros_bytes; n += HOPPER_BACKWARD_THREADS * 16) {
      shared_store_4i(base + SHAPE::zeros + n, 0, 0, 0, 0);
    }
    async_proxy_fence();
  }
  if (!CAREFUL) dependency_wait();
  __syncthreads();

  if (warp < 4) {
    registers_give_back<HOPPER_BACKWARD_PRODUCER_REGISTERS>();
    if (warp == 0) {
      hopper_backward_loads<SHAPE, CAREFUL>(c, base).run();
    } else if (warp == 3) {
      hopper_backward_sums<SHAPE, CAREFUL>(c, base).run_turns();
    } else {
      hopper_backward_sums<SHAPE, CAREFUL>(c, base).run_adds(warp - 1);
    }
  } else {
    registers_take<HOPPER_BACKWARD_CONSUMER_REGISTERS>();
    hopper_backward_consumer<SHAPE, CAREFUL>(c, base, warp / 4 - 1).run();
  }
}

// Those with extras are instantiated in files of their own, as each takes long to compile.
template <class T, int WIDTH, bool CAREFUL, int EXTRAS>
int hopper_backward_launch(const hopper_backward_call &c, unsigned blocks, cudaStream_t stream) {
  return sa_cuda_launch<true>("sa_backward", hopper_backward_tiles<T, WIDTH, CAREFUL, EXTRAS>, blocks,
                              HOPPER_BACKWARD_THREADS, hopper_backward_shape<T, WIDTH, CAREFUL, EXTRAS>::bytes, stream,
                              c);
}

#endif
