// backward attention on Hopper for widths up to 128: a thread that multiplies, and what it makes of scores
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WEIGHTS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WEIGHTS_CUH
#include "kernels/cuda/hopper_backward_shape.cuh"

// A thread of the two warpgroups that multiply. Its keys of the warpgroup's 64 are row() and row() + 8.
template <class SHAPE, bool CAREFUL>
struct hopper_backward_thread {
  using type = typename SHAPE::type;
  static constexpr int scores = SHAPE::queries / 2, pairs = SHAPE::queries / 4, sums = SHAPE::width / 2;

  const hopper_backward_call &c;
  const uint32_t base;
  const int lane = threadIdx.x % 32, w, t = threadIdx.x % 128, warp = threadIdx.x % 128 / 32;
  // Where this lane's rows of 16 bytes go by store_matrices: row and swizzled piece.
  const uint32_t store_row, store_piece;
  float dk[sums], dv[sums], s[scores], dp[scores];
  uint32_t p[pairs];
  int4 job;
  // Extras, of a step: the bias, P without dropout but with the softcap's derivative, which pairs are visible, which
  // are kept; and what the job has for the slope of the head at hand.
  uint32_t bias[SHAPE::biased ? scores : 1], weights[SHAPE::splits ? pairs : 1];
  uint32_t seen[SHAPE::halves], kept[SHAPE::halves];
  float slope_sum;
  int slope_head;

  __device__ __forceinline__ hopper_backward_thread(const hopper_backward_call &call, uint32_t start, int group)
      : c(call),
        base(start),
        w(group),
        store_row((group * 64 + threadIdx.x % 128 / 32 * 16 + (threadIdx.x & 15)) * 128),
        store_piece(((threadIdx.x % 32 >> 4) ^ (threadIdx.x & 7)) << 4) {}

  __device__ __forceinline__ int row() const { return warp * 16 + lane / 4; }

  __device__ __forceinline__ uint32_t slab() const { return w * (SHAPE::slab_bytes >> 4); }

  __device__ __forceinline__ void arrive(uint32_t barrier) {
    if (lane == 0) mbarrier_arrive(base + barrier);
  }

  // The first of the thread's queries of a step: the others are 16 j + 8 (i / 4) + i % 2 after it, for element 8 j + i.
  __device__ __forceinline__ int first_query(const int4 &step) const { return step.y + 2 * (lane & 3); }

  // The first of its keys; the other is 8 after it.
  __device__ __forceinline__ int first_key() const { return job.x * SA_TILE + w * 64 + row(); }

  __device__ __forceinline__ void store_pairs(int g, const uint32_t *x) {
    const uint32_t to = base + SHAPE::ds + (g & 1) * SHAPE::ds_bytes + store_row;
#pragma unroll
    for (int k = 0; k < SHAPE::queries / 16; k++) {
      store_matrices(to + k / 4 * SHAPE::panel_bytes + (store_piece ^ (k % 4 * 32)), x + 4 * k);
    }
  }

  // The dV or dK that went last has left the buffers of dS.
  __device__ __forceinline__ void stores_read() {
    if (t == 0) bulk_wait_read<0>();
    named_barrier_sync(HOPPER_BACKWARD_WARPGROUP + w, 128);
  }

  // Masked entries of a PARTIAL tile become 0, whatever they held.
  __device__ __forceinline__ void select_visible(float (&x)[scores], int slot) {
    if (shared_load(base + SHAPE::step + 16 * slot)) {
#pragma unroll
      for (int h = 0; h < SHAPE::halves; h++) {
        const uint32_t bits = shared_load(base + SHAPE::bits + slot * SHAPE::bits_bytes + h * 1024 + w * 512 + t * 4);
#pragma unroll
        for (int i = 0; i < 32; i++) x[h * 32 + i] = bits >> i & 1 ? x[h * 32 + i] : 0.f;
      }
    }
  }

  // Whether a call has one of them; known where the kernel can do no other, or not that one.
  template <int EXTRA>
  static __device__ __forceinline__ bool wants(bool asked) {
    return SHAPE::extras & EXTRA && (SHAPE::extras == EXTRA || asked);
  }

