// tensor descriptors: creation, holders, sizes and views
#include "tensor.h"

#include <string.h>

#include "backend.h"
#include "memory.h"
#include "status.h"
#include "strided_walk.h"

/*  Dtypes  */

static const char *const dtype_names[] = {
    [SA_F32] = "f32",   [SA_F64] = "f64", [SA_F16] = "f16", [SA_BF16] = "bf16",
    [SA_BOOL] = "bool", [SA_I32] = "i32", [SA_I64] = "i64",
};

static bool known_dtype(int dtype) {
  return dtype >= SA_F32 && dtype <= SA_I64;
}

int64_t sa_dtype_size(int dtype) {
  return known_dtype(dtype) ? sa_element_size(dtype) : 0;
}

const char *sa_dtype_name(int dtype) {
  return known_dtype(dtype) ? dtype_names[dtype] : "unknown";
}

/*  Shapes  */

static int check_shape(const char *function, int ndim, const int64_t *shape, int64_t least) {
  if (ndim < 0 || ndim > SA_MAX_DIMS)
    return sa_fail(SA_INVALID, function, "ndim: got %d, wanted 0 .. %d", ndim, SA_MAX_DIMS);
  if (ndim > 0 && !shape) return sa_fail(SA_INVALID, function, "shape: got NULL, wanted %d counts", ndim);
  for (int dim = 0; dim < ndim; dim++)
    if (shape[dim] < least)
      return sa_fail(SA_INVALID, function, "shape: got %s, wanted counts >= %lld", sa_describe_shape(ndim, shape),
                     (long long)least);
  return SA_OK;
}

// Row-major strides in elements and the bytes of the whole; false when they do not fit into 63 bits. An empty tensor
// takes no bytes, but its strides are as if its empty dims were 1.
static bool row_major(int ndim, const int64_t *shape, int64_t element, int64_t *stride, int64_t *bytes) {
  int64_t product = 1, numel = 1, all;
  for (int dim = ndim - 1; dim >= 0; dim--) {
    stride[dim] = product;
    numel *= shape[dim] > 0;
    if (__builtin_mul_overflow(product, shape[dim] > 0 ? shape[dim] : 1, &product)) return false;
  }
  if (__builtin_mul_overflow(product, element, &all)) return false;
  *bytes = numel * all;
  return true;
}

static bool multiply_shape(int ndim, const int64_t *shape, int64_t *numel) {
  int64_t stride[SA_MAX_DIMS];
  return row_major(ndim, shape, 1, stride, numel);
}

int64_t sa_tensor_numel(const sa_tensor *t) {
  if (!t || t->ndim > SA_MAX_DIMS) return 0;
  int64_t numel = 1;
  for (int dim = 0; dim < t->ndim; dim++) numel *= t->shape[dim];
  return numel;
}

bool sa_tensor_contiguous(const sa_tensor *t) {
  if (sa_tensor_numel(t) == 0) return true;
  int64_t expected = 1;
  for (int dim = t->ndim - 1; dim >= 0; dim--) {
    if (t->shape[dim] == 1) continue;
    if (t->stride[dim] != expected) return false;
    expected *= t->shape[dim];
  }
  return true;
}

void sa_tensor_extent(const sa_tensor *t, const char **first, const char **last) {
  if (!first || !last) return;
  *first = *last = t ? t->data : NULL;
  if (sa_tensor_numel(t) == 0) return;
  int64_t elements = 1;
  for (int dim = 0; dim < t->ndim; dim++) elements += (t->shape[dim] - 1) * t->stride[dim];
  *last += elements * sa_dtype_size(t->dtype);
}

/*  Two tensors  */

bool sa_tensor_has_shape(const sa_tensor *t, int ndim, const int64_t *shape) {
  return t->ndim == ndim && !memcmp(t->shape, shape, (size_t)ndim * sizeof *shape);
}

bool sa_tensor_same_shape(const sa_tensor *a, const sa_tensor *b) {
  return sa_tensor_has_shape(a, b->ndim, b->shape);
}

