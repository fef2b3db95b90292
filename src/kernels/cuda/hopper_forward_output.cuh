// the end of an item of the forward on Hopper: its rows, their LSE, and whether they are finite
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_OUTPUT_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_OUTPUT_CUH
#include "kernels/cuda/hopper_forward_consumer.cuh"

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::scale_output(const float (&a)[2]) {
#pragma unroll
  for (int i = 0; i < outs; i++) o[i] *= a[i >> 1 & 1];
}

// Writes the rows of item `of`, whose maxima and sums are given, and notes the item when they are not finite.
// `lives`: its bits of `alive`.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::write_item(int of, const float (&maximum)[2],
                                                                    const float (&part)[2], int lives, bool note) {
  const forward_item &item = shared.item[of % FORWARD_ITEMS];
  const int rows = min(c.queries - item.tile * SA_TILE - warp * 16, 16);  // of the warp; none or less beyond the end
  const uint32_t dead_bits = item.dead[warp];
  bool dead[2], bad = false;
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = lane / 4 + 8 * r;
    dead[r] = dead_bits >> row & 1;
    if constexpr (SHAPE::extras) {
      const uint32_t quads = __ballot_sync(~0u, lives >> r & 1);
      if (has_bias()) dead[r] = maximum[r] == forward_minus_infinity() && !(quads >> (lane & 28) & 15);
    }
    const float sink = item.sink;
    float total = forward_quad_sum(part[r]), base = maximum[r], weight = 1.f;
    if (sink != forward_minus_infinity()) {  // its share of the sum, under the greater of both maxima
      base = fmaxf(base, sink);
      weight = exp2_fast(octaves(maximum[r] - base));
      total = total * weight + exp2_fast(octaves(sink - base));
    }
    factor[r] = weight / total;
    if (SHAPE::extras) factor[r] *= c.scores.kept;
    bad |= !dead[r] && !(total < -forward_minus_infinity());
    // Visible scores that are all -inf have no sum and no softmax.
    const float log_total = SHAPE::extras ? __log2f(total) * c.scores.octave : __log2f(total);
    const float lse = dead[r] ? sink : total == 0.f ? __int_as_float(0x7fffffff) : base + log_total;
    if (lane % 4 == 0 && row < rows) {
      const float natural = SHAPE::extras ? c.scores.natural : 0.69314718f;
      if (item.lse) item.lse[(warp * 16 + row) * c.lse.stride[2]] = lse * natural;
      if (item.dead_rows) item.dead_rows[(warp * 16 + row) * c.dead.stride[2]] = dead[r];
    }
  }
  // This thread writes 16 bytes of every fourth row.
  const int stride = (int)c.out.stride[2];
  type *out = (type *)item.out + (warp * 16 + (lane >> 3)) * stride + (lane & 7) * 8;
  const uint32_t buffer = shared_address(shared.out[warp]);
  uint32_t seen = 0;
#pragma unroll
  for (int panel = 0; panel < SHAPE::value_panels; panel++) {
    if (panel) __syncwarp();
      // Two groups of 8 columns at a time, each of 8 rows and 8 rows below.
#pragma unroll
    for (int x = 0; x < 8 && panel * 8 + x < SHAPE::value_width / 8; x += 2) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = i & 1, e = 4 * (panel * 8 + x + (i >> 1)) + 2 * r;
        w[i] = dead[r] ? 0 : pack_halves<type>(o[e] * factor[r], o[e + 1] * factor[r]);
        seen = note_nonfinite<type>(seen, w[i]);
      }
      const int row = lane & 15, piece = x + (lane >> 4);
      store_matrices(buffer + row * 128 + ((piece ^ (row & 7)) << 4), w);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = i * 4 + (lane >> 3), piece = lane & 7;
      const uint4 x = *(const uint4 *)(shared.out[warp] + row * 128 + ((piece ^ (row & 7)) << 4));
      if (row < rows && panel * SA_PANEL + piece * 8 < c.value_width) {
        *(uint4 *)(out + i * 4 * stride + panel * SA_PANEL) = x;
      }
    }
  }
  bad |= (seen & 0x7fff7fff) != 0;
  if (note && __any_sync(~0u, bad) && lane == 0) note_item(of, item.work);
  __syncwarp();
}

// Eight warps may find the same item; the first puts it on the list.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::note_item(int of, int work) {
  if (atomicMax(&shared.flagged_number[of % FORWARD_ITEMS], of + 1) > of) return;
  c.flagged_next[work] = atomicExch(&shared.flagged, work);
}

#endif
