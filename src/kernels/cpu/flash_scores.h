// the scores of a block with a stretch of keys, and the weights they become, for one REAL; part of flash_tile.h

// tanh to about 2 ulp: a series near 0, where the quotient would cancel, and (1 - e^-2x) / (1 + e^-2x) beyond.
static inline NAME(vector) NAME(tanh)(NAME(vector) x) {
  const NAME(vector) one = NAME(set)(1), size = NAME(magnitude)(x);
  const NAME(vector) decay = NAME(exp2)(size * NAME(set)((REAL)-2.885390081777926815));
  const NAME(vector) far = (one - decay) / (one + decay);
  const NAME(vector) square = x * x;
  static const REAL terms[] = {NAME(TANH_TERMS)};
  NAME(vector) series = NAME(set)(terms[0]);
  for (int k = 1; k < (int)(sizeof terms / sizeof *terms); k++) series = NAME(fma)(series, square, NAME(set)(terms[k]));
  const NAME(vector) near = NAME(fma)(series * square, x, x);
  const NAME(vector) signed_far = NAME(select)(NAME(below_or_equal)(NAME(set)(0), x), far, -far);
  return NAME(select)(NAME(below_or_equal)(NAME(set)((REAL)0.4), size), signed_far, near);
}

// Room for one stretch of keys against one block.
typedef struct NAME(stretch_room) {
  REAL *scores;       // [keys][ROW]: S^T, then P^T
  REAL *bias;         // [keys][ROW]
  REAL *capped;       // [keys][ROW]: tanh(s / softcap), when the backward wants it
  uint64_t *visible;  // [keys]
  uint64_t *kept;     // [keys]: what dropout keeps; of the backward
  sa_outline *outline;
} NAME(stretch_room);

// Whether some element is -inf.
static bool NAME(has_lowest)(const REAL *row, int count) {
  int found = 0;
  for (int r = 0; r < count; r++) found |= row[r] == -(REAL)INFINITY;
  return found;
}

// Reads a row-major tile of the bias transposed; 0 beyond the block. Returns whether it masks some pair.
static bool NAME(load_bias)(const NAME(block) * block, const sa_stretch *stretch, REAL *to) {
  const sa_operand *bias = &block->p->bias;
  const int count = stretch->count;
  REAL rows[LANES * KEYS];
  bool masks = false;
  for (int first = 0; first < block->vectors * LANES; first += LANES) {
    if (bias->dtype == DTYPE && bias->stride[3] && first + LANES <= block->count) {
      const REAL *from = sa_at(bias, block->batch, block->head, block->query + first, stretch->first);
      for (int i = 0; i < LANES; i++) masks |= NAME(has_lowest)(from + i * bias->stride[2], count);
      NAME(turn)(from, bias->stride[2], count, NAME(set)(1), to + first);
      continue;
    }
    for (int i = 0; i < LANES; i++) {
      REAL *row = rows + i * KEYS;
      if (first + i >= block->count) {
        memset(row, 0, sizeof *row * count);
        continue;
      }
      const void *from = sa_at(bias, block->batch, block->head, block->query + first + i, stretch->first);
      NAME(read_row)(from, bias->dtype, bias->stride[3] ? count : 1, row);
      for (int r = 1; r < count && !bias->stride[3]; r++) row[r] = row[0];
      masks |= NAME(has_lowest)(row, count);
    }
    NAME(turn)(rows, KEYS, count, NAME(set)(1), to + first);
  }
  return masks;
}

// The words of a masked stretch's visible pairs: of a pattern's, those that hold the block's queries, for each of its
// heads.
static void NAME(see)(const NAME(block) * block, const sa_stretch *stretch, uint64_t *visible) {
  const int half = (int)(block->query % SA_TILE / QUERIES), keys = stretch->count;
  for (int r = 0; r < keys; r++) visible[r] = stretch->pattern[r][half];
  if (block->each == block->count) return;
  for (int r = 0; r < keys; r++) {
    const uint64_t own = visible[r] & ((UINT64_C(1) << block->each) - 1);
    visible[r] = 0;
    for (int i = 0; i < block->count; i += block->each) visible[r] |= own << i;
  }
}

// Sees a masked stretch and draws its outline, in the room; NULL: nothing can be left out.
static const sa_outline *NAME(outline)(const NAME(block) * block, const sa_stretch *stretch,
                                       const NAME(stretch_room) * room) {
  if (!stretch->pattern) return NULL;
  NAME(see)(block, stretch, room->visible);
  if (block->few) return NULL;
  return sa_draw_outline(room->visible, stretch->count, block->count, room->outline) ? room->outline : NULL;
}

