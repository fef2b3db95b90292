// the forward pass on mma.sync: chooses the kernels of the dtype
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/portable_forward_block.cuh"

extern template int sa_cuda_forward<products_bf16>(forward_job &, cudaStream_t);
extern template int sa_cuda_forward<products_f16>(forward_job &, cudaStream_t);
extern template int sa_cuda_forward<products_f32>(forward_job &, cudaStream_t);
extern template int sa_cuda_forward<products_f64>(forward_job &, cudaStream_t);

static int element_bytes(int dtype) {
  return dtype == SA_F64 ? 8 : dtype == SA_F32 ? 4 : 2;
}

int sa_cuda_portable_forward(const sa_problem *p) {
  cudaStream_t stream;
  const int status = sa_cuda_use(forward_name, p->device, &stream);
  if (status) return status;
  if (p->batch * p->heads * p->queries == 0) return SA_OK;
  const sa_device_plan *plan = sa_cuda_plan(forward_name, p->plan, p->device);
  if (!plan) return SA_NO_MEMORY;
  const int bytes = element_bytes(p->dtype);
  forward_job job = {};
  job.p = *p;
  job.plan = *plan;
  job.group = p->heads / p->key_heads;
  job.q = tile_source_of(p->q, bytes, 0, 0, p->queries, p->width, rows_aligned(p->q, bytes));
  job.k = tile_source_of(p->k, bytes, 0, 0, p->keys, p->width, rows_aligned(p->k, bytes));
  job.v = tile_source_of(p->v, bytes, 0, 0, p->keys, p->value_width, rows_aligned(p->v, bytes));
  job.out_aligned = rows_aligned(p->out, bytes);
  switch (p->dtype) {
    case SA_BF16:
      return sa_cuda_forward<products_bf16>(job, stream);
    case SA_F16:
      return sa_cuda_forward<products_f16>(job, stream);
    case SA_F32:
      return sa_cuda_forward<products_f32>(job, stream);
    default:
      return sa_cuda_forward<products_f64>(job, stream);
  }
}
