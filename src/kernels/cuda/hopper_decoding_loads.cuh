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
  if (d.together) {
    place.item = place.repeat = decoding_own_item();
    place.plane = 0;
    place.first = place.item * d.span;
    place.end = place.first + d.span;
    decoding_place_head(d, place);
    return place;
  }
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

// What a warp that loads copies of an item: a head of K's map, or of V's.
typedef struct decoding_half {
  const CUtensorMap *map;
  int head, batch;
} decoding_half;

static __device__ __forceinline__ decoding_half decoding_half_of(const decoding_job &d, const decoding_place &place,
                                                                 bool keys) {
  if (keys) return {&d.k, place.key_head * d.k_head_step, place.batch * d.k_batch_step};
  return {&d.v, place.key_head * d.v_head_step, place.batch * d.v_batch_step};
}

// Steps with the same pattern, by the first thread of a warp that loads. What it goes through for one takes as long as
// TMA takes for 16 KiB from the second-level cache, 0.28 us, so there must be no more of it.
template <class C>
static __device__ __forceinline__ void decoding_load_steps(const decoding_job &d, decoding_shared<C> &shared,
                                                           const decoding_half &half, bool keys, decoding_step at,
                                                           int count, hopper_ring<C::SLOTS> &ring) {
  const int all = (int)d.forward.p.keys;
  dependency_wait();  // here, as what comes before it the first time is in nobody's way
#pragma unroll 1
  for (; count; count--, at.key += C::KEYS) {
    const uint32_t full = shared_address(&shared.full[ring.at]);
    const uint32_t to = shared_address(shared.ring[ring.at]) + (keys ? 0 : C::STEP_BYTES / 2);
    mbarrier_wait(shared_address(&shared.empty[ring.at]), ring.parity ^ 1);
    if (at.key >= all) at.pattern = DECODING_NOTHING;
    if (keys) shared.step[ring.at] = at;
    if (at.pattern == DECODING_NOTHING) {
      mbarrier_arrive(full);
    } else {
      mbarrier_arrive_expect(full, C::STEP_BYTES / 2);
      decoding_copy<C>(half.map, to, at.key, half.head, half.batch, full);
    }
    ring.next();
  }
}

// By each of the warps that load: the first has K, and says what a step is; the other has V.
template <class C>
static __device__ __forceinline__ void decoding_load(const decoding_job &d, decoding_shared<C> &shared,
                                                     decoding_place place) {
  const decoding_units units = decoding_units_of(d);
  const bool leads = (threadIdx.x & 31) == 0, keys = threadIdx.x / 32 == DECODING_WARPS;
  int unit = units.first;
  tile_walk walk = decoding_walk<C>(d, place, unit);
  decoding_half half = decoding_half_of(d, place, keys);
  hopper_ring<C::SLOTS> ring;
  for (;;) {
    const int end = place.end < units.end ? place.end : units.end;
    if (leads) {
      int piece = (unit - place.first) % C::PIECES;
      while (unit < end) {
        int count = end - unit;
        decoding_step at = {0, DECODING_NOTHING, place.item};
        if (walk.left) {
          const int of_run = walk.in_run * C::PIECES - piece;
          if (count > of_run) count = of_run;
          at.key = walk.tile * SA_TILE + piece * C::KEYS;
          at.pattern = walk.pattern;
        }
        decoding_load_steps<C>(d, shared, half, keys, at, count, ring);
        unit += count;
        piece = 0;
        if (walk.left -= walk.in_run) walk_take_run(walk);
      }
    }
    __syncwarp();
    unit = end;
    if (unit == units.end) break;
    decoding_next_place<C>(d, place);
    if (keys && leads) shared.split[place.item % DECODING_ITEMS] = decoding_split_of(d, place.first, place.end);
    walk = decoding_walk<C>(d, place, unit);
    half = decoding_half_of(d, place, keys);
  }
}

#endif
