// backward attention on Hopper for widths up to 128: jobs, and the warp that loads what they multiply
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_LOADS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_LOADS_CUH
#include "kernels/cuda/hopper_backward_shape.cuh"

// The tiles of a column that a head sees, in ascending order or in descending: of its runs, the PARTIAL ones and the
// FULL ones, which lie one after the other, each time the one that comes first. In another order the jobs would wait
// for each other's turns.
typedef struct hopper_backward_walk {
  const sa_run *partial, *full;
  int partials, fulls;           // that are left
  int row, rows, step, pattern;  // of the run at hand: the next tile, how many, 1 or -1, SA_FULL or which pattern

  __device__ __forceinline__ void open(const sa_run *runs, int count, bool descending) {
    int high = count;  // runs before `partials` are PARTIAL, from `high` on FULL
    partials = 0;
    while (partials < high) {
      const int middle = (partials + high) / 2;
      if (runs[middle].pattern >= 0) {
        partials = middle + 1;
      } else {
        high = middle;
      }
    }
    fulls = count - partials;
    step = descending ? -1 : 1;
    partial = descending ? runs + partials - 1 : runs;
    full = descending ? runs + count - 1 : runs + partials;
  }

  __device__ __forceinline__ bool next() {
    if (partials == 0 && fulls == 0) return false;
    const bool take_full = partials == 0 || (fulls > 0 && (full->first - partial->first) * step < 0);
    const sa_run *run = take_full ? full : partial;
    rows = run->count;
    row = run->first + (step < 0 ? rows - 1 : 0);
    pattern = run->pattern;
    if (take_full) {
      full += step;
      fulls--;
    } else {
      partial += step;
      partials--;
    }
    return true;
  }
} hopper_backward_walk;

// A job as the producer finds it, and as shared memory has it: two times 16 bytes.
typedef struct hopper_backward_job {
  int column, steps, batch, key_head;  // steps: 0 when no query sees these keys, -1 when there is no job
  int first, tiles;  // of what the group has in this column, `abreast` heads after the other, in `abreast` tiles
  int part, shared;  // of a shared column, which of its jobs, and its number; else -1
} hopper_backward_job;

// What every warp of warpgroup 0 knows of jobs.
template <class SHAPE, bool CAREFUL>
struct hopper_backward_jobs {
  using type = typename SHAPE::type;
  const hopper_backward_call &c;
  const uint32_t base;
  const int lane = threadIdx.x % 32;

  __device__ __forceinline__ hopper_backward_jobs(const hopper_backward_call &call, uint32_t start)
      : c(call), base(start) {}

  __device__ __forceinline__ int64_t plane(int batch, int head) const { return sa_device_plane(c.plan, batch, head); }

  // The runs of a column are col_runs[*start .. start[1]).
  __device__ __forceinline__ const int64_t *runs_of(int batch, int head, int column) const {
    return c.plan.col_start + plane(batch, head) * c.plan.col_tiles + column;
  }

  __device__ __forceinline__ int chunk(int batch, int head, int row_tile) const {
    return ((batch * c.heads + head) * (c.padded / 64) + row_tile * 2) * SHAPE::panels;
  }

  __device__ __forceinline__ int tiles_of(const hopper_backward_job &job) const {
    int tiles = 0;
#pragma unroll 1
    for (int head = job.key_head * c.group; head < (job.key_head + 1) * c.group; head += c.abreast) {
      const int64_t *start = runs_of(job.batch, head, job.column);
      const sa_run *run = c.plan.col_runs + start[0] + lane;
#pragma unroll 1
      for (int left = (int)(start[1] - start[0]) - lane; left > 0; left -= 32, run += 32) tiles += run->count;
    }
    return hopper_warp_sum(tiles);
  }

  // Whether the careful launch has to do a job: its keys are flagged, or queries that see them.
  __device__ __forceinline__ bool flagged(const hopper_backward_job &job) const {
    bool bad = c.bad_key[(job.batch * c.key_heads + job.key_head) * c.plan.col_tiles + job.column];
#pragma unroll 1
    for (int head = job.key_head * c.group; head < (job.key_head + 1) * c.group; head++) {
      const int64_t *start = runs_of(job.batch, head, job.column);
#pragma unroll 1
      for (int64_t r = start[0]; r < start[1]; r++) {
        const sa_run run = c.plan.col_runs[r];
        const int32_t *notes = c.bad_query + chunk(job.batch, head, run.first);
#pragma unroll 1
        for (int n = lane; n < run.count * 2 * SHAPE::panels; n += 32) bad |= notes[n] != 0;
      }
    }
    return __any_sync(~0u, bad);
  }

