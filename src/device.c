// which devices there are: the CPU always, GPUs when the CUDA library can be opened
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend.h"
#include "memory.h"
#include "status.h"

/*  The CUDA library  */

enum { PATH_BYTES = PATH_MAX, WHY_BYTES = 3 * PATH_MAX };  // a reason names a path, which may be two joined

static const sa_backend *cuda;  // NULL: there are no CUDA devices,
static char none[sizeof "none: " + WHY_BYTES] = "none: ";
static char *const missing = none + 6;  // and this is why

static const sa_host host = {
    .layout = SA_LAYOUT,
    .fail = sa_fail,
    .allocate = sa_allocate,
    .release = sa_release,
    .interrupted = sa_interrupted,
    .plan_copy = sa_plan_copy_on,
    .attach_plan_copy = sa_plan_attach_copy,
};

// This library's own file. A name that is not from the root counts from the folder that the program is in when it loads
// the library: it may be in another one when it asks for a device.
static char self[2 * PATH_BYTES];

__attribute__((constructor)) static void find_self(void) {
  Dl_info info;
  const char *name = dladdr((const void *)sa_device_count, &info) && info.dli_fname ? info.dli_fname : "";
  char folder[PATH_BYTES];
  if (*name == '/')
    snprintf(self, sizeof self, "%s", name);
  else
    snprintf(self, sizeof self, "%s/%s", getcwd(folder, sizeof folder) ? folder : ".", name);
}

// Beside this library (in the tree, and for Lua), or in a folder there (installed for C).
static bool find_library(char *path, size_t size) {
  const char *named = getenv("SAFEATTN_CUDA_LIB");
  if (named && *named) return snprintf(path, size, "%s", named) > 0;
  const int folder = (int)(strrchr(self, '/') + 1 - self);
  const char *const places[] = {"cuda.so", "safeattn/cuda.so"};
  for (int i = 0; i < 2; i++) {
    snprintf(path, size, "%.*s%s", folder, self, places[i]);
    if (!access(path, F_OK)) return true;
  }
  snprintf(missing, WHY_BYTES, "this build has no CUDA part: there is no cuda.so beside %s", self);
  return false;
}

static void open_library(void) {
  char path[sizeof self + sizeof "safeattn/cuda.so"];
  if (!find_library(path, sizeof path)) return;
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(missing, WHY_BYTES, "the CUDA part cannot be loaded: %s", dlerror());
    return;
  }
  const sa_cuda_opener open = (sa_cuda_opener)dlsym(library, "sa_cuda_open");
  if (open) cuda = open(&host, missing, WHY_BYTES);
  if (!open) snprintf(missing, WHY_BYTES, "%s is no CUDA part of safeattn: it has no sa_cuda_open", path);
}

static const sa_backend *cuda_backend(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, open_library);
  return cuda;
}

/*  Devices  */

int sa_device_count(int kind) {
  if (kind == SA_CPU) return 1;
  return kind == SA_CUDA && cuda_backend() ? cuda_backend()->count : 0;
}

const char *sa_describe_cuda(void) {
  const sa_backend *backend = cuda_backend();
  return backend ? backend->text : none;
}

const sa_backend *sa_backend_of(const char *function, int device) {
  if (device == SA_CPU) return &sa_cpu_backend;
  const sa_backend *backend = device >= SA_CUDA ? cuda_backend() : NULL;
  if (backend && device - SA_CUDA < backend->count) return backend;
  if (backend)
    sa_fail(SA_NO_DEVICE, function, "there is no %s, only %s", sa_device_name(device), backend->text);
  else if (device >= SA_CUDA)
    sa_fail(SA_NO_DEVICE, function, "there is no %s: %s", sa_device_name(device), missing);
  else
    sa_fail(SA_NO_DEVICE, function, "device: got %s, wanted cpu or cuda", sa_device_name(device));
  return NULL;
}

/*  What can be asked of a device  */

static const sa_device_control *control_of(const char *function, int device) {
  if (device == SA_CPU) {
    sa_fail(SA_INVALID, function, "device: got cpu, wanted a CUDA device");
    return NULL;
  }
  const sa_backend *backend = sa_backend_of(function, device);
  return backend ? backend->control : NULL;
}

static int refuse(int device) {
  return device == SA_CPU ? SA_INVALID : SA_NO_DEVICE;
}

int sa_synchronize(int device) {
  if (device == SA_CPU) return SA_OK;
  const sa_device_control *control = control_of(__func__, device);
  return control ? control->synchronize(__func__, device) : refuse(device);
}

int sa_cuda_memory(int device, sa_device_memory *out) {
  if (!out) return sa_fail(SA_INVALID, __func__, "out: got NULL, wanted where to put the counts");
  const sa_device_control *control = control_of(__func__, device);
  return control ? control->memory(__func__, device, out) : refuse(device);
}

int sa_cuda_empty_cache(int device) {
  const sa_device_control *control = control_of(__func__, device);
  return control ? control->empty_cache(__func__, device) : refuse(device);
}

int sa_cuda_stream_new(int device, void **stream) {
  if (!stream) return sa_fail(SA_INVALID, __func__, "stream: got NULL, wanted where to put the stream");
  const sa_device_control *control = control_of(__func__, device);
  return control ? control->stream_new(__func__, device, stream) : refuse(device);
}

int sa_cuda_stream_use(int device, void *stream) {
  const sa_device_control *control = control_of(__func__, device);
  return control ? control->stream_use(__func__, device, stream) : refuse(device);
}

int sa_cuda_stream(int device, void **stream) {
  if (!stream) return sa_fail(SA_INVALID, __func__, "stream: got NULL, wanted where to put the stream");
  const sa_device_control *control = control_of(__func__, device);
  if (control) *stream = control->stream_current(device);
  return control ? SA_OK : refuse(device);
}

int sa_cuda_stream_synchronize(int device, void *stream) {
  const sa_device_control *control = control_of(__func__, device);
  return control ? control->stream_synchronize(__func__, device, stream) : refuse(device);
}

int sa_cuda_stream_release(int device, void *stream) {
  const sa_device_control *control = control_of(__func__, device);
  return control ? control->stream_release(__func__, device, stream) : refuse(device);
}
