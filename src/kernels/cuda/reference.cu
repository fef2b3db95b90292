// attention and its gradients by the definition: plain loops in f64, the oracle of every other kernel on the device
//
// It may spill: it is written to be right, not to be fast.
#include <float.h>
#include <limits.h>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/operand.cuh"
#include "kernels/cuda/plan.cuh"
#include "random.h"

/*  A block of threads has one row of scores (or one key), tile by tile: each thread the score of one pair of the tile,
 *  then each thread one column of the output, over the pairs of the tile in rising order. Nothing of a masked pair is
 *  ever computed with. What a row comes to is found first and kept for the gradients.
 */

enum { THREADS = SA_TILE };

typedef struct row_sums {
  double max, sum, sink;  // of the scores; of e^(s - max); the sink's weight
  double delta;           // dout . out
  double alibi;           // sum of distance * ds
  int64_t count;          // of visible keys
} row_sums;

typedef struct reference_job {
  sa_problem p;
  sa_device_plan plan;
  row_sums *rows;  // [B,H,L]; for the backward
} reference_job;

typedef struct row_place {
  int64_t batch, head, key_head, query;
} row_place;

static __device__ int64_t offset_of(const sa_operand &x, int64_t batch, int64_t head, int64_t row) {
  return batch * x.stride[0] + head * x.stride[1] + row * x.stride[2];
}

// Whether the mask shows the pair (query, tile * SA_TILE + in_tile). Every thread of a block looks the tile up.
static __device__ bool mask_shows(const sa_device_plan &plan, const row_place &at, int64_t key) {
  const int64_t row = sa_device_plane(plan, at.batch, at.head) * plan.row_tiles + at.query / SA_TILE;
  const int64_t tile = key / SA_TILE;
  for (int64_t k = plan.row_start[row]; k < plan.row_start[row + 1]; k++) {
    const sa_run run = plan.row_runs[k];
    if (tile < run.first || tile >= run.first + run.count) continue;
    if (run.pattern == SA_FULL) return true;
    const int i = (int)(at.query % SA_TILE), j = (int)(key % SA_TILE);
    const uint2 bits = plan.row_bits[(int64_t)run.pattern * 256 + i / 16 * 32 + i % 8 * 4 + j % 8 / 2];
    return (i & 8 ? bits.y : bits.x) >> (j / 8 * 2 + j % 2) & 1;
  }
  return false;
}

static __device__ bool visible(const reference_job &job, const row_place &at, int64_t key) {
  const sa_problem &p = job.p;
  if (at.query >= p.queries || key >= p.keys || !mask_shows(job.plan, at, key)) return false;
  if (!p.bias.data) return true;
  return read_operand(p.bias, offset_of(p.bias, at.batch, at.head, at.query) + key * p.bias.stride[3]) != -INFINITY;
}

static __device__ double dot(const sa_operand &a, int64_t a_offset, const sa_operand &b, int64_t b_offset,
                             int64_t width) {
  double sum = 0;
  for (int64_t d = 0; d < width; d++)
    sum += read_operand(a, a_offset + d * a.stride[3]) * read_operand(b, b_offset + d * b.stride[3]);
  return sum;
}

static __device__ double distance(const sa_problem &p, int64_t query, int64_t key) {
  const int64_t x = key - query - p.diagonal;
  return (double)(x < 0 ? -x : x);
}

// `slope`: d score / d (scale * q.k).
static __device__ double score(const sa_problem &p, const row_place &at, int64_t key, double *slope) {
  // Without a width the product is an empty sum, whatever 1/sqrt(0) makes of the scale.
  double s = p.width ? p.scale * dot(p.q, offset_of(p.q, at.batch, at.head, at.query), p.k,
                                     offset_of(p.k, at.batch, at.key_head, key), p.width)
                     : 0;
  *slope = 1;
  if (p.softcap > 0) {
    const double t = tanh(s / p.softcap);
    s = p.softcap * t;
    *slope = 1 - t * t;
  }
  if (p.bias.data) s += read_operand(p.bias, offset_of(p.bias, at.batch, at.head, at.query) + key * p.bias.stride[3]);
  if (p.alibi.data) s -= read_operand(p.alibi, at.head * p.alibi.stride[1]) * distance(p, at.query, key);
  return s;
}

