// the gradient of a bias on Hopper: TMA and wgmma over the visible tiles of the plan
//
// dBias is dS, summed over what the bias is broadcast along. A block per multiprocessor stays for the whole launch and
// takes jobs from one counter: a tile of the bias, 128 x 128 or less where it has one row or column, with all tiles of
// pairs that share it, or a part of them where tiles are few. Their sum stays in registers and is written once, in a
// fixed order, so that it has the same bits every time.
//
//   warpgroup 0     gives its registers away. Warp 0 finds the tiles of pairs and loads Q and K, dO and V of each.
//   warpgroup 1, 2  64 queries each. S = Q K^T and dP = dO V^T of a tile run together; the exponentials of S under dP
//                   and under the products of the other warpgroup.
//
// Shared memory: six slots of 128 rows of Q, K, dO or V, 192 KiB, and the tile of the bias in halves, 32 KiB, each
// thread its own elements; or five slots and the tile in f32, 64 KiB. Registers: sums, S, dP: 64 each. Widths are
// padded to 128 with zeros, which TMA adds and memory does not send: what bounds the kernel is the second-level cache,
// 128 KiB a tile of pairs of width 128.
//
// There is no careful pass: S and dP of a pair are made of its own rows alone, and masked pairs are selected to 0.
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BIAS_GRADIENT_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BIAS_GRADIENT_CUH
#include "kernels/cuda/hopper_backward_call.cuh"
#include "kernels/cuda/hopper_block.cuh"

enum {
  HOPPER_BIAS_THREADS = 384,
  // 128 * 40 + 256 * 232 are the 384 * 168 registers that a block is launched with.
  HOPPER_BIAS_PRODUCER_REGISTERS = 40,
  HOPPER_BIAS_CONSUMER_REGISTERS = 232,
  HOPPER_BIAS_NOTES = 4,
  // Named barriers: of the warpgroups that multiply, of two warps of theirs.
  HOPPER_BIAS_BOTH = 1,
  HOPPER_BIAS_HALVES = 2,
  HOPPER_BIAS_EMPTY = -2,
  // What a note is about.
  HOPPER_BIAS_END = 0,    // nothing is left
  HOPPER_BIAS_BEGIN = 1,  // a tile of the bias
  HOPPER_BIAS_STEP = 2,   // a tile of pairs
  HOPPER_BIAS_WRITE = 3   // the end of the job
};

// WIDE: the bias is in f32. Else its tile is kept in halves, which leaves room for a sixth slot.
template <class T, bool WIDE>
struct hopper_bias_shape {
  using type = T;
  static constexpr bool wide = WIDE;
  static constexpr int slots = WIDE ? 5 : 6;
  // Shared memory, from where it starts. The sums of one warpgroup lie where the bias was, each thread's four in a row
  // apart by a bank more than they need, so that rows of the tile are read well.
  static constexpr uint32_t slot_bytes = SA_TILE * 128 * 2, values = slots * slot_bytes, sums_bytes = 16 * 129 * 16,
                            note = values + (WIDE ? SA_TILE * SA_TILE * 4 : sums_bytes),
                            slot_full = note + 32 * HOPPER_BIAS_NOTES, slot_free = slot_full + 8 * slots,
                            note_full = slot_free + 8 * slots, note_free = note_full + 8 * HOPPER_BIAS_NOTES,
                            bytes = note_free + 8 * HOPPER_BIAS_NOTES;
  static_assert(bytes <= 227 << 10, "shared memory of a block");
};

// What is summed. The dims are batches, heads, rows of tiles and columns of tiles.
typedef struct hopper_bias_sums {
  sa_operand to;     // dBias
  int32_t shape[4];  // of it, in elements
  int32_t tiles[4];  // 1 where it is broadcast
  int32_t turns[4];  // how many of the dim share a tile
  int32_t parts;     // blocks that share a tile
  int32_t jobs;      // tiles * parts
  int32_t fours;     // four neighbouring keys can be written at once
  int64_t count;     // elements
  float *part;       // [parts][elements], or NULL: dBias itself is written
} hopper_bias_sums;