  // Which column comes `rank`th where the longest are begun first.
  __device__ __forceinline__ int descended(int rank) const {
    const int even = (c.plan.col_tiles + 1) / 2;
    return !c.alternate ? rank : rank < even ? 2 * rank : 2 * (rank - even) + 1;
  }

  // Which job is taken `id`th.
  __device__ __forceinline__ int led(int id) const {
    if (id < c.lead || id >= c.brought + c.lead) return id;
    return id < 2 * c.lead ? id - c.lead + c.brought : id - c.lead;
  }

  __device__ __forceinline__ hopper_backward_job next_job() {
#pragma unroll 1
    for (;;) {
      int id = 0;
      if (lane == 0) id = atomicAdd(c.next_job + CAREFUL, 1);
      id = led(__shfl_sync(~0u, id, 0));
      hopper_backward_job job = {};
      job.shared = job.steps = -1;
      if (id >= c.whole) {
        const int shared = c.jobs - c.whole;
        if (id - c.whole >= shared * c.parts) return job;
        job.part = (id - c.whole) / shared;
        job.shared = (id - c.whole) % shared;
        id = c.whole + job.shared;
      }
      const int columns = c.plan.col_tiles, span = c.mixed * columns, first = id / span * c.mixed;
      const int heads = min(c.mixed, c.batch * c.key_heads - first), in_span = id % span;
      const int place = first + in_span % heads, rank = in_span / heads;
      const int flat = c.sorted ? c.head_order[place] : place;
      job.batch = flat / c.key_heads;
      job.key_head = flat % c.key_heads;
      job.column = CAREFUL || c.deterministic
                       ? (c.descending ? descended(rank) : columns - 1 - rank)
                       : c.plan.col_order[plane(job.batch, job.key_head * c.group) * columns + rank];
      if (CAREFUL && !flagged(job)) continue;
      const int64_t tiles = tiles_of(job);
      if (job.shared >= 0 && tiles < c.parts) {
        if (job.part > 0) continue;
        job.shared = -1;
      }
      const int parts = job.shared < 0 ? 1 : c.parts;
      job.first = (int)(tiles * job.part / parts);
      job.tiles = (int)(tiles * (job.part + 1) / parts) - job.first;
      job.steps = job.tiles * c.abreast * SHAPE::steps;
      return job;
    }
  }

  // Of job n, which is at hand: looked up again where it is needed, as registers are few.
  __device__ __forceinline__ int job_column(int n) const {
    return shared_load(base + SHAPE::job + 32 * (n & 1));
  }
  __device__ __forceinline__ int job_batch(int n) const {
    return shared_load(base + SHAPE::job + 32 * (n & 1) + 8);
  }
  __device__ __forceinline__ int job_key_head(int n) const {
    return shared_load(base + SHAPE::job + 32 * (n & 1) + 12);
  }

  // visit(head, row, pattern) for its tiles.
  template <class VISIT>
  __device__ __forceinline__ void each_tile(int n, VISIT visit) const {
    int skipped = shared_load(base + SHAPE::job + 32 * (n & 1) + 16);
    int left = shared_load(base + SHAPE::job + 32 * (n & 1) + 20);
#pragma unroll 1
    for (int head = job_key_head(n) * c.group; left > 0; head += c.abreast) {
      hopper_backward_walk walk;
      const int64_t *start = runs_of(job_batch(n), head, job_column(n));
      walk.open(c.plan.col_runs + start[0], (int)(start[1] - start[0]), c.descending);
      while (left > 0 && walk.next()) {
        const int over = min(skipped, walk.rows);
        skipped -= over;
        walk.rows = min(walk.rows - over, left);
        walk.row += over * walk.step;
        left -= walk.rows;
#pragma unroll 1
        for (; walk.rows > 0; walk.rows--, walk.row += walk.step) {
#pragma unroll 1
          for (int next = 0; next < c.abreast; next++) visit(head + next, walk.row, walk.pattern);
        }
      }
    }
  }

