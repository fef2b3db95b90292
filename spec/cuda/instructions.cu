// checks the functions of ptx.cuh and the shuffles against their definitions, on the emulator or (built by nvcc) a GPU
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/cuda/ptx.cuh"

#include "check.h"

// Products: a [16][16], b [16][8] row-major, of which a flavour uses its part

enum flavour { BF16, F16, F64 };

static __device__ uint32_t pair(flavour f, float low, float high) {
  const uint32_t x =
      f == BF16 ? (uint32_t)__bfloat16_as_ushort(__float2bfloat16(low)) : (uint32_t)__half_as_ushort(__float2half(low));
  const uint32_t y = f == BF16 ? (uint32_t)__bfloat16_as_ushort(__float2bfloat16(high))
                               : (uint32_t)__half_as_ushort(__float2half(high));
  return y << 16 | x;
}

__global__ void product(flavour f, const float *a, const float *b, double *d) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  if (f == F64) {
    double sum[2] = {1, 2};
    mma_f64(sum, a[g * 16 + t], b[t * 8 + g]);
    d[g * 8 + 2 * t] = sum[0];
    d[g * 8 + 2 * t + 1] = sum[1];
    return;
  }
  float sum[4] = {1, 2, 1, 2};
  uint32_t x[4], y[2];
  for (int i = 0; i < 4; i++) {
    const float *at = a + (g + i % 2 * 8) * 16;
    x[i] = pair(f, at[2 * t + i / 2 * 8], at[2 * t + i / 2 * 8 + 1]);
  }
  for (int i = 0; i < 2; i++) y[i] = pair(f, b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
  if (f == BF16) {
    mma_bf16(sum, x, y);
  } else {
    mma_f16(sum, x, y);
  }
  for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

static void check_products() {
  static const char *const names[] = {"mma_bf16", "mma_f16", "mma_f64"};
  static const int rows[] = {16, 16, 8}, depth[] = {16, 16, 4};
  both<float> a(256), b(128);
  both<double> d(128);
  for (int i = 0; i < 256; i++) a.host[i] = small(i);
  for (int i = 0; i < 128; i++) b.host[i] = small(3 * i + 1);
  a.send();
  b.send();
  for (int f = BF16; f <= F64; f++) {
    sa_cuda_launch(names[f], product, dim3(1), dim3(32), 0, (cudaStream_t)0, (flavour)f, a.device, b.device, d.device);
    d.fetch();
    for (int i = 0; i < rows[f] * 8; i++) {
      double want = 1 + i % 2;
      for (int k = 0; k < depth[f]; k++) want += (double)a.host[i / 8 * 16 + k] * b.host[k * 8 + i % 8];
      compare(names[f], i, d.host[i], want, 0);
    }
  }
}

// Four 8 x 8 matrices of 16-bit numbers, through cp.async and ldmatrix. The last row is not copied.

__global__ void loads(const uint16_t *from, uint32_t *plain, uint32_t *transposed) {
  uint16_t *tile = dynamic_shared<uint16_t>();
  const int lane = threadIdx.x;
  copy_async(shared_address(tile + lane * 8), from + lane * 8, lane == 31);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  uint32_t r[4];
  load_matrices(r, shared_address(tile + lane * 8));
  for (int m = 0; m < 4; m++) plain[m * 32 + lane] = r[m];
  load_matrices_transposed(r, shared_address(tile + lane * 8));
  for (int m = 0; m < 4; m++) transposed[m * 32 + lane] = r[m];
}

static void check_loads() {
  both<uint16_t> from(256);
  both<uint32_t> plain(128), transposed(128);
  for (int i = 0; i < 256; i++) from.host[i] = (uint16_t)(i * 251 + 7);
  from.send();
  sa_cuda_launch("ldmatrix", loads, dim3(1), dim3(32), 512, (cudaStream_t)0, (const uint16_t *)from.device,
                 plain.device, transposed.device);
  plain.fetch();
  transposed.fetch();
  for (int i = 248; i < 256; i++) from.host[i] = 0;
  for (int i = 0; i < 128; i++) {
    const int m = i / 32, g = i % 32 / 4, t = i % 4;
    const uint16_t *matrix = from.host + m * 64;
    compare("load_matrices", i, plain.host[i], matrix[g * 8 + 2 * t] | (uint32_t)matrix[g * 8 + 2 * t + 1] << 16, 0);
    compare("load_matrices_transposed", i, transposed.host[i],
            matrix[2 * t * 8 + g] | (uint32_t)matrix[(2 * t + 1) * 8 + g] << 16, 0);
  }
}

// Groups of copies: with two under way, waiting for all but one gives the first.

__global__ void groups(const float4 *from, float4 *to) {
  float4 *tile = dynamic_shared<float4>();
  const int thread = threadIdx.x;
  copy_async(shared_address(tile + thread), from + thread);
  copy_async_commit();
  copy_async(shared_address(tile + 64 + thread), from + 64 + thread);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  to[thread] = tile[63 - thread];
  copy_async_wait<0>();
  __syncthreads();
  to[64 + thread] = tile[64 + 63 - thread];
}

static void check_groups() {
  both<float4> from(128), to(128);
  for (int i = 0; i < 128; i++) from.host[i] = make_float4((float)i, 1, 2, (float)-i);
  from.send();
  sa_cuda_launch("copy_async", groups, dim3(1), dim3(64), 2048, (cudaStream_t)0, (const float4 *)from.device,
                 to.device);
  to.fetch();
  for (int i = 0; i < 128; i++) compare("copy_async", i, to.host[i].w, -(i / 64 * 64 + 63 - i % 64), 0);
}

// Shuffles, votes, sums of a block, over several blocks

__global__ void collectives(int *out) {
  __shared__ int sums[4];
  const int thread = threadIdx.x, lane = thread % 32;
  int sum = thread;
  for (int i = 1; i < 32; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
  if (lane == 0) sums[thread / 32] = sum;
  __syncthreads();
  int total = 0;
  for (int i = 0; i < 4; i++) total += sums[i];
  int *mine = out + (blockIdx.x * 128 + thread) * 6;
  mine[0] = total;
  mine[1] = __shfl_up_sync(~0u, lane, 3, 16);
  mine[2] = (int)__ballot_sync(~0u, lane % 5 == 0);
  mine[3] = __any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane < 31);
  if (lane < 16) {
    mine[4] = __shfl_sync(0xffffu, lane, 3);
  } else {
    mine[4] = __shfl_down_sync(0xffff0000u, lane, 1);
  }
  mine[5] = __syncthreads_count(thread % 3 == 0);
}

static void check_collectives() {
  both<int> out(3 * 128 * 6);
  sa_cuda_launch("collectives", collectives, dim3(3), dim3(128), 0, (cudaStream_t)0, out.device);
  out.fetch();
  for (int i = 0; i < 3 * 128; i++) {
    const int lane = i % 32, *mine = out.host + i * 6;
    compare("block sum", i, mine[0], 127 * 64, 0);
    compare("shuffle up", i, mine[1], lane % 16 < 3 ? lane : lane - 3, 0);
    compare("ballot", i, mine[2], 0x42108421, 0);
    compare("any and all", i, mine[3], 1, 0);
    compare("shuffle of halves", i, mine[4], lane < 16 ? 3 : lane == 31 ? 31 : lane + 1, 0);
    compare("count", i, mine[5], 43, 0);
  }
}

// Conversions: what each half is as a float, and floats between halves, rounded to even

// From 2^-25 on, with a last bit that lies between two halves.
static __host__ __device__ uint32_t halfway(int i) {
  return 0x33000000u + ((uint32_t)i << 13) + 0x1000u;
}

__global__ void conversions(uint16_t *f16, uint16_t *bf16, float *of_f16) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float x = __uint_as_float((uint32_t)i << 16 | 0x8000u), y = __uint_as_float(halfway(i));
  bf16[i] = __bfloat16_as_ushort(__float2bfloat16(x));
  f16[i] = __half_as_ushort(__float2half(y));
  of_f16[i] = __half2float(__ushort_as_half((uint16_t)i));
}

