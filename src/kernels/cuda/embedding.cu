// rows of a table by their ids on CUDA devices
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/walk.cuh"

struct id_list {
  const void *data;
  bool wide;  // i64, not i32
  __device__ __forceinline__ int64_t at(int64_t place) const {
    return wide ? ((const int64_t *)data)[place] : ((const int32_t *)data)[place];
  }
};

static id_list ids_of(const sa_tensor *ids) {
  id_list made;
  made.data = ids->data;
  made.wide = ids->dtype == SA_I64;
  return made;
}

/*  Ids  */

struct stray_task {
  id_list ids;
  int64_t base, count, ignored;
  bool ignores;
  unsigned long long *first;
  __device__ void operator()(int64_t i, const int64_t *at) const {
    const int64_t id = ids.at(at[0]);
    if (ignores && id == ignored) return;
    if (id >= base && (uint64_t)id - (uint64_t)base < (uint64_t)count) return;
    atomicMin(first, (unsigned long long)i);
  }
};

static int find_stray(const stray_task &task, const sa_strided &walk, int device, int64_t *first) {
  const char *const name = "sa_embedding";
  cudaStream_t stream;
  int status = sa_cuda_use(name, device, &stream);
  if (!status) status = sa_cuda_check(name, cudaMemsetAsync(task.first, 0xff, sizeof *task.first, stream));
  if (!status) status = sa_cuda_each<1>(name, device, walk, task);
  if (!status)
    status = sa_cuda_check(name, cudaMemcpyAsync(first, task.first, sizeof *first, cudaMemcpyDeviceToHost, stream));
  return status ? status : sa_cuda_check(name, cudaStreamSynchronize(stream));
}

static int read_id(const sa_tensor *ids, int64_t position, int64_t *value) {
  sa_tensor element = *ids, number = {};
  int64_t offset = 0;
  for (int dim = ids->ndim - 1; dim >= 0; dim--) {
    offset += position % ids->shape[dim] * ids->stride[dim];
    position /= ids->shape[dim];
  }
  element.ndim = 0;
  element.data = (char *)ids->data + offset * sa_element_size(ids->dtype);
  number.data = value;
  number.dtype = SA_I64;
  number.device = SA_CPU;
  return sa_cuda_copy(&number, &element);
}

int64_t sa_cuda_stray_id(const sa_tensor *ids, int64_t base, int64_t count, const int64_t *ignore, int64_t *value) {
  const sa_strided walk = sa_walk_of(ids, NULL, NULL, NULL, 0, false);
  if (walk.numel == 0) return -1;
  stray_task task = {ids_of(ids), base, count, ignore ? *ignore : 0, ignore != NULL, NULL};
  task.first = (unsigned long long *)sa_cuda_scratch("sa_embedding", ids->device, sizeof *task.first);
  if (!task.first) return -1 - SA_NO_MEMORY;
  int64_t first = -1;
  int status = find_stray(task, walk, ids->device, &first);
  sa_cuda_scratch_release(ids->device, task.first);
  if (!status && first >= 0) status = read_id(ids, first, value);
  return status ? -1 - status : first;
}

/*  Rows  */

template <class T>
struct gather_task {
  T *y;
  const T *table;
  id_list ids;
  int64_t base, row_step;
  __device__ void operator()(int64_t, const int64_t *at) const {
    y[at[0]] = table[(ids.at(at[1]) - base) * row_step + at[2]];
  }
};

// A view in the shape of y that repeats itself along all dims, but for the last one with this stride.
static sa_tensor along_columns(const sa_tensor *y, int64_t stride) {
  sa_tensor view = *y;
  for (int dim = 0; dim < y->ndim; dim++) view.stride[dim] = 0;
  view.stride[y->ndim - 1] = stride;
  return view;
}

template <class T>
static int gather(const sa_tensor *table, const sa_tensor *ids, int64_t base, const sa_tensor *y) {
  sa_tensor rows = *ids;
  rows.ndim = y->ndim;
  rows.shape[ids->ndim] = y->shape[ids->ndim];
  rows.stride[ids->ndim] = 0;
  const sa_tensor columns = along_columns(y, table->stride[1]);
  const gather_task<T> task = {(T *)y->data, (const T *)table->data, ids_of(ids), base, table->stride[0]};
  return sa_cuda_each<3>("sa_embedding", y->device, sa_walk_of(y, &rows, &columns), task);
}

int sa_cuda_embedding(const sa_tensor *table, const sa_tensor *ids, int64_t base, const sa_tensor *y) {
  const int64_t size = sa_element_size(y->dtype);
  return size == 1   ? gather<uint8_t>(table, ids, base, y)
         : size == 2 ? gather<uint16_t>(table, ids, base, y)
         : size == 4 ? gather<uint32_t>(table, ids, base, y)
                     : gather<uint64_t>(table, ids, base, y);
}

/*  The gradient: a row of the table adds up the rows of dy whose id it is, in their order, between the first and the
 *  last of them
 */

struct range {
  unsigned long long first;
  long long last;  // -1: no such id
};

