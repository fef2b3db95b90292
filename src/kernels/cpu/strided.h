// walks the elements of several strided tensors of one shape, in pieces that are read and written in one type
#ifndef SAFEATTN_KERNELS_CPU_STRIDED_H
#define SAFEATTN_KERNELS_CPU_STRIDED_H
#include "kernels/cpu/copy.h"
#include "strided_walk.h"

enum { SA_PIECE = 256 };  // elements at most in a piece: the f64 buffers for four tensors leave half of L1

// `count` <= SA_PIECE elements of every tensor from data[i] on, step[i] elements apart.
typedef void (*sa_piece_task)(void *argument, char *const *data, const int64_t *step, int64_t count);

// Elements first .. last - 1 of the walk, in its order.
void sa_strided_run(const sa_strided *walk, int64_t first, int64_t last, sa_piece_task task, void *argument);
// All elements, on several threads when numel * cost (flops each) pays for them. For tasks that treat every element
// alone, so that the cut does not show in the bits.
void sa_strided_run_all(const sa_strided *walk, double cost, sa_piece_task task, void *argument);

// What halves are computed in, and what bool is: the other dtypes stay what they are.
static inline int sa_compute_dtype(int dtype) {
  return dtype == SA_F16 || dtype == SA_BF16 ? SA_F32 : dtype == SA_BOOL ? SA_I32 : dtype;
}

// A piece in dtype `as`: where it lies when that is how it lies, else in `buffer`.
static inline const void *sa_piece_read(void *buffer, int as, const void *from, int dtype, int64_t step,
                                        int64_t count) {
  if (dtype == as && step == 1) return from;
  sa_cpu_cast(as, dtype)(buffer, 1, from, step, count);
  return buffer;
}

// Where to compute a piece in dtype `as` before sa_piece_write puts it into `to`: right there when possible.
static inline void *sa_piece_target(void *buffer, int as, void *to, int dtype, int64_t step) {
  return dtype == as && step == 1 ? to : buffer;
}

static inline void sa_piece_write(void *to, int dtype, int64_t step, const void *from, int as, int64_t count) {
  if (from != to) sa_cpu_cast(dtype, as)(to, step, from, 1, count);
}

#endif
