// the stand-alone safe softmax, with its three stances on dead rows: checks and outputs
#include "operation.h"
#include "status.h"

static int check_softmax(const char *function, const sa_tensor *x, int dim, int dead_rows) {
  int status = sa_check_float(function, "x", x);
  if (!status && x->ndim == 0)
    status = sa_fail(SA_INVALID, function, "x: got no dims, wanted one to take the softmax along");
  if (!status && (dim < 0 || dim >= x->ndim))
    status = sa_fail(SA_INVALID, function, "dim: got %d, wanted one from 0 to %d", dim, x->ndim - 1);
  if (!status && (dead_rows < SA_ZERO || dead_rows > SA_UNIFORM)) {
    status = sa_fail(SA_INVALID, function, "dead_rows: got %d, wanted SA_ZERO, SA_NAN or SA_UNIFORM", dead_rows);
  }
  return status;
}

int sa_softmax(const sa_tensor *x, int dim, int dead_rows, sa_tensor *y) {
  int status = check_softmax(__func__, x, dim, dead_rows);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, x->device, &operations);
  if (status) return status;
  sa_output out;
  status = sa_output_open(&out, __func__, "y", y, x->dtype, x->device, x->ndim, x->shape, true, &x, 1);
  if (!status) status = operations->softmax(x, dim, dead_rows, &out.target);
  return sa_output_close(&out, status);
}

int sa_softmax_backward(const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, int dim, int dead_rows,
                        sa_tensor *dx) {
  int status = check_softmax(__func__, x, dim, dead_rows);
  if (!status) status = sa_check_like(__func__, "y", y, "x", x);
  if (!status) status = sa_check_like(__func__, "dy", dy, "x", x);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, x->device, &operations);
  if (status) return status;
  sa_output out;
  status = sa_output_open(&out, __func__, "dx", dx, x->dtype, x->device, x->ndim, x->shape, true,
                          (const sa_tensor *[]){x, y, dy}, 3);
  if (!status) status = operations->softmax_backward(x, y, dy, dim, dead_rows, &out.target);
  return sa_output_close(&out, status);
}
