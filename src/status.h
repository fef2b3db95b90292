// how the core's own files report an error
#ifndef SAFEATTN_STATUS_H
#define SAFEATTN_STATUS_H
#include "safeattn.h"

// Keeps "function: message" for sa_last_error() of this thread and returns `status`, so that a check is one line:
//   if (t->ndim > 4) return sa_fail(SA_INVALID, __func__, "q: has %d dims, wanted at most 4", t->ndim);
int sa_fail(int status, const char *function, const char *format, ...) __attribute__((format(printf, 3, 4)));

// "f32[2,8,128,64]" in a buffer of the calling thread; the last four results stay valid.
const char *sa_describe(const sa_tensor *t);
const char *sa_describe_shape(int ndim, const int64_t *shape);  // "[2,8,128,64]"
const char *sa_device_name(int device);                         // "cpu", "cuda:0"

#endif
