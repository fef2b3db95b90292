// what a block has gathered becomes output, LSE and weights, for one REAL; part of flash_forward.h

// Joins what two parts of the keys gathered.
static void NAME(join)(const NAME(block) * block, NAME(gathered) * into, const NAME(gathered) * from) {
  const int width = (int)block->p->value_width;
  const int64_t padded = NAME(padded)(width);
  for (int i = 0; i < block->count; i++) {
    if (!(from->alive >> i & 1)) continue;
    REAL *o = into->o + i * padded;
    const REAL *other = from->o + i * padded;
    if (!(into->alive >> i & 1)) {
      memcpy(o, other, sizeof *o * width);
      into->peak[i] = from->peak[i];
      into->sum[i] = from->sum[i];
      continue;
    }
    const REAL top = from->peak[i] > into->peak[i] ? from->peak[i] : into->peak[i];
    const REAL base = top == -(REAL)INFINITY ? 0 : top;
    const double unit = block->plain ? 1 : 1.4426950408889634;
    const REAL a = (REAL)exp2((double)(into->peak[i] - base) * unit);
    const REAL b = (REAL)exp2((double)(from->peak[i] - base) * unit);
    for (int d = 0; d < width; d++) o[d] = o[d] * a + other[d] * b;
    into->sum[i] = into->sum[i] * a + from->sum[i] * b;
    into->peak[i] = top;
  }
  into->alive |= from->alive;
}

// How a row's scores become weights: exp2((s - base) * unit) * factor. The LSE alone would do for ordinary rows, but a
// bias of -1e30 leaves no room in it for the logarithm of the sum.
typedef struct NAME(row_scale) {
  double base, factor;  // base in the block's unit
  double lse;           // natural
  double sink;          // the sink's own weight
} NAME(row_scale);

// The sink of row i's head; -inf when there is none.
static REAL NAME(sink_of)(const NAME(block) * block, int i) {
  const sa_operand *sinks = &block->p->sinks;
  REAL sink = -(REAL)INFINITY;
  if (sinks->data) NAME(read_row)(sa_at(sinks, 0, block->head + i / block->each, 0, 0), sinks->dtype, 1, &sink);
  return sink;
}

static NAME(row_scale) NAME(scale_row)(const NAME(block) * block, int i, double peak, double sum) {
  const sa_problem *p = block->p;
  // In natural units, in which a sink near the dtype's largest number does not overflow.
  const double natural = block->plain ? 0.6931471805599453 : 1;
  double top = peak * natural, own = 0;
  if (p->sinks.data) {
    const REAL sink = NAME(sink_of)(block, i);
    if (sink > top || sink != sink) top = sink;
    own = exp(sink - top);
    sum = sum * exp(peak * natural - top) + own;
  }
  // Visible scores that are all -inf leave a sum of 0: 0/0 is the NaN that the definition gives.
  if (!(sum > 0)) return (NAME(row_scale)){NAN, NAN, NAN, NAN};
  return (NAME(row_scale)){top == peak * natural ? peak : top / natural, 1 / sum, top + log(sum), own / sum};
}

// What o and the LSE of a block's live rows are made with: o's factor, and in gathered->peak and sum each row's base
// and factor. Without sinks the rows' constants are vectors: one by one they took a tenth of short documents' time.
static void NAME(scale_rows)(const NAME(block) * block, NAME(gathered) * gathered, REAL *scale, REAL *lse) {
  const sa_problem *p = block->p;
  const double kept = 1 / (1 - p->dropout), natural = block->plain ? 0.6931471805599453 : 1;
  if (!p->sinks.data) {
    // Copies, of which the compiler knows that nothing else is stored there: else it makes no vectors.
    REAL peak[QUERIES], sum[QUERIES];
    memcpy(peak, gathered->peak, sizeof peak);
    memcpy(sum, gathered->sum, sizeof sum);
    for (int i = 0; i < QUERIES; i++) {
      const REAL own = sum[i];
      // A sum of 0 of scores that are all -inf: the definition gives 0/0.
      const double factor = own > 0 ? 1 / (double)own : NAN;
      lse[i] = own > 0 ? (REAL)(peak[i] * natural + LOG(own)) : (REAL)NAN;
      scale[i] = (REAL)(factor * kept);
      sum[i] = (REAL)factor;
    }
    memcpy(gathered->sum, sum, sizeof sum);
    return;
  }
  for (int i = 0; i < block->count; i++) {
    const double peak = gathered->peak[i];
    const NAME(row_scale) row = NAME(scale_row)(block, i, peak, gathered->sum[i]);
    // What was gathered is relative to the row's own peak; a larger sink takes it down.
    const double down = row.base == peak ? 1 : exp((peak - row.base) * natural);
    scale[i] = (REAL)(row.factor * down * kept);
    lse[i] = (REAL)row.lse;
    gathered->peak[i] = (REAL)row.base;
    gathered->sum[i] = (REAL)row.factor;
  }
}

