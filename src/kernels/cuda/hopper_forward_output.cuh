// the end of an item of the forward on Hopper: its rows, their LSE, and whether they are finite
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_OUTPUT_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_OUTPUT_CUH
#include "kernels/cuda/hopper_forward_consumer.cuh"

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::scale_output(const float (&a)[2]) {
#pragma unroll
  for (int i = 0; i < outs; i++) o[i] *= a[i >> 1 & 1];
}

// The warp's 16 rows of a panel of O, in halves, to its buffer: two groups of 8 columns at a time, each of 8 rows and 8
// below. Row r has its 16 bytes i at place i ^ r % 8. This lane hands over those of row lane % 16, i an even number or
// the next.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::pack_panel(uint32_t buffer, int panel, const bool (&dead)[2],
                                                                    const float (&factor)[2], uint32_t (&seen)[2]) {
  const uint32_t to = buffer + (lane & 15) * 128 + ((lane >> 4 ^ (lane & 7)) << 4);
#pragma unroll
  for (int x = 0; x < 8 && panel * 8 + x < SHAPE::value_width / 8; x += 2) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int r = i & 1, e = 4 * (panel * 8 + x + (i >> 1)) + 2 * r;
      w[i] = dead[r] ? 0 : pack_halves<type>(o[e] * factor[r], o[e + 1] * factor[r]);
      seen[r] = note_nonfinite<type>(seen[r], w[i]);
    }
    store_matrices(to ^ (x << 4), w);
  }
}

// The warp's rows of a panel of O, by TMA. Its buffer is free when the panel before has been read; that of another item
// is written by then, too, as it may be the same one.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::send_panel(const forward_item &item, int panel,
                                                                    const bool (&dead)[2], const float (&factor)[2],
                                                                    uint32_t (&seen)[2]) {
  const uint32_t buffer = shared_address(shared.out[warp]);
  if (lane == 0) {
    if (panel) {
      bulk_wait_read<0>();
    } else {
      bulk_wait<0>();
    }
  }
  __syncwarp();
  pack_panel(buffer, panel, dead, factor, seen);
  async_proxy_fence();
  __syncwarp();
  if (lane == 0) {
    tma_store(&c.o, panel * SA_PANEL, item.tile * SA_TILE + warp * 16, item.head * c.o_head_step,
              item.batch * c.o_batch_step, buffer);
    bulk_commit();
  }
}

// The natural logarithm. What an instruction makes errs by 2^-22 of it: so it is made of a number near 1, which leaves
// it little to err by, and the exponent.
static __device__ __forceinline__ float log_of(float x) {
  if (!(x >= 0x1p-126f && x < -forward_minus_infinity())) return __log2f(x) * 0.69314718f;
  const int octaves = (__float_as_int(x) - 0x3f3504f3) >> 23;
  const float rest = __log2f(__int_as_float(__float_as_int(x) - (octaves << 23)));
  return fmaf((float)octaves, 0.69314718f, rest * 0.69314718f);
}

// Writes the rows of item `of`, whose maxima and sums are given, and notes the item when they are not finite.
// `lives`: its bits of `alive`.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::write_item(int of, const float (&maximum)[2],
                                                                    const float (&part)[2], int lives, bool note) {
  const forward_item &item = shared.item[of % FORWARD_ITEMS];
  const int64_t start = item.tile * SA_TILE + warp * 16;  // the warp's first row
  const int rows = min(c.queries - (int)start, 16);       // of the warp; none or less beyond the end
  const int row = lane / 4;                               // of the warp, and the one 8 below
  const uint32_t dead_bits = item.dead[warp];
  const float sink = item.sink;
  bool dead[2], bad = false;
  float factor[2], lse[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    dead[r] = dead_bits >> (row + 8 * r) & 1;
    if constexpr (SHAPE::extras) {
      const uint32_t quads = __ballot_sync(~0u, lives >> r & 1);
      if (has_bias()) dead[r] = maximum[r] == forward_minus_infinity() && !(quads >> (lane & 28) & 15);
    }
    float total = forward_quad_sum(part[r]), base = maximum[r], weight = 1.f;
    if (sink != forward_minus_infinity()) {  // its share of the sum, under the greater of both maxima
      base = fmaxf(base, sink);
      weight = exp2_fast(octaves(maximum[r] - base));
      total = total * weight + exp2_fast(octaves(sink - base));
    }
    factor[r] = weight * reciprocal_fast(total);
    if (SHAPE::extras) factor[r] *= c.scores.kept;
    bad |= !dead[r] && !(total < -forward_minus_infinity());
    // Visible scores that are all -inf have no sum and no softmax.
    const float natural = SHAPE::extras ? c.scores.natural : 0.69314718f;
    lse[r] = dead[r] ? sink * natural : total == 0.f ? __int_as_float(0x7fffffff) : fmaf(base, natural, log_of(total));
  }
  uint32_t seen[2] = {0, 0};
  if constexpr (SHAPE::sends_output) send_panel(item, 0, dead, factor, seen);
  if (lane % 4 == 0 && item.lse) {
    float *const to = item.lse + (start + row) * c.lse.stride[2];
    if (row < rows) to[0] = lse[0];
    if (row + 8 < rows) to[8 * c.lse.stride[2]] = lse[1];
  }
  if (lane % 4 == 0 && item.dead_rows) {
    uint8_t *const to = item.dead_rows + (start + row) * c.dead.stride[2];
    if (row < rows) to[0] = dead[0];
    if (row + 8 < rows) to[8 * c.dead.stride[2]] = dead[1];
  }
  if constexpr (SHAPE::sends_output) {
#pragma unroll
    for (int panel = 1; panel < SHAPE::value_panels; panel++) send_panel(item, panel, dead, factor, seen);
  } else {
    // This thread writes 16 bytes of every fourth row, of which `left` are there.
    const int first = lane >> 3, piece = lane & 7, left = rows - first;
    const int64_t step = 4 * c.out.stride[2];
    type *out = (type *)item.out + (start + first) * c.out.stride[2] + piece * 8;
    const uint32_t buffer = shared_address(shared.out[warp]);
#pragma unroll
    for (int panel = 0; panel < SHAPE::value_panels; panel++) {
      if (panel) __syncwarp();
      pack_panel(buffer, panel, dead, factor, seen);
      __syncwarp();
      // All loads before the first store: a store that may be left out would otherwise keep its load behind a branch.
      int4 x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int from = i * 4 + first;
        x[i] = *(const int4 *)(shared.out[warp] + from * 128 + ((piece ^ (from & 7)) << 4));
      }
      const int stored = panel * SA_PANEL + piece * 8 < c.value_width ? left : 0;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (i * 4 < stored) *(int4 *)(out + i * step + panel * SA_PANEL) = x[i];
      }
    }
  }
  bad |= ((seen[0] | seen[1]) & 0x7fff7fff) != 0;
  if (note && __any_sync(~0u, bad) && lane == 0) note_item(of, item.work);
  __syncwarp();
}

// Eight warps may find the same item; the first notes it. An item that may have begun before the block was wary is
// taken again in the stream, since a jump is all that most suffer from; others have to be done carefully.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::note_item(int of, int work) {
  if (atomicMax(&shared.flagged_number[of % FORWARD_ITEMS], of + 1) > of) return;
  const int first = min(atomicMin(&shared.wary, of), of);
  if (of < first + FORWARD_UNAWARE) {
    atomicExch(&shared.again[of % FORWARD_ITEMS], work + 1);
    return;
  }
  c.flagged_next[work] = atomicExch(&shared.flagged, work);
}

#endif
