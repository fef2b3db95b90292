// attention's entry: checks everything once, compiles the mask, and calls the table
#include <math.h>
#include <string.h>

#include "backend.h"
#include "interrupt.h"
#include "status.h"
#include "tensor.h"

// Copies of operands whose rows are not contiguous, and outputs that are computed aside and copied into place.
enum { MAX_ASIDE = 24 };

typedef struct call {
  const char *function;
  sa_attention *a;
  sa_problem p;
  const sa_plan *plan;
  int rank;  // of q
  struct {
    sa_tensor own;        // what the kernels see
    sa_tensor *original;  // copied into at the end; NULL for an input
  } aside[MAX_ASIDE];
  int asides;
  sa_tensor *created[MAX_ASIDE];  // emptied again when the call fails
  int creations;
  const sa_tensor *inputs[MAX_ASIDE];
  const char *input_names[MAX_ASIDE];
  int input_count;
} call;

static int lse_dtype(int dtype) {
  return dtype == SA_F64 ? SA_F64 : SA_F32;
}

// A tensor's dims moved to the right end of four; the dims in front, and those of size 1, are broadcast.
static sa_operand operand_of(const sa_tensor *t) {
  sa_operand x = {.data = t->data, .dtype = t->dtype};
  for (int d = 0; d < t->ndim; d++) x.stride[4 - t->ndim + d] = t->shape[d] == 1 ? 0 : t->stride[d];
  return x;
}

static int dense_copy(call *c, const sa_tensor *t, bool copy, sa_tensor **own) {
  *own = &c->aside[c->asides].own;
  int status = sa_tensor_new(*own, t->dtype, t->device, t->ndim, t->shape);
  if (status) return status;
  c->aside[c->asides++].original = NULL;
  return copy ? sa_copy(*own, t) : SA_OK;
}

static bool rows_contiguous(const sa_tensor *t) {
  return !t->ndim || t->shape[t->ndim - 1] <= 1 || t->stride[t->ndim - 1] == 1;
}

// Looks at an argument that was given: device, dtype (q's, or a second choice), and remembers it for the overlap check.
static int check_input(call *c, const char *name, const sa_tensor *t, int dtype, int other) {
  const sa_tensor *q = c->a->q;
  const int status = sa_tensor_check(c->function, name, t);
  if (status) return status;
  if (t->device != q->device) {
    return sa_fail(SA_INVALID, c->function, "%s: got a tensor on %s, wanted %s like q", name, sa_device_name(t->device),
                   sa_device_name(q->device));
  }
  if (t->dtype != dtype && t->dtype != other) {
    return sa_fail(SA_INVALID, c->function, "%s: got %s, wanted %s%s%s (q is %s)", name, sa_dtype_name(t->dtype),
                   sa_dtype_name(dtype), other == dtype ? "" : " or ", other == dtype ? "" : sa_dtype_name(other),
                   sa_dtype_name(q->dtype));
  }
  c->inputs[c->input_count] = t;
  c->input_names[c->input_count++] = name;
  return SA_OK;
}

static int use_input(call *c, const sa_tensor *t, bool rows, sa_operand *x) {
  sa_tensor *own;
  if (rows && !rows_contiguous(t)) {
    const int status = dense_copy(c, t, true, &own);
    if (status) return status;
    t = own;
  }
  *x = operand_of(t);
  return SA_OK;
}

static int check_shape(call *c, const char *name, const sa_tensor *t, int ndim, const int64_t *shape,
                       const char *what) {
  if (sa_tensor_has_shape(t, ndim, shape)) return SA_OK;
  return sa_fail(SA_INVALID, c->function, "%s: has shape %s, wanted %s%s", name, sa_describe_shape(t->ndim, t->shape),
                 sa_describe_shape(ndim, shape), what);
}

static const char *const operand_names[3] = {"q", "k", "v"};

// Each for itself: a tensor of floats, alike in device, dtype and dims.
static int check_operands(call *c, const sa_tensor *const t[3]) {
  for (int n = 0; n < 3; n++) {
    if (!t[n] || !t[n]->data)
      return sa_fail(SA_INVALID, c->function, "%s: got nothing, wanted a tensor", operand_names[n]);
    if (!sa_is_float(t[n]->dtype)) {
      return sa_fail(SA_INVALID, c->function, "%s: got %s, wanted f32, f64, f16 or bf16", operand_names[n],
                     sa_dtype_name(t[n]->dtype));
    }
    const int status = check_input(c, operand_names[n], t[n], t[0]->dtype, t[0]->dtype);
    if (status) return status;
    if (t[n]->ndim < 2 || t[n]->ndim > 4) {
      return sa_fail(SA_INVALID, c->function, "%s: has %d dims, wanted 2 to 4", operand_names[n], t[n]->ndim);
    }
    if (t[n]->ndim != t[0]->ndim) {
      return sa_fail(SA_INVALID, c->function, "%s: has %d dims, wanted %d like q", operand_names[n], t[n]->ndim,
                     t[0]->ndim);
    }
  }
  return SA_OK;
}

