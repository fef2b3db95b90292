// products of matrices: checks, broadcasting, outputs; the loops are the device's
#include "operation.h"
#include "status.h"

static int check_matrices(const char *function, const char *name, const sa_tensor *t) {
  const int status = sa_check_float(function, name, t);
  if (status || t->ndim >= 2) return status;
  return sa_fail(SA_INVALID, function, "%s: got %s, wanted at least two dims", name, sa_describe(t));
}

int sa_matmul(const sa_tensor *a, const sa_tensor *b, sa_tensor *y) {
  int status = check_matrices(__func__, "a", a);
  if (!status) status = check_matrices(__func__, "b", b);
  if (!status) status = sa_check_device(__func__, "b", b, "a", a);
  if (!status && a->dtype != b->dtype) {
    status =
        sa_fail(SA_INVALID, __func__, "b: got %s, wanted %s like a", sa_dtype_name(b->dtype), sa_dtype_name(a->dtype));
  }
  if (status) return status;
  const int64_t rows = a->shape[a->ndim - 2], inner = a->shape[a->ndim - 1], columns = b->shape[b->ndim - 1];
  if (b->shape[b->ndim - 2] != inner) {
    return sa_fail(SA_INVALID, __func__, "b: got %s with %lld rows, wanted %lld, as a, %s, has columns", sa_describe(b),
                   (long long)b->shape[b->ndim - 2], (long long)inner, sa_describe(a));
  }
  sa_tensor a_batch = *a, b_batch = *b;
  a_batch.ndim -= 2;
  b_batch.ndim -= 2;
  int batch_dims;
  int64_t shape[SA_MAX_DIMS];
  const sa_operations *operations;
  status = sa_broadcast_shape(__func__, "a", &a_batch, "b", &b_batch, &batch_dims, shape);
  if (!status) status = sa_operations_of(__func__, a->device, &operations);
  if (status) return status;
  const int ndim = batch_dims + 2;
  shape[ndim - 2] = rows;
  shape[ndim - 1] = inner;
  const sa_tensor a_view = sa_broadcast_view(a, ndim, shape);
  shape[ndim - 2] = inner;
  shape[ndim - 1] = columns;
  const sa_tensor b_view = sa_broadcast_view(b, ndim, shape);
  shape[ndim - 2] = rows;
  sa_output out;
  status =
      sa_output_open(&out, __func__, "y", y, a->dtype, a->device, ndim, shape, false, (const sa_tensor *[]){a, b}, 2);
  if (!status) status = operations->matmul(&a_view, &b_view, &out.target);
  return sa_output_close(&out, status);
}
