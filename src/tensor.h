// what the core's own files ask of a tensor that came from outside
#ifndef SAFEATTN_TENSOR_H
#define SAFEATTN_TENSOR_H
#include "stream.h"

static inline bool sa_is_float(int dtype) {
  return dtype == SA_F32 || dtype == SA_F64 || dtype == SA_F16 || dtype == SA_BF16;
}

// SA_INVALID, and an error that names `function` and `name`, unless t is a sound descriptor that holds something.
int sa_tensor_check(const char *function, const char *name, const sa_tensor *t);
// The same, and no two elements may share memory, as they do in an expanded tensor.
int sa_tensor_check_writable(const char *function, const char *name, const sa_tensor *t);
bool sa_tensor_has_shape(const sa_tensor *t, int ndim, const int64_t *shape);
bool sa_tensor_same_shape(const sa_tensor *a, const sa_tensor *b);
// Of two tensors of one shape: whether they are the same elements at the same places.
bool sa_tensor_same_elements(const sa_tensor *a, const sa_tensor *b);
// Whether the stretches of memory that they lie in meet. Interleaved views do, though they share no element.
bool sa_tensor_overlap(const sa_tensor *a, const sa_tensor *b);

// A holder of t's elements on the CPU: of t itself when it is there, else of a copy.
int sa_tensor_on_host(sa_tensor *out, const sa_tensor *t);

// Has t's elements written one after another by `produce`, on the CPU; a tensor elsewhere then gets a copy.
typedef void (*sa_producer)(sa_stream *elements, const void *argument);
int sa_tensor_produce(sa_tensor *t, sa_producer produce, const void *argument);

#endif
