// products q.k into scores: scale, softcap, bias, ALiBi, masks; and which weights dropout keeps
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_SCORES_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_SCORES_CUH
#include "kernels/cuda/operand.cuh"
#include "kernels/cuda/portable_numbers.cuh"
#include "kernels/cuda/score_scale.cuh"
#include "random.h"

// How the products q.k of one head become scores: in base 2 when scale is all there is (`plain`), so that 2^x gives
// weights; in natural units with softcap, bias or ALiBi, where base 2 would make -inf of a bias of the dtype's minimum.
// A difference of scores times `unit` is an exponent of 2.
template <class Real>
struct score_rule {
  Real factor, unit, softcap, slope;
  Real inside;       // 1 / softcap
  bool coarse_cap;   // of a half type, whose scores may err by 1.5e-7 of the softcap
  const void *bias;  // NULL: none; of the real's dtype, f32 beside f64, or a half type
  int bias_dtype;
  bool bias_pairs;                // two neighbouring keys of it, an even one first, can be read at once
  int64_t bias_row, bias_column;  // strides, of queries and keys
  int64_t diagonal;
};

static __host__ __device__ inline bool plain_scores(const sa_problem &p) {
  return !p.bias.data && !p.alibi.data && !(p.softcap > 0);
}

template <class Real>
static __device__ __forceinline__ score_rule<Real> score_rule_of(const sa_problem &p, int64_t batch, int64_t head) {
  const double log2e = 1.4426950408889634;
  const bool plain = plain_scores(p);
  score_rule<Real> rule;
  // Without a width a product is an empty sum, whatever 1/sqrt(0) makes of the scale.
  const double scale = score_scale(p);
  rule.factor = p.width ? (Real)(plain ? scale * log2e : scale) : 0;
  rule.unit = plain ? 1 : (Real)log2e;
  rule.softcap = (Real)p.softcap;
  rule.inside = p.softcap > 0 ? (Real)(1 / p.softcap) : 0;
  rule.coarse_cap = (p.dtype == SA_F16 || p.dtype == SA_BF16) && p.softcap <= 100;
  rule.slope = p.alibi.data ? (Real)read_operand(p.alibi, head * p.alibi.stride[1]) : 0;
  rule.bias = NULL;
  rule.bias_pairs = false;
  rule.bias_dtype = p.bias.dtype;
  rule.bias_row = p.bias.stride[2];
  rule.bias_column = p.bias.stride[3];
  rule.diagonal = p.diagonal;
  if (p.bias.data) {
    const int bytes = p.bias.dtype == SA_F64 ? 8 : p.bias.dtype == SA_F32 ? 4 : 2;
    rule.bias = (const char *)p.bias.data + (batch * p.bias.stride[0] + head * p.bias.stride[1]) * bytes;
    rule.bias_pairs =
        rule.bias_column == 1 && rule.bias_row % 2 == 0 && p.keys % 2 == 0 && (uintptr_t)rule.bias % (2 * bytes) == 0;
  }
  return rule;
}

// The biases of a block: element n lies `down` (n / 2) and `right` (n % 2) from `at`, value(x) is the number that an
// element x is. Those of masked pairs are not read.
template <class Real, class Element, class Value>
static __device__ __forceinline__ void read_bias(const Element *at, int64_t right, int64_t down, bool pairs,
                                                 uint32_t visible, Real (&bias)[4], const Value &value) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const Element *from = at + half * down;
    const uint32_t seen = visible >> 2 * half & 3;
    struct alignas(2 * sizeof(Element)) {
      Element x[2];
    } pair = {{0, 0}};
    if (pairs && sizeof(Element) < 8) {
      if (seen) pair = *(const decltype(pair) *)from;
    } else {
      if (seen & 1) pair.x[0] = from[0];
      if (seen & 2) pair.x[1] = from[right];
    }
    bias[2 * half] = seen & 1 ? (Real)value(pair.x[0]) : 0;
    bias[2 * half + 1] = seen & 2 ? (Real)value(pair.x[1]) : 0;
  }
}

// A bias has the dtype of the scores, or is in f32 beside f64, or in a half type.
template <bool TRANSPOSED, class Real>
static __device__ __forceinline__ void bias_block(const score_rule<Real> &rule, int64_t query, int64_t key,
                                                  uint32_t visible, Real (&bias)[4]) {
  const int64_t offset = query * rule.bias_row + key * rule.bias_column;
  const int64_t right = TRANSPOSED ? rule.bias_row : rule.bias_column,
                down = 8 * (TRANSPOSED ? rule.bias_column : rule.bias_row);
  const bool pairs = !TRANSPOSED && rule.bias_pairs, f16 = rule.bias_dtype == SA_F16;
  if (rule.bias_dtype == (sizeof(Real) == 8 ? SA_F64 : SA_F32))
    read_bias((const Real *)rule.bias + offset, right, down, pairs, visible, bias, [](Real x) { return x; });
  else if constexpr (sizeof(Real) == 8)
    read_bias((const float *)rule.bias + offset, right, down, pairs, visible, bias, [](float x) { return x; });
  else
    read_bias((const uint16_t *)rule.bias + offset, right, down, pairs, visible, bias,
              [&](uint16_t x) { return f16 ? __half2float(__ushort_as_half(x)) : __uint_as_float((uint32_t)x << 16); });
}

