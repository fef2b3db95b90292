// the warp that finds the tiles of pairs which share a tile of the bias, and loads them
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BIAS_GRADIENT_PRODUCER_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BIAS_GRADIENT_PRODUCER_CUH
#include "kernels/cuda/hopper_bias_gradient_call.cuh"
#include "kernels/cuda/hopper_block.cuh"

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

#endif
