// mask expressions as the compiler of plans reads them
#ifndef SAFEATTN_MASK_H
#define SAFEATTN_MASK_H
#include <string.h>

#include "plan.h"

// Beyond every position: tiles are counted in int32_t, so positions are below 2^38, and sums of two are far from
// overflow.
#define SA_UNBOUNDED ((int64_t)1 << 40)

// A distance that masks know; a negative one means unbounded.
static inline int64_t sa_bounded(int64_t distance) {
  return distance < 0 || distance > SA_UNBOUNDED ? SA_UNBOUNDED : distance;
}

typedef enum sa_mask_kind {
  SA_MASK_BAND,
  SA_MASK_CORNER,
  SA_MASK_DOCUMENTS,
  SA_MASK_GRID,
  SA_MASK_RANDOM,
  SA_MASK_AND,
  SA_MASK_OR,
  SA_MASK_NOT
} sa_mask_kind;

static inline int sa_operands(sa_mask_kind kind) {
  return kind == SA_MASK_NOT ? 1 : kind == SA_MASK_AND || kind == SA_MASK_OR ? 2 : 0;
}

// -left <= j - i - d <= right, d = S - L when bottom_right, else 0. Causality and windows.
typedef struct sa_band {
  int64_t left, right;
  bool bottom_right;
} sa_band;

// Keys j < keys are seen by queries i < inside, the others by queries i < outside. Padding, prefixes, global tokens,
// all and none.
typedef struct sa_corner {
  int64_t keys, inside, outside;
} sa_corner;

// The ids in a range of positions: the lowest and highest of those that are not negative (low > high: there are none),
// and the lowest of all.
typedef struct sa_id_range {
  int32_t low, high, lowest;
} sa_id_range;

// Ids of documents, renumbered in the order in which keys first show them (-1: no key's), so that ranges of tiles have
// narrow ranges of ids whatever the ids were.
typedef struct sa_ids {
  int64_t batch, count;
  int64_t leaves;       // 2^sa_levels(tiles)
  int32_t *number;      // [batch, count]
  sa_id_range *ranges;  // [batch, 2 * leaves]: that of tiles [index << level, ..) is number (leaves >> level) + index
} sa_ids;

static inline int64_t sa_tiles(int64_t positions) {
  return positions / SA_TILE + (positions % SA_TILE != 0);
}

// How often `tiles` is halved, rounding up, before one is left.
static inline int sa_levels(int64_t tiles) {
  int levels = 0;
  while ((int64_t)1 << levels < tiles) levels++;
  return levels;
}

// One bit for each block of size x size pairs; size is 1 for dense masks. A dim of 1 is broadcast.
typedef struct sa_grid {
  int64_t size;
  int64_t shape[4];  // what was given, with ones in front: [batch, heads, rows, columns]
  int64_t kept[4];   // the same, with 1 where the elements repeat
  int64_t words;     // per row of bits: a multiple of two, so that a tile's 128 columns can always be read
  uint64_t *bits;    // [kept[0], kept[1], kept[2], words]
} sa_grid;

// The pair of index n = i * S + j is visible when the upper 24 bits of Philox word n are below the threshold.
typedef struct sa_chance {
  uint32_t threshold;
  uint64_t seed;
} sa_chance;

// Plans that were compiled for this mask (or for no mask), least recently used dropped first.
enum { SA_PLANS_KEPT = 4 };

typedef struct sa_plan_key {
  int64_t causal, window_left, window_right, batch, heads, queries, keys;
} sa_plan_key;

typedef struct sa_kept_plan {
  sa_plan_key key;
  const sa_plan *plan;  // NULL: the place is free
  uint64_t used;        // when
} sa_kept_plan;

struct sa_mask {
  _Atomic int64_t holders;
  sa_mask_kind kind;
  bool per_batch, per_head;  // whether the pairs depend on them
  _Atomic bool in_use;       // planned or combined, so its bits may no longer change
  const char *name;          // of the constructor, for messages
  int64_t batch, heads;      // that the call must have; 1: any
  union {
    sa_band band;
    struct {
      sa_corner *corners;  // [batch]
      bool clipped;        // corners may lie beyond the sequence
    };
    struct {
      sa_ids query_ids, key_ids;
      bool shared;  // query_ids are key_ids
    };
    sa_grid grid;
    sa_chance chance;
    const struct sa_mask *operands[2];
  };
  struct sa_mask *next;  // of those about to be released
  sa_kept_plan plans[SA_PLANS_KEPT];
};

// The plan of mask (NULL: all) AND causality AND window; the sizes are not negative, the plan's batch and heads are the
// mask's. Errors are those of sa_mask_plan.
int sa_compile(sa_plan **out, const sa_mask *mask, int causal, int64_t window_left, int64_t window_right, int64_t batch,
               int64_t heads, int64_t queries, int64_t keys);

// 64 flags, 0 or 1 each, to bits. A product moves the flags of eight bytes into its top byte.
static inline uint64_t sa_pack_flags(const uint8_t *flags) {
  uint64_t bits = 0;
  for (int byte = 0; byte < 8; byte++) {
    uint64_t eight;
    memcpy(&eight, flags + 8 * byte, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    eight = __builtin_bswap64(eight);
#endif
    bits |= (eight * 0x0102040810204080u >> 56) << (8 * byte);
  }
  return bits;
}

// Bit k of row i becomes bit i of row k: ever smaller squares off the diagonal change places.
static inline void sa_transpose64(uint64_t rows[64]) {
  uint64_t low = 0x00000000ffffffff;
  for (int half = 32; half; half >>= 1, low ^= low << half)
    for (int first = 0; first < 64; first += 2 * half)
      for (int row = first; row < first + half; row++) {
        const uint64_t swapped = (rows[row] >> half ^ rows[row + half]) & low;
        rows[row] ^= swapped << half;
        rows[row + half] ^= swapped;
      }
}

// Lets go of plans a mask keeps.
void sa_plans_drop(sa_kept_plan *plans, int count);

#endif
