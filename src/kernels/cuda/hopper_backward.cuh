// backward attention on Hopper: TMA, wgmma and warp specialisation over the visible tiles of the plan
//
// hopper_backward_rows makes the row statistics, hopper_backward_tiles all gradients: a block per multiprocessor stays
// for the whole launch and takes jobs from one counter. A job is a column of tiles, 128 keys of a key head, with all
// queries that see them, of one head of the group after the other, so that dK and dV stay in registers. A step is a
// tile of 64 queries (128 at width 64). Sums of dQ that are made in any order become halves in a launch after it.
//
//   warpgroup 0     gives its registers away. Warp 0 loads in one stream across the jobs: K, V of a job, Q, dO, row
//                   statistics and bits of its steps. Warps 1 and 2 add the dQ that warpgroups 1 and 2 leave in shared
//                   memory to the sums in memory. Warp 3 looks up whose turn it is to add.
//   warpgroup 1, 2  64 keys each. S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T have a key per row; dV += P^T dO
//                   with P^T in registers, dK += dS^T Q and dQ = dS K with dS^T in shared memory. dV runs under the
//                   arithmetic of dS, the next S and dK under that of the exponentials; dQ comes one step late, so that
//                   the warpgroups, each of which needs the other's half of dS, may drift half a step apart.
//
// The producer's 24 registers may spill a few words in code that waits most of the time, the consumers at width 128 a
// dozen where a job ends; their loop does not.
//
//   width  queries a step  registers: dK, dV, S, dP, P  shared memory
//   64     128             32, 32, 64, 64, 32           213 KiB
//   128    64              64, 64, 32, 32, 16           213 KiB
//
// Shared memory: K, V, three slots of Q and two of dO (Q of a step is still read by its dK when the one after the next
// must load), two of dS, one of dQ. dS is made from the very halves of P that dV was made from, which costs a fifth
// more rounding in dQ and dK (2.9e-3 instead of 2.35e-3 of their norm) and saves the registers of P in f32.
//
// The sums of dQ. Key tiles add to the rows of a tile of queries one after the other, those with most keys before them
// first, so that the sums have the same bits every time. Each chunk of 64 x 64 sums has a counter of who is done. The
// first stores, so that nobody has to fill with zeros. The last adds the sums to its own dQ in registers and writes
// halves, so that nobody has to read the sums again when they have left the cache. Jobs are taken in the order in which
// they have their turns, and a job waits only for jobs taken before it: the oldest unfinished job never waits, so all
// come to an end. The counters are zeroed by the first launch of the same call. The order of a chunk's accesses, one
// line for each link:
//
//   bulk add (async proxy) -> bulk_wait: complete, and seen by the thread that issued it
//   -> async_proxy_fence_global: in order before that thread's ordinary accesses that follow (publish)
//   -> store_release of the counter -> load_acquire that reads it, by the one thread that issues the next bulk add
//   -> async_proxy_fence_global: in order before that thread's bulk copies that follow -> bulk add
//
// so each add happens after the one before it. The last to add meets its warpgroup at a barrier after the acquire, and
// the sums are read as ordinary memory. The launches that convert and do again come later in the stream.
//
// Extras (bias, softcap, ALiBi, dropout) are compiled into kernels of their own, one each and one for all, of width 128
// alone. P then goes two ways, as dropout is part of dV's and the softcap's derivative of dS's; the bias of a step is
// read into registers before its scores are there, for which dP is started after P.
//
// A column or a chunk whose result is not finite is noted, and a last launch (CAREFUL) does all columns that touch one
// again: the same products in the same order, but the elements of Q, dO and K that are not finite are replaced by 0
// where they are multiplied by P or dS, and their products then added one by one where the pair is visible. So keys and
// rows that see nothing of the kind get the very bits of a clean run; clean inputs pay for a test of the results.
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_CUH
#include "kernels/cuda/hopper_backward_call.cuh"

enum {
  HOPPER_BACKWARD_THREADS = 384,
  // 128 * 24 + 256 * 240 are the 384 * 168 registers that a block is launched with.
  HOPPER_BACKWARD_PRODUCER_REGISTERS = 24,
  HOPPER_BACKWARD_CONSUMER_REGISTERS = 240,
  HOPPER_BACKWARD_CHUNK = 64,  // rows and columns of the sums of dQ that are added at once
  HOPPER_BACKWARD_TURNS = 4,   // tiles whose turn is known ahead
  // Named barriers; those per warpgroup are two.
  HOPPER_BACKWARD_BOTH = 1,
  HOPPER_BACKWARD_DQ_FULL = 2,
  HOPPER_BACKWARD_DQ_EMPTY = 4,
  HOPPER_BACKWARD_WARPGROUP = 6,
  // What a kernel can do beyond the scale: the template argument EXTRAS.
  HOPPER_BACKWARD_BIAS = 1,
  HOPPER_BACKWARD_SOFTCAP = 2,  // up to HOPPER_SOFTCAP, larger ones with HOPPER_BACKWARD_ANY
  HOPPER_BACKWARD_ALIBI = 4,
  HOPPER_BACKWARD_DROPOUT = 8,
  HOPPER_BACKWARD_ANY = 15
};

