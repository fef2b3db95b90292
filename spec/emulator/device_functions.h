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
  b->vote_and &= predicate != 0;
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
static inline int __syncthreads_and(int predicate) {
  emulator::count_block(predicate);
  return emulator::current()->home->vote_results[1];
}
static inline int __syncthreads_or(int predicate) {
  emulator::count_block(predicate);
  return emulator::current()->home->vote_results[2];
}
static inline void __syncwarp(unsigned mask = ~0u) {
  emulator::gather("__syncwarp", mask, NULL, NULL);
}
static inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
static inline void __nanosleep(unsigned) {
  emulator::pause();
}
[[noreturn]] static inline void __trap() {
  emulator::fail("__trap()");
}
static inline void __assume(bool) {}
#define __builtin_assume(x) ((void)0)

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
static inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return (unsigned)emulator::vote("__reduce_add_sync", mask, value, EMULATOR_JOINED((unsigned)x + (unsigned)y));
}
static inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return (unsigned)emulator::vote("__reduce_min_sync", mask, value, EMULATOR_JOINED(x < y ? x : y));
}
static inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return (unsigned)emulator::vote("__reduce_max_sync", mask, value, EMULATOR_JOINED(x > y ? x : y));
}
static inline int __reduce_add_sync(unsigned mask, int value) {
  return (int)__reduce_add_sync(mask, (unsigned)value);
}
static inline int __reduce_min_sync(unsigned mask, int value) {
  return (int)emulator::vote("__reduce_min_sync", mask, (unsigned)value, EMULATOR_JOINED((int)x < (int)y ? x : y));
}
static inline int __reduce_max_sync(unsigned mask, int value) {
  return (int)emulator::vote("__reduce_max_sync", mask, (unsigned)value, EMULATOR_JOINED((int)x > (int)y ? x : y));
}
static inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return (unsigned)emulator::vote("__reduce_and_sync", mask, value, EMULATOR_JOINED(x & y));
}
static inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return (unsigned)emulator::vote("__reduce_or_sync", mask, value, EMULATOR_JOINED(x | y));
}
static inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return (unsigned)emulator::vote("__reduce_xor_sync", mask, value, EMULATOR_JOINED(x ^ y));
}

template <class T>
static inline unsigned __match_any_sync(unsigned mask, T value) {
  emulator::voted mine = {0, 0};
  memcpy(&mine.value, &value, sizeof value);
  emulator::gather("__match_any_sync", mask, &mine, [](void *const operand[32], uint32_t lanes) {
    for (int i = 0; i < 32; i++) {
      if (!(lanes >> i & 1)) continue;
      emulator::voted *a = (emulator::voted *)operand[i];
      a->result = 0;
      for (int j = 0; j < 32; j++) {
        if ((lanes >> j & 1) && ((emulator::voted *)operand[j])->value == a->value) a->result |= 1u << j;
      }
    }
  });
  return (unsigned)mine.result;
}

// Memory

#define EMULATOR_LOAD(name)          \
  template <class T>                 \
  static inline T name(const T *p) { \
    return *p;                       \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
#define EMULATOR_STORE(name)               \
  template <class T>                       \
  static inline void name(T *p, T value) { \
    *p = value;                            \
  }
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stwt)

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
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicExch, value)
EMULATOR_ATOMIC(atomicMin, value < old ? value : old)
EMULATOR_ATOMIC(atomicMax, value > old ? value : old)
EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
EMULATOR_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
EMULATOR_ATOMIC(atomicAnd, old &value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)

template <class T>
static inline T atomicCAS(T *p, typename emulator::same<T>::type compare, typename emulator::same<T>::type value) {
  const T old = emulator::atomically(p, [=](T x) { return x == compare ? value : x; });
  if (old != compare) emulator::pause();  // it may be a lock
  return old;
}

// Bits

static inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
static inline int __popcll(unsigned long long x) {
  return __builtin_popcountll(x);
}
static inline int __clz(int x) {
  return x ? __builtin_clz((unsigned)x) : 32;
}
static inline int __clzll(long long x) {
  return x ? __builtin_clzll((unsigned long long)x) : 64;
}
static inline int __ffs(int x) {
  return __builtin_ffs(x);
}
static inline int __ffsll(long long x) {
  return __builtin_ffsll(x);
}
static inline unsigned long long __brevll(unsigned long long x) {
  unsigned long long y = 0;
  for (int i = 0; i < 64; i++) y |= (x >> i & 1) << (63 - i);
  return y;
}
static inline unsigned __brev(unsigned x) {
  return (unsigned)(__brevll(x) >> 32);
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = (uint64_t)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned byte = (unsigned)(both >> (selector >> 4 * i & 7) * 8) & 0xff;
    result |= (selector >> 4 * i & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return result;
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) << (shift & 31) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
static inline unsigned __umulhi(unsigned x, unsigned y) {
  return (unsigned)((uint64_t)x * y >> 32);
}
static inline int __mulhi(int x, int y) {
  return (int)((int64_t)x * y >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return (unsigned long long)((unsigned __int128)x * y >> 64);
}
static inline long long __mul64hi(long long x, long long y) {
  return (long long)((__int128)x * y >> 64);
}

#define EMULATOR_BITS(name, to, from) \
  static inline to name(from x) {     \
    return emulator::bits_of<to>(x);  \
  }
EMULATOR_BITS(__float_as_int, int, float)
EMULATOR_BITS(__float_as_uint, unsigned, float)
EMULATOR_BITS(__int_as_float, float, int)
EMULATOR_BITS(__uint_as_float, float, unsigned)
EMULATOR_BITS(__double_as_longlong, long long, double)
EMULATOR_BITS(__longlong_as_double, double, long long)
static inline int __double2hiint(double x) {
  return (int)(__double_as_longlong(x) >> 32);
}
static inline int __double2loint(double x) {
  return (int)__double_as_longlong(x);
}
static inline double __hiloint2double(int high, int low) {
  return __longlong_as_double((long long)((uint64_t)(unsigned)high << 32 | (unsigned)low));
}

// Conversions saturate, and NaN becomes 0.

namespace emulator {

template <class To, class From>
static inline To to_integer(From x, To low, To high) {
  if (x != x) return 0;
  if (x <= (From)low) return low;
  return x >= (From)high ? high : (To)x;
}

}  // namespace emulator

static inline int __float2int_rn(float x) {
  return emulator::to_integer(rint((double)x), INT32_MIN, INT32_MAX);
}
static inline int __float2int_rz(float x) {
  return emulator::to_integer(trunc((double)x), INT32_MIN, INT32_MAX);
}
static inline int __float2int_rd(float x) {
  return emulator::to_integer(floor((double)x), INT32_MIN, INT32_MAX);
}
static inline int __float2int_ru(float x) {
  return emulator::to_integer(ceil((double)x), INT32_MIN, INT32_MAX);
}
static inline unsigned __float2uint_rn(float x) {
  return emulator::to_integer(rint((double)x), 0u, UINT32_MAX);
}
static inline unsigned __float2uint_rz(float x) {
  return emulator::to_integer(trunc((double)x), 0u, UINT32_MAX);
}
static inline int __double2int_rn(double x) {
  return emulator::to_integer(rint(x), INT32_MIN, INT32_MAX);
}
static inline int __double2int_rz(double x) {
  return emulator::to_integer(trunc(x), INT32_MIN, INT32_MAX);
}
static inline long long __double2ll_rn(double x) {
  return emulator::to_integer<long long>(rint(x), INT64_MIN, INT64_MAX);
}
static inline long long __double2ll_rz(double x) {
  return emulator::to_integer<long long>(trunc(x), INT64_MIN, INT64_MAX);
}
static inline long long __float2ll_rn(float x) {
  return __double2ll_rn(x);
}
static inline long long __float2ll_rz(float x) {
  return __double2ll_rz(x);
}
static inline float __int2float_rn(int x) {
  return (float)x;
}
static inline float __uint2float_rn(unsigned x) {
  return (float)x;
}
static inline float __ll2float_rn(long long x) {
  return (float)x;
}
static inline double __ll2double_rn(long long x) {
  return (double)x;
}
static inline double __int2double_rn(int x) {
  return x;
}
static inline float __double2float_rn(double x) {
  return (float)x;
}

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
static inline float __fdiv_rn(float x, float y) {
  return x / y;
}
static inline float __fsqrt_rn(float x) {
  return sqrtf(x);
}
static inline float __frcp_rn(float x) {
  return 1 / x;
}
static inline float __frsqrt_rn(float x) {
  return (float)(1 / sqrt((double)x));
}
static inline double __dadd_rn(double x, double y) {
  return x + y;
}
static inline double __dsub_rn(double x, double y) {
  return x - y;
}
static inline double __dmul_rn(double x, double y) {
  return x * y;
}
static inline double __fma_rn(double x, double y, double z) {
  return fma(x, y, z);
}
static inline double __ddiv_rn(double x, double y) {
  return x / y;
}
static inline double __dsqrt_rn(double x) {
  return sqrt(x);
}
static inline double __drcp_rn(double x) {
  return 1 / x;
}
static inline float __fdividef(float x, float y) {
  return x / y;
}
static inline float fdividef(float x, float y) {
  return x / y;
}
static inline float __saturatef(float x) {
  return x > 0 ? (x < 1 ? x : 1) : 0;
}
static inline float rsqrtf(float x) {
  return 1 / sqrtf(x);
}
static inline double rsqrt(double x) {
  return 1 / sqrt(x);
}
static inline float sinpif(float x) {
  return (float)sin(fmod((double)x, 2.0) * M_PI);
}
static inline float cospif(float x) {
  return (float)cos(fmod((double)x, 2.0) * M_PI);
}
static inline double sinpi(double x) {
  return sin(fmod(x, 2.0) * M_PI);
}
static inline double cospi(double x) {
  return cos(fmod(x, 2.0) * M_PI);
}
static inline void sincospi(double x, double *s, double *c) {
  *s = sinpi(x), *c = cospi(x);
}
static inline void sincospif(float x, float *s, float *c) {
  *s = sinpif(x), *c = cospif(x);
}
// The C library has some of these names to itself.
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __powf(x, y) powf(x, y)
#define __tanhf(x) tanhf(x)

static inline long long clock64() {
  return (long long)__builtin_ia32_rdtsc();
}

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
