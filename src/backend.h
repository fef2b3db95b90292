// the table a device fills: memory, copies, kernels. Callers have checked everything; nothing here checks again
#ifndef SAFEATTN_BACKEND_H
#define SAFEATTN_BACKEND_H
#include "plan.h"
#include "safeattn.h"
#include "threads.h"

// A rank-4 operand whose last dim has unit stride (or size 1). A broadcast dim has stride 0.
typedef struct sa_operand {
  void *data;  // NULL: absent
  int32_t dtype;
  int64_t stride[4];  // batch, head, row, column; in elements
} sa_operand;

// One checked call of attention. Scores, LSE and delta are f32, or f64 when the dtype is f64.
typedef struct sa_problem {
  int64_t batch, heads, key_heads, queries, keys, width, value_width;  // B H Hkv L S E Ev
  int32_t dtype;
  const sa_plan *plan;
  sa_operand q, k, v, bias, sinks, alibi;  // sinks and alibi: stride[1] runs over heads
  double scale, softcap, dropout;
  uint64_t seed;
  int32_t device;         // that every operand is on
  int32_t deterministic;  // the same bits every time
  int64_t diagonal;       // d of ALiBi: S - L for bottom-right causality, else 0
  // forward writes, backward reads
  sa_operand out, lse, dead;  // lse and dead [B,H,L] have stride[2] along rows, stride[3] unused; dead may be absent
  sa_operand weights;         // written by forward, or absent
  // backward
  sa_operand dout, dlse;                         // either may be absent (zeros)
  sa_operand dq, dk, dv, dbias, dsinks, dalibi;  // absent ones are not wanted; a broadcast dim of dbias has stride 0
  int64_t bias_shape[4];                         // of bias and dbias, 1 where broadcast
} sa_problem;

typedef struct sa_attention_kernels {
  const char *name;                     // "fused-f32-avx512"
  int (*forward)(const sa_problem *p);  // a status: SA_OK or SA_NO_MEMORY
  int (*backward)(const sa_problem *p);
} sa_attention_kernels;

// The operations of the tape. The tensors of a call have one shape (broadcast dims have stride 0) unless it says more.
// An output lies apart from the inputs, or has the very elements of one in the pointwise operations. Each gives a
// status: SA_OK or SA_NO_MEMORY.
typedef struct sa_operations {
  int (*unary)(int op, const sa_tensor *x, const sa_tensor *y);
  int (*unary_backward)(int op, const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy,
                        const sa_tensor *dx);  // x or y is NULL when the op does not read it
  // Equal dtypes, or one of them is a scalar: all strides 0, device SA_CPU wherever the other is, f32 beside halves.
  int (*binary)(int op, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y);
  int (*where)(const sa_tensor *condition, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y);
  int (*reduce)(int op, const sa_tensor *x, uint32_t dims, const sa_tensor *y);  // y keeps the dims as 1
  int (*softmax)(const sa_tensor *x, int dim, int dead_rows, const sa_tensor *y);
  int (*softmax_backward)(const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, int dim, int dead_rows,
                          const sa_tensor *dx);
  int (*matmul)(const sa_tensor *a, const sa_tensor *b, const sa_tensor *y);  // of one rank and one batch
  int (*merge)(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts, const sa_tensor *out,
               const sa_tensor *lse);
  int (*merge_backward)(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts, const sa_tensor *out,
                        const sa_tensor *lse, const sa_tensor *dout, const sa_tensor *dlse,
                        const sa_tensor *const *douts, const sa_tensor *const *dlses);
  int (*layernorm)(const sa_tensor *x, const sa_tensor *weight, const sa_tensor *bias, double epsilon,
                   const sa_tensor *y);
  int (*layernorm_backward)(const sa_tensor *x, const sa_tensor *weight, double epsilon, const sa_tensor *dy,
                            const sa_tensor *dx, const sa_tensor *dweight, const sa_tensor *dbias);
  // The row-major position of the first id that is neither in base .. base + count - 1 nor *ignore (NULL: none is
  // ignored), and its value; -1 when there is no such id; -1 - status when the device could not look.
  int64_t (*stray_id)(const sa_tensor *ids, int64_t base, int64_t count, const int64_t *ignore, int64_t *value);
  int (*embedding)(const sa_tensor *table, const sa_tensor *ids, int64_t base, const sa_tensor *y);
  int (*embedding_backward)(const sa_tensor *ids, int64_t base, const sa_tensor *dy, const sa_tensor *dtable);
  int (*cross_entropy)(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore, const sa_tensor *loss);
  int (*cross_entropy_backward)(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore,
                                const sa_tensor *dloss, const sa_tensor *dx);
  int (*adamw)(const sa_tensor *parameter, const sa_tensor *gradient, const sa_tensor *moment1,
               const sa_tensor *moment2, const sa_adamw_options *options);
} sa_operations;

