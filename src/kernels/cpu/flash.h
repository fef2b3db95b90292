// the algorithm of the fused kernels, written once; a file per ISA includes it for float and for double
//
// Scores are kept transposed, one row per key and one vector of queries per column: S^T = K Q^T. Then only Q is packed
// (K and V stay where they are), max, sum and rescaling are vectors along the queries, so that the softmax needs no
// horizontal operation, P^T comes out as the packed operand that P V wants, and one word of a mask's pattern is one
// key's bits for the 64 queries of a block. After FlashAttention (Dao et al., 2022) for the running softmax, and its
// second paper (Dao, 2023) for the backward from the LSE.
//
// Before including, the ISA's file includes real_f32.h or real_f64.h, says LANES (queries per vector) and TILE_VECTORS
// (vectors per row of a register tile: 2 or 4), and defines its vectors, as vector.h does in the compiler's own terms.
// A block is processed against up to STRETCH keys at a time, SEGMENT or KEYS (walk.h). S^T of 64 keys stays in the
// first cache beside a tile of K or V; with 128, P V meets o half as often, which is worth more with AVX-512 (1 to 3 %
// of the forward in f64, whose S^T then takes 74 KB). docs/cpu.md has what was tried.

#include "kernels/cpu/flash_tile.h"

#include "kernels/cpu/flash_forward.h"

#include "kernels/cpu/flash_backward.h"

#include "kernels/cpu/flash_peak.h"
