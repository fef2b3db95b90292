// layer normalisation over the last dim: checks and outputs
#include <math.h>

#include "operation.h"
#include "status.h"

// A vector [n] like x, or NULL.
static int check_vector(const char *function, const char *name, const sa_tensor *t, const sa_tensor *x) {
  if (!t) return SA_OK;
  int status = sa_tensor_check(function, name, t);
  if (!status) status = sa_check_device(function, name, t, "x", x);
  if (!status) status = sa_check_dtype(function, name, t, x->dtype);
  if (!status) status = sa_check_shape(function, name, t, 1, x->shape + x->ndim - 1);
  return status;
}

static int check_layernorm(const char *function, const sa_tensor *x, const sa_tensor *weight, double epsilon) {
  int status = sa_check_float(function, "x", x);
  if (!status && x->ndim == 0) status = sa_fail(SA_INVALID, function, "x: got no dims, wanted one to normalise");
  if (!status) status = check_vector(function, "weight", weight, x);
  if (!status && !(epsilon >= 0 && isfinite(epsilon)))
    status = sa_fail(SA_INVALID, function, "epsilon: got %g, wanted a finite number >= 0", epsilon);
  return status;
}

int sa_layernorm(const sa_tensor *x, const sa_tensor *weight, const sa_tensor *bias, double epsilon, sa_tensor *y) {
  int status = check_layernorm(__func__, x, weight, epsilon);
  if (!status) status = check_vector(__func__, "bias", bias, x);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, x->device, &operations);
  if (status) return status;
  sa_output out;
  status = sa_output_open(&out, __func__, "y", y, x->dtype, x->device, x->ndim, x->shape, false,
                          (const sa_tensor *[]){x, weight, bias}, 3);
  if (!status) status = operations->layernorm(x, weight, bias, epsilon, &out.target);
  return sa_output_close(&out, status);
}

int sa_layernorm_backward(const sa_tensor *x, const sa_tensor *weight, double epsilon, const sa_tensor *dy,
                          sa_tensor *dx, sa_tensor *dweight, sa_tensor *dbias) {
  int status = check_layernorm(__func__, x, weight, epsilon);
  if (!status) status = sa_check_like(__func__, "dy", dy, "x", x);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, x->device, &operations);
  if (status) return status;
  const sa_tensor *inputs[] = {x, weight, dy};
  sa_output opened[3] = {0};
  if (dx) {
    status = sa_output_open(&opened[0], __func__, "dx", dx, x->dtype, x->device, x->ndim, x->shape, false, inputs, 3);
  }
  const int64_t *length = x->shape + x->ndim - 1;
  if (!status && dweight)
    status = sa_output_open(&opened[1], __func__, "dweight", dweight, x->dtype, x->device, 1, length, false, inputs, 3);
  if (!status && dbias)
    status = sa_output_open(&opened[2], __func__, "dbias", dbias, x->dtype, x->device, 1, length, false, inputs, 3);
  if (!status) {
    status = operations->layernorm_backward(x, weight, epsilon, dy, dx ? &opened[0].target : NULL,
                                            dweight ? &opened[1].target : NULL, dbias ? &opened[2].target : NULL);
  }
  for (int i = 0; i < 3; i++) status = sa_output_close(&opened[i], status);
  return status;
}