struct range_task {
  id_list ids;
  int64_t base;
  int64_t *row;  // of the table, for each id in row-major order
  range *ranges;
  __device__ void operator()(int64_t i, const int64_t *at) const {
    const int64_t id = ids.at(at[0]) - base;
    row[i] = id;
    atomicMin(&ranges[id].first, (unsigned long long)i);
    atomicMax(&ranges[id].last, (long long)i);
  }
};

enum { THREADS = 256 };  // of a block

// Columns that a thread adds up at a time.
template <class T>
struct columns {
  enum { COUNT = sizeof(decltype(sa_wide(T()))) == 8 ? 2 : 4 };
};

template <class T>
struct scatter_job {
  sa_strided walk;  // over rows of dy
  const int64_t *row;
  const range *ranges;
  const T *dy;
  T *dtable;
  int64_t rows, width, dy_step, row_step, column_step;
};

// The places in dy of those of the ids at positions from .. from + 255 that are `row`, in order; gives their count.
template <class T>
static __device__ __forceinline__ int collect(const scatter_job<T> &job, int64_t row, int64_t from, int64_t last,
                                              int64_t *places, int *counts) {
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const int64_t position = from + threadIdx.x;
  const bool found = position <= last && job.row[position] == row;
  const unsigned votes = __ballot_sync(~0u, found);
  if (lane == 0) counts[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1)), all = 0;
  for (int k = 0; k < THREADS / 32; k++) {
    if (k < warp) before += counts[k];
    all += counts[k];
  }
  if (found) sa_locate<1>(job.walk, position, places + before);
  __syncthreads();
  return all;
}

template <class T>
static __global__ void __launch_bounds__(THREADS) scatter_kernel(const __grid_constant__ scatter_job<T> job) {
  __shared__ int64_t places[THREADS];
  __shared__ int counts[THREADS / 32];
  enum { COLUMNS = columns<T>::COUNT };
  const int64_t at_once = COLUMNS * THREADS;
  const int64_t column = (int64_t)blockIdx.y * at_once + threadIdx.x;
  for (int64_t row = blockIdx.x; row < job.rows; row += gridDim.x) {
    const range here = job.ranges[row];
    decltype(sa_wide(T())) sum[COLUMNS] = {0};
    for (int64_t from = (int64_t)here.first; here.last >= 0 && from <= here.last; from += THREADS) {
      const int count = collect(job, row, from, here.last, places, counts);
      for (int k = 0; k < count; k++) {
        const T *dy = job.dy + places[k];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          const int64_t i = column + c * THREADS;
          if (i < job.width) sum[c] += sa_wide(dy[i * job.dy_step]);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
      const int64_t i = column + c * THREADS;
      if (i < job.width) sa_put(job.dtable + row * job.row_step + i * job.column_step, sum[c]);
    }
  }
}

// -1 as a position is beyond all for `first`, and before all for `last`.
static int find_ranges(const char *name, const sa_tensor *ids, const sa_strided &walk, const range_task &task,
                       int64_t rows, cudaStream_t stream) {
  const int status =
      sa_cuda_check(name, cudaMemsetAsync(task.ranges, 0xff, (size_t)rows * sizeof *task.ranges, stream));
  return status ? status : sa_cuda_each<1>(name, ids->device, walk, task);
}

int sa_cuda_embedding_backward(const sa_tensor *ids, int64_t base, const sa_tensor *dy, const sa_tensor *dtable) {
  const char *const name = "sa_embedding_backward";
  const int64_t rows = dtable->shape[0], width = dtable->shape[1];
  if (rows == 0 || width == 0) return SA_OK;
  cudaStream_t stream;
  int status = sa_cuda_use(name, dy->device, &stream);
  if (status) return status;
  const sa_strided walk = sa_walk_of(ids, NULL, NULL, NULL, 0, false);
  const int64_t range_bytes = rows * (int64_t)sizeof(range);
  char *scratch = (char *)sa_cuda_scratch(name, dy->device, range_bytes + walk.numel * (int64_t)sizeof(int64_t));
  if (!scratch) return SA_NO_MEMORY;
  const range_task ranges = {ids_of(ids), base, (int64_t *)(scratch + range_bytes), (range *)scratch};
  status = find_ranges(name, ids, walk, ranges, rows, stream);
  if (!status)
    status = sa_with_float(dy->dtype, [&](auto t) {
      using T = decltype(t);
      scatter_job<T> job;
      job.walk = sa_walk_of(dy, NULL, NULL, NULL, UINT32_C(1) << ids->ndim, false);
      job.row = ranges.row;
      job.ranges = ranges.ranges;
      job.dy = (const T *)dy->data;
      job.dtable = (T *)dtable->data;
      job.rows = rows;
      job.width = width;
      job.dy_step = dy->stride[ids->ndim];
      job.row_step = dtable->stride[0];
      job.column_step = dtable->stride[1];
      const int64_t at_once = columns<T>::COUNT * THREADS, pieces = (width + at_once - 1) / at_once;
      return sa_cuda_launch(name, scatter_kernel<T>,
                            dim3((unsigned)sa_cuda_blocks(dy->device, rows * THREADS), (unsigned)pieces), dim3(THREADS),
                            0, stream, job);
    });
  sa_cuda_scratch_release(dy->device, scratch);
  return status;
}
