// rows of a table by their ids on CUDA devices
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/walk.cuh"

static __device__ __forceinline__ int64_t read_id(const void *ids, int dtype, int64_t at) {
  return dtype == SA_I64 ? ((const int64_t *)ids)[at] : ((const int32_t *)ids)[at];
}

/*  Ids  */

struct search_task {
  const void *ids;
  int dtype;
  int64_t base, count, ignore;
  bool ignores;
  unsigned long long *first;
  __device__ void operator()(int64_t i, const int64_t *at) const {
    const int64_t id = read_id(ids, dtype, at[0]);
    if (ignores && id == ignore) return;
    if (id >= base && (uint64_t)id - (uint64_t)base < (uint64_t)count) return;
    atomicMin(first, (unsigned long long)i);
  }
};

// The element of t at a row-major position.
static int64_t offset_of(const sa_tensor *t, int64_t position) {
  int64_t offset = 0;
  for (int dim = t->ndim - 1; dim >= 0; dim--) {
    offset += position % t->shape[dim] * t->stride[dim];
    position /= t->shape[dim];
  }
  return offset;
}

static int search(const sa_tensor *ids, const search_task &task, int64_t *at, int64_t *value) {
  static const char *const name = "sa_embedding";
  cudaStream_t stream;
  int status = sa_cuda_use(name, ids->device, &stream);
  if (!status) status = sa_cuda_check(name, cudaMemsetAsync(task.first, 0xff, sizeof *task.first, stream));
  if (!status) status = sa_cuda_each<1>(name, ids->device, sa_walk_of(ids, NULL, NULL, NULL, 0, false), task);
  if (!status)
    status = sa_cuda_check(name, cudaMemcpyAsync(at, task.first, sizeof *at, cudaMemcpyDeviceToHost, stream));
  if (!status) status = sa_cuda_check(name, cudaStreamSynchronize(stream));
  if (status || *at < 0) return status;
  int64_t id = 0;
  const int64_t size = sa_element_size(ids->dtype);
  const char *from = (const char *)ids->data + offset_of(ids, *at) * size;
  status = sa_cuda_check(name, cudaMemcpyAsync(&id, from, (size_t)size, cudaMemcpyDeviceToHost, stream));
  if (!status) status = sa_cuda_check(name, cudaStreamSynchronize(stream));
  *value = ids->dtype == SA_I64 ? id : (int32_t)id;
  return status;
}

int64_t sa_cuda_stray_id(const sa_tensor *ids, int64_t base, int64_t count, const int64_t *ignore, int64_t *value) {
  unsigned long long *first = (unsigned long long *)sa_cuda_scratch("sa_embedding", ids->device, sizeof *first);
  if (!first) return -1;  // what reads the ids next finds the device in the same state, and says so
  int64_t at = -1;
  const search_task task = {ids->data, ids->dtype, base, count, ignore ? *ignore : 0, ignore != NULL, first};
  if (search(ids, task, &at, value)) at = -1;
  sa_cuda_scratch_release(ids->device, first);
  return at;
}

/*  Rows  */

// The ids with a last dim along which they stay, so that they have the shape of the rows.
static sa_tensor spread(const sa_tensor *ids, int64_t width) {
  sa_tensor t = *ids;
  t.shape[t.ndim] = width;
  t.stride[t.ndim++] = 0;
  return t;
}

template <class T>
struct gather_task {
  T *y;
  const T *table;
  const void *ids;
  int dtype;
  int64_t base, width, row_step, column_step;
  __device__ void operator()(int64_t i, const int64_t *at) const {
    y[at[0]] = table[(read_id(ids, dtype, at[1]) - base) * row_step + i % width * column_step];
  }
};

template <class T>
static int gather(const sa_tensor *table, const sa_tensor *ids, int64_t base, const sa_tensor *y) {
  const int64_t width = table->shape[1];
  const sa_tensor wide = spread(ids, width);
  return sa_cuda_each<2>("sa_embedding", y->device, sa_walk_of(y, &wide, NULL, NULL, 0, false),
                         gather_task<T>{(T *)y->data, (const T *)table->data, ids->data, ids->dtype, base, width,
                                        table->stride[0], table->stride[1]});
}

