// what both passes of hopper_backward_wide.cuh have in common: shapes, jobs, loads, the writing of gradients
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WIDE_JOBS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_WIDE_JOBS_CUH
#include "kernels/cuda/hopper_backward_call.cuh"
#include "kernels/cuda/hopper_block.cuh"

enum {
  HOPPER_WIDE_THREADS = 384,
  // 128 * 40 + 256 * 232 are the 384 * 168 registers that a block is launched with.
  HOPPER_WIDE_PRODUCER_REGISTERS = 40,
  HOPPER_WIDE_CONSUMER_REGISTERS = 232,
  HOPPER_WIDE_ROWS = 64,  // of an operand that are loaded together
  HOPPER_WIDE_PANEL_BYTES = HOPPER_WIDE_ROWS * 128,
  HOPPER_WIDE_BITS = SA_TILE * SA_TILE / 8,  // bytes of a pattern
  // Shared memory: its end has the mbarriers of both passes, each its own, as one must not lie on another's data.
  HOPPER_WIDE_BYTES = 227 << 10,
  HOPPER_WIDE_QUERIES_MBARRIERS = HOPPER_WIDE_BYTES - 256,
  HOPPER_WIDE_KEYS_MBARRIERS = HOPPER_WIDE_QUERIES_MBARRIERS - 256,
  // Named barriers; that of a warpgroup is two.
  HOPPER_WIDE_BOTH = 1,
  HOPPER_WIDE_WARPGROUP = 2,
  HOPPER_WIDE_BETWEEN = 4
};

template <class T, int WIDTH, int VALUE_WIDTH>
struct hopper_wide_shape {
  using type = T;
  static constexpr int width = WIDTH, value_width = VALUE_WIDTH;
  static constexpr uint32_t k_bytes = WIDTH / SA_PANEL * HOPPER_WIDE_PANEL_BYTES,
                            v_bytes = VALUE_WIDTH / SA_PANEL * HOPPER_WIDE_PANEL_BYTES;  // 64 rows of K or Q; V or dO
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

// Warp 0 of a pass: loads for jobs until there are none left.
template <class PRODUCER>
static __device__ __forceinline__ void hopper_wide_load_jobs(const hopper_backward_call &call, uint32_t start) {
  PRODUCER producer(call, start);
#pragma unroll 1
  for (int n = 0;; n++) {
    const hopper_wide_job job = producer.next_job();
    if (producer.lane == 0) producer.announce(n, job);
    if (job.steps < 0) return;
    if (producer.lane == 0 && job.steps > 0) producer.load_job(job);
    __syncwarp();
  }
}

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

#endif