// key - query - d of a block's first element; ALiBi multiplies the size of such numbers, which are exact in f32 up to
// 2^24. That of element n is alibi_distance<TRANSPOSED>(apart, n).
template <class Real>
static __device__ __forceinline__ Real alibi_apart(const score_rule<Real> &rule, int64_t query, int64_t key) {
  return (Real)(key - query - rule.diagonal);
}

template <bool TRANSPOSED, class Real>
static __device__ __forceinline__ Real alibi_distance(Real apart, int n) {
  const int down = n / 2 * 8, right = n % 2;
  return fabs(apart + (Real)(TRANSPOSED ? down - right : right - down));
}

// Out of line: inlined for every element it would be most of the code of a kernel.
__attribute__((noinline)) static __device__ float exact_tanh(float x) {
  return tanhf(x);
}

__attribute__((noinline)) static __device__ double exact_tanh(double x) {
  return tanh(x);
}

static __device__ __forceinline__ float tanh_of(const score_rule<float> &rule, float x) {
  if (!rule.coarse_cap) return exact_tanh(x);
  // 1 - 2 / (e^2x + 1), an error of 1.5e-7 whatever x is.
  return 1 - __fdividef(2.f, exp2_fast(x * 2.8853900817779268f) + 1);
}

static __device__ __forceinline__ double tanh_of(const score_rule<double> &, double x) {
  return exact_tanh(x);
}

// Products in place become scores, -inf where masked: blocks side by side, of which the first element is (query, key),
// or, with TRANSPOSED scores, whose rows are keys, (key, query). Bit 4 n + i of `visible` is element i of block n;
// those whose bias is -inf are cleared. `full`: all are visible. capped[n], of as many blocks as there are: tanh(s /
// softcap), 0 without. Each option goes over all blocks, so that none waits for the one before.
template <bool TRANSPOSED, class Real, int BLOCKS, int CAPPED>
static __device__ __forceinline__ void score_blocks(const score_rule<Real> &rule, Real (&c)[BLOCKS][4], int64_t query,
                                                    int64_t key, bool full, uint32_t &visible,
                                                    Real (*capped)[CAPPED][4]) {
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      c[n][i] *= rule.factor;
      if (capped) (*capped)[n % CAPPED][i] = 0;
    }
  if (rule.softcap > 0) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const Real inside = tanh_of(rule, c[n][i] * rule.inside);
        if (capped) (*capped)[n % CAPPED][i] = inside;
        c[n][i] = rule.softcap * inside;
      }
  }
  if (rule.bias) {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
      Real bias[4];
      bias_block<TRANSPOSED>(rule, query + (TRANSPOSED ? 8 * n : 0), key + (TRANSPOSED ? 0 : 8 * n), visible >> 4 * n,
                             bias);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (bias[i] == -(Real)INFINITY) visible &= ~(1u << (4 * n + i));
        c[n][i] += bias[i];
      }
    }
  }
  if (rule.slope != 0) {
    const Real first = alibi_apart(rule, query, key);
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
      const Real apart = first + (Real)(TRANSPOSED ? -8 * n : 8 * n);
#pragma unroll
      for (int i = 0; i < 4; i++) c[n][i] -= rule.slope * alibi_distance<TRANSPOSED>(apart, i);
    }
  }
  if (full && !rule.bias) return;
#pragma unroll
  for (int n = 0; n < BLOCKS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (!(visible >> (4 * n + i) & 1)) c[n][i] = -(Real)INFINITY;
}

/*  Dropout  */

typedef struct dropout_rule {
  uint64_t seed, first;  // index of the head's pair (0, 0)
  int64_t keys;
  uint32_t threshold;  // 0: off
} dropout_rule;

static __device__ __forceinline__ dropout_rule dropout_rule_of(const sa_problem &p, int64_t batch, int64_t head) {
  dropout_rule rule;
  rule.seed = p.seed;
  rule.first = (uint64_t)(batch * p.heads + head) * (uint64_t)p.queries * (uint64_t)p.keys;
  rule.keys = p.keys;
  rule.threshold = sa_dropout_threshold(p.dropout);
  return rule;
}

// The words of a pair and its neighbour that do not lie in one block of words: rare without transposition, when the
// number of keys is odd, and so out of line.
__attribute__((noinline)) static __device__ uint2 words_apart(uint64_t seed, uint64_t index) {
  return make_uint2(sa_random_word(seed, index), sa_random_word(seed, index + 1));
}

// Which elements of a block are kept: bit n is c[n]'s, the block as score_block has it.
template <bool TRANSPOSED>
static __device__ __forceinline__ uint32_t kept_block(const dropout_rule &rule, int64_t query, int64_t key) {
  uint32_t kept = 0;
#pragma unroll
  for (int row = 0; row < 2; row++) {
    const int64_t i = query + (TRANSPOSED ? 0 : 8 * row), j = key + (TRANSPOSED ? 8 * row : 0);
    const uint64_t index = rule.first + (uint64_t)i * (uint64_t)rule.keys + (uint64_t)j;
    uint2 word;
    if (TRANSPOSED) {
      word = make_uint2(sa_random_word(rule.seed, index), sa_random_word(rule.seed, index + (uint64_t)rule.keys));
    } else if (index % 2) {
      word = words_apart(rule.seed, index);
    } else {
      const sa_words words = sa_random_block(rule.seed, index / 4);
      word = index & 2 ? make_uint2(words.word[2], words.word[3]) : make_uint2(words.word[0], words.word[1]);
    }
    kept |= (uint32_t)(word.x >= rule.threshold) << (2 * row) | (uint32_t)(word.y >= rule.threshold) << (2 * row + 1);
  }
  return kept;
}

#endif
