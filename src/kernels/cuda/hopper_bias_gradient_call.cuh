// what the gradient of a bias on Hopper is launched with, and how a block shares its memory
#ifndef SAFEATTN_KERNELS_CUDA_HOPPER_BIAS_GRADIENT_CALL_CUH
#define SAFEATTN_KERNELS_CUDA_HOPPER_BIAS_GRADIENT_CALL_CUH
#include "kernels/cuda/hopper_backward_call.cuh"

enum {
  HOPPER_BIAS_THREADS = 384,
  // 128 * 40 + 256 * 232 are the 384 * 168 registers that a block is launched with.
  HOPPER_BIAS_PRODUCER_REGISTERS = 40,
  HOPPER_BIAS_CONSUMER_REGISTERS = 232,
  HOPPER_BIAS_NOTES = 4,
  // Named barriers: of the warpgroups that multiply, of two warps of theirs.
  HOPPER_BIAS_BOTH = 1,
  HOPPER_BIAS_HALVES = 2,
  HOPPER_BIAS_EMPTY = -2,
  // What a note is about.
  HOPPER_BIAS_END = 0,    // nothing is left
  HOPPER_BIAS_BEGIN = 1,  // a tile of the bias
  HOPPER_BIAS_STEP = 2,   // a tile of pairs
  HOPPER_BIAS_WRITE = 3   // the end of the job
};

// WIDE: the bias is in f32. Else its tile is kept in halves, which leaves room for a sixth slot.
template <class T, bool WIDE>
struct hopper_bias_shape {
  using type = T;
  static constexpr bool wide = WIDE;
  static constexpr int slots = WIDE ? 5 : 6;
  // Shared memory, from where it starts. The sums of one warpgroup lie where the bias was, each thread's four in a row
  // apart by a bank more than they need, so that rows of the tile are read well.
  static constexpr uint32_t slot_bytes = SA_TILE * 128 * 2, values = slots * slot_bytes, sums_bytes = 16 * 129 * 16,
                            note = values + (WIDE ? SA_TILE * SA_TILE * 4 : sums_bytes),
                            slot_full = note + 32 * HOPPER_BIAS_NOTES, slot_free = slot_full + 8 * slots,
                            note_full = slot_free + 8 * slots, note_free = note_full + 8 * HOPPER_BIAS_NOTES,
                            bytes = note_free + 8 * HOPPER_BIAS_NOTES;
  static_assert(bytes <= 227 << 10, "shared memory of a block");
};

// What is summed. The dims are batches, heads, rows of tiles and columns of tiles.
typedef struct hopper_bias_sums {
  sa_operand to;     // dBias
  int32_t shape[4];  // of it, in elements
  int32_t tiles[4];  // 1 where it is broadcast
  int32_t turns[4];  // how many of the dim share a tile
  int32_t parts;     // blocks that share a tile
  int32_t jobs;      // tiles * parts
  int32_t fours;     // four neighbouring keys can be written at once
  int64_t count;     // elements
  float *part;       // [parts][elements], or NULL: dBias itself is written
} hopper_bias_sums;

#endif
