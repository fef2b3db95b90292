// instructions of sm_90a that C++ has no words for: mbarriers, TMA, bulk copies, named barriers, wgmma, stmatrix
#ifndef SAFEATTN_KERNELS_CUDA_PTX_HOPPER_CUH
#define SAFEATTN_KERNELS_CUDA_PTX_HOPPER_CUH
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "kernels/cuda/ptx.cuh"

// Mbarriers, eight bytes each. A phase ends when `count` threads have arrived and the expected bytes are there; phases
// are told apart by parity: the first has 0.

static __device__ __forceinline__ void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes the initial mbarriers known to TMA; by the thread that wrote them, before the block's next barrier.
static __device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for `bytes` more bytes of copies.
static __device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Returns once the phase of that parity has ended: with parity 1 at once on a fresh mbarrier.
static __device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra end%=;\nbra again%=;\n"
      "end%=:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Named barriers 1 .. 15 (0 is __syncthreads) among `threads` threads, those that only arrive included.

static __device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same for warps that come from places of their own in the code, which compute-sanitizer calls divergent at
// bar.sync.
static __device__ __forceinline__ void named_barrier_meet(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

static __device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The registers a thread of this warpgroup may use from now on: a multiple of 8. All 128 threads call it.

template <int COUNT>
static __device__ __forceinline__ void registers_give_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
static __device__ __forceinline__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Where dynamic shared memory starts in a kernel that has no other: a constant, so that addresses are immediates. The
// kernel compares it with shared_address(start) once.
static constexpr __device__ __forceinline__ uint32_t dynamic_shared_address(const void *start) {
  return 1024;
}

// Shared memory by address.

static __device__ __forceinline__ uint32_t shared_load(uint32_t from) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(from));
  return value;
}

static __device__ __forceinline__ float2 shared_load_2(uint32_t from) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(from));
  return value;
}

static __device__ __forceinline__ float4 shared_load_4(uint32_t from) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(from));
  return value;
}

static __device__ __forceinline__ int4 shared_load_4i(uint32_t from) {
  int4 value;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(from));
  return value;
}

static __device__ __forceinline__ void shared_store(uint32_t to, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

static __device__ __forceinline__ void shared_store_4(uint32_t to, float x, float y, float z, float w) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

static __device__ __forceinline__ void shared_store_4i(uint32_t to, int x, int y, int z, int w) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

// What the threads of a block wrote into shared memory is seen by TMA, bulk copies and wgmma after this fence (by the
// writers) and a barrier.
static __device__ __forceinline__ void async_proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders the thread's ordinary accesses of global memory with its bulk copies there.
static __device__ __forceinline__ void async_proxy_fence_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// How long the second-level cache should keep what a copy reads.
static __device__ __forceinline__ uint64_t cache_policy_first_out() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

static __device__ __forceinline__ uint64_t cache_policy_last_out() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// The line of 128 bytes at `line` will not be read before it is written: the second-level cache may forget it.
static __device__ __forceinline__ void cache_discard(void *line) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(line) : "memory");
}

// Calls for a map that TMA will read soon.
static __device__ __forceinline__ void tma_prefetch(const CUtensorMap *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// TMA: the box of `map` whose first element is (column, row, head, batch) to shared memory at `to`, swizzled as the map
// says (tensor_map.cuh), zeros where the box leaves the tensor. Its whole size counts as bytes arrived at `barrier`.
// One thread calls it.
static __device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap *map, int column, int row, int head,
                                                int batch, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier), "l"(policy)
      : "memory");
}

static __device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap *map, int column, int row, int head,
                                                int batch, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// The same the other way, as part of the thread's bulk group; what leaves the tensor is not written.
static __device__ __forceinline__ void tma_store(const CUtensorMap *map, int column, int row, int head, int batch,
                                                 uint32_t from) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(map),
               "r"(column), "r"(row), "r"(head), "r"(batch), "r"(from)
               : "memory");
}

// Bulk copies of `bytes` neighbouring bytes, a multiple of 16, both ends aligned to 16. One thread calls them.

