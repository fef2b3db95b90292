// the table of CUDA devices: finds them, and chooses the attention kernels for a problem
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/operations.cuh"

/*  Attention  */

// A build without sm_90a, or of a tree without some of the kernels, lacks the families that are weak here.
#pragma weak sa_cuda_reference_forward
#pragma weak sa_cuda_reference_backward
#pragma weak sa_cuda_portable_forward
#pragma weak sa_cuda_portable_backward
#pragma weak sa_cuda_portable_backward_small
#pragma weak sa_cuda_hopper_forward_covers
#pragma weak sa_cuda_hopper_backward_covers
#pragma weak sa_cuda_hopper_forward
#pragma weak sa_cuda_hopper_decoding_covers
#pragma weak sa_cuda_hopper_decoding
#pragma weak sa_cuda_hopper_backward

enum { PORTABLE_WIDTH = 256 };

static bool hopper_allowed(int device) {
  static const char *const kernels = getenv("SAFEATTN_CUDA_KERNELS");
  const sa_cuda_properties *properties = sa_cuda_properties_of(device);
  return properties->major == 9 && properties->minor == 0 && !(kernels && !strcmp(kernels, "portable"));
}

static bool hopper_forward(const sa_problem *p) {
  return sa_cuda_hopper_forward && hopper_allowed(p->device) && sa_cuda_hopper_forward_covers(p);
}

static bool hopper_decoding(const sa_problem *p) {
  return sa_cuda_hopper_decoding && hopper_allowed(p->device) && sa_cuda_hopper_decoding_covers(p);
}

// A small problem's launches take the host longer than the device takes for its products.
static bool hopper_backward(const sa_problem *p) {
  if (sa_cuda_portable_backward_small && sa_cuda_portable_backward_small(p)) return false;
  return sa_cuda_hopper_backward && hopper_allowed(p->device) && sa_cuda_hopper_backward_covers(p);
}

#define PORTABLE(dtype) \
  { "portable-" dtype, sa_cuda_portable_forward, sa_cuda_portable_backward }
static const sa_attention_kernels portable[] = {PORTABLE("f32"), PORTABLE("f64"), PORTABLE("f16"), PORTABLE("bf16")};

#define HOPPER(dtype, width, forward) \
  { "hopper-" dtype "-" width, forward, sa_cuda_hopper_backward }
#define HOPPERS(dtype, forward)                                                                \
  {                                                                                            \
    HOPPER(dtype, "64", forward), HOPPER(dtype, "96", forward), HOPPER(dtype, "128", forward), \
        HOPPER(dtype, "192", forward), HOPPER(dtype, "256", forward)                           \
  }
static const sa_attention_kernels hopper[2][5] = {HOPPERS("f16", sa_cuda_hopper_forward),
                                                  HOPPERS("bf16", sa_cuda_hopper_forward)};
static const sa_attention_kernels decoding[2][5] = {HOPPERS("f16", sa_cuda_hopper_decoding),
                                                    HOPPERS("bf16", sa_cuda_hopper_decoding)};

// The width that a problem is padded to.
static int hopper_width(const sa_problem *p) {
  static const int widths[] = {64, 96, 128, 192, 256};
  const int64_t width = p->width > p->value_width ? p->width : p->value_width;
  int k = 0;
  while (k < 4 && widths[k] < width) k++;
  return k;
}

static const sa_attention_kernels *choose_fused(const sa_problem *p, bool for_backward) {
  const bool halves = p->dtype == SA_F16 || p->dtype == SA_BF16;
  if (halves && !for_backward && hopper_decoding(p)) return &decoding[p->dtype == SA_BF16][hopper_width(p)];
  if (halves && (for_backward ? hopper_backward(p) : hopper_forward(p)))
    return &hopper[p->dtype == SA_BF16][hopper_width(p)];
  const bool there = for_backward ? sa_cuda_portable_backward != NULL : sa_cuda_portable_forward != NULL;
  return there && p->width <= PORTABLE_WIDTH && p->value_width <= PORTABLE_WIDTH ? &portable[p->dtype] : NULL;
}

