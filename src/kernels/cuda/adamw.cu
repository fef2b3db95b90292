// one step of AdamW on CUDA devices; built without fused multiply-adds, so that it has the CPU's bits
#include <math.h>

#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/walk.cuh"

template <class T>
struct step_task {
  T *parameter;
  const T *gradient;
  T *moment1, *moment2;
  T kept, beta1, beta2, rest1, rest2, epsilon, step_size, correction;
  __device__ void operator()(int64_t, const int64_t *at) const {
    const T g = gradient[at[1]];
    const T m = beta1 * moment1[at[2]] + rest1 * g, v = beta2 * moment2[at[3]] + rest2 * g * g;
    moment1[at[2]] = m;
    moment2[at[3]] = v;
    parameter[at[0]] = kept * parameter[at[0]] - step_size * m / ((T)sqrt(v * correction) + epsilon);
  }
};

template <class T>
static int step(const sa_tensor *parameter, const sa_tensor *gradient, const sa_tensor *moment1,
                const sa_tensor *moment2, const sa_adamw_options *o) {
  const step_task<T> task = {
      (T *)parameter->data,
      (const T *)gradient->data,
      (T *)moment1->data,
      (T *)moment2->data,
      (T)(1 - o->rate * o->weight_decay),
      (T)o->beta1,
      (T)o->beta2,
      (T)(1 - o->beta1),
      (T)(1 - o->beta2),
      (T)o->epsilon,
      (T)(o->rate / (1 - pow(o->beta1, (double)o->step))),
      (T)(1 / (1 - pow(o->beta2, (double)o->step))),
  };
  return sa_cuda_each<4>("sa_adamw", parameter->device, sa_walk_of(parameter, gradient, moment1, moment2), task);
}

int sa_cuda_adamw(const sa_tensor *parameter, const sa_tensor *gradient, const sa_tensor *moment1,
                  const sa_tensor *moment2, const sa_adamw_options *options) {
  return (parameter->dtype == SA_F64 ? step<double> : step<float>)(parameter, gradient, moment1, moment2, options);
}