// The stretch's rows of a bias that can be added as it lies: whole squares of the work's own dtype, and nothing else to
// do with the scores than to add it. Else NULL.
static const REAL *NAME(plain_bias)(const NAME(block) * block, const sa_stretch *stretch) {
  const sa_problem *p = block->p;
  const sa_operand *bias = &p->bias;
  if (!bias->data || bias->dtype != DTYPE || !bias->stride[3] || stretch->pattern) return NULL;
  if (p->softcap > 0 || p->alibi.data || block->count % LANES || stretch->count % LANES) return NULL;
  return sa_at(bias, block->batch, block->head, block->query, stretch->first);
}

// Makes what the bias hides of a square -inf, and unsets its bits in the keys' words.
static __attribute__((noinline)) void NAME(hide)(const REAL *rows, int64_t row, int shift, REAL *scores,
                                                 uint64_t *visible) {
  const NAME(vector) nothing = NAME(set)(-(REAL)INFINITY);
  NAME(vector) column[LANES];
  NAME(columns_of)(rows, row, column);
  for (int i = 0; i < LANES; i++) {
    REAL *at = scores + i * NAME(ROW);
    const uint64_t hidden = NAME(below_or_equal)(column[i], nothing);
    NAME(store)(at, NAME(select)(hidden, nothing, NAME(load)(at)));
    visible[i] &= ~(hidden << shift);
  }
}

// S^T += bias^T, square by square, what it hides -inf; `peak` (may be NULL) is raised to the largest of each query.
// Returns whether it hides something: `visible` then has the words of what it does not.
static bool NAME(add_bias)(const NAME(block) * block, int keys, const REAL *rows, int64_t row, REAL *scores,
                           uint64_t *visible, REAL *peak) {
  const NAME(vector) nothing = NAME(set)(-(REAL)INFINITY);
  bool hides = false;
  for (int first = 0; first < block->count; first += LANES, rows += LANES * row) {
    NAME(vector) top = nothing;
    if (peak) top = NAME(load)(peak + first);
    for (int r = 0; r < keys; r += LANES) {
      NAME(vector) column[LANES];
      REAL *square = scores + r * NAME(ROW) + first;
      uint64_t hidden = 0;
      NAME(columns_of)(rows + r, row, column);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        hidden |= NAME(below_or_equal)(column[i], nothing);
        column[i] = NAME(load)(square + i * NAME(ROW)) + column[i];
        NAME(store)(square + i * NAME(ROW), column[i]);
      }
      if (hidden) {
        for (int i = 0; !hides && i < keys; i++) visible[i] = ~UINT64_C(0);
        hides = true;
        NAME(hide)(rows + r, row, first, square, visible + r);
        for (int i = 0; i < LANES; i++) column[i] = NAME(load)(square + i * NAME(ROW));
      }
      if (!peak) continue;
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) top = NAME(max)(column[i], top);
    }
    if (peak) NAME(store)(peak + first, top);
  }
  return hides;
}

// Raises `peak` to the largest visible score of each query. Four maxima in turn, since each waits for its last.
static void NAME(raise_peak)(const NAME(block) * block, const sa_stretch *stretch, const uint64_t *visible,
                             const REAL *scores, REAL *peak) {
  for (int j = 0; j < block->vectors; j++) {
    const REAL *column = scores + j * LANES;
    const NAME(vector) old = NAME(load)(peak + j * LANES);
    NAME(vector) top[4] = {old, old, old, old};
    const sa_extent reach = NAME(reach)(stretch, j);
    int r = reach.first;
    for (; r + 4 <= reach.end; r += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        top[k] = NAME(max_where)(visible[r + k] >> (j * LANES), NAME(load)(column + (r + k) * NAME(ROW)), top[k]);
      }
    }
    for (; r < reach.end; r++) {
      top[0] = NAME(max_where)(visible[r] >> (j * LANES), NAME(load)(column + r * NAME(ROW)), top[0]);
    }
    NAME(store)(peak + j * LANES, NAME(max)(NAME(max)(top[0], top[1]), NAME(max)(top[2], top[3])));
  }
}