template <class T, int WIDTH, bool CAREFUL, int EXTRAS = 0>
struct hopper_backward_shape {
  using type = T;
  static constexpr int extras = EXTRAS;
  static constexpr bool biased = EXTRAS & HOPPER_BACKWARD_BIAS;
  static constexpr bool splits =
      EXTRAS & (HOPPER_BACKWARD_SOFTCAP | HOPPER_BACKWARD_DROPOUT);  // P of dV from that of dS
  static constexpr int width = WIDTH, panels = WIDTH / SA_PANEL;
  static constexpr int queries = WIDTH == 64 ? 128 : 64;  // of a step
  static constexpr int steps = SA_TILE / queries;         // of a tile
  static constexpr int halves = queries / 64;             // words of bits a thread has of a step
  // The careful launch keeps a copy of K and has fewer slots instead.
  static constexpr int q_slots = CAREFUL ? 2 : 3, dout_slots = CAREFUL ? 1 : 2;
  static constexpr uint32_t key_bytes = SA_TILE * WIDTH * 2, query_bytes = queries * WIDTH * 2,
                            ds_bytes = queries * SA_TILE * 2, panel_bytes = SA_TILE * 128, slab_bytes = 64 * 128,
                            dq_bytes = 64 * 64 * 4, bits_bytes = halves * 1024;
  // Shared memory, from where it starts.
  static constexpr uint32_t k = 0, v = k + key_bytes, q = v + key_bytes, dout = q + q_slots * query_bytes,
                            ds = dout + dout_slots * query_bytes, dq = ds + 2 * ds_bytes, clean_k = dq + 2 * dq_bytes,
                            lse = clean_k + (CAREFUL ? key_bytes : 0), delta = lse + q_slots * queries * 4,
                            bits = delta + dout_slots * queries * 4, step = bits + q_slots * bits_bytes,
                            job = step + q_slots * 16, turn = job + 2 * 16, last = turn + HOPPER_BACKWARD_TURNS * 16,
                            log2_sum = last + 2 * 16, bad_q = log2_sum + (biased ? 4 * q_slots * queries : 0),
                            bad_dout = bad_q + (CAREFUL ? 4 * queries : 0),
                            bad_k = bad_dout + (CAREFUL ? 4 * queries : 0),
                            k_full = bad_k + (CAREFUL ? 4 * SA_TILE : 0), k_empty = k_full + 8, v_full = k_empty + 8,
                            v_empty = v_full + 8, job_full = v_empty + 8, job_empty = job_full + 16,
                            ds_done = job_empty + 16,  // [warpgroup][parity of the step]
      q_full = ds_done + 32, q_empty = q_full + 8 * q_slots, dout_full = q_empty + 8 * q_slots,
                            dout_empty = dout_full + 8 * dout_slots, turn_full = dout_empty + 8 * dout_slots,
                            turn_empty = turn_full + 8 * HOPPER_BACKWARD_TURNS,
                            bytes = turn_empty + 8 * HOPPER_BACKWARD_TURNS;
  static_assert(bytes <= 227 << 10, "shared memory of a block");
};

// The tiles of a column that a head sees, in ascending order: of its runs, the PARTIAL ones and the FULL ones, which
// lie one after the other, each time the one that comes first. In another order the jobs would wait for each other's
// turns.
typedef struct hopper_backward_walk {
  const sa_run *partial, *full;
  int partials, fulls;     // that are left
  int row, rows, pattern;  // of the run at hand: the first tile, how many, SA_FULL or which pattern

  __device__ __forceinline__ void open(const sa_run *runs, int count) {
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
    partial = runs;
    full = runs + partials;
    fulls = count - partials;
  }

  __device__ __forceinline__ bool next() {
    if (partials == 0 && fulls == 0) return false;
    const bool take_full = partials == 0 || (fulls > 0 && full->first < partial->first);
    const sa_run *run = take_full ? full : partial;
    row = run->first;
    rows = run->count;
    pattern = run->pattern;
    full += take_full;
    fulls -= take_full;
    partial += !take_full;
    partials -= !take_full;
    return true;
  }
} hopper_backward_walk;

// A job as the producer finds it.
typedef struct hopper_backward_job {
  int column, steps, batch, key_head;  // steps: 0 when no query sees these keys, -1 when there is no job
} hopper_backward_job;

// The warps of warpgroup 0.
template <class SHAPE, bool CAREFUL>
struct hopper_backward_producer {
  using type = typename SHAPE::type;
  const hopper_backward_call &c;
  const uint32_t base;
  const int lane = threadIdx.x % 32;

