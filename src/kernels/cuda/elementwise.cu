// the pointwise operations on CUDA devices, with the very functions of the CPU; built without fused multiply-adds, so
// that f32 has the CPU's bits
#include "kernels/cpu/functions.h"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/walk.cuh"

/*  Unary  */

static __device__ __forceinline__ float normal(float x) {
  return sa_normal_f32(x);
}
static __device__ __forceinline__ double normal(double x) {
  return 0.5 * erfc(-0.707106781186547524 * x);  // 1 + erf would cancel
}
static __device__ __forceinline__ float density(float x) {
  return sa_normal_density_f32(x);
}
static __device__ __forceinline__ double density(double x) {
  return 0.398942280401432678 * exp(-0.5 * x * x);
}
static __device__ __forceinline__ float exponential(float x) {
  return sa_exp_f32(x);
}
static __device__ __forceinline__ double exponential(double x) {
  return exp(x);
}
static __device__ __forceinline__ float logarithm(float x) {
  return sa_log_f32(x);
}
static __device__ __forceinline__ double logarithm(double x) {
  return log(x);
}
static __device__ __forceinline__ float tangent(float x) {
  return sa_tanh_f32(x);
}
static __device__ __forceinline__ double tangent(double x) {
  return tanh(x);
}

template <class C>
static __device__ __forceinline__ C function_of(int op, C x) {
  switch (op) {
    case SA_NEG:
      return -x;
    case SA_EXP:
      return exponential(x);
    case SA_LOG:
      return logarithm(x);
    case SA_SQRT:
      return (C)sqrt(x);
    case SA_TANH:
      return tangent(x);
    case SA_RELU:
      return x < 0 ? (C)0 : x;
    case SA_GELU:
      return x * normal(x);
    default:
      return (C)fabs(x);
  }
}

// dx from what the op keeps, its input or its output v, and dy.
template <class C>
static __device__ __forceinline__ C slope_of(int op, C v, C dy) {
  switch (op) {
    case SA_NEG:
      return -dy;
    case SA_EXP:
      return dy * v;
    case SA_LOG:
      return dy / v;
    case SA_SQRT:
      return dy / (2 * v);
    case SA_TANH:
      return dy * (1 - v * v);
    case SA_RELU:
      return v <= 0 ? (C)0 : dy;
    case SA_GELU:
      return dy * (normal(v) + v * density(v));
    default:
      return v > 0 ? dy : v < 0 ? -dy : v == 0 ? (C)0 : v;
  }
}

template <class T>
struct unary_task {
  T *y;
  const T *x;
  int op;
  __device__ void operator()(int64_t, const int64_t *at) const {
    sa_put(y + at[0], function_of(op, sa_wide(x[at[1]])));
  }
};

template <class T>
struct slope_task {
  T *dx;
  const T *kept, *dy;
  int op;
  __device__ void operator()(int64_t, const int64_t *at) const {
    sa_put(dx + at[0], slope_of(op, sa_wide(kept[at[1]]), sa_wide(dy[at[2]])));
  }
};

int sa_cuda_unary(int op, const sa_tensor *x, const sa_tensor *y) {
  const sa_strided walk = sa_walk_of(y, x);
  return sa_with_float(x->dtype, [&](auto t) {
    using T = decltype(t);
    return sa_cuda_each<2>("sa_unary", x->device, walk, unary_task<T>{(T *)y->data, (const T *)x->data, op});
  });
}

int sa_cuda_unary_backward(int op, const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, const sa_tensor *dx) {
  const bool keeps_output = op == SA_EXP || op == SA_SQRT || op == SA_TANH;
  const sa_tensor *kept = op == SA_NEG ? dy : keeps_output ? y : x;
  const sa_strided walk = sa_walk_of(dx, kept, dy);
  return sa_with_float(dx->dtype, [&](auto t) {
    using T = decltype(t);
    return sa_cuda_each<3>("sa_unary_backward", dx->device, walk,
                           slope_task<T>{(T *)dx->data, (const T *)kept->data, (const T *)dy->data, op});
  });
}

/*  Binary  */

// What a dtype is computed in, and how it is read and written there.
template <class T>
struct arithmetic {
  using type = T;  // double, i32, i64
  static __device__ T read(T x) { return x; }
  static __device__ void write(T *to, T x) { *to = x; }
};
template <class T>
struct float_arithmetic {
  using type = float;
  static __device__ float read(T x) { return sa_wide(x); }
  static __device__ void write(T *to, float x) { sa_put(to, x); }
};
template <>
struct arithmetic<float> : float_arithmetic<float> {};
template <>
struct arithmetic<sa_f16> : float_arithmetic<sa_f16> {};
template <>
struct arithmetic<sa_bf16> : float_arithmetic<sa_bf16> {};
template <>
struct arithmetic<bool> {
  using type = int32_t;
  static __device__ int32_t read(bool x) { return x; }
  static __device__ void write(bool *to, int32_t x) { *to = x != 0; }
};

