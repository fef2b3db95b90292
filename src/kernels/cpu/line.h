// lines of a tensor along one dim, as softmax, cross entropy and normalisation read them
#ifndef SAFEATTN_KERNELS_CPU_LINE_H
#define SAFEATTN_KERNELS_CPU_LINE_H
#include "kernels/cpu/strided.h"

typedef struct sa_line {
  char *data;  // its first entry
  int dtype;
  int64_t length, step;  // step in elements
} sa_line;

// The first line of t along `dim`.
static inline sa_line sa_line_of(const sa_tensor *t, int dim) {
  return (sa_line){t->data, t->dtype, t->shape[dim], t->stride[dim]};
}

static inline sa_line sa_line_at(sa_line line, char *data) {
  line.data = data;
  return line;
}

static inline char *sa_line_entry(const sa_line *line, int64_t i) {
  return line->data + i * line->step * sa_dtype_size(line->dtype);
}

// A line is taken in pieces: `for (first = 0; first < length; first += SA_PIECE)`, of so many entries each.
static inline int64_t sa_line_piece(const sa_line *line, int64_t first) {
  return line->length - first < SA_PIECE ? line->length - first : SA_PIECE;
}

// As sa_piece_read, _target and _write, for the piece from `first` on.
static inline const void *sa_line_read(void *buffer, int as, const sa_line *line, int64_t first) {
  return sa_piece_read(buffer, as, sa_line_entry(line, first), line->dtype, line->step, sa_line_piece(line, first));
}
static inline void *sa_line_target(void *buffer, int as, const sa_line *line, int64_t first) {
  return sa_piece_target(buffer, as, sa_line_entry(line, first), line->dtype, line->step);
}
static inline void sa_line_write(const sa_line *line, int64_t first, const void *from, int as) {
  sa_piece_write(sa_line_entry(line, first), line->dtype, line->step, from, as, sa_line_piece(line, first));
}

static inline void sa_line_fill(const sa_line *line, double value) {
  for (int64_t i = 0; i < line->length; i += SA_PIECE)
    sa_cpu_cast(line->dtype, SA_F64)(sa_line_entry(line, i), line->step, &value, 0, sa_line_piece(line, i));
}

#endif
