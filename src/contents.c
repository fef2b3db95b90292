// what is in a tensor: copies, fills, single elements and ranges
#include <math.h>

#include "backend.h"
#include "kernels/cpu/copy.h"
#include "status.h"
#include "tensor.h"

/*  Copies  */

// The host's part of a copy to or from a device by way of a contiguous copy on the host.
static int copy_by_host(const char *function, const sa_backend *backend, sa_tensor *to, const sa_tensor *from) {
  const bool down = to->device == SA_CPU;
  const sa_tensor *strided = down ? to : from;
  sa_tensor packed;
  int status = sa_tensor_new(&packed, strided->dtype, SA_CPU, strided->ndim, strided->shape);
  if (status) return status;
  if (!down) status = sa_cpu_copy(&packed, from);
  if (!status) status = down ? backend->copy(&packed, from) : backend->copy(to, &packed);
  if (!status && down) status = sa_cpu_copy(to, &packed);
  sa_tensor_release(&packed);
  return status;
}

// A device knows how to copy to, from and within itself, but not what is strided on the host.
static int copy_apart(const char *function, sa_tensor *to, const sa_tensor *from) {
  const sa_backend *backend = sa_backend_of(function, to->device == SA_CPU ? from->device : to->device);
  if (!backend) return SA_NO_DEVICE;
  const sa_tensor *on_host = to->device == SA_CPU ? to : from;
  if (to->device != from->device && on_host->device == SA_CPU && !sa_tensor_contiguous(on_host))
    return copy_by_host(function, backend, to, from);
  return backend->copy(to, from);
}

static int copy_by_way_of(const char *function, sa_tensor *to, const sa_tensor *from) {
  sa_tensor between;
  int status = sa_tensor_new(&between, from->dtype, from->device, from->ndim, from->shape);
  if (status) return status;
  status = copy_apart(function, &between, from);
  if (!status) status = copy_apart(function, to, &between);
  sa_tensor_release(&between);
  return status;
}

int sa_copy(sa_tensor *to, const sa_tensor *from) {
  int status = sa_tensor_check_writable(__func__, "to", to);
  if (!status) status = sa_tensor_check(__func__, "from", from);
  if (status) return status;
  sa_tensor source;
  if (sa_tensor_same_shape(to, from)) {
    source = *from;
    sa_tensor_retain(&source);
  } else if (sa_tensor_expand(&source, from, to->ndim, to->shape)) {
    return sa_fail(SA_INVALID, __func__, "from: got %s, wanted one that broadcasts to %s", sa_describe(from),
                   sa_describe(to));
  }
  if (!sa_tensor_same_elements(to, &source))
    status = sa_tensor_overlap(to, &source) ? copy_by_way_of(__func__, to, &source) : copy_apart(__func__, to, &source);
  sa_tensor_release(&source);
  return status;
}

/*  Values  */

// Integer tensors take only what they can hold; floats round, and bools ask whether it is zero.
static int check_value(const char *function, const char *name, double value, int dtype) {
  const bool narrow = dtype == SA_I32;
  if (!narrow && dtype != SA_I64) return SA_OK;
  const double least = narrow ? INT32_MIN : -0x1p63, most = narrow ? INT32_MAX : 0x1p63;
  if (!(value >= least && value <= most && (narrow || value < most)) || value != (double)(int64_t)value)
    return sa_fail(SA_INVALID, function, "%s: got %.17g, wanted a whole number that %s can hold", name, value,
                   sa_dtype_name(dtype));
  return SA_OK;
}

int sa_fill(sa_tensor *t, double value) {
  int status = sa_tensor_check_writable(__func__, "t", t);
  if (!status) status = check_value(__func__, "value", value, t->dtype);
  if (status) return status;
  const sa_backend *backend = sa_backend_of(__func__, t->device);
  return backend ? backend->fill(t, value) : SA_NO_DEVICE;
}

// A borrowed scalar: t's element at `index`.
static int find_element(const char *function, const sa_tensor *t, const int64_t *index, sa_tensor *element) {
  const int status = sa_tensor_check(function, "t", t);
  if (status) return status;
  if (!index && t->ndim) return sa_fail(SA_INVALID, function, "index: got NULL, wanted %d numbers", t->ndim);
  int64_t offset = 0;
  for (int dim = 0; dim < t->ndim; dim++) {
    if (index[dim] < 0 || index[dim] >= t->shape[dim])
      return sa_fail(SA_INVALID, function, "index: got %lld at dim %d of %s, wanted 0 .. %lld", (long long)index[dim],
                     dim, sa_describe(t), (long long)t->shape[dim] - 1);
    offset += index[dim] * t->stride[dim];
  }
  *element =
      (sa_tensor){.data = (char *)t->data + offset * sa_dtype_size(t->dtype), .dtype = t->dtype, .device = t->device};
  return SA_OK;
}

static sa_tensor scalar_of(void *value, int dtype) {
  return (sa_tensor){.data = value, .dtype = dtype};
}

static int get(const char *function, const sa_tensor *t, const int64_t *index, void *value, int dtype) {
  if (!value) return sa_fail(SA_INVALID, function, "value: got NULL, wanted where to put the element");
  sa_tensor element, to = scalar_of(value, dtype);
  const int status = find_element(function, t, index, &element);
  return status ? status : copy_apart(function, &to, &element);
}

// A double whose bits are those of a boxed value, say 0xffff.., is to LuaJIT no NaN but nil, or a function anywhere.
static double plain_nan(double value) {
  return value == value ? value : NAN;
}