// What dropout multiplies a weight by.
static __device__ double keep_factor(const sa_problem &p, const row_place &at, int64_t key) {
  const uint32_t threshold = sa_dropout_threshold(p.dropout);
  const uint64_t index = (uint64_t)(((at.batch * p.heads + at.head) * p.queries + at.query) * p.keys + key);
  return threshold && sa_dropped(p.seed, index, threshold) ? 0 : 1 / (1 - p.dropout);
}

// A dropped weight is 0 whatever it was, NaN too.
static __device__ double keep(double factor, double x) {
  return factor > 0 ? factor * x : 0;
}

// The sum (or maximum) over the threads of the block, in one order.
static __device__ double over_block(double x, bool maximum) {
  __shared__ double value[THREADS];
  value[threadIdx.x] = x;
  __syncthreads();
  for (int half = THREADS / 2; half; half /= 2) {
    if ((int)threadIdx.x < half) {
      const double other = value[threadIdx.x + half];
      if (maximum)
        value[threadIdx.x] = other > value[threadIdx.x] ? other : value[threadIdx.x];
      else
        value[threadIdx.x] += other;
    }
    __syncthreads();
  }
  const double result = value[0];
  __syncthreads();
  return result;
}

static __device__ double sink_of(const sa_problem &p, int64_t head) {
  return read_operand(p.sinks, head * p.sinks.stride[1]);
}

// Scores of a row to its maximum and sum. A NaN that the comparisons of the maximum pass over comes back with its exp.
// When all scores, and the sink, are -inf (or one is +inf), inf - inf makes the row NaN: it is not a dead row.
static __device__ row_sums sum_row(const reference_job &job, const row_place &at) {
  const sa_problem &p = job.p;
  const double sink = p.sinks.data ? sink_of(p, at.head) : -INFINITY;
  double max = sink, sum = 0, count = 0, slope;
  for (int64_t key = threadIdx.x; key < p.keys; key += THREADS) {
    if (!visible(job, at, key)) continue;
    count++;
    const double s = score(p, at, key, &slope);
    if (s > max) max = s;
  }
  max = over_block(max, true);
  for (int64_t key = threadIdx.x; key < p.keys; key += THREADS)
    if (visible(job, at, key)) sum += exp(score(p, at, key, &slope) - max);
  row_sums row = {max, over_block(sum, false), 0, 0, 0, (int64_t)over_block(count, false)};
  if (p.sinks.data) {
    row.sink = exp(sink - max);
    row.sum += row.sink;
    row.sink /= row.sum;
  }
  return row;
}

static __device__ double weight_of(const reference_job &job, const row_place &at, const row_sums &row, int64_t key,
                                   double *slope) {
  return exp(score(job.p, at, key, slope) - row.max) / row.sum;
}

// This thread's column of out, for the columns from `first` on.
static __device__ double out_column(const reference_job &job, const row_place &at, const row_sums &row, int64_t first) {
  __shared__ double weight[THREADS];
  __shared__ bool seen[THREADS];
  const sa_problem &p = job.p;
  const int64_t column = first + threadIdx.x;
  // A NaN row is one even when all of its weights are dropped.
  double out = row.count && isnan(row.sum) ? row.sum : 0, slope;
  for (int64_t tile = 0; tile < p.keys; tile += SA_TILE) {
    const int64_t key = tile + threadIdx.x;
    seen[threadIdx.x] = visible(job, at, key);
    if (seen[threadIdx.x]) weight[threadIdx.x] = keep(keep_factor(p, at, key), weight_of(job, at, row, key, &slope));
    __syncthreads();
    if (column < p.value_width) {
      const int64_t offset = offset_of(p.v, at.batch, at.key_head, tile) + column * p.v.stride[3];
      for (int j = 0; j < SA_TILE; j++)
        if (seen[j]) out += weight[j] * read_operand(p.v, offset + j * p.v.stride[2]);
    }
    __syncthreads();
  }
  return out;
}

static __device__ row_place place_of_row(const sa_problem &p, int64_t index) {
  row_place at;
  at.query = index % p.queries;
  at.head = index / p.queries % p.heads;
  at.batch = index / p.queries / p.heads;
  at.key_head = at.head / (p.heads / p.key_heads);
  return at;
}

