// the warpgroups that make dS of tiles of pairs, sum it, and write the gradient of the bias
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BIAS_GRADIENT_CONSUMER_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BIAS_GRADIENT_CONSUMER_CUH
#include "kernels/cuda/hopper_bias_gradient_call.cuh"
#include "kernels/cuda/hopper_block.cuh"

// A note, as the warpgroups that multiply read it.
typedef struct hopper_bias_note {
  int kind, batch, head, extra, row, column;
} hopper_bias_note;

// A thread of the two warpgroups that multiply. Its rows of the tile are row() and row() + 8; of the pairs 4 j .. 4 j +
// 3 the first two are row()'s, keys 8 j + column() and the next.
template <class SHAPE>
struct hopper_bias_consumer {
  using T = typename SHAPE::type;
  static constexpr int pairs = SA_TILE / 2;
  const hopper_backward_call &c;
  const hopper_bias_sums &sums;
  const uint32_t base;
  const int lane = threadIdx.x % 32, w = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4;
  float sum[pairs];
  uint2 open;  // pairs whose bias is not -inf, in the order of the plan's row_bits
  hopper_ring<SHAPE::slots> slot;
  hopper_ring<HOPPER_BIAS_NOTES> note;

  __device__ __forceinline__ hopper_bias_consumer(const hopper_backward_call &call, const hopper_bias_sums &all,
                                                  uint32_t start)
      : c(call), sums(all), base(start) {}

  __device__ __forceinline__ int row() const { return warp * 16 + lane / 4; }
  __device__ __forceinline__ int column() const { return lane % 4 * 2; }

  // Where this thread keeps four pairs of the bias.
  __device__ __forceinline__ uint32_t place(int four) const {
    return base + SHAPE::values + (four * 256 + warp * 32 + lane) * (SHAPE::wide ? 16 : 8);
  }

  __device__ __forceinline__ void keep_four(int four, const float (&x)[4]) const {
    if constexpr (SHAPE::wide) {
      shared_store_4(place(four), x[0], x[1], x[2], x[3]);
    } else {
      shared_store(place(four), pack_halves<T>(x[0], x[1])), shared_store(place(four) + 4, pack_halves<T>(x[2], x[3]));
    }
  }

  __device__ __forceinline__ float4 kept_four(int four) const {
    if constexpr (SHAPE::wide) return shared_load_4(place(four));
    const float2 x = shared_load_2(place(four));
    const uint32_t upper = __float_as_uint(x.x), lower = __float_as_uint(x.y);
    return make_float4(hopper_low<T>(upper), hopper_high<T>(upper), hopper_low<T>(lower), hopper_high<T>(lower));
  }

  // Where thread t of a warpgroup leaves four of its sums.
  __device__ __forceinline__ uint32_t sums_place(int four, int t) const {
    return base + SHAPE::values + (four * 129 + t) * 16;
  }

  __device__ __forceinline__ void release(uint32_t barrier) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  __device__ __forceinline__ hopper_bias_note read_note() {
    mbarrier_wait(base + SHAPE::note_full + 8 * note.at, note.parity);
    const uint32_t from = base + SHAPE::note + 32 * note.at;
    const int4 one = shared_load_4i(from), two = shared_load_4i(from + 16);
    release(base + SHAPE::note_free + 8 * note.at);
    note.next();
    return {one.x, one.y, one.z, one.w, two.x, two.y};
  }

  // The slots of a tile of pairs are the four from `slot` on.
  __device__ __forceinline__ int place_of(int n) const {
    return slot.at + n < SHAPE::slots ? slot.at + n : slot.at + n - SHAPE::slots;
  }

  __device__ __forceinline__ void next_slots() {
    slot.parity ^= slot.at + 4 >= SHAPE::slots;
    slot.at = place_of(4);
  }

  // Once it is full.
  __device__ __forceinline__ uint32_t await_slot(int n) {
    mbarrier_wait(base + SHAPE::slot_full + 8 * place_of(n), slot.parity ^ (slot.at + n >= SHAPE::slots));
    return base + place_of(n) * SHAPE::slot_bytes;
  }

  __device__ __forceinline__ void release_slot(int n) { release(base + SHAPE::slot_free + 8 * place_of(n)); }

  // D = A B^T of two slots.
  __device__ __forceinline__ void start_product(float (&d)[pairs], int first) {
    const uint32_t a = await_slot(first), b = await_slot(first + 1);
    wgmma_fence();
    hopper_product_rows_rows<T, 128 / 16, 64 * 128, SA_TILE * 128>(d, wgmma_operand(a + w * (SHAPE::slot_bytes / 2), 0),
                                                                   wgmma_operand(b, 0));
    wgmma_commit();
  }

  static __device__ __forceinline__ float2 pair_of(float2 x) { return x; }
  static __device__ __forceinline__ float2 pair_of(uint32_t x) {
    return make_float2(hopper_low<T>(x), hopper_high<T>(x));
  }
  static __device__ __forceinline__ float value_of(float x) { return x; }
  static __device__ __forceinline__ float value_of(uint16_t x) { return hopper_low<T>(x); }

