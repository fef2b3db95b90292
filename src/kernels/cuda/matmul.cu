// products of matrices on CUDA devices by cuBLAS, which is opened when it is first needed
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/walk.cuh"

static const char *const name = "sa_matmul";

/*  The library. Its few functions and numbers that are used here, so that its header need not be there.  */

typedef struct cublasContext *blas_handle;
enum { NOT_TRANSPOSED = 0, TRANSPOSED = 1, COMPUTE_F32 = 68, COMPUTE_F64 = 70, ANY_ALGORITHM = -1 };
enum { TYPE_F32 = 0, TYPE_F64 = 1, TYPE_F16 = 2, TYPE_BF16 = 14 };
enum { MOST_BATCHES = 65535 };  // at a time
// Real f32, never TF32; halves are added up in f32 to the end.
enum { MATH_MODE = 16 };

static struct {
  void *opened;
  char missing[512];  // why it is not there
  int (*create)(blas_handle *handle);
  int (*set_stream)(blas_handle handle, cudaStream_t stream);
  int (*set_workspace)(blas_handle handle, void *memory, size_t bytes);
  int (*set_math_mode)(blas_handle handle, int mode);
  const char *(*status_string)(int status);
  int (*multiply)(blas_handle handle, int transposed_a, int transposed_b, int64_t m, int64_t n, int64_t k,
                  const void *alpha, const void *a, int a_type, int64_t a_step, long long a_batch, const void *b,
                  int b_type, int64_t b_step, long long b_batch, const void *beta, void *c, int c_type, int64_t c_step,
                  long long c_batch, int64_t count, int compute, int algorithm);
} blas;

static void *open_first(void) {
  const char *named = getenv("SAFEATTN_CUBLAS_LIB");
  if (named && *named) return dlopen(named, RTLD_NOW | RTLD_LOCAL);
  static const char *const versions[] = {"libcublas.so.13", "libcublas.so.12"};
  const char *const homes[] = {NULL, getenv("CUDA_HOME"), getenv("CUDA_PATH"), "/usr/local/cuda"};
  for (int version = 0; version < 2; version++)
    for (int home = 0; home < 4; home++) {
      if (home && !homes[home]) continue;
      char path[1024];
      snprintf(path, sizeof path, home ? "%s/lib64/%s" : "%s%s", home ? homes[home] : "", versions[version]);
      void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
      if (library) return library;
    }
  return NULL;
}

template <class F>
static bool find(F *function, const char *symbol) {
  *function = (F)dlsym(blas.opened, symbol);
  return *function != NULL;
}

static void open_library(void) {
  blas.opened = open_first();
  if (!blas.opened) {
    snprintf(blas.missing, sizeof blas.missing,
             "cuBLAS is missing: neither libcublas.so.13 nor libcublas.so.12 can be opened (SAFEATTN_CUBLAS_LIB names "
             "one elsewhere): %.200s",
             dlerror());
    return;
  }
  if (find(&blas.create, "cublasCreate_v2") && find(&blas.set_stream, "cublasSetStream_v2") &&
      find(&blas.set_workspace, "cublasSetWorkspace_v2") && find(&blas.set_math_mode, "cublasSetMathMode") &&
      find(&blas.status_string, "cublasGetStatusString") && find(&blas.multiply, "cublasGemmStridedBatchedEx_64"))
    return;
  snprintf(blas.missing, sizeof blas.missing, "cuBLAS is too old, wanted that of CUDA 12 or newer");
  blas.opened = NULL;
}

static int check(int status) {
  if (status == 0) return SA_OK;
  return sa_cuda_host->fail(status == 3 ? SA_NO_MEMORY : SA_NO_DEVICE, name, "cuBLAS: %s", blas.status_string(status));
}

// A handle a device; whoever uses it holds the lock, for it knows one stream at a time.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static blas_handle handles[SA_CUDA_DEVICES];

// Work memory comes with every product: cuBLAS's own is shared by all streams, and which sums it splits depends on it.
// 32 MiB are what it wants on Hopper.
enum { WORKSPACE = 32 << 20 };