static __device__ void write_row_weights(const reference_job &job, const row_place &at, const row_sums &row) {
  const sa_problem &p = job.p;
  const int64_t offset = offset_of(p.weights, at.batch, at.head, at.query);
  double slope;
  for (int64_t key = threadIdx.x; key < p.keys; key += THREADS)
    write_operand(p.weights, offset + key * p.weights.stride[3],
                  visible(job, at, key) ? weight_of(job, at, row, key, &slope) : 0);
}

// In f32 the LSE of scores beyond its range stays a finite number: only a dead row's is -inf.
static __device__ double storable_lse(const sa_problem &p, double lse) {
  return p.lse.dtype == SA_F32 && isfinite(lse) ? fmax(-(double)FLT_MAX, fmin(lse, (double)FLT_MAX)) : lse;
}

static __global__ void __launch_bounds__(THREADS) forward_rows_kernel(const __grid_constant__ reference_job job) {
  const sa_problem &p = job.p;
  const int64_t rows = p.batch * p.heads * p.queries;
  for (int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const row_place at = place_of_row(p, index);
    const row_sums row = sum_row(job, at);
    for (int64_t first = 0; first < p.value_width; first += THREADS) {
      const double out = out_column(job, at, row, first);
      const int64_t column = first + threadIdx.x;
      if (column < p.value_width)
        write_operand(p.out, offset_of(p.out, at.batch, at.head, at.query) + column * p.out.stride[3], out);
    }
    if (p.weights.data) write_row_weights(job, at, row);
    if (threadIdx.x) continue;
    const double dead_lse = p.sinks.data ? sink_of(p, at.head) : -INFINITY;
    if (p.lse.data)
      write_operand(p.lse, offset_of(p.lse, at.batch, at.head, at.query),
                    row.count ? storable_lse(p, row.max + log(row.sum)) : dead_lse);
    if (p.dead.data) ((bool *)p.dead.data)[offset_of(p.dead, at.batch, at.head, at.query)] = row.count == 0;
  }
}

/*  Gradients  */

// d loss / d score of a visible pair; *kept: what its weight gives to dV; *slope as in score.
static __device__ double score_gradient(const reference_job &job, const row_place &at, const row_sums &row, int64_t key,
                                        double *kept, double *slope) {
  const sa_problem &p = job.p;
  const double weight = weight_of(job, at, row, key, slope), factor = keep_factor(p, at, key);
  const double dlse = p.dlse.data ? read_operand(p.dlse, offset_of(p.dlse, at.batch, at.head, at.query)) : 0;
  const double product = p.dout.data ? dot(p.dout, offset_of(p.dout, at.batch, at.head, at.query), p.v,
                                           offset_of(p.v, at.batch, at.key_head, key), p.value_width)
                                     : 0;
  *kept = keep(factor, weight);
  return weight * (keep(factor, product) - row.delta + dlse);
}

static __device__ double row_delta(const reference_job &job, const row_place &at, const row_sums &row) {
  const sa_problem &p = job.p;
  double delta = 0;
  if (!p.dout.data || !row.count) return 0;
  for (int64_t first = 0; first < p.value_width; first += THREADS) {
    const double out = out_column(job, at, row, first);
    const int64_t column = first + threadIdx.x;
    if (column < p.value_width)
      delta += out * read_operand(p.dout, offset_of(p.dout, at.batch, at.head, at.query) + column * p.dout.stride[3]);
  }
  return over_block(delta, false);
}

// What rows come to, and dQ.
static __global__ void __launch_bounds__(THREADS) backward_rows_kernel(const __grid_constant__ reference_job job) {
  __shared__ double gradient[THREADS];
  __shared__ bool seen[THREADS];
  const sa_problem &p = job.p;
  const int64_t rows = p.batch * p.heads * p.queries;
  for (int64_t index = blockIdx.x; index < rows; index += gridDim.x) {
    const row_place at = place_of_row(p, index);
    row_sums row = sum_row(job, at);
    row.delta = row_delta(job, at, row);
    double alibi = 0;
    // At least once, for the sake of `alibi`.
    for (int64_t first = 0; first == 0 || first < p.width; first += THREADS) {
      const int64_t column = first + threadIdx.x;
      double dq = 0;
      for (int64_t tile = 0; tile < p.keys; tile += SA_TILE) {
        const int64_t key = tile + threadIdx.x;
        seen[threadIdx.x] = visible(job, at, key);
        if (seen[threadIdx.x]) {
          double kept, slope;
          const double ds = score_gradient(job, at, row, key, &kept, &slope);
          if (first == 0) alibi += distance(p, at.query, key) * ds;
          gradient[threadIdx.x] = p.scale * slope * ds;
        }
        __syncthreads();
        if (column < p.width) {
          const int64_t offset = offset_of(p.k, at.batch, at.key_head, tile) + column * p.k.stride[3];
          for (int j = 0; j < SA_TILE; j++)
            if (seen[j]) dq += gradient[j] * read_operand(p.k, offset + j * p.k.stride[2]);
        }
        __syncthreads();
      }
      if (p.dq.data && column < p.width)
        write_operand(p.dq, offset_of(p.dq, at.batch, at.head, at.query) + column * p.dq.stride[3], dq);
    }
    row.alibi = over_block(alibi, false);
    if (threadIdx.x == 0) job.rows[index] = row;
  }
}

