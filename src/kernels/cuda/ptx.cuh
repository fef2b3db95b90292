// instructions of sm_80 and newer that C++ has no words for: matrix products and loads, copies, ordered words, ex2, rcp
#ifndef SAFEATTN_KERNELS_CUDA_PTX_CUH
#define SAFEATTN_KERNELS_CUDA_PTX_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

// Shared memory is addressed by 32 bits, as matrix loads, descriptors and mbarriers want it.
static __device__ __forceinline__ uint32_t shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
static __device__ __forceinline__ void *shared_pointer(uint32_t address) {
  return __cvta_shared_to_generic(address);
}

// After this, the next kernel of the stream may start where it was launched early; from sm_90 on, before that nothing.
static __device__ __forceinline__ void dependents_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before this one in the stream has ended and its writes are seen; before sm_90 it has.
static __device__ __forceinline__ void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Matrix products of a warp, d += a b. With g = lane / 4 and t = lane % 4 a lane holds
//
//   d (16 x 8):  d[0], d[1] = (g, 2t), (g, 2t + 1);  d[2], d[3] = (g + 8, 2t), (g + 8, 2t + 1)
//   16-bit:  a (16 x 16) = (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..);  b (16 x 8) = (2t.., g), (2t +
//            8.., g), two elements a register, the lower k in the lower half
//   f64:     d (8 x 8) = (g, 2t), (g, 2t + 1);  a (8 x 4) = (g, t);  b (4 x 8) = (t, g)

static __device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static __device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static __device__ __forceinline__ void mma_f64(double (&d)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(d[0]), "+d"(d[1])
      : "d"(a), "d"(b));
}

// Four matrices of 8 rows of 16 bytes; the address of row r of matrix m comes from lane 8 m + r. Register m of a lane
// is the 4 bytes t = lane % 4 of row lane / 4 of matrix m; transposed, the 16-bit elements (2t, g) and (2t + 1, g).

static __device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

static __device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// A copy of 16 bytes to shared memory that goes on while the thread computes, both ends aligned to 16; `none`: zeros,
// and nothing is read.
static __device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool none = false) {
  asm volatile(
      "{\n.reg .pred none;\nsetp.ne.b32 none, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, none;\n}" ::"r"(to),
      "l"(from), "r"((int)none)
      : "memory");
}

// The thread's copies since the last commit become a group.
static __device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Returns once all of the thread's groups but the last PENDING have arrived; others see them after a barrier.
template <int PENDING>
static __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Words that blocks wait for. What came before a release is seen by who acquires what it stored.

static __device__ __forceinline__ int load_acquire(const int *p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

static __device__ __forceinline__ void store_relaxed(int *p, int value) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

static __device__ __forceinline__ void store_release(int *p, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// The same pointer, of which the compiler knows nothing more: addresses that are made of it are made where they are
// used, instead of being kept in registers through a loop.
static __device__ __forceinline__ uint4 *opaque(uint4 *p) {
  asm volatile("" : "+l"(p));
  return p;
}

// Hides where a value comes from: what follows from it is found anew where it is used, in a few instructions, instead
// of being kept in registers or in memory from the last use on.
template <class Int>
static __device__ __forceinline__ Int hidden(Int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Four words, each of which arrives for itself; aligned to 16 bytes.

static __device__ __forceinline__ uint4 load_relaxed_4(const uint4 *p) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p)
               : "memory");
  return x;
}

static __device__ __forceinline__ void store_relaxed_4(uint4 *p, uint4 x) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// 2^x to 2 ulp; results below the smallest normal number are 0.
static __device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 ulp; results below the smallest normal number are 0.
static __device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x = factor * a + term where the bit is 0: by a predicate, on the pipe of multiply-adds, of whose instructions a
// scheduler issues twice as many as of selects. Another `term` for each x of a group, or ptxas makes one value of all
// and selects it.
static __device__ __forceinline__ void replace_unless(float &x, uint32_t bits, int bit, float factor, float a,
                                                      float term) {
  asm("{\n.reg .pred kept;\n.reg .b32 one;\n"
      "and.b32 one, %1, %2;\n"
      "setp.ne.u32 kept, one, 0;\n"
      "@!kept fma.rn.f32 %0, %3, %4, %5;\n}"
      : "+f"(x)
      : "r"(bits), "r"(1u << bit), "f"(factor), "f"(a), "f"(term));
}

#endif
