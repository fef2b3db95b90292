// sums, means and extremes over dims: checks and outputs; the loops are the device's
#include "operation.h"
#include "status.h"

static int check_reduce(const char *function, int op, const sa_tensor *x, uint32_t dims) {
  if (op < SA_SUM || op > SA_ARGMAX)
    return sa_fail(SA_INVALID, function, "op: got %d, wanted one from SA_SUM to SA_ARGMAX", op);
  const int status = op == SA_MEAN ? sa_check_float(function, "x", x) : sa_tensor_check(function, "x", x);
  if (status) return status;
  if (dims >> x->ndim) {
    return sa_fail(SA_INVALID, function, "dims: got dim %d, wanted dims of x, which has %d", 31 - __builtin_clz(dims),
                   x->ndim);
  }
  if (op == SA_ARGMAX && (dims == 0 || (dims & (dims - 1))))
    return sa_fail(SA_INVALID, function, "dims: got %d dims, wanted one for argmax", __builtin_popcount(dims));
  if (op == SA_SUM || op == SA_MEAN) return SA_OK;
  bool results = true, choice = true;
  for (int dim = 0; dim < x->ndim; dim++) {
    if (x->shape[dim] > 0) continue;
    if (dims >> dim & 1)
      choice = false;
    else
      results = false;
  }
  if (!results || choice) return SA_OK;
  return sa_fail(SA_INVALID, function,
                 "x: got %s with nothing to choose from, wanted something in every dim that is reduced",
                 sa_describe(x));
}

int sa_reduce(int op, const sa_tensor *x, uint32_t dims, bool keep, sa_tensor *y) {
  int status = check_reduce(__func__, op, x, dims);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, x->device, &operations);
  if (status) return status;
  int ndim = 0;
  int64_t shape[SA_MAX_DIMS];
  for (int dim = 0; dim < x->ndim; dim++) {
    if (!(dims >> dim & 1))
      shape[ndim++] = x->shape[dim];
    else if (keep)
      shape[ndim++] = 1;
  }
  const int dtype = op == SA_ARGMAX || (op == SA_SUM && !sa_is_float(x->dtype)) ? SA_I64 : x->dtype;
  sa_output out;
  status = sa_output_open(&out, __func__, "y", y, dtype, x->device, ndim, shape, false, &x, 1);
  if (status) return status;
  sa_tensor kept = {.data = out.target.data, .dtype = dtype, .device = x->device, .ndim = x->ndim};
  for (int dim = 0, from = 0; dim < x->ndim; dim++) {
    const bool reduced = dims >> dim & 1;
    kept.shape[dim] = reduced ? 1 : x->shape[dim];
    kept.stride[dim] = reduced ? 0 : out.target.stride[from];
    if (!reduced || keep) from++;
  }
  return sa_output_close(&out, operations->reduce(op, x, dims, &kept));
}
