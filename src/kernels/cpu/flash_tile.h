// a block of queries with a stretch of keys: rows, products, scores and weights, for one REAL; part of flash.h

#include "kernels/cpu/flash_block.h"

#if defined(OWN_PRODUCTS)
#include "kernels/cpu/amx_product.h"
#else
#include "kernels/cpu/flash_product.h"
#endif
#undef SA_LOW
#undef SA_HIGH

#include "kernels/cpu/flash_scores.h"
