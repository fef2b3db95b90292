// a thread of the forward on Hopper that multiplies: what it keeps, its products and its way through the steps
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_CONSUMER_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_CONSUMER_CUH
#include "kernels/cuda/hopper_forward_call.cuh"

// A thread of the two warpgroups that multiply. Its rows of the warp's 16 are lane / 4 (index 0) and lane / 4 + 8 (1).
template <class SHAPE>
struct forward_consumer {
  static constexpr int scores = SHAPE::keys / SHAPE::parts / 2, pairs = scores / 2, outs = SHAPE::value_width / 2;
  using type = typename SHAPE::type;

  const forward_call &c;
  forward_shared<SHAPE> &shared;
  // The shuffle tells the compiler that a warp is of one group: what depends on it goes to uniform registers.
  const int group = __shfl_sync(~0u, threadIdx.x / FORWARD_WARPGROUP, 0) - 1;
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  float s[scores], o[outs];
  float top[2];    // the kept maximum, in units of log2
  float shift[2];  // its negative, or 0 while it is -inf
  float sum[2];    // this thread's part
  float low[2];    // what the careful path takes off the scores besides: the rounding of a huge maximum
  bool all_seen;   // every row of the warp has a maximum
  // Rows that saw a key whose bias is not -inf while they had no maximum: bits 0 and 1, of the item before 2 and 3.
  int32_t alive = 0;
  float top_before[2], sum_before[2];  // of the item before, until it is written
  int number = 0;                      // of the item at hand
  int done, done_before;               // its steps, and those of the item before
  bool last, begins;                   // the step at hand is its item's last, begins an item
  hopper_ring<SHAPE::q_slots> q;
  hopper_ring<FORWARD_STAGES> k, v;
  hopper_ring<1> staged;  // bias

  // Extras: the thread's first key of the step, the bias of the step (of halves, two a register) and which weights
  // dropout keeps.
  int first_key;
  uint32_t bias[SHAPE::extras & FORWARD_FLOAT_BIAS ? scores : scores / 2], kept[(scores + 31) / 32];

  __device__ __forceinline__ forward_consumer(const forward_call &call, forward_shared<SHAPE> &memory)
      : c(call), shared(memory) {}

  // Products and steps.
  __device__ void release(uint64_t &barrier);
  __device__ void issue_scores(int part = 0);
  __device__ void issue_output(uint32_t (&p)[pairs], int accumulate, int part = 0);
  __device__ uint2 read_bits(int step);
  __device__ int query();
  __device__ bool next_item();
  __device__ bool advance();
  __device__ void release_keys(int step);
  __device__ void release_values();
  __device__ void await_turn();
  __device__ void pass_turn();
  __device__ void step(uint32_t (&p_before)[pairs], uint32_t (&p)[pairs]);
  __device__ void finish(uint32_t (&p)[pairs]);
  __device__ void lone_scores(int part = 0);
  __device__ void lone_output(uint32_t (&p)[pairs], int part);
  __device__ void run();

  // The same in parts, where two blocks share a multiprocessor (hopper_forward_parts.cuh).
  static __device__ uint2 part_bits(uint2 bits, int part);
  __device__ void run_parts();

  // Scores to weights (hopper_forward_softmax.cuh).
  __device__ void row_maxima(float (&x)[2]);
  __device__ void begin_rows();
  __device__ void keep(int r, float maximum);
  __device__ float octaves(float x);
  __device__ float in_units(float score);
  __device__ float exponent(float score, int r);
  __device__ void sums(float (&t)[2]);
  template <bool CAREFUL>
  __device__ bool raise_maxima(float (&a)[2]);
  __device__ void settle_huge();
  template <bool CAREFUL>
  __device__ float exponential(int i);
  __device__ void mask_scores(uint2 bits);
  template <bool CAREFUL>
  __device__ bool softmax(bool wary, bool partial, uint2 bits, uint32_t (&p)[pairs], float (&a)[2]);
  __device__ void pack(uint32_t (&p)[pairs]);
  __device__ void pack_late(uint32_t (&p)[pairs]);

  // Extras (hopper_forward_extras.cuh).
  __device__ bool wants(int extra, bool wanted);
  __device__ bool has_bias();
  __device__ bool is_float_bias();
  __device__ void meet_step();
  template <class E, bool PAIRS>
  __device__ void load_bias();
  template <class E>
  __device__ float bias_of(int i);
  __device__ void fetch_bias(int x);
  __device__ void await_bias();
  __device__ void release_bias();
  __device__ float apart(int i);
  __device__ float slope_of_item();
  template <class E>
  __device__ void add_bias();
  __device__ void extend_scores();
  __device__ uint2 biased_bits(bool partial, uint2 bits);
  __device__ void note_alive(bool partial, uint2 bits);
  __device__ bool drops();
  template <int ABREAST>
  __device__ void draw();
  __device__ void drop();

