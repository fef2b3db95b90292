// the emulated twin of ptx_hopper.cuh, which says what each function means
#ifndef SAFEATTN_KERNELS_CUDA_PTX_HOPPER_CUH
#define SAFEATTN_KERNELS_CUDA_PTX_HOPPER_CUH
#include <cuda.h>

#include <type_traits>

#include "hopper.h"
#include "kernels/cuda/ptx.cuh"

// Mbarriers, named barriers

static inline void mbarrier_init(uint32_t barrier, int count) {
  emulator::mbarrier_init(barrier, count);
}
static inline void mbarrier_init_fence() {}
static inline void mbarrier_arrive(uint32_t barrier) {
  emulator::mbarrier_arrive(barrier, 0);
}
static inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  emulator::mbarrier_arrive(barrier, bytes);
}
static inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  emulator::mbarrier_wait(barrier, parity);
}
static inline void named_barrier_sync(int id, int threads) {
  emulator::named_barrier(id, threads, true);
}
static inline void named_barrier_meet(int id, int threads) {
  emulator::named_barrier(id, threads, true);
}
static inline void named_barrier_arrive(int id, int threads) {
  emulator::named_barrier(id, threads, false);
}

template <int COUNT>
static inline void registers_give_back() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "a multiple of 8 from 24 to 256");
}
template <int COUNT>
static inline void registers_take() {
  registers_give_back<COUNT>();
}

// Shared memory by address

static constexpr inline uint32_t dynamic_shared_address(const void *start) {
  return 1024;
}

namespace emulator {

template <class T>
static inline T &shared_value(uint32_t address) {
  if (address % sizeof(T)) fail("%zu bytes at %#x of shared memory: not aligned", sizeof(T), address);
  return *(T *)shared_pointer(address, sizeof(T));
}

}  // namespace emulator

static inline uint32_t shared_load(uint32_t from) {
  return emulator::shared_value<uint32_t>(from);
}
static inline float2 shared_load_2(uint32_t from) {
  return emulator::shared_value<float2>(from);
}
static inline float4 shared_load_4(uint32_t from) {
  return emulator::shared_value<float4>(from);
}
static inline int4 shared_load_4i(uint32_t from) {
  return emulator::shared_value<int4>(from);
}
static inline void shared_store(uint32_t to, uint32_t value) {
  emulator::shared_value<uint32_t>(to) = value;
}
static inline void shared_store_4(uint32_t to, float x, float y, float z, float w) {
  emulator::shared_value<float4>(to) = make_float4(x, y, z, w);
}
static inline void shared_store_4i(uint32_t to, int x, int y, int z, int w) {
  emulator::shared_value<int4>(to) = make_int4(x, y, z, w);
}

static inline void async_proxy_fence() {}
static inline void async_proxy_fence_global() {}

// TMA and bulk copies

static inline uint64_t cache_policy_first_out() {
  return 1;
}
static inline uint64_t cache_policy_last_out() {
  return 2;
}

// What is read all the same is NaN.
static inline void cache_discard(void *line) {
  if ((uintptr_t)line % 128) emulator::fail("cache_discard of %p: not aligned to 128", line);
  for (int i = 0; i < 64; i++) ((uint16_t *)line)[i] = 0x7fff;
}
static inline void tma_prefetch(const CUtensorMap *) {}
static inline void tma_load(uint32_t to, const CUtensorMap *map, int column, int row, int head, int batch,
                            uint32_t barrier) {
  const int at[4] = {column, row, head, batch};
  emulator::tma_load(to, map, at, barrier);
}
static inline void tma_load(uint32_t to, const CUtensorMap *map, int column, int row, int head, int batch,
                            uint32_t barrier, uint64_t policy) {
  if (policy != 1 && policy != 2) emulator::fail("tma_load with a cache policy that was not made");
  tma_load(to, map, column, row, head, batch, barrier);
}
static inline void tma_store(const CUtensorMap *map, int column, int row, int head, int batch, uint32_t from) {
  const int at[4] = {column, row, head, batch};
  emulator::tma_store(map, at, from);
}
static inline void bulk_load(uint32_t to, const void *from, int bytes, uint32_t barrier) {
  emulator::bulk_load(to, from, bytes, barrier);
}
static inline void bulk_store(void *to, uint32_t from, int bytes) {
  emulator::bulk_store(to, from, bytes);
}
static inline void bulk_add(float *to, uint32_t from, int bytes) {
  emulator::bulk_add(to, from, bytes);
}
static inline void bulk_commit() {
  emulator::current()->stores.commit();
}
template <int PENDING>
static inline void bulk_wait_read() {
  emulator::bulk_wait(PENDING);
}
template <int PENDING>
static inline void bulk_wait() {
  emulator::bulk_wait(PENDING);
}

// Halves, matrices, memory of the device

template <class T>
static inline uint32_t pack_halves(float low, float high) {
  if (std::is_same<T, __half>::value) return (uint32_t)emulator::to_f16(high) << 16 | emulator::to_f16(low);
  return (uint32_t)emulator::to_bf16(high) << 16 | emulator::to_bf16(low);
}

template <class T>
static inline uint32_t note_nonfinite(uint32_t seen, uint32_t pair) {
  constexpr bool f16 = std::is_same<T, __half>::value;
  double x, y, seen_x, seen_y;
  emulator::halves<f16>(pair, &x, &y);
  emulator::halves<f16>(seen, &seen_x, &seen_y);
  return pack_halves<T>((float)(x * 0 + seen_x), (float)(y * 0 + seen_y));
}

static inline void store_matrices(uint32_t to, const uint32_t *r) {
  emulator::store_matrices(to, r);
}

// wgmma

static inline uint32_t wgmma_operand(uint32_t address, uint32_t panel) {
  return address >> 4 | panel >> 4 << 16;
}
static inline void wgmma_fence() {}
static inline void wgmma_commit() {
  emulator::current()->products.commit();
}
template <int PENDING>
static inline void wgmma_wait() {
  emulator::wgmma_wait(PENDING);
}

template <class T, int COUNT>
static inline void pin(T (&)[COUNT]) {}

template <class T, int TRANSPOSED_A, int TRANSPOSED_B, int COUNT>
static inline void wgmma_first(float (&d)[COUNT], uint32_t a, uint32_t b) {
  emulator::wgmma({d, 2 * COUNT, std::is_same<T, __half>::value, false, false, TRANSPOSED_A, TRANSPOSED_B, a, b, {}});
}

template <class T, int TRANSPOSED_A, int TRANSPOSED_B, int COUNT>
static inline void wgmma(float (&d)[COUNT], uint32_t a, uint32_t b) {
  emulator::wgmma({d, 2 * COUNT, std::is_same<T, __half>::value, true, false, TRANSPOSED_A, TRANSPOSED_B, a, b, {}});
}

template <class T, int TRANSPOSED_B, int COUNT>
static inline void wgmma_rows(float (&d)[COUNT], const uint32_t *a, uint32_t b, int accumulate = 1) {
  emulator::wgmma({d,
                   2 * COUNT,
                   std::is_same<T, __half>::value,
                   accumulate != 0,
                   true,
                   false,
                   TRANSPOSED_B,
                   0,
                   b,
                   {a[0], a[1], a[2], a[3]}});
}

#endif
