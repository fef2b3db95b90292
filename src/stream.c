// the elements of a tensor on the CPU, one after another in row-major order, whatever its dtype and strides
#include "stream.h"

#include "kernels/cpu/copy.h"

// Adds a dim outside in: it joins the one before when both are one stretch of memory.
static void add_dim(sa_stream *s, int64_t size, int64_t stride) {
  const int last = s->outer - 1;
  if (last >= 0 && s->stride[last] == size * stride) {
    s->shape[last] *= size;
    s->stride[last] = stride;
    return;
  }
  s->shape[s->outer] = size;
  s->stride[s->outer++] = stride;
}

void sa_stream_open(sa_stream *stream, const sa_tensor *t) {
  *stream = (sa_stream){.row = t->data,
                        .left = sa_tensor_numel(t),
                        .size = 1,
                        .step = 1,
                        .element = sa_dtype_size(t->dtype),
                        .dtype = t->dtype};
  for (int dim = 0; dim < t->ndim; dim++)
    if (t->shape[dim] != 1) add_dim(stream, t->shape[dim], t->stride[dim]);
  if (!stream->outer) return;
  stream->outer--;
  stream->size = stream->shape[stream->outer];
  stream->step = stream->stride[stream->outer];
}

static void next_row(sa_stream *s) {
  s->column = 0;
  for (int dim = s->outer - 1; dim >= 0; dim--) {
    s->row += s->stride[dim] * s->element;
    if (++s->index[dim] < s->shape[dim]) return;
    s->row -= s->shape[dim] * s->stride[dim] * s->element;
    s->index[dim] = 0;
  }
}

// Passes what is left of the current row, at most `count` elements, and says where they are.
static int64_t pass(sa_stream *s, int64_t count, char **elements) {
  int64_t passed = s->size - s->column;
  if (passed > count) passed = count;
  *elements = s->row + s->column * s->step * s->element;
  s->left -= passed;
  s->column += passed;
  if (s->column == s->size && s->left) next_row(s);
  return passed;
}

int64_t sa_stream_read(sa_stream *stream, void *values, int dtype, int64_t count) {
  const sa_cast_row cast = sa_cpu_cast(dtype, stream->dtype);
  const int64_t bytes = sa_dtype_size(dtype);
  int64_t done = 0;
  while (done < count && stream->left) {
    char *elements;
    const int64_t passed = pass(stream, count - done, &elements);
    cast((char *)values + done * bytes, 1, elements, stream->step, passed);
    done += passed;
  }
  return done;
}

int64_t sa_stream_write(sa_stream *stream, const void *values, int dtype, int64_t count) {
  const sa_cast_row cast = sa_cpu_cast(stream->dtype, dtype);
  const int64_t bytes = sa_dtype_size(dtype);
  int64_t done = 0;
  while (done < count && stream->left) {
    char *elements;
    const int64_t passed = pass(stream, count - done, &elements);
    cast(elements, stream->step, (const char *)values + done * bytes, 1, passed);
    done += passed;
  }
  return done;
}