static int take_handle(int device, cudaStream_t stream, void *workspace, blas_handle *handle) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, open_library);
  if (!blas.opened) return sa_cuda_host->fail(SA_NO_DEVICE, name, "%s", blas.missing);
  pthread_mutex_lock(&lock);
  blas_handle *h = &handles[device - SA_CUDA];
  int status = SA_OK;
  if (!*h) {
    status = check(blas.create(h));
    if (!status) status = check(blas.set_math_mode(*h, MATH_MODE));
  }
  if (!status) status = check(blas.set_stream(*h, stream));  // which forgets the workspace
  if (!status) status = check(blas.set_workspace(*h, workspace, WORKSPACE));
  *handle = *h;
  if (status) pthread_mutex_unlock(&lock);
  return status;
}

/*  Operands  */

// A tensor with its last two dims as cuBLAS takes them: rows, or columns, that lie one after the other.
typedef struct matrix {
  sa_tensor t;
  void *packed;  // a copy to be released
  bool by_columns;
  int64_t step;  // from one row (column) to the next
} matrix;

static int64_t numel_of(const sa_tensor *t) {
  int64_t numel = 1;
  for (int dim = 0; dim < t->ndim; dim++) numel *= t->shape[dim];
  return numel;
}

static bool lies_well(matrix *m) {
  const int row = m->t.ndim - 2, column = m->t.ndim - 1;
  const int64_t rows = m->t.shape[row], columns = m->t.shape[column];
  const int64_t row_step = m->t.stride[row], column_step = m->t.stride[column];
  m->by_columns = false;
  m->step = rows == 1 ? columns : row_step;
  if ((columns == 1 || column_step == 1) && m->step >= columns) return true;
  m->by_columns = true;
  m->step = columns == 1 ? rows : column_step;
  return (rows == 1 || row_step == 1) && m->step >= rows;
}

// Dims of the batch along which the tensor repeats itself are not repeated in the copy.
static int pack(matrix *m, bool copy) {
  sa_tensor made = m->t;
  int64_t stride = 1;
  for (int dim = made.ndim - 1; dim >= 0; dim--) {
    if (dim < made.ndim - 2 && made.stride[dim] == 0) made.shape[dim] = 1;
    made.stride[dim] = stride;
    stride *= made.shape[dim];
  }
  m->packed = sa_cuda_allocate(name, m->t.device, stride * sa_element_size(m->t.dtype));
  if (!m->packed) return SA_NO_MEMORY;
  sa_tensor from = m->t;
  for (int dim = 0; dim < made.ndim; dim++) from.shape[dim] = made.shape[dim];
  made.data = m->packed;
  const int status = copy ? sa_cuda_copy(&made, &from) : SA_OK;
  for (int dim = 0; dim < made.ndim - 2; dim++) {
    if (made.shape[dim] != m->t.shape[dim]) made.stride[dim] = 0;
    made.shape[dim] = m->t.shape[dim];
  }
  m->t = made;
  m->by_columns = false;
  m->step = made.shape[made.ndim - 1];
  return status;
}

static bool repeats_batch(const sa_tensor *t) {
  for (int dim = 0; dim < t->ndim - 2; dim++)
    if (t->shape[dim] > 1 && t->stride[dim] != 0) return false;
  return true;
}

// The batch of t and its rows as one long matrix, when its rows lie evenly. An activation [B,L,E] times a weight [E,F]
// is then one product of B*L rows.
static bool join_batch(sa_tensor *t) {
  const int row = t->ndim - 2;
  sa_tensor joined = *t;
  for (int dim = row - 1; dim >= 0; dim--) {
    if (t->shape[dim] != 1) {
      if (joined.shape[row] == 1)
        joined.stride[row] = t->stride[dim];
      else if (t->stride[dim] != joined.shape[row] * joined.stride[row])
        return false;
      joined.shape[row] *= t->shape[dim];
    }
    joined.shape[dim] = 1;
  }
  *t = joined;
  return true;
}

/*  Products  */

static int data_type(int dtype) {
  return dtype == SA_F64 ? TYPE_F64 : dtype == SA_F16 ? TYPE_F16 : dtype == SA_BF16 ? TYPE_BF16 : TYPE_F32;
}

