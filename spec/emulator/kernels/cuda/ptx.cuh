// the emulated twin of ptx.cuh, which says what each function means
#ifndef SAFEATTN_KERNELS_CUDA_PTX_CUH
#define SAFEATTN_KERNELS_CUDA_PTX_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>

static inline void dependents_launch() {}
static inline void dependency_wait() {}

namespace emulator {

// The halves of a register as floats.
template <bool F16>
static inline void halves(uint32_t packed, double *low, double *high) {
  *low = F16 ? from_f16((uint16_t)packed) : from_bf16((uint16_t)packed);
  *high = F16 ? from_f16((uint16_t)(packed >> 16)) : from_bf16((uint16_t)(packed >> 16));
}

struct mma_operands {
  float *d;
  const uint32_t *a, *b;
};

// d[16][8] += a[16][K] b[K][8]; sums are kept in f64 until the end.
template <int K>
static inline void multiply(void *const operand[WARP], const double (&a)[16][K], const double (&b)[K][8]) {
  double sum[16][8];
  for (int lane = 0; lane < WARP; lane++) {
    const float *d = ((mma_operands *)operand[lane])->d;
    for (int i = 0; i < 4; i++) sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = d[i];
  }
  for (int i = 0; i < 16; i++) {
    for (int k = 0; k < K; k++) {
      for (int j = 0; j < 8; j++) sum[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < WARP; lane++) {
    float *d = ((mma_operands *)operand[lane])->d;
    for (int i = 0; i < 4; i++) d[i] = (float)sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

static inline void need_all(const char *what, uint32_t mask) {
  if (mask != ~0u) fail("%s without all lanes of the warp (%#x)", what, mask);
}

template <bool F16>
static void mma_halves(void *const operand[WARP], uint32_t mask) {
  need_all("mma", mask);
  double a[16][16], b[16][8];
  for (int lane = 0; lane < WARP; lane++) {
    const mma_operands *mine = (mma_operands *)operand[lane];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
      double *at = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
      halves<F16>(mine->a[i], at, at + 1);
    }
    for (int i = 0; i < 2; i++) halves<F16>(mine->b[i], &b[2 * t + 8 * i][g], &b[2 * t + 8 * i + 1][g]);
  }
  multiply(operand, a, b);
}

struct f64_operands {
  double *d;
  double a, b;
};

static void mma_f64s(void *const operand[WARP], uint32_t mask) {
  need_all("mma", mask);
  for (int lane = 0; lane < WARP; lane++) {
    f64_operands *mine = (f64_operands *)operand[lane];
    const int g = lane / 4, t = lane % 4;
    for (int k = 0; k < 4; k++) {
      const double a = ((f64_operands *)operand[4 * g + k])->a;
      for (int c = 0; c < 2; c++) mine->d[c] = fma(a, ((f64_operands *)operand[4 * (2 * t + c) + k])->b, mine->d[c]);
    }
  }
}

struct matrix_load {
  uint32_t *r;
  const unsigned char *row;
};

template <bool TRANSPOSED>
static void load_matrices(void *const operand[WARP], uint32_t mask) {
  need_all("ldmatrix", mask);
  for (int lane = 0; lane < WARP; lane++) {
    uint32_t *r = ((matrix_load *)operand[lane])->r;
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; m++) {
      if (TRANSPOSED) {
        uint16_t low, high;
        memcpy(&low, ((matrix_load *)operand[8 * m + 2 * t])->row + 2 * g, 2);
        memcpy(&high, ((matrix_load *)operand[8 * m + 2 * t + 1])->row + 2 * g, 2);
        r[m] = (uint32_t)high << 16 | low;
      } else {
        memcpy(&r[m], ((matrix_load *)operand[8 * m + g])->row + 4 * t, 4);
      }
    }
  }
}

static inline const unsigned char *matrix_row(uint32_t address) {
  if (address % 16) fail("ldmatrix at %#x, which is not a multiple of 16", address);
  return shared_pointer(address, 16);
}

}  // namespace emulator

static inline uint32_t shared_address(const void *p) {
  return emulator::shared_address(p);
}
static inline void *shared_pointer(uint32_t address) {
  return emulator::shared_pointer(address, 1);
}

static inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma_operands mine = {d, a, b};
  emulator::gather("mma_bf16", ~0u, &mine, emulator::mma_halves<false>);
}

static inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::mma_operands mine = {d, a, b};
  emulator::gather("mma_f16", ~0u, &mine, emulator::mma_halves<true>);
}

