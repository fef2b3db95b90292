// scores on Hopper: what softcap, bias and ALiBi make of a product q.k, and which weights dropout keeps; the same bits
// forward and backward
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_SCORES_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_SCORES_CUH
#include <math.h>
#include <string.h>

#include "kernels/cuda/operand.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/score_scale.cuh"
#include "random.h"

/*  A score is
 *
 *      fma(value, factor, extra)      value   the product, or hopper_capped() of it when there is a softcap
 *                                     extra   hopper_extra(): the bias and ALiBi's part; 0 without
 *
 *  and a difference of scores times `unit` an exponent of 2. Without a bias the unit is 1: the factors of base 2 are in
 *  the score. With a bias scores are natural, as in base 2 a bias of the dtype's minimum would become -inf. The steps
 *  are spelled as single roundings, so that no compiler fuses them here and not there.
 */
typedef struct hopper_scores {
  sa_operand bias, alibi;
  float factor, unit;
  // An exponent of 2 times `octave` is a score, which times `natural` is a natural one, which times `base` is a score.
  float octave, natural, base;
  float inside;          // of a product, under the softcap
  int32_t capped;        // by hopper_capped(): 0 not at all, 1 by the fast way, 2 by tanhf
  int32_t diagonal;      // d of ALiBi
  uint32_t threshold;    // of dropout; 0: none
  int32_t bias_pairs;    // two neighbouring keys of the bias, an even one first, can be read at once
  uint64_t seed;         // of dropout
  uint32_t key[20];      // of its ten rounds (random.h)
  int64_t head_weights;  // weights of a head: L S
  float kept;            // what a kept weight is multiplied by
} hopper_scores;

// The fast way errs by 1.5e-7 whatever the product is: times a softcap up to this, no more than f32 scores do.
#define HOPPER_SOFTCAP 100.0

// Whether there is more to a score than the scale, or to a weight than its score.
static inline bool hopper_has_extras(const sa_problem *p) {
  return p->bias.data || p->alibi.data || p->softcap > 0 || p->dropout > 0;
}

// Distances are exact in f32, and every factor is a number of f32.
static inline bool hopper_scores_fit(const sa_problem *p) {
  const double factor = (p->softcap > 0 ? p->softcap : p->scale) * 1.4426950408889634;
  const double inside = p->softcap > 0 ? p->scale / p->softcap * 2.8853900817779268 : 1;
  if (!(fabs(factor) >= 1e-37 && fabs(factor) <= 1e37 && fabs(inside) >= 1e-37 && fabs(inside) <= 1e37)) return false;
  return !p->alibi.data || p->queries + p->keys + llabs(p->diagonal) < 1 << 24;
}

static inline bool hopper_bias_pairs(const sa_problem *p) {
  const sa_operand *x = &p->bias;
  const uintptr_t bytes = x->dtype == SA_F32 ? 8 : 4;
  return x->stride[3] == 1 && (uintptr_t)x->data % bytes == 0 && x->stride[0] % 2 == 0 && x->stride[1] % 2 == 0 &&
         x->stride[2] % 2 == 0 && p->keys % 2 == 0;
}

static inline hopper_scores hopper_scores_of(const sa_problem *p) {
  const double log2e = 1.4426950408889634, base = p->bias.data ? 1 : log2e;
  hopper_scores rule;
  memset(&rule, 0, sizeof rule);
  rule.bias = p->bias;
  rule.alibi = p->alibi;
  rule.capped = !(p->softcap > 0) ? 0 : p->softcap <= HOPPER_SOFTCAP ? 1 : 2;
  rule.factor = (float)((rule.capped ? p->softcap : score_scale(*p)) * base);
  rule.unit = p->bias.data ? (float)log2e : 1.f;
  rule.octave = p->bias.data ? 0.69314718f : 1.f;
  rule.natural = p->bias.data ? 1.f : 0.69314718f;
  rule.base = (float)base;
  rule.bias_pairs = hopper_bias_pairs(p);
  if (rule.capped) rule.inside = (float)(score_scale(*p) / p->softcap * (rule.capped == 1 ? 2 * log2e : 1));
  rule.diagonal = (int32_t)p->diagonal;
  rule.threshold = sa_dropout_threshold(p->dropout);
  rule.seed = p->seed;
  for (uint32_t round = 0; round < 10; round++) {
    rule.key[2 * round] = (uint32_t)p->seed + round * 0x9E3779B9u;
    rule.key[2 * round + 1] = (uint32_t)(p->seed >> 32) + round * 0xBB67AE85u;
  }
  rule.head_weights = p->queries * p->keys;
  rule.kept = (float)(1 / (1 - p->dropout));
  return rule;
}

// tanh(product * scale / softcap); FAST when rule.capped is 1. A product of NaN gives NaN.
template <bool FAST>
static __device__ __forceinline__ float hopper_capped(const hopper_scores &rule, float product) {
  const float x = __fmul_rn(product, rule.inside);
  if (!FAST) return tanhf(x);
  return fmaf(-2.f, reciprocal_fast(__fadd_rn(exp2_fast(x), 1.f)), 1.f);
}

// Of a head, in the units of the scores.
static __device__ __forceinline__ float hopper_slope(const hopper_scores &rule, int64_t head) {
  if (!rule.alibi.data) return 0;
  const float slope = (float)read_operand(rule.alibi, head * rule.alibi.stride[1]);
  return rule.bias.data ? slope : __fmul_rn(slope, 1.44269504f);
}

// The bias (0: none) and what ALiBi takes off; `apart` is key - query - diagonal.
static __device__ __forceinline__ float hopper_extra(float bias, float slope, float apart) {
  return __fsub_rn(bias, __fmul_rn(slope, fabsf(apart)));
}

static __device__ __forceinline__ float hopper_score(const hopper_scores &rule, float value, float extra) {
  return __fmaf_rn(value, rule.factor, extra);
}

// Number of the weight (batch, head, 0, 0) of `heads` heads.
static __device__ __forceinline__ uint64_t hopper_first_weight(const hopper_scores &rule, int64_t batch, int64_t heads,
                                                               int64_t head) {
  return (uint64_t)(batch * heads + head) * (uint64_t)rule.head_weights;
}

// Which of the weights 4 * block .. 4 * block + 3 dropout keeps: a bit each. This is sa_random_block() with the keys of
// its rounds from constant memory: adding them up is a quarter of its instructions.
static __device__ __forceinline__ uint32_t hopper_kept_block(const hopper_scores &rule, uint64_t block) {
  uint32_t word[4] = {(uint32_t)block, (uint32_t)(block >> 32), 0, 0};
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t one = (uint64_t)word[0] * 0xD2511F53u, two = (uint64_t)word[2] * 0xCD9E8D57u;
    word[0] = (uint32_t)(two >> 32) ^ word[1] ^ rule.key[2 * round];
    word[1] = (uint32_t)two;
    word[2] = (uint32_t)(one >> 32) ^ word[3] ^ rule.key[2 * round + 1];
    word[3] = (uint32_t)one;
  }
  uint32_t kept = 0;
#pragma unroll
  for (int n = 0; n < 4; n++) kept |= (uint32_t)(word[n] >= rule.threshold) << n;
  return kept;
}

// Whether dropout keeps the weight of that number.
static __device__ __forceinline__ bool hopper_keeps(const hopper_scores &rule, uint64_t number) {
  return sa_random_word(rule.seed, number) >= rule.threshold;
}

#endif