// What is only asked of a device with streams and a memory of its own. `device` is an sa_tensor's.
typedef struct sa_device_control {
  int (*synchronize)(const char *function, int device);
  int (*memory)(const char *function, int device, sa_device_memory *out);
  int (*empty_cache)(const char *function, int device);
  int (*stream_new)(const char *function, int device, void **stream);
  int (*stream_release)(const char *function, int device, void *stream);
  int (*stream_use)(const char *function, int device, void *stream);
  void *(*stream_current)(int device);
  int (*stream_synchronize)(const char *function, int device, void *stream);
} sa_device_control;

// Of scale * value over the finite elements (min and max without the scale: infinite when there are none), and counts.
typedef struct sa_totals {
  double min, max, sum, squares;
  int64_t nan, posinf, neginf, zero;
} sa_totals;

typedef struct sa_tolerance {
  double absolute, relative;
  bool equal_nan;
} sa_tolerance;

typedef struct sa_backend {
  const char *name;
  int32_t count;     // of its devices
  const char *text;  // what it says of them
  void *(*allocate)(const char *function, int device, int64_t bytes);
  void (*release)(int device, void *memory);
  // `to` and `from` have one shape (broadcast dims have stride 0). One of them may be on the CPU, and is contiguous
  // then.
  int (*copy)(sa_tensor *to, const sa_tensor *from);
  int (*fill)(sa_tensor *t, double value);
  // NULL: the core does these on the CPU, by way of copies.
  int (*draw)(sa_tensor *t, uint64_t seed, bool normal, float most);  // random.h; uniform ones are at most `most`
  int (*arange)(sa_tensor *t, double start, double step);
  int (*totals)(const sa_tensor *t, double scale, sa_totals *out);
  // Whether all elements of two tensors of one shape are near: sa_allclose.
  int (*all_near)(const sa_tensor *a, const sa_tensor *b, const sa_tolerance *wanted, int *result);
  // Bit k % 64 of word k / 64 of each row: whether element k is visible (a bool that is set, a float not <= at_most),
  // of a matrix with so many rows and columns; `bits` is on the host and zeroed, a row has `words` of them.
  int (*pack)(const sa_tensor *matrix, double at_most, uint64_t *bits, int64_t words);
  // The attention kernels for a problem: plain f64 loops, and the fast ones (NULL when they do not cover it).
  const sa_attention_kernels *(*reference)(const sa_problem *p);
  const sa_attention_kernels *(*fused)(const sa_problem *p, bool backward);
  const sa_operations *operations;
  const sa_device_control *control;  // NULL: there is nothing to control
} sa_backend;

// What the library of a device may ask of the core, which it does not link.
typedef struct sa_host {
  int64_t layout;  // SA_LAYOUT of the core: a library built from other sources is not to be used
  int (*fail)(int status, const char *function, const char *format, ...) __attribute__((format(printf, 3, 4)));
  void *(*allocate)(const char *function, int64_t bytes);  // the core's own counted memory
  void (*release)(void *memory);
  bool (*interrupted)(void);  // whether sa_interrupt() asked the calls at work to end
  // What a device keeps with a plan: the copy for `device` that was attached before (or NULL), and a new one, which
  // `drop` releases when the plan goes. Attaching returns the copy to use: another thread's, when it was faster (the
  // new one is then dropped), or NULL when memory is refused (nothing is dropped).
  void *(*plan_copy)(const sa_plan *plan, int device);
  void *(*attach_plan_copy)(const sa_plan *plan, int device, void *copy, void (*drop)(void *copy));
} sa_host;

enum { SA_LAYOUT = sizeof(sa_problem) + 1021 * sizeof(sa_backend) + 65521 * sizeof(sa_host) };

// What the library of the CUDA devices exports. NULL, and why in `message`, when there are no devices.
typedef const sa_backend *(*sa_cuda_opener)(const sa_host *host, char *message, int64_t size);

extern const sa_backend sa_cpu_backend;

// What sa_info() says of CUDA.
const char *sa_describe_cuda(void);

// NULL, and an error that names `function` and says what is missing, when the device is not there.
const sa_backend *sa_backend_of(const char *function, int device);

#endif