static const sa_attention_kernels *choose_reference(const sa_problem *p) {
  static const sa_attention_kernels reference = {"reference-cuda", sa_cuda_reference_forward,
                                                 sa_cuda_reference_backward};
  return reference.forward && reference.backward ? &reference : NULL;
}

/*  The table  */

static const sa_device_control control = {
    sa_cuda_synchronize,   sa_cuda_count_memory,        sa_cuda_drop_cache,     sa_cuda_stream_create,
    sa_cuda_stream_forget, sa_cuda_stream_make_current, sa_cuda_current_stream, sa_cuda_stream_wait,
};

static const sa_operations operations = {
    sa_cuda_unary,
    sa_cuda_unary_backward,
    sa_cuda_binary,
    sa_cuda_where,
    sa_cuda_reduce,
    sa_cuda_softmax,
    sa_cuda_softmax_backward,
    sa_cuda_matmul,
    sa_cuda_merge,
    sa_cuda_merge_backward,
    sa_cuda_layernorm,
    sa_cuda_layernorm_backward,
    sa_cuda_stray_id,
    sa_cuda_embedding,
    sa_cuda_embedding_backward,
    sa_cuda_cross_entropy,
    sa_cuda_cross_entropy_backward,
    sa_cuda_adamw,
};

static char text[160];

static sa_backend table = [] {
  sa_backend made = {};
  made.name = "cuda";
  made.text = text;
  made.allocate = sa_cuda_allocate;
  made.release = sa_cuda_release;
  made.copy = sa_cuda_copy;
  made.fill = sa_cuda_fill;
  made.draw = sa_cuda_draw;
  made.arange = sa_cuda_arange;
  made.totals = sa_cuda_totals;
  made.all_near = sa_cuda_all_near;
  made.pack = sa_cuda_pack;
  made.reference = choose_reference;
  made.fused = choose_fused;
  made.operations = &operations;
  made.control = &control;
  return made;
}();

static void describe(int count) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  cudaDeviceProp first;
  memset(&first, 0, sizeof first);
  cudaGetDeviceProperties(&first, 0);
  snprintf(text, sizeof text, "%d device%s: %.60s%s (compute capability %d.%d), driver for CUDA %d.%d, runtime %d.%d",
           count, count == 1 ? "" : "s", first.name, count == 1 ? "" : ", ...", first.major, first.minor, driver / 1000,
           driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
}

static void say_why(cudaError_t error, char *message, int64_t size) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0)
    snprintf(message, (size_t)size, "there is no NVIDIA driver (libcuda.so.1)");
  else if (driver / 1000 < runtime / 1000)
    snprintf(message, (size_t)size, "the NVIDIA driver is for CUDA %d.%d, wanted one for %d or newer", driver / 1000,
             driver % 1000 / 10, runtime / 1000);
  else
    snprintf(message, (size_t)size, "CUDA says: %s (%s)",
             error == cudaSuccess ? "no CUDA-capable device is detected" : cudaGetErrorString(error),
             cudaGetErrorName(error == cudaSuccess ? cudaErrorNoDevice : error));
}

extern "C" __attribute__((visibility("default"))) const sa_backend *sa_cuda_open(const sa_host *host, char *message,
                                                                                 int64_t size) {
  if (host->layout != SA_LAYOUT) {
    snprintf(message, (size_t)size, "the CUDA part (cuda.so) was built from other sources than the library; run make");
    return NULL;
  }
  sa_cuda_host = host;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    say_why(error, message, size);
    cudaGetLastError();
    return NULL;
  }
  table.count = count < SA_CUDA_DEVICES ? count : SA_CUDA_DEVICES;
  describe(count);
  return &table;
}