  // Which weights of a step dropout keeps, a bit each. Four lanes, whose keys share a block of four weights, draw a
  // quarter of the blocks each and give every other lane its eight bits.
  __device__ __forceinline__ void draw(int g) {
    const hopper_scores &rule = c.scores;
#pragma unroll
    for (int h = 0; h < SHAPE::halves; h++) kept[h] = ~0u;
    if (!wants<HOPPER_BACKWARD_DROPOUT>(rule.threshold)) return;
    const int4 step = shared_load_4i(base + SHAPE::step + 16 * (g % SHAPE::q_slots));
    const uint64_t first = hopper_first_weight(rule, job.z, c.heads, step.z) + first_key();
    const int mine = lane / 4 % 4;
    if (c.keys % 4 == 0) {
#pragma unroll 1
      for (int h = 0; h < SHAPE::halves; h++) {
        uint32_t bytes = 0;
#pragma unroll 1
        for (int i = 0; i < 8; i++) {
          const int query = first_query(step) + 64 * h + 16 * mine + i / 4 * 8 + (i & 1);
          const uint32_t four = hopper_kept_block(rule, (first + (uint64_t)query * c.keys + (i & 2) * 4) / 4);
          bytes |= (four * 0x204081 & 0x1010101) << i;
        }
        uint32_t all = 0;
#pragma unroll
        for (int n = 0; n < 4; n++) {
          all |= (__shfl_xor_sync(~0u, bytes, 4 * n) >> 8 * mine & 255) << 8 * (mine ^ n);
        }
        set_kept(h, all);
      }
    } else {
#pragma unroll 1
      for (int h = 0; h < SHAPE::halves; h++) {
        uint32_t all = 0;
#pragma unroll 1
        for (int i = 0; i < 32; i++) {
          const int query = first_query(step) + 64 * h + i / 4 * 8 + (i & 1);
          all |= (uint32_t)hopper_keeps(rule, first + (uint64_t)query * c.keys + (i & 2) * 4) << i;
        }
        set_kept(h, all);
      }
    }
  }

  __device__ __forceinline__ void set_kept(int half, uint32_t bits) {
#pragma unroll
    for (int h = 0; h < SHAPE::halves; h++)
      if (h == half) kept[h] = bits;
  }

  // Calls for the bias of a step; what lies beyond the last query or key is read from the last.
  __device__ __forceinline__ void read_bias(int g) {
    const sa_operand &x = c.scores.bias;
    if (!wants<HOPPER_BACKWARD_BIAS>(x.data)) {
#pragma unroll
      for (int i = 0; i < scores; i++) bias[i] = 0;
      return;
    }
    const int4 step = shared_load_4i(base + SHAPE::step + 16 * (g % SHAPE::q_slots));
    const int64_t from = job.z * x.stride[0] + step.z * x.stride[1];
    if (x.dtype == SA_F32) {
      read_bias_from((const uint32_t *)x.data + from, step);
    } else {
      read_bias_from((const uint16_t *)x.data + from, step);
    }
  }