static void check_conversions() {
  both<uint16_t> f16(65536), bf16(65536);
  both<float> of_f16(65536);
  sa_cuda_launch("conversions", conversions, dim3(256), dim3(256), 0, (cudaStream_t)0, f16.device, bf16.device,
                 of_f16.device);
  f16.fetch();
  bf16.fetch();
  of_f16.fetch();
  for (int i = 0; i < 65536; i++) {
    const int exponent = i >> 10 & 31, mantissa = i & 1023;
    const double sign = i & 0x8000 ? -1 : 1;
    const double value = exponent == 0 ? mantissa * 0x1p-24 : ldexp(1024 + mantissa, exponent - 25);
    if (exponent < 31) compare("f16 to f32", i, of_f16.host[i], sign * value, 0);
    const bool nan = (i & 0x7f80) == 0x7f80;  // half above infinity
    compare("f32 to bf16", i, bf16.host[i], nan ? 0x7fff : i + (i & 1), 0);
    float x;
    const uint32_t bits = halfway(i);
    memcpy(&x, &bits, 4);
    // rint() of the number of smallest steps rounds to even as well.
    const double step = fabs(x) < 0x1p-14 ? 0x1p-24 : ldexp(1, ilogb(x) - 10), rounded = rint(fabs(x) / step) * step;
    const double got = of_f16.host[f16.host[i] & 0x7fff];
    if (rounded < 65520) compare("f32 to f16", i, got, rounded, 0);
  }
}

