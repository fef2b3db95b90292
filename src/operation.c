// what every operation of the tape does before and after its loops: checks, broadcasting, outputs
#include "operation.h"

#include <stdio.h>
#include <string.h>

#include "status.h"

int sa_check_float(const char *function, const char *name, const sa_tensor *t) {
  const int status = sa_tensor_check(function, name, t);
  if (status) return status;
  if (sa_is_float(t->dtype)) return SA_OK;
  return sa_fail(SA_INVALID, function, "%s: got %s, wanted f32, f64, f16 or bf16", name, sa_dtype_name(t->dtype));
}

int sa_check_ids(const char *function, const sa_tensor *ids, int64_t base, const char *other_name,
                 const sa_tensor *other) {
  const int64_t most = INT64_C(1) << 53;
  int status = sa_tensor_check(function, "ids", ids);
  if (!status && ids->dtype != SA_I32 && ids->dtype != SA_I64)
    status = sa_fail(SA_INVALID, function, "ids: got %s, wanted i32 or i64", sa_dtype_name(ids->dtype));
  if (!status) status = sa_check_device(function, "ids", ids, other_name, other);
  if (!status && (base < -most || base > most))
    status = sa_fail(SA_INVALID, function, "base: got %lld, wanted at most 2^53 either way", (long long)base);
  return status;
}

// "[0,3]", its positions counted from 1 when the ids are.
static void describe_place(const sa_tensor *ids, int64_t at, int64_t base, char *text, size_t size) {
  int64_t index[SA_MAX_DIMS];
  for (int dim = ids->ndim - 1; dim >= 0; dim--) {
    index[dim] = at % ids->shape[dim] + (base == 1);
    at /= ids->shape[dim];
  }
  size_t used = (size_t)snprintf(text, size, "[");
  for (int dim = 0; dim < ids->ndim; dim++)
    used += (size_t)snprintf(text + used, size - used, dim ? ",%lld" : "%lld", (long long)index[dim]);
  snprintf(text + used, size - used, "]");
}

int sa_check_id_range(const char *function, const sa_operations *operations, const sa_tensor *ids, int64_t base,
                      int64_t count, const int64_t *ignore) {
  int64_t value;
  const int64_t at = operations->stray_id(ids, base, count, ignore, &value);
  if (at < 0) return (int)(-1 - at);
  char place[SA_MAX_DIMS * 21 + 3];
  describe_place(ids, at, base, place, sizeof place);
  return sa_fail(SA_INVALID, function, "ids: got %lld at %s, wanted %lld .. %lld", (long long)value, place,
                 (long long)base, (long long)(base + count - 1));
}

int sa_check_dtype(const char *function, const char *name, const sa_tensor *t, int dtype) {
  if (t->dtype == dtype) return SA_OK;
  return sa_fail(SA_INVALID, function, "%s: got %s, wanted %s", name, sa_dtype_name(t->dtype), sa_dtype_name(dtype));
}

int sa_check_shape(const char *function, const char *name, const sa_tensor *t, int ndim, const int64_t *shape) {
  if (sa_tensor_has_shape(t, ndim, shape)) return SA_OK;
  return sa_fail(SA_INVALID, function, "%s: got shape %s, wanted %s", name, sa_describe_shape(t->ndim, t->shape),
                 sa_describe_shape(ndim, shape));
}

int sa_check_device(const char *function, const char *name, const sa_tensor *t, const char *other_name,
                    const sa_tensor *other) {
  if (t->device == other->device) return SA_OK;
  return sa_fail(SA_INVALID, function, "%s: got a tensor on %s, wanted %s like %s", name, sa_device_name(t->device),
                 sa_device_name(other->device), other_name);
}

int sa_check_like(const char *function, const char *name, const sa_tensor *t, const char *other_name,
                  const sa_tensor *other) {
  int status = sa_tensor_check(function, name, t);
  if (!status) status = sa_check_device(function, name, t, other_name, other);
  if (!status && (t->dtype != other->dtype || !sa_tensor_same_shape(t, other))) {
    status = sa_fail(SA_INVALID, function, "%s: got %s, wanted %s like %s", name, sa_describe(t), sa_describe(other),
                     other_name);
  }
  return status;
}