// Warp 0 of warpgroup 0.
template <class SHAPE>
struct hopper_bias_producer {
  const hopper_backward_call &c;
  const hopper_bias_sums &sums;
  const uint32_t base;
  const int lane = threadIdx.x % 32;
  hopper_ring<SHAPE::slots> slot;
  hopper_ring<HOPPER_BIAS_NOTES> note;

  __device__ __forceinline__ hopper_bias_producer(const hopper_backward_call &call, const hopper_bias_sums &all,
                                                  uint32_t start)
      : c(call), sums(all), base(start) {}

  // `extra`: the pattern of a tile of pairs, the part of a tile of the bias.
  __device__ __forceinline__ void tell(int kind, const int (&at)[4], int extra) {
    if (lane == 0) {
      const uint32_t to = base + SHAPE::note + 32 * note.at;
      mbarrier_wait(base + SHAPE::note_free + 8 * note.at, note.parity ^ 1);
      shared_store_4i(to, kind, at[0], at[1], extra);
      shared_store_4i(to + 16, at[2] * SA_TILE, at[3] * SA_TILE, 0, 0);
      mbarrier_arrive(base + SHAPE::note_full + 8 * note.at);
    }
    note.next();
  }

  // The next slot, once it is free: it waits for its bytes.
  __device__ __forceinline__ uint32_t begin_slot() {
    mbarrier_wait(base + SHAPE::slot_free + 8 * slot.at, slot.parity ^ 1);
    mbarrier_arrive_expect(base + SHAPE::slot_full + 8 * slot.at, SHAPE::slot_bytes);
    return base + slot.at * SHAPE::slot_bytes;
  }

  // 128 rows of Q or dO, 64 for each warpgroup.
  __device__ __forceinline__ void load_queries(const CUtensorMap *map, int row, int head, int batch) {
    if (lane == 0) {
      const uint32_t to = begin_slot(), full = base + SHAPE::slot_full + 8 * slot.at;
#pragma unroll
      for (int box = 0; box < 4; box++) {
        tma_load(to + box * 64 * 128, map, box % 2 * SA_PANEL, row + box / 2 * 64, head, batch, full);
      }
    }
    slot.next();
  }

  // 128 rows of K or V.
  __device__ __forceinline__ void load_keys(const CUtensorMap *map, int row, int head, int batch) {
    if (lane == 0) {
      const uint32_t to = begin_slot(), full = base + SHAPE::slot_full + 8 * slot.at;
      tma_load(to, map, 0, row, head, batch, full);
      tma_load(to + SA_TILE * 128, map, SA_PANEL, row, head, batch, full);
    }
    slot.next();
  }

  // The pattern of a tile of pairs, SA_FULL, or HOPPER_BIAS_EMPTY.
  __device__ __forceinline__ int pattern_of(int64_t row_of_tiles, int column) const {
    const int64_t *start = c.plan.row_start + row_of_tiles;
#pragma unroll 1
    for (int64_t r = start[0] + lane; __any_sync(~0u, r < start[1]); r += 32) {
      sa_run run = {0, 0, 0};
      if (r < start[1]) run = c.plan.row_runs[r];
      const uint32_t found = __ballot_sync(~0u, run.first <= column && column < run.first + run.count);
      if (found) return __shfl_sync(~0u, run.pattern, __ffs(found) - 1);
    }
    return HOPPER_BIAS_EMPTY;
  }

