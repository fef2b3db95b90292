// the fused kernels' arithmetic in float: for f32, f16 and bf16
#define REAL float
#define BITS uint32_t
#define NAME(x) x##_f32
#define DTYPE SA_F32
#define MANTISSA_BITS 23
#define EXPONENT_BIAS 127
#define LOWEST_EXPONENT -102
#define LOG sa_log_in_double_f32
