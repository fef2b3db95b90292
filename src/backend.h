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
  int64_t diagonal;  // d of ALiBi: S - L for bottom-right causality, else 0
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

typedef struct sa_backend {
  const char *name;
  void *(*allocate)(const char *function, int64_t bytes);
  void (*release)(void *memory);
  // `to` and `from` have one shape (broadcast dims have stride 0).
  int (*copy)(sa_tensor *to, const sa_tensor *from);
  int (*fill)(sa_tensor *t, double value);
  // The attention kernels for a problem: plain f64 loops, and the fast ones (NULL when they do not cover it).
  const sa_attention_kernels *(*reference)(const sa_problem *p);
  const sa_attention_kernels *(*fused)(const sa_problem *p);
} sa_backend;

// NULL, and an error that names `function` and says what is missing, when the device is not there.
const sa_backend *sa_backend_of(const char *function, int device);

#endif
