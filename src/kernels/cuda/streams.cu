// streams, errors and properties of CUDA devices
#include <pthread.h>
#include <stdio.h>

#include "kernels/cuda/operations.cuh"

const sa_host *sa_cuda_host;

int sa_cuda_check(const char *function, cudaError_t error) {
  if (error == cudaSuccess) return SA_OK;
  cudaGetLastError();  // an error that can be got over is not to be found again by the next call
  const int status = error == cudaErrorMemoryAllocation ? SA_NO_MEMORY : SA_NO_DEVICE;
  return sa_cuda_host->fail(status, function, "CUDA: %s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
}

/*  Properties  */

static sa_cuda_properties properties[SA_CUDA_DEVICES];

static int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

static void read_properties(void) {
  int count = 0;
  cudaGetDeviceCount(&count);
  for (int k = 0; k < count && k < SA_CUDA_DEVICES; k++) {
    properties[k].major = attribute(cudaDevAttrComputeCapabilityMajor, k);
    properties[k].minor = attribute(cudaDevAttrComputeCapabilityMinor, k);
    properties[k].processors = attribute(cudaDevAttrMultiProcessorCount, k);
    properties[k].cache_bytes = attribute(cudaDevAttrL2CacheSize, k);
    properties[k].shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, k);
  }
}

const sa_cuda_properties *sa_cuda_properties_of(int device) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, read_properties);
  return &properties[device - SA_CUDA];
}

/*  Streams
 *
 *  The default is CUDA's own default stream (NULL), so that what other libraries do there and what is done here follow
 *  each other. Every stream that is used is known: memory that is released while there are several waits for all.
 */

enum { STREAMS = 32 };

typedef struct stream_list {
  cudaStream_t stream[STREAMS];  // [0] is the default stream
  bool own[STREAMS];             // made here
  uint32_t *zeros[STREAMS][2];   // few, many; NULL: not asked for yet
  int count;
} stream_list;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static stream_list lists[SA_CUDA_DEVICES];
static thread_local cudaStream_t current[SA_CUDA_DEVICES];

int sa_cuda_streams_lock(int device, const cudaStream_t **streams) {
  pthread_mutex_lock(&lock);
  stream_list *list = &lists[device - SA_CUDA];
  if (!list->count) list->count = 1;
  *streams = list->stream;
  return list->count;
}

void sa_cuda_streams_unlock(void) {
  pthread_mutex_unlock(&lock);
}

static int find(const stream_list *list, cudaStream_t stream) {
  for (int i = 1; i < list->count; i++)
    if (list->stream[i] == stream) return i;
  return 0;
}

static int remember(const char *function, int device, cudaStream_t stream, bool own) {
  const cudaStream_t *streams;
  const int count = sa_cuda_streams_lock(device, &streams);
  stream_list *list = &lists[device - SA_CUDA];
  int status = SA_OK;
  if (stream && !find(list, stream)) {
    if (count == STREAMS) {
      status = sa_cuda_host->fail(SA_INVALID, function,
                                  "stream: got one more than the %d that can be known at a time; release some first",
                                  STREAMS - 1);
    } else {
      list->own[count] = own;
      list->stream[count] = stream;
      list->count = count + 1;
    }
  }
  sa_cuda_streams_unlock();
  if (!status && stream && count == 1) status = sa_cuda_settle(function, device);
  return status;
}

int sa_cuda_use(const char *function, int device, cudaStream_t *stream) {
  *stream = current[device - SA_CUDA];
  return sa_cuda_check(function, cudaSetDevice(device - SA_CUDA));
}

int sa_cuda_zeros(const char *function, int device, int64_t count, uint32_t **zeros) {
  const cudaStream_t *streams, stream = current[device - SA_CUDA];
  sa_cuda_streams_lock(device, &streams);
  stream_list *list = &lists[device - SA_CUDA];
  const bool many = count > SA_CUDA_ZEROS;
  uint32_t **own = &list->zeros[find(list, stream)][many];
  int status = SA_OK;
  if (!*own) {
    const size_t bytes = (many ? count : SA_CUDA_ZEROS) * sizeof **own;
    void *memory = NULL;
    status = sa_cuda_check(function, cudaMalloc(&memory, bytes));
    if (!status) status = sa_cuda_check(function, cudaMemsetAsync(memory, 0, bytes, stream));
    if (status)
      cudaFree(memory);
    else
      *own = (uint32_t *)memory;
  }
  *zeros = *own;
  sa_cuda_streams_unlock();
  return status;
}

int sa_cuda_synchronize(const char *function, int device) {
  const int status = sa_cuda_check(function, cudaSetDevice(device - SA_CUDA));
  return status ? status : sa_cuda_check(function, cudaDeviceSynchronize());
}

int sa_cuda_stream_create(const char *function, int device, void **stream) {
  int status = sa_cuda_check(function, cudaSetDevice(device - SA_CUDA));
  cudaStream_t made;
  if (!status) status = sa_cuda_check(function, cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
  if (status) return status;
  status = remember(function, device, made, true);
  if (status)
    cudaStreamDestroy(made);
  else
    *stream = made;
  return status;
}

int sa_cuda_stream_make_current(const char *function, int device, void *stream) {
  const int status = remember(function, device, (cudaStream_t)stream, false);
  if (!status) current[device - SA_CUDA] = (cudaStream_t)stream;
  return status;
}

void *sa_cuda_current_stream(int device) {
  return current[device - SA_CUDA];
}

int sa_cuda_stream_wait(const char *function, int device, void *stream) {
  const int status = sa_cuda_check(function, cudaSetDevice(device - SA_CUDA));
  return status ? status : sa_cuda_check(function, cudaStreamSynchronize((cudaStream_t)stream));
}

int sa_cuda_stream_forget(const char *function, int device, void *stream) {
  // What is on it must have ended before memory is released without an eye on it.
  int status = sa_cuda_stream_wait(function, device, stream);
  if (status || !stream) return status;
  if (current[device - SA_CUDA] == stream) current[device - SA_CUDA] = NULL;
  const cudaStream_t *streams;
  const int count = sa_cuda_streams_lock(device, &streams);
  stream_list *list = &lists[device - SA_CUDA];
  const int at = find(list, (cudaStream_t)stream);
  const bool own = at && list->own[at];
  if (at) {
    for (int many = 0; many < 2; many++) {
      cudaFree(list->zeros[at][many]);
      list->zeros[at][many] = list->zeros[count - 1][many];
      list->zeros[count - 1][many] = NULL;
    }
    list->stream[at] = list->stream[count - 1];
    list->own[at] = list->own[count - 1];
    list->count = count - 1;
  }
  sa_cuda_streams_unlock();
  return own ? sa_cuda_check(function, cudaStreamDestroy((cudaStream_t)stream)) : SA_OK;
}

int sa_cuda_follow(const char *function, cudaStream_t later, int later_device, cudaStream_t earlier,
                   int earlier_device) {
  // The default stream is that of the current device.
  int status = sa_cuda_check(function, cudaSetDevice(earlier_device - SA_CUDA));
  cudaEvent_t event;
  if (!status) status = sa_cuda_check(function, cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  if (status) return status;
  status = sa_cuda_check(function, cudaEventRecord(event, earlier));
  if (!status) status = sa_cuda_check(function, cudaSetDevice(later_device - SA_CUDA));
  if (!status) status = sa_cuda_check(function, cudaStreamWaitEvent(later, event, 0));
  cudaEventDestroy(event);
  return status;
}