// Takes the sizes of the problem from the shapes, with four dims each, of q, k and v, which have to fit together.
static int check_sizes(call *c, int64_t shape[3][4]) {
  sa_problem *p = &c->p;
  p->batch = shape[0][0];
  p->heads = shape[0][1];
  p->queries = shape[0][2];
  p->width = shape[0][3];
  p->key_heads = shape[1][1];
  p->keys = shape[1][2];
  p->value_width = shape[2][3];
  for (int n = 1; n < 3; n++) {
    if (shape[n][0] != p->batch) {
      return sa_fail(SA_INVALID, c->function, "%s: has batch %lld, wanted %lld like q", operand_names[n],
                     (long long)shape[n][0], (long long)p->batch);
    }
  }
  if (shape[1][3] != p->width) {
    return sa_fail(SA_INVALID, c->function, "k: has width %lld, wanted %lld like q", (long long)shape[1][3],
                   (long long)p->width);
  }
  if (shape[2][1] != p->key_heads) {
    return sa_fail(SA_INVALID, c->function, "v: has %lld heads, wanted %lld like k", (long long)shape[2][1],
                   (long long)p->key_heads);
  }
  if (shape[2][2] != p->keys) {
    return sa_fail(SA_INVALID, c->function, "v: has %lld keys, wanted %lld like k", (long long)shape[2][2],
                   (long long)p->keys);
  }
  if (p->key_heads ? p->heads % p->key_heads != 0 : p->heads != 0) {
    return sa_fail(SA_INVALID, c->function, "k: has %lld heads, wanted a divisor of q's %lld", (long long)p->key_heads,
                   (long long)p->heads);
  }
  return SA_OK;
}

static int check_qkv(call *c) {
  const sa_tensor *const t[3] = {c->a->q, c->a->k, c->a->v};
  const int status = check_operands(c, t);
  if (status) return status;
  c->p.dtype = t[0]->dtype;
  c->rank = t[0]->ndim;
  int64_t shape[3][4];
  for (int n = 0; n < 3; n++) {
    for (int d = 0; d < 4; d++) shape[n][d] = d < 4 - c->rank ? 1 : t[n]->shape[d - (4 - c->rank)];
  }
  return check_sizes(c, shape);
}

static int check_bias(call *c) {
  const sa_tensor *bias = c->a->bias;
  for (int d = 0; d < 4; d++) c->p.bias_shape[d] = 1;
  if (!bias) return SA_OK;
  const int status = check_input(c, "bias", bias, c->p.dtype, SA_F32);
  if (status) return status;
  const int64_t full[4] = {c->p.batch, c->p.heads, c->p.queries, c->p.keys};
  bool fits = bias->ndim <= 4;
  for (int d = 0; fits && d < bias->ndim; d++) {
    const int to = 4 - bias->ndim + d;
    c->p.bias_shape[to] = bias->shape[d];
    fits = bias->shape[d] == 1 || bias->shape[d] == full[to];
  }
  if (fits) return SA_OK;
  return sa_fail(SA_INVALID, c->function, "bias: has shape %s, wanted one that broadcasts to %s",
                 sa_describe_shape(bias->ndim, bias->shape), sa_describe_shape(4, full));
}

static int check_heads(call *c, const char *name, const sa_tensor *t, sa_operand *x) {
  if (!t) return SA_OK;
  int status = check_input(c, name, t, c->p.dtype, SA_F32);
  if (!status) status = check_shape(c, name, t, 1, &c->p.heads, " (one per head of q)");
  if (status) return status;
  *x = (sa_operand){.data = t->data, .dtype = t->dtype, .stride = {0, t->stride[0], 0, 0}};
  return SA_OK;
}

// One that f32 has no room for is none; one whose reciprocal has no room leaves nothing of the scores in any case.
static double usable_softcap(int dtype, double softcap) {
  const bool wide = dtype == SA_F64;
  if (!wide && softcap > 1e38) return 0;
  return softcap > 0 ? fmax(softcap, wide ? 1e-300 : 1e-30) : 0;
}

