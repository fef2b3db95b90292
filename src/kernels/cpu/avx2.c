// the fused kernels with AVX2 and FMA: vectors of 32 bytes, register tiles of 6 x 2
#if defined(__AVX2__)
#include <immintrin.h>

#include "kernels/cpu/flash_needs.h"

#define TIER avx2
#define VECTOR_BYTES 32

#include "kernels/cpu/real_f32.h"
#define LANES 8
#define TILE_VECTORS 2
#define OWN_FMA _mm256_fmadd_ps
#define OWN_BITS_OF _mm256_movemask_ps
#include "kernels/cpu/vector.h"
#include "kernels/cpu/flash.h"
#include "kernels/cpu/real_end.h"

#include "kernels/cpu/real_f64.h"
#define LANES 4
#define TILE_VECTORS 2
#define OWN_FMA _mm256_fmadd_pd
#define OWN_BITS_OF _mm256_movemask_pd
#include "kernels/cpu/vector.h"
#include "kernels/cpu/flash.h"
#include "kernels/cpu/real_end.h"

#include "kernels/cpu/flash_table.h"
#endif
