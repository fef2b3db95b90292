// what device code calls: warp collectives, barriers, atomics, bits, arithmetic
#ifndef EMULATOR_DEVICE_FUNCTIONS_H
#define EMULATOR_DEVICE_FUNCTIONS_H
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "block.h"

namespace emulator {

template <class To, class From>
static inline To bits_of(const From &from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  memcpy((void *)&to, (const void *)&from, sizeof to);
  return to;
}

// One lane's part in an exchange of values of up to 16 bytes.
struct exchanged {
  unsigned char value[16], result[16];
  int source;  // lane
};

static inline void exchange(void *const operand[WARP], uint32_t mask) {
  for (int lane = 0; lane < WARP; lane++) {
    if (!(mask >> lane & 1)) continue;
    exchanged *mine = (exchanged *)operand[lane];
    if (!(mask >> mine->source & 1))
      fail("a shuffle reads lane %d, which takes no part (mask %#x)", mine->source, mask);
    memcpy(mine->result, ((exchanged *)operand[mine->source])->value, sizeof mine->result);
  }
}

template <class T>
static inline T shuffle(const char *what, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 16, "a value of up to 16 bytes");
  exchanged mine;
  memcpy(mine.value, (const void *)&value, sizeof value);
  mine.source = source;
  gather(what, mask, &mine, exchange);
  memcpy((void *)&value, mine.result, sizeof value);
  return value;
}

static inline int lane() {
  return current()->number % WARP;
}

// A vote or a reduction: every lane's value in, one result for all.
struct voted {
  uint64_t value, result;
};

template <class Join>
static inline void join_lanes(void *const operand[WARP], uint32_t mask, Join join) {
  uint64_t result = 0;
  bool first = true;
  for (int lane = 0; lane < WARP; lane++) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t value = ((voted *)operand[lane])->value;
    result = first ? value : join(result, value);
    first = false;
  }
  for (int lane = 0; lane < WARP; lane++) {
    if (mask >> lane & 1) ((voted *)operand[lane])->result = result;
  }
}

static inline uint64_t vote(const char *what, uint32_t mask, uint64_t value, collective compute) {
  voted mine = {value, 0};
  gather(what, mask, &mine, compute);
  return mine.result;
}

static inline void count_block(int predicate) {
  block *b = current()->home;
  b->vote_count += predicate != 0;
  b->vote_or |= predicate != 0;
  syncthreads();
}

}  // namespace emulator

// Barriers

static inline void __syncthreads() {
  emulator::syncthreads();
}
static inline int __syncthreads_count(int predicate) {
  emulator::count_block(predicate);
  return emulator::current()->home->vote_results[0];
}
static inline int __syncthreads_or(int predicate) {
  emulator::count_block(predicate);
  return emulator::current()->home->vote_results[1];
}
static inline void __syncwarp(unsigned mask = ~0u) {
  emulator::gather("__syncwarp", mask, NULL, NULL);
}
static inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
[[noreturn]] static inline void __trap() {
  emulator::fail("__trap()");
}

// Collectives of a warp

template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulator::shuffle("__shfl_sync", mask, value, emulator::lane() / width * width + source % width);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = emulator::lane(), source = lane ^ lanes;
  return emulator::shuffle("__shfl_xor_sync", mask, value, source / width <= lane / width ? source : lane);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::lane(), source = lane - (int)delta;
  return emulator::shuffle("__shfl_up_sync", mask, value, source >= lane / width * width ? source : lane);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulator::lane(), source = lane + (int)delta;
  return emulator::shuffle("__shfl_down_sync", mask, value, source < (lane / width + 1) * width ? source : lane);
}

#define EMULATOR_JOINED(body)                                                                     \
  [](void *const operand[32], uint32_t mask) {                                                    \
    emulator::join_lanes(operand, mask, [](uint64_t x, uint64_t y) { return (uint64_t)(body); }); \
  }

static inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return (unsigned)emulator::vote("__ballot_sync", mask, predicate ? 1u << emulator::lane() : 0,
                                  EMULATOR_JOINED(x | y));
}
static inline int __any_sync(unsigned mask, int predicate) {
  return (int)emulator::vote("__any_sync", mask, predicate != 0, EMULATOR_JOINED(x | y));
}
static inline int __all_sync(unsigned mask, int predicate) {
  return (int)emulator::vote("__all_sync", mask, predicate != 0, EMULATOR_JOINED(x & y));
}

// Memory

#define EMULATOR_LOAD(name)          \
  template <class T>                 \
  static inline T name(const T *p) { \
    return *p;                       \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)

static inline size_t __cvta_generic_to_shared(const void *p) {
  return emulator::shared_address(p);
}

namespace emulator {

// *p = change(*p) at once; gives the old value.
template <class T, class Change>
static inline T atomically(T *p, Change change) {
  T old, now;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    now = change(old);
  } while (!__atomic_compare_exchange(p, &old, &now, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
  return old;
}

template <class T>
struct same {
  typedef T type;  // a parameter whose type is not deduced
};

}  // namespace emulator

#define EMULATOR_ATOMIC(name, body)                                       \
  template <class T>                                                      \
  static inline T name(T *p, typename emulator::same<T>::type value) {    \
    return emulator::atomically(p, [value](T old) -> T { return body; }); \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicExch, value)
EMULATOR_ATOMIC(atomicMin, value < old ? value : old)
EMULATOR_ATOMIC(atomicMax, value > old ? value : old)
EMULATOR_ATOMIC(atomicOr, old | value)

// Bits

static inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
static inline int __clz(int x) {
  return x ? __builtin_clz((unsigned)x) : 32;
}
static inline int __ffs(int x) {
  return __builtin_ffs(x);
}

#define EMULATOR_BITS(name, to, from) \
  static inline to name(from x) {     \
    return emulator::bits_of<to>(x);  \
  }
EMULATOR_BITS(__float_as_int, int, float)
EMULATOR_BITS(__float_as_uint, unsigned, float)
EMULATOR_BITS(__int_as_float, float, int)
EMULATOR_BITS(__uint_as_float, float, unsigned)

// Arithmetic: the fast variants are exact here.

static inline float __fadd_rn(float x, float y) {
  return x + y;
}
static inline float __fsub_rn(float x, float y) {
  return x - y;
}
static inline float __fmul_rn(float x, float y) {
  return x * y;
}
static inline float __fmaf_rn(float x, float y, float z) {
  return fmaf(x, y, z);
}
static inline double __dadd_rn(double x, double y) {
  return x + y;
}
static inline double __dmul_rn(double x, double y) {
  return x * y;
}
static inline float __fdividef(float x, float y) {
  return x / y;
}
// A name that the C library has to itself.
#define __log2f(x) log2f(x)

#define EMULATOR_LESSER(type)              \
  static inline type min(type x, type y) { \
    return y < x ? y : x;                  \
  }                                        \
  static inline type max(type x, type y) { \
    return x < y ? y : x;                  \
  }
EMULATOR_LESSER(int)
EMULATOR_LESSER(unsigned)
EMULATOR_LESSER(long)
EMULATOR_LESSER(unsigned long)
EMULATOR_LESSER(long long)
EMULATOR_LESSER(unsigned long long)
static inline unsigned min(int x, unsigned y) {
  return min((unsigned)x, y);
}
static inline unsigned min(unsigned x, int y) {
  return min(x, (unsigned)y);
}
static inline unsigned max(int x, unsigned y) {
  return max((unsigned)x, y);
}
static inline unsigned max(unsigned x, int y) {
  return max(x, (unsigned)y);
}
static inline float min(float x, float y) {
  return fminf(x, y);
}
static inline float max(float x, float y) {
  return fmaxf(x, y);
}
static inline double min(double x, double y) {
  return fmin(x, y);
}
static inline double max(double x, double y) {
  return fmax(x, y);
}
static inline double min(float x, double y) {
  return fmin(x, y);
}
static inline double min(double x, float y) {
  return fmin(x, y);
}
static inline double max(float x, double y) {
  return fmax(x, y);
}
static inline double max(double x, float y) {
  return fmax(x, y);
}

#endif