  __device__ __forceinline__ hopper_backward_producer(const hopper_backward_call &call, uint32_t start)
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
    for (int head = job.key_head * c.group; head < (job.key_head + 1) * c.group; head++) {
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

  __device__ __forceinline__ hopper_backward_job next_job() {
#pragma unroll 1
    for (;;) {
      int id = 0;
      if (lane == 0) id = atomicAdd(c.next_job + CAREFUL, 1);
      id = __shfl_sync(~0u, id, 0);
      if (id >= c.jobs) return {0, -1, 0, 0};
      const int columns = c.plan.col_tiles, span = c.mixed * columns, first = id / span * c.mixed;
      const int heads = min(c.mixed, c.batch * c.key_heads - first), in_span = id % span;
      const int place = first + in_span % heads, rank = in_span / heads;
      const int flat = c.sorted ? c.head_order[place] : place;
      hopper_backward_job job;
      job.batch = flat / c.key_heads;
      job.key_head = flat % c.key_heads;
      job.column = CAREFUL || c.deterministic
                       ? columns - 1 - rank
                       : c.plan.col_order[plane(job.batch, job.key_head * c.group) * columns + rank];
      if (CAREFUL && !flagged(job)) continue;
      job.steps = tiles_of(job) * SHAPE::steps;
      return job;
    }
  }

  // One lane of warp 0: the boxes of an operand.
  __device__ __forceinline__ void load(uint32_t to, const CUtensorMap *map, int row, int rows, int head, int batch,
                                       uint32_t barrier) {
#pragma unroll
    for (int panel = 0; panel < SHAPE::panels; panel++) {
      tma_load(to + panel * rows * 128, map, panel * SA_PANEL, row, head, batch, barrier);
    }
  }

  int loaded = 0, jobs = 0;  // steps and jobs so far

  // Of job n, which is at hand: looked up again where it is needed, as registers are few.
  __device__ __forceinline__ int job_column(int n) const {
    return shared_load(base + SHAPE::job + 16 * (n & 1));
  }
  __device__ __forceinline__ int job_batch(int n) const {
    return shared_load(base + SHAPE::job + 16 * (n & 1) + 8);
  }
  __device__ __forceinline__ int job_key_head(int n) const {
    return shared_load(base + SHAPE::job + 16 * (n & 1) + 12);
  }

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

  __device__ __forceinline__ int64_t statistics(int batch, int head, int query) const {
    return (int64_t)(batch * c.heads + head) * c.padded + query;
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

  // Q of the first step, V, dO, K, then Q and dO of each step.
  __device__ __forceinline__ void load_job(int n) {
    bool first = true;
#pragma unroll 1
    for (int in_group = 0; in_group < c.group; in_group++) {
      hopper_backward_walk walk;
      const int64_t *start = runs_of(job_batch(n), job_key_head(n) * c.group + in_group, job_column(n));
      walk.open(c.plan.col_runs + start[0], (int)(start[1] - start[0]));
      while (walk.next()) {
        const int end = (walk.row + walk.rows) * SA_TILE;
#pragma unroll 1
        for (int query = walk.row * SA_TILE; query < end; query += SHAPE::queries) {
          load_queries(job_batch(n), job_key_head(n) * c.group + in_group, query, walk.pattern);
          if (first) load_values(n);
          load_dout(job_batch(n), job_key_head(n) * c.group + in_group, query);
          if (first) load_keys(n);
          first = false;
          loaded++;
        }
      }
    }
    if (!first) jobs++;
  }

  __device__ __forceinline__ void run_loads() {
#pragma unroll 1
    for (int n = 0;; n++) {
      const hopper_backward_job job = next_job();
      if (lane == 0) {
        mbarrier_wait(base + SHAPE::job_empty + 8 * (n & 1), (n >> 1 & 1) ^ 1);
        shared_store_4i(base + SHAPE::job + 16 * (n & 1), job.column, job.steps, job.batch, job.key_head);
        mbarrier_arrive(base + SHAPE::job_full + 8 * (n & 1));
      }
      if (job.steps < 0) return;
      if (lane == 0) load_job(n);
      __syncwarp();
    }
  }

  __device__ __forceinline__ int4 wait_job(int n) {
    mbarrier_wait(base + SHAPE::job_full + 8 * (n & 1), n >> 1 & 1);
    return shared_load_4i(base + SHAPE::job + 16 * (n & 1));
  }

  __device__ __forceinline__ void release_job(int n) {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(base + SHAPE::job_empty + 8 * (n & 1));
  }

  // The key tiles that add to a row of tiles before `column` does, and all.
  __device__ __forceinline__ int2 count_turns(int batch, int head, int row, int column) const {
    const int64_t *start = c.plan.row_start + plane(batch, head) * c.plan.row_tiles + row;
    const sa_run *keys = c.plan.row_runs + start[0] + lane;
    int before = 0, all = 0;
#pragma unroll 1
    for (int left = (int)(start[1] - start[0]) - lane; left > 0; left -= 32, keys += 32) {
      before += max(0, keys->first + keys->count - max(keys->first, column + 1));
      all += keys->count;
    }
    return make_int2(hopper_warp_sum(before), hopper_warp_sum(all));
  }

  // Tells the warps that add whose turn they have to wait for: {first chunk of the tile, turn, turns in all}.
  __device__ __forceinline__ void run_turns() {
    int told = 0;
#pragma unroll 1
    for (int n = 0;; n++) {
      if (wait_job(n).y < 0) return;
#pragma unroll 1
      for (int in_group = 0; in_group < c.group; in_group++) {
        hopper_backward_walk walk;
        const int64_t *start = runs_of(job_batch(n), job_key_head(n) * c.group + in_group, job_column(n));
        walk.open(c.plan.col_runs + start[0], (int)(start[1] - start[0]));
        while (walk.next()) {
#pragma unroll 1
          for (; walk.rows > 0; walk.rows--, walk.row++) {
            const int head = job_key_head(n) * c.group + in_group;
            const int2 turn = count_turns(job_batch(n), head, walk.row, job_column(n));
            const int slot = told % HOPPER_BACKWARD_TURNS;
            if (lane == 0) {
              mbarrier_wait(base + SHAPE::turn_empty + 8 * slot, (told / HOPPER_BACKWARD_TURNS & 1) ^ 1);
              shared_store_4i(base + SHAPE::turn + 16 * slot, chunk(job_batch(n), head, walk.row), turn.x, turn.y, 0);
              mbarrier_arrive(base + SHAPE::turn_full + 8 * slot);
            }
            __syncwarp();
            told++;
          }
        }
      }
      release_job(n);
    }
  }

  // Sums of dQ that are finished and flagged: as halves to their place.
  __device__ __forceinline__ void convert(int chunk) {
    const int panel = chunk % SHAPE::panels, rest = chunk / SHAPE::panels, q64 = rest % (c.padded / 64);
    const int flat = rest / (c.padded / 64);
    type *dq = hopper_rows<type>(c.dq_out, flat / c.heads, flat % c.heads);
#pragma unroll 1
    for (int n = lane; n < 8 * 128; n += 32) {
      const float4 sums = __ldcg((const float4 *)(c.dq + (int64_t)chunk * 4096) + n);
      const int t = n % 128, row = q64 * 64 + t / 32 * 16 + t % 32 / 4, column = panel * 64 + n / 128 * 8 + t % 4 * 2;
      if (column >= c.width) continue;
      type *to = dq + row * c.dq_out.stride[2] + column;
      if (row < c.queries) *(uint32_t *)to = pack_halves<type>(sums.x * c.scale, sums.y * c.scale);
      if (row + 8 < c.queries) {
        *(uint32_t *)(to + 8 * c.dq_out.stride[2]) = pack_halves<type>(sums.z * c.scale, sums.w * c.scale);
      }
    }
  }

  // Lets the next one add to a chunk, once this thread's copies are complete.
  __device__ __forceinline__ void publish(int chunk, int next) {
    if (chunk < 0 || lane > 0) return;
    bulk_wait<0>();
    async_proxy_fence_global();
    store_release(c.turn + chunk, next);
  }

  // Gives the buffer of dQ back. `last`: the chunk whose sum the next dQ makes whole, else -1; `sums`: whether there is
  // a sum to add to.
  __device__ __forceinline__ void release_dq(int w, int last, bool sums) {
    if (lane == 0) shared_store_4i(base + SHAPE::last + 16 * w, last, sums, 0, 0);
    __syncwarp();
    named_barrier_arrive(HOPPER_BACKWARD_DQ_EMPTY + w, 160);
  }

  // A chunk of dQ, in halves, out of shared memory to its place.
  __device__ __forceinline__ void store_dq(int chunk, int batch, uint32_t from) {
    const int rest = chunk / SHAPE::panels, flat = rest / (c.padded / 64);
    tma_store(&c.dq_map, chunk % SHAPE::panels * SA_PANEL, rest % (c.padded / 64) * 64, flat - batch * c.heads, batch,
              from);
  }

  // Takes dQ of warpgroup 1 + w out of shared memory: 64 queries, all columns at width 64, else half of them. Where it
  // is the last to add to its sums, the warpgroup adds them itself and leaves halves: then it needs its turn before.
  __device__ __forceinline__ void run_adds(int w) {
    const bool ordered = CAREFUL || c.deterministic, finishes = !CAREFUL && c.deterministic && c.dq_out.data;
    const uint32_t from = base + SHAPE::dq + w * SHAPE::dq_bytes;
    int read = 0;  // tiles so far
#pragma unroll 1
    for (int n = 0;; n++) {
      const int steps = wait_job(n).y;
      if (steps < 0) break;
      int tile = 0, turn = 0, turns = 0, chunk = 0, seen = 0;
      bool wanted = true;
      auto look = [&](int step) {  // at the tile and the counter of a step
        if (step % SHAPE::steps == 0) {
          const int slot = read % HOPPER_BACKWARD_TURNS;
          mbarrier_wait(base + SHAPE::turn_full + 8 * slot, read / HOPPER_BACKWARD_TURNS & 1);
          const int4 entry = shared_load_4i(base + SHAPE::turn + 16 * slot);
          __syncwarp();
          if (lane == 0) mbarrier_arrive(base + SHAPE::turn_empty + 8 * slot);
          read++;
          tile = entry.x;
          turns = entry.z;
          // The careful launch counts on from where the first one ended.
          turn = entry.y + (CAREFUL && c.deterministic ? turns : 0);
        }
        chunk = tile + (SHAPE::width == 64 ? w : step % 2 * SHAPE::panels + w);
        if (CAREFUL) wanted = c.bad_query[chunk];
        if (ordered && wanted) seen = load_acquire(c.turn + chunk);
      };
      auto wait_turn = [&]() {
        while (seen != turn) seen = load_acquire(c.turn + chunk);
      };
      auto is_last = [&]() { return finishes && turn + 1 == turns; };
      if (steps > 0) {
        look(0);
        if (lane == 0) bulk_wait_read<0>();
        if (is_last()) wait_turn();
        release_dq(w, is_last() ? chunk : -1, turn > 0);
      }
#pragma unroll 1
      for (int step = 0; step < steps; step++) {
        const bool last = is_last();
        if (ordered && wanted) {
          wait_turn();
          async_proxy_fence_global();
        }
        __syncwarp();
        named_barrier_sync(HOPPER_BACKWARD_DQ_FULL + w, 160);
        if (lane == 0 && wanted) {
          if (last) {
            store_dq(chunk, job_batch(n), from);
          } else if (ordered && turn == (CAREFUL && c.deterministic ? turns : 0)) {
            bulk_store(c.dq + (int64_t)chunk * 4096, from, SHAPE::dq_bytes);
          } else {
            bulk_add(c.dq + (int64_t)chunk * 4096, from, SHAPE::dq_bytes);
          }
          bulk_commit();
        }
        // Nobody waits for the last.
        const int added = wanted && !last ? chunk : -1, next = turn + 1;
        if (last && lane == 0) store_relaxed(c.turn + chunk, next);
        const bool finished = CAREFUL && wanted && next == turns * (c.deterministic ? 2 : 1), more = step + 1 < steps;
        if (more) look(step + 1);  // while the copy runs
        const bool next_last = more && is_last();
        if (more && lane == 0) bulk_wait_read<0>();
        if (more && !next_last) release_dq(w, -1, false);
        if (ordered) publish(added, next);
        if (next_last) {
          wait_turn();
          release_dq(w, chunk, turn > 0);
        }
        if (finished) {
          __syncwarp();
          convert(added);
        }
      }
      release_job(n);
    }
    if (lane == 0) bulk_wait_read<0>();
  }
};

// A thread of the two warpgroups that multiply. Its keys of the warpgroup's 64 are row() and row() + 8.
template <class SHAPE, bool CAREFUL>
struct hopper_backward_consumer {
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
  // are kept;
  // and what the job has for the slope of the head at hand.
  uint32_t bias[SHAPE::biased ? scores : 1], weights[SHAPE::splits ? pairs : 1];
  uint32_t seen[SHAPE::halves], kept[SHAPE::halves];
  float slope_sum;
  int slope_head;

  __device__ __forceinline__ hopper_backward_consumer(const hopper_backward_call &call, uint32_t start, int group)
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

  // dK += dS^T Q: dS^T from shared memory, there are no registers for it (C7512).
  __device__ __forceinline__ void start_dk(int g) {
    wgmma_fence();
    hopper_product_rows_columns<type, SHAPE::queries / 16, SHAPE::panel_bytes>(
        dk, wgmma_operand(base + SHAPE::ds, 0) + slab() + (g & 1) * (SHAPE::ds_bytes >> 4),
        wgmma_operand(base + SHAPE::q, SHAPE::queries * 128) + g % SHAPE::q_slots * (SHAPE::query_bytes >> 4));
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

  // Extras.

  // Whether a call has one of them; known where the kernel can do no other, or not that one.
  template <int EXTRA>
  static __device__ __forceinline__ bool wants(bool asked) {
    return SHAPE::extras & EXTRA && (SHAPE::extras == EXTRA || asked);
  }

  // The first of the thread's queries of a step: the others are 16 j + 8 (i / 4) + i % 2 after it, for element 8 j + i.
  __device__ __forceinline__ int first_query(const int4 &step) const {
    return step.y + 2 * (lane & 3);
  }

  // The first of its keys; the other is 8 after it.
  __device__ __forceinline__ int first_key() const {
    return job.x * SA_TILE + w * 64 + row();
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

  __device__ __forceinline__ void hand_over(float (&dq)[32]) {
    named_barrier_sync(HOPPER_BACKWARD_DQ_EMPTY + w, 160);
    const int4 last = CAREFUL ? make_int4(-1, 0, 0, 0) : shared_load_4i(base + SHAPE::last + 16 * w);
    if (last.x >= 0) {
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
        dq[4 * i] = add_flushed(x.x, dq[4 * i]);
        dq[4 * i + 1] = add_flushed(x.y, dq[4 * i + 1]);
        dq[4 * i + 2] = add_flushed(x.z, dq[4 * i + 2]);
        dq[4 * i + 3] = add_flushed(x.w, dq[4 * i + 3]);
      }
    }
    // store_row counts from the rows of both warpgroups.
    if (hopper_store_halves<type>(dq, c.scale, base + SHAPE::dq + w * (SHAPE::dq_bytes - SHAPE::slab_bytes) + store_row,
                                  store_piece, 0))
      c.bad_query[chunk] = *c.flagged = 1;
  }

  __device__ __forceinline__ void store_pairs(int g, const uint32_t *x) {
    const uint32_t to = base + SHAPE::ds + (g & 1) * SHAPE::ds_bytes + store_row;
#pragma unroll
    for (int k = 0; k < SHAPE::queries / 16; k++) {
      store_matrices(to + k / 4 * SHAPE::panel_bytes + (store_piece ^ (k % 4 * 32)), x + 4 * k);
    }
  }

  // The second half of a step: P, under dP and dK of the step before. dV is left running.
  template <bool FIRST>
  __device__ __forceinline__ void probabilities(int g) {
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
      wgmma_wait<CAREFUL ? 0 : FIRST ? 1 : 2>();  // S is there
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
    }
    if constexpr (CAREFUL) clean_queries<FIRST>(g);
    start_dv(g);
    if constexpr (CAREFUL) {
      wgmma_wait<0>();
      repair_dv(g);
    } else {
      wgmma_wait<1>();  // dP and dK of the step before are there
      if (!FIRST) arrive(SHAPE::q_empty + 8 * ((g - 1) % SHAPE::q_slots));
    }
  }

  // The first half: dS, then dQ of the step before, whose other half has had a whole step to arrive, the next S, and
  // dK.
  template <bool FIRST, bool MORE>
  __device__ __forceinline__ void gradients(int g) {
    const int slot = g % SHAPE::q_slots, dout_slot = g % SHAPE::dout_slots;
    uint32_t ds[pairs];
#pragma unroll
    for (int j = 0; j < SHAPE::queries / 16; j++) {
      const float4 delta =
          shared_load_4(base + SHAPE::delta + dout_slot * SHAPE::queries * 4 + j * 64 + (lane & 3) * 16);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int x = 8 * j + i;
        const uint32_t pair = SHAPE::splits ? weights[x / 2] : p[x / 2];
        const float probability = x & 1 ? hopper_high<type>(pair) : hopper_low<type>(pair);
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
#pragma unroll
    for (int i = 0; i < pairs; i++) ds[i] = pack_halves<type>(dp[2 * i], dp[2 * i + 1]);
    float dq[32];
    if constexpr (FIRST) {
      stores_read();
    } else {
      start_dq(dq, g - 1);
      if constexpr (CAREFUL) {
        wgmma_wait<0>();
        repair_dq(dq, g - 1);
        arrive(SHAPE::q_empty + 8 * ((g - 1) % SHAPE::q_slots));
      }
    }
    store_pairs(g, ds);
    async_proxy_fence();
    wgmma_wait<FIRST ? 0 : 1>();  // dV is there
    arrive(SHAPE::dout_empty + 8 * dout_slot);
    if constexpr (MORE) {
      start_scores(g + 1);
    } else {
      arrive(SHAPE::v_empty);
    }
    named_barrier_sync(HOPPER_BACKWARD_WARPGROUP + w, 128);
    start_dk(g);
    if constexpr (CAREFUL) {
      wgmma_wait<0>();
      repair_dk(g);
    } else if constexpr (!FIRST) {
      wgmma_wait<MORE ? 2 : 1>();  // dQ of the step before is there
    }
    arrive(SHAPE::ds_done + 16 * w + 8 * (g & 1));  // dS of this step may be read; the other buffer is free
    if constexpr (!FIRST) hand_over(dq);
  }

  // The dV or dK that went last has left the buffers of dS.
  __device__ __forceinline__ void stores_read() {
    if (t == 0) bulk_wait_read<0>();
    named_barrier_sync(HOPPER_BACKWARD_WARPGROUP + w, 128);
  }

  __device__ __forceinline__ void write_zeros() {
    const int key = job.x * SA_TILE + w * 64 + t / 2;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    if (key >= c.keys) return;
    if (c.dk_out.data) {
      type *to = hopper_rows<type>(c.dk_out, job.z, job.w) + key * c.dk_out.stride[2];
      for (int piece = t % 2; piece < c.width / 8; piece += 2) *(uint4 *)(to + piece * 8) = zero;
    }
    if (c.dv_out.data) {
      type *to = hopper_rows<type>(c.dv_out, job.z, job.w) + key * c.dv_out.stride[2];
      for (int piece = t % 2; piece < c.value_width / 8; piece += 2) *(uint4 *)(to + piece * 8) = zero;
    }
  }

  // dV and then dK leave through this warpgroup's rows of the buffers of dS. That of dQ would only be free once its
  // last sums are on their way, 4000 cycles later where jobs are short.
  __device__ __forceinline__ void finish() {
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

  __device__ __forceinline__ void run() {
    int g = 0, kv_parity = 0;  // steps are counted across the jobs: they name the slots
#pragma unroll 1
    for (int n = 0;; n++) {
      mbarrier_wait(base + SHAPE::job_full + 8 * (n & 1), n >> 1 & 1);
      job = shared_load_4i(base + SHAPE::job + 16 * (n & 1));
      if (job.y < 0) break;
      if (job.y == 0) {
        write_zeros();
      } else {
        const int end = g + job.y;
#pragma unroll
        for (int i = 0; i < sums; i++) dk[i] = dv[i] = 0.f;
        slope_head = -1;
        // The loop turns where only dV and dK are in flight: ptxas serialises products whose result crosses a back edge
        // and is then read (C7514).
        mbarrier_wait(base + SHAPE::k_full, kv_parity);
        if constexpr (CAREFUL) clean_keys();
        start_scores(g);
        mbarrier_wait(base + SHAPE::v_full, kv_parity);
        kv_parity ^= 1;
        probabilities<true>(g);
        if (job.y == 1) {
          gradients<true, false>(g++);
        } else {
          gradients<true, true>(g++);
          probabilities<false>(g);
#pragma unroll 1
          for (; g + 1 < end; g++) {
            gradients<false, true>(g);
            probabilities<false>(g + 1);
          }
          gradients<false, false>(g++);
        }
        float dq[32];
        start_dq(dq, g - 1);
        wgmma_wait<0>();
        if constexpr (CAREFUL) repair_dq(dq, g - 1);
        arrive(SHAPE::k_empty);
        arrive(SHAPE::q_empty + 8 * ((g - 1) % SHAPE::q_slots));
        hand_over(dq);
        if constexpr (SHAPE::extras & HOPPER_BACKWARD_ALIBI && !CAREFUL) {
          if (c.slope_part) write_slope(-1);
        }
        finish();
      }
      __syncwarp();
      arrive(SHAPE::job_empty + 8 * (n & 1));
    }
    if (t == 0) bulk_wait_read<0>();
  }

  // The careful launch. Everything below waits for all products first; speed does not matter here.

  // Both warpgroups see the copy after the barriers of the first step.
  __device__ __forceinline__ void clean_keys() {
    const int thread = w * 128 + t;
    if (thread < SA_TILE) {
      const bool bad = hopper_clean_row<type, SHAPE::panels, SA_TILE>(base + SHAPE::k, base + SHAPE::clean_k, thread);
      shared_store(base + SHAPE::bad_k + 4 * thread, bad);
    }
    async_proxy_fence();
  }

  // Once S and dP are there: P to shared memory, where repair_dv looks it up, and Q and dO cleaned in their place.
  template <bool FIRST>
  __device__ __forceinline__ void clean_queries(int g) {
    const int thread = w * 128 + t, row = thread % SHAPE::queries;
    if (FIRST) stores_read();
    named_barrier_sync(HOPPER_BACKWARD_BOTH, 256);
    store_pairs(g, p);
    if (thread < 2 * SHAPE::queries) {
      const bool is_q = thread < SHAPE::queries;
      const uint32_t at = base + (is_q ? SHAPE::q + g % SHAPE::q_slots * SHAPE::query_bytes
                                       : SHAPE::dout + g % SHAPE::dout_slots * SHAPE::query_bytes);
      const bool bad = hopper_clean_row<type, SHAPE::panels, SHAPE::queries>(at, at, row);
      shared_store(base + (is_q ? SHAPE::bad_q : SHAPE::bad_dout) + 4 * row, bad);
    }
    async_proxy_fence();
    named_barrier_sync(HOPPER_BACKWARD_BOTH, 256);
  }

  // What P^T or dS^T of a step has for a key and a query.
  __device__ __forceinline__ float weight(int g, int key, int query) {
    const uint32_t at = SHAPE::ds + (g & 1) * SHAPE::ds_bytes + query / 64 * SHAPE::panel_bytes + key * 128 +
                        ((query % 64 / 8 ^ key % 8) << 4) + (query % 8 / 2 << 2);
    const uint32_t pair = shared_load(base + at);
    return query & 1 ? hopper_high<type>(pair) : hopper_low<type>(pair);
  }

  __device__ __forceinline__ bool visible(int slot, int key, int query) {
    if constexpr (SHAPE::extras) {
      const sa_operand &bias = c.scores.bias;
      const int4 step = shared_load_4i(base + SHAPE::step + 16 * slot);
      const int64_t i = step.y + query, j = job.x * SA_TILE + key;
      if (bias.data && i < c.queries && j < c.keys &&
          read_operand(bias, job.z * bias.stride[0] + step.z * bias.stride[1] + i * bias.stride[2] +
                                 j * bias.stride[3]) == -INFINITY) {
        return false;
      }
    }
    if (!shared_load(base + SHAPE::step + 16 * slot)) return true;
    const uint32_t word = query / 64 * 256 + key / 64 * 128 + key % 64 / 16 * 32 + key % 8 * 4 + query % 8 / 2;
    const uint32_t bit = query % 64 / 8 * 4 + key % 16 / 8 * 2 + query % 2;
    return shared_load(base + SHAPE::bits + slot * SHAPE::bits_bytes + word * 4) >> bit & 1;
  }

  // dV and dK: the thread's keys, all queries of the step.
  __device__ __forceinline__ void repair_keys(float (&d)[sums], int g, uint32_t notes, const sa_operand &operand,
                                              int width) {
    const int slot = g % SHAPE::q_slots, key = w * 64 + row();
    const int4 step = shared_load_4i(base + SHAPE::step + 16 * slot);
    const type *source = hopper_rows<type>(operand, job.z, step.z) + step.y * operand.stride[2] + lane % 4 * 2;
#pragma unroll 1
    for (int i = 0; i < SHAPE::queries; i++) {
      if (!shared_load(base + notes + 4 * i)) continue;
      hopper_add_nonfinite(d, source + i * operand.stride[2], width - lane % 4 * 2, weight(g, key, i),
                           weight(g, key + 8, i), visible(slot, key, i), visible(slot, key + 8, i));
    }
    __syncwarp();
  }

  __device__ __forceinline__ void repair_dv(int g) {
    repair_keys(dv, g, SHAPE::bad_dout, c.dout_values, c.value_width);
  }

  __device__ __forceinline__ void repair_dk(int g) {
    repair_keys(dk, g, SHAPE::bad_q, c.q_values, c.width);
  }

  // The thread's queries, all keys of the job.
  __device__ __forceinline__ void repair_dq(float (&dq)[32], int g) {
    const int slot = g % SHAPE::q_slots, query = (SHAPE::width == 64 ? w * 64 : 0) + row();
    const int column = (SHAPE::width == 64 ? 0 : w * 64) + lane % 4 * 2;
    const int64_t stride = c.k_values.stride[2];
    const type *source = hopper_rows<type>(c.k_values, job.z, job.w) + job.x * SA_TILE * stride + column;
#pragma unroll 1
    for (int j = 0; j < SA_TILE; j++) {
      if (!shared_load(base + SHAPE::bad_k + 4 * j)) continue;
      hopper_add_nonfinite(dq, source + j * stride, c.width - column, weight(g, j, query), weight(g, j, query + 8),
                           visible(slot, j, query), visible(slot, j, query + 8));
    }
  }
};

template <class T, int WIDTH, bool CAREFUL, int EXTRAS>
__global__ void __launch_bounds__(HOPPER_BACKWARD_THREADS, 1)
    hopper_backward_tiles(const __grid_constant__ hopper_backward_call c) {
  using SHAPE = hopper_backward_shape<T, WIDTH, CAREFUL, EXTRAS>;
  const uint8_t *memory = dynamic_shared<uint8_t>();
  const uint32_t base = dynamic_shared_address(memory);
  const int warp = __shfl_sync(~0u, (int)threadIdx.x / 32, 0);
  if (CAREFUL && !*c.flagged) return;

  if (threadIdx.x == 0) {
    if (shared_address(memory) != base) __trap();
    mbarrier_init(base + SHAPE::k_full, 1);
    mbarrier_init(base + SHAPE::v_full, 1);
    mbarrier_init(base + SHAPE::k_empty, 8);
    mbarrier_init(base + SHAPE::v_empty, 8);
    for (int i = 0; i < 2; i++) {
      mbarrier_init(base + SHAPE::job_full + 8 * i, 1);
      mbarrier_init(base + SHAPE::job_empty + 8 * i, 8 + 3);
    }
    for (int i = 0; i < 4; i++) mbarrier_init(base + SHAPE::ds_done + 8 * i, 4);
    for (int i = 0; i < SHAPE::q_slots; i++) {
      mbarrier_init(base + SHAPE::q_full + 8 * i, 1);
      mbarrier_init(base + SHAPE::q_empty + 8 * i, 8);
    }
    for (int i = 0; i < SHAPE::dout_slots; i++) {
      mbarrier_init(base + SHAPE::dout_full + 8 * i, 1);
      mbarrier_init(base + SHAPE::dout_empty + 8 * i, 8);
    }
    for (int i = 0; i < HOPPER_BACKWARD_TURNS; i++) {
      mbarrier_init(base + SHAPE::turn_full + 8 * i, 1);
      mbarrier_init(base + SHAPE::turn_empty + 8 * i, 2);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warp < 4) {
    registers_give_back<HOPPER_BACKWARD_PRODUCER_REGISTERS>();
    hopper_backward_producer<SHAPE, CAREFUL> producer(c, base);
    if (warp == 0) {
      producer.run_loads();
    } else if (warp == 3) {
      producer.run_turns();
    } else {
      producer.run_adds(warp - 1);
    }
  } else {
    registers_take<HOPPER_BACKWARD_CONSUMER_REGISTERS>();
    hopper_backward_consumer<SHAPE, CAREFUL> consumer(c, base, warp / 4 - 1);
    consumer.run();
  }
}

// 64 rows of dQ a block: from sums, chunks as wgmma left them, to halves, row by row. Rows that see no key have no
// sums.
template <class T, int WIDTH>
__global__ void __launch_bounds__(2 * WIDTH) hopper_backward_convert(const __grid_constant__ hopper_backward_call c) {
  enum { PANELS = WIDTH / SA_PANEL, PIECES = WIDTH / 8 };
  __shared__ uint32_t halves[64][WIDTH / 2 + 4];
  // From the last head to the first: the newest sums are still in the cache.
  const int block = gridDim.x - 1 - blockIdx.x;
  const int blocks = c.padded / 64, flat = block / blocks, q64 = block % blocks;
  const int batch = flat / c.heads, head = flat % c.heads, panel = threadIdx.x / 128, t = threadIdx.x % 128;
  const bool none = hopper_backward_no_key(c, batch, head, q64 * 64);
  const int chunk = block * PANELS + panel, row = t / 32 * 16 + t % 32 / 4;
  const float4 *from = (const float4 *)(c.dq + (int64_t)chunk * 4096);
  uint32_t seen = 0;
  float4 sums[8];
#pragma unroll
  for (int i = 0; i < 8; i++) sums[i] = none ? make_float4(0, 0, 0, 0) : from[i * 128 + t];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t upper = pack_halves<T>(sums[i].x * c.scale, sums[i].y * c.scale);
    const uint32_t lower = pack_halves<T>(sums[i].z * c.scale, sums[i].w * c.scale);
    seen = note_nonfinite<T>(note_nonfinite<T>(seen, upper), lower);
    halves[row][panel * 32 + i * 4 + t % 4] = upper;
    halves[row + 8][panel * 32 + i * 4 + t % 4] = lower;
  }
  if (seen) c.bad_query[chunk] = *c.flagged = 1;
  __syncthreads();
  T *dq = hopper_rows<T>(c.dq_out, batch, head);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int n = i * 2 * WIDTH + threadIdx.x, to = q64 * 64 + n / PIECES, piece = n % PIECES;
    if (to >= c.queries || piece * 8 >= c.width) continue;
    *(uint4 *)(dq + to * c.dq_out.stride[2] + piece * 8) = *(const uint4 *)&halves[n / PIECES][piece * 4];
  }
}

// Those with extras are instantiated in files of their own, as each takes long to compile.
template <class T, int WIDTH, bool CAREFUL, int EXTRAS>
int hopper_backward_launch(const hopper_backward_call &c, unsigned blocks, cudaStream_t stream) {
  return sa_cuda_launch("sa_backward", hopper_backward_tiles<T, WIDTH, CAREFUL, EXTRAS>, blocks,
                        HOPPER_BACKWARD_THREADS, hopper_backward_shape<T, WIDTH, CAREFUL, EXTRAS>::bytes, stream, c);
}

#endif
