// sums, means and extremes over dims on CUDA devices: floats in f64, integers in i64, always in the same order
#include <type_traits>

#include "kernels/cuda/group.cuh"
#include "kernels/cuda/operations.cuh"

template <class A>
struct fold_op {
  int op;
  // A NaN wins max and min, and stays: nothing is greater than it.
  __device__ A operator()(A a, A x) const {
    if (op < SA_MAX) return a + x;
    if (op == SA_MAX) return x > a || x != x ? x : a;
    return x < a || x != x ? x : a;
  }
};
template <>
__device__ int64_t fold_op<int64_t>::operator()(int64_t a, int64_t x) const {
  if (op < SA_MAX) return (int64_t)((uint64_t)a + (uint64_t)x);
  return op == SA_MAX ? (x > a ? x : a) : (x < a ? x : a);
}

template <class T, class A, class Y>
struct reduction {
  const T *x;
  Y *y;                   // the result, or, with chunks, partial results [chunk][result]
  sa_strided results;     // y and the first element that each result is made of
  sa_strided reduced;     // what it is made of, from there on
  int64_t chunks, chunk;  // each result is made in so many parts of so many elements
  int op, group;
  A start;
  double divisor;  // of a mean, at its end
};

template <class A>
static __device__ __forceinline__ A divided(A sum, double) {
  return sum;
}
template <>
__device__ __forceinline__ double divided(double sum, double divisor) {
  return sum / divisor;
}

template <class T, class A, class Y>
static __global__ void __launch_bounds__(SA_GROUP_THREADS) reduce_kernel(reduction<T, A, Y> r) {
  const fold_op<A> fold = {r.op};
  const int64_t count = r.results.numel, items = count * r.chunks;
  const int lane = threadIdx.x & (r.group - 1);
  SA_EACH_ITEM(item, live, items, r.group) {
    A kept = r.start;
    int64_t at[2] = {0, 0};
    if (live) {
      const int64_t chunk = r.chunks == 1 ? 0 : item / count, first = chunk * r.chunk;
      const int64_t last = first + r.chunk < r.reduced.numel ? first + r.chunk : r.reduced.numel;
      sa_locate<2>(r.results, item - chunk * count, at);
      const int64_t step = r.reduced.ndim == 1 ? r.reduced.step[0][0] : 0;
      if (r.reduced.ndim == 1) {
#pragma unroll 4
        for (int64_t i = first + lane; i < last; i += r.group) kept = fold(kept, (A)sa_wide(r.x[at[1] + i * step]));
      }
      for (int64_t i = first + lane; r.reduced.ndim > 1 && i < last; i += r.group) {
        int64_t inside;
        sa_locate<1>(r.reduced, i, &inside);
        kept = fold(kept, (A)sa_wide(r.x[at[1] + inside]));
      }
    }
    kept = sa_group_fold(kept, r.group, fold);
    if (!live || lane) continue;
    if (r.divisor != 0) kept = divided(kept, r.divisor);
    sa_put(r.y + (r.chunks == 1 ? at[0] : item), kept);
  }
}

template <class T, class A, class Y>
static int run_reduction(const reduction<T, A, Y> &r, int device) {
  cudaStream_t stream;
  const int status = sa_cuda_use("sa_reduce", device, &stream);
  return status ? status
                : sa_cuda_launch("sa_reduce", reduce_kernel<T, A, Y>,
                                 dim3(sa_group_blocks(device, r.results.numel * r.chunks, r.group)),
                                 dim3(SA_GROUP_THREADS), 0, stream, r);
}

// The walk whose first tensor is partial results, one after the other.
static sa_strided partial_walk(const sa_strided *results) {
  sa_strided walk = *results;
  int64_t step = 1;
  for (int dim = walk.ndim - 1; dim >= 0; dim--) {
    walk.step[1][dim] = step;
    step *= walk.shape[dim];
  }
  return walk;
}

enum { THREADS_ENOUGH = 1 << 17 };  // a number of its own, so that the order of sums is the same on every device

