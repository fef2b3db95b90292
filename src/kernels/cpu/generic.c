// the fused kernels for any machine: vectors of 16 bytes in the compiler's own terms
//
// Without a fused multiply-add; some half of the peak of such vectors.
#define TIER generic
#define VECTOR_BYTES 16

#include "kernels/cpu/flash_needs.h"

#include "kernels/cpu/real_f32.h"
#define LANES 4
#define TILE_VECTORS 2
#define STRETCH SEGMENT
#include "kernels/cpu/vector.h"
#include "kernels/cpu/flash.h"
#include "kernels/cpu/real_end.h"

#include "kernels/cpu/real_f64.h"
#define LANES 2
#define TILE_VECTORS 2
#define STRETCH SEGMENT
#include "kernels/cpu/vector.h"
#include "kernels/cpu/flash.h"
#include "kernels/cpu/real_end.h"

#include "kernels/cpu/flash_table.h"
