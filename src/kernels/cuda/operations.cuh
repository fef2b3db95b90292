// memory, streams and the operations of the tape on CUDA devices, for cuda.cu's table; what each does is said at the
// table (backend.h)
#ifndef SAFEATTN_KERNELS_CUDA_OPERATIONS_CUH
#define SAFEATTN_KERNELS_CUDA_OPERATIONS_CUH
#include "kernels/cuda/device.cuh"

// streams.cu
int sa_cuda_synchronize(const char *function, int device);
int sa_cuda_stream_create(const char *function, int device, void **stream);
int sa_cuda_stream_forget(const char *function, int device, void *stream);
int sa_cuda_stream_make_current(const char *function, int device, void *stream);
void *sa_cuda_current_stream(int device);
int sa_cuda_stream_wait(const char *function, int device, void *stream);
// What is asked of `later` from now on waits for what was asked of `earlier`; the streams may be on two devices.
int sa_cuda_follow(const char *function, cudaStream_t later, cudaStream_t earlier, int earlier_device);
// The streams of a device that work may be on. 1: all is on the default stream. `lock` held between the two calls.
int sa_cuda_streams_lock(int device, const cudaStream_t **streams);
void sa_cuda_streams_unlock(void);

// memory.cu
void *sa_cuda_allocate(const char *function, int device, int64_t bytes);
void sa_cuda_release(int device, void *memory);
int sa_cuda_count_memory(const char *function, int device, sa_device_memory *out);
int sa_cuda_drop_cache(const char *function, int device);
// Called before work is put on a second stream: what was released so far is then free on every stream.
int sa_cuda_settle(const char *function, int device);

// copy.cu
int sa_cuda_copy(sa_tensor *to, const sa_tensor *from);
int sa_cuda_fill(sa_tensor *t, double value);

#endif