static int check_numbers(call *c) {
  const sa_attention *a = c->a;
  sa_problem *p = &c->p;
  if (a->has_scale && !isfinite(a->scale)) {
    return sa_fail(SA_INVALID, c->function, "scale: got %g, wanted a finite number", a->scale);
  }
  if (!(a->softcap >= 0) || !isfinite(a->softcap)) {
    return sa_fail(SA_INVALID, c->function, "softcap: got %g, wanted a finite number >= 0 (0 is off)", a->softcap);
  }
  if (!(a->dropout >= 0 && a->dropout < 1)) {
    return sa_fail(SA_INVALID, c->function, "dropout: got %g, wanted a probability in [0, 1)", a->dropout);
  }
  if (a->causal < SA_NO_CAUSAL || a->causal > SA_BOTTOM_RIGHT) {
    return sa_fail(SA_INVALID, c->function, "causal: got %d, wanted 0, SA_TOP_LEFT or SA_BOTTOM_RIGHT", a->causal);
  }
  if (a->backend < SA_AUTO || a->backend > SA_FUSED) {
    return sa_fail(SA_INVALID, c->function, "backend: got %d, wanted SA_AUTO, SA_REFERENCE or SA_FUSED", a->backend);
  }
  // With E = 0 every score is 0 whatever the scale.
  p->scale = a->has_scale ? a->scale : p->width ? 1 / sqrt((double)p->width) : 1;
  p->softcap = usable_softcap(p->dtype, a->softcap);
  p->dropout = a->dropout;
  p->seed = a->seed;
  p->device = a->q->device;
  p->deterministic = a->deterministic;
  p->diagonal = a->causal == SA_BOTTOM_RIGHT ? p->keys - p->queries : 0;
  return SA_OK;
}

static int check_inputs(call *c) {
  const sa_attention *a = c->a;
  int status = check_qkv(c);
  if (!status) status = check_bias(c);
  if (!status) status = check_heads(c, "sinks", a->sinks, &c->p.sinks);
  if (!status) status = check_heads(c, "alibi", a->alibi, &c->p.alibi);
  if (!status) status = check_numbers(c);
  return status;
}

static int use_inputs(call *c) {
  const sa_attention *a = c->a;
  int status = use_input(c, a->q, true, &c->p.q);
  if (!status) status = use_input(c, a->k, true, &c->p.k);
  if (!status) status = use_input(c, a->v, true, &c->p.v);
  if (!status && a->bias) status = use_input(c, a->bias, true, &c->p.bias);
  if (status) return status;
  status = sa_mask_plan(&c->plan, a->mask, a->causal, a->window_left, a->window_right, c->p.batch, c->p.heads,
                        c->p.queries, c->p.keys);
  c->p.plan = c->plan;
  return status;
}

// An output that was given: right in every way, and apart from all inputs.
static int check_given(call *c, const char *name, const sa_tensor *t, int dtype, int ndim, const int64_t *shape) {
  if (t->device != c->a->q->device) {
    return sa_fail(SA_INVALID, c->function, "%s: got a tensor on %s, wanted %s like q", name, sa_device_name(t->device),
                   sa_device_name(c->a->q->device));
  }
  if (t->dtype != dtype) {
    return sa_fail(SA_INVALID, c->function, "%s: got %s, wanted %s", name, sa_dtype_name(t->dtype),
                   sa_dtype_name(dtype));
  }
  int status = check_shape(c, name, t, ndim, shape, "");
  if (!status) status = sa_tensor_check_writable(c->function, name, t);
  if (status) return status;
  for (int n = 0; n < c->input_count; n++) {
    if (sa_tensor_overlap(t, c->inputs[n])) {
      return sa_fail(SA_INVALID, c->function, "%s: shares memory with %s, wanted memory of its own", name,
                     c->input_names[n]);
    }
  }
  c->inputs[c->input_count] = t;  // the next output may not share memory with this one either
  c->input_names[c->input_count++] = name;
  return SA_OK;
}

// Creates or takes an output; `t` NULL: it is not wanted.
static int use_output(call *c, const char *name, sa_tensor *t, int dtype, int ndim, const int64_t *shape,
                      sa_operand *x) {
  if (!t) return SA_OK;
  if (!t->data) {
    const int status = sa_tensor_new(t, dtype, c->a->q->device, ndim, shape);
    if (status) return status;
    c->created[c->creations++] = t;
  } else {
    const int status = check_given(c, name, t, dtype, ndim, shape);
    if (status) return status;
    if (!rows_contiguous(t)) {
      sa_tensor *own;
      const int made = dense_copy(c, t, false, &own);
      if (made) return made;
      c->aside[c->asides - 1].original = t;
      t = own;
    }
  }
  *x = operand_of(t);
  return SA_OK;
}

