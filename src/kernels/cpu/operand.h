// where an element of an operand lies, and how much of a problem is visible
#ifndef SAFEATTN_KERNELS_CPU_OPERAND_H
#define SAFEATTN_KERNELS_CPU_OPERAND_H
#include "backend.h"

static inline int64_t sa_size_of(int dtype) {
  static const int8_t size[] = {[SA_F32] = 4, [SA_F64] = 8, [SA_F16] = 2, [SA_BF16] = 2, [SA_BOOL] = 1};
  return size[dtype];
}

static inline void *sa_at(const sa_operand *x, int64_t batch, int64_t head, int64_t row, int64_t column) {
  const int64_t index = batch * x->stride[0] + head * x->stride[1] + row * x->stride[2] + column * x->stride[3];
  return (char *)x->data + index * sa_size_of(x->dtype);
}

// Visible pairs of all heads, by which work is judged.
static inline double sa_visible_pairs(const sa_problem *p) {
  const double planes = (double)p->plan->batch * (double)p->plan->heads;
  return planes ? (double)p->batch * (double)p->heads / planes * (double)p->plan->visible : 0;
}

#endif