static __device__ __forceinline__ void bulk_load(uint32_t to, const void *from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

static __device__ __forceinline__ void bulk_store(void *to, uint32_t from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}

// Adds to the floats at `to`, in any order. Numbers below the smallest normal one stay what they are.
static __device__ __forceinline__ void bulk_add(float *to, uint32_t from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}

// Closes the thread's bulk group of stores.
static __device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Returns once all but the thread's newest PENDING bulk groups have read their source.
template <int PENDING>
static __device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Returns once all but the thread's newest PENDING bulk groups are written.
template <int PENDING>
static __device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Two floats rounded to halves, the first in the low bits.
template <class T>
static __device__ __forceinline__ uint32_t pack_halves(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same<T, __half>::value) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// pair * 0 + seen: once a half of a pair is not finite, its half of `seen` is NaN for good; before, it is 0.
template <class T>
static __device__ __forceinline__ uint32_t note_nonfinite(uint32_t seen, uint32_t pair) {
  if constexpr (std::is_same<T, __half>::value) {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(seen) : "r"(pair), "r"(0));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(seen) : "r"(pair), "r"(0));
  }
  return seen;
}

// Four 8x8 matrices of halves into shared memory. Matrix i is in registers r[i] as mma.sync lays out accumulators (lane
// l has row l / 4, columns 2 (l % 4) and the next); the address of its row l % 8 is lane 8 i + l % 8's `to`, 16 bytes.
static __device__ __forceinline__ void store_matrices(uint32_t to, const uint32_t *r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// wgmma. Four warps multiply together: D[64][N] += A[64][16] B[16][N], halves with f32 accumulators. Thread t of the
// warpgroup has of D, in d[4 j + 2 r + c], row t / 32 * 16 + t % 32 / 4 + 8 r and column 8 j + 2 (t % 4) + c; of A in
// registers, packed in pairs of columns, a[2 h + r]: the same row and columns 8 h + 2 (t % 4) and the next.
//
// In shared memory an operand is made of panels of 64 columns (128 bytes), the rows of a panel 128 bytes apart, panels
// aligned to 1024 bytes, the 16-byte pieces of row r exchanged by the 128-byte swizzle: piece x is at x ^ r % 8. It is
// given by the low word of its descriptor, wgmma_operand(address, panel), to which steps are added in units of 16
// bytes:
//
//   K-major   A as [M][K] or B as [N][K]. A step of 16 along K is 32 bytes inside a panel; `panel` is not used, and
//             the next panel begins where the caller says.
//   MN-major  (TRANSPOSED) A as [K][M] or B as [K][N]. A step of 16 along K is 2048 bytes; `panel` is the distance in
//             bytes from one panel of 64 columns to the next.

static __device__ __forceinline__ uint32_t wgmma_operand(uint32_t address, uint32_t panel) {
  return address >> 4 | panel >> 4 << 16;
}

// Before the first product of a batch and after any other use of its registers.
static __device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static __device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Returns once all but the newest PENDING committed batches are done.
template <int PENDING>
static __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Pins registers to this point of the program: what uses them stays on its side.
template <class T, int COUNT>
static __device__ __forceinline__ void pin(T (&r)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    if constexpr (std::is_same<T, float>::value) {
      asm volatile("" : "+f"(r[i])::"memory");
    } else {
      asm volatile("" : "+r"(r[i])::"memory");
    }
  }
}

// wgmma_first overwrites d, wgmma adds to it; A and B in shared memory, each TRANSPOSED when MN-major. wgmma_rows: A in
// registers, d overwritten where `accumulate` is 0. T is __nv_bfloat16 or __half, N is twice the count of d.
//
// The asm wants its operands one by one, so the lists are spelled by macros; the high word of every descriptor
// (128-byte swizzle, 1024 bytes between groups of 8 rows) is the constant 1073741888.
#define SA_WGMMA_4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define SA_WGMMA_16(c, d, i) \
  SA_WGMMA_4(c, d, i), SA_WGMMA_4(c, d, i + 4), SA_WGMMA_4(c, d, i + 8), SA_WGMMA_4(c, d, i + 12)
