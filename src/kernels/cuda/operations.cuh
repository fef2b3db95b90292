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
int sa_cuda_follow(const char *function, cudaStream_t later, int later_device, cudaStream_t earlier,
                   int earlier_device);
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

// random.cu
int sa_cuda_draw(sa_tensor *t, uint64_t seed, bool normal, float most);
int sa_cuda_arange(sa_tensor *t, double start, double step);

// stats.cu
int sa_cuda_totals(const sa_tensor *t, double scale, sa_totals *out);
int sa_cuda_all_near(const sa_tensor *a, const sa_tensor *b, const sa_tolerance *wanted, int *result);

// pack.cu
int sa_cuda_pack(const sa_tensor *matrix, double at_most, uint64_t *bits, int64_t words);

// The operations of the tape.
int sa_cuda_unary(int op, const sa_tensor *x, const sa_tensor *y);
int sa_cuda_unary_backward(int op, const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, const sa_tensor *dx);
int sa_cuda_binary(int op, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y);
int sa_cuda_where(const sa_tensor *condition, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y);
int sa_cuda_reduce(int op, const sa_tensor *x, uint32_t dims, const sa_tensor *y);
int sa_cuda_softmax(const sa_tensor *x, int dim, int dead_rows, const sa_tensor *y);
int sa_cuda_softmax_backward(const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, int dim, int dead_rows,
                             const sa_tensor *dx);
int sa_cuda_matmul(const sa_tensor *a, const sa_tensor *b, const sa_tensor *y);
int sa_cuda_merge(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts, const sa_tensor *out,
                  const sa_tensor *lse);
int sa_cuda_merge_backward(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts,
                           const sa_tensor *out, const sa_tensor *lse, const sa_tensor *dout, const sa_tensor *dlse,
                           const sa_tensor *const *douts, const sa_tensor *const *dlses);
int sa_cuda_layernorm(const sa_tensor *x, const sa_tensor *weight, const sa_tensor *bias, double epsilon,
                      const sa_tensor *y);
int sa_cuda_layernorm_backward(const sa_tensor *x, const sa_tensor *weight, double epsilon, const sa_tensor *dy,
                               const sa_tensor *dx, const sa_tensor *dweight, const sa_tensor *dbias);
int64_t sa_cuda_stray_id(const sa_tensor *ids, int64_t base, int64_t count, const int64_t *ignore, int64_t *value);
int sa_cuda_embedding(const sa_tensor *table, const sa_tensor *ids, int64_t base, const sa_tensor *y);
int sa_cuda_embedding_backward(const sa_tensor *ids, int64_t base, const sa_tensor *dy, const sa_tensor *dtable);
int sa_cuda_cross_entropy(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore,
                          const sa_tensor *loss);
int sa_cuda_cross_entropy_backward(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore,
                                   const sa_tensor *dloss, const sa_tensor *dx);
int sa_cuda_adamw(const sa_tensor *parameter, const sa_tensor *gradient, const sa_tensor *moment1,
                  const sa_tensor *moment2, const sa_adamw_options *options);

#endif
