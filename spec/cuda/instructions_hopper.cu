// checks the functions of ptx_hopper.cuh against their definitions, on the emulator or (built by nvcc for sm_90a) a GPU
#include "kernels/cuda/ptx_hopper.cuh"
#include "kernels/cuda/tensor_map.cuh"

#include "check.h"

// wgmma: D[64][N] = A[64][64] B[64][N], with A and B loaded by TMA, in four steps along K

enum { DEPTH = 64, PANEL_BYTES = 64 * 128 };
enum operand_order { K_MAJOR = 0, MN_MAJOR = 1 };

template <class T>
static uint16_t half_bits(float x);
template <>
uint16_t half_bits<__nv_bfloat16>(float x) {
  return __bfloat16_as_ushort(__float2bfloat16(x));
}
template <>
uint16_t half_bits<__half>(float x) {
  return __half_as_ushort(__float2half(x));
}

template <class T, int N, int ORDER_A, int ORDER_B, bool ROWS>
__global__ void products(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                         float *d) {
  constexpr int b_panels = ORDER_B == MN_MAJOR ? (N + 63) / 64 : 1, b_rows = ORDER_B == MN_MAJOR ? 64 : N;
  unsigned char *memory = dynamic_shared<unsigned char>();
  __shared__ uint64_t full;
  const uint32_t a = shared_address(memory), b = a + PANEL_BYTES, barrier = shared_address(&full);
  const int thread = threadIdx.x, row = thread / 32 * 16 + thread % 32 / 4;
  if (thread == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (thread == 0) {
    mbarrier_arrive_expect(barrier, PANEL_BYTES + b_panels * b_rows * 128);
    tma_load(a, &map_a, 0, 0, 0, 0, barrier, cache_policy_first_out());
    for (int p = 0; p < b_panels; p++) tma_load(b + p * b_rows * 128, &map_b, p * 64, 0, 0, 0, barrier);
  }
  mbarrier_wait(barrier, 0);
  float sum[N / 2];
  for (int i = 0; i < N / 2; i++) sum[i] = 5;
  uint32_t registers[DEPTH / 16][4];
  if (ROWS) {
    for (int k = 0; k < DEPTH / 16; k++) {
      for (int i = 0; i < 4; i++) {
        const int r = row + i % 2 * 8, byte = (k * 16 + i / 2 * 8 + thread % 4 * 2) * 2;
        registers[k][i] = *(const uint32_t *)(memory + r * 128 + (byte ^ r % 8 * 16));
      }
    }
  }
  pin(sum);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < DEPTH / 16; k++) {
    const uint32_t x = wgmma_operand(a, PANEL_BYTES) + k * ((ORDER_A == MN_MAJOR ? 2048 : 32) >> 4);
    const uint32_t y = wgmma_operand(b, b_rows * 128) + k * ((ORDER_B == MN_MAJOR ? 2048 : 32) >> 4);
    if constexpr (ROWS) {
      wgmma_rows<T, ORDER_B>(sum, registers[k], y, k > 0);
    } else {
      if (k == 0) {
        wgmma_first<T, ORDER_A, ORDER_B>(sum, x, y);
      } else {
        wgmma<T, ORDER_A, ORDER_B>(sum, x, y);
      }
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  pin(sum);
  for (int i = 0; i < N / 2; i++) d[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + thread % 4 * 2 + i % 2] = sum[i];
}

template <class T, int N, int ORDER_A, int ORDER_B, bool ROWS>
static void check_product() {
  char name[64];
  snprintf(name, sizeof name, "wgmma %s n%d %d%d%s", sizeof(T) == 2 && std::is_same<T, __half>::value ? "f16" : "bf16",
           N, ORDER_A, ORDER_B, ROWS ? " rows" : "");
  both<uint16_t> a(64 * DEPTH), b(N * DEPTH);
  both<float> d(64 * N);
  for (int i = 0; i < 64 * DEPTH; i++) a.host[i] = half_bits<T>(small(i));
  for (int i = 0; i < N * DEPTH; i++) b.host[i] = half_bits<T>(small(3 * i + 1));
  a.send();
  b.send();
  CUtensorMap maps[2];
  const int64_t shape_a[4] = {1, 1, 64, 64};
  const int64_t shape_b[4] = {1, 1, ORDER_B == MN_MAJOR ? DEPTH : N, ORDER_B == MN_MAJOR ? N : DEPTH};
  sa_operand x = {a.device, std::is_same<T, __half>::value ? SA_F16 : SA_BF16, {64 * 64, 64 * 64, 64, 1}}, y = x;
  y.data = b.device;
  y.stride[0] = y.stride[1] = N * DEPTH;
  y.stride[2] = shape_b[3];
  failures += sa_cuda_tensor_map(name, &maps[0], &x, shape_a, 64) != 0;
  failures += sa_cuda_tensor_map(name, &maps[1], &y, shape_b, (int)shape_b[2]) != 0;
  sa_cuda_launch(name, products<T, N, ORDER_A, ORDER_B, ROWS>, dim3(1), dim3(128),
                 (size_t)PANEL_BYTES + (N + 63) / 64 * PANEL_BYTES, (cudaStream_t)0, maps[0], maps[1], d.device);
  d.fetch();
  for (int i = 0; i < 64 * N; i++) {
    const int m = i / N, n = i % N;
    double want = 0;
    for (int k = 0; k < DEPTH; k++)
      want += (double)small(ORDER_A == MN_MAJOR ? k * 64 + m : m * DEPTH + k) *
              small(3 * (ORDER_B == MN_MAJOR ? k * N + n : n * DEPTH + k) + 1);
    compare(name, i, d.host[i], want, 0);
  }
}

template <class T, int N>
static void check_products() {
  check_product<T, N, K_MAJOR, K_MAJOR, false>();
  check_product<T, N, K_MAJOR, MN_MAJOR, false>();
  check_product<T, N, MN_MAJOR, K_MAJOR, false>();
  check_product<T, N, MN_MAJOR, MN_MAJOR, false>();
  check_product<T, N, K_MAJOR, K_MAJOR, true>();
  check_product<T, N, K_MAJOR, MN_MAJOR, true>();
}

// TMA: boxes of [2][3][50][72] halves, loaded and stored again elsewhere; rows and columns that leave the tensor

__global__ void moves(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to,
                      uint16_t *seen) {
  unsigned char *memory = dynamic_shared<unsigned char>();
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    mbarrier_init(shared_address(&full), 1);
    mbarrier_init_fence();
    mbarrier_arrive_expect(shared_address(&full), PANEL_BYTES);
    tma_load(shared_address(memory), &from, 64, 32, 2, 1, shared_address(&full));
  }
  __syncthreads();
  mbarrier_wait(shared_address(&full), 0);
  for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
    const int row = i / 64, byte = i % 64 * 2;
    seen[i] = *(const uint16_t *)(memory + row * 128 + (byte ^ row % 8 * 16));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(&to, 64, 32, 2, 1, shared_address(memory));
    bulk_commit();
    bulk_wait<0>();
  }
}

