// the careful pass of the forward on Hopper: items that were not finite, done again
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_CAREFUL_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_CAREFUL_CUH
#include "kernels/cuda/hopper_forward_consumer.cuh"

// The items that were noted, one product after the other: run() as to order and bits.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::run_careful() {
  while (next_item()) {
    begin_rows();
    do {
      mbarrier_wait(shared_address(&shared.k_full[k.at]), k.parity);
      const int kind = shared.step[k.at], key = shared.key[k.at];
      uint2 bits = read_bits(kind);
      bool partial = kind & FORWARD_PARTIAL;
#pragma unroll 1
      for (int part = 0; part < SHAPE::parts; part++) {
        lone_scores(part);
        if (part == SHAPE::parts - 1) release_keys(kind);
        if constexpr (SHAPE::extras) {
          if (has_bias()) bits = biased_bits(partial, bits), partial = true;
        }
        uint32_t p[pairs];
        float a[2];
        if (softmax<true>(true, partial, part_bits(bits, part), p, a) && done > 0) scale_output(a);
        pack_late(p);
        if (part == 0) {
          mbarrier_wait(shared_address(&shared.v_full[v.at]), v.parity);
          clean_values();
        }
        lone_output(p, part);
      }
      add_poison(key, partial, bits);
      release_values();
    } while (!last);
    write_item(number, top, sum, alive, false);
    q.next();
    number++;
  }
}

template <class SHAPE>
__device__ __forceinline__ bool forward_consumer<SHAPE>::is_nonfinite(uint32_t half) {
  constexpr uint32_t exponent = std::is_same<type, __half>::value ? 0x7c00 : 0x7f80;
  return (half & exponent) == exponent;
}

template <class SHAPE>
__device__ __forceinline__ float forward_consumer<SHAPE>::half_value(uint16_t half) {
  if constexpr (std::is_same<type, __half>::value) {
    return __half2float(__ushort_as_half(half));
  } else {
    return __uint_as_float((uint32_t)half << 16);
  }
}

// Replaces the elements of V in stage v that are not finite by 0, and notes their keys.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::clean_values() {
  constexpr int threads = FORWARD_CONSUMERS * FORWARD_WARPGROUP;
  const int thread = threadIdx.x - FORWARD_WARPGROUP;
  for (int x = thread; x < SHAPE::value_panels * SHAPE::panel_bytes / 4; x += threads) {
    uint32_t *pair = (uint32_t *)shared.v[v.at][0] + x;
    const bool low = is_nonfinite(*pair), high = is_nonfinite(*pair >> 16);
    if (!low && !high) continue;
    *pair &= (low ? 0 : 0xffffu) | (high ? 0 : 0xffff0000u);
    const int key = x / (SA_PANEL / 2) % SHAPE::keys;
    atomicOr(&shared.poisoned[v.at][key / 32], 1u << key % 32);
  }
  async_proxy_fence();
  named_barrier_sync(FORWARD_CLEANED, threads);
  // Everyone is past the step before, whose notes are now taken away.
  if (thread < SHAPE::keys / 32) shared.poisoned[v.at ^ 1][thread] = 0;
  named_barrier_sync(FORWARD_CLEANED, threads);
}

// Adds what clean_values() took away to the rows that see it: a visible NaN or Inf makes the sum so, however small
// its weight.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::add_poison(int first_key, bool partial, uint2 bits) {
  const forward_item &item = shared.item[number % FORWARD_ITEMS];
  for (int word = 0; word < SHAPE::keys / 32; word++) {
    for (uint32_t found = shared.poisoned[v.at][word]; found; found &= found - 1) {
      const int key = word * 32 + __ffs(found) - 1;
      const int source = (lane & 28) | key % 8 / 2, bit = key / 8 * 2 + key % 2;
      const uint32_t seen0 = __shfl_sync(~0u, bits.x, source) >> bit & 1;
      const uint32_t seen1 = __shfl_sync(~0u, bits.y, source) >> bit & 1;
      // Of dropped weights, which are 0, comes NaN.
      uint32_t keeps = ~0u;
      if constexpr (SHAPE::extras & FORWARD_DROPOUT) {
        if (drops()) {
          const uint32_t mine = SHAPE::keys == 128 && key >= 64 ? kept[(scores - 1) / 32] : kept[0];
          keeps = __shfl_sync(~0u, mine, source) >> (key % 64 / 8 * 4 + key % 2);
        }
      }
      const uint16_t *row = (const uint16_t *)c.values.data + item.batch * c.values.stride[0] +
                            item.key_head * c.values.stride[1] + ((int64_t)first_key + key) * c.values.stride[2];
#pragma unroll
      for (int x = 0; x < outs / 4; x++) {
        const int column = 8 * x + 2 * (lane & 3);
        const uint32_t pair = column < c.value_width ? *(const uint32_t *)(row + column) : 0;
        if (!is_nonfinite(pair) && !is_nonfinite(pair >> 16)) continue;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const uint32_t half = i & 1 ? pair >> 16 : pair & 0xffff;
          if (is_nonfinite(half) && (!partial || (i & 2 ? seen1 : seen0))) {
            o[4 * x + i] += keeps >> (i & 2) & 1 ? half_value(half) : 0.f * half_value(half);
          }
        }
      }
    }
  }
}

#endif