bool sa_tensor_same_elements(const sa_tensor *a, const sa_tensor *b) {
  if (a->data != b->data || a->dtype != b->dtype || a->device != b->device) return false;
  for (int dim = 0; dim < a->ndim; dim++)
    if (a->shape[dim] > 1 && a->stride[dim] != b->stride[dim]) return false;
  return true;
}

bool sa_tensor_overlap(const sa_tensor *a, const sa_tensor *b) {
  const char *a_first, *a_last, *b_first, *b_last;
  if (!sa_tensor_numel(a) || !sa_tensor_numel(b)) return false;
  sa_tensor_extent(a, &a_first, &a_last);
  sa_tensor_extent(b, &b_first, &b_last);
  return a->device == b->device && a_first < b_last && b_first < a_last;
}

/*  Checks  */

int sa_tensor_check(const char *function, const char *name, const sa_tensor *t) {
  if (!t) return sa_fail(SA_INVALID, function, "%s: got NULL, wanted a tensor", name);
  if (!t->data) return sa_fail(SA_INVALID, function, "%s: holds nothing, wanted a tensor with memory", name);
  if (!known_dtype(t->dtype)) return sa_fail(SA_INVALID, function, "%s: has the unknown dtype %d", name, t->dtype);
  if (t->device < 0) return sa_fail(SA_INVALID, function, "%s: has the unknown device %d", name, t->device);
  if (t->ndim < 0 || t->ndim > SA_MAX_DIMS)
    return sa_fail(SA_INVALID, function, "%s: has %d dims, wanted 0 .. %d", name, t->ndim, SA_MAX_DIMS);
  for (int dim = 0; dim < t->ndim; dim++)
    if (t->shape[dim] < 0 || t->stride[dim] < 0)
      return sa_fail(SA_INVALID, function, "%s: has size %lld and stride %lld at dim %d, wanted neither negative", name,
                     (long long)t->shape[dim], (long long)t->stride[dim], dim);
  return SA_OK;
}

// Whether every stride steps over all that the smaller ones reach. Strides that interleave without meeting are taken
// for shared memory, too; no view of a tensor has such.
static bool elements_apart(const sa_tensor *t) {
  bool passed[SA_MAX_DIMS] = {false};
  int64_t reach = 0;
  if (sa_tensor_numel(t) == 0) return true;
  for (;;) {
    int next = -1;
    for (int dim = 0; dim < t->ndim; dim++)
      if (!passed[dim] && t->shape[dim] > 1 && (next < 0 || t->stride[dim] < t->stride[next])) next = dim;
    if (next < 0) return true;
    if (t->stride[next] <= reach) return false;
    reach += (t->shape[next] - 1) * t->stride[next];
    passed[next] = true;
  }
}

int sa_tensor_check_writable(const char *function, const char *name, const sa_tensor *t) {
  const int status = sa_tensor_check(function, name, t);
  if (status) return status;
  if (!elements_apart(t))
    return sa_fail(SA_INVALID, function,
                   "%s: got %s, some elements of which share memory (an expanded tensor?), wanted memory for every "
                   "element: a contiguous copy",
                   name, sa_describe(t));
  return SA_OK;
}

/*  Creation  */

static sa_tensor describe(sa_block *block, void *data, int dtype, int device, int ndim, const int64_t *shape) {
  sa_tensor t = {.block = block, .data = data, .dtype = dtype, .device = device, .ndim = ndim};
  if (ndim) memcpy(t.shape, shape, (size_t)ndim * sizeof *shape);
  return t;
}

