// a block of queries on its way along its keys, for one REAL; part of flash_forward.h

typedef struct NAME(forward_room) {
  NAME(forward_products) products;
  REAL *leaked;  // [QUERIES][value width, padded]
  REAL *factor;  // [QUERIES]
  REAL *peak;    // [QUERIES]: with the stretch in hand
  NAME(stretch_room) stretch;
  NAME(element) * query[GROUP];  // as pack_query does
  NAME(gathered) own[GROUP];
} NAME(forward_room);

// A block on its way along its keys. `careful` is the path for blocks that came out non-finite: the same products in
// the same order, with V's non-finite elements 0, and then these given to the rows that see them; so a row that sees
// none gets the very bits that any finite V would have given.
typedef struct NAME(passage) {
  const NAME(block) * block;
  NAME(element) * query;
  NAME(gathered) * gathered;
  sa_walk walk;
  sa_stretch next;             // when there is `more`
  const NAME(block) * after;   // whose queries are wanted next; may be NULL
  const NAME(block) * beyond;  // of the last passage: what the worker will have next; may be NULL
  bool more, careful, started;
  bool leaks;   // a non-finite value can have leaked
  bool closed;  // o is rows of queries, with all that they see
} NAME(passage);

// The stretch that was looked at last, its rows of K, and the keys that were called for or looked at lately.
typedef struct NAME(held_keys) {
  sa_stretch stretch;
  const NAME(element) * key;
  int64_t stride;
  sa_extent lately[32];
  int looks;
} NAME(held_keys);

// P^T in place of S^T, with the running peak, sum and the factor that the old peak costs. Masked pairs (`visible` NULL:
// there are none) give 0, whatever their scores.
static inline __attribute__((always_inline)) void NAME(soften_so)(const NAME(block) * block, const sa_stretch *stretch,
                                                                  REAL *scores, const REAL *peak,
                                                                  NAME(gathered) * gathered, REAL *factor, bool plain,
                                                                  const uint64_t *visible) {
  const NAME(vector) unit = NAME(set)(block->unit), lowest = NAME(set)(-(REAL)INFINITY);
  for (int j = 0; j < block->vectors; j++) {
    const NAME(vector) old = NAME(load)(gathered->peak + j * LANES);
    const NAME(vector) top = NAME(load)(peak + j * LANES);
    // A row that has seen nothing yet, or nothing but -inf, must not compute -inf - -inf.
    const NAME(vector) base = NAME(select)(NAME(below_or_equal)(top, lowest), NAME(set)(0), top);
    const NAME(vector) decay = NAME(exp2)((old - base) * unit);
    NAME(vector) sum[4] = {NAME(set)(0), NAME(set)(0), NAME(set)(0), NAME(set)(0)};
    REAL *column = scores + j * LANES;
    const sa_extent reach = NAME(reach)(stretch, j);
    int r = reach.first;
    for (; r + 4 <= reach.end; r += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        NAME(vector) x = NAME(load)(column + (r + k) * NAME(ROW)) - base;
        if (!plain) x = x * unit;
        const NAME(vector) w = visible ? NAME(exp2_where)(visible[r + k] >> (j * LANES), x) : NAME(exp2)(x);
        NAME(store)(column + (r + k) * NAME(ROW), w);
        sum[k] = sum[k] + w;
      }
    }
    for (; r < reach.end; r++) {
      const NAME(vector) x = (NAME(load)(column + r * NAME(ROW)) - base) * unit;
      const NAME(vector) w = visible ? NAME(exp2_where)(visible[r] >> (j * LANES), x) : NAME(exp2)(x);
      NAME(store)(column + r * NAME(ROW), w);
      sum[0] = sum[0] + w;
    }
    const NAME(vector) total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    NAME(store)(gathered->sum + j * LANES, NAME(fma)(NAME(load)(gathered->sum + j * LANES), decay, total));
    NAME(store)(gathered->peak + j * LANES, top);
    NAME(store)(factor + j * LANES, decay);
  }
}

