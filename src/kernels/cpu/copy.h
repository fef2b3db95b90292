// the CPU's side of the table that concerns memory: allocation, copies with casts and broadcasting, fills
#ifndef SAFEATTN_KERNELS_CPU_COPY_H
#define SAFEATTN_KERNELS_CPU_COPY_H
#include "memory.h"  // sa_cpu_allocate, sa_cpu_release
#include "safeattn.h"

// to[i * to_step] = from[i * from_step] in another dtype, for i in 0 .. count-1; steps in elements, no overlap.
typedef void (*sa_cast_row)(void *to, int64_t to_step, const void *from, int64_t from_step, int64_t count);
sa_cast_row sa_cpu_cast(int to, int from);

int sa_cpu_copy(sa_tensor *to, const sa_tensor *from);
int sa_cpu_fill(sa_tensor *t, double value);

#endif