  template <class E>
  __device__ __forceinline__ void read_bias_from(const E *from, const int4 &step) {
    const int64_t row = c.scores.bias.stride[2];
    from += min(first_key(), c.keys - 1) * c.scores.bias.stride[3];
    const int64_t apart = (min(first_key() + 8, c.keys - 1) - min(first_key(), c.keys - 1)) * c.scores.bias.stride[3];
#pragma unroll
    for (int x = 0; x < scores; x += 4) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const E *at = from + min(first_query(step) + 2 * x + i, c.queries - 1) * row;
        bias[x + i] = __ldg(at);
        bias[x + i + 2] = __ldg(at + apart);
      }
    }
  }

  __device__ __forceinline__ float bias_of(int x) {
    const bool wide = c.scores.bias.dtype == SA_F32;
    if constexpr (std::is_same<type, __half>::value) return wide ? __uint_as_float(bias[x]) : hopper_low<type>(bias[x]);
    return __uint_as_float(bias[x] << (wide ? 0 : 16));
  }

  // Products to weights: p with dropout, weights for dS.
  __device__ __forceinline__ void weigh(int g) {
    const hopper_scores &rule = c.scores;
    const int slot = g % SHAPE::q_slots;
    const int4 step = shared_load_4i(base + SHAPE::step + 16 * slot);
    const float slope = __int_as_float(step.w);
#pragma unroll
    for (int h = 0; h < SHAPE::halves; h++) {
      seen[h] = ~0u;
      if (step.x) seen[h] = shared_load(base + SHAPE::bits + slot * SHAPE::bits_bytes + h * 1024 + w * 512 + t * 4);
    }
    const float apart = (float)(first_key() - first_query(step) - rule.diagonal);
#pragma unroll
    for (int j = 0; j < SHAPE::queries / 16; j++) {
      float extra[8], through[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int x = 8 * j + i;
        extra[i] = 0.f;
        through[i] = 1.f;
        if constexpr (SHAPE::biased) {
          extra[i] = bias_of(x);
          if (extra[i] == -INFINITY) seen[x / 32] &= ~(1u << x % 32);
        }
      }
      if (wants<HOPPER_BACKWARD_ALIBI>(slope != 0.f)) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          extra[i] = hopper_extra(extra[i], slope, apart + (float)((i & 2) * 4 - 16 * j - i / 4 * 8 - (i & 1)));
        }
      }
      if (wants<HOPPER_BACKWARD_SOFTCAP>(rule.capped == 1)) {
#pragma unroll
        for (int i = 0; i < 8; i++) through[i] = s[8 * j + i] = hopper_capped<true>(rule, s[8 * j + i]);
      } else if (SHAPE::extras == HOPPER_BACKWARD_ANY && rule.capped) {
#pragma unroll
        for (int i = 0; i < 8; i++) through[i] = s[8 * j + i] = hopper_capped<false>(rule, s[8 * j + i]);
      }
      if (wants<HOPPER_BACKWARD_SOFTCAP>(rule.capped)) {
#pragma unroll
        for (int i = 0; i < 8; i++) through[i] = fmaf(-through[i], through[i], 1.f);
      }
      const uint32_t at = slot * SHAPE::queries * 4 + j * 64 + (lane & 3) * 16;
      const float4 lse = shared_load_4(base + SHAPE::lse + at);
      float4 sum = make_float4(0, 0, 0, 0);
      if constexpr (SHAPE::biased) sum = shared_load_4(base + SHAPE::log2_sum + at);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int x = 8 * j + i;
        const float minus = i < 4 ? (i & 1 ? lse.y : lse.x) : (i & 1 ? lse.w : lse.z);
        const float less = i < 4 ? (i & 1 ? sum.y : sum.x) : (i & 1 ? sum.w : sum.z);
        const float score = __fadd_rn(hopper_score(rule, s[x], extra[i]), minus);
        const float weight = exp2_fast(SHAPE::biased ? fmaf(score, rule.unit, -less) : score);
        s[x] = seen[x / 32] >> x % 32 & 1 ? weight : 0.f;
        if constexpr (SHAPE::splits) {
          through[i] = s[x] == 0.f ? 0.f : s[x] * through[i];  // a masked pair may have let NaN through
          s[x] = kept[x / 32] >> x % 32 & 1 ? s[x] * rule.kept : 0.f;
        }
      }
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        p[4 * j + i / 2] = pack_halves<type>(s[8 * j + i], s[8 * j + i + 1]);
        if constexpr (SHAPE::splits) weights[4 * j + i / 2] = pack_halves<type>(through[i], through[i + 1]);
      }
    }
  }

  __device__ __forceinline__ void select_seen(float (&x)[scores]) {
#pragma unroll
    for (int i = 0; i < scores; i++) x[i] = seen[i / 32] >> i % 32 & 1 ? x[i] : 0.f;
  }

  // What dS of a step gives to the slope.
  __device__ __forceinline__ void add_slope(int g) {
    const int4 step = shared_load_4i(base + SHAPE::step + 16 * (g % SHAPE::q_slots));
    if (step.z != slope_head) write_slope(step.z);
    const float apart = (float)(first_key() - first_query(step) - c.scores.diagonal);
#pragma unroll
    for (int x = 0; x < scores; x++) {
      const int i = x % 8;
      slope_sum = fmaf(-dp[x], fabsf(apart + (float)((i & 2) * 4 - x / 8 * 16 - i / 4 * 8 - (i & 1))), slope_sum);
    }
  }

  // The sum for the head that ends is written, one for the next begun.
  __device__ __forceinline__ void write_slope(int next) {
    if (slope_head >= 0) {
      const float sum = hopper_warp_sum_f(slope_sum);
      const int64_t at = ((int64_t)(job.z * c.heads + slope_head) * c.plan.col_tiles + job.x) * 8 + w * 4 + warp;
      if (lane == 0) c.slope_part[at] = sum;
    }
    slope_sum = 0.f;
    slope_head = next;
  }
};

#endif