// A loop for each of its uses, so that none asks what it is for at every vector.
static void NAME(soften)(const NAME(block) * block, const sa_stretch *stretch, REAL *scores, const REAL *peak,
                         NAME(gathered) * gathered, REAL *factor, const uint64_t *visible) {
  if (block->plain && !visible)
    NAME(soften_so)(block, stretch, scores, peak, gathered, factor, true, NULL);
  else if (block->plain)
    NAME(soften_so)(block, stretch, scores, peak, gathered, factor, true, visible);
  else if (!visible)
    NAME(soften_so)(block, stretch, scores, peak, gathered, factor, false, NULL);
  else
    NAME(soften_so)(block, stretch, scores, peak, gathered, factor, false, visible);
}

static inline void NAME(zero_dropped)(void *weights, int key, int query, uint64_t dropped) {
  REAL *at = (REAL *)weights + key * NAME(ROW) + query;
  for (int i = 0; i < WIDE_QUERIES; i += LANES) {
    NAME(store)(at + i, NAME(select)(~dropped >> i, NAME(load)(at + i), NAME(set)(0)));
  }
}

// Makes 0 of the weights that dropout drops, whatever they were, NaN too; they have counted in the sum. Beside Philox,
// which leaves memory idle, this costs less than while weights are made: 1 % of the forward.
static void NAME(drop)(const NAME(block) * block, const sa_stretch *stretch, REAL *weights) {
  const sa_problem *p = block->p;
  if (!(p->dropout > 0)) return;
  sa_draw(p->seed, sa_dropout_threshold(p->dropout), NAME(first_pair)(block, stretch), (uint64_t)p->keys, block->count,
          stretch->count, NAME(zero_dropped), weights);
}

static NAME(passage) NAME(set_out)(const NAME(block) * block, int64_t tile_first, int64_t tile_end, bool careful) {
  NAME(passage)
  passage = {
      .block = block,
      .walk = sa_walk_start(block->p->plan, block->plane, block->query, block->each, tile_first, tile_end,
                            NAME(longest_stretch)(block->p)),
      .careful = careful,
  };
  passage.more = sa_walk_next(&passage.walk, &passage.next);
  return passage;
}

// Gives a passage room for its packed queries and for what it gathers.
static void NAME(begin)(NAME(passage) * passage, NAME(element) * query, NAME(gathered) * gathered,
                        const NAME(forward_room) * room) {
  NAME(pack_query)(passage->block, 0, query);
  passage->query = query;
  passage->gathered = gathered;
  gathered->alive = 0;
  for (int i = 0; i < QUERIES; i++) {
    gathered->peak[i] = -(REAL)INFINITY;
    gathered->sum[i] = 0;
  }
  const int64_t sums = QUERIES * NAME(padded)(passage->block->p->value_width);
  if (passage->careful) memset(room->leaked, 0, sizeof *room->leaked * sums);
}

static void NAME(foresee)(sa_forecast *forecast, const sa_operand *x, const void *first, int64_t width, int64_t rows) {
  const int64_t size = sa_size_of(x->dtype);
  sa_forecast_add(forecast, first, x->stride[2] * size, width * size, rows);
}

static void NAME(foresee_keys)(sa_forecast *forecast, const NAME(block) * block, int64_t first, int64_t count) {
  const sa_problem *p = block->p;
  if (count > p->keys - first) count = p->keys - first;
  NAME(foresee)(forecast, &p->k, sa_at(&p->k, block->batch, block->key_head, first, 0), p->width, count);
  NAME(foresee_values)(forecast, block, first, count);
}

