// the warps that load keys and values for a few queries: one stream of steps across their block's items
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_DECODING_LOADS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_DECODING_LOADS_CUH
#include "kernels/cuda/hopper_decoding_call.cuh"

// The last of `count` ascending numbers, of which the first does not exceed `value`, that does not. By a whole warp, 32
// at a time.
static __device__ __forceinline__ int decoding_find(const int64_t *numbers, int count, int value) {
  int first = 0;
  while (count > 1) {
    const int step = (count + 31) / 32, at = (int)(threadIdx.x & 31) * step;
    const uint32_t below = __ballot_sync(~0u, at < count && numbers[first + at] <= value);
    const int found = (31 - __clz(below)) * step;
    first += found;
    count = count - found < step ? count - found : step;
  }
  return first;
}

// An item's units among those of all, and its plane.
typedef struct decoding_place {
  int item, first, end;
  int plane, repeat;
  int batch, key_head;
} decoding_place;

static __device__ __forceinline__ void decoding_place_head(const decoding_job &d, decoding_place &place) {
  place.batch = place.item / d.heads;
  const int head = place.item - place.batch * d.heads;
  place.key_head = d.heads == d.forward.p.key_heads ? head : head / (int)d.forward.group;
}

template <class C>
static __device__ __forceinline__ int decoding_plane_units(const decoding_job &d, int plane) {
  if (d.planes == 1) return d.tiles * C::PIECES;
  const int64_t *before = d.forward.plan.row_before + plane;
  return (int)(before[1] - before[0]) * C::PIECES;
}

template <class C>
static __device__ __forceinline__ decoding_place decoding_find_place(const decoding_job &d, int unit) {
  decoding_place place;
  const int cycle = d.planes > 1 ? unit / d.cycle : 0, rest = unit - cycle * d.cycle;
  int before = 0;
  place.plane = 0;
  if (d.planes > 1) {
    const int64_t *rows = d.forward.plan.row_before;
    place.plane = decoding_find(rows, d.planes, rest / (C::PIECES * d.repeats));
    before = (int)rows[place.plane] * C::PIECES * d.repeats;
  }
  const int each = decoding_plane_units<C>(d, place.plane);
  place.repeat = (rest - before) / each;
  place.item = (cycle * d.planes + place.plane) * d.repeats + place.repeat;
  place.first = cycle * d.cycle + before + place.repeat * each;
  place.end = place.first + each;
  decoding_place_head(d, place);
  return place;
}

template <class C>
static __device__ __forceinline__ void decoding_next_place(const decoding_job &d, decoding_place &place) {
  if (++place.repeat == d.repeats) {
    place.repeat = 0;
    if (++place.plane == d.planes) place.plane = 0;
  }
  place.item++;
  place.first = place.end;
  place.end += decoding_plane_units<C>(d, place.plane);
  decoding_place_head(d, place);
}

// The walk through an item's tiles from the one that has a unit on; none where a plane has none.
template <class C>
static __device__ __forceinline__ tile_walk decoding_walk(const decoding_job &d, const decoding_place &place,
                                                          int unit) {
  int tile = (unit - place.first) / C::PIECES;
  const int count = (place.end - place.first) / C::PIECES - tile;
  const sa_run *runs = d.runs;
  int all = d.run_count;
  if (!all) {
    const sa_device_plan &plan = d.forward.plan;
    const int64_t first = plan.row_start[place.plane];
    all = (int)(plan.row_start[place.plane + 1] - first);
    runs = plan.row_runs + first;
    if (tile && all) {
      const int run = decoding_find(plan.run_before + first, all, tile);
      tile -= (int)plan.run_before[first + run];
      runs += run;
    }
  }
  return walk_start(runs, tile, all ? count : 0);
}

// The copies of K's or V's half of a step.
template <class C>
static __device__ __forceinline__ void decoding_copy(const CUtensorMap *map, uint32_t to, int key, int head, int batch,
                                                     uint32_t full) {
#pragma unroll
  for (int panel = 0; panel < C::PANELS; panel++, to += C::PANEL_BYTES)
    tma_load(to, map, panel * SA_PANEL, key, head, batch, full);
}

// By each of the warps that load: the first has K, and says what a step is; the last has V.
template <class C>
static __device__ __forceinline__ void decoding_load(const decoding_job &d, decoding_shared<C> &shared,
                                                     decoding_place place) {
  const int last = decoding_first_unit(d, decoding_stretch() + 1), warp = threadIdx.x / 32 - DECODING_WARPS;
  const bool keys = warp == 0, values = warp == C::LOADING_WARPS - 1, leads = (threadIdx.x & 31) == 0;
  int unit = decoding_first_unit(d, decoding_stretch());
  tile_walk walk = decoding_walk<C>(d, place, unit);
  hopper_ring<C::SLOTS> ring;
  dependency_wait();
  for (;;) {
    const int end = place.end < last ? place.end : last;
    if (leads) {
      const int batch = place.batch, key_head = place.key_head;
      int piece = (unit - place.first) % C::PIECES;
      for (; unit < end; unit++) {
        const int key = walk.tile * SA_TILE + piece * C::KEYS;
        const bool nothing = !walk.left || key >= d.forward.p.keys;
        const uint32_t full = shared_address(&shared.full[ring.at]), to = shared_address(shared.ring[ring.at]);
        mbarrier_wait(shared_address(&shared.empty[ring.at]), ring.parity ^ 1);
        if (keys) shared.step[ring.at] = {key, nothing ? DECODING_NOTHING : walk.pattern, place.item, piece};
        if (nothing) {
          mbarrier_arrive(full);
        } else {
          mbarrier_arrive_expect(full, C::STEP_BYTES / C::LOADING_WARPS);
          if (keys) decoding_copy<C>(&d.k, to, key, key_head * d.k_head_step, batch * d.k_batch_step, full);
          if (values)
            decoding_copy<C>(&d.v, to + C::STEP_BYTES / 2, key, key_head * d.v_head_step, batch * d.v_batch_step, full);
        }
        ring.next();
        if (++piece == C::PIECES) {
          piece = 0;
          if (walk.left) walk_advance(walk);
        }
      }
    }
    __syncwarp();
    unit = end;
    if (unit == last) break;
    decoding_next_place<C>(d, place);
    if (keys && leads) shared.split[place.item % DECODING_ITEMS] = decoding_split_of(d, place.first, place.end);
    walk = decoding_walk<C>(d, place, unit);
  }
}

#endif
