// what the core says of the BLAS that multiplies its matrices
#ifndef SAFEATTN_MATMUL_H
#define SAFEATTN_MATMUL_H

// "OpenBLAS 0.3.21 ... SkylakeX"; "not loaded" before the first product that needs it.
const char *sa_blas_name(void);

#endif
