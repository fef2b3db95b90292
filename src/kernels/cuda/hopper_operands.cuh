// the operands of a call of attention on Hopper as TMA sees them: whether it can read and write them, and their maps
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_OPERANDS_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_OPERANDS_CUH
#include "kernels/cuda/tensor_map.cuh"

// An operand has the shape [batch, heads, rows, width], of which the problem gives the first.

static inline bool hopper_fits(const sa_problem *p, const sa_operand *x, int64_t heads, int64_t rows, int64_t width) {
  const int64_t shape[4] = {p->batch, heads, rows, width};
  return !x->data || sa_cuda_tensor_map_fits(x, shape);
}

static inline bool hopper_inputs_fit(const sa_problem *p) {
  return hopper_fits(p, &p->q, p->heads, p->queries, p->width) &&
         hopper_fits(p, &p->k, p->key_heads, p->keys, p->width) &&
         hopper_fits(p, &p->v, p->key_heads, p->keys, p->value_width);
}

// The map of an operand in boxes of `box` rows, and, where asked for, the steps of its coordinates (tensor_map.cuh).
static inline int hopper_map(const char *function, const sa_problem *p, CUtensorMap *map, const sa_operand *x,
                             int64_t heads, int64_t rows, int64_t width, int box, int32_t *batch_step,
                             int32_t *head_step, CUtensorMapL2promotion fetched = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  const int64_t shape[4] = {p->batch, heads, rows, width};
  if (!x->data) return SA_OK;
  if (batch_step) *batch_step = sa_cuda_tensor_map_step(x, shape, 0);
  if (head_step) *head_step = sa_cuda_tensor_map_step(x, shape, 1);
  return sa_cuda_tensor_map(function, map, x, shape, box, fetched);
}

#endif