  __device__ __forceinline__ int64_t statistics(int batch, int head, int query) const {
    return (int64_t)(batch * c.heads + head) * c.padded + query;
  }

  __device__ __forceinline__ int4 wait_job(int n) {
    mbarrier_wait(base + SHAPE::job_full + 8 * (n & 1), n >> 1 & 1);
    return shared_load_4i(base + SHAPE::job + 32 * (n & 1));
  }

  __device__ __forceinline__ void release_job(int n) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(base + SHAPE::job_empty + 8 * (n & 1));
  }
};

// Keys that no query sees: zeros of their dK and dV, by `threads` threads of which this is number `thread`.
template <class T>
static __device__ __forceinline__ void hopper_backward_clear(const hopper_backward_call &c, int column, int batch,
                                                             int key_head, int thread, int threads) {
  const int first = column * SA_TILE, keys = min(c.keys - first, (int)SA_TILE);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const sa_operand &x = i == 0 ? c.dk_out : c.dv_out;
    const int pieces = (i == 0 ? c.width : c.value_width) / 8;
    if (!x.data) continue;
    T *rows = hopper_rows<T>(x, batch, key_head) + first * x.stride[2];
#pragma unroll 1
    for (int n = thread; n < keys * pieces; n += threads) {
      *(uint4 *)(rows + n / pieces * x.stride[2] + n % pieces * 8) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Warp 0.
template <class SHAPE, bool CAREFUL>
struct hopper_backward_loads : hopper_backward_jobs<SHAPE, CAREFUL> {
  using base_type = hopper_backward_jobs<SHAPE, CAREFUL>;
  using base_type::base;
  using base_type::c;
  using base_type::each_tile;
  using base_type::job_batch;
  using base_type::job_column;
  using base_type::job_key_head;
  using base_type::lane;
  using base_type::next_job;
  using base_type::statistics;
  using typename base_type::type;

  __device__ __forceinline__ hopper_backward_loads(const hopper_backward_call &call, uint32_t start)
      : base_type(call, start) {}

  // One lane: the boxes of an operand.
  __device__ __forceinline__ void load(uint32_t to, const CUtensorMap *map, int row, int rows, int head, int batch,
                                       uint32_t barrier) {
#pragma unroll
    for (int panel = 0; panel < SHAPE::panels; panel++) {
      tma_load(to + panel * rows * 128, map, panel * SA_PANEL, row, head, batch, barrier);
    }
  }

  int loaded = 0, jobs = 0;  // steps and jobs so far

  __device__ __forceinline__ void load_keys(int n) {
    mbarrier_wait(base + SHAPE::k_empty, (jobs & 1) ^ 1);
    mbarrier_arrive_expect(base + SHAPE::k_full, SHAPE::key_bytes);
    load(base + SHAPE::k, &c.k, job_column(n) * SA_TILE, SA_TILE, job_key_head(n) * c.k_head_step,
         job_batch(n) * c.k_batch_step, base + SHAPE::k_full);
  }

  __device__ __forceinline__ void load_values(int n) {
    mbarrier_wait(base + SHAPE::v_empty, (jobs & 1) ^ 1);
    mbarrier_arrive_expect(base + SHAPE::v_full, SHAPE::key_bytes);
    load(base + SHAPE::v, &c.v, job_column(n) * SA_TILE, SA_TILE, job_key_head(n) * c.v_head_step,
         job_batch(n) * c.v_batch_step, base + SHAPE::v_full);
  }

  // Q of a step, the statistics and bits that its scores need.
  __device__ __forceinline__ void load_queries(int batch, int head, int query, int pattern) {
    const int slot = loaded % SHAPE::q_slots;
    const uint32_t full = base + SHAPE::q_full + 8 * slot;
    mbarrier_wait(base + SHAPE::q_empty + 8 * slot, (loaded / SHAPE::q_slots & 1) ^ 1);
    const float slope = SHAPE::extras & HOPPER_BACKWARD_ALIBI ? hopper_slope(c.scores, head) : 0.f;
    shared_store_4i(base + SHAPE::step + 16 * slot, pattern >= 0, query, head, __float_as_int(slope));
    mbarrier_arrive_expect(full, SHAPE::query_bytes + (SHAPE::biased ? 2 : 1) * SHAPE::queries * 4 +
                                     (pattern >= 0 ? SHAPE::bits_bytes : 0));
    load(base + SHAPE::q + slot * SHAPE::query_bytes, &c.q, query, SHAPE::queries, head * c.q_head_step,
         batch * c.q_batch_step, full);
    bulk_load(base + SHAPE::lse + slot * SHAPE::queries * 4, c.lse_log2 + statistics(batch, head, query),
              SHAPE::queries * 4, full);
    if constexpr (SHAPE::biased) {
      bulk_load(base + SHAPE::log2_sum + slot * SHAPE::queries * 4, c.log2_sum + statistics(batch, head, query),
                SHAPE::queries * 4, full);
    }
    if (pattern < 0) return;
    bulk_load(base + SHAPE::bits + slot * SHAPE::bits_bytes,
              c.plan.col_bits + (int64_t)pattern * 512 + query % SA_TILE / 64 * 256, SHAPE::bits_bytes, full);
  }

  __device__ __forceinline__ void load_dout(int batch, int head, int query) {
    const int slot = loaded % SHAPE::dout_slots;
    const uint32_t full = base + SHAPE::dout_full + 8 * slot;
    mbarrier_wait(base + SHAPE::dout_empty + 8 * slot, (loaded / SHAPE::dout_slots & 1) ^ 1);
    mbarrier_arrive_expect(full, SHAPE::query_bytes + SHAPE::queries * 4);
    load(base + SHAPE::dout + slot * SHAPE::query_bytes, &c.dout, query, SHAPE::queries, head * c.dout_head_step,
         batch * c.dout_batch_step, full);
    bulk_load(base + SHAPE::delta + slot * SHAPE::queries * 4, c.delta + statistics(batch, head, query),
              SHAPE::queries * 4, full);
  }

  // Zeros of keys that no query sees, one lane: boxes of one slab of zeros. Their keys have no other work, and while a
  // warp wrote them by itself, 13000 cycles a column, those that multiply ran out of steps.
  __device__ __forceinline__ void clear(const hopper_backward_job &job) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (!(i == 0 ? c.dk_out : c.dv_out).data) continue;
#pragma unroll
      for (int n = 0; n < 2 * SHAPE::panels; n++) {
        tma_store(i == 0 ? &c.dk : &c.dv, n / 2 * SA_PANEL, job.column * SA_TILE + n % 2 * 64, job.key_head, job.batch,
                  base + SHAPE::zeros);
      }
    }
    bulk_commit();
  }

  // Q of the first step, V, dO, K, then Q and dO of each step.
  __device__ __forceinline__ void load_job(int n) {
    bool first = true;
    each_tile(n, [&](int head, int row, int pattern) {
#pragma unroll 1
      for (int step = 0; step < SHAPE::steps; step++) {
        const int query = row * SA_TILE + step * SHAPE::queries;
        load_queries(job_batch(n), head, query, pattern);
        if (first) load_values(n);
        load_dout(job_batch(n), head, query);
        if (first) load_keys(n);
        first = false;
        loaded++;
      }
    });
    if (!first) jobs++;
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int n = 0;;) {
      const hopper_backward_job job = next_job();
      if (SHAPE::loader_clears && job.steps == 0) {
        if (lane == 0) clear(job);
        continue;
      }
      if (lane == 0) {
        mbarrier_wait(base + SHAPE::job_empty + 8 * (n & 1), (n >> 1 & 1) ^ 1);
        const uint32_t to = base + SHAPE::job + 32 * (n & 1);
        shared_store_4i(to, job.column, job.steps, job.batch, job.key_head);
        shared_store_4i(to + 16, job.first, job.tiles, job.part, job.shared);
        mbarrier_arrive(base + SHAPE::job_full + 8 * (n & 1));
      }
      if (job.steps < 0) break;
      if (lane == 0) load_job(n);
      __syncwarp();
      n++;
    }
    if (lane == 0) bulk_wait_read<0>();
  }
};

#endif
