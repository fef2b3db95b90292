// what the backward pass knows of a block of queries before it meets keys; part of flash_backward.h

// The rows of a block's Q or dO, for the products that sum over queries.
typedef struct NAME(query_rows) {
  const sa_operand *operand;
  int width;
  const REAL *rows;  // finite, dead rows 0, whole vectors
  int64_t stride;
  bool wild;  // something in the operand is not finite
} NAME(query_rows);

// Bits of the rows that see no key, and of those that the block does not have.
static uint64_t NAME(dead_rows)(const NAME(block) * block) {
  const sa_problem *p = block->p;
  const uint64_t absent = block->count < QUERIES ? ~UINT64_C(0) << block->count : 0;
  if (!p->bias.data) return absent | sa_plan_dead_rows_at(p->plan, block->plane, block->query);
  uint64_t dead = absent;
  for (int i = 0; i < block->count; i++) {
    const bool *row = sa_at(&p->dead, block->batch, block->head, block->query + i, 0);
    dead |= (uint64_t)*row << i;
  }
  return dead;
}

// Peaks and sums of a block's rows, as the forward found them.
static void NAME(gather_again)(const NAME(backward_job) * job, const NAME(block) * block,
                               const NAME(backward_room) * room) {
  const sa_problem *p = block->p;
  NAME(pack_query)(block, 0, room->packed_query);
  NAME(gathered) again = room->again;
  for (int i = 0; i < QUERIES; i++) {
    again.peak[i] = -(REAL)INFINITY;
    again.sum[i] = 0;
  }
  sa_walk walk = sa_walk_start(p->plan, block->plane, block->query, block->count, 0, p->plan->col_tiles, job->stretch);
  for (sa_stretch stretch; sa_walk_next(&walk, &stretch);) {
    int64_t stride;
    const NAME(element) *key = NAME(key_rows)(block, stretch.first, stretch.count, room->products.key_rows, &stride);
    memcpy(room->factor, again.peak, sizeof *room->factor * block->vectors * LANES);
    stretch.outline = NAME(outline)(block, &stretch, &room->stretch);
    const uint64_t *visible =
        NAME(score)(block, &stretch, key, stride, room->packed_query, &room->stretch, room->factor);
    NAME(soften)(block, &stretch, room->stretch.scores, room->factor, &again, room->delta, visible);
  }
}

// dO . o of a block's rows. What a row without a key gives is nobody's.
static void NAME(output_dots)(const NAME(block) * block, REAL *to) {
  const sa_problem *p = block->p;
  const int width = (int)p->value_width;
  REAL out_room[SA_FUSED_WIDTH], dout_room[SA_FUSED_WIDTH];
  for (int first = 0; first < block->count; first += LANES) {
    NAME(vector) sum[LANES];
    REAL rest[LANES] = {0}, lanes[LANES];
    const int rows = block->count - first < LANES ? block->count - first : LANES;
    for (int i = 0; i < LANES; i++) sum[i] = NAME(set)(0);
    for (int i = 0; i < rows; i++) {
      const REAL *x = NAME(row_of)(NAME(row_at)(&p->out, block, first + i), p->out.dtype, width, out_room);
      const REAL *y = NAME(row_of)(NAME(row_at)(&p->dout, block, first + i), p->dout.dtype, width, dout_room);
      int d = 0;
      for (; d + LANES <= width; d += LANES) sum[i] = NAME(fma)(NAME(load)(x + d), NAME(load)(y + d), sum[i]);
      for (; d < width; d++) rest[i] += x[d] * y[d];
    }
    NAME(store)(lanes, NAME(sums_of)(sum));
    for (int i = 0; i < rows; i++) to[first + i] = lanes[i] + rest[i];
  }
}

// Whether the rows' factors are those of dO and delta, so that no weight needs one: where dO is read in the precision
// of the work.
static bool NAME(weighs_dout)(const sa_problem *p) {
  return p->dtype == DTYPE;
}

