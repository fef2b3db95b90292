// the core's own allocations: aligned, counted, and made to fail by tests
#ifndef SAFEATTN_MEMORY_H
#define SAFEATTN_MEMORY_H
#include "safeattn.h"

// Aligned to 64 bytes; NULL when refused (sa_last_error() then names `function` and the size). Never NULL for 0 bytes.
void *sa_allocate(const char *function, int64_t bytes);
void *sa_allocate_zeroed(const char *function, int64_t bytes);
void sa_release(void *memory);  // what sa_allocate gave; NULL is fine

// What tensors on the CPU are made of: as above, but neither counted nor made to fail, for sa_block_new does both.
void *sa_cpu_allocate(const char *function, int64_t bytes);
void sa_cpu_release(void *memory);

// A counted block of `bytes` on `device` with one holder, and where its memory starts. SA_NO_MEMORY or SA_NO_DEVICE.
int sa_block_new(const char *function, int device, int64_t bytes, sa_block **block, void **data);
void sa_block_retain(sa_block *block);   // NULL is fine
void sa_block_release(sa_block *block);  // NULL is fine

#endif