  // Two keys from `key` on: at once where E is a pair; else what lies beyond the last is read from the last.
  template <class E>
  __device__ __forceinline__ float2 two_keys(const void *row, int key) const {
    const int64_t stride = c.scores.bias.stride[3];
    if constexpr (sizeof(E) == sizeof(float2) || std::is_same<E, uint32_t>::value) {
      return pair_of(__ldg((const E *)row + key / 2));
    } else {
      return make_float2(value_of(__ldg((const E *)row + min(key, c.keys - 1) * stride)),
                         value_of(__ldg((const E *)row + min(key + 1, c.keys - 1) * stride)));
    }
  }

  // The bias of the tile to this thread's place; the last query is read for those beyond it.
  template <class E, int BYTES>
  __device__ __forceinline__ void keep_bias(const hopper_bias_note &tile) {
    const sa_operand &x = c.scores.bias;
    const char *from = (const char *)x.data + (tile.batch * x.stride[0] + tile.head * x.stride[1]) * BYTES;
    const char *rows[2] = {from + min(tile.row + row(), c.queries - 1) * x.stride[2] * BYTES,
                           from + min(tile.row + row() + 8, c.queries - 1) * x.stride[2] * BYTES};
    open = make_uint2(~0u, ~0u);
#pragma unroll
    for (int j = 0; j < pairs / 4; j++) {
      const int key = tile.column + 8 * j + column();
      const float2 upper = two_keys<E>(rows[0], key), lower = two_keys<E>(rows[1], key);
      const float value[4] = {upper.x, upper.y, lower.x, lower.y};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t bit = value[i] == -INFINITY ? 1u << (2 * j + (i & 1)) : 0;
        (i & 2 ? open.y : open.x) &= ~bit;
      }
      keep_four(j, value);
    }
  }

  __device__ __forceinline__ void begin(const hopper_bias_note &tile) {
    const bool whole = c.scores.bias_pairs && tile.column + SA_TILE <= c.keys;
    if constexpr (SHAPE::wide) {
      whole ? keep_bias<float2, 4>(tile) : keep_bias<float, 4>(tile);
    } else {
      whole ? keep_bias<uint32_t, 2>(tile) : keep_bias<uint16_t, 2>(tile);
    }
#pragma unroll
    for (int i = 0; i < pairs; i++) sum[i] = 0.f;
  }

  // dS of a tile of pairs, added to the sums.
  __device__ __forceinline__ void step(const hopper_bias_note &tile) {
    const hopper_scores &rule = c.scores;
    float s[pairs], dp[pairs];
    start_product(s, 0);
    start_product(dp, 2);
    const int64_t at = (int64_t)(tile.batch * c.heads + tile.head) * c.padded + hopper_backward_slot(tile.row + row());
    const float minus[2] = {__ldg(c.lse_log2 + at), __ldg(c.lse_log2 + at + 2)};
    const float less[2] = {__ldg(c.log2_sum + at), __ldg(c.log2_sum + at + 2)};
    uint2 seen = open;
    if (tile.extra >= 0) {
      const uint2 bits = __ldg(c.plan.row_bits + (int64_t)tile.extra * 256 + warp * 32 + lane);
      seen.x &= bits.x, seen.y &= bits.y;
    }
    const bool all = __all_sync(~0u, (seen.x & seen.y) == ~0u);
    wgmma_wait<1>();
    pin(s);
    release_slot(0), release_slot(1);
    const float delta[2] = {__ldg(c.delta + at), __ldg(c.delta + at + 2)};
#pragma unroll
    for (int j = 0; j < pairs / 4; j++) {
      const float4 four = kept_four(j);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float bias = i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
        const float score = __fadd_rn(hopper_score(rule, s[4 * j + i], bias), minus[i >> 1]);
        s[4 * j + i] = exp2_fast(fmaf(score, rule.unit, -less[i >> 1]));
      }
    }
    wgmma_wait<0>();
    pin(dp);
    release_slot(2), release_slot(3);
    if (all) {
#pragma unroll
      for (int i = 0; i < pairs; i++) sum[i] = fmaf(s[i], dp[i] - delta[i >> 1 & 1], sum[i]);
    } else {  // selected: whatever a masked pair has, it gives 0
#pragma unroll
      for (int i = 0; i < pairs; i++) {
        const float ds = fmaf(s[i], dp[i] - delta[i >> 1 & 1], sum[i]);
        sum[i] = (i & 2 ? seen.y : seen.x) >> (i / 4 * 2 + i % 2) & 1 ? ds : sum[i];
      }
    }
  }

  // Two neighbouring keys of the sums of a warpgroup, as their thread left them.
  __device__ __forceinline__ float2 summed(int row, int key) const {
    return shared_load_2(sums_place(key / 8, row / 16 * 32 + row % 8 * 4 + key % 8 / 2) + (row & 8));
  }

  // An element of the bias; `row` and `column` are its own.
  __device__ __forceinline__ void put(const hopper_bias_note &tile, int row, int column, float x) {
    if (row >= sums.shape[2] || column >= sums.shape[3]) return;
    if (sums.part) {
      const int64_t plane = (int64_t)tile.batch * sums.shape[1] + tile.head;
      sums.part[tile.extra * sums.count + (plane * sums.shape[2] + row) * sums.shape[3] + column] = x;
      return;
    }
    const int64_t *stride = sums.to.stride;
    const int64_t at = tile.batch * stride[0] + tile.head * stride[1] + row * stride[2] + column * stride[3];
    if (sums.to.dtype == SA_F32) {
      ((float *)sums.to.data)[at] = x;
    } else {
      ((uint16_t *)sums.to.data)[at] = (uint16_t)pack_halves<T>(x, 0.f);
    }
  }

  // Four neighbouring elements at once.
  __device__ __forceinline__ void put_four(const hopper_bias_note &tile, int row, int column, float2 x, float2 y) {
    if (row >= sums.shape[2] || column >= sums.shape[3]) return;
    const int64_t *stride = sums.to.stride;
    const int64_t at = tile.batch * stride[0] + tile.head * stride[1] + row * stride[2] + column;
    if (sums.to.dtype == SA_F32) {
      *(float4 *)((float *)sums.to.data + at) = make_float4(x.x, x.y, y.x, y.y);
    } else {
      *(uint2 *)((uint16_t *)sums.to.data + at) = make_uint2(pack_halves<T>(x.x, x.y), pack_halves<T>(y.x, y.y));
    }
  }

  // The rows of a warpgroup, one a warp; where the bias has one key, their sums.
  __device__ __forceinline__ void write_rows(const hopper_bias_note &tile, int group) {
#pragma unroll 1
    for (int row = warp; row < 64; row += 8) {
      const float2 x = summed(row, 4 * lane), y = summed(row, 4 * lane + 2);
      const int to = tile.row + group * 64 + row, column = tile.column + 4 * lane;
      if (sums.shape[3] == 1) {
        const float all = hopper_warp_sum_f(x.x + x.y + y.x + y.y);
        if (lane == 0) put(tile, to, 0, all);
      } else if (sums.fours) {
        put_four(tile, to, column, x, y);
      } else {
        put(tile, to, column, x.x), put(tile, to, column + 1, x.y);
        put(tile, to, column + 2, y.x), put(tile, to, column + 3, y.y);
      }
    }
  }

  // Where the bias has one row: the sums of two keys a thread of warps 0 and 1.
  __device__ __forceinline__ void add_rows(float2 &all) {
    if (warp >= 2) return;
#pragma unroll 8
    for (int row = 0; row < 64; row++) {
      const float2 x = summed(row, 2 * (warp * 32 + lane));
      all.x += x.x, all.y += x.y;
    }
  }

  // Where it has one key too, their sum.
  __device__ __forceinline__ void write_keys(const hopper_bias_note &tile, float2 all) {
    const int column = tile.column + 2 * (warp * 32 + lane);
    if (warp >= 2) return;
    if (sums.shape[3] > 1) {
      put(tile, 0, column, all.x), put(tile, 0, column + 1, all.y);
      return;
    }
    const float half = hopper_warp_sum_f(all.x + all.y);
    named_barrier_sync(HOPPER_BIAS_HALVES, 64);
    if (warp == 1 && lane == 0) shared_store(sums_place(0, 0), __float_as_int(half));
    named_barrier_sync(HOPPER_BIAS_HALVES, 64);
    if (warp == 0 && lane == 0) put(tile, 0, 0, half + __int_as_float(shared_load(sums_place(0, 0))));
  }

  // By way of shared memory, one warpgroup's rows after the other's.
  __device__ __forceinline__ void write(const hopper_bias_note &tile) {
    float2 all = make_float2(0.f, 0.f);
#pragma unroll 1
    for (int group = 0; group < 2; group++) {
      named_barrier_sync(HOPPER_BIAS_BOTH, 256);
      if (w == group) {
#pragma unroll
        for (int j = 0; j < pairs / 4; j++)
          shared_store_4(sums_place(j, threadIdx.x % 128), sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
      }
      named_barrier_sync(HOPPER_BIAS_BOTH, 256);
      if (sums.shape[2] == 1) {
        add_rows(all);
      } else {
        write_rows(tile, group);
      }
    }
    if (sums.shape[2] == 1) write_keys(tile, all);
    named_barrier_sync(HOPPER_BIAS_BOTH, 256);
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (;;) {
      const hopper_bias_note tile = read_note();
      if (tile.kind == HOPPER_BIAS_STEP) {
        step(tile);
        next_slots();
      } else if (tile.kind == HOPPER_BIAS_BEGIN) {
        begin(tile);
      } else if (tile.kind == HOPPER_BIAS_WRITE) {
        write(tile);
      } else {
        return;
      }
    }
  }
};

#endif
