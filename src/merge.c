// attention over parts of the keys, merged by LSE: checks and outputs
#include <stdio.h>

#include "memory.h"
#include "operation.h"
#include "status.h"

enum { MOST_PARTS = 1 << 20 };

// outs[p] and lses[p] must be like those of part 0, and lses[0] have the shape of outs[0] without its last dim.
static int check_parts(const char *function, const sa_tensor *const *outs, const sa_tensor *const *lses,
                       int64_t parts) {
  if (!outs || !lses) return sa_fail(SA_INVALID, function, "%s: got NULL, wanted tensors", outs ? "lses" : "outs");
  if (parts < 1 || parts > MOST_PARTS)
    return sa_fail(SA_INVALID, function, "parts: got %lld, wanted 1 .. %d", (long long)parts, MOST_PARTS);
  int status = sa_check_float(function, "outs[0]", outs[0]);
  if (!status && outs[0]->ndim < 1) status = sa_fail(SA_INVALID, function, "outs[0]: got no dims, wanted at least one");
  if (!status) status = sa_tensor_check(function, "lses[0]", lses[0]);
  if (!status) status = sa_check_device(function, "lses[0]", lses[0], "outs[0]", outs[0]);
  if (!status) status = sa_check_dtype(function, "lses[0]", lses[0], outs[0]->dtype == SA_F64 ? SA_F64 : SA_F32);
  if (!status) status = sa_check_shape(function, "lses[0]", lses[0], outs[0]->ndim - 1, outs[0]->shape);
  for (int64_t p = 1; !status && p < parts; p++) {
    char out_name[32], lse_name[32];
    snprintf(out_name, sizeof out_name, "outs[%d]", (int)p);
    snprintf(lse_name, sizeof lse_name, "lses[%d]", (int)p);
    status = sa_check_like(function, out_name, outs[p], "outs[0]", outs[0]);
    if (!status) status = sa_check_like(function, lse_name, lses[p], "lses[0]", lses[0]);
  }
  return status;
}

// All that is read, for outputs to be compared with: 2 * parts + 4 pointers, the last ones NULL unless filled in.
static const sa_tensor **list_inputs(const char *function, const sa_tensor *const *outs, const sa_tensor *const *lses,
                                     int64_t parts) {
  const sa_tensor **inputs = sa_allocate_zeroed(function, (2 * parts + 4) * (int64_t)sizeof *inputs);
  for (int64_t p = 0; inputs && p < parts; p++) {
    inputs[p] = outs[p];
    inputs[parts + p] = lses[p];
  }
  return inputs;
}

static int open_like(sa_output *output, const char *function, const char *name, sa_tensor *given, const sa_tensor *like,
                     const sa_tensor *const *inputs, int64_t parts) {
  return sa_output_open(output, function, name, given, like->dtype, like->device, like->ndim, like->shape, false,
                        inputs, (int)(2 * parts + 4));
}

int sa_merge(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts, sa_tensor *out,
             sa_tensor *lse) {
  int status = check_parts(__func__, outs, lses, parts);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, outs[0]->device, &operations);
  if (status) return status;
  const sa_tensor **inputs = list_inputs(__func__, outs, lses, parts);
  if (!inputs) return SA_NO_MEMORY;
  sa_output opened[2] = {0};
  status = open_like(&opened[0], __func__, "out", out, outs[0], inputs, parts);
  if (!status) status = open_like(&opened[1], __func__, "lse", lse, lses[0], inputs, parts);
  if (!status) status = operations->merge(outs, lses, parts, &opened[0].target, &opened[1].target);
  for (int i = 0; i < 2; i++) status = sa_output_close(&opened[i], status);
  sa_release(inputs);
  return status;
}

static int check_merged(const char *function, const sa_tensor *like_out, const sa_tensor *like_lse,
                        const sa_tensor *out, const sa_tensor *lse, const sa_tensor *dout, const sa_tensor *dlse) {
  int status = sa_check_like(function, "out", out, "outs[0]", like_out);
  if (!status) status = sa_check_like(function, "lse", lse, "lses[0]", like_lse);
  if (!status && dout) status = sa_check_like(function, "dout", dout, "outs[0]", like_out);
  if (!status && dlse) status = sa_check_like(function, "dlse", dlse, "lses[0]", like_lse);
  return status;
}

// The gradients of the parts while they are written: those of outs first, then those of lses.
typedef struct gradients {
  sa_output *opened;
  const sa_tensor **targets;  // NULL where not wanted
} gradients;

static int open_gradients(gradients *g, const char *function, sa_tensor *const *given, const char *name,
                          const sa_tensor *like, const sa_tensor *const *inputs, int64_t first, int64_t parts) {
  int status = SA_OK;
  for (int64_t p = 0; !status && given && p < parts; p++) {
    if (!given[p]) continue;
    char full_name[32];
    snprintf(full_name, sizeof full_name, "%s[%d]", name, (int)p);
    status = open_like(&g->opened[first + p], function, full_name, given[p], like, inputs, parts);
    g->targets[first + p] = &g->opened[first + p].target;
  }
  return status;
}

int sa_merge_backward(const sa_tensor *const *outs, const sa_tensor *const *lses, int64_t parts, const sa_tensor *out,
                      const sa_tensor *lse, const sa_tensor *dout, const sa_tensor *dlse, sa_tensor *const *douts,
                      sa_tensor *const *dlses) {
  int status = check_parts(__func__, outs, lses, parts);
  if (!status) status = check_merged(__func__, outs[0], lses[0], out, lse, dout, dlse);
  const sa_operations *operations;
  if (!status) status = sa_operations_of(__func__, outs[0]->device, &operations);
  if (status) return status;
  const sa_tensor **inputs = list_inputs(__func__, outs, lses, parts);
  gradients g = {.opened = inputs ? sa_allocate_zeroed(__func__, 2 * parts * (int64_t)sizeof *g.opened) : NULL};
  if (g.opened) g.targets = sa_allocate_zeroed(__func__, 2 * parts * (int64_t)sizeof *g.targets);
  if (!g.targets) {
    status = SA_NO_MEMORY;
  } else {
    const sa_tensor *merged[] = {out, lse, dout, dlse};
    for (int i = 0; i < 4; i++) inputs[2 * parts + i] = merged[i];
    status = open_gradients(&g, __func__, douts, "douts", outs[0], inputs, 0, parts);
    if (!status) status = open_gradients(&g, __func__, dlses, "dlses", lses[0], inputs, parts, parts);
    if (!status)
      status = operations->merge_backward(outs, lses, parts, out, lse, dout, dlse, g.targets, g.targets + parts);
    for (int64_t i = 0; i < 2 * parts; i++) status = sa_output_close(&g.opened[i], status);
  }
  sa_release(g.targets);
  sa_release(g.opened);
  sa_release(inputs);
  return status;
}
