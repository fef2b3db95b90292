// copies on, to, from and between CUDA devices, and fills
#include <string.h>

#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/walk.cuh"

static const char *const name = "sa_copy";

/*  On one device  */

template <class To, class From>
struct cast_task {
  To *to;
  const From *from;
  __device__ void operator()(int64_t, const int64_t *at) const { sa_put(to + at[0], sa_wide(from[at[1]])); }
};

// The same bits, for elements of so many bytes.
template <class T>
struct move_task {
  T *to;
  const T *from;
  __device__ void operator()(int64_t, const int64_t *at) const { to[at[0]] = from[at[1]]; }
};

template <class T>
static int move(int device, const sa_strided &walk) {
  return sa_cuda_each<2>(name, device, walk, move_task<T>{(T *)walk.data[0], (const T *)walk.data[1]});
}

static bool is_one_row(const sa_strided *walk) {
  return walk->ndim == 1 && (walk->shape[0] == 1 || (walk->step[0][0] == 1 && walk->step[1][0] == 1));
}

static int copy_within(const sa_tensor *to, const sa_tensor *from) {
  const sa_strided walk = sa_walk_of(to, from);
  if (walk.numel == 0) return SA_OK;
  if (to->dtype != from->dtype)
    return sa_with_dtype(to->dtype, [&](auto t) {
      return sa_with_dtype(from->dtype, [&](auto f) {
        using To = decltype(t);
        using From = decltype(f);
        return sa_cuda_each<2>(name, to->device, walk,
                               cast_task<To, From>{(To *)walk.data[0], (const From *)walk.data[1]});
      });
    });
  const int64_t size = walk.size[0];
  if (is_one_row(&walk)) {
    cudaStream_t stream;
    const int status = sa_cuda_use(name, to->device, &stream);
    return status ? status
                  : sa_cuda_check(name, cudaMemcpyAsync(walk.data[0], walk.data[1], (size_t)(walk.numel * size),
                                                        cudaMemcpyDeviceToDevice, stream));
  }
  return size == 1   ? move<uint8_t>(to->device, walk)
         : size == 2 ? move<uint16_t>(to->device, walk)
         : size == 4 ? move<uint32_t>(to->device, walk)
                     : move<uint64_t>(to->device, walk);
}

/*  Between two places: as bytes, by way of a contiguous copy of `from` where it or the dtype asks for one  */

static int64_t numel_of(const sa_tensor *t) {
  int64_t numel = 1;
  for (int dim = 0; dim < t->ndim; dim++) numel *= t->shape[dim];
  return numel;
}

static sa_tensor contiguous_like(const sa_tensor *t, int device, void *data) {
  sa_tensor made = *t;
  made.block = NULL;
  made.data = data;
  made.device = device;
  int64_t stride = 1;
  for (int dim = t->ndim - 1; dim >= 0; dim--) {
    made.stride[dim] = stride;
    stride *= t->shape[dim];
  }
  return made;
}

static bool is_contiguous(const sa_tensor *t) {
  int64_t expected = 1;
  for (int dim = t->ndim - 1; dim >= 0; dim--) {
    if (t->shape[dim] == 1) continue;
    if (t->stride[dim] != expected) return false;
    expected *= t->shape[dim];
  }
  return true;
}

// Both contiguous and of one dtype. The host's memory may be read or freed as soon as this returns, so it waits.
static int move_bytes(const sa_tensor *to, const sa_tensor *from, int64_t bytes) {
  cudaStream_t stream;
  if (to->device == SA_CPU || from->device == SA_CPU) {
    int status = sa_cuda_use(name, to->device == SA_CPU ? from->device : to->device, &stream);
    const cudaMemcpyKind kind = to->device == SA_CPU ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
    if (!status) status = sa_cuda_check(name, cudaMemcpyAsync(to->data, from->data, (size_t)bytes, kind, stream));
    return status ? status : sa_cuda_check(name, cudaStreamSynchronize(stream));
  }
  const cudaStream_t theirs = (cudaStream_t)sa_cuda_current_stream(from->device);
  int status = sa_cuda_use(name, to->device, &stream);
  if (!status) status = sa_cuda_follow(name, stream, to->device, theirs, from->device);
  if (!status)
    status = sa_cuda_check(name, cudaMemcpyPeerAsync(to->data, to->device - SA_CUDA, from->data, from->device - SA_CUDA,
                                                     (size_t)bytes, stream));
  // What is done to `from` next must not come before it has been read.
  return status ? status : sa_cuda_follow(name, theirs, from->device, stream, to->device);
}

static int copy_between(const sa_tensor *to, const sa_tensor *from) {
  const int64_t bytes = numel_of(from) * sa_element_size(from->dtype);
  if (bytes == 0) return SA_OK;
  sa_tensor source = *from, target = *to;
  void *packed = NULL, *landed = NULL;
  int status = SA_OK;
  if (from->device != SA_CPU && !is_contiguous(from)) {
    packed = sa_cuda_allocate(name, from->device, bytes);
    source = contiguous_like(from, from->device, packed);
    status = packed ? copy_within(&source, from) : SA_NO_MEMORY;
  }
  // What comes to the host is cast before, what comes from there after.
  if (!status && to->device == SA_CPU && to->dtype != from->dtype) {
    landed = sa_cuda_allocate(name, from->device, numel_of(to) * sa_element_size(to->dtype));
    const sa_tensor wide = contiguous_like(to, from->device, landed);
    status = landed ? copy_within(&wide, &source) : SA_NO_MEMORY;
    source = wide;
  } else if (!status && to->device != SA_CPU && (to->dtype != from->dtype || !is_contiguous(to))) {
    landed = sa_cuda_allocate(name, to->device, bytes);
    target = contiguous_like(from, to->device, landed);
    status = landed ? SA_OK : SA_NO_MEMORY;
  }
  if (!status) status = move_bytes(&target, &source, numel_of(&source) * sa_element_size(source.dtype));
  if (!status && target.data != to->data) status = copy_within(to, &target);
  if (packed) sa_cuda_release(from->device, packed);
  if (landed) sa_cuda_release(to->device == SA_CPU ? from->device : to->device, landed);
  return status;
}

int sa_cuda_copy(sa_tensor *to, const sa_tensor *from) {
  return to->device == from->device ? copy_within(to, from) : copy_between(to, from);
}

/*  Fills  */

template <class T>
struct fill_task {
  T *to;
  T value;
  __device__ void operator()(int64_t, const int64_t *at) const { to[at[0]] = value; }
};

template <class T>
static int fill_with(const sa_tensor *t, T value) {
  const sa_strided walk = sa_walk_of(t);
  return sa_cuda_each<1>("sa_fill", t->device, walk, fill_task<T>{(T *)walk.data[0], value});
}

int sa_cuda_fill(sa_tensor *t, double value) {
  switch (t->dtype) {
    case SA_F32:
      return fill_with(t, (float)value);
    case SA_F64:
      return fill_with(t, value);
    case SA_F16:
      return fill_with(t, sa_f64_to_f16(value));
    case SA_BF16:
      return fill_with(t, sa_f64_to_bf16(value));
    case SA_BOOL:
      return fill_with(t, (uint8_t)(value != 0));
    case SA_I32:
      return fill_with(t, sa_f64_to_i32(value));
    default:
      return fill_with(t, sa_f64_to_i64(value));
  }
}