int sa_tensor_new(sa_tensor *out, int dtype, int device, int ndim, const int64_t *shape) {
  if (!out) return sa_fail(SA_INVALID, __func__, "out: got NULL, wanted a descriptor");
  if (!known_dtype(dtype)) return sa_fail(SA_INVALID, __func__, "dtype: got %d, wanted an sa_dtype", dtype);
  int status = check_shape(__func__, ndim, shape, 0);
  if (status) return status;
  sa_tensor t = describe(NULL, NULL, dtype, device, ndim, shape);
  int64_t bytes;
  if (!row_major(ndim, shape, sa_dtype_size(dtype), t.stride, &bytes))
    return sa_fail(SA_NO_MEMORY, __func__, "out of memory: %s is more than %lld bytes", sa_describe(&t),
                   (long long)INT64_MAX);
  status = sa_block_new(__func__, device, bytes, &t.block, &t.data);
  if (status) return status;
  *out = t;
  return SA_OK;
}

int sa_tensor_borrow(sa_tensor *out, void *data, int dtype, int device, int ndim, const int64_t *shape,
                     const int64_t *stride) {
  static _Alignas(64) char nothing[64];  // what an empty tensor may point to
  if (!out) return sa_fail(SA_INVALID, __func__, "out: got NULL, wanted a descriptor");
  if (!known_dtype(dtype)) return sa_fail(SA_INVALID, __func__, "dtype: got %d, wanted an sa_dtype", dtype);
  if (!sa_backend_of(__func__, device)) return SA_NO_DEVICE;
  const int status = check_shape(__func__, ndim, shape, 0);
  if (status) return status;
  sa_tensor t = describe(NULL, data, dtype, device, ndim, shape);
  const int64_t element = sa_dtype_size(dtype);
  int64_t bytes, elements = 1;
  if (!row_major(ndim, shape, element, t.stride, &bytes))
    return sa_fail(SA_INVALID, __func__, "shape: got %s, wanted at most %lld bytes", sa_describe(&t),
                   (long long)INT64_MAX);
  if (!data && bytes) return sa_fail(SA_INVALID, __func__, "data: got NULL, wanted the memory of %s", sa_describe(&t));
  if (!data) t.data = nothing;
  if ((uintptr_t)t.data % (uintptr_t)element)
    return sa_fail(SA_INVALID, __func__, "data: got %p, wanted memory aligned to the %lld bytes of %s", data,
                   (long long)element, sa_dtype_name(dtype));
  for (int dim = 0; stride && dim < ndim; dim++) {
    int64_t reach;
    t.stride[dim] = stride[dim];
    if (stride[dim] < 0)
      return sa_fail(SA_INVALID, __func__, "stride: got %lld at dim %d, wanted >= 0", (long long)stride[dim], dim);
    if (__builtin_mul_overflow(shape[dim] > 0 ? shape[dim] - 1 : 0, stride[dim], &reach) ||
        __builtin_add_overflow(elements, reach, &elements) || elements > INT64_MAX / element)
      return sa_fail(SA_INVALID, __func__, "stride: got %lld for a size of %lld, wanted a reach of at most %lld bytes",
                     (long long)stride[dim], (long long)shape[dim], (long long)INT64_MAX);
  }
  *out = t;
  return SA_OK;
}

void sa_tensor_retain(const sa_tensor *t) {
  if (t) sa_block_retain(t->block);
}

void sa_tensor_release(sa_tensor *t) {
  if (!t) return;
  sa_block *block = t->block;
  memset(t, 0, sizeof *t);
  sa_block_release(block);
}

int sa_tensor_on_host(sa_tensor *out, const sa_tensor *t) {
  if (t->device == SA_CPU) {
    *out = *t;
    sa_tensor_retain(out);
    return SA_OK;
  }
  sa_tensor copy;
  int status = sa_tensor_new(&copy, t->dtype, SA_CPU, t->ndim, t->shape);
  if (status) return status;
  status = sa_copy(&copy, t);
  if (status)
    sa_tensor_release(&copy);
  else
    *out = copy;
  return status;
}

/*  Views  */

static int check_view(const char *function, const sa_tensor *out, const sa_tensor *t) {
  const int status = sa_tensor_check(function, "t", t);
  if (status) return status;
  if (!out) return sa_fail(SA_INVALID, function, "out: got NULL, wanted a descriptor");
  if (out == t) return sa_fail(SA_INVALID, function, "out: got t itself, wanted another descriptor");
  return SA_OK;
}

