// the pointwise operations on the CPU: unary ones with their derivatives, binary ones, comparisons, choices
#include "kernels/cpu/functions.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/strided.h"

typedef float f32;
typedef double f64;
typedef int32_t i32;
typedef int64_t i64;

// Operands may be the very output, so nothing is `restrict`, and only an element's own value is ever read: the pragma
// says so.
#define EACH _Pragma("GCC ivdep") for (int64_t i = 0; i < count; i++)

/*  Unary  */

static inline f32 exp_f32(f32 x) {
  return sa_exp_f32(x);
}
static inline f64 exp_f64(f64 x) {
  return exp(x);
}
static inline f32 log_f32(f32 x) {
  return sa_log_f32(x);
}
static inline f64 log_f64(f64 x) {
  return log(x);
}
static inline f32 sqrt_f32(f32 x) {
  return sqrtf(x);
}
static inline f64 sqrt_f64(f64 x) {
  return sqrt(x);
}
static inline f32 tanh_f32(f32 x) {
  return sa_tanh_f32(x);
}
static inline f64 tanh_f64(f64 x) {
  return tanh(x);
}
static inline f32 abs_f32(f32 x) {
  return fabsf(x);
}
static inline f64 abs_f64(f64 x) {
  return fabs(x);
}
static inline f32 normal_f32(f32 x) {
  return sa_normal_f32(x);
}
static inline f64 normal_f64(f64 x) {
  return 0.5 * erfc(-0.707106781186547524 * x);
}  // 1 + erf would cancel
static inline f32 density_f32(f32 x) {
  return sa_normal_density_f32(x);
}
static inline f64 density_f64(f64 x) {
  return 0.398942280401432678 * exp(-0.5 * x * x);
}

typedef void (*unary_loop)(const void *in, void *out, int64_t count);
typedef void (*unary_slope)(const void *in, const void *slope, void *out, int64_t count);

#define UNARY(NAME, TYPE, EXPRESSION)                                   \
  static void NAME##_##TYPE(const void *in, void *out, int64_t count) { \
    const TYPE *const from = in;                                        \
    TYPE *const to = out;                                               \
    EACH {                                                              \
      const TYPE x = from[i];                                           \
      to[i] = EXPRESSION;                                               \
    }                                                                   \
  }
// dx from what the op keeps, its input or its output v, and dy.
#define SLOPE(NAME, TYPE, EXPRESSION)                                                        \
  static void NAME##_##TYPE(const void *kept, const void *slope, void *out, int64_t count) { \
    const TYPE *const from = kept, *const given = slope;                                     \
    TYPE *const to = out;                                                                    \
    EACH {                                                                                   \
      const TYPE v = from[i], dy = given[i];                                                 \
      to[i] = EXPRESSION;                                                                    \
    }                                                                                        \
  }