// The part of the bias that a block reads with keys [first, first + count). Its rows are pages apart, too far for the
// hardware to foresee.
static void NAME(foresee_bias)(sa_forecast *forecast, const NAME(block) * block, int64_t first, int64_t count) {
  const sa_problem *p = block->p;
  const sa_operand *bias = &p->bias;
  if (!bias->data || !bias->stride[3]) return;
  if (count > p->keys - first) count = p->keys - first;
  const void *rows = sa_at(bias, block->batch, block->head, block->query, first);
  NAME(foresee)(forecast, bias, rows, count, bias->stride[2] ? block->count : 1);
}

// Whether keys were called for or looked at lately; they will have been now.
static bool NAME(lately)(NAME(held_keys) * held, const sa_stretch *stretch) {
  enum { KEPT = sizeof held->lately / sizeof *held->lately };
  const int64_t first = stretch->first / SEGMENT, end = (stretch->first + stretch->count + SEGMENT - 1) / SEGMENT;
  for (int i = 0; i < KEPT; i++) {
    if (held->lately[i].first <= first && end <= held->lately[i].end) return true;
  }
  held->lately[held->looks++ % KEPT] = (sa_extent){(int)first, (int)end};
  return false;
}

// A block's queries and the keys that it begins with.
static void NAME(foresee_start)(sa_forecast *forecast, const NAME(block) * block) {
  const sa_problem *p = block->p;
  NAME(foresee)(forecast, &p->q, NAME(row_at)(&p->q, block, 0), p->width, block->each);
  sa_walk walk = sa_walk_start(p->plan, block->plane, block->query, block->each, 0, p->plan->col_tiles, STRETCH);
  sa_stretch stretch;
  if (sa_walk_next(&walk, &stretch)) NAME(foresee_keys)(forecast, block, stretch.first, stretch.count);
}

// What will be wanted while a passage's stretch is at work and after it: the next stretch's keys and bias of the
// passage that `takes_over` (may be NULL; the same that goes on). Without a forecast each of these rows is a wait for
// the third cache: a tenth of the time, when sequences or documents are short.
static void NAME(foresee_all)(sa_forecast *forecast, const NAME(passage) * passage, NAME(held_keys) * held,
                              const sa_stretch *stretch, const NAME(passage) * takes_over) {
  const NAME(block) *block = passage->block, *after = passage->after;
  const sa_problem *p = block->p;
  NAME(lately)(held, stretch);
  const sa_stretch *coming = takes_over && takes_over->more ? &takes_over->next : NULL;
  const bool calls = coming && !NAME(lately)(held, coming);
  const NAME(block) *beyond = coming ? NULL : passage->beyond;
  const bool first = !passage->started, last = !passage->more;
  if (!first && !last && !calls && !beyond && !(coming && p->bias.data)) return;
  const sa_forecast before = *forecast;
  *forecast = (sa_forecast){0};
  if (coming) NAME(foresee_bias)(forecast, takes_over->block, coming->first, coming->count);
  if (calls) NAME(foresee_keys)(forecast, block, coming->first, coming->count);
  if (first && after) NAME(foresee)(forecast, &p->q, NAME(row_at)(&p->q, after, 0), p->width, after->each);
  // Not earlier: the keys of a long head would drive them out of the second cache; to end a block took twice as long.
  if (last) NAME(foresee)(forecast, &p->out, NAME(row_at)(&p->out, block, 0), p->value_width, block->each);
  if (beyond) NAME(foresee_start)(forecast, beyond);
  sa_forecast_append(forecast, &before, 0);
}