// This thread's column of dK (or dV) of one key, for the columns from `first` on.
static __device__ double key_column(const reference_job &job, int64_t batch, int64_t key_head, int64_t key,
                                    int64_t first, bool of_value) {
  __shared__ double gradient[THREADS];
  __shared__ bool seen[THREADS];
  const sa_problem &p = job.p;
  const sa_operand &from = of_value ? p.dout : p.q;
  const int64_t column = first + threadIdx.x, group = p.heads / p.key_heads;
  double sum = 0;
  for (int64_t head = key_head * group; head < (key_head + 1) * group; head++)
    for (int64_t tile = 0; tile < p.queries; tile += SA_TILE) {
      const row_place at = {batch, head, key_head, tile + threadIdx.x};
      seen[threadIdx.x] = visible(job, at, key);
      if (seen[threadIdx.x]) {
        const row_sums row = job.rows[(batch * p.heads + head) * p.queries + at.query];
        double kept, slope;
        const double ds = score_gradient(job, at, row, key, &kept, &slope);
        gradient[threadIdx.x] = of_value ? kept : p.scale * slope * ds;
      }
      __syncthreads();
      if (column < (of_value ? p.value_width : p.width) && from.data) {
        const int64_t offset = offset_of(from, batch, head, tile) + column * from.stride[3];
        for (int i = 0; i < SA_TILE; i++)
          if (seen[i]) sum += gradient[i] * read_operand(from, offset + i * from.stride[2]);
      }
      __syncthreads();
    }
  return sum;
}

static __global__ void __launch_bounds__(THREADS) backward_keys_kernel(const __grid_constant__ reference_job job) {
  const sa_problem &p = job.p;
  const int64_t keys = p.batch * p.key_heads * p.keys;
  for (int64_t index = blockIdx.x; index < keys; index += gridDim.x) {
    const int64_t key = index % p.keys, key_head = index / p.keys % p.key_heads, batch = index / p.keys / p.key_heads;
    for (int of_value = 0; of_value < 2; of_value++) {
      const sa_operand &to = of_value ? p.dv : p.dk;
      const int64_t width = of_value ? p.value_width : p.width;
      if (!to.data) continue;
      for (int64_t first = 0; first < width; first += THREADS) {
        const double sum = key_column(job, batch, key_head, key, first, of_value);
        const int64_t column = first + threadIdx.x;
        if (column < width) write_operand(to, offset_of(to, batch, key_head, key) + column * to.stride[3], sum);
      }
    }
  }
}

// A block an element of dBias: the sum over the pairs that share it.
static __global__ void __launch_bounds__(THREADS) backward_bias_kernel(const __grid_constant__ reference_job job) {
  const sa_problem &p = job.p;
  const int64_t *shape = p.bias_shape, full[4] = {p.batch, p.heads, p.queries, p.keys};
  int64_t shared[4], sharing = 1;
  for (int d = 0; d < 4; d++) sharing *= shared[d] = shape[d] == 1 ? full[d] : 1;
  const int64_t elements = shape[0] * shape[1] * shape[2] * shape[3];
  for (int64_t element = blockIdx.x; element < elements; element += gridDim.x) {
    int64_t place[4], rest = element, offset = 0;
    for (int d = 3; d >= 0; d--) {
      place[d] = rest % shape[d];
      rest /= shape[d];
      offset += place[d] * p.dbias.stride[d];
    }
    double sum = 0;
    for (int64_t k = threadIdx.x; k < sharing; k += THREADS) {
      int64_t pair[4], within = k;
      for (int d = 3; d >= 0; d--) {
        pair[d] = place[d] + within % shared[d];
        within /= shared[d];
      }
      const row_place at = {pair[0], pair[1], pair[1] / (p.heads / p.key_heads), pair[2]};
      if (!visible(job, at, pair[3])) continue;
      double kept, slope;
      sum += score_gradient(job, at, job.rows[(at.batch * p.heads + at.head) * p.queries + at.query], pair[3], &kept,
                            &slope);
    }
    sum = over_block(sum, false);
    if (threadIdx.x == 0) write_operand(p.dbias, offset, sum);
  }
}

