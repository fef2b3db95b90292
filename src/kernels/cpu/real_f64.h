// the fused kernels' arithmetic in double: for f64
#define REAL double
#define BITS uint64_t
#define NAME(x) x##_f64
#define DTYPE SA_F64
#define MANTISSA_BITS 52
#define EXPONENT_BIAS 1023
#define LOWEST_EXPONENT -969
#define LOG log