__global__ void exponentials(const float *x, float *y) {
  y[threadIdx.x] = exp2_fast(x[threadIdx.x]);
}

static void check_exponentials() {
  both<float> x(32), y(32);
  for (int i = 0; i < 29; i++) x.host[i] = (float)(i * 9.37 - 140);
  x.host[29] = INFINITY, x.host[30] = -INFINITY, x.host[31] = NAN;
  x.send();
  sa_cuda_launch("exp2_fast", exponentials, dim3(1), dim3(32), 0, (cudaStream_t)0, (const float *)x.device, y.device);
  y.fetch();
  for (int i = 0; i < 29; i++) {
    const double want = x.host[i] < -126 ? 0 : exp2((double)x.host[i]);
    compare("exp2_fast", i, y.host[i], want, want * 3e-7);
  }
  if (!(y.host[29] == INFINITY && y.host[30] == 0 && isnan(y.host[31]))) {
    printf("exp2_fast of inf, -inf, nan: %g %g %g\n", y.host[29], y.host[30], y.host[31]);
    failures++;
  }
}

__global__ void reciprocals(const float *x, float *y) {
  y[threadIdx.x] = reciprocal_fast(x[threadIdx.x]);
}

static void check_reciprocals() {
  both<float> x(32), y(32);
  for (int i = 0; i < 29; i++) x.host[i] = (i & 1 ? -1.3f : 1.3f) * exp2f((float)(i * 8 - 112));
  x.host[29] = INFINITY, x.host[30] = 0, x.host[31] = NAN;
  x.send();
  sa_cuda_launch("reciprocal_fast", reciprocals, dim3(1), dim3(32), 0, (cudaStream_t)0, (const float *)x.device,
                 y.device);
  y.fetch();
  for (int i = 0; i < 29; i++) {
    const double want = 1.0 / x.host[i];
    compare("reciprocal_fast", i, y.host[i], want, fabs(want) * 1.2e-7);
  }
  if (!(y.host[29] == 0 && y.host[30] == INFINITY && isnan(y.host[31]))) {
    printf("reciprocal_fast of inf, 0, nan: %g %g %g\n", y.host[29], y.host[30], y.host[31]);
    failures++;
  }
}

__global__ void replacements(const float *x, float *y) {
  float value = x[threadIdx.x];
  replace_unless(value, 0xa5u << threadIdx.x % 8, 7, 2.f, x[32], (float)threadIdx.x);
  y[threadIdx.x] = value;
}

static void check_replacements() {
  both<float> x(33), y(32);
  for (int i = 0; i < 32; i++) x.host[i] = i & 1 ? NAN : (float)(i * 3);
  x.host[32] = -INFINITY;
  x.send();
  sa_cuda_launch("replace_unless", replacements, dim3(1), dim3(32), 0, (cudaStream_t)0, (const float *)x.device,
                 y.device);
  y.fetch();
  for (int i = 0; i < 32; i++) {
    const bool kept = 0xa5u << i % 8 >> 7 & 1;
    const float want = kept ? x.host[i] : -INFINITY;
    if (y.host[i] == want || (isnan(want) && isnan(y.host[i]))) continue;
    printf("replace_unless %d: %g, wanted %g\n", i, y.host[i], want);
    failures++;
  }
}

// What the host does not reach on a GPU, it does not in the emulator either.
static void check_memory() {
  both<float> x(32);
  x.send();
  for (int write = 0; write < 2; write++) {
    const pid_t child = fork();
    if (child == 0) {
      volatile float *at = x.device;
      if (write) at[0] = 1;
      _exit(at[0] == 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    compare("the signal that ends a host that touches device memory", write, WIFSIGNALED(status) ? WTERMSIG(status) : 0,
            SIGSEGV, 0);
  }
  x.fetch();
  compare("device memory", 0, x.host[0], 0, 0);
}

int main() {
  check_memory();
  check_products();
  check_loads();
  check_groups();
  check_collectives();
  check_conversions();
  check_exponentials();
  check_reciprocals();
  check_replacements();
  return report();
}