// A block a head: dSinks and dAlibi, from what its rows came to.
static __global__ void __launch_bounds__(THREADS) backward_heads_kernel(const __grid_constant__ reference_job job) {
  const sa_problem &p = job.p;
  for (int64_t head = blockIdx.x; head < p.heads; head += gridDim.x) {
    double dsink = 0, dalibi = 0;
    for (int64_t k = threadIdx.x; k < p.batch * p.queries; k += THREADS) {
      const int64_t batch = k / p.queries, query = k % p.queries;
      const row_sums row = job.rows[(batch * p.heads + head) * p.queries + query];
      const double dlse = p.dlse.data ? read_operand(p.dlse, offset_of(p.dlse, batch, head, query)) : 0;
      if (row.count) {
        dsink += row.sink * (dlse - row.delta);
        dalibi -= row.alibi;
      } else if (p.sinks.data && sink_of(p, head) != -INFINITY) {
        dsink += dlse;  // all that a dead row has is lse = sink
      }
    }
    dsink = over_block(dsink, false);
    dalibi = over_block(dalibi, false);
    if (threadIdx.x) continue;
    if (p.dsinks.data) write_operand(p.dsinks, head * p.dsinks.stride[1], dsink);
    if (p.dalibi.data) write_operand(p.dalibi, head * p.dalibi.stride[1], dalibi);
  }
}

static dim3 blocks(int64_t wanted) {
  return dim3((unsigned)(wanted < INT_MAX ? wanted : INT_MAX));
}

static int start(const char *function, const sa_problem *p, reference_job *job, cudaStream_t *stream) {
  const int status = sa_cuda_use(function, p->device, stream);
  if (status) return status;
  const sa_device_plan *plan = sa_cuda_plan(function, p->plan, p->device);
  if (!plan) return SA_NO_MEMORY;
  *job = reference_job{*p, *plan, NULL};
  return SA_OK;
}

int sa_cuda_reference_forward(const sa_problem *p) {
  static const char function[] = "sa_forward";
  const int64_t rows = p->batch * p->heads * p->queries;
  reference_job job;
  cudaStream_t stream;
  if (!rows) return SA_OK;
  const int status = start(function, p, &job, &stream);
  if (status) return status;
  return sa_cuda_launch(function, forward_rows_kernel, blocks(rows), dim3(THREADS), 0, stream, job);
}

int sa_cuda_reference_backward(const sa_problem *p) {
  static const char function[] = "sa_backward";
  const int64_t rows = p->batch * p->heads * p->queries, keys = p->batch * p->key_heads * p->keys;
  const int64_t elements =
      p->dbias.data ? p->bias_shape[0] * p->bias_shape[1] * p->bias_shape[2] * p->bias_shape[3] : 0;
  reference_job job;
  cudaStream_t stream;
  int status = start(function, p, &job, &stream);
  if (status) return status;
  job.rows = (row_sums *)sa_cuda_scratch(function, p->device, (rows ? rows : 1) * (int64_t)sizeof(row_sums));
  if (!job.rows) return SA_NO_MEMORY;
  if (rows) status = sa_cuda_launch(function, backward_rows_kernel, blocks(rows), dim3(THREADS), 0, stream, job);
  if (!status && keys)
    status = sa_cuda_launch(function, backward_keys_kernel, blocks(keys), dim3(THREADS), 0, stream, job);
  if (!status && elements)
    status = sa_cuda_launch(function, backward_bias_kernel, blocks(elements), dim3(THREADS), 0, stream, job);
  if (!status && p->heads && (p->dsinks.data || p->dalibi.data))
    status = sa_cuda_launch(function, backward_heads_kernel, blocks(p->heads), dim3(THREADS), 0, stream, job);
  sa_cuda_scratch_release(p->device, job.rows);
  return status;
}