// [B,H,L] operands have their rows' stride where rank-4 ones have it.
static void shift_rows(sa_operand *x) {
  for (int d = 0; d < 3; d++) x->stride[d] = x->stride[d + 1];
  x->stride[3] = 0;
}

static void row_shape(const call *c, int64_t last, int64_t *shape) {
  const int64_t full[4] = {c->p.batch, c->p.heads, c->p.queries, last};
  memcpy(shape, full + 4 - c->rank, sizeof *shape * c->rank);
}

// Fused kernels multiply q, or products of q and k, by the scale in the precision of the scores. One near the ends of
// its range would make inf or 0 of what has a value: the reference has the range, too.
static double greatest_scale(int dtype) {
  return dtype == SA_F64 ? 0x1p1000 : 0x1p100;
}

static bool usable_scale(const sa_problem *p) {
  const double size = fabs(p->scale), greatest = greatest_scale(p->dtype);
  return size == 0 || (size >= 1 / greatest && size <= greatest);
}

static int choose_kernels(call *c, bool backward, const sa_attention_kernels **kernels) {
  const sa_backend *backend = sa_backend_of(c->function, c->a->q->device);
  if (!backend) return SA_NO_DEVICE;
  const bool usable = usable_scale(&c->p), may_fuse = c->a->backend != SA_REFERENCE && usable;
  const sa_attention_kernels *fused = may_fuse ? backend->fused(&c->p, backward) : NULL;
  if (!usable && c->a->backend == SA_FUSED) {
    const double greatest = greatest_scale(c->p.dtype);
    return sa_fail(SA_UNSUPPORTED, c->function,
                   "backend: got fused, whose kernels take scales of %s that are 0 or from %.3g to %.3g in size, for "
                   "%.6g; wanted auto or reference",
                   sa_dtype_name(c->p.dtype), 1 / greatest, greatest, c->p.scale);
  }
  if (!fused && c->a->backend == SA_FUSED) {
    return sa_fail(SA_UNSUPPORTED, c->function,
                   "backend: got fused, whose kernels take widths of q and v up to 256, for %lld and %lld; wanted auto "
                   "or reference",
                   (long long)c->p.width, (long long)c->p.value_width);
  }
  *kernels = fused ? fused : backend->reference(&c->p);
  if (!*kernels) {
    return sa_fail(SA_UNSUPPORTED, c->function, "backend: the reference is not in this build's part for %s",
                   sa_device_name(c->p.device));
  }
  c->a->used = fused ? SA_FUSED : SA_REFERENCE;
  memset(c->a->kernel, 0, sizeof c->a->kernel);
  strncpy(c->a->kernel, (*kernels)->name, sizeof c->a->kernel - 1);
  return SA_OK;
}

static int run_kernel(call *c, int (*kernel)(const sa_problem *)) {
  const int status = kernel(&c->p);
  if (!status && sa_interrupt_pending()) return sa_fail(SA_INTERRUPTED, c->function, "interrupted");
  return status;
}

static int close_call(call *c, int status) {
  for (int n = 0; n < c->asides; n++) {
    if (!status && c->aside[n].original) status = sa_copy(c->aside[n].original, &c->aside[n].own);
    sa_tensor_release(&c->aside[n].own);
  }
  for (int n = 0; status && n < c->creations; n++) sa_tensor_release(c->created[n]);
  if (c->plan) sa_plan_release(c->plan);
  return status;
}

static int forward(call *c) {
  sa_attention *a = c->a;
  sa_problem *p = &c->p;
  int64_t shape[4], weights_shape[4];
  if (!a->out) return sa_fail(SA_INVALID, c->function, "out: got NULL, wanted a descriptor to fill");
  int status = check_inputs(c);
  if (!status) status = use_inputs(c);
  if (status) return status;
  row_shape(c, p->value_width, shape);
  row_shape(c, p->keys, weights_shape);
  status = use_output(c, "out", a->out, p->dtype, c->rank, shape, &p->out);
  if (!status) status = use_output(c, "lse", a->lse, lse_dtype(p->dtype), c->rank - 1, shape, &p->lse);
  if (!status) status = use_output(c, "dead", a->dead, SA_BOOL, c->rank - 1, shape, &p->dead);
  if (!status) status = use_output(c, "weights", a->weights, p->dtype, c->rank, weights_shape, &p->weights);
  if (status) return status;
  shift_rows(&p->lse);
  shift_rows(&p->dead);
  // The choice hangs on what is to be written, too.
  const sa_attention_kernels *kernels;
  status = choose_kernels(c, false, &kernels);
  return status ? status : run_kernel(c, kernels->forward);
}