// cuBLAS counts by columns, so that a matrix by rows is its transpose to it: y^T = b^T a^T.
static int multiply(blas_handle handle, const matrix *a, const matrix *b, const matrix *y) {
  const int row = y->t.ndim - 2, column = row + 1, dtype = y->t.dtype;
  const float one_f32 = 1, zero_f32 = 0;
  const double one_f64 = 1, zero_f64 = 0;
  const bool wide = dtype == SA_F64;
  const sa_strided batch = sa_walk_of(&y->t, &a->t, &b->t, NULL, UINT32_C(3) << row, false);
  // The innermost dim of the batch is cuBLAS's, the others are counted here.
  const int last = batch.ndim - 1;
  const int64_t inner = batch.shape[last], size = sa_element_size(dtype);
  int status = SA_OK;
  for (int64_t first = 0; !status && first < batch.numel; first += inner) {
    int64_t at[3] = {0, 0, 0}, rest = first / inner;
    for (int dim = last - 1; dim >= 0; dim--) {
      for (int t = 0; t < 3; t++) at[t] += rest % batch.shape[dim] * batch.step[t][dim];
      rest /= batch.shape[dim];
    }
    for (int64_t done = 0; !status && done < inner; done += MOST_BATCHES)
      status = check(blas.multiply(
          handle, b->by_columns ? TRANSPOSED : NOT_TRANSPOSED, a->by_columns ? TRANSPOSED : NOT_TRANSPOSED,
          y->t.shape[column], y->t.shape[row], a->t.shape[column], wide ? (const void *)&one_f64 : &one_f32,
          (const char *)b->t.data + (at[2] + done * batch.step[2][last]) * size, data_type(dtype), b->step,
          batch.step[2][last], (const char *)a->t.data + (at[1] + done * batch.step[1][last]) * size, data_type(dtype),
          a->step, batch.step[1][last], wide ? (const void *)&zero_f64 : &zero_f32,
          (char *)y->t.data + (at[0] + done * batch.step[0][last]) * size, data_type(dtype), y->step,
          batch.step[0][last], inner - done < MOST_BATCHES ? inner - done : (int64_t)MOST_BATCHES,
          wide ? COMPUTE_F64 : COMPUTE_F32, ANY_ALGORITHM));
  }
  return status;
}

int sa_cuda_matmul(const sa_tensor *a, const sa_tensor *b, const sa_tensor *y) {
  if (numel_of(y) == 0) return SA_OK;
  if (a->shape[a->ndim - 1] == 0) {
    sa_tensor zeros = *y;
    return sa_cuda_fill(&zeros, 0);
  }
  matrix ma = {*a, NULL, false, 0}, mb = {*b, NULL, false, 0}, my = {*y, NULL, false, 0};
  if (repeats_batch(b)) {
    sa_tensor long_a = *a, long_y = *y;
    if (join_batch(&long_a) && join_batch(&long_y)) {
      ma.t = long_a;
      my.t = long_y;
      for (int dim = 0; dim < mb.t.ndim - 2; dim++) mb.t.shape[dim] = 1;
    }
  }
  const sa_tensor target = my.t;
  int status = lies_well(&ma) ? SA_OK : pack(&ma, true);
  if (!status && !lies_well(&mb)) status = pack(&mb, true);
  if (!status && (!lies_well(&my) || my.by_columns)) status = pack(&my, false);
  cudaStream_t stream;
  if (!status) status = sa_cuda_use(name, y->device, &stream);
  blas_handle handle = NULL;
  void *workspace = NULL;
  if (!status) {
    workspace = sa_cuda_scratch(name, y->device, WORKSPACE);
    status = workspace ? take_handle(y->device, stream, workspace, &handle) : SA_NO_MEMORY;
  }
  if (!status) {
    status = multiply(handle, &ma, &mb, &my);
    pthread_mutex_unlock(&lock);
  }
  if (workspace) sa_cuda_scratch_release(y->device, workspace);
  sa_tensor to = target;
  if (!status && my.packed) status = sa_cuda_copy(&to, &my.t);
  sa_cuda_release(y->device, ma.packed);
  sa_cuda_release(y->device, mb.packed);
  sa_cuda_release(y->device, my.packed);
  return status;
}