  // The tiles of pairs from turn `from` to turn `to` of a tile of the bias.
  __device__ __forceinline__ void send_turns(const int (&tile)[4], int64_t from, int64_t to) {
    int turn[4], pattern = HOPPER_BIAS_EMPTY, looked_column = -1;
    int64_t left = from, looked = -1;
#pragma unroll
    for (int d = 3; d >= 0; d--) {
      turn[d] = (int)(left % sums.turns[d]);
      left /= sums.turns[d];
    }
#pragma unroll 1
    for (; from < to; from++) {
      const int at[4] = {tile[0] + turn[0], tile[1] + turn[1], tile[2] + turn[2], tile[3] + turn[3]};
      const int64_t row_of_tiles = sa_device_plane(c.plan, at[0], at[1]) * c.plan.row_tiles + at[2];
      if (row_of_tiles != looked || at[3] != looked_column) {
        looked = row_of_tiles;
        looked_column = at[3];
        pattern = pattern_of(looked, looked_column);
      }
      if (pattern != HOPPER_BIAS_EMPTY) {
        const int batch = at[0], head = at[1], key_head = head / c.group;
        tell(HOPPER_BIAS_STEP, at, pattern);
        load_queries(&c.q, at[2] * SA_TILE, head * c.q_head_step, batch * c.q_batch_step);
        load_keys(&c.k, at[3] * SA_TILE, key_head * c.k_head_step, batch * c.k_batch_step);
        load_queries(&c.dout, at[2] * SA_TILE, head * c.dout_head_step, batch * c.dout_batch_step);
        load_keys(&c.v, at[3] * SA_TILE, key_head * c.v_head_step, batch * c.v_batch_step);
      }
      bool carry = true;
#pragma unroll
      for (int d = 3; d >= 0; d--) {
        turn[d] += carry;
        carry = turn[d] == sums.turns[d];
        if (carry) turn[d] = 0;
      }
    }
  }

  // Lane 0 waits and loads; all lanes look for patterns.
  __device__ __forceinline__ void run() {
    const int64_t turns = (int64_t)sums.turns[0] * sums.turns[1] * sums.turns[2] * sums.turns[3];
#pragma unroll 1
    for (;;) {
      int job = 0, tile[4];
      if (lane == 0) job = atomicAdd(c.next_job + 2, 1);
      job = __shfl_sync(~0u, job, 0);
      if (job >= sums.jobs) break;
      const int part = job % sums.parts;
      job /= sums.parts;
#pragma unroll
      for (int d = 3; d >= 0; d--) {
        tile[d] = job % sums.tiles[d];
        job /= sums.tiles[d];
      }
      tell(HOPPER_BIAS_BEGIN, tile, part);
      send_turns(tile, turns * part / sums.parts, turns * (part + 1) / sums.parts);
      tell(HOPPER_BIAS_WRITE, tile, part);
    }
    const int nowhere[4] = {0, 0, 0, 0};
    tell(HOPPER_BIAS_END, nowhere, 0);
  }
};

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

template <class SHAPE>
__global__ void __launch_bounds__(HOPPER_BIAS_THREADS, 1)
    hopper_bias_gradient(const __grid_constant__ hopper_backward_call c,
                         const __grid_constant__ hopper_bias_sums sums) {
  const uint32_t base = hopper_block_memory();
  const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    hopper_block_slots(base + SHAPE::slot_full, base + SHAPE::slot_free, SHAPE::slots, 8);
    hopper_block_slots(base + SHAPE::note_full, base + SHAPE::note_free, HOPPER_BIAS_NOTES, 8);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp < 4) {
    registers_give_back<HOPPER_BIAS_PRODUCER_REGISTERS>();
    if (warp == 0) hopper_bias_producer<SHAPE>(c, sums, base).run();
  } else {
    registers_take<HOPPER_BIAS_CONSUMER_REGISTERS>();
    hopper_bias_consumer<SHAPE>(c, sums, base).run();
  }
}

// Of hopper_bias_gradient.cu: whether it makes the gradient of a problem's bias, and that, after the statistics of the
// rows.
bool hopper_bias_gradient_covers(const sa_problem *p);
int hopper_bias_gradient_launch(const sa_problem *p, const hopper_backward_call &c, cudaStream_t stream);

#endif