int sa_cuda_embedding(const sa_tensor *table, const sa_tensor *ids, int64_t base, const sa_tensor *y) {
  const int64_t size = sa_element_size(y->dtype);
  return (size == 2 ? gather<uint16_t> : size == 4 ? gather<uint32_t> : gather<uint64_t>)(table, ids, base, y);
}

/*  The gradient: a block per row of the table, which adds up the rows of dy that have its id, in their order  */

enum { THREADS = 256 };

struct count_task {
  const void *ids;
  int dtype;
  int64_t base;
  int *count;
  __device__ void operator()(int64_t, const int64_t *at) const {
    atomicAdd(count + (read_id(ids, dtype, at[0]) - base), 1);
  }
};

// The row's sums are kept by its threads, column by column, THREADS columns at a time.
template <class T>
static __global__ void __launch_bounds__(THREADS)
    scatter_kernel(sa_strided places, const void *ids, int ids_dtype, int64_t base, const int *count, const T *dy,
                   int64_t dy_step, T *table, int64_t rows, int64_t width, int64_t row_step, int64_t column_step) {
  using C = decltype(sa_wide(T()));
  __shared__ int64_t from[THREADS];
  __shared__ bool wanted[THREADS];
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x)
    for (int64_t first = 0; first < width; first += THREADS) {
      const int64_t column = first + threadIdx.x;
      C sum = 0;
      int left = count[row];
      for (int64_t i = 0; left > 0; i += THREADS) {
        int64_t at[2] = {0, 0};
        const bool inside = i + threadIdx.x < places.numel;
        if (inside) sa_locate<2>(places, i + threadIdx.x, at);
        const bool mine = inside && read_id(ids, ids_dtype, at[1]) - base == row;
        const int found = __syncthreads_count(mine);
        if (found == 0) continue;
        wanted[threadIdx.x] = mine;
        from[threadIdx.x] = at[0];
        __syncthreads();
        for (int k = 0; k < THREADS && column < width; k++)
          if (wanted[k]) sum += sa_wide(dy[from[k] + column * dy_step]);
        left -= found;
        __syncthreads();
      }
      if (column < width) sa_put(table + row * row_step + column * column_step, sum);
    }
}

int sa_cuda_embedding_backward(const sa_tensor *ids, int64_t base, const sa_tensor *dy, const sa_tensor *dtable) {
  static const char *const name = "sa_embedding_backward";
  const int64_t rows = dtable->shape[0], width = dtable->shape[1];
  if (rows == 0 || width == 0) return SA_OK;
  cudaStream_t stream;
  int status = sa_cuda_use(name, dy->device, &stream);
  if (status) return status;
  int *count = (int *)sa_cuda_scratch(name, dy->device, rows * (int64_t)sizeof *count);
  if (!count) return SA_NO_MEMORY;
  status = sa_cuda_check(name, cudaMemsetAsync(count, 0, (size_t)rows * sizeof *count, stream));
  if (!status)
    status = sa_cuda_each<1>(name, dy->device, sa_walk_of(ids), count_task{ids->data, ids->dtype, base, count});
  const sa_strided places = sa_walk_of(dy, ids, NULL, NULL, UINT32_C(1) << ids->ndim, false);
  if (!status)
    status = sa_with_float(dy->dtype, [&](auto t) {
      using T = decltype(t);
      return sa_cuda_launch(name, scatter_kernel<T>, dim3((unsigned)(rows < 1 << 20 ? rows : 1 << 20)), dim3(THREADS),
                            0, stream, places, (const void *)ids->data, (int)ids->dtype, base, (const int *)count,
                            (const T *)dy->data, dy->stride[dy->ndim - 1], (T *)dtable->data, rows, width,
                            dtable->stride[0], dtable->stride[1]);
    });
  sa_cuda_scratch_release(dy->device, count);
  return status;
}
