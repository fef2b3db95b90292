// backward attention on Hopper for widths up to 128: threads, named barriers, what lies where in shared memory
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_SHAPE_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_SHAPE_CUH
#include "kernels/cuda/hopper_backward_call.cuh"

enum {
  HOPPER_BACKWARD_THREADS = 384,
  // 128 * 24 + 256 * 240 are the 384 * 168 registers that a block is launched with.
  HOPPER_BACKWARD_PRODUCER_REGISTERS = 24,
  HOPPER_BACKWARD_CONSUMER_REGISTERS = 240,
  HOPPER_BACKWARD_TURNS = 4,  // tiles whose turn is known ahead
  // Named barriers; those per warpgroup are two.
  HOPPER_BACKWARD_BOTH = 1,
  HOPPER_BACKWARD_DQ_FULL = 2,
  HOPPER_BACKWARD_DQ_EMPTY = 4,
  HOPPER_BACKWARD_WARPGROUP = 6,
  HOPPER_BACKWARD_EXPONENTIALS = 8,
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
  // Whether dS is made of the halves of P that dV takes; else of P in f32, where S was.
  static constexpr bool rounds_weights = WIDTH == 64 || EXTRAS;
  // Whether dK takes dS^T from the registers of P, which dV has read by then: 16 KB of shared memory a step less, and
  // dS has time until dQ to get there. Not in the last step of a job, where ptxas would serialise products (C7512), nor
  // in the first, where the next S would come later and there is no dQ to hand over meanwhile.
  static constexpr bool ds_in_p = WIDTH == 128 && !CAREFUL && !EXTRAS;
  // Whether the warpgroups make exponentials by turns, each while products of the other one run: 8 to 11 % at width 64,
  // 1 at 128, there not in the first two steps of a job, where they cost more of a padded call than they bring.
  static constexpr bool by_turns = !CAREFUL && !EXTRAS;
  // Whether the loading warp writes the zeros of keys that no query sees. Where the warps that multiply do, ptxas takes
  // their steps for divergent and moves descriptors to uniform registers before each product, 73 of a step's 815
  // instructions: 1 to 7 % of a call. With a bias or a softcap alone there are no registers for better (C7512).
  static constexpr bool loader_clears = EXTRAS != HOPPER_BACKWARD_BIAS && EXTRAS != HOPPER_BACKWARD_SOFTCAP;
  static constexpr int width = WIDTH, panels = WIDTH / SA_PANEL;
  static constexpr int queries = WIDTH == 64 ? 128 : 64;  // of a step
  static constexpr int steps = SA_TILE / queries;         // of a tile
  static constexpr int halves = queries / 64;             // words of bits a thread has of a step
  // The careful launch keeps a copy of K and has fewer slots instead.
  static constexpr int q_slots = CAREFUL ? 2 : 3, dout_slots = CAREFUL ? 1 : 2;
  static constexpr uint32_t key_bytes = SA_TILE * WIDTH * 2, query_bytes = queries * WIDTH * 2,
                            ds_bytes = queries * SA_TILE * 2, panel_bytes = SA_TILE * 128, slab_bytes = 64 * 128,
                            dq_bytes = 64 * 64 * 4, bits_bytes = halves * 1024,
                            zeros_bytes = loader_clears ? slab_bytes : 0;
  // Shared memory, from where it starts.
  static constexpr uint32_t k = 0, v = k + key_bytes, q = v + key_bytes, dout = q + q_slots * query_bytes,
                            ds = dout + dout_slots * query_bytes, dq = ds + 2 * ds_bytes, zeros = dq + 2 * dq_bytes,
                            clean_k = zeros + zeros_bytes, lse = clean_k + (CAREFUL ? key_bytes : 0),
                            delta = lse + q_slots * queries * 4, bits = delta + dout_slots * queries * 4,
                            step = bits + q_slots * bits_bytes, job = step + q_slots * 16, turn = job + 2 * 32,
                            last = turn + HOPPER_BACKWARD_TURNS * 16, log2_sum = last + 2 * 16,
                            bad_q = log2_sum + (biased ? 4 * q_slots * queries : 0),
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

#endif
