// which devices there are: the CPU always, GPUs when the CUDA library can be opened
#include "backend.h"
#include "status.h"

int sa_device_count(int kind) {
  return kind == SA_CPU;
}

const sa_backend *sa_backend_of(const char *function, int device) {
  if (device == SA_CPU) return &sa_cpu_backend;
  sa_fail(SA_NO_DEVICE, function, "device: got %s, but this build has no CUDA part; wanted cpu",
          sa_device_name(device));
  return NULL;
}
