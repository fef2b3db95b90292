// rows of a table by their ids: checks and outputs
#include <string.h>

#include "operation.h"
#include "status.h"

int sa_embedding(const sa_tensor *table, const sa_tensor *ids, int64_t base, sa_tensor *y) {
  int status = sa_tensor_check(__func__, "table", table);
  if (!status && table->ndim != 2)
    status = sa_fail(SA_INVALID, __func__, "table: got %s, wanted two dims", sa_describe(table));
  if (!status) status = sa_check_ids(__func__, ids, base, "table", table);
  if (!status && ids->ndim == SA_MAX_DIMS)
    status = sa_fail(SA_INVALID, __func__, "ids: got %d dims, wanted at most %d", ids->ndim, SA_MAX_DIMS - 1);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, table->device, &operations);
  if (!status) status = sa_check_id_range(__func__, operations, ids, base, table->shape[0], NULL);
  if (status) return status;
  int64_t shape[SA_MAX_DIMS];
  memcpy(shape, ids->shape, sizeof shape);
  shape[ids->ndim] = table->shape[1];
  sa_output out;
  status = sa_output_open(&out, __func__, "y", y, table->dtype, table->device, ids->ndim + 1, shape, false,
                          (const sa_tensor *[]){table, ids}, 2);
  if (!status) status = operations->embedding(table, ids, base, &out.target);
  return sa_output_close(&out, status);
}

int sa_embedding_backward(const sa_tensor *ids, int64_t base, const sa_tensor *dy, sa_tensor *dtable) {
  int status = sa_check_float(__func__, "dy", dy);
  if (!status) status = sa_check_ids(__func__, ids, base, "dy", dy);
  if (!status && (dy->ndim != ids->ndim + 1 || memcmp(dy->shape, ids->shape, (size_t)ids->ndim * sizeof *dy->shape))) {
    status = sa_fail(SA_INVALID, __func__, "dy: got %s, wanted ids' shape %s and one dim more", sa_describe(dy),
                     sa_describe_shape(ids->ndim, ids->shape));
  }
  // Only dtable says how many rows the table has, so it cannot be created here.
  if (!status) status = sa_tensor_check(__func__, "dtable", dtable);
  if (!status && (dtable->ndim != 2 || dtable->shape[1] != dy->shape[dy->ndim - 1])) {
    status = sa_fail(SA_INVALID, __func__, "dtable: got %s, wanted two dims, the last %lld", sa_describe(dtable),
                     (long long)dy->shape[dy->ndim - 1]);
  }
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, dy->device, &operations);
  if (!status) status = sa_check_id_range(__func__, operations, ids, base, dtable->shape[0], NULL);
  if (status) return status;
  sa_output out;
  status = sa_output_open(&out, __func__, "dtable", dtable, dy->dtype, dy->device, 2, dtable->shape, false,
                          (const sa_tensor *[]){ids, dy}, 2);
  if (!status) status = operations->embedding_backward(ids, base, dy, &out.target);
  return sa_output_close(&out, status);
}