static void check_moves() {
  const int64_t shape[4] = {2, 3, 50, 72};
  both<uint16_t> from(2 * 3 * 50 * 72), to(2 * 3 * 50 * 72), seen(64 * 64);
  for (int i = 0; i < from.count; i++) from.host[i] = (uint16_t)(i * 40503u >> 3), to.host[i] = 1;
  from.send();
  to.send();
  CUtensorMap maps[2];
  sa_operand x = {from.device, SA_BF16, {3 * 50 * 72, 50 * 72, 72, 1}}, y = x;
  y.data = to.device;
  failures += sa_cuda_tensor_map("tma", &maps[0], &x, shape, 64) != 0;
  failures += sa_cuda_tensor_map("tma", &maps[1], &y, shape, 64) != 0;
  sa_cuda_launch("tma", moves, dim3(1), dim3(64), (size_t)PANEL_BYTES, (cudaStream_t)0, maps[0], maps[1], seen.device);
  seen.fetch();
  to.fetch();
  for (int i = 0; i < 64 * 64; i++) {
    const int row = 32 + i / 64, column = 64 + i % 64;
    const bool inside = row < 50 && column < 72;
    compare("tma_load", i, seen.host[i], inside ? from.host[((1 * 3 + 2) * 50 + row) * 72 + column] : 0, 0);
  }
  for (int i = 0; i < to.count; i++) {
    const int row = i / 72 % 50, column = i % 72;
    const bool stored = i / (50 * 72) == 5 && row >= 32 && column >= 64;
    compare("tma_store", i, to.host[i], stored ? from.host[i] : 1, 0);
  }
}

// Bulk copies through a ring of two slots, from a producer warp to a consumer warp; sums into global memory; stmatrix

enum { ROUNDS = 7, SLOT = 512 };

__global__ void ring(const float *from, float *to, float *sum) {
  float *slots = dynamic_shared<float>();
  float *staged = slots + 2 * SLOT / 4;
  __shared__ uint64_t full[2], empty[2];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++)
      mbarrier_init(shared_address(&full[i]), 1), mbarrier_init(shared_address(&empty[i]), 32);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (lane == 0) {
      for (int round = 0; round < ROUNDS; round++) {
        const int slot = round % 2, phase = round / 2 % 2;
        mbarrier_wait(shared_address(&empty[slot]), phase ^ 1);
        mbarrier_arrive_expect(shared_address(&full[slot]), SLOT);
        bulk_load(shared_address(slots + slot * SLOT / 4), from + round * SLOT / 4, SLOT, shared_address(&full[slot]));
      }
    }
    named_barrier_arrive(3, 64);
  } else {
    for (int round = 0; round < ROUNDS; round++) {
      const int slot = round % 2, phase = round / 2 % 2;
      mbarrier_wait(shared_address(&full[slot]), phase);
      if (lane == 0) bulk_wait_read<0>();
      __syncwarp();
      const float4 x = shared_load_4(shared_address(slots + slot * SLOT / 4 + 4 * lane));
      shared_store_4(shared_address(staged + 4 * lane), x.x, x.y, x.z, 2 * x.w);
      async_proxy_fence();
      mbarrier_arrive(shared_address(&empty[slot]));
      __syncwarp();
      if (lane == 0) {
        bulk_store(to + round * SLOT / 4, shared_address(staged), SLOT);
        bulk_add(sum, shared_address(staged), SLOT);
        bulk_commit();
      }
    }
    if (lane == 0) bulk_wait<0>();
    named_barrier_sync(3, 64);
  }
}

