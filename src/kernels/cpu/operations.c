// the operations of the tape on the CPU, as its table wants them
#include "kernels/cpu/operations.h"

const sa_operations sa_cpu_operations = {
    .unary = sa_cpu_unary,
    .unary_backward = sa_cpu_unary_backward,
    .binary = sa_cpu_binary,
    .where = sa_cpu_where,
    .reduce = sa_cpu_reduce,
    .softmax = sa_cpu_softmax,
    .softmax_backward = sa_cpu_softmax_backward,
    .matmul = sa_cpu_matmul,
    .merge = sa_cpu_merge,
    .merge_backward = sa_cpu_merge_backward,
    .layernorm = sa_cpu_layernorm,
    .layernorm_backward = sa_cpu_layernorm_backward,
    .stray_id = sa_cpu_stray_id,
    .embedding = sa_cpu_embedding,
    .embedding_backward = sa_cpu_embedding_backward,
    .cross_entropy = sa_cpu_cross_entropy,
    .cross_entropy_backward = sa_cpu_cross_entropy_backward,
    .adamw = sa_cpu_adamw,
};
