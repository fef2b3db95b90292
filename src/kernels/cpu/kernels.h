// what the files of this folder give to the CPU's table
#ifndef SAFEATTN_KERNELS_CPU_KERNELS_H
#define SAFEATTN_KERNELS_CPU_KERNELS_H
#include "backend.h"

// Plain loops in f64 for every legal problem, any mix of f32, f64, f16 and bf16: what the fast kernels are measured by.
const sa_attention_kernels *sa_cpu_reference(const sa_problem *p);

#endif
