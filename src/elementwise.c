// the pointwise operations of the tape: checks, broadcasting, outputs; the loops are the device's
#include <math.h>

#include "operation.h"
#include "status.h"

static int check_op(const char *function, int op, int last, const char *first_name, const char *last_name) {
  if (op >= 0 && op <= last) return SA_OK;
  return sa_fail(SA_INVALID, function, "op: got %d, wanted one from %s to %s", op, first_name, last_name);
}

static int check_unary(const char *function, int op) {
  return check_op(function, op, SA_ABS, "SA_NEG", "SA_ABS");
}
static int check_binary(const char *function, int op) {
  return check_op(function, op, SA_NE, "SA_ADD", "SA_NE");
}

int sa_unary(int op, const sa_tensor *x, sa_tensor *y) {
  int status = check_unary(__func__, op);
  if (!status) status = sa_check_float(__func__, "x", x);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, x->device, &operations);
  if (status) return status;
  sa_output out;
  status = sa_output_open(&out, __func__, "y", y, x->dtype, x->device, x->ndim, x->shape, true, &x, 1);
  if (!status) status = operations->unary(op, x, &out.target);
  return sa_output_close(&out, status);
}

int sa_unary_backward(int op, const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, sa_tensor *dx) {
  int status = check_unary(__func__, op);
  if (!status) status = sa_check_float(__func__, "dy", dy);
  const bool reads_y = op == SA_EXP || op == SA_SQRT || op == SA_TANH;
  const bool reads_x = !reads_y && op != SA_NEG;
  if (!status && (x || reads_x)) status = sa_check_like(__func__, "x", x, "dy", dy);
  if (!status && (y || reads_y)) status = sa_check_like(__func__, "y", y, "dy", dy);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, dy->device, &operations);
  if (status) return status;
  sa_output out;
  status = sa_output_open(&out, __func__, "dx", dx, dy->dtype, dy->device, dy->ndim, dy->shape, true,
                          (const sa_tensor *[]){dy, reads_x ? x : NULL, reads_y ? y : NULL}, 3);
  if (!status) status = operations->unary_backward(op, x, y, dy, &out.target);
  return sa_output_close(&out, status);
}

// a, b and y are legal; broadcasts, and runs the loops.
static int run_binary(const char *function, int op, const sa_tensor *a, const sa_tensor *b, int dtype, int device,
                      sa_tensor *y) {
  int ndim;
  int64_t shape[SA_MAX_DIMS];
  int status = sa_broadcast_shape(function, "a", a, "b", b, &ndim, shape);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(function, device, &operations);
  if (status) return status;
  const sa_tensor a_view = sa_broadcast_view(a, ndim, shape), b_view = sa_broadcast_view(b, ndim, shape);
  sa_output out;
  status = sa_output_open(&out, function, "y", y, op >= SA_LT ? SA_BOOL : dtype, device, ndim, shape, true,
                          (const sa_tensor *[]){&a_view, &b_view}, 2);
  if (!status) status = operations->binary(op, &a_view, &b_view, &out.target);
  return sa_output_close(&out, status);
}

static int check_arithmetic(const char *function, int op, const sa_tensor *a) {
  if (op >= SA_LT || a->dtype != SA_BOOL) return SA_OK;
  return sa_fail(SA_INVALID, function, "a: got bool, wanted numbers for arithmetic");
}

int sa_binary(int op, const sa_tensor *a, const sa_tensor *b, sa_tensor *y) {
  int status = check_binary(__func__, op);
  if (!status) status = sa_tensor_check(__func__, "a", a);
  if (!status) status = sa_tensor_check(__func__, "b", b);
  if (!status) status = sa_check_device(__func__, "b", b, "a", a);
  if (!status && a->dtype != b->dtype) {
    status =
        sa_fail(SA_INVALID, __func__, "b: got %s, wanted %s like a", sa_dtype_name(b->dtype), sa_dtype_name(a->dtype));
  }
  if (!status) status = check_arithmetic(__func__, op, a);
  return status ? status : run_binary(__func__, op, a, b, a->dtype, a->device, y);
}

// Keeps the scalar in the type that a is computed in. Fails when it is not a number of that type.
static int store_scalar(const char *function, const sa_tensor *a, double value, void *memory, int *dtype) {
  const int d = a->dtype;
  *dtype = d == SA_F16 || d == SA_BF16 ? SA_F32 : d;
  const double low = d == SA_BOOL ? 0 : d == SA_I32 ? -0x1p31 : -0x1p63;
  const double end = d == SA_BOOL ? 2 : d == SA_I32 ? 0x1p31 : 0x1p63;
  if (!sa_is_float(d) && !(value >= low && value < end && value == trunc(value))) {
    return sa_fail(SA_INVALID, function, "b: got %.17g, wanted a number that %s holds, like a", value,
                   sa_dtype_name(d));
  }
  switch (*dtype) {
    case SA_F32:
      *(float *)memory = (float)value;
      break;
    case SA_F64:
      *(double *)memory = value;
      break;
    case SA_I32:
      *(int32_t *)memory = (int32_t)value;
      break;
    case SA_I64:
      *(int64_t *)memory = (int64_t)value;
      break;
    default:
      *(uint8_t *)memory = (uint8_t)value;
  }
  return SA_OK;
}

int sa_binary_scalar(int op, const sa_tensor *a, double b, bool scalar_first, sa_tensor *y) {
  int status = check_binary(__func__, op);
  if (!status) status = sa_tensor_check(__func__, "a", a);
  if (!status) status = check_arithmetic(__func__, op, a);
  int64_t memory;
  sa_tensor scalar = {.data = &memory};
  if (!status) status = store_scalar(__func__, a, b, &memory, &scalar.dtype);
  if (status) return status;
  return run_binary(__func__, op, scalar_first ? &scalar : a, scalar_first ? a : &scalar, a->dtype, a->device, y);
}

int sa_where(const sa_tensor *condition, const sa_tensor *a, const sa_tensor *b, sa_tensor *y) {
  int status = sa_tensor_check(__func__, "condition", condition);
  if (!status) status = sa_check_dtype(__func__, "condition", condition, SA_BOOL);
  if (!status) status = sa_tensor_check(__func__, "a", a);
  if (!status) status = sa_check_device(__func__, "a", a, "condition", condition);
  if (!status) status = sa_tensor_check(__func__, "b", b);
  if (!status) status = sa_check_device(__func__, "b", b, "condition", condition);
  if (!status && a->dtype != b->dtype) {
    status =
        sa_fail(SA_INVALID, __func__, "b: got %s, wanted %s like a", sa_dtype_name(b->dtype), sa_dtype_name(a->dtype));
  }
  sa_tensor both = {0};
  if (!status) status = sa_broadcast_shape(__func__, "a", a, "b", b, &both.ndim, both.shape);
  int ndim;
  int64_t shape[SA_MAX_DIMS];
  if (!status) status = sa_broadcast_shape(__func__, "a and b", &both, "condition", condition, &ndim, shape);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, a->device, &operations);
  if (status) return status;
  const sa_tensor views[3] = {sa_broadcast_view(condition, ndim, shape), sa_broadcast_view(a, ndim, shape),
                              sa_broadcast_view(b, ndim, shape)};
  sa_output out;
  status = sa_output_open(&out, __func__, "y", y, a->dtype, a->device, ndim, shape, true,
                          (const sa_tensor *[]){&views[0], &views[1], &views[2]}, 3);
  if (!status) status = operations->where(&views[0], &views[1], &views[2], &out.target);
  return sa_output_close(&out, status);
}
