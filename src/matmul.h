// OpenBLAS, opened on first use
#ifndef SAFEATTN_MATMUL_H
#define SAFEATTN_MATMUL_H
#include <stdbool.h>

// "OpenBLAS 0.3.21 ... Cooperlake"; "not loaded" before the first product that needs it; when there is none, that plain
// loops stand in.
const char *sa_blas_name(void);

// y[m,n] = op(a)[m,k] op(b)[k,n], row-major: a has `a_step` elements from row to row and is [k,m] when a_transposed.
typedef struct sa_product {
  int m, n, k;
  int a_transposed, b_transposed;
  int a_step, b_step, y_step;
} sa_product;

// False when there is no BLAS that can be used; nothing is written then.
bool sa_blas_f32(const sa_product *p, const float *a, const float *b, float *y);
bool sa_blas_f64(const sa_product *p, const double *a, const double *b, double *y);

#endif
