// what the programs that check instructions share: memory of both sides, comparisons
#ifndef SPEC_CUDA_CHECK_H
#define SPEC_CUDA_CHECK_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cuda/launch.cuh"

static int failures;

int sa_cuda_check(const char *function, cudaError_t error) {
  if (error == cudaSuccess) return 0;
  printf("%s: %s\n", function, cudaGetErrorString(error));
  failures++;
  return 1;
}

static void compare(const char *what, int at, double got, double want, double tolerance) {
  if (!(fabs(got - want) <= tolerance) && failures++ < 20) printf("%s[%d]: got %.9g, want %.9g\n", what, at, got, want);
}

// Small numbers that every format holds exactly.
static float small(int i) {
  return (float)((i * 7919 + 13) % 31 - 15) / 8;
}

// Memory that the device writes and the host reads after it.
template <class T>
struct both {
  T *device;
  int count;
  T *host;
  both(int count_) : count(count_), host((T *)calloc((size_t)count_, sizeof(T))) {
    sa_cuda_check("cudaMalloc", cudaMalloc((void **)&device, (size_t)count * sizeof(T)));
  }
  ~both() {
    cudaFree(device);
    free(host);
  }
  void send() { sa_cuda_check("send", cudaMemcpy(device, host, (size_t)count * sizeof(T), cudaMemcpyHostToDevice)); }
  void fetch() { sa_cuda_check("fetch", cudaMemcpy(host, device, (size_t)count * sizeof(T), cudaMemcpyDeviceToHost)); }
};

static int report() {
  printf(failures ? "%d failures\n" : "as defined\n", failures);
  return failures != 0;
}

#endif
