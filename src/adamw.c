// one step of AdamW in place: checks
#include <math.h>

#include "operation.h"
#include "status.h"

static int check_options(const char *function, const sa_adamw_options *o) {
  if (!o) return sa_fail(SA_INVALID, function, "options: got NULL, wanted options");
  const struct {
    const char *name;
    double value, end;
  } ranges[] = {{"rate", o->rate, INFINITY},
                {"beta1", o->beta1, 1},
                {"beta2", o->beta2, 1},
                {"epsilon", o->epsilon, INFINITY},
                {"weight_decay", o->weight_decay, INFINITY}};
  for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
    if (!(ranges[i].value >= 0 && ranges[i].value < ranges[i].end)) {
      return sa_fail(SA_INVALID, function, "options.%s: got %g, wanted a number in [0, %g)", ranges[i].name,
                     ranges[i].value, ranges[i].end);
    }
  }
  if (o->step < 1)
    return sa_fail(SA_INVALID, function, "options.step: got %lld, wanted 1 at the first step", (long long)o->step);
  return SA_OK;
}

static int check_written(const char *function, const char *name, const sa_tensor *t, const sa_tensor *parameter) {
  int status = sa_tensor_check_writable(function, name, t);
  if (!status) status = sa_check_like(function, name, t, "parameter", parameter);
  if (!status && !sa_tensor_contiguous(t))
    status = sa_fail(SA_INVALID, function, "%s: got a strided view, wanted contiguous memory", name);
  return status;
}

int sa_adamw(sa_tensor *parameter, const sa_tensor *gradient, sa_tensor *moment1, sa_tensor *moment2,
             const sa_adamw_options *options) {
  int status = sa_check_float(__func__, "parameter", parameter);
  if (!status && parameter->dtype != SA_F32 && parameter->dtype != SA_F64)
    status = sa_fail(SA_INVALID, __func__, "parameter: got %s, wanted f32 or f64", sa_dtype_name(parameter->dtype));
  if (!status) status = check_written(__func__, "parameter", parameter, parameter);
  if (!status) status = check_written(__func__, "moment1", moment1, parameter);
  if (!status) status = check_written(__func__, "moment2", moment2, parameter);
  if (!status) status = sa_check_like(__func__, "gradient", gradient, "parameter", parameter);
  if (!status) status = check_options(__func__, options);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, parameter->device, &operations);
  return status ? status : operations->adamw(parameter, gradient, moment1, moment2, options);
}
