// the way through the steps of the forward on Hopper where two blocks share a multiprocessor
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_PARTS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_PARTS_CUH
#include "kernels/cuda/hopper_forward_consumer.cuh"

// This thread's bits of a part, of those of its step.
template <class SHAPE>
__device__ __forceinline__ uint2 forward_consumer<SHAPE>::part_bits(uint2 bits, int part) {
  if (SHAPE::parts == 1) return bits;
  return part ? make_uint2(bits.x >> 16, bits.y >> 16) : make_uint2(bits.x & 0xffff, bits.y & 0xffff);
}

// A step is taken in two parts of 64 keys. Of a part, S, its softmax and P V follow one another: there are no registers
// for more, and what overlaps are the four warpgroups of a multiprocessor.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::run_parts() {
#pragma unroll
  for (int i = 0; i < outs; i++) o[i] = 0.f;
  while (next_item()) {
    begin_rows();
    // As in step(), but looked at once an item.
    const bool wary = shared.wary != FORWARD_NEVER;
    do {
      mbarrier_wait(shared_address(&shared.k_full[k.at]), k.parity);
      const int kind = shared.step[k.at];
      const uint2 bits = read_bits(kind);
#pragma unroll
      for (int part = 0; part < SHAPE::parts; part++) {
        lone_scores(part);
        if (part == SHAPE::parts - 1) release_keys(kind);
        uint32_t p[pairs];
        float a[2];
        if (softmax<false>(wary, kind & FORWARD_PARTIAL, part_bits(bits, part), p, a)) scale_output(a);
        if (part == 0) mbarrier_wait(shared_address(&shared.v_full[v.at]), v.parity);
        lone_output(p, part);
      }
      release_values();
    } while (!last);
    write_item(number, top, sum, 0, true);
    q.next();
    number++;
  }
}

#endif
