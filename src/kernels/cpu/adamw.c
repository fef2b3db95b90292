// one step of AdamW on the CPU
#include <math.h>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/strided.h"

typedef struct job {
  int dtype;
  double kept;  // of a parameter after its decay
  double beta1, beta2, epsilon;
  double step_size, second_correction;  // rate / (1 - beta1^step), 1 / (1 - beta2^step)
} job;

#define STEP(T, SQRT)                                                                                          \
  static void step_##T(const job *j, T *parameter, const T *gradient, T *moment1, T *moment2, int64_t count) { \
    const T kept = (T)j->kept, beta1 = (T)j->beta1, beta2 = (T)j->beta2, epsilon = (T)j->epsilon;              \
    const T rest1 = (T)(1 - j->beta1), rest2 = (T)(1 - j->beta2);                                              \
    const T step_size = (T)j->step_size, correction = (T)j->second_correction;                                 \
    _Pragma("GCC ivdep") for (int64_t i = 0; i < count; i++) {                                                 \
      const T g = gradient[i];                                                                                 \
      const T m = beta1 * moment1[i] + rest1 * g, v = beta2 * moment2[i] + rest2 * g * g;                      \
      moment1[i] = m;                                                                                          \
      moment2[i] = v;                                                                                          \
      parameter[i] = kept * parameter[i] - step_size * m / (SQRT(v * correction) + epsilon);                   \
    }                                                                                                          \
  }
STEP(float, sqrtf)
STEP(double, sqrt)

static void step_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  double buffer[SA_PIECE];
  const void *gradient = sa_piece_read(buffer, j->dtype, data[1], j->dtype, step[1], count);
  if (j->dtype == SA_F64)
    step_double(j, (double *)data[0], gradient, (double *)data[2], (double *)data[3], count);
  else
    step_float(j, (float *)data[0], gradient, (float *)data[2], (float *)data[3], count);
}

int sa_cpu_adamw(const sa_tensor *parameter, const sa_tensor *gradient, const sa_tensor *moment1,
                 const sa_tensor *moment2, const sa_adamw_options *o) {
  job j = {.dtype = parameter->dtype,
           .kept = 1 - o->rate * o->weight_decay,
           .beta1 = o->beta1,
           .beta2 = o->beta2,
           .epsilon = o->epsilon,
           .step_size = o->rate / (1 - pow(o->beta1, (double)o->step)),
           .second_correction = 1 / (1 - pow(o->beta2, (double)o->step))};
  const sa_tensor *all[] = {parameter, gradient, moment1, moment2};
  const sa_strided walk = sa_strided_of(4, all, 0, true);
  sa_strided_run_all(&walk, 8, step_piece, &j);
  return SA_OK;
}