static int check_dim(const char *function, const sa_tensor *t, int dim) {
  if (dim >= 0 && dim < t->ndim) return SA_OK;
  return sa_fail(SA_INVALID, function, "dim: got %d, wanted one of the %d dims of %s", dim, t->ndim, sa_describe(t));
}

static int hold(sa_tensor *out, sa_tensor view) {
  sa_tensor_retain(&view);
  *out = view;
  return SA_OK;
}

// Puts a number in place of the one -1 that a shape may have.
static int infer_count(const char *function, const sa_tensor *t, int ndim, const int64_t *shape, int64_t *full) {
  int64_t known = 1;
  int inferred = -1;
  for (int dim = 0; dim < ndim; dim++) {
    full[dim] = shape[dim];
    if (shape[dim] >= 0) continue;
    if (inferred >= 0)
      return sa_fail(SA_INVALID, function, "shape: got %s, wanted at most one -1", sa_describe_shape(ndim, shape));
    inferred = dim;
    full[dim] = 1;
  }
  const int64_t numel = sa_tensor_numel(t);
  const bool fits = multiply_shape(ndim, full, &known);
  if (fits && inferred >= 0 && known > 0 && numel % known == 0) full[inferred] = numel / known;
  if (fits && inferred >= 0 && known == 0)
    return sa_fail(SA_INVALID, function, "shape: got %s, in which -1 could be anything, wanted counts",
                   sa_describe_shape(ndim, shape));
  if (!fits || known * (inferred >= 0 ? full[inferred] : 1) != numel)
    return sa_fail(SA_INVALID, function, "shape: got %s, wanted the %lld elements of %s",
                   sa_describe_shape(ndim, shape), (long long)numel, sa_describe(t));
  return SA_OK;
}

// The strides with which `view` has t's elements in t's order; false when there are none. From the last dim on, each
// new dim takes its count from the stretch of equally spaced elements that t's dims make up.
static bool find_strides(sa_tensor *view, const sa_tensor *t) {
  int next = t->ndim - 1;
  int64_t left = 1, step = 1;  // of the current stretch
  for (int dim = view->ndim - 1; dim >= 0; dim--) {
    if (left == 1 && view->shape[dim] > 1) {
      while (t->shape[next] == 1) next--;
      left = t->shape[next];
      step = t->stride[next--];
      for (; next >= 0 && (t->shape[next] == 1 || t->stride[next] == step * left); next--) left *= t->shape[next];
    }
    if (left % view->shape[dim] != 0) return false;
    view->stride[dim] = step;
    step *= view->shape[dim];
    left /= view->shape[dim];
  }
  return true;
}

int sa_tensor_view(sa_tensor *out, const sa_tensor *t, int ndim, const int64_t *shape) {
  int status = check_view(__func__, out, t);
  if (!status) status = check_shape(__func__, ndim, shape, -1);
  int64_t full[SA_MAX_DIMS], unused;
  if (!status) status = infer_count(__func__, t, ndim, shape, full);
  if (status) return status;
  sa_tensor view = describe(t->block, t->data, t->dtype, t->device, ndim, full);
  if (sa_tensor_numel(t) == 0)
    row_major(ndim, full, 1, view.stride, &unused);
  else if (!find_strides(&view, t))
    return sa_fail(SA_INVALID, __func__,
                   "shape: got %s, wanted one that %s has without moving its elements; make it contiguous first",
                   sa_describe_shape(ndim, full), sa_describe(t));
  return hold(out, view);
}

int sa_tensor_permute(sa_tensor *out, const sa_tensor *t, const int32_t *dims) {
  const int status = check_view(__func__, out, t);
  if (status) return status;
  if (!dims && t->ndim) return sa_fail(SA_INVALID, __func__, "dims: got NULL, wanted %d dims", t->ndim);
  sa_tensor view = *t;
  bool seen[SA_MAX_DIMS] = {false};
  for (int dim = 0; dim < t->ndim; dim++) {
    const int from = dims[dim];
    if (from < 0 || from >= t->ndim || seen[from])
      return sa_fail(SA_INVALID, __func__, "dims: got %d at place %d, wanted each of 0 .. %d once", from, dim,
                     t->ndim - 1);
    seen[from] = true;
    view.shape[dim] = t->shape[from];
    view.stride[dim] = t->stride[from];
  }
  return hold(out, view);
}