  // The end of an item (hopper_forward_output.cuh).
  __device__ void scale_output(const float (&a)[2]);
  __device__ void write_item(int of, const float (&maximum)[2], const float (&part)[2], int lives, bool note);
  __device__ void pack_panel(uint32_t buffer, int panel, const bool (&dead)[2], const float (&factor)[2],
                             uint32_t (&seen)[2]);
  __device__ void send_panel(const forward_item &item, int panel, const bool (&dead)[2], const float (&factor)[2],
                             uint32_t (&seen)[2]);
  __device__ void note_item(int of, int work);

  // The careful pass (hopper_forward_careful.cuh).
  __device__ void run_careful();
  static __device__ bool is_nonfinite(uint32_t half);
  static __device__ float half_value(uint16_t half);
  __device__ void clean_values();
  __device__ void add_poison(int first_key, bool partial, uint2 bits);
};

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::release(uint64_t &barrier) {
  __syncwarp();
  if (lane == 0) mbarrier_arrive(shared_address(&barrier));
}

// S = Q K^T of a part of the step in stage k.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::issue_scores(int part) {
  uint32_t a[1] = {wgmma_operand(shared_address(shared.q[q.at][0]) + group * (SHAPE::q_panel_bytes / 2), 0)};
  const uint32_t b = wgmma_operand(shared_address(shared.k[k.at][0]) + part * (SHAPE::panel_bytes / SHAPE::parts), 0);
  // With one slot the sums of a and its steps would be kept in registers for good, which do not suffice.
  if (SHAPE::q_slots == 1 && SHAPE::blocks == 1) pin(a);
  wgmma_first<type, 0, 0>(s, a[0], b);
#pragma unroll
  for (int x = 1; x < SHAPE::width / 16; x++) {
    wgmma<type, 0, 0>(s, a[0] + x / 4 * (SHAPE::q_panel_bytes >> 4) + x % 4 * (32 >> 4),
                      b + x / 4 * (SHAPE::panel_bytes >> 4) + x % 4 * (32 >> 4));
  }
  wgmma_commit();
}

// O += P V of a part of the step in stage v; O = P V for the first of an item.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::issue_output(uint32_t (&p)[pairs], int accumulate, int part) {
  const uint32_t b =
      wgmma_operand(shared_address(shared.v[v.at][0]) + part * (SHAPE::panel_bytes / SHAPE::parts), SHAPE::panel_bytes);
#pragma unroll
  for (int x = 0; x < scores / 8; x++) {
    wgmma_rows<type, 1>(o, p + 4 * x, b + x * (2048 >> 4), x == 0 ? accumulate : 1);
  }
  wgmma_commit();
}

// This thread's bits of the step in stage k, of its two rows; all ones when the tile is FULL.
template <class SHAPE>
__device__ __forceinline__ uint2 forward_consumer<SHAPE>::read_bits(int step) {
  uint2 bits = shared.bits[k.at][warp * 32 + lane];
  if (SHAPE::steps > 1 && (step & FORWARD_SECOND_HALF)) bits = make_uint2(bits.x >> 16, bits.y >> 16);
  if (SHAPE::steps > 1) bits = make_uint2(bits.x & 0xffff, bits.y & 0xffff);
  return bits;
}

// The first of this thread's two queries.
template <class SHAPE>
__device__ __forceinline__ int forward_consumer<SHAPE>::query() {
  return shared.item[number % FORWARD_ITEMS].tile * SA_TILE + warp * 16 + lane / 4;
}

// Goes to the item that comes next; false at the end of the stream.
template <class SHAPE>
__device__ __forceinline__ bool forward_consumer<SHAPE>::next_item() {
  mbarrier_wait(shared_address(&shared.q_full[q.at]), q.parity);
  if (shared.item[number % FORWARD_ITEMS].work >= 0) {
    done_before = done;
    done = 0;
    return true;
  }
  release(shared.q_empty[q.at]);
  q.next();
  number++;
  return false;
}

// Goes to the next step; false at the end of the stream.
template <class SHAPE>
__device__ __forceinline__ bool forward_consumer<SHAPE>::advance() {
  begins = last;
  if (!begins) return true;
  begin_rows();
  q.next();
  number++;
  return next_item();
}