// S^T of a stretch whose outline is drawn into room->scores, in the block's unit; what masked pairs have may be
// anything. `peak` (NULL: nobody asks) is raised to the largest visible score of each query. Returns the words of
// visible pairs, or NULL when every pair is visible.
static const uint64_t *NAME(score)(const NAME(block) * block, const sa_stretch *stretch, const NAME(element) * key,
                                   int64_t key_stride, const NAME(element) * packed_query,
                                   const NAME(stretch_room) * room, REAL *peak) {
  const sa_problem *p = block->p;
  const REAL *plain_bias = NAME(plain_bias)(block, stretch);
  const bool hides = p->bias.data && !plain_bias && NAME(load_bias)(block, stretch, room->bias);
  const bool masked = stretch->pattern || hides, final = !masked && block->plain && !block->few;
  NAME(score_product)(block, stretch, key, key_stride, packed_query, room->scores, final ? peak : NULL);
  if (final) return NULL;
  if (plain_bias) {
    const bool some =
        NAME(add_bias)(block, stretch->count, plain_bias, p->bias.stride[2], room->scores, room->visible, peak);
    return some ? room->visible : NULL;
  }
  for (int r = 0; hides && !stretch->pattern && r < stretch->count; r++) room->visible[r] = ~UINT64_C(0);
  if (block->plain && masked) {
    if (peak) NAME(raise_peak)(block, stretch, room->visible, room->scores, peak);
    return room->visible;
  }
  if (block->plain && !peak) return NULL;
  const NAME(vector) nothing = NAME(set)(-(REAL)INFINITY);
  const NAME(vector) cap = NAME(set)((REAL)p->softcap), slope = NAME(set)(block->slope);
  REAL lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = (REAL)i;
  for (int j = 0; j < block->vectors; j++) {
    NAME(vector) top = peak ? NAME(load)(peak + j * LANES) : nothing;
    // Counted from the block's first query, so that distances stay exact however long the sequence.
    const NAME(vector) offset = NAME(load)(lanes) + NAME(set)((REAL)(j * LANES));
    const int64_t origin = block->query + p->diagonal;
    REAL *column = room->scores + j * LANES;
    for (int r = 0; r < stretch->count; r++, column += NAME(ROW)) {
      NAME(vector) s = NAME(load)(column);
      if (!block->plain) {
        if (p->softcap > 0) {
          const NAME(vector) bounded = NAME(tanh)(s / cap);
          if (room->capped) NAME(store)(room->capped + r * NAME(ROW) + j * LANES, bounded);
          s = bounded * cap;
        }
        if (p->bias.data) {
          const NAME(vector) b = NAME(load)(room->bias + r * NAME(ROW) + j * LANES);
          if (hides) room->visible[r] &= ~(NAME(below_or_equal)(b, nothing) << (j * LANES));
          s = s + b;
        }
        if (p->alibi.data) s = s - slope * NAME(magnitude)(NAME(set)((REAL)(stretch->first + r - origin)) - offset);
      }
      if (masked) s = NAME(select)(room->visible[r] >> (j * LANES), s, nothing);
      // A NaN never becomes the peak (max keeps its second operand); it makes its row NaN through the sum.
      top = NAME(max)(s, top);
      NAME(store)(column, s);
    }
    if (peak) NAME(store)(peak + j * LANES, top);
  }
  return masked ? room->visible : NULL;
}

// The linear index in [B,H,L,S] of a stretch's first pair.
static uint64_t NAME(first_pair)(const NAME(block) * block, const sa_stretch *stretch) {
  const sa_problem *p = block->p;
  const uint64_t row = (uint64_t)((block->batch * p->heads + block->head) * p->queries + block->query);
  return row * (uint64_t)p->keys + (uint64_t)stretch->first;
}

// The words of the pairs that dropout keeps, one word of queries per key; NULL when it keeps all.
static const uint64_t *NAME(keep)(const NAME(block) * block, const sa_stretch *stretch,
                                  const NAME(stretch_room) * room) {
  const sa_problem *p = block->p;
  if (!(p->dropout > 0)) return NULL;
  sa_kept_words(p->seed, sa_dropout_threshold(p->dropout), NAME(first_pair)(block, stretch), (uint64_t)p->keys,
                block->count, stretch->count, room->kept);
  return room->kept;
}

// P^T in place of S^T: exp2((s - base) * unit) * factor per row (factor NULL: 1), masked pairs 0. Rows without a key
// have a base of +inf.
static void NAME(weigh)(const NAME(block) * block, int keys, const uint64_t *visible, const REAL *base,
                        const REAL *factor, REAL *scores) {
  const NAME(vector) unit = NAME(set)(block->unit), zero = NAME(set)(0);
  for (int j = 0; j < block->vectors; j++) {
    const NAME(vector) from = NAME(load)(base + j * LANES);
    const NAME(vector) times = factor ? NAME(load)(factor + j * LANES) : NAME(set)(1);
    REAL *column = scores + j * LANES;
    for (int r = 0; r < keys; r++, column += NAME(ROW)) {
      NAME(vector) x = NAME(load)(column) - from;
      if (!block->plain) x = x * unit;
      NAME(vector) w = NAME(exp2)(x);
      if (factor) w = w * times;
      NAME(store)(column, visible ? NAME(select)(visible[r] >> (j * LANES), w, zero) : w);
    }
  }
}

static NAME(stretch_room) NAME(take_stretch)(sa_room *room, const sa_problem *p, int keys, bool backward) {
  NAME(stretch_room) stretch = {.scores = NAME(take)(room, keys * NAME(ROW))};
  if (p->bias.data) stretch.bias = NAME(take)(room, keys * NAME(ROW));
  if (backward && p->softcap > 0) stretch.capped = NAME(take)(room, keys * NAME(ROW));
  stretch.visible = sa_room_take(room, keys * (int64_t)sizeof(uint64_t));
  if (backward) stretch.kept = sa_room_take(room, keys * (int64_t)sizeof(uint64_t));
  stretch.outline = sa_room_take(room, sizeof *stretch.outline);
  return stretch;
}