// Where the elements start when `dim` starts at `index`; an empty tensor stays where it is, inside its memory.
static void *start_at(const sa_tensor *view, int64_t stride, int64_t index) {
  if (sa_tensor_numel(view) == 0) return view->data;
  return (char *)view->data + index * stride * sa_dtype_size(view->dtype);
}

int sa_tensor_narrow(sa_tensor *out, const sa_tensor *t, int dim, int64_t start, int64_t count) {
  int status = check_view(__func__, out, t);
  if (!status) status = check_dim(__func__, t, dim);
  if (status) return status;
  const int64_t size = t->shape[dim];
  if (start < 0 || start > size)
    return sa_fail(SA_INVALID, __func__, "start: got %lld, wanted 0 .. %lld in dim %d of %s", (long long)start,
                   (long long)size, dim, sa_describe(t));
  if (count < 0 || count > size - start)
    return sa_fail(SA_INVALID, __func__, "count: got %lld, wanted 0 .. %lld from %lld on in dim %d of %s",
                   (long long)count, (long long)(size - start), (long long)start, dim, sa_describe(t));
  sa_tensor view = *t;
  view.shape[dim] = count;
  view.data = start_at(&view, t->stride[dim], start);
  return hold(out, view);
}

int sa_tensor_select(sa_tensor *out, const sa_tensor *t, int dim, int64_t index) {
  int status = check_view(__func__, out, t);
  if (!status) status = check_dim(__func__, t, dim);
  if (status) return status;
  if (index < 0 || index >= t->shape[dim])
    return sa_fail(SA_INVALID, __func__, "index: got %lld, wanted 0 .. %lld in dim %d of %s", (long long)index,
                   (long long)t->shape[dim] - 1, dim, sa_describe(t));
  sa_tensor view = *t;
  view.ndim--;
  for (int k = dim; k < view.ndim; k++) {
    view.shape[k] = t->shape[k + 1];
    view.stride[k] = t->stride[k + 1];
  }
  view.shape[view.ndim] = view.stride[view.ndim] = 0;
  view.data = start_at(&view, t->stride[dim], index);
  return hold(out, view);
}

int sa_tensor_expand(sa_tensor *out, const sa_tensor *t, int ndim, const int64_t *shape) {
  int status = check_view(__func__, out, t);
  if (!status) status = check_shape(__func__, ndim, shape, -1);
  if (status) return status;
  const int added = ndim - t->ndim;
  if (added < 0)
    return sa_fail(SA_INVALID, __func__, "shape: got %s, wanted at least the %d dims of %s",
                   sa_describe_shape(ndim, shape), t->ndim, sa_describe(t));
  sa_tensor view = describe(t->block, t->data, t->dtype, t->device, ndim, shape);
  for (int dim = 0; dim < ndim; dim++) {
    const int64_t own = dim >= added ? t->shape[dim - added] : 1;
    const bool kept = dim >= added && (shape[dim] == own || shape[dim] == -1);
    if (!kept && (own != 1 || shape[dim] < 0))
      return sa_fail(SA_INVALID, __func__, "shape: got %s, wanted one that %s broadcasts to",
                     sa_describe_shape(ndim, shape), sa_describe(t));
    view.shape[dim] = kept ? own : shape[dim];
    view.stride[dim] = kept ? t->stride[dim - added] : 0;
  }
  int64_t numel;
  if (!multiply_shape(ndim, view.shape, &numel))
    return sa_fail(SA_INVALID, __func__, "shape: got %s, wanted at most %lld elements", sa_describe_shape(ndim, shape),
                   (long long)INT64_MAX);
  return hold(out, view);
}
