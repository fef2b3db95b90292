// the core's own allocations: aligned, counted, and made to fail by tests
#ifndef SAFEATTN_MEMORY_H
#define SAFEATTN_MEMORY_H
#include "safeattn.h"

// Aligned to 64 bytes; NULL when refused (sa_last_error() then names `function` and the size). Never NULL for 0 bytes.
void *sa_allocate(const char *function, int64_t bytes);
void *sa_allocate_zeroed(const char *function, int64_t bytes);
void sa_release(void *memory);  // what sa_allocate gave; NULL is fine

#endif