#define BOTH_TYPES(T)                                                                                              \
  UNARY(forward_neg, T, -x)                                                                                        \
  UNARY(forward_exp, T, exp_##T(x))                                                                                \
  UNARY(forward_log, T, log_##T(x))                                                                                \
  UNARY(forward_sqrt, T, sqrt_##T(x))                                                                              \
  UNARY(forward_tanh, T, tanh_##T(x))                                                                              \
  UNARY(forward_relu, T, x < 0 ? 0 : x)                                                                            \
  UNARY(forward_gelu, T, x *normal_##T(x))                                                                         \
  UNARY(forward_abs, T, abs_##T(x))                                                                                \
  SLOPE(backward_neg, T, ((void)v, -dy))                                                                           \
  SLOPE(backward_exp, T, dy *v)                                                                                    \
  SLOPE(backward_log, T, dy / v)                                                                                   \
  SLOPE(backward_sqrt, T, dy / (2 * v))                                                                            \
  SLOPE(backward_tanh, T, dy *(1 - v * v))                                                                         \
  SLOPE(backward_relu, T, v <= 0 ? 0 : dy)                                                                         \
  SLOPE(backward_gelu, T, dy *(normal_##T(v) + v * density_##T(v)))                                                \
  SLOPE(backward_abs, T, v > 0 ? dy : v < 0 ? -dy : v == 0 ? 0 : v)                                                \
  static const unary_loop forward_##T[] = {forward_neg_##T,  forward_exp_##T,  forward_log_##T,  forward_sqrt_##T, \
                                           forward_tanh_##T, forward_relu_##T, forward_gelu_##T, forward_abs_##T}; \
  static const unary_slope backward_##T[] = {                                                                      \
      backward_neg_##T,  backward_exp_##T,  backward_log_##T,  backward_sqrt_##T,                                  \
      backward_tanh_##T, backward_relu_##T, backward_gelu_##T, backward_abs_##T};

BOTH_TYPES(f32)
BOTH_TYPES(f64)

typedef struct unary_job {
  unary_loop loop;
  unary_slope slope;
  int dtype, compute;
} unary_job;

static void unary_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const unary_job *j = argument;
  double in[SA_PIECE], out[SA_PIECE];
  void *to = sa_piece_target(out, j->compute, data[0], j->dtype, step[0]);
  j->loop(sa_piece_read(in, j->compute, data[1], j->dtype, step[1], count), to, count);
  sa_piece_write(data[0], j->dtype, step[0], to, j->compute, count);
}

static void slope_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const unary_job *j = argument;
  double kept[SA_PIECE], dy[SA_PIECE], out[SA_PIECE];
  void *to = sa_piece_target(out, j->compute, data[0], j->dtype, step[0]);
  j->slope(sa_piece_read(kept, j->compute, data[1], j->dtype, step[1], count),
           sa_piece_read(dy, j->compute, data[2], j->dtype, step[2], count), to, count);
  sa_piece_write(data[0], j->dtype, step[0], to, j->compute, count);
}

// Flops that an element is worth when threads are asked for: what it costs beside an addition.
static double unary_cost(int op) {
  return op == SA_EXP || op == SA_LOG ? 4 : op == SA_TANH || op == SA_GELU ? 16 : 1;
}

int sa_cpu_unary(int op, const sa_tensor *x, const sa_tensor *y) {
  unary_job j = {.loop = x->dtype == SA_F64 ? forward_f64[op] : forward_f32[op],
                 .dtype = x->dtype,
                 .compute = sa_compute_dtype(x->dtype)};
  const sa_strided walk = sa_strided_of(2, (const sa_tensor *[]){y, x}, 0, true);
  sa_strided_run_all(&walk, unary_cost(op), unary_piece, &j);
  return SA_OK;
}

int sa_cpu_unary_backward(int op, const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, const sa_tensor *dx) {
  const bool keeps_output = op == SA_EXP || op == SA_SQRT || op == SA_TANH;
  const sa_tensor *kept = op == SA_NEG ? dy : keeps_output ? y : x;
  unary_job j = {.slope = dx->dtype == SA_F64 ? backward_f64[op] : backward_f32[op],
                 .dtype = dx->dtype,
                 .compute = sa_compute_dtype(dx->dtype)};
  const sa_strided walk = sa_strided_of(3, (const sa_tensor *[]){dx, kept, dy}, 0, true);
  sa_strided_run_all(&walk, op == SA_GELU ? 16 : 1, slope_piece, &j);
  return SA_OK;
}

/*  Binary  */

typedef void (*binary_loop)(const void *a, const void *b, void *out, int64_t count);

#define BINARY(NAME, TYPE, RESULT, EXPRESSION)                                                 \
  static void NAME##_##TYPE(const void *first, const void *second, void *out, int64_t count) { \
    const TYPE *const left = first, *const right = second;                                     \
    RESULT *const to = out;                                                                    \
    EACH {                                                                                     \
      const TYPE a = left[i], b = right[i];                                                    \
      to[i] = (RESULT)(EXPRESSION);                                                            \
    }                                                                                          \
  }
#define COMPARISONS(T)           \
  BINARY(lt, T, uint8_t, a < b)  \
  BINARY(le, T, uint8_t, a <= b) \
  BINARY(gt, T, uint8_t, a > b)  \
  BINARY(ge, T, uint8_t, a >= b) \
  BINARY(eq, T, uint8_t, a == b) \
  BINARY(ne, T, uint8_t, a != b)
#define FLOAT_ARITHMETIC(T) \
  BINARY(add, T, T, a + b)  \
  BINARY(sub, T, T, a - b)  \
  BINARY(mul, T, T, a *b)   \
  BINARY(div, T, T, a / b)
// Integers wrap around. A quotient is cut towards 0; where there is none, it is what a cast makes of the one of floats:
// the end of the range, and 0 for 0 / 0.
#define INTEGER_ARITHMETIC(T, U, MIN, MAX)            \
  static inline T quotient_##T(T a, T b) {            \
    if (b == 0) return a > 0 ? MAX : a < 0 ? MIN : 0; \
    return b == -1 ? (a == MIN ? MAX : -a) : a / b;   \
  }                                                   \
  BINARY(add, T, T, (U)a + (U)b)                      \
  BINARY(sub, T, T, (U)a - (U)b)                      \
  BINARY(mul, T, T, (U)a *(U)b)                       \
  BINARY(div, T, T, quotient_##T(a, b))
#define BINARY_TABLE(T)                                                                \
  static const binary_loop binary_##T[] = {add_##T, sub_##T, mul_##T, div_##T, lt_##T, \
                                           le_##T,  gt_##T,  ge_##T,  eq_##T,  ne_##T};

COMPARISONS(f32)
COMPARISONS(f64)
COMPARISONS(i32)
COMPARISONS(i64)
FLOAT_ARITHMETIC(f32)
FLOAT_ARITHMETIC(f64)
INTEGER_ARITHMETIC(i32, uint32_t, INT32_MIN, INT32_MAX)
INTEGER_ARITHMETIC(i64, uint64_t, INT64_MIN, INT64_MAX)
BINARY_TABLE(f32)
BINARY_TABLE(f64)
BINARY_TABLE(i32)
BINARY_TABLE(i64)

typedef struct binary_job {
  binary_loop loop;
  int a_dtype, b_dtype, y_dtype;
  int compute, result;  // what the loop reads and writes
} binary_job;

static void binary_piece(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const binary_job *j = argument;
  double a[SA_PIECE], b[SA_PIECE], out[SA_PIECE];
  void *to = sa_piece_target(out, j->result, data[0], j->y_dtype, step[0]);
  j->loop(sa_piece_read(a, j->compute, data[1], j->a_dtype, step[1], count),
          sa_piece_read(b, j->compute, data[2], j->b_dtype, step[2], count), to, count);
  sa_piece_write(data[0], j->y_dtype, step[0], to, j->result, count);
}

int sa_cpu_binary(int op, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y) {
  binary_job j = {.a_dtype = a->dtype, .b_dtype = b->dtype, .y_dtype = y->dtype};
  j.compute = sa_compute_dtype(a->dtype);
  j.result = op >= SA_LT ? SA_BOOL : j.compute;
  j.loop = j.compute == SA_F32   ? binary_f32[op]
           : j.compute == SA_F64 ? binary_f64[op]
           : j.compute == SA_I32 ? binary_i32[op]
                                 : binary_i64[op];
  const sa_strided walk = sa_strided_of(3, (const sa_tensor *[]){y, a, b}, 0, true);
  sa_strided_run_all(&walk, 1, binary_piece, &j);
  return SA_OK;
}

/*  Choice  */

#define WHERE(TYPE, SIZE)                                                                           \
  static void where_##SIZE(void *argument, char *const *data, const int64_t *step, int64_t count) { \
    TYPE *const y = (TYPE *)data[0];                                                                \
    const uint8_t *const condition = (const uint8_t *)data[1];                                      \
    const TYPE *const a = (const TYPE *)data[2], *const b = (const TYPE *)data[3];                  \
    if (step[0] == 1 && step[1] == 1 && step[2] == 1 && step[3] == 1) {                             \
      EACH y[i] = condition[i] ? a[i] : b[i];                                                       \
    } else {                                                                                        \
      EACH y[i * step[0]] = condition[i * step[1]] ? a[i * step[2]] : b[i * step[3]];               \
    }                                                                                               \
  }
WHERE(uint8_t, 1)
WHERE(uint16_t, 2)
WHERE(uint32_t, 4)
WHERE(uint64_t, 8)

int sa_cpu_where(const sa_tensor *condition, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y) {
  const int64_t size = sa_dtype_size(y->dtype);
  const sa_strided walk = sa_strided_of(4, (const sa_tensor *[]){y, condition, a, b}, 0, true);
  sa_strided_run_all(&walk, 1, size == 1 ? where_1 : size == 2 ? where_2 : size == 4 ? where_4 : where_8, NULL);
  return SA_OK;
}