// S of a step is there: its buffers are free.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::release_keys(int step) {
  release(shared.k_empty[k.at]);
  k.next();
  last = step & FORWARD_LAST;
  if (last) release(shared.q_empty[q.at]);
}

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::release_values() {
  release(shared.v_empty[v.at]);
  v.next();
}

// The warpgroups take turns: one issues its products when the other has S of its own step, so that they do not take
// exponentials at the same time. At width 64 they otherwise may fall into step, which costs 14 %.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::await_turn() {
  named_barrier_sync(FORWARD_TURNS + group, FORWARD_CONSUMERS * FORWARD_WARPGROUP);
}
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::pass_turn() {
  named_barrier_arrive(FORWARD_TURNS + 1 - group, FORWARD_CONSUMERS * FORWARD_WARPGROUP);
}

// S = Q K^T together with O += P V of the step before, and the softmax of S under the latter.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::step(uint32_t (&p_before)[pairs], uint32_t (&p)[pairs]) {
  const int accumulate = begins ? done_before > 1 : done > 1;
  mbarrier_wait(shared_address(&shared.k_full[k.at]), k.parity);
  if constexpr (SHAPE::extras) meet_step();
  await_turn();
  pin(s), pin(o), pin(p_before);
  wgmma_fence();
  issue_scores();
  mbarrier_wait(shared_address(&shared.v_full[v.at]), v.parity);
  wgmma_fence();
  issue_output(p_before, accumulate);
  if constexpr (SHAPE::extras) draw<4>();
  const int kind = shared.step[k.at];
  const uint2 bits = read_bits(kind);
  // Once an item of the block had to be noted, the maximum of every step is looked at, so that a workload whose
  // scores jump often is not done twice. The bits are the same.
  const bool wary = shared.wary != FORWARD_NEVER;
  wgmma_wait<1>();
  pin(s);
  pass_turn();
  release_keys(kind);
  done++;
  float a[2];
  const bool rescale = softmax<false>(wary, kind & FORWARD_PARTIAL, bits, p, a);
  wgmma_wait<0>();
  pin(o), pin(p_before);
  release_values();
  pack_late(p);
  if (begins) {
    write_item(number - 1, top_before, sum_before, alive >> 2, true);
  } else if (rescale) {
    scale_output(a);
  }
}

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::finish(uint32_t (&p)[pairs]) {
  if (group == 0) await_turn();  // that the other passed at its last step
  mbarrier_wait(shared_address(&shared.v_full[v.at]), v.parity);
  pin(o), pin(p);
  wgmma_fence();
  issue_output(p, done > 1);
  wgmma_wait<0>();
  pin(o), pin(p);
  release_values();
  write_item(number - 2, top_before, sum_before, alive >> 2, true);  // the end of the stream was counted too
}

// S = Q K^T of a part with nothing beside it.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::lone_scores(int part) {
  if constexpr (SHAPE::extras) {
    meet_step();
    draw<1>();  // at a block's beginning and in the careful pass: a quarter of the code
  }
  pin(s);
  wgmma_fence();
  issue_scores(part);
  wgmma_wait<0>();
  pin(s);
}

// O += P V of a part with nothing beside it.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::lone_output(uint32_t (&p)[pairs], int part) {
  pin(o), pin(p);
  wgmma_fence();
  issue_output(p, done > 0, part);
  wgmma_wait<0>();
  pin(o), pin(p);
  done++;
}

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::run() {
  if (!next_item()) return;
  if (group == 1) pass_turn();
  uint32_t p[pairs], p_second[pairs];  // one is read by P V while the other is written
  uint32_t(&p_other)[pairs] = SHAPE::packs_late ? p : p_second;
  float a[2];
  mbarrier_wait(shared_address(&shared.k_full[k.at]), k.parity);
  const int kind = shared.step[k.at];
  lone_scores();
  const uint2 bits = read_bits(kind);
  release_keys(kind);
  done = 1;
  begin_rows();
  softmax<false>(false, kind & FORWARD_PARTIAL, bits, p, a);
  pack_late(p);
#pragma unroll
  for (int i = 0; i < outs; i++) o[i] = 0.f;
  // With one slot of Q, registers do not suffice for one end of both.
  constexpr bool ends_apart = SHAPE::q_slots == 1;
  for (;;) {
    if (!advance()) {
      if constexpr (ends_apart) finish(p);
      break;
    }
    step(p, p_other);
    if (!advance()) {
      if constexpr (ends_apart) {
        finish(p_other);
      } else {
#pragma unroll
        for (int i = 0; i < pairs; i++) p[i] = p_other[i];
      }
      break;
    }
    step(p_other, p);
  }
  if constexpr (!ends_apart) finish(p);
}

#endif