static inline void mma_f64(double (&d)[2], double a, double b) {
  emulator::f64_operands mine = {d, a, b};
  emulator::gather("mma_f64", ~0u, &mine, emulator::mma_f64s);
}

static inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  emulator::matrix_load mine = {r, emulator::matrix_row(address)};
  emulator::gather("load_matrices", ~0u, &mine, emulator::load_matrices<false>);
}

static inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  emulator::matrix_load mine = {r, emulator::matrix_row(address)};
  emulator::gather("load_matrices_transposed", ~0u, &mine, emulator::load_matrices<true>);
}

static inline void copy_async(uint32_t to, const void *from, bool none = false) {
  if (to % 16 || (!none && (uintptr_t)from % 16))
    emulator::fail("copy_async from %p to %#x: both ends are multiples of 16", from, to);
  const emulator::small_copy copy = {emulator::shared_pointer(to, 16), (const unsigned char *)from, none ? 0 : 16};
  if (emulator::late()) {
    emulator::current()->copies.add(copy);
  } else {
    emulator::do_copy(copy);
  }
}

static inline void copy_async_commit() {
  emulator::current()->copies.commit();
}

template <int PENDING>
static inline void copy_async_wait() {
  emulator::current()->copies.finish(PENDING, emulator::do_copy);
}

// Who reads with this may wait for another thread.
static inline int load_acquire(const int *p) {
  emulator::pause();
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
static inline void store_relaxed(int *p, int value) {
  __atomic_store_n(p, value, __ATOMIC_RELAXED);
}
static inline void store_release(int *p, int value) {
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
}
static inline uint4 *opaque(uint4 *p) {
  return p;
}
template <class Int>
static inline Int hidden(Int x) {
  return x;
}
static inline uint4 load_relaxed_4(const uint4 *p) {
  emulator::pause();
  const uint32_t *word = (const uint32_t *)p;
  return {__atomic_load_n(word, __ATOMIC_RELAXED), __atomic_load_n(word + 1, __ATOMIC_RELAXED),
          __atomic_load_n(word + 2, __ATOMIC_RELAXED), __atomic_load_n(word + 3, __ATOMIC_RELAXED)};
}
static inline void store_relaxed_4(uint4 *p, uint4 x) {
  uint32_t *word = (uint32_t *)p;
  __atomic_store_n(word, x.x, __ATOMIC_RELAXED);
  __atomic_store_n(word + 1, x.y, __ATOMIC_RELAXED);
  __atomic_store_n(word + 2, x.z, __ATOMIC_RELAXED);
  __atomic_store_n(word + 3, x.w, __ATOMIC_RELAXED);
}

static inline float exp2_fast(float x) {
  const float y = exp2f(fabsf(x) < 0x1p-126f ? 0 : x);
  return fabsf(y) < 0x1p-126f ? 0 : y;
}

static inline float reciprocal_fast(float x) {
  const float y = 1 / (fabsf(x) < 0x1p-126f ? copysignf(0, x) : x);
  return fabsf(y) < 0x1p-126f ? copysignf(0, y) : y;
}

static inline void replace_unless(float &x, uint32_t bits, int bit, float factor, float a, float term) {
  if (!(bits >> bit & 1)) x = fmaf(factor, a, term);
}

#endif
