// the elements of a tensor on the CPU, one after another in row-major order, whatever its dtype and strides
#ifndef SAFEATTN_STREAM_H
#define SAFEATTN_STREAM_H
#include "safeattn.h"

typedef struct sa_stream {
  char *row;           // where the current row starts
  int64_t column;      // next element of the current row
  int64_t left;        // elements not yet passed
  int64_t size, step;  // of a row, in elements
  int64_t element;     // bytes
  int32_t dtype;
  int32_t outer;  // dims around the rows
  int64_t shape[SA_MAX_DIMS], stride[SA_MAX_DIMS], index[SA_MAX_DIMS];
} sa_stream;

void sa_stream_open(sa_stream *stream, const sa_tensor *t);
// Converts the next elements, at most `count`, to or from `values` of `dtype`; returns how many. 0 at the end.
int64_t sa_stream_read(sa_stream *stream, void *values, int dtype, int64_t count);
int64_t sa_stream_write(sa_stream *stream, const void *values, int dtype, int64_t count);

#endif