int sa_get(const sa_tensor *t, const int64_t *index, double *value) {
  const int status = get(__func__, t, index, value, SA_F64);
  if (!status) *value = plain_nan(*value);
  return status;
}

int sa_get_all(const sa_tensor *t, double *values) {
  int status = sa_tensor_check(__func__, "t", t);
  if (status) return status;
  if (!values) return sa_fail(SA_INVALID, __func__, "values: got NULL, wanted room for %s", sa_describe(t));
  sa_tensor host;
  status = sa_tensor_on_host(&host, t);
  if (status) return status;
  sa_stream elements;
  sa_stream_open(&elements, &host);
  const int64_t count = sa_stream_read(&elements, values, SA_F64, elements.left);
  for (int64_t k = 0; k < count; k++) values[k] = plain_nan(values[k]);
  sa_tensor_release(&host);
  return SA_OK;
}

int sa_get_integer(const sa_tensor *t, const int64_t *index, int64_t *value) {
  if (!t || t->dtype == SA_BOOL || t->dtype == SA_I32 || t->dtype == SA_I64)
    return get(__func__, t, index, value, SA_I64);
  double real;
  int status = get(__func__, t, index, value ? &real : NULL, SA_F64);
  if (!status) status = check_value(__func__, "t", real, SA_I64);
  if (!status) *value = (int64_t)real;
  return status;
}

static int set(const char *function, sa_tensor *t, const int64_t *index, void *value, int dtype) {
  sa_tensor element, from = scalar_of(value, dtype);
  int status = sa_tensor_check_writable(function, "t", t);
  if (!status) status = find_element(function, t, index, &element);
  return status ? status : copy_apart(function, &element, &from);
}

int sa_set(sa_tensor *t, const int64_t *index, double value) {
  const int status = t ? check_value(__func__, "value", value, t->dtype) : SA_OK;
  return status ? status : set(__func__, t, index, &value, SA_F64);
}

int sa_set_integer(sa_tensor *t, const int64_t *index, int64_t value) {
  if (t && t->dtype == SA_I32 && value != (int32_t)value)
    return sa_fail(SA_INVALID, __func__, "value: got %lld, wanted a whole number that i32 can hold", (long long)value);
  return set(__func__, t, index, &value, SA_I64);
}

/*  Sequences  */

int sa_tensor_produce(sa_tensor *t, sa_producer produce, const void *argument) {
  sa_stream elements;
  if (t->device == SA_CPU) {
    sa_stream_open(&elements, t);
    produce(&elements, argument);
    return SA_OK;
  }
  sa_tensor host;
  int status = sa_tensor_new(&host, t->dtype, SA_CPU, t->ndim, t->shape);
  if (status) return status;
  sa_stream_open(&elements, &host);
  produce(&elements, argument);
  status = sa_copy(t, &host);
  sa_tensor_release(&host);
  return status;
}

enum { CHUNK = 512 };  // values made at a time

typedef struct progression {
  double start, step;
} progression;

static void produce_reals(sa_stream *elements, const void *argument) {
  const progression *const p = argument;
  double values[CHUNK];
  for (int64_t first = 0; elements->left; first += CHUNK) {
    for (int k = 0; k < CHUNK; k++) values[k] = p->start + p->step * (double)(first + k);
    sa_stream_write(elements, values, SA_F64, CHUNK);
  }
}

static void produce_integers(sa_stream *elements, const void *argument) {
  const progression *const p = argument;
  int64_t values[CHUNK];
  // Unsigned, because values beyond the last one, which nobody reads, may wrap.
  uint64_t next = (uint64_t)(int64_t)p->start;
  while (elements->left) {
    for (int k = 0; k < CHUNK; k++, next += (uint64_t)(int64_t)p->step) values[k] = (int64_t)next;
    sa_stream_write(elements, values, SA_I64, CHUNK);
  }
}

// Every value must be one that the integer dtype can hold: whole numbers, and both ends in its range.
static int check_progression(const char *function, const sa_tensor *t, double start, double step) {
  int status = check_value(function, "start", start, t->dtype);
  if (!status) status = check_value(function, "step", step, SA_I64);
  if (status) return status;
  const int64_t most = t->dtype == SA_I32 ? INT32_MAX : INT64_MAX, least = -most - 1;
  const __int128 last = (__int128)(int64_t)step * (sa_tensor_numel(t) - 1) + (int64_t)start;
  if (last < least || last > most)
    return sa_fail(SA_INVALID, function, "step: got %.17g, wanted %lld elements from %.17g on in the range of %s", step,
                   (long long)sa_tensor_numel(t), start, sa_dtype_name(t->dtype));
  return SA_OK;
}

int sa_arange(sa_tensor *t, double start, double step) {
  int status = sa_tensor_check_writable(__func__, "t", t);
  if (status) return status;
  if (t->dtype == SA_BOOL) return sa_fail(SA_INVALID, __func__, "dtype: got bool, wanted one of numbers");
  const bool integers = t->dtype == SA_I32 || t->dtype == SA_I64;
  if (integers) status = check_progression(__func__, t, start, step);
  if (status || sa_tensor_numel(t) == 0) return status;
  const sa_backend *backend = sa_backend_of(__func__, t->device);
  if (!backend) return SA_NO_DEVICE;
  if (backend->arange) return backend->arange(t, start, step);
  return sa_tensor_produce(t, integers ? produce_integers : produce_reals, &(progression){start, step});
}