// What forward made, given back to backward.
static int check_saved(call *c, const char *name, const sa_tensor *t, bool needed, int dtype, int ndim,
                       const int64_t *shape, bool rows, sa_operand *x) {
  if (!t || !t->data) {
    if (needed) return sa_fail(SA_INVALID, c->function, "%s: got nothing, wanted what sa_forward gave", name);
    return SA_OK;
  }
  int status = check_input(c, name, t, dtype, dtype);
  if (!status) status = check_shape(c, name, t, ndim, shape, "");
  if (!status) status = use_input(c, t, rows, x);
  return status;
}

static int gradient(call *c, const char *name, sa_tensor *t, const sa_tensor *of, sa_operand *x) {
  if (!t) return SA_OK;
  if (!of)
    return sa_fail(SA_INVALID, c->function, "%s: got a descriptor to fill, wanted NULL, as there is no %s", name,
                   name + 1);
  return use_output(c, name, t, of->dtype, of->ndim, of->shape, x);
}

static int backward(call *c) {
  sa_attention *a = c->a;
  sa_problem *p = &c->p;
  int64_t shape[4];
  int status = check_inputs(c);
  if (!status) status = use_inputs(c);
  if (status) return status;
  row_shape(c, p->value_width, shape);
  const int real = lse_dtype(p->dtype);
  status = check_saved(c, "out", a->out, true, p->dtype, c->rank, shape, true, &p->out);
  if (!status) status = check_saved(c, "lse", a->lse, true, real, c->rank - 1, shape, false, &p->lse);
  if (!status) status = check_saved(c, "dead", a->dead, a->bias, SA_BOOL, c->rank - 1, shape, false, &p->dead);
  if (!status) status = check_saved(c, "dout", a->dout, false, p->dtype, c->rank, shape, true, &p->dout);
  if (!status) status = check_saved(c, "dlse", a->dlse, false, real, c->rank - 1, shape, false, &p->dlse);
  if (!status) status = gradient(c, "dq", a->dq, a->q, &p->dq);
  if (!status) status = gradient(c, "dk", a->dk, a->k, &p->dk);
  if (!status) status = gradient(c, "dv", a->dv, a->v, &p->dv);
  if (!status) status = gradient(c, "dbias", a->dbias, a->bias, &p->dbias);
  if (!status) status = gradient(c, "dsinks", a->dsinks, a->sinks, &p->dsinks);
  if (!status) status = gradient(c, "dalibi", a->dalibi, a->alibi, &p->dalibi);
  if (status) return status;
  shift_rows(&p->lse);
  shift_rows(&p->dead);
  shift_rows(&p->dlse);
  // Gradients per head run along [H], which is the last dim of their tensors and the second of four.
  p->dsinks.stride[1] = p->dsinks.stride[3];
  p->dalibi.stride[1] = p->dalibi.stride[3];
  const sa_attention_kernels *kernels;
  status = choose_kernels(c, true, &kernels);
  return status ? status : run_kernel(c, kernels->backward);
}

void sa_attention_init(sa_attention *a) {
  if (!a) return;
  memset(a, 0, sizeof *a);
  a->window_left = a->window_right = -1;
  a->deterministic = 1;
}

// The lists are as long as their counts say: to clear them, too, takes longer than a small call's checks.
static void open_call(call *c, const char *function, sa_attention *a) {
  c->function = function;
  c->a = a;
  c->p = (sa_problem){0};
  c->plan = NULL;
  c->asides = c->creations = c->input_count = 0;
}

int sa_forward(sa_attention *a) {
  if (!a) return sa_fail(SA_INVALID, __func__, "a: got NULL, wanted a filled sa_attention");
  call c;
  open_call(&c, __func__, a);
  return close_call(&c, forward(&c));
}

int sa_backward(sa_attention *a) {
  if (!a) return sa_fail(SA_INVALID, __func__, "a: got NULL, wanted a filled sa_attention");
  call c;
  open_call(&c, __func__, a);
  return close_call(&c, backward(&c));
}
