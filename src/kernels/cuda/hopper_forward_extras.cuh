// bias, softcap, ALiBi and dropout in the forward on Hopper: products to scores, weights to kept ones
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_EXTRAS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_FORWARD_EXTRAS_CUH
#include "kernels/cuda/hopper_forward_consumer.cuh"

// Whether the call wants what the kernel can do; a kernel for one thing alone is called for it.
template <class SHAPE>
__device__ __forceinline__ bool forward_consumer<SHAPE>::wants(int extra, bool wanted) {
  return SHAPE::extras & extra && ((SHAPE::extras & ~extra) == 0 || wanted);
}

template <class SHAPE>
__device__ __forceinline__ bool forward_consumer<SHAPE>::has_bias() {
  return wants(FORWARD_BIAS, c.scores.bias.data);
}

template <class SHAPE>
__device__ __forceinline__ bool forward_consumer<SHAPE>::is_float_bias() {
  return SHAPE::extras & FORWARD_FLOAT_BIAS && wants(FORWARD_FLOAT_BIAS, c.scores.bias.dtype == SA_F32);
}

// Extras. The bias of the step in stage k is on its way while the product is made.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::meet_step() {
  const hopper_scores &rule = c.scores;
  first_key = shared.key[k.at] + 2 * (lane & 3);
  if constexpr (SHAPE::extras & FORWARD_BIAS && !SHAPE::stages_bias) {
    if (!has_bias()) return;
    const bool whole = wants(FORWARD_BIAS, rule.bias_pairs) && first_key - 2 * (lane & 3) + SHAPE::keys <= c.keys;
    if (is_float_bias()) {
      whole ? load_bias<uint32_t, true>() : load_bias<uint32_t, false>();
    } else {
      whole ? load_bias<uint16_t, true>() : load_bias<uint16_t, false>();
    }
  }
}

// PAIRS: two neighbouring keys are read at once. Otherwise the last key is read for those beyond it; the last row is
// read for those beyond it always.
template <class SHAPE>
template <class E, bool PAIRS>
__device__ __forceinline__ void forward_consumer<SHAPE>::load_bias() {
  const forward_item &item = shared.item[number % FORWARD_ITEMS];
  const sa_operand &x = c.scores.bias;
  const E *rows[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    rows[r] = (const E *)x.data + item.batch * x.stride[0] + item.head * x.stride[1] +
              min(query() + 8 * r, c.queries - 1) * x.stride[2];
    if (PAIRS) rows[r] += first_key;
  }
#pragma unroll
  for (int n = 0; n < scores / 2; n++) {
    const E *row = rows[n & 1];
    const int key = n / 2 * 8, one = min(first_key + key, c.keys - 1), two = min(first_key + key + 1, c.keys - 1);
    if constexpr (sizeof(E) == 4 && PAIRS) {
      const uint2 both = __ldg((const uint2 *)(row + key));
      bias[2 * n] = both.x, bias[2 * n + 1] = both.y;
    } else if constexpr (PAIRS) {
      bias[n] = __ldg((const uint32_t *)(row + key));
    } else if constexpr (sizeof(E) == 4) {
      bias[2 * n] = __ldg(row + one * x.stride[3]), bias[2 * n + 1] = __ldg(row + two * x.stride[3]);
    } else {
      bias[n] = __ldg(row + one * x.stride[3]) | (uint32_t)__ldg(row + two * x.stride[3]) << 16;
    }
  }
}

template <class SHAPE>
template <class E>
__device__ __forceinline__ float forward_consumer<SHAPE>::bias_of(int i) {
  if constexpr (sizeof(E) == 4) return __uint_as_float(bias[i]);
  return half_value((uint16_t)(i & 1 ? bias[i / 2] >> 16 : bias[i / 2]));
}

// The bias of 16 keys, of which the first is 16 * x of the step, from shared memory to its place.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::fetch_bias(int x) {
  if constexpr (SHAPE::stages_bias) {
    const int row = (warp * 16 + (lane & 15)) * c.bias_row_step, piece = 2 * x + (lane >> 4);
    uint32_t four[4];
    load_matrices(four, shared_address(shared.bias[piece / 8]) + row * 128 + (((piece ^ row) & 7) << 4));
#pragma unroll
    for (int i = 0; i < 4; i++) bias[4 * x + i] = four[i];
  }
}

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::await_bias() {
  if constexpr (SHAPE::stages_bias) mbarrier_wait(shared_address(&shared.bias_full), staged.parity);
}

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::release_bias() {
  if constexpr (SHAPE::stages_bias) {
    release(shared.bias_empty);
    staged.next();
  }
}

// Key - query - diagonal of a score.
template <class SHAPE>
__device__ __forceinline__ float forward_consumer<SHAPE>::apart(int i) {
  return (float)(first_key - query() - c.scores.diagonal) + (float)(i / 4 * 8 + (i & 1) - (i & 2) * 4);
}

// ALiBi's slope of the item; 0 without.
template <class SHAPE>
__device__ __forceinline__ float forward_consumer<SHAPE>::slope_of_item() {
  return SHAPE::extras & FORWARD_ALIBI ? shared.item[number % FORWARD_ITEMS].slope : 0.f;
}

