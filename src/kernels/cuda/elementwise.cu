// the pointwise operations on CUDA devices, with the very functions of the CPU; built without fused multiply-adds, so
// that f32 has the CPU's bits
#include <type_traits>

#include "kernels/cpu/functions.h"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/walk.cuh"

/*  Functions  */

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

// Which op is asked for every element, which costs nothing beside memory: all threads go the same way.
struct unary {
  int op;
  template <class W>
  __device__ __forceinline__ W operator()(W x, W) const {
    switch (op) {
      case SA_NEG:
        return -x;
      case SA_EXP:
        return exponential(x);
      case SA_LOG:
        return logarithm(x);
      case SA_SQRT:
        return (W)sqrt(x);
      case SA_TANH:
        return tangent(x);
      case SA_RELU:
        return x < 0 ? 0 : x;
      case SA_GELU:
        return x * normal(x);
      default:
        return (W)fabs(x);
    }
  }
};

// dx from what the op keeps, its input or its output v, and dy.
struct slope {
  int op;
  template <class W>
  __device__ __forceinline__ W operator()(W v, W dy) const {
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
        return v <= 0 ? 0 : dy;
      case SA_GELU:
        return dy * (normal(v) + v * density(v));
      default:
        return v > 0 ? dy : v < 0 ? -dy : v == 0 ? 0 : v;
    }
  }
};

template <class T>
struct arithmetic {
  int op;
  template <class W>
  __device__ __forceinline__ W operator()(W a, W b) const {
    return op == SA_ADD ? a + b : op == SA_SUB ? a - b : op == SA_MUL ? a * b : a / b;
  }
  // Integers wrap around. A quotient is cut towards 0; where there is none, it is what a cast makes of the one of
  // floats: the end of the range, and 0 for 0 / 0.
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const {
    if (op == SA_DIV) {
      if (b == 0) return a > 0 ? INT64_MAX : a < 0 ? INT64_MIN : 0;
      return b == -1 ? (a == INT64_MIN ? INT64_MAX : -a) : a / b;
    }
    const uint64_t x = (uint64_t)a, y = (uint64_t)b;
    const uint64_t result = op == SA_ADD ? x + y : op == SA_SUB ? x - y : x * y;
    return std::is_same<T, int32_t>::value ? (int64_t)(int32_t)(uint32_t)result : (int64_t)result;
  }
};

struct comparison {
  int op;
  template <class W>
  __device__ __forceinline__ bool operator()(W a, W b) const {
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
};

/*  Loops  */

template <class T>
using wide_of = decltype(sa_wide(T()));

// An operand: a tensor's elements, or one value for all.
template <class T>
struct operand {
  const T *data;  // NULL: value
  wide_of<T> value;
  __device__ __forceinline__ wide_of<T> at(int64_t place) const { return data ? sa_wide(data[place]) : value; }
};

template <class Out, class T, class F>
struct map_task {
  Out *y;
  operand<T> a, b;
  F f;
  __device__ void operator()(int64_t, const int64_t *at) const { sa_put(y + at[0], f(a.at(at[1]), b.at(at[2]))); }
};

// Rows are read four elements at a time.
enum { PACK = 4 };
template <class T>
struct __align__(PACK * sizeof(T) < 16 ? PACK * sizeof(T) : 16) pack {
  T element[PACK];
};

template <class T>
static __device__ __forceinline__ void read_pack(const operand<T> &from, int64_t place, wide_of<T> *values) {
  if (from.data) {
    const pack<T> p = ((const pack<T> *)from.data)[place];
    for (int k = 0; k < PACK; k++) values[k] = sa_wide(p.element[k]);
  } else {
    for (int k = 0; k < PACK; k++) values[k] = from.value;
  }
}

template <class Out, class T, class F>
static __global__ void __launch_bounds__(256) row_kernel(map_task<Out, T, F> task, int64_t count) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x, thread = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t packs = count / PACK;
  for (int64_t i = thread; i < packs; i += step) {
    wide_of<T> a[PACK], b[PACK];
    read_pack(task.a, i, a);
    read_pack(task.b, i, b);
    pack<Out> out;
#pragma unroll
    for (int k = 0; k < PACK; k++) sa_put(out.element + k, task.f(a[k], b[k]));
    ((pack<Out> *)task.y)[i] = out;
  }
  const int64_t rest = packs * PACK + thread;
  if (rest < count) sa_put(task.y + rest, task.f(task.a.at(rest), task.b.at(rest)));
}

template <class T>
static bool is_packed(const sa_strided &walk, int t, const T *data) {
  if (!data) return true;
  return walk.step[t][0] == 1 && (uintptr_t)data % (PACK * sizeof(T) < 16 ? PACK * sizeof(T) : 16) == 0;
}

