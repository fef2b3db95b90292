// merging attention over parts of the keys, and its gradient, on CUDA devices: in f64, a group of threads a row
#include "kernels/cuda/group.cuh"
#include "kernels/cuda/operations.cuh"

// The rows of one tensor: a row is found by its row-major index in the shape of an LSE. data NULL: absent.
typedef struct rows {
  void *data;
  int64_t stride[SA_MAX_DIMS];
  int64_t step;  // along a row
} rows;

typedef struct part {
  rows out, lse, dout, dlse;
} part;

typedef struct job {
  int64_t parts, count, width;
  int ndim;
  int64_t shape[SA_MAX_DIMS];
  rows out, lse, dout, dlse;
  const part *from;  // on the device
  int group;
} job;

static __device__ __forceinline__ int64_t place_of(const job &j, const rows &r, int64_t row) {
  int64_t offset = 0;
  for (int dim = j.ndim - 1; dim >= 0; dim--) {
    const int64_t above = row / j.shape[dim];
    offset += (row - above * j.shape[dim]) * r.stride[dim];
    row = above;
  }
  return offset;
}

template <class R>
static __device__ __forceinline__ double number(const job &j, const rows &r, int64_t row) {
  return (double)((const R *)r.data)[place_of(j, r, row)];
}

// log sum_p exp(lse_p). Only parts that saw something take part, so that -inf comes of nothing else.
template <class R>
static __device__ double merged_lse(const job &j, int64_t row) {
  double greatest = -(double)INFINITY, sum = 0;
  bool dead = true;
  for (int64_t p = 0; p < j.parts; p++) {
    const double lse = number<R>(j, j.from[p].lse, row);
    if (lse > greatest) greatest = lse;
    if (!(lse == -(double)INFINITY)) dead = false;
  }
  if (dead) return -(double)INFINITY;
  for (int64_t p = 0; p < j.parts; p++) {
    const double lse = number<R>(j, j.from[p].lse, row);
    if (!(lse == -(double)INFINITY)) sum += exp(lse - greatest);
  }
  return greatest + log(sum);
}

template <class T, class R>
static __global__ void __launch_bounds__(SA_GROUP_THREADS) merge_kernel(job j) {
  const int lane = threadIdx.x & (j.group - 1);
  SA_EACH_ITEM(row, live, j.count, j.group) {
    if (!live) continue;
    const double merged = merged_lse<R>(j, row);
    if (lane == 0) sa_put((R *)j.lse.data + place_of(j, j.lse, row), merged);
    T *const out = (T *)j.out.data + place_of(j, j.out, row);
    for (int64_t i = lane; i < j.width; i += j.group) {
      double sum = 0;
      for (int64_t p = 0; p < j.parts; p++) {
        const rows &out_p = j.from[p].out;
        const double lse = number<R>(j, j.from[p].lse, row);
        if (lse == -(double)INFINITY) continue;
        sum += exp(lse - merged) * (double)sa_wide(((const T *)out_p.data)[place_of(j, out_p, row) + i * out_p.step]);
      }
      sa_put(out + i * j.out.step, sum);
    }
  }
}

// dout . out_p; called by every thread of the block.
template <class T>
static __device__ double projected(const job &j, const part &p, int64_t row, bool wanted, int lane) {
  double sum = 0;
  if (wanted && j.dout.data) {
    const T *const out = (const T *)p.out.data + place_of(j, p.out, row);
    const T *const dout = (const T *)j.dout.data + place_of(j, j.dout, row);
    for (int64_t i = lane; i < j.width; i += j.group)
      sum += (double)sa_wide(dout[i * j.dout.step]) * (double)sa_wide(out[i * p.out.step]);
  }
  return sa_group_sum(sum, j.group);
}

