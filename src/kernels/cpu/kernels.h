// what the files of this folder give to the CPU's table
#ifndef SAFEATTN_KERNELS_CPU_KERNELS_H
#define SAFEATTN_KERNELS_CPU_KERNELS_H
#include "backend.h"

// Plain loops in f64 for every legal problem, any mix of f32, f64, f16 and bf16: what the fast kernels are measured by.
const sa_attention_kernels *sa_cpu_reference(const sa_problem *p);

// The fast kernels of one ISA. The float ones serve f16 and bf16 too, whose tiles they convert.
enum { SA_FUSED_WIDTH = 256 };  // E and Ev up to this

// What an ISA has no better one of is NULL.
typedef struct sa_cpu_kernels {
  sa_attention_kernels fused[4];  // by sa_dtype: f32, f64, f16, bf16
  // Fused multiply-adds from registers, for a moment; returns how many flops that was.
  double (*multiply)(int dtype);
  // A read of memory and no more, aligned to 64 bytes, in so many places at once, each a multiple of 256 bytes.
  void (*read_memory)(const void *memory, int64_t bytes, int places);
} sa_cpu_kernels;

extern const sa_cpu_kernels sa_cpu_generic, sa_cpu_avx2, sa_cpu_avx512, sa_cpu_amx;

#endif
