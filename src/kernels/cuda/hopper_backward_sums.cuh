// backward attention on Hopper for widths up to 128: the sums of dQ in memory, and the warps that add to them
//
// Key tiles add to the rows of a tile of queries one after the other, in the order in which their columns are taken, so
// that the sums have the same bits every time: from the last to the first, or, where rows are descended, from the first
// to the last, or all even ones and then all odd ones. Each chunk of 64 x 64 sums has a counter of who is done. The
// first stores, so that nobody has to fill with zeros. The last adds the sums to its own dQ in registers and writes
// halves, so that nobody has to read the sums again when they have left the cache, and they need not go to memory.
//
// A job waits only for jobs taken before it: the oldest unfinished one never waits, so all come to an end, however few
// blocks run at a time. Of a chunk that is so because whole columns are taken in the order of its turns, and before
// those that are shared out. Of these the first parts of all are taken, then the second ones; but the same part of each
// adds to the chunk, as parts are heads, or all columns see the same rows (hopper_backward.cu): again in that order.
// Columns that are brought forward are the first ones of their heads that anybody sees. And dV and dK of a part wait
// for the part before it. Nor does it matter in which order a job goes through its tiles; but jobs that begin together
// are to come to each row one after the other, each soon after the one before it. So rows ascend where columns descend,
// and the other way round; and heads abreast are gone past row by row, as of a head after the other a short column
// would be at the second when the longer one before it is still at the first.
//
// The counters are zeroed by the first launch of the same call. The order of a chunk's accesses, one line for each
// link:
//
//   bulk add (async proxy) -> bulk_wait: complete, and seen by the thread that issued it
//   -> async_proxy_fence_global: in order before that thread's ordinary accesses that follow (publish)
//   -> store_release of the counter -> load_acquire that reads it, by the one thread that issues the next bulk add
//   -> async_proxy_fence_global: in order before that thread's bulk copies that follow -> bulk add
//
// so each add happens after the one before it. The last to add meets its warpgroup at a barrier after the acquire, and
// the sums are read as ordinary memory. The launches that convert and do again come later in the stream.
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_SUMS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_SUMS_CUH
#include "kernels/cuda/hopper_backward_loads.cuh"

// Warps 1 to 3 of warpgroup 0.
template <class SHAPE, bool CAREFUL>
struct hopper_backward_sums : hopper_backward_jobs<SHAPE, CAREFUL> {
  using base_type = hopper_backward_jobs<SHAPE, CAREFUL>;
  using base_type::base;
  using base_type::c;
  using base_type::chunk;
  using base_type::each_tile;
  using base_type::job_batch;
  using base_type::job_column;
  using base_type::lane;
  using base_type::plane;
  using base_type::release_job;
  using base_type::wait_job;
  using typename base_type::type;

  __device__ __forceinline__ hopper_backward_sums(const hopper_backward_call &call, uint32_t start)
      : base_type(call, start) {}

  // Columns of [first, end) that are taken before `column`.
  __device__ __forceinline__ int earlier(int first, int end, int column) const {
    if (!c.descending) return max(0, end - max(first, column + 1));
    const int middle = max(first, min(end, column));  // [first, middle) is to the left of it
    if (!c.alternate) return middle - first;
    const int even = (end + 1) / 2 - (first + 1) / 2;
    return column % 2 ? even + middle / 2 - first / 2 : (middle + 1) / 2 - (first + 1) / 2;
  }

  // The key tiles that add to a row of tiles before `column` does, and all.
  __device__ __forceinline__ int2 count_turns(int batch, int head, int row, int column) const {
    const int64_t *start = c.plan.row_start + plane(batch, head) * c.plan.row_tiles + row;
    const sa_run *keys = c.plan.row_runs + start[0] + lane;
    int before = 0, all = 0;
#pragma unroll 1
    for (int left = (int)(start[1] - start[0]) - lane; left > 0; left -= 32, keys += 32) {
      before += earlier(keys->first, keys->first + keys->count, column);
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
      each_tile(n, [&](int head, int row, int) {
        const int2 turn = count_turns(job_batch(n), head, row, job_column(n));
        const int slot = told % HOPPER_BACKWARD_TURNS;
        if (lane == 0) {
          mbarrier_wait(base + SHAPE::turn_empty + 8 * slot, (told / HOPPER_BACKWARD_TURNS & 1) ^ 1);
          shared_store_4i(base + SHAPE::turn + 16 * slot, chunk(job_batch(n), head, row), turn.x, turn.y, 0);
          mbarrier_arrive(base + SHAPE::turn_full + 8 * slot);
        }
        __syncwarp();
        told++;
      });
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

  // Sums that have been read for the last time: nobody needs them in memory.
  __device__ __forceinline__ void discard_sums(int chunk) {
#pragma unroll 1
    for (int n = lane * 32; n < 4096; n += 32 * 32) cache_discard(c.dq + (int64_t)chunk * 4096 + n);
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
        if (last && turn > 0) discard_sums(chunk);
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

#endif