// dout_p = w_p dout and dlse_p = w_p (dlse + dout . (out_p - out)), w_p = exp(lse_p - lse). lse and dout . out are made
// again from the parts: what the caller holds of them is rounded. A part, or a row, that saw nothing reads no slope.
template <class T, class R>
static __global__ void __launch_bounds__(SA_GROUP_THREADS) slope_kernel(job j) {
  const int lane = threadIdx.x & (j.group - 1);
  SA_EACH_ITEM(row, live, j.count, j.group) {
    const double merged = live ? merged_lse<R>(j, row) : -(double)INFINITY;
    const double dlse = j.dlse.data && !(merged == -(double)INFINITY) ? number<R>(j, j.dlse, row) : 0;
    double out_slope = 0;
    for (int64_t p = 0; p < j.parts; p++) {
      const double lse = live ? number<R>(j, j.from[p].lse, row) : -(double)INFINITY;
      const bool seen = !(lse == -(double)INFINITY);
      const double slope = projected<T>(j, j.from[p], row, seen, lane);
      if (seen) out_slope += exp(lse - merged) * slope;
    }
    for (int64_t p = 0; p < j.parts; p++) {
      const part &to = j.from[p];
      const double lse = live ? number<R>(j, to.lse, row) : -(double)INFINITY;
      const bool seen = !(lse == -(double)INFINITY);
      const double slope = projected<T>(j, to, row, seen, lane);
      if (!live) continue;
      const double weight = seen ? exp(lse - merged) : 0;
      if (to.dlse.data && lane == 0)
        sa_put((R *)to.dlse.data + place_of(j, to.dlse, row), seen ? weight * (dlse + (slope - out_slope)) : 0.0);
      if (!to.dout.data) continue;
      T *const dout = (T *)to.dout.data + place_of(j, to.dout, row);
      const T *const from = j.dout.data ? (const T *)j.dout.data + place_of(j, j.dout, row) : NULL;
      for (int64_t i = lane; i < j.width; i += j.group)
        sa_put(dout + i * to.dout.step, seen && from ? weight * (double)sa_wide(from[i * j.dout.step]) : 0.0);
    }
  }
}

static rows rows_of(const sa_tensor *t, int dims) {
  rows r = {};
  if (!t) return r;
  r.data = t->data;
  for (int dim = 0; dim < dims; dim++) r.stride[dim] = t->stride[dim];
  r.step = t->ndim > dims ? t->stride[dims] : 0;
  return r;
}

static int run(const char *function, job j, const part *parts, const sa_tensor *out, const sa_tensor *lse,
               bool backward) {
  j.ndim = lse->ndim;
  j.count = 1;
  for (int dim = 0; dim < j.ndim; dim++) {
    j.shape[dim] = lse->shape[dim];
    j.count *= j.shape[dim];
  }
  j.width = out->shape[out->ndim - 1];
  j.group = sa_group_size(j.width, j.count, false);
  if (j.count == 0) return SA_OK;
  cudaStream_t stream;
  int status = sa_cuda_use(function, out->device, &stream);
  if (status) return status;
  const int64_t bytes = j.parts * (int64_t)sizeof(part);
  part *there = (part *)sa_cuda_scratch(function, out->device, bytes);
  if (!there) return SA_NO_MEMORY;
  j.from = there;
  status = sa_cuda_check(function, cudaMemcpyAsync(there, parts, (size_t)bytes, cudaMemcpyHostToDevice, stream));
  if (!status) status = sa_cuda_check(function, cudaStreamSynchronize(stream));
  const dim3 blocks(sa_group_blocks(out->device, j.count, j.group));
  if (!status)
    status = sa_with_float(out->dtype, [&](auto t) {
      using T = decltype(t);
      using R = decltype(sa_wide(T()));
      return sa_cuda_launch(function, backward ? slope_kernel<T, R> : merge_kernel<T, R>, blocks,
                            dim3(SA_GROUP_THREADS), 0, stream, j);
    });
  sa_cuda_scratch_release(out->device, there);
  return status;
}

int sa_cuda_merge(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts, const sa_tensor *out,
                  const sa_tensor *lse) {
  static const char *const name = "sa_merge";
  part *list = (part *)sa_cuda_host->allocate(name, parts * (int64_t)sizeof *list);
  if (!list) return SA_NO_MEMORY;
  const int dims = lse->ndim;
  for (int64_t p = 0; p < parts; p++) list[p] = {rows_of(outs[p], dims), rows_of(lses[p], dims), {}, {}};
  job j = {};
  j.parts = parts;
  j.out = rows_of(out, dims);
  j.lse = rows_of(lse, dims);
  const int status = run(name, j, list, out, lse, false);
  sa_cuda_host->release(list);
  return status;
}

int sa_cuda_merge_backward(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts,
                           const sa_tensor *out, const sa_tensor *lse, const sa_tensor *dout, const sa_tensor *dlse,
                           const sa_tensor *const *douts, const sa_tensor *const *dlses) {
  static const char *const name = "sa_merge_backward";
  part *list = (part *)sa_cuda_host->allocate(name, parts * (int64_t)sizeof *list);
  if (!list) return SA_NO_MEMORY;
  const int dims = lse->ndim;
  for (int64_t p = 0; p < parts; p++)
    list[p] = {rows_of(outs[p], dims), rows_of(lses[p], dims), rows_of(douts[p], dims), rows_of(dlses[p], dims)};
  job j = {};
  j.parts = parts;
  j.dout = rows_of(dout, dims);
  j.dlse = rows_of(dlse, dims);
  const int status = run(name, j, list, out, lse, true);
  sa_cuda_host->release(list);
  return status;
}
