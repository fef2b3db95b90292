// codes and messages: what failed last on this thread, and how tensors and devices are named in a sentence
#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MESSAGE_BYTES = 1024, NAME_BYTES = 256, NAMES = 4 };

static _Thread_local char last_error[MESSAGE_BYTES];

int sa_abi(void) {
  return SA_ABI;
}

const char *sa_version(void) {
  return "0.1.0";
}

const char *sa_last_error(void) {
  return last_error;
}

const char *sa_status_name(int status) {
  switch (status) {
    case SA_OK:
      return "ok";
    case SA_INVALID:
      return "invalid argument";
    case SA_NO_MEMORY:
      return "no memory";
    case SA_NO_DEVICE:
      return "no device";
    case SA_UNSUPPORTED:
      return "unsupported";
    case SA_INTERRUPTED:
      return "interrupted";
    default:
      return "unknown status";
  }
}

// The sign of a NaN is chance: 0/0 has one here and none there.
static void unsign_nan(char *message) {
  for (char *at; (at = strstr(message, " -nan"));) memmove(at + 1, at + 2, strlen(at + 1));
}

int sa_fail(int status, const char *function, const char *format, ...) {
  // Written aside first: an argument may be sa_last_error() itself.
  char message[MESSAGE_BYTES];
  const int prefix = snprintf(message, sizeof message, "%.80s: ", function);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + prefix, sizeof message - (size_t)prefix, format, arguments);
  va_end(arguments);
  unsign_nan(message);
  memcpy(last_error, message, sizeof message);
  return status;
}

// The next of the calling thread's buffers for a name.
static char *name_buffer(void) {
  static _Thread_local char buffers[NAMES][NAME_BYTES];
  static _Thread_local unsigned next;
  return buffers[next++ % NAMES];
}

// 8 dims of at most 20 characters and their commas: always fits.
static void print_shape(char *text, size_t size, int ndim, const int64_t *shape) {
  size_t used = (size_t)snprintf(text, size, "[");
  for (int dim = 0; dim < ndim && dim < SA_MAX_DIMS; dim++)
    used += (size_t)snprintf(text + used, size - used, dim ? ",%lld" : "%lld", (long long)shape[dim]);
  snprintf(text + used, size - used, "]");
}

const char *sa_describe_shape(int ndim, const int64_t *shape) {
  char *text = name_buffer();
  print_shape(text, NAME_BYTES, ndim, shape);
  return text;
}

const char *sa_describe(const sa_tensor *t) {
  if (!t) return "NULL";
  char *text = name_buffer();
  const int used = snprintf(text, NAME_BYTES, "%s", sa_dtype_name(t->dtype));
  print_shape(text + used, NAME_BYTES - (size_t)used, t->ndim, t->shape);
  return text;
}

const char *sa_device_name(int device) {
  if (device == SA_CPU) return "cpu";
  char *text = name_buffer();
  if (device >= SA_CUDA)
    snprintf(text, NAME_BYTES, "cuda:%d", device - SA_CUDA);
  else
    snprintf(text, NAME_BYTES, "device %d", device);
  return text;
}
