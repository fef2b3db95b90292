// random numbers and ranges on CUDA devices, drawn as random.h says
#include "random.h"

#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/walk.cuh"

// Four words make four f32 or halves or normals, or two uniform f64.
template <class T>
static __global__ void __launch_bounds__(256)
    draw_kernel(sa_strided walk, T *to, uint64_t seed, bool normal, bool wide, float most) {
  const int each = wide ? 2 : 4;
  const int64_t blocks = (walk.numel + each - 1) / each, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t block = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; block < blocks; block += step) {
    const sa_words words = sa_random_block(seed, (uint64_t)block);
    double normals[4];
    if (normal) {
      sa_normals(words.word[0], words.word[1], normals);
      sa_normals(words.word[2], words.word[3], normals + 2);
    }
    for (int k = 0; k < each && block * each + k < walk.numel; k++) {
      int64_t at;
      sa_locate<1>(walk, block * each + k, &at);
      if (normal) {
        sa_put(to + at, normals[k]);
      } else if (wide) {
        sa_put(to + at, sa_uniform_f64(words.word[2 * k], words.word[2 * k + 1]));
      } else {
        const float value = sa_uniform_f32(words.word[k]);
        sa_put(to + at, value < most ? value : most);
      }
    }
  }
}

int sa_cuda_draw(sa_tensor *t, uint64_t seed, bool normal, float most) {
  const sa_strided walk = sa_walk_of(t, NULL, NULL, NULL, 0, false);
  if (walk.numel == 0) return SA_OK;
  const char *const name = normal ? "sa_randn" : "sa_rand";
  cudaStream_t stream;
  const int status = sa_cuda_use(name, t->device, &stream);
  if (status) return status;
  const bool wide = t->dtype == SA_F64 && !normal;
  return sa_with_float(t->dtype, [&](auto type) {
    using T = decltype(type);
    return sa_cuda_launch(name, draw_kernel<T>,
                          dim3((unsigned)sa_cuda_blocks(t->device, walk.numel / (wide ? 2 : 4) + 1)), dim3(256), 0,
                          stream, walk, (T *)t->data, seed, normal, wide, most);
  });
}

template <class T, class V>
struct range_task {
  T *to;
  V start, step;
  __device__ void operator()(int64_t i, const int64_t *at) const { sa_put(to + at[0], value(i, V())); }
  // A product and a sum apart, as on the CPU.
  __device__ double value(int64_t i, double) const { return __dadd_rn(start, __dmul_rn(step, (double)i)); }
  __device__ int64_t value(int64_t i, int64_t) const {
    return (int64_t)((uint64_t)start + (uint64_t)step * (uint64_t)i);
  }
};

int sa_cuda_arange(sa_tensor *t, double start, double step) {
  const sa_strided walk = sa_walk_of(t, NULL, NULL, NULL, 0, false);
  return sa_with_dtype(t->dtype, [&](auto type) {
    using T = decltype(type);
    if (t->dtype == SA_I32 || t->dtype == SA_I64)
      return sa_cuda_each<1>("sa_arange", t->device, walk,
                             range_task<T, int64_t>{(T *)t->data, (int64_t)start, (int64_t)step});
    return sa_cuda_each<1>("sa_arange", t->device, walk, range_task<T, double>{(T *)t->data, start, step});
  });
}