// The next stretch of keys, and how many times STRETCH it is; the `last` of the passage's turn, after which, or when it
// has no more, the `other` (may be NULL) takes over.
static int NAME(advance)(NAME(passage) * passage, const NAME(passage) * other, bool last, NAME(held_keys) * held,
                         sa_forecast *forecast, const NAME(forward_room) * room) {
  const NAME(block) *block = passage->block;
  NAME(gathered) *gathered = passage->gathered;
  sa_stretch stretch = passage->next;
  passage->more = sa_walk_next(&passage->walk, &passage->next);
  stretch.again = stretch.first == held->stretch.first && stretch.count == held->stretch.count;
  if (!stretch.again) {
    held->stretch = stretch;
    held->key = NAME(key_rows)(block, stretch.first, stretch.count, room->products.rows, &held->stride);
  }
  const int share = (stretch.count + STRETCH - 1) / STRETCH;
  if (forecast && !block->few) {
    if (!last && passage->more) other = passage;
    NAME(foresee_all)(forecast, passage, held, &stretch, other);
    stretch.forecast = forecast;
  }
  if (NAME(pass_whole)(block, &stretch, held->key, held->stride, passage->query, &room->products, room->stretch.scores,
                       room->factor, passage->started, gathered, passage->careful ? room->leaked : NULL)) {
    passage->leaks |= NAME(WHOLE_LEAKS);
    passage->started = true;
    return share;
  }
  stretch.outline = NAME(outline)(block, &stretch, &room->stretch);
  memcpy(room->peak, gathered->peak, sizeof *room->peak * block->vectors * LANES);
  const uint64_t *visible =
      NAME(score)(block, &stretch, held->key, held->stride, passage->query, &room->stretch, room->peak);
  if (visible) {
    for (int r = 0; r < stretch.count; r++) gathered->alive |= visible[r];
  } else {
    gathered->alive = ~UINT64_C(0);
  }
  REAL *weights = room->stretch.scores;
  NAME(soften)(block, &stretch, weights, room->peak, gathered, room->factor, visible);
  NAME(drop)(block, &stretch, weights);
  passage->leaks |= NAME(add_values)(block, &stretch, visible, weights, passage->started ? room->factor : NULL,
                                     &room->products, gathered->o, passage->careful ? room->leaked : NULL);
  passage->started = true;
  return share;
}

static void NAME(arrive)(NAME(passage) * passage, const NAME(forward_room) * room) {
  const NAME(block) *block = passage->block;
  const int64_t padded = NAME(padded)(block->p->value_width);
  REAL *o = passage->gathered->o;
  if (passage->started)
    NAME(close_values)(block, &room->products, o);
  else
    memset(o, 0, sizeof(REAL) * block->count * padded);
  for (int64_t d = 0; passage->careful && d < block->count * padded; d++) o[d] += room->leaked[d];
  passage->closed = true;
}

// Whether what came out not finite can have leaked to rows that do not see it. Where a key is NaN that none of a
// block's masked stretches holds, the rows have what they see: under a causal mask that is all blocks but one, and to
// do them again cost as much as the rest.
static bool NAME(has_leaked)(const NAME(block) * block, int64_t tile_first, int64_t tile_end) {
  sa_walk walk = sa_walk_start(block->p->plan, block->plane, block->query, block->each, tile_first, tile_end, STRETCH);
  for (sa_stretch stretch; sa_walk_next(&walk, &stretch);) {
    if (NAME(can_leak)(block, &stretch)) return true;
  }
  return false;
}

// A block that has seen all its keys: what it gathered, which may not be closed yet, is finite, or not finite by what
// its rows see.
static void NAME(end_passage)(NAME(passage) * passage, int64_t tile_first, int64_t tile_end, NAME(held_keys) * held,
                              const NAME(forward_room) * room) {
  const NAME(block) *block = passage->block;
  if (!passage->started) NAME(arrive)(passage, room);
  if (!passage->leaks || !NAME(sums_nonfinite)(block, passage->gathered->o)) return;
  if (!NAME(has_leaked)(block, tile_first, tile_end)) return;
  const NAME(passage) before = *passage;
  *passage = NAME(set_out)(block, tile_first, tile_end, true);
  NAME(begin)(passage, before.query, before.gathered, room);
  while (passage->more) NAME(advance)(passage, NULL, false, held, NULL, room);
  NAME(arrive)(passage, room);
}