template <class SHAPE>
template <class E>
__device__ __forceinline__ void forward_consumer<SHAPE>::add_bias() {
  const float slope = slope_of_item();
  if (slope != 0.f) {
#pragma unroll
    for (int i = 0; i < scores; i++) s[i] = hopper_score(c.scores, s[i], hopper_extra(bias_of<E>(i), slope, apart(i)));
  } else {
#pragma unroll
    for (int i = 0; i < scores; i++) {
      if (i % 8 == 0) fetch_bias(i / 8);
      s[i] = hopper_score(c.scores, s[i], bias_of<E>(i));
    }
  }
}

// Products to scores. Where the bias is -inf a finite product becomes -inf; what a product that is not finite becomes
// ends in the careful path.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::extend_scores() {
  const hopper_scores &rule = c.scores;
  if (wants(FORWARD_SOFTCAP, rule.capped == 1)) {
#pragma unroll
    for (int i = 0; i < scores; i++) s[i] = hopper_capped<true>(rule, s[i]);
  } else if (SHAPE::extras == FORWARD_ANY && rule.capped) {
#pragma unroll
    for (int i = 0; i < scores; i++) s[i] = hopper_capped<false>(rule, s[i]);
  }
  const float slope = slope_of_item();
  if (has_bias()) {
    await_bias();
    is_float_bias() ? add_bias<uint32_t>() : add_bias<uint16_t>();
  } else if (slope != 0.f) {
#pragma unroll
    for (int i = 0; i < scores; i++) s[i] = hopper_score(rule, s[i], hopper_extra(0.f, slope, apart(i)));
  } else {
#pragma unroll
    for (int i = 0; i < scores; i++) s[i] = hopper_score(rule, s[i], 0.f);
  }
}

// The bits of a step without the pairs whose bias is -inf.
template <class SHAPE>
__device__ __forceinline__ uint2 forward_consumer<SHAPE>::biased_bits(bool partial, uint2 bits) {
  const bool wide = is_float_bias();
  await_bias();
  if (!partial) bits = make_uint2(~0u, ~0u);
#pragma unroll
  for (int i = 0; i < scores; i++) {
    if (i % 8 == 0) fetch_bias(i / 8);
    const float x = wide ? bias_of<uint32_t>(i) : bias_of<uint16_t>(i);
    const uint32_t bit = x == forward_minus_infinity() ? 1u << (2 * (i >> 2) + (i & 1)) : 0;
    (i & 2 ? bits.y : bits.x) &= ~bit;
  }
  return make_uint2(bits.x & (uint32_t)((1ull << scores / 2) - 1), bits.y & (uint32_t)((1ull << scores / 2) - 1));
}

// Rows without a maximum that see a key all the same: their scores are -inf or NaN.
template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::note_alive(bool partial, uint2 bits) {
  if (!has_bias()) return;
  const uint2 seen = biased_bits(partial, bits);
  alive |= (seen.x != 0) | (seen.y != 0) << 1;
}

template <class SHAPE>
__device__ __forceinline__ bool forward_consumer<SHAPE>::drops() {
  return wants(FORWARD_DROPOUT, c.scores.threshold);
}

// Which weights of the step dropout keeps, a bit for each score. Lanes 2 n and 2 n + 1 share the blocks of four
// weights: each draws every second one for both, ABREAST of them side by side.
template <class SHAPE>
template <int ABREAST>
__device__ __forceinline__ void forward_consumer<SHAPE>::draw() {
  const hopper_scores &rule = c.scores;
  if (!drops()) return;
  const forward_item &item = shared.item[number % FORWARD_ITEMS];
  const uint64_t first = hopper_first_weight(rule, item.batch, c.heads, item.head) + first_key;
  const uint64_t weights[2] = {first + (uint64_t)query() * c.keys, first + (uint64_t)(query() + 8) * c.keys};
  if (c.keys % 4 == 0) {
    const int odd = lane & 1;
#pragma unroll
    for (int w = 0; w < scores / 32; w++) {
      uint32_t other = 0;
      kept[w] = 0;
#pragma unroll ABREAST
      for (int x = 0; x < 8; x++) {
        const int j = x / 2 * 2 + odd, r = x & 1;
        const uint32_t four = hopper_kept_block(rule, (weights[r] + 64 * w + 8 * j) / 4);
        kept[w] |= (odd ? four >> 2 : four & 3) << (4 * j + 2 * r);
        other |= (odd ? four & 3 : four >> 2) << (4 * j + 2 * r);
      }
      kept[w] |= __shfl_xor_sync(~0u, other, 1);
    }
  } else {
#pragma unroll
    for (int w = 0; w < scores / 32; w++) {
      kept[w] = 0;
#pragma unroll 1
      for (int i = 0; i < 32; i++) {
        const uint64_t weight = (i & 2 ? weights[1] : weights[0]) + 64 * w + i / 4 * 8 + (i & 1);
        kept[w] |= (uint32_t)hopper_keeps(rule, weight) << i;
      }
    }
  }
}

template <class SHAPE>
__device__ __forceinline__ void forward_consumer<SHAPE>::drop() {
  if (!drops()) return;
#pragma unroll
  for (int i = 0; i < scores; i++) s[i] = kept[i / 32] >> i % 32 & 1 ? s[i] : 0.f;
}

#endif