int sa_operations_of(const char *function, int device, const sa_operations **operations) {
  const sa_backend *backend = sa_backend_of(function, device);
  if (!backend) return SA_NO_DEVICE;
  *operations = backend->operations;
  if (*operations) return SA_OK;
  return sa_fail(SA_UNSUPPORTED, function, "has no kernels for %s, wanted tensors on cpu", sa_device_name(device));
}

int sa_broadcast_shape(const char *function, const char *a_name, const sa_tensor *a, const char *b_name,
                       const sa_tensor *b, int *ndim, int64_t *shape) {
  *ndim = a->ndim > b->ndim ? a->ndim : b->ndim;
  for (int dim = 0; dim < *ndim; dim++) {
    const int a_dim = dim - (*ndim - a->ndim), b_dim = dim - (*ndim - b->ndim);
    const int64_t a_size = a_dim < 0 ? 1 : a->shape[a_dim], b_size = b_dim < 0 ? 1 : b->shape[b_dim];
    if (a_size != b_size && a_size != 1 && b_size != 1) {
      return sa_fail(SA_INVALID, function, "%s: got shape %s, wanted one that broadcasts with %s's %s", b_name,
                     sa_describe_shape(b->ndim, b->shape), a_name, sa_describe_shape(a->ndim, a->shape));
    }
    shape[dim] = a_size == 1 ? b_size : a_size;
  }
  return SA_OK;
}

sa_tensor sa_broadcast_view(const sa_tensor *t, int ndim, const int64_t *shape) {
  sa_tensor view = {.data = t->data, .dtype = t->dtype, .device = t->device, .ndim = ndim};
  for (int dim = 0; dim < ndim; dim++) {
    const int own = dim - (ndim - t->ndim);
    view.shape[dim] = shape[dim];
    view.stride[dim] = own < 0 || t->shape[own] == 1 ? 0 : t->stride[own];
  }
  return view;
}

// Whether an output has to be written apart from an input. Views that interleave count as overlapping: that costs a
// copy, never a wrong result.
static bool apart_from(const sa_tensor *given, const sa_tensor *input, bool pointwise) {
  const bool same = sa_tensor_same_shape(given, input) && sa_tensor_same_elements(given, input);
  return sa_tensor_overlap(given, input) && !(pointwise && same);
}

static int check_output(const char *function, const char *name, const sa_tensor *given, int dtype, int device, int ndim,
                        const int64_t *shape) {
  int status = sa_tensor_check_writable(function, name, given);
  if (!status) status = sa_check_dtype(function, name, given, dtype);
  if (!status) status = sa_check_shape(function, name, given, ndim, shape);
  if (!status && given->device != device) {
    status = sa_fail(SA_INVALID, function, "%s: got a tensor on %s, wanted %s", name, sa_device_name(given->device),
                     sa_device_name(device));
  }
  return status;
}

int sa_output_open(sa_output *out, const char *function, const char *name, sa_tensor *given, int dtype, int device,
                   int ndim, const int64_t *shape, bool pointwise, const sa_tensor *const *inputs, int count) {
  memset(out, 0, sizeof *out);
  if (!given) return sa_fail(SA_INVALID, function, "%s: got NULL, wanted a tensor to write", name);
  bool apart = false;
  if (given->data) {
    const int status = check_output(function, name, given, dtype, device, ndim, shape);
    if (status) return status;
    for (int i = 0; i < count; i++) {
      if (inputs[i] && apart_from(given, inputs[i], pointwise)) apart = true;
    }
  }
  if (given->data && !apart) {
    out->target = *given;
    out->target.block = NULL;
  } else {
    const int status = sa_tensor_new(&out->target, dtype, device, ndim, shape);
    if (status) return status;
  }
  out->given = given;
  out->way = !given->data ? SA_CREATED : apart ? SA_APART : SA_IN_PLACE;
  return SA_OK;
}

int sa_output_close(sa_output *out, int status) {
  if (!out->given || out->way == SA_IN_PLACE) return status;
  if (out->way == SA_APART && !status) status = sa_copy(out->given, &out->target);
  if (out->way == SA_CREATED && !status)
    *out->given = out->target;
  else
    sa_tensor_release(&out->target);
  return status;
}