// How scores become weights by LSEs, which are [count] in base and become what scores are relative to; factor [count].
// A score less its LSE is rounded, and by the more the smaller the weight is; so scores are relative to a whole number,
// mostly 0, where the rest can be the row's factor: one of at most 1, so that dO times it has room. Loops of what
// vectors can do: by libm's exp2, one by one, the factors took 1 to 2 % of a backward of 128 keys.
static void NAME(scale_by_lse)(const NAME(block) * block, double *base, double *factor) {
  static const double terms[] = {EXP2_TERMS_f64};
  const double unit = block->plain ? 1.4426950408889634 : 1, binary = block->plain ? 1 : 1.4426950408889634;
  const bool whole = NAME(weighs_dout)(block->p);
  for (int i = 0; i < QUERIES; i++) {
    const double known = base[i] * unit, most = known < 8 ? known : 8;
    // NaN stays what it is, with a factor of 1.
    const double from = whole ? floor(known - (most > 0 ? most : 0)) : known;
    const double x = from == from ? (from - known) * binary : 0, steps = rint(x), part = x - steps;
    double power = terms[0];
    for (int k = 1; k < (int)(sizeof terms / sizeof *terms); k++) power = power * part + terms[k];
    const union {
      int64_t bits;
      double value;
    } two = {(int64_t)(int32_t)(steps + 1023) << 52};
    base[i] = from;
    factor[i] = power * two.value;
  }
}

// What a block's scores are relative to, delta, and the sinks' share of the gradient, p_sink (dLSE - dO . o).
static void NAME(prepare_block)(const NAME(backward_job) * job, const NAME(block) * block,
                                const NAME(backward_room) * room) {
  const sa_problem *p = job->p;
  const int64_t head = block->batch * p->heads + block->head, first = head * p->queries + block->query;
  const uint64_t dead_rows = NAME(dead_rows)(block);
  const REAL *lse = sa_at(&p->lse, block->batch, block->head, block->query, 0);
  const int64_t lse_row = p->lse.stride[2];
  REAL dots[QUERIES], sink = 0;
  if (p->sinks.data) NAME(read_row)(sa_at(&p->sinks, 0, block->head, 0, 0), p->sinks.dtype, 1, &sink);
  // An LSE beyond 1024 has an error of 6e-5 in float, which the weights would inherit (and one of -3e38, the bias's
  // doing, has no digit for the number of keys): those rows, and only those, as another's may be NaN next time, get
  // peaks and sums afresh.
  uint64_t coarse = 0;
  for (int i = 0; i < block->count; i++) coarse |= (uint64_t)(fabs(lse[i * lse_row]) > 1024) << i;
  coarse &= ~dead_rows;
  if (coarse) NAME(gather_again)(job, block, room);
  double base[QUERIES] = {0}, factor[QUERIES];
  for (int i = 0; i < block->count; i++) {
    if (!((dead_rows | coarse) >> i & 1)) base[i] = lse[i * lse_row];
  }
  NAME(scale_by_lse)(block, base, factor);
  if (p->dout.data) NAME(output_dots)(block, dots);
  const double advance = NAME(scale_in_advance)(p);
  double dsink = 0;
  for (int i = 0; i < block->count; i++) {
    const bool dead = dead_rows >> i & 1;
    // A row that sees only its sink gives it all its weight.
    NAME(row_scale) scale = {INFINITY, 1, sink, 1};
    if (coarse >> i & 1) {
      scale = NAME(scale_row)(block, i, room->again.peak[i], room->again.sum[i]);
    } else if (!dead) {
      const double known = lse[i * lse_row];
      scale = (NAME(row_scale)){base[i], factor[i], known, p->sinks.data ? exp(sink - known) : 0};
    }
    job->base[first + i] = (REAL)scale.base;
    // What has no sum has no base either, and needs no factor.
    job->factor[first + i] = scale.factor == scale.factor ? (REAL)scale.factor : 1;
    double dlse = 0;
    if (p->dlse.data) dlse = *(const REAL *)sa_at(&p->dlse, block->batch, block->head, block->query + i, 0);
    const double delta = (!dead && p->dout.data ? (double)dots[i] : 0) - dlse;
    job->delta[first + i] = dead ? 0 : (REAL)(delta * advance);
    if (!p->dsinks.data || sink == -(REAL)INFINITY) continue;
    // The dO of a row that sees only its sink meets o = 0, which does not depend on the sink.
    dsink += dead ? dlse : -delta * scale.sink;
  }
  const int64_t index = (block->head * p->batch + block->batch) * job->blocks + block->query / QUERIES;
  if (p->dsinks.data) job->dsinks[index] = dsink;
}

