// what every operation of the tape does before and after its loops: checks, broadcasting, outputs
#ifndef SAFEATTN_OPERATION_H
#define SAFEATTN_OPERATION_H
#include "backend.h"
#include "tensor.h"

// Checks give SA_OK, or fail in the name of `function` about its argument `name`.
int sa_check_float(const char *function, const char *name, const sa_tensor *t);  // f32, f64, f16 or bf16
int sa_check_dtype(const char *function, const char *name, const sa_tensor *t, int dtype);
int sa_check_shape(const char *function, const char *name, const sa_tensor *t, int ndim, const int64_t *shape);
int sa_check_device(const char *function, const char *name, const sa_tensor *t, const char *other_name,
                    const sa_tensor *other);
// A tensor of the dtype, device and shape of `other`.
int sa_check_like(const char *function, const char *name, const sa_tensor *t, const char *other_name,
                  const sa_tensor *other);
// i32 or i64, on the device of `other`; and a `base` that can be taken from them.
int sa_check_ids(const char *function, const sa_tensor *ids, int64_t base, const char *other_name,
                 const sa_tensor *other);

// The operations of a device; fails when it, or this build's part for it, is not there.
int sa_operations_of(const char *function, int device, const sa_operations **operations);

// Every id must be one of base .. base + count - 1, or *ignore (NULL: none is ignored).
int sa_check_id_range(const char *function, const sa_operations *operations, const sa_tensor *ids, int64_t base,
                      int64_t count, const int64_t *ignore);

// The shape that both broadcast to, as in NumPy: 1 fits every size, missing leading dims count as 1.
int sa_broadcast_shape(const char *function, const char *a_name, const sa_tensor *a, const char *b_name,
                       const sa_tensor *b, int *ndim, int64_t *shape);
// A borrowed view of t in a shape that it broadcasts to.
sa_tensor sa_broadcast_view(const sa_tensor *t, int ndim, const int64_t *shape);

// An output while it is written. When it overlaps an input, the loops write apart and the result is copied at the end.
typedef struct sa_output {
  sa_tensor target;  // what the loops write
  sa_tensor *given;
  enum { SA_IN_PLACE, SA_CREATED, SA_APART } way;
} sa_output;

// `given` is created when its data is NULL, else it must have the dtype, device and shape. The inputs that it may
// overlap are inputs[0 .. count-1], NULL ones skipped; with `pointwise`, one with the very same elements is no overlap.
int sa_output_open(sa_output *out, const char *function, const char *name, sa_tensor *given, int dtype, int device,
                   int ndim, const int64_t *shape, bool pointwise, const sa_tensor *const *inputs, int count);
// Hands the result over, or drops it when `status` is a failure. Returns the status. An output never opened (all zero)
// is fine.
int sa_output_close(sa_output *out, int status);

#endif