// Writes the rows of one head of a block, from row `first` on. Where they lie is found once for all of them: for each
// by itself it took as long as to write it.
static void NAME(write_out)(const NAME(block) * block, const NAME(gathered) * gathered, int first, const REAL *scale) {
  const sa_operand *out = &block->p->out;
  const int width = (int)block->p->value_width;
  const int64_t padded = NAME(padded)(width), row = out->stride[2] * sa_size_of(out->dtype);
  const bool in_place = out->dtype == DTYPE;
  REAL converted[SA_FUSED_WIDTH];
  const REAL *o = gathered->o + first * padded;
  char *at = NAME(row_at)(out, block, first);
  for (int i = first; i < first + block->each; i++, o += padded, at += row) {
    REAL *const to = in_place ? (REAL *)at : converted;
    if (gathered->alive >> i & 1) {
      const NAME(vector) factor = NAME(set)(scale[i]);
      int d = 0;
      for (; d + LANES <= width; d += LANES) NAME(store)(to + d, NAME(load)(o + d) * factor);
      for (; d < width; d++) to[d] = o[d] * scale[i];
    } else {
      memset(to, 0, sizeof *to * width);
    }
    if (!in_place) NAME(write_row)(at, out->dtype, width, to);
  }
}

// Writes out, LSE and dead rows of a block; leaves in gathered->peak and sum each row's base and factor. `passage`:
// whose block it is, in `room`; NULL: o is closed.
static void NAME(finish)(const NAME(block) * block, NAME(gathered) * gathered, NAME(passage) * passage,
                         const NAME(forward_room) * room) {
  const sa_problem *p = block->p;
  const uint64_t own = block->count < QUERIES ? (UINT64_C(1) << block->count) - 1 : ~UINT64_C(0);
  REAL scale[QUERIES], lse[QUERIES];
  NAME(scale_rows)(block, gathered, scale, lse);
  for (uint64_t dead = own & ~gathered->alive; dead; dead &= dead - 1) {
    const int i = __builtin_ctzll(dead);
    lse[i] = NAME(sink_of)(block, i);
    gathered->peak[i] = (REAL)INFINITY;
    gathered->sum[i] = 0;
  }
  const bool written = passage && !passage->closed && NAME(write_sums)(block, gathered, scale);
  if (passage && !passage->closed && !written) NAME(arrive)(passage, room);
  for (int first = 0; first < block->count; first += block->each) {
    if (!written) NAME(write_out)(block, gathered, first, scale);
    REAL *to_lse = p->lse.data ? NAME(row_at)(&p->lse, block, first) : NULL;
    bool *to_dead = p->dead.data ? NAME(row_at)(&p->dead, block, first) : NULL;
    for (int i = 0; to_lse && i < block->each; i++) to_lse[i * p->lse.stride[2]] = lse[first + i];
    for (int i = 0; to_dead && i < block->each; i++) {
      to_dead[i * p->dead.stride[2]] = !(gathered->alive >> (first + i) & 1);
    }
  }
}

// The weights p_ij of a finished block: the scores again, against what the whole row came to.
static void NAME(write_weights)(const NAME(block) * block, const NAME(element) * query, const NAME(forward_room) * room,
                                const NAME(gathered) * gathered) {
  const sa_problem *p = block->p;
  REAL row[KEYS] = {0};
  for (int i = 0; i < block->count; i++) {
    for (int64_t key = 0; key < p->keys; key += KEYS) {
      const int count = p->keys - key < KEYS ? (int)(p->keys - key) : KEYS;
      NAME(write_row)
      (sa_at(&p->weights, block->batch, block->head, block->query + i, key), p->weights.dtype, count, row);
    }
  }
  sa_walk walk = sa_walk_start(p->plan, block->plane, block->query, block->each, 0, p->plan->col_tiles, STRETCH);
  for (sa_stretch stretch; sa_walk_next(&walk, &stretch);) {
    int64_t stride;
    const NAME(element) *key = NAME(key_rows)(block, stretch.first, stretch.count, room->products.rows, &stride);
    stretch.outline = NAME(outline)(block, &stretch, &room->stretch);
    const uint64_t *visible = NAME(score)(block, &stretch, key, stride, query, &room->stretch, NULL);
    NAME(weigh)(block, stretch.count, visible, gathered->peak, gathered->sum, room->stretch.scores);
    for (int i = 0; i < block->count; i++) {
      for (int r = 0; r < stretch.count; r++) row[r] = room->stretch.scores[r * NAME(ROW) + i];
      NAME(write_row)
      (sa_at(&p->weights, block->batch, block->head, block->query + i, stretch.first), p->weights.dtype, stretch.count,
       row);
    }
  }
}