// First pass, of blocks that several chunks look at, or none.
static void NAME(prepare)(void *argument, int64_t item, int worker) {
  const NAME(backward_job) *job = argument;
  const sa_problem *p = job->p;
  const int64_t head = item / job->blocks;
  const NAME(block) block = NAME(block_at)(p, head / p->heads, head % p->heads, item % job->blocks, 1);
  if (NAME(looks_alone)(job, &block)) return;
  const NAME(backward_room) room =
      NAME(take_backward)(&(sa_room){.memory = job->memory + worker * job->room_bytes}, job);
  NAME(prepare_block)(job, &block, &room);
}

// Whether rows so far apart can be a product's right side as they lie: rows that are a power of two apart, but not next
// to each other, would fall into few sets of the first cache.
static bool NAME(apart)(int64_t stride) {
  return stride % (4 * 64 / (int64_t)sizeof(REAL)) || stride <= TILE_VECTORS * LANES;
}

// Copies rows of whole vectors, times their factors (NULL: 1). Returns whether something in them is not finite.
static bool NAME(copy_rows)(const REAL *rows, int64_t stride, int count, int width, const REAL *factors, REAL *to,
                            int64_t to_row) {
  const NAME(vector) zero = NAME(set)(0);
  NAME(vector) sum = zero;
  for (int r = 0; r < count; r++, rows += stride, to += to_row) {
    const NAME(vector) factor = NAME(set)(factors ? factors[r] : 1);
    for (int d = 0; d < width; d += LANES) {
      const NAME(vector) x = NAME(load)(rows + d) * factor;
      sum = NAME(fma)(x, zero, sum);
      NAME(store)(to + d, x);
    }
  }
  const uint64_t lanes = ((uint64_t)2 << (LANES - 1)) - 1;
  return NAME(below_or_equal)(sum, zero) != lanes;
}

// Rows of Q or dO: as they lie, when nothing has to change, else copied to `room`, times their factors (NULL: 1), dead
// rows and what is not finite 0.
static NAME(query_rows) NAME(rows_of_queries)(const sa_operand *x, const NAME(block) * block, int width, uint64_t dead,
                                              const REAL *factors, REAL *room) {
  const int64_t padded = NAME(padded)(width);
  NAME(query_rows) result = {.operand = x, .width = width, .rows = room, .stride = padded};
  const bool complete = !(dead << (QUERIES - block->count));
  if (x->data && x->dtype == DTYPE && complete && NAME(columns)(width) == width) {
    const REAL *rows = NAME(row_at)(x, block, 0);
    const bool apart = !factors && NAME(apart)(x->stride[2]);
    if (apart ? !NAME(has_nonfinite)(rows, x->stride[2], block->count, width)
              : !NAME(copy_rows)(rows, x->stride[2], block->count, width, factors, room, padded)) {
      if (!apart) return result;
      result.rows = rows;
      result.stride = x->stride[2];
      return result;
    }
  }
  for (int i = 0; i < block->count; i++, room += padded) {
    if (dead >> i & 1 || !x->data) {
      memset(room, 0, sizeof *room * padded);
      continue;
    }
    NAME(read_row)(NAME(row_at)(x, block, i), x->dtype, width, room);
    for (int d = 0; factors && d < width; d++) room[d] *= factors[i];
    for (int d = width; d < padded; d++) room[d] = 0;
  }
  REAL *own = room - block->count * padded;
  result.wild = NAME(has_nonfinite)(own, padded, block->count, width);
  if (result.wild) NAME(finite_part)(own, padded, block->count, width, own);
  return result;
}
