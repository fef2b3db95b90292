// the operations of the tape on the CPU, for its table; what each does is said at the table (backend.h)
#ifndef SAFEATTN_KERNELS_CPU_OPERATIONS_H
#define SAFEATTN_KERNELS_CPU_OPERATIONS_H
#include "backend.h"

extern const sa_operations sa_cpu_operations;

int sa_cpu_unary(int op, const sa_tensor *x, const sa_tensor *y);
int sa_cpu_unary_backward(int op, const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, const sa_tensor *dx);
int sa_cpu_binary(int op, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y);
int sa_cpu_where(const sa_tensor *condition, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y);
int sa_cpu_reduce(int op, const sa_tensor *x, uint32_t dims, const sa_tensor *y);
int sa_cpu_softmax(const sa_tensor *x, int dim, int dead_rows, const sa_tensor *y);
int sa_cpu_softmax_backward(const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, int dim, int dead_rows,
                            const sa_tensor *dx);
int sa_cpu_matmul(const sa_tensor *a, const sa_tensor *b, const sa_tensor *y);
int sa_cpu_merge(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts, const sa_tensor *out,
                 const sa_tensor *lse);
int sa_cpu_merge_backward(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts,
                          const sa_tensor *out, const sa_tensor *lse, const sa_tensor *dout, const sa_tensor *dlse,
                          const sa_tensor *const *douts, const sa_tensor *const *dlses);
int sa_cpu_layernorm(const sa_tensor *x, const sa_tensor *weight, const sa_tensor *bias, double epsilon,
                     const sa_tensor *y);
int sa_cpu_layernorm_backward(const sa_tensor *x, const sa_tensor *weight, double epsilon, const sa_tensor *dy,
                              const sa_tensor *dx, const sa_tensor *dweight, const sa_tensor *dbias);
int64_t sa_cpu_stray_id(const sa_tensor *ids, int64_t base, int64_t count, const int64_t *ignore, int64_t *value);
int sa_cpu_embedding(const sa_tensor *table, const sa_tensor *ids, int64_t base, const sa_tensor *y);
int sa_cpu_embedding_backward(const sa_tensor *ids, int64_t base, const sa_tensor *dy, const sa_tensor *dtable);
int sa_cpu_cross_entropy(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore, const sa_tensor *loss);
int sa_cpu_cross_entropy_backward(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore,
                                  const sa_tensor *dloss, const sa_tensor *dx);
int sa_cpu_adamw(const sa_tensor *parameter, const sa_tensor *gradient, const sa_tensor *moment1,
                 const sa_tensor *moment2, const sa_adamw_options *options);

#endif