template <class Out, class T, class F>
static int map(const char *function, int device, const sa_strided &walk, const map_task<Out, T, F> &task) {
  const bool row = walk.ndim == 1 && is_packed(walk, 0, task.y) && is_packed(walk, 1, task.a.data) &&
                   is_packed(walk, 2, task.b.data);
  if (!row || walk.numel < PACK) return sa_cuda_each<3>(function, device, walk, task);
  cudaStream_t stream;
  const int status = sa_cuda_use(function, device, &stream);
  if (status) return status;
  return sa_cuda_launch(function, row_kernel<Out, T, F>, dim3((unsigned)sa_cuda_blocks(device, walk.numel / PACK)),
                        dim3(256), 0, stream, task, walk.numel);
}

template <class T>
static operand<T> operand_of(const sa_tensor *t) {
  operand<T> made;
  made.data = (const T *)t->data;
  made.value = 0;
  return made;
}

template <class T>
static operand<T> no_operand() {
  operand<T> made;
  made.data = NULL;
  made.value = 0;
  return made;
}

// A scalar of the CPU goes with the launch.
template <class T>
static operand<T> operand_beside(const sa_tensor *t, int device) {
  if (t->device == device) return operand_of<T>(t);
  operand<T> made = no_operand<T>();
  switch (t->dtype) {
    case SA_F32:
      made.value = (wide_of<T>)*(const float *)t->data;
      break;
    case SA_F64:
      made.value = (wide_of<T>)*(const double *)t->data;
      break;
    case SA_I32:
      made.value = (wide_of<T>)*(const int32_t *)t->data;
      break;
    case SA_I64:
      made.value = (wide_of<T>)*(const int64_t *)t->data;
      break;
    default:
      made.value = (wide_of<T>)*(const uint8_t *)t->data;
  }
  return made;
}

/*  The operations  */

int sa_cuda_unary(int op, const sa_tensor *x, const sa_tensor *y) {
  return sa_with_float(x->dtype, [&](auto t) {
    using T = decltype(t);
    const map_task<T, T, unary> task = {(T *)y->data, operand_of<T>(x), no_operand<T>(), {op}};
    return map("sa_unary", y->device, sa_walk_of(y, x, x), task);
  });
}

int sa_cuda_unary_backward(int op, const sa_tensor *x, const sa_tensor *y, const sa_tensor *dy, const sa_tensor *dx) {
  const bool keeps_output = op == SA_EXP || op == SA_SQRT || op == SA_TANH;
  const sa_tensor *kept = op == SA_NEG ? dy : keeps_output ? y : x;
  return sa_with_float(dx->dtype, [&](auto t) {
    using T = decltype(t);
    const map_task<T, T, slope> task = {(T *)dx->data, operand_of<T>(kept), operand_of<T>(dy), {op}};
    return map("sa_unary_backward", dx->device, sa_walk_of(dx, kept, dy), task);
  });
}

template <class Out, class T, class F>
static int binary(const F &f, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y) {
  const map_task<Out, T, F> task = {(Out *)y->data, operand_beside<T>(a, y->device), operand_beside<T>(b, y->device),
                                    f};
  return map("sa_binary", y->device, sa_walk_of(y, a, b), task);
}

int sa_cuda_binary(int op, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y) {
  const int dtype = a->device == y->device ? a->dtype : b->dtype;
  return sa_with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    if (op >= SA_LT) return binary<bool, T>(comparison{op}, a, b, y);
    // There is no arithmetic of bools.
    using Number = std::conditional_t<std::is_same<T, bool>::value, float, T>;
    return binary<Number, Number>(arithmetic<Number>{op}, a, b, y);
  });
}

template <class T>
struct where_task {
  T *y;
  const uint8_t *condition;
  const T *a, *b;
  __device__ void operator()(int64_t, const int64_t *at) const { y[at[0]] = condition[at[1]] ? a[at[2]] : b[at[3]]; }
};

template <class T>
static int where(const sa_tensor *condition, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y) {
  const where_task<T> task = {(T *)y->data, (const uint8_t *)condition->data, (const T *)a->data, (const T *)b->data};
  return sa_cuda_each<4>("sa_where", y->device, sa_walk_of(y, condition, a, b), task);
}

int sa_cuda_where(const sa_tensor *condition, const sa_tensor *a, const sa_tensor *b, const sa_tensor *y) {
  const int64_t size = sa_element_size(y->dtype);
  return size == 1   ? where<uint8_t>(condition, a, b, y)
         : size == 2 ? where<uint16_t>(condition, a, b, y)
         : size == 4 ? where<uint32_t>(condition, a, b, y)
                     : where<uint64_t>(condition, a, b, y);
}