#define SA_WGMMA_OPERANDS_32(c, d) SA_WGMMA_16(c, d, 0), SA_WGMMA_16(c, d, 16)
#define SA_WGMMA_OPERANDS_48(c, d) SA_WGMMA_OPERANDS_32(c, d), SA_WGMMA_16(c, d, 32)
#define SA_WGMMA_OPERANDS_64(c, d) SA_WGMMA_OPERANDS_48(c, d), SA_WGMMA_16(c, d, 48)
#define SA_WGMMA_OPERANDS_96(c, d) SA_WGMMA_OPERANDS_64(c, d), SA_WGMMA_16(c, d, 64), SA_WGMMA_16(c, d, 80)
#define SA_WGMMA_OPERANDS_128(c, d) SA_WGMMA_OPERANDS_96(c, d), SA_WGMMA_16(c, d, 96), SA_WGMMA_16(c, d, 112)
#define SA_WGMMA_READ_WRITTEN(x) "+f"(x)
#define SA_WGMMA_WRITTEN(x) "=f"(x)
#define SA_WGMMA_LIST_32                                  \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SA_WGMMA_LIST_48 \
  SA_WGMMA_LIST_32       \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define SA_WGMMA_LIST_64 \
  SA_WGMMA_LIST_48       \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SA_WGMMA_LIST_96                                             \
  SA_WGMMA_LIST_64                                                   \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define SA_WGMMA_LIST_128                                                        \
  SA_WGMMA_LIST_96                                                               \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

#define SA_WGMMA_DESCRIPTORS_2(a, b) \
  "{\n.reg .b64 a, b;\nmov.b64 a, {" a ", 1073741888};\nmov.b64 b, {" b ", 1073741888};\n"
#define SA_WGMMA_DESCRIPTOR_1(b) "{\n.reg .b64 b;\nmov.b64 b, {" b ", 1073741888};\n"

// n columns, count = n / 2 accumulators, and the numbers of the operands after them.
#define SA_WGMMA(n, count, i0, i1, i2, i3, i4, i5, i6)                                                                 \
  template <class T, int TRANSPOSED_A, int TRANSPOSED_B>                                                               \
  static __device__ __forceinline__ void wgmma_first(float(&d)[count], uint32_t a, uint32_t b) {                       \
    SA_WGMMA_BOTH(n, SA_WGMMA_DESCRIPTORS_2(i0, i1) ".reg .pred p;\nsetp.ne.b32 p, 0, 0;\n",                           \
                  " {" SA_WGMMA_LIST_##count "}, a, b, p, 1, 1, " i2 ", " i3 ";\n}"                                    \
                  : SA_WGMMA_OPERANDS_##count(SA_WGMMA_WRITTEN, d)                                                     \
                  : "r"(a), "r"(b), "n"(TRANSPOSED_A), "n"(TRANSPOSED_B));                                             \
  }                                                                                                                    \
  template <class T, int TRANSPOSED_A, int TRANSPOSED_B>                                                               \
  static __device__ __forceinline__ void wgmma(float(&d)[count], uint32_t a, uint32_t b) {                             \
    SA_WGMMA_BOTH(n, SA_WGMMA_DESCRIPTORS_2(i0, i1), " {" SA_WGMMA_LIST_##count "}, a, b, 1, 1, 1, " i2 ", " i3 ";\n}" \
                  : SA_WGMMA_OPERANDS_##count(SA_WGMMA_READ_WRITTEN, d)                                                \
                  : "r"(a), "r"(b), "n"(TRANSPOSED_A), "n"(TRANSPOSED_B));                                             \
  }                                                                                                                    \
  template <class T, int TRANSPOSED_B>                                                                                 \
  static __device__ __forceinline__ void wgmma_rows(float(&d)[count], const uint32_t *a, uint32_t b,                   \
                                                    int accumulate = 1) {                                              \
    SA_WGMMA_BOTH(n, SA_WGMMA_DESCRIPTOR_1(i4) ".reg .pred p;\nsetp.ne.b32 p, " i6 ", 0;\n",                           \
                  " {" SA_WGMMA_LIST_##count "}, {" i0 "," i1 "," i2 "," i3 "}, b, p, 1, 1, " i5 ";\n}"                \
                  : SA_WGMMA_OPERANDS_##count(SA_WGMMA_READ_WRITTEN, d)                                                \
                  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(TRANSPOSED_B), "r"(accumulate));           \
  }

#define SA_WGMMA_BOTH(n, before, ...)                                                            \
  if constexpr (std::is_same<T, __half>::value) {                                                \
    asm volatile(before "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16" __VA_ARGS__);   \
  } else {                                                                                       \
    asm volatile(before "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16" __VA_ARGS__); \
  }

SA_WGMMA(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
SA_WGMMA(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
SA_WGMMA(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
SA_WGMMA(192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
SA_WGMMA(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef SA_WGMMA
#undef SA_WGMMA_BOTH

#endif