// Warps meet from places of their own, each to read what the other wrote.
__global__ void meetings(int *to) {
  __shared__ int left[32], right[32];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    left[lane] = lane + 1;
    named_barrier_meet(2, 64);
    to[lane] = right[31 - lane];
  } else {
    right[lane] = 100 + lane;
    named_barrier_meet(2, 64);
    to[32 + lane] = left[31 - lane];
  }
}

static void check_meetings() {
  both<int> to(64);
  sa_cuda_launch("meetings", meetings, dim3(1), dim3(64), 0, (cudaStream_t)0, to.device);
  to.fetch();
  for (int i = 0; i < 32; i++) {
    compare("what the right wrote", i, to.host[i], 131 - i, 0);
    compare("what the left wrote", i, to.host[32 + i], 32 - i, 0);
  }
}

static void check_ring() {
  both<float> from(ROUNDS * SLOT / 4), to(ROUNDS * SLOT / 4), sum(SLOT / 4);
  for (int i = 0; i < from.count; i++) from.host[i] = small(i);
  from.send();
  sum.send();
  sa_cuda_launch("ring", ring, dim3(1), dim3(64), (size_t)3 * SLOT, (cudaStream_t)0, (const float *)from.device,
                 to.device, sum.device);
  to.fetch();
  sum.fetch();
  for (int i = 0; i < to.count; i++) compare("bulk copies", i, to.host[i], small(i) * (i % 4 == 3 ? 2 : 1), 0);
  for (int i = 0; i < SLOT / 4; i++) {
    double want = 0;
    for (int round = 0; round < ROUNDS; round++) want += small(round * SLOT / 4 + i) * (i % 4 == 3 ? 2 : 1);
    compare("bulk_add", i, sum.host[i], want, 0);
  }
}

// Sums below the smallest normal number.
__global__ void small_sums(float *to) {
  float *from = dynamic_shared<float>();
  from[threadIdx.x] = (threadIdx.x + 1) * 0x1p-140f;
  async_proxy_fence();
  __syncwarp();
  if (threadIdx.x == 0) {
    bulk_add(to, shared_address(from), 32 * 4);
    bulk_commit();
    bulk_wait<0>();
  }
}

static void check_small_sums() {
  both<float> to(32);
  for (int i = 0; i < 32; i++) to.host[i] = i % 2 ? -0x1p-130f : 0x1p-126f;
  to.send();
  sa_cuda_launch("small sums", small_sums, dim3(1), dim3(32), (size_t)32 * 4, (cudaStream_t)0, to.device);
  to.fetch();
  for (int i = 0; i < 32; i++) {
    compare("small sums", i, to.host[i], (i % 2 ? -0x1p-130 : 0x1p-126) + (i + 1) * 0x1p-140, 0);
  }
}

__global__ void matrices(uint16_t *stored) {
  uint16_t *tile = dynamic_shared<uint16_t>();
  const int lane = threadIdx.x;
  uint32_t r[4];
  for (int m = 0; m < 4; m++) {
    const uint32_t at = m * 64 + lane / 4 * 8 + lane % 4 * 2;
    r[m] = at | (at + 1) << 16;
  }
  store_matrices(shared_address(tile + lane * 8), r);
  __syncwarp();
  for (int i = lane; i < 256; i += 32) stored[i] = tile[i];
}

static void check_matrices() {
  both<uint16_t> stored(256);
  sa_cuda_launch("stmatrix", matrices, dim3(1), dim3(32), (size_t)512, (cudaStream_t)0, stored.device);
  stored.fetch();
  for (int i = 0; i < 256; i++) compare("store_matrices", i, stored.host[i], i, 0);
}

int main() {
  check_products<__nv_bfloat16, 64>();
  check_products<__nv_bfloat16, 96>();
  check_products<__nv_bfloat16, 128>();
  check_products<__nv_bfloat16, 192>();
  check_products<__nv_bfloat16, 256>();
  check_products<__half, 64>();
  check_products<__half, 128>();
  check_moves();
  check_meetings();
  check_ring();
  check_small_sums();
  check_matrices();
  return report();
}
