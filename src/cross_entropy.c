// the loss of a row of logits whose right answer is an id: checks and outputs
#include "operation.h"
#include "status.h"

static int check_logits(const char *function, const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore,
                        const sa_operations **operations) {
  int status = sa_check_float(function, "x", x);
  if (!status && x->ndim == 0) status = sa_fail(SA_INVALID, function, "x: got no dims, wanted rows of logits");
  if (!status) status = sa_check_ids(function, ids, base, "x", x);
  if (!status) status = sa_check_shape(function, "ids", ids, x->ndim - 1, x->shape);
  if (!status) status = sa_operations_of(function, x->device, operations);
  if (!status) status = sa_check_id_range(function, *operations, ids, base, x->shape[x->ndim - 1], &ignore);
  return status;
}

int sa_cross_entropy(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore, sa_tensor *loss) {
  const sa_operations *operations;
  int status = check_logits(__func__, x, ids, base, ignore, &operations);
  if (status) return status;
  sa_output out;
  status = sa_output_open(&out, __func__, "loss", loss, x->dtype, x->device, ids->ndim, ids->shape, false,
                          (const sa_tensor *[]){x, ids}, 2);
  if (!status) status = operations->cross_entropy(x, ids, base, ignore, &out.target);
  return sa_output_close(&out, status);
}

int sa_cross_entropy_backward(const sa_tensor *x, const sa_tensor *ids, int64_t base, int64_t ignore,
                              const sa_tensor *dloss, sa_tensor *dx) {
  const sa_operations *operations;
  int status = check_logits(__func__, x, ids, base, ignore, &operations);
  if (!status) status = sa_tensor_check(__func__, "dloss", dloss);
  if (!status) status = sa_check_device(__func__, "dloss", dloss, "x", x);
  if (!status) status = sa_check_dtype(__func__, "dloss", dloss, x->dtype);
  if (!status) status = sa_check_shape(__func__, "dloss", dloss, ids->ndim, ids->shape);
  if (status) return status;
  sa_output out;
  status = sa_output_open(&out, __func__, "dx", dx, x->dtype, x->device, x->ndim, x->shape, false,
                          (const sa_tensor *[]){x, ids, dloss}, 3);
  if (!status) status = operations->cross_entropy_backward(x, ids, base, ignore, dloss, &out.target);
  return sa_output_close(&out, status);
}
