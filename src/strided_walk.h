// the elements of several strided tensors of one shape, as the loops of every device walk them
#ifndef SAFEATTN_STRIDED_WALK_H
#define SAFEATTN_STRIDED_WALK_H
#include "safeattn.h"

enum { SA_STRIDED_TENSORS = 4 };

// Bytes of an element of a dtype that there is.
static inline int64_t sa_element_size(int dtype) {
  return dtype == SA_F64 || dtype == SA_I64 ? 8 : dtype == SA_F32 || dtype == SA_I32 ? 4 : dtype == SA_BOOL ? 1 : 2;
}

// Dims are joined where all tensors allow it, so contiguous tensors are one long row.
typedef struct sa_strided {
  int tensors, ndim;  // ndim >= 1; the last dim runs along the row
  int64_t numel;
  int64_t shape[SA_MAX_DIMS];
  char *data[SA_STRIDED_TENSORS];
  int64_t size[SA_STRIDED_TENSORS];               // bytes of an element
  int64_t step[SA_STRIDED_TENSORS][SA_MAX_DIMS];  // in elements
} sa_strided;

static inline void sa_strided_swap(sa_strided *walk, int a, int b) {
  const int64_t size = walk->shape[a];
  walk->shape[a] = walk->shape[b];
  walk->shape[b] = size;
  for (int i = 0; i < walk->tensors; i++) {
    const int64_t step = walk->step[i][a];
    walk->step[i][a] = walk->step[i][b];
    walk->step[i][b] = step;
  }
}

static inline bool sa_strided_joins(const sa_strided *walk, int outer, int inner) {
  for (int i = 0; i < walk->tensors; i++)
    if (walk->step[i][outer] != walk->step[i][inner] * walk->shape[inner]) return false;
  return true;
}

// The walk is over the dims of the first tensor, but for those whose bit is set in `without`: along them, and along
// dims that others have beyond, it stays at the first element. It is in row-major order; with `any_order` it follows
// the memory of the first tensor, so give the output first.
static inline sa_strided sa_strided_of(int tensors, const sa_tensor *const *t, uint32_t without, bool any_order) {
  sa_strided walk = {0};
  walk.tensors = tensors;
  walk.numel = 1;
  for (int i = 0; i < tensors; i++) {
    walk.data[i] = (char *)t[i]->data;
    walk.size[i] = sa_element_size(t[i]->dtype);
  }
  for (int dim = 0; dim < t[0]->ndim; dim++) {
    if (without >> dim & 1 || t[0]->shape[dim] == 1) continue;
    walk.numel *= t[0]->shape[dim];
    walk.shape[walk.ndim] = t[0]->shape[dim];
    for (int i = 0; i < tensors; i++) walk.step[i][walk.ndim] = t[i]->stride[dim];
    for (int k = walk.ndim++; any_order && k > 0 && walk.step[0][k] > walk.step[0][k - 1]; k--)
      sa_strided_swap(&walk, k, k - 1);
  }
  if (walk.ndim == 0) {  // one element
    walk.ndim = 1;
    walk.shape[0] = 1;
    for (int i = 0; i < tensors; i++) walk.step[i][0] = 1;
  }
  int last = 0;
  for (int dim = 1; dim < walk.ndim; dim++) {
    const bool joined = sa_strided_joins(&walk, last, dim);
    const int64_t outer = joined ? walk.shape[last] : 1;
    if (!joined) last++;
    walk.shape[last] = outer * walk.shape[dim];
    for (int i = 0; i < tensors; i++) walk.step[i][last] = walk.step[i][dim];
  }
  walk.ndim = last + 1;
  return walk;
}

#endif
