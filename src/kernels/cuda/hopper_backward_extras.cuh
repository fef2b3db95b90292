// what backward attention on Hopper does for softcap, bias, ALiBi and dropout apart from its products: rows whose LSE
// is too large, the gradient of slopes
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_EXTRAS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BACKWARD_EXTRAS_CUH
#include "kernels/cuda/hopper_backward_call.cuh"

enum { HOPPER_BACKWARD_BASES_THREADS = 256 };

// The score of a row and a key, product by product. Its last digit may not be that of wgmma's; the LSE of such a row
// had fewer.
template <class T>
static __device__ __forceinline__ float hopper_backward_score(const hopper_backward_call &c, const T *q, const T *k,
                                                              float bias, float slope, int apart) {
  float product = 0;
  for (int d = 0; d < c.width; d += 8) {
    const uint4 x = *(const uint4 *)(q + d), y = *(const uint4 *)(k + d);
    const uint32_t *a = (const uint32_t *)&x, *b = (const uint32_t *)&y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      product = fmaf(hopper_low<T>(a[i]), hopper_low<T>(b[i]), product);
      product = fmaf(hopper_high<T>(a[i]), hopper_high<T>(b[i]), product);
    }
  }
  if (c.scores.capped == 1) product = hopper_capped<true>(c.scores, product);
  if (c.scores.capped == 2) product = hopper_capped<false>(c.scores, product);
  return hopper_score(c.scores, product, hopper_extra(bias, slope, (float)apart));
}

// Rows whose LSE is beyond HOPPER_BACKWARD_COARSE, 64 rows a block, a warp each: the peak and the sum apart, as the LSE
// cannot hold the logarithm of the sum beside such a peak; and, of them, the sink's share. A bias of the dtype's
// minimum everywhere makes such a row.
template <class T>
__global__ void __launch_bounds__(HOPPER_BACKWARD_BASES_THREADS)
    hopper_backward_bases(const __grid_constant__ hopper_backward_call c) {
  const int block = blockIdx.x, lane = threadIdx.x % 32;
  if (!c.coarse[block]) return;
  const int blocks = c.padded / 64, flat = block / blocks, first = block % blocks * 64;
  const int batch = flat / c.heads, head = flat % c.heads, key_head = head / c.group;
  const sa_operand &bias = c.scores.bias;
  const float slope = hopper_slope(c.scores, head), unit = c.scores.unit;
  const int64_t *start = c.plan.row_start + sa_device_plane(c.plan, batch, head) * c.plan.row_tiles + first / SA_TILE;
  const T *keys = hopper_rows<T>(c.k_values, batch, key_head);
  __shared__ float part[HOPPER_BACKWARD_BASES_THREADS / 32];
  if (lane == 0) part[threadIdx.x / 32] = 0;
  for (int row = first + threadIdx.x / 32; row < min(first + 64, c.queries);
       row += HOPPER_BACKWARD_BASES_THREADS / 32) {
    const int64_t at = (int64_t)flat * c.padded + hopper_backward_slot(row);
    const float lse = c.lse_log2[at];
    if (!(fabsf(lse) > HOPPER_BACKWARD_COARSE && fabsf(lse) < INFINITY)) continue;
    const T *q = hopper_rows<T>(c.q_values, batch, head) + row * c.q_values.stride[2];
    float top = -INFINITY, sum = 0;
    for (int64_t r = start[0]; r < start[1]; r++) {
      const sa_run run = c.plan.row_runs[r];
      for (int key = run.first * SA_TILE + lane; key < min((run.first + run.count) * SA_TILE, c.keys); key += 32) {
        if (run.pattern >= 0) {
          const uint2 bits = c.plan.row_bits[run.pattern * 256 + row % SA_TILE / 16 * 32 + row % 8 * 4 + key % 8 / 2];
          if (!((row % 16 < 8 ? bits.x : bits.y) >> (key % SA_TILE / 8 * 2 + key % 2) & 1)) continue;
        }
        const float extra = (float)read_operand(
            bias, batch * bias.stride[0] + head * bias.stride[1] + row * bias.stride[2] + key * bias.stride[3]);
        if (extra == -INFINITY) continue;
        const float score =
            hopper_backward_score(c, q, keys + key * c.k_values.stride[2], extra, slope, key - row - c.scores.diagonal);
        const float higher = fmaxf(top, score);
        if (higher == -INFINITY) continue;
        sum = sum * exp2_fast((top - higher) * unit) + exp2_fast((score - higher) * unit);
        top = higher;
      }
    }
    const float own = c.sinks.data ? hopper_backward_sink<T>(c, head) : -INFINITY;
    float peak = fmaxf(top, own);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, lanes));
    sum = top == -INFINITY ? sum : sum * exp2_fast((top - peak) * unit);
    const float sink = own == -INFINITY ? 0.f : exp2_fast((own - peak) * unit);
    sum = hopper_warp_sum_f(sum) + sink;
    if (lane > 0) continue;
    if (own != -INFINITY) part[threadIdx.x / 32] -= sink / sum * c.delta[at];
    c.lse_log2[at] = -peak;
    c.log2_sum[at] = log2f(sum);
  }
  if (!c.sink_part) return;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int n = 1; n < HOPPER_BACKWARD_BASES_THREADS / 32; n++) part[0] += part[n];
  c.sink_part[block] += part[0];
}

// A head a block: the sum of what its columns of keys gave the slope.
static __global__ void __launch_bounds__(256) hopper_backward_slopes(const __grid_constant__ hopper_backward_call c) {
  __shared__ double part[256];
  const int head = blockIdx.x, each = c.plan.col_tiles * 8;
  double sum = 0;
  for (int64_t n = threadIdx.x; n < (int64_t)c.batch * each; n += 256) {
    sum += c.slope_part[(n / each * c.heads + head) * each + n % each];
  }
  part[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int n = 1; n < 256; n++) sum += part[n];
  write_operand(c.dalibi, head * c.dalibi.stride[1], sum);
}

#endif