template <class T, class A, class Y>
static int reduce(reduction<T, A, Y> r, int device) {
  const int64_t threads = r.results.numel * r.group, each = (r.reduced.numel + r.group - 1) / r.group;
  int64_t chunks = threads ? THREADS_ENOUGH / threads : 1;
  if (chunks > each / 16) chunks = each / 16;
  if (chunks < 1) chunks = 1;
  r.chunk = (r.reduced.numel + chunks - 1) / chunks;
  r.chunks = 1;
  if (chunks == 1) return run_reduction(r, device);
  A *partial = (A *)sa_cuda_scratch("sa_reduce", device, r.results.numel * chunks * (int64_t)sizeof(A));
  if (!partial) return SA_NO_MEMORY;
  reduction<T, A, A> parts = {r.x, partial, r.results, r.reduced, chunks, r.chunk, r.op, r.group, r.start, 0};
  int status = run_reduction(parts, device);
  reduction<A, A, Y> whole = {partial, r.y, partial_walk(&r.results), {}, 1, chunks, r.op, 1, r.start, r.divisor};
  whole.reduced.ndim = 1;
  whole.reduced.numel = whole.reduced.shape[0] = chunks;
  whole.reduced.step[0][0] = r.results.numel;
  whole.group = sa_group_size(chunks, r.results.numel, false);
  if (!status) status = run_reduction(whole, device);
  sa_cuda_scratch_release(device, partial);
  return status;
}

/*  The place of the first greatest  */

template <class A>
struct place {
  A value;
  int64_t at;  // < 0: nothing seen yet
};

template <class A>
struct first_greatest {
  static __device__ bool better(A x, A than) { return x > than || (x != x && than == than); }
  __device__ place<A> operator()(place<A> a, place<A> b) const {
    if (a.at < 0 || b.at < 0) return a.at < 0 ? b : a;
    if (better(b.value, a.value)) return b;
    if (better(a.value, b.value)) return a;
    return a.at < b.at ? a : b;
  }
};

template <class T, class A>
static __global__ void __launch_bounds__(SA_GROUP_THREADS)
    argmax_kernel(sa_strided results, const T *x, int64_t *y, int64_t length, int64_t step, int group) {
  const first_greatest<A> fold;
  const int lane = threadIdx.x & (group - 1);
  SA_EACH_ITEM(item, live, results.numel, group) {
    place<A> best = {0, -1};
    int64_t at[2] = {0, 0};
    if (live) sa_locate<2>(results, item, at);
    for (int64_t i = lane; live && i < length; i += group)
      best = fold(best, place<A>{(A)sa_wide(x[at[1] + i * step]), i});
    best = sa_group_fold(best, group, fold);
    if (live && lane == 0) y[at[0]] = best.at;
  }
}

template <class T, class A>
static int argmax(const sa_tensor *x, const sa_strided &results, int dim) {
  cudaStream_t stream;
  const int status = sa_cuda_use("sa_reduce", x->device, &stream);
  if (status) return status;
  const int group = sa_group_size(x->shape[dim], results.numel, sa_side_by_side(results, 1, x->stride[dim]));
  return sa_cuda_launch("sa_reduce", argmax_kernel<T, A>, dim3(sa_group_blocks(x->device, results.numel, group)),
                        dim3(SA_GROUP_THREADS), 0, stream, results, (const T *)x->data, (int64_t *)results.data[0],
                        x->shape[dim], x->stride[dim], group);
}

template <class T>
struct accumulated {
  using type = double;
};
template <>
struct accumulated<bool> {
  using type = int64_t;
};
template <>
struct accumulated<int32_t> {
  using type = int64_t;
};
template <>
struct accumulated<int64_t> {
  using type = int64_t;
};

// What changes no result: 0, the least or the greatest.
static double start_of(int op, double) {
  return op == SA_MIN ? (double)INFINITY : op < SA_MAX ? 0 : -(double)INFINITY;
}
static int64_t start_of(int op, int64_t) {
  return op == SA_MIN ? INT64_MAX : op < SA_MAX ? 0 : INT64_MIN;
}

int sa_cuda_reduce(int op, const sa_tensor *x, uint32_t dims, const sa_tensor *y) {
  const sa_strided results = sa_walk_of(y, x, NULL, NULL, dims);
  if (results.numel == 0) return SA_OK;
  return sa_with_dtype(x->dtype, [&](auto t) {
    using T = decltype(t);
    using A = typename accumulated<T>::type;
    if (op == SA_ARGMAX) return argmax<T, A>(x, results, __builtin_ctz(dims));
    const sa_strided reduced = sa_walk_of(x, NULL, NULL, NULL, ~dims);
    const int group =
        sa_group_size(reduced.numel, results.numel, sa_side_by_side(results, 1, reduced.step[0][reduced.ndim - 1]));
    // An empty mean is 0 / 0.
    const double divisor = op == SA_MEAN ? (reduced.numel ? (double)reduced.numel : (double)NAN) : 0;
    const auto run = [&](auto result) {
      using Y = decltype(result);
      const reduction<T, A, Y> r = {(const T *)x->data, (Y *)y->data, results, reduced,           1,
                                    reduced.numel,      op,           group,   start_of(op, A()), divisor};
      return reduce(r, x->device);
    };
    if constexpr (std::is_same<A, int64_t>::value)
      if (op == SA_SUM) return run(int64_t());
    return run(T());
  });
}
