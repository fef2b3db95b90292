// backward attention on Hopper for widths up to 128: what the careful launch does about elements that are not finite
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_REPAIRS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_REPAIRS_CUH
#include "kernels/cuda/hopper_backward_weights.cuh"

// Everything here waits for all products first, and a step for the one before: speed does not matter, and a third of
// the code is compiled.
template <class SHAPE, bool CAREFUL>
struct hopper_backward_repairs : hopper_backward_thread<SHAPE, CAREFUL> {
  using base_type = hopper_backward_thread<SHAPE, CAREFUL>;
  using base_type::base;
  using base_type::c;
  using base_type::dk;
  using base_type::dv;
  using base_type::job;
  using base_type::lane;
  using base_type::p;
  using base_type::row;
  using base_type::store_pairs;
  using base_type::stores_read;
  using base_type::sums;
  using base_type::t;
  using base_type::w;
  using typename base_type::type;

  __device__ __forceinline__ hopper_backward_repairs(const hopper_backward_call &call, uint32_t start, int group)
      : base_type(call, start, group) {}

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
  __device__ __forceinline__ void clean_queries(int g) {
    const int thread = w * 128 + t, row = thread % SHAPE::queries;
    stores_read();
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
    __syncwarp();  // before a lane gives the slot back
  }
};

#endif