template <class C>
static __device__ __forceinline__ C calculate(int op, C a, C b) {
  return op == SA_ADD ? a + b : op == SA_SUB ? a - b : op == SA_MUL ? a * b : a / b;
}

// Integers wrap around. A quotient is cut towards 0; where there is none, it is what a cast makes of the one of floats:
// the end of the range, and 0 for 0 / 0.
template <class C, class U>
static __device__ __forceinline__ C calculate_whole(int op, C a, C b, C least, C most) {
  if (op == SA_ADD) return (C)((U)a + (U)b);
  if (op == SA_SUB) return (C)((U)a - (U)b);
  if (op == SA_MUL) return (C)((U)a * (U)b);
  if (b == 0) return a > 0 ? most : a < 0 ? least : (C)0;
  if (b == -1) return a == least ? most : (C)-a;
  return a / b;
}
static __device__ __forceinline__ int32_t calculate(int op, int32_t a, int32_t b) {
  return calculate_whole<int32_t, uint32_t>(op, a, b, INT32_MIN, INT32_MAX);
}
static __device__ __forceinline__ int64_t calculate(int op, int64_t a, int64_t b) {
  return calculate_whole<int64_t, uint64_t>(op, a, b, INT64_MIN, INT64_MAX);
}

template <class C>
static __device__ __forceinline__ bool compare(int op, C a, C b) {
  switch (op) {
    case SA_LT:
      return a < b;
    case SA_LE:
      return a <= b;
    case SA_GT:
      return a > b;
    case SA_GE:
      return a >= b;
    case SA_EQ:
      return a == b;
    default:
      return a != b;
  }
}

// An operand whose data is NULL is the scalar.
template <class T>
struct operands {
  using C = typename arithmetic<T>::type;
  const T *a, *b;
  C scalar;
  __device__ C first(const int64_t *at) const { return a ? arithmetic<T>::read(a[at[1]]) : scalar; }
  __device__ C second(const int64_t *at) const { return b ? arithmetic<T>::read(b[at[2]]) : scalar; }
};

template <class T>
struct arithmetic_task {
  T *y;
  operands<T> x;
  int op;
  __device__ void operator()(int64_t, const int64_t *at) const {
    arithmetic<T>::write(y + at[0], calculate(op, x.first(at), x.second(at)));
  }
};

template <class T>
struct comparison_task {
  bool *y;
  operands<T> x;
  int op;
  __device__ void operator()(int64_t, const int64_t *at) const { y[at[0]] = compare(op, x.first(at), x.second(at)); }
};

template <class C>
static C scalar_value(const sa_tensor *t) {
  switch (t->dtype) {
    case SA_F32:
      return (C) * (const float *)t->data;
    case SA_F64:
      return (C) * (const double *)t->data;
    case SA_I32:
      return (C) * (const int32_t *)t->data;
    case SA_I64:
      return (C) * (const int64_t *)t->data;
    default:
      return (C) * (const uint8_t *)t->data;
  }
}

template <class T>
static operands<T> operands_of(const sa_tensor *a, const sa_tensor *b) {
  operands<T> x = {};
  if (a->device == SA_CPU)
    x.scalar = scalar_value<typename operands<T>::C>(a);
  else
    x.a = (const T *)a->data;
  if (b->device == SA_CPU)
    x.scalar = scalar_value<typename operands<T>::C>(b);
  else
    x.b = (const T *)b->data;
  return x;
}

int sa_cuda_binary(int op, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y) {
  const sa_strided walk = sa_walk_of(y, a, b);
  const int dtype = a->device == SA_CPU ? b->dtype : a->dtype;
  return sa_with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const operands<T> x = operands_of<T>(a, b);
    if (op >= SA_LT) return sa_cuda_each<3>("sa_binary", y->device, walk, comparison_task<T>{(bool *)y->data, x, op});
    return sa_cuda_each<3>("sa_binary", y->device, walk, arithmetic_task<T>{(T *)y->data, x, op});
  });
}

/*  Choice  */

template <class T>
struct where_task {
  T *y;
  const bool *condition;
  const T *a, *b;
  __device__ void operator()(int64_t, const int64_t *at) const { y[at[0]] = condition[at[1]] ? a[at[2]] : b[at[3]]; }
};

template <class T>
static int choose(const sa_tensor *condition, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y) {
  return sa_cuda_each<4>(
      "sa_where", y->device, sa_walk_of(y, condition, a, b),
      where_task<T>{(T *)y->data, (const bool *)condition->data, (const T *)a->data, (const T *)b->data});
}

int sa_cuda_where(const sa_tensor *condition, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y) {
  const int64_t size = sa_element_size(y->dtype);
  return (size == 1   ? choose<uint8_t>
          : size == 2 ? choose<uint16_t>
          : size == 4 ? choose<uint32_t>
                      : choose<uint64_t>)(condition, a, b, y);
}
