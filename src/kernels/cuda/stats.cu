// numbers about whole tensors on CUDA devices: statistics and comparisons
#include "kernels/cuda/group.cuh"
#include "kernels/cuda/operations.cuh"
#include "near.h"

enum { PARTS = 1024 };  // blocks at most: their results are added up on the host, in their order

static __device__ __host__ sa_totals both(const sa_totals &a, const sa_totals &b) {
  return {a.min < b.min ? a.min : b.min,
          a.max > b.max ? a.max : b.max,
          a.sum + b.sum,
          a.squares + b.squares,
          a.nan + b.nan,
          a.posinf + b.posinf,
          a.neginf + b.neginf,
          a.zero + b.zero};
}

struct both_totals {
  __device__ sa_totals operator()(const sa_totals &a, const sa_totals &b) const { return both(a, b); }
};

template <class T>
static __global__ void __launch_bounds__(SA_GROUP_THREADS)
    totals_kernel(sa_strided walk, const T *x, double scale, sa_totals *parts) {
  sa_totals t = {(double)INFINITY, -(double)INFINITY, 0, 0, 0, 0, 0, 0};
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < walk.numel; i += step) {
    int64_t at;
    sa_locate<1>(walk, i, &at);
    const double value = (double)sa_wide(x[at]);
    t.zero += value == 0;
    if (value - value == 0) {
      const double scaled = value * scale;
      t.min = value < t.min ? value : t.min;
      t.max = value > t.max ? value : t.max;
      t.sum += scaled;
      t.squares += scaled * scaled;
    } else {
      t.nan += value != value;
      t.posinf += value > 0;
      t.neginf += value < 0;
    }
  }
  t = sa_group_fold(t, SA_GROUP_THREADS, both_totals());
  if (threadIdx.x == 0) parts[blockIdx.x] = t;
}

int sa_cuda_totals(const sa_tensor *t, double scale, sa_totals *out) {
  static const char *const name = "sa_tensor_stats";
  // In row-major order, so that equal values have equal sums whatever the strides.
  const sa_strided walk = sa_walk_of(t, NULL, NULL, NULL, 0, false);
  *out = {(double)INFINITY, -(double)INFINITY, 0, 0, 0, 0, 0, 0};
  if (walk.numel == 0) return SA_OK;
  cudaStream_t stream;
  int status = sa_cuda_use(name, t->device, &stream);
  if (status) return status;
  const int64_t wanted = (walk.numel + 4 * SA_GROUP_THREADS - 1) / (4 * SA_GROUP_THREADS);
  const int blocks = (int)(wanted < PARTS ? wanted : (int64_t)PARTS);
  sa_totals *parts = (sa_totals *)sa_cuda_scratch(name, t->device, blocks * (int64_t)sizeof *parts);
  sa_totals *here = (sa_totals *)sa_cuda_host->allocate(name, blocks * (int64_t)sizeof *here);
  if (!parts || !here) status = SA_NO_MEMORY;
  if (!status)
    status = sa_with_dtype(t->dtype, [&](auto type) {
      using T = decltype(type);
      return sa_cuda_launch(name, totals_kernel<T>, dim3((unsigned)blocks), dim3(SA_GROUP_THREADS), 0, stream, walk,
                            (const T *)t->data, scale, parts);
    });
  if (!status)
    status = sa_cuda_check(name,
                           cudaMemcpyAsync(here, parts, (size_t)blocks * sizeof *here, cudaMemcpyDeviceToHost, stream));
  if (!status) status = sa_cuda_check(name, cudaStreamSynchronize(stream));
  for (int i = 0; !status && i < blocks; i++) *out = both(*out, here[i]);
  sa_cuda_host->release(here);
  sa_cuda_scratch_release(t->device, parts);
  return status;
}

/*  Comparisons: the dtype is asked for every element, so that there is one kernel for all pairs of them  */

struct elements {
  const void *data;
  int dtype;

  __device__ __forceinline__ int64_t integer(int64_t at) const {
    return dtype == SA_I64   ? ((const int64_t *)data)[at]
           : dtype == SA_I32 ? ((const int32_t *)data)[at]
                             : ((const bool *)data)[at];
  }
  __device__ __forceinline__ double real(int64_t at) const {
    switch (dtype) {
      case SA_F32:
        return ((const float *)data)[at];
      case SA_F64:
        return ((const double *)data)[at];
      case SA_F16:
        return sa_wide(((const sa_f16 *)data)[at]);
      case SA_BF16:
        return sa_wide(((const sa_bf16 *)data)[at]);
      default:
        return (double)integer(at);
    }
  }
};

static bool is_integer(int dtype) {
  return dtype == SA_BOOL || dtype == SA_I32 || dtype == SA_I64;
}

struct near_task {
  elements a, b;
  bool integers;
  sa_tolerance wanted;
  int *apart;
  __device__ void operator()(int64_t, const int64_t *at) const {
    const bool near = integers ? sa_integers_near(a.integer(at[0]), b.integer(at[1]), &wanted)
                               : sa_reals_near(a.real(at[0]), b.real(at[1]), &wanted);
    if (!near) *apart = 1;
  }
};

int sa_cuda_all_near(const sa_tensor *a, const sa_tensor *b, const sa_tolerance *wanted, int *result) {
  static const char *const name = "sa_allclose";
  cudaStream_t stream;
  int status = sa_cuda_use(name, a->device, &stream);
  if (status) return status;
  int *apart = (int *)sa_cuda_scratch(name, a->device, sizeof *apart), found = 0;
  if (!apart) return SA_NO_MEMORY;
  status = sa_cuda_check(name, cudaMemsetAsync(apart, 0, sizeof *apart, stream));
  const sa_strided walk = sa_walk_of(a, b);
  const bool integers = is_integer(a->dtype) && is_integer(b->dtype);
  if (!status)
    status = sa_cuda_each<2>(name, a->device, walk,
                             near_task{{a->data, a->dtype}, {b->data, b->dtype}, integers, *wanted, apart});
  if (!status)
    status = sa_cuda_check(name, cudaMemcpyAsync(&found, apart, sizeof found, cudaMemcpyDeviceToHost, stream));
  if (!status) status = sa_cuda_check(name, cudaStreamSynchronize(stream));
  sa_cuda_scratch_release(a->device, apart);
  *result = !found;
  return status;
}
