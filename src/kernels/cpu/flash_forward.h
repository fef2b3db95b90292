// the forward pass, for one REAL; part of flash.h
//
// Reaches 85 and 87 % of the fused multiply-add peak in f32 and 75 and 80 % in f64 (D64 and D128, one core with
// AVX-512, N 2048). Some 8 % (f64: 12 %) go to the exponentials, which share the ports of the products; the rest is the
// start and the end of register tiles. K and V of a long head do not fit into the second cache: with a pass over them
// for every block of queries D128 came to 82 %.

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
  bool leaks;  // a non-finite value can have leaked
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
  NAME(foresee)(forecast, &p->v, sa_at(&p->v, block->batch, block->key_head, first, 0), p->value_width, count);
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
  if (NAME(pass_whole)(block, &stretch, held->key, held->stride, passage->query, &room->products, room->stretch.scores,
                       room->factor, passage->started, gathered, passage->careful ? room->leaked : NULL)) {
    passage->leaks |= NAME(WHOLE_LEAKS);
    passage->started = true;
    return share;
  }
  if (forecast && !block->few) {
    if (!last && passage->more) other = passage;
    NAME(foresee_all)(forecast, passage, held, &stretch, other);
    stretch.forecast = forecast;
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

static void NAME(arrive)(const NAME(passage) * passage, const NAME(forward_room) * room) {
  const NAME(block) *block = passage->block;
  const int64_t padded = NAME(padded)(block->p->value_width);
  REAL *o = passage->gathered->o;
  if (passage->started)
    NAME(close_values)(block, &room->products, o);
  else
    memset(o, 0, sizeof(REAL) * block->count * padded);
  for (int64_t d = 0; passage->careful && d < block->count * padded; d++) o[d] += room->leaked[d];
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

// A block that has seen all its keys: what it gathered is finite, or not finite by what its rows see.
static void NAME(end_passage)(NAME(passage) * passage, int64_t tile_first, int64_t tile_end, NAME(held_keys) * held,
                              const NAME(forward_room) * room) {
  const NAME(block) *block = passage->block;
  const int width = (int)block->p->value_width;
  NAME(arrive)(passage, room);
  if (!passage->leaks || !NAME(has_nonfinite)(passage->gathered->o, NAME(padded)(width), block->count, width)) return;
  if (!NAME(has_leaked)(block, tile_first, tile_end)) return;
  const NAME(passage) before = *passage;
  *passage = NAME(set_out)(block, tile_first, tile_end, true);
  NAME(begin)(passage, before.query, before.gathered, room);
  while (passage->more) NAME(advance)(passage, NULL, false, held, NULL, room);
  NAME(arrive)(passage, room);
}

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

// Writes out, LSE and dead rows of a block; leaves in gathered->peak and sum each row's base and factor.
static void NAME(finish)(const NAME(block) * block, NAME(gathered) * gathered) {
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
  for (int first = 0; first < block->count; first += block->each) {
    NAME(write_out)(block, gathered, first, scale);
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

typedef struct NAME(forward_job) {
  const sa_problem *p;
  int64_t blocks, heads, parts, tiles_per_part;  // heads: of a block
  int64_t items, whole;      // whole: the items before this one are groups, the others single blocks
  int group, turn, workers;  // blocks of an item, which take turns, and stretches of a turn
  char *rooms;               // one per worker
  int64_t room_bytes;
  char *gathered;  // one per block and part, when the keys are split
  int64_t gathered_bytes;
} NAME(forward_job);

static NAME(gathered) NAME(take_gathered)(sa_room *room, const sa_problem *p) {
  return (NAME(gathered)){
      .o = NAME(take)(room, NAME(value_sums)(p)), .peak = NAME(take)(room, QUERIES), .sum = NAME(take)(room, QUERIES)};
}

static NAME(forward_room) NAME(take_forward)(sa_room *room, const sa_problem *p, int group) {
  NAME(forward_room)
  taken = {
      .products = NAME(take_forward_products)(room, p),
      .leaked = NAME(take)(room, QUERIES * NAME(padded)(p->value_width)),
      .factor = NAME(take)(room, QUERIES),
      .peak = NAME(take)(room, QUERIES),
      .stretch = NAME(take_stretch)(room, p, STRETCH, false),
  };
  for (int i = 0; i < group; i++) {
    taken.query[i] = sa_room_take(room, NAME(query_room)(p) * (int64_t)sizeof(NAME(element)));
    taken.own[i] = NAME(take_gathered)(room, p);
  }
  return taken;
}

static NAME(forward_room) NAME(worker_room)(const NAME(forward_job) * job, int worker) {
  return NAME(take_forward)(&(sa_room){.memory = job->rooms + worker * job->room_bytes}, job->p, job->group);
}

// What a block's part of the keys gathered, kept between the two passes: the words of `alive`, then the rest.
static NAME(gathered) NAME(part_gathered)(const NAME(forward_job) * job, int64_t item, uint64_t **alive) {
  sa_room room = {.memory = job->gathered ? job->gathered + item * job->gathered_bytes : NULL};
  *alive = sa_room_take(&room, sizeof **alive);
  return NAME(take_gathered)(&room, job->p);
}

// The blocks of an item, of one head; returns how many: none where a head's last group is short. The last ones come
// first, since under a causal mask they have the most to do.
static int NAME(item_blocks)(const NAME(forward_job) * job, int64_t item, NAME(block) * blocks) {
  const int64_t groups = (job->blocks + job->group - 1) / job->group, single = item - job->whole;
  const int64_t place = single < 0 ? item : job->whole + single / job->group, head = place / groups * job->heads;
  int64_t first = (groups - 1 - place % groups) * job->group, end = first + job->group;
  if (single >= 0) {
    end -= single % job->group;
    first = end - 1;
  }
  if (end > job->blocks) end = job->blocks;
  const int count = end > first ? (int)(end - first) : 0;
  for (int i = 0; i < count; i++) {
    blocks[i] = NAME(block_at)(job->p, head / job->p->heads, head % job->p->heads, first + i, job->heads);
  }
  return count;
}

// What has ended becomes output, while it is in the first cache.
static void NAME(close_passage)(const NAME(forward_job) * job, NAME(passage) * passage, NAME(held_keys) * held,
                                const NAME(forward_room) * room) {
  NAME(end_passage)(passage, 0, job->p->plan->col_tiles, held, room);
  NAME(finish)(passage->block, passage->gathered);
  if (!job->p->weights.data) return;
  NAME(write_weights)(passage->block, passage->query, room, passage->gathered);
  held->stretch.count = 0;  // the room for rows of K has others
}

// Attention of an item's blocks. They take turns, so that what one has read of K and V is still in the second cache for
// the others. One that has seen all its keys leaves its room to the next that begins: blocks of short documents all
// have the same, whose lines are in the caches.
static void NAME(forward_whole)(void *argument, int64_t item, int worker) {
  const NAME(forward_job) *job = argument;
  NAME(forward_room) room = NAME(worker_room)(job, worker);
  NAME(block) blocks[GROUP], next[GROUP];
  NAME(passage) passages[GROUP];
  NAME(held_keys) held = {0};
  sa_forecast forecast = {0};
  const int count = NAME(item_blocks)(job, item, blocks);
  const int64_t later = item + job->workers;
  const bool foresees = later < job->items && NAME(item_blocks)(job, later, next);
  for (int i = 0; i < count; i++) {
    passages[i] = NAME(set_out)(&blocks[i], 0, job->p->plan->col_tiles, false);
    passages[i].after = i + 1 < count ? &blocks[i + 1] : NULL;
    passages[i].beyond = i + 1 < count || !foresees ? NULL : next;
  }
  int place[GROUP];
  unsigned taken = 0;  // bits of the places of those that are under way
  for (bool begun = false; taken || !begun; begun = true) {
    for (int i = 0; i < count; i++) {
      NAME(passage) *passage = &passages[i];
      if (begun && !passage->more) continue;
      if (!begun) {
        place[i] = __builtin_ctz(~taken);
        taken |= 1u << place[i];
        NAME(begin)(passage, room.query[place[i]], &room.own[place[i]], &room);
      }
      for (int left = job->turn; left > 0 && passage->more;) {
        left -= NAME(advance)(passage, &passages[(i + 1) % count], left == 1, &held, &forecast, &room);
      }
      if (passage->more) continue;
      NAME(close_passage)(job, passage, &held, &room);
      taken &= ~(1u << place[i]);
    }
  }
}

static void NAME(forward_part)(void *argument, int64_t item, int worker) {
  const NAME(forward_job) *job = argument;
  const NAME(forward_room) room = NAME(worker_room)(job, worker);
  const int64_t tile = item % job->parts * job->tiles_per_part, end = tile + job->tiles_per_part;
  NAME(block) block;
  NAME(held_keys) held = {0};
  sa_forecast forecast = {0};
  uint64_t *alive;
  NAME(item_blocks)(job, item / job->parts, &block);
  NAME(gathered) gathered = NAME(part_gathered)(job, item, &alive);
  NAME(passage) passage = NAME(set_out)(&block, tile, end, false);
  NAME(begin)(&passage, room.query[0], &gathered, &room);
  while (passage.more) NAME(advance)(&passage, NULL, false, &held, &forecast, &room);
  NAME(end_passage)(&passage, tile, end, &held, &room);
  *alive = gathered.alive;
}

static void NAME(forward_join)(void *argument, int64_t item, int worker) {
  const NAME(forward_job) *job = argument;
  NAME(block) block;
  NAME(item_blocks)(job, item, &block);
  uint64_t *alive;
  NAME(gathered) whole = NAME(part_gathered)(job, item * job->parts, &alive);
  whole.alive = *alive;
  for (int64_t part = 1; part < job->parts; part++) {
    NAME(gathered) gathered = NAME(part_gathered)(job, item * job->parts + part, &alive);
    gathered.alive = *alive;
    NAME(join)(&block, &whole, &gathered);
  }
  NAME(finish)(&block, &whole);
  if (!job->p->weights.data) return;
  const NAME(forward_room) room = NAME(worker_room)(job, worker);
  NAME(pack_query)(&block, 0, room.query[0]);
  NAME(write_weights)(&block, room.query[0], &room, &whole);
}

// How many blocks take turns, and for how long. What they keep is to fit into the second cache beside what they share,
// and every worker is to have some items. Where keys are converted, blocks take turns at every stretch, which is then
// converted once. The last groups, one a worker, are given out block by block, so that all end at about the same time.
// The bits do not depend on any of it.
static void NAME(choose_group)(NAME(forward_job) * job, int64_t planes) {
  enum { SHARED = 256 << 10, KEPT = 320 << 10 };
  const sa_problem *p = job->p;
  const int64_t element = sizeof(NAME(element)), row = (p->width + p->value_width) * element;
  const int64_t kept = NAME(query_room)(p) * element + QUERIES * NAME(padded)(p->value_width) * (int64_t)sizeof(REAL);
  int64_t group = KEPT / kept < GROUP ? KEPT / kept : GROUP;
  while (group > 1 && planes * ((job->blocks + group - 1) / group) < 4 * job->workers) group /= 2;
  const int64_t turn = row ? SHARED / (STRETCH * row) : 1;
  job->group = group < 1 ? 1 : (int)group;
  job->turn = turn < 1 || sa_size_of(p->k.dtype) != element ? 1 : (int)turn;
}

static int NAME(forward)(const sa_problem *p) {
  enum { SHARES = 64 };
  NAME(forward_job) job = {.p = p, .blocks = (p->queries + QUERIES - 1) / QUERIES, .heads = 1, .parts = 1, .group = 1};
  if (p->key_heads) job.heads = NAME(heads_together)(p);
  const int64_t planes = p->batch * p->heads / job.heads, tiles = p->plan->col_tiles, blocks = planes * job.blocks;
  if (!blocks) return SA_OK;
  job.workers = sa_workers(2 * sa_visible_pairs(p) * (p->width + p->value_width));
  NAME(choose_group)(&job, planes);
  // Few queries against many keys (decoding): the keys are split, by the shape alone, so that the bits do not depend on
  // how many threads there are.
  if (blocks < SHARES && tiles >= 16) {
    job.parts = (SHARES + blocks - 1) / blocks;
    if (job.parts > tiles / 8) job.parts = tiles / 8;
    job.group = 1;
  }
  job.tiles_per_part = (tiles + job.parts - 1) / job.parts;
  const int64_t groups = planes * ((job.blocks + job.group - 1) / job.group);
  job.whole = job.workers > 1 && groups > job.workers ? groups - job.workers : groups;
  job.items = (job.whole + (groups - job.whole) * job.group) * job.parts;
  sa_room measure = {0};
  NAME(take_forward)(&measure, p, job.group);
  job.room_bytes = measure.used;
  job.rooms = sa_allocate("sa_forward", job.room_bytes * job.workers);
  if (!job.rooms) return SA_NO_MEMORY;
  if (job.parts == 1) {
    sa_parallel(job.workers, job.items, NAME(forward_whole), &job);
  } else {
    measure = (sa_room){.used = 64};
    NAME(take_gathered)(&measure, p);
    job.gathered_bytes = measure.used;
    job.gathered = sa_allocate("sa_forward", job.gathered_bytes * job.items);
    if (!job.gathered) {
      sa_release(job.rooms);
      return SA_NO_MEMORY;
    }
    sa_parallel(job.workers, job.items, NAME(forward_part), &job);
    sa_parallel(job.workers, blocks, NAME(forward_join), &job);
    sa_release(job.gathered);
  }
  sa_release(job.rooms);
  return SA_OK;
}
