// the forward pass, for one REAL; part of flash.h
//
// Reaches 77 to 85 % of the fused multiply-add peak in f32 and 70 to 75 % in f64 (D64 and D128, one core, AVX-512 and
// AVX2; bench/attention.lua bars). Some 8 % (f64: 12 %) go to the exponentials, which share the ports of the products;
// the rest is the start and the end of register tiles, and rows of K and V that come from the second cache.

// What a block of queries has gathered: o unnormalised, relative to the running peak.
typedef struct NAME(gathered) {
  REAL *o;         // [QUERIES][value width, padded to vectors]
  REAL *peak;      // [QUERIES], in the block's unit
  REAL *sum;       // [QUERIES]
  uint64_t alive;  // bits of the queries that saw a key
} NAME(gathered);

typedef struct NAME(forward_room) {
  NAME(element) * query;  // as pack_query does
  NAME(forward_products) products;
  REAL *leaked;  // [QUERIES][value width, padded]
  REAL *factor;  // [QUERIES]
  REAL *peak;    // [QUERIES]: with the stretch in hand
  NAME(gathered) own;
  NAME(stretch_room) stretch;
} NAME(forward_room);

// P^T in place of S^T, with the running peak, sum and the factor that the old peak costs. Weights that dropout does not
// keep (`kept` NULL: it keeps all) count in the sum and are then 0, whatever they were, NaN too.
static inline __attribute__((always_inline)) void NAME(soften_so)(const NAME(block) * block, int keys, REAL *scores,
                                                                  const REAL *peak, NAME(gathered) * gathered,
                                                                  REAL *factor, bool plain, const uint64_t *kept) {
  const NAME(vector) unit = NAME(set)(block->unit), lowest = NAME(set)(-(REAL)INFINITY), zero = NAME(set)(0);
  for (int j = 0; j < block->vectors; j++) {
    const NAME(vector) old = NAME(load)(gathered->peak + j * LANES);
    const NAME(vector) top = NAME(load)(peak + j * LANES);
    // A row that has seen nothing yet, or nothing but -inf, must not compute -inf - -inf.
    const NAME(vector) base = NAME(select)(NAME(below_or_equal)(top, lowest), NAME(set)(0), top);
    const NAME(vector) decay = NAME(exp2)((old - base) * unit);
    NAME(vector) sum[4] = {NAME(set)(0), NAME(set)(0), NAME(set)(0), NAME(set)(0)};
    REAL *column = scores + j * LANES;
    int r = 0;
    for (; r + 4 <= keys; r += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        NAME(vector) x = NAME(load)(column + (r + k) * NAME(ROW)) - base;
        if (!plain) x = x * unit;
        const NAME(vector) w = NAME(exp2)(x);
        NAME(store)(column + (r + k) * NAME(ROW), kept ? NAME(select)(kept[r + k] >> (j * LANES), w, zero) : w);
        sum[k] = sum[k] + w;
      }
    }
    for (; r < keys; r++) {
      const NAME(vector) w = NAME(exp2)((NAME(load)(column + r * NAME(ROW)) - base) * unit);
      NAME(store)(column + r * NAME(ROW), kept ? NAME(select)(kept[r] >> (j * LANES), w, zero) : w);
      sum[0] = sum[0] + w;
    }
    const NAME(vector) total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    NAME(store)(gathered->sum + j * LANES, NAME(fma)(NAME(load)(gathered->sum + j * LANES), decay, total));
    NAME(store)(gathered->peak + j * LANES, top);
    NAME(store)(factor + j * LANES, decay);
  }
}

// A loop for each of its uses, so that none asks what it is for at every vector.
static void NAME(soften)(const NAME(block) * block, int keys, REAL *scores, const REAL *peak, NAME(gathered) * gathered,
                         REAL *factor, const uint64_t *kept) {
  if (kept)
    NAME(soften_so)(block, keys, scores, peak, gathered, factor, false, kept);
  else if (block->plain)
    NAME(soften_so)(block, keys, scores, peak, gathered, factor, true, NULL);
  else
    NAME(soften_so)(block, keys, scores, peak, gathered, factor, false, NULL);
}

// Attention of one block over the tiles [tile_first, tile_end). `careful` is the path for blocks that came out
// non-finite: the same products in the same order, with V's non-finite elements 0, and then these given to the rows
// that see them; so a row that sees none gets the very bits that any finite V would have given. Returns whether a
// non-finite value can have leaked.
static bool NAME(gather)(const NAME(block) * block, int64_t tile_first, int64_t tile_end, bool careful,
                         const NAME(forward_room) * room, NAME(gathered) * gathered) {
  const sa_problem *p = block->p;
  const int64_t padded = NAME(padded)(p->value_width);
  bool started = false, leaks = false;
  gathered->alive = 0;
  for (int i = 0; i < QUERIES; i++) {
    gathered->peak[i] = -(REAL)INFINITY;
    gathered->sum[i] = 0;
  }
  if (careful) memset(room->leaked, 0, sizeof *room->leaked * QUERIES * padded);
  sa_walk walk = sa_walk_start(p->plan, block->plane, block->query, block->each, tile_first, tile_end, STRETCH);
  for (sa_stretch stretch; sa_walk_next(&walk, &stretch);) {
    int64_t stride;
    const NAME(element) *key = NAME(rows_of)(&p->k, block, stretch.first, stretch.count, (int)p->width, block->few,
                                             room->products.rows, &stride);
    memcpy(room->peak, gathered->peak, sizeof *room->peak * block->vectors * LANES);
    const uint64_t *visible = NAME(score)(block, &stretch, key, stride, room->query, &room->stretch, room->peak);
    if (visible) {
      for (int r = 0; r < stretch.count; r++) gathered->alive |= visible[r];
    } else {
      gathered->alive = ~UINT64_C(0);
    }
    REAL *weights = room->stretch.scores;
    const uint64_t *kept = NAME(keep)(block, &stretch, &room->stretch);
    NAME(soften)(block, stretch.count, weights, room->peak, gathered, room->factor, kept);
    leaks |= NAME(add_values)(block, &stretch, visible, weights, started ? room->factor : NULL, &room->products,
                              gathered->o, careful ? room->leaked : NULL);
    started = true;
  }
  if (started)
    NAME(close_values)(block, &room->products, gathered->o);
  else
    memset(gathered->o, 0, sizeof(REAL) * block->count * padded);
  if (careful) {
    for (int64_t d = 0; d < block->count * padded; d++) gathered->o[d] += room->leaked[d];
  }
  return leaks;
}

static void NAME(gather_safely)(const NAME(block) * block, int64_t tile_first, int64_t tile_end,
                                const NAME(forward_room) * room, NAME(gathered) * gathered) {
  const int width = (int)block->p->value_width;
  if (NAME(gather)(block, tile_first, tile_end, false, room, gathered) &&
      NAME(has_nonfinite)(gathered->o, NAME(padded)(width), block->count, width)) {
    NAME(gather)(block, tile_first, tile_end, true, room, gathered);
  }
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

// Writes out, LSE and dead rows of a block; leaves in gathered->peak and sum each row's base and factor.
static void NAME(finish)(const NAME(block) * block, NAME(gathered) * gathered) {
  const sa_problem *p = block->p;
  const int width = (int)p->value_width;
  const int64_t padded = NAME(padded)(width);
  const double kept = 1 / (1 - p->dropout);
  for (int i = 0; i < block->count; i++) {
    REAL *o = gathered->o + i * padded;
    const bool dead = !(gathered->alive >> i & 1);
    NAME(row_scale) row = {INFINITY, 0, NAME(sink_of)(block, i), 1};
    if (dead) {
      memset(o, 0, sizeof *o * width);
    } else {
      const double peak = gathered->peak[i];
      row = NAME(scale_row)(block, i, peak, gathered->sum[i]);
      // What was gathered is relative to the row's own peak; a larger sink takes it down.
      const double down = row.base == peak ? 1 : exp((peak - row.base) * (block->plain ? 0.6931471805599453 : 1));
      const REAL scale = (REAL)(row.factor * down * kept);
      for (int d = 0; d < width; d++) o[d] *= scale;
    }
    NAME(write_row)(NAME(row_at)(&p->out, block, i), p->out.dtype, width, o);
    if (p->lse.data) *(REAL *)NAME(row_at)(&p->lse, block, i) = (REAL)row.lse;
    if (p->dead.data) *(bool *)NAME(row_at)(&p->dead, block, i) = dead;
    gathered->peak[i] = (REAL)row.base;
    gathered->sum[i] = (REAL)row.factor;
  }
}

// The weights p_ij of a finished block: the scores again, against what the whole row came to.
static void NAME(write_weights)(const NAME(block) * block, const NAME(forward_room) * room,
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
    const NAME(element) *key = NAME(rows_of)(&p->k, block, stretch.first, stretch.count, (int)p->width, block->few,
                                             room->products.rows, &stride);
    const uint64_t *visible = NAME(score)(block, &stretch, key, stride, room->query, &room->stretch, NULL);
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
  char *rooms;                                   // one per worker
  int64_t room_bytes;
  char *gathered;  // one per block and part, when the keys are split
  int64_t gathered_bytes;
} NAME(forward_job);

static NAME(gathered) NAME(take_gathered)(sa_room *room, const sa_problem *p) {
  const int64_t padded = NAME(padded)(p->value_width);
  return (NAME(gathered)){
      .o = NAME(take)(room, QUERIES * padded), .peak = NAME(take)(room, QUERIES), .sum = NAME(take)(room, QUERIES)};
}

static NAME(forward_room) NAME(take_forward)(sa_room *room, const sa_problem *p) {
  return (NAME(forward_room)){
      .query = sa_room_take(room, NAME(query_room)(p) * (int64_t)sizeof(NAME(element))),
      .products = NAME(take_forward_products)(room, p),
      .leaked = NAME(take)(room, QUERIES * NAME(padded)(p->value_width)),
      .factor = NAME(take)(room, QUERIES),
      .peak = NAME(take)(room, QUERIES),
      .own = NAME(take_gathered)(room, p),
      .stretch = NAME(take_stretch)(room, p, false),
  };
}

static NAME(forward_room) NAME(worker_room)(const NAME(forward_job) * job, int worker) {
  return NAME(take_forward)(&(sa_room){.memory = job->rooms + worker * job->room_bytes}, job->p);
}

// What a block's part of the keys gathered, kept between the two passes: the words of `alive`, then the rest.
static NAME(gathered) NAME(part_gathered)(const NAME(forward_job) * job, int64_t item, uint64_t **alive) {
  sa_room room = {.memory = job->gathered ? job->gathered + item * job->gathered_bytes : NULL};
  *alive = sa_room_take(&room, sizeof **alive);
  return NAME(take_gathered)(&room, job->p);
}

// Item -> block of queries; the last blocks first, since under a causal mask they have the most to do.
static NAME(block) NAME(item_block)(const NAME(forward_job) * job, int64_t item) {
  const int64_t index = job->blocks - 1 - item % job->blocks, head = item / job->blocks * job->heads;
  return NAME(block_at)(job->p, head / job->p->heads, head % job->p->heads, index, job->heads);
}

static void NAME(forward_whole)(void *argument, int64_t item, int worker) {
  const NAME(forward_job) *job = argument;
  NAME(forward_room) room = NAME(worker_room)(job, worker);
  const NAME(block) block = NAME(item_block)(job, item);
  NAME(pack_query)(&block, 0, room.query);
  NAME(gather_safely)(&block, 0, job->p->plan->col_tiles, &room, &room.own);
  NAME(finish)(&block, &room.own);
  if (job->p->weights.data) NAME(write_weights)(&block, &room, &room.own);
}

static void NAME(forward_part)(void *argument, int64_t item, int worker) {
  const NAME(forward_job) *job = argument;
  const NAME(forward_room) room = NAME(worker_room)(job, worker);
  const NAME(block) block = NAME(item_block)(job, item / job->parts);
  const int64_t tile = item % job->parts * job->tiles_per_part;
  uint64_t *alive;
  NAME(gathered) gathered = NAME(part_gathered)(job, item, &alive);
  NAME(pack_query)(&block, 0, room.query);
  NAME(gather_safely)(&block, tile, tile + job->tiles_per_part, &room, &gathered);
  *alive = gathered.alive;
}

static void NAME(forward_join)(void *argument, int64_t item, int worker) {
  const NAME(forward_job) *job = argument;
  const NAME(block) block = NAME(item_block)(job, item);
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
  NAME(pack_query)(&block, 0, room.query);
  NAME(write_weights)(&block, &room, &whole);
}

static int NAME(forward)(const sa_problem *p) {
  enum { SHARES = 64 };
  NAME(forward_job) job = {.p = p, .blocks = (p->queries + QUERIES - 1) / QUERIES, .heads = 1, .parts = 1};
  if (p->key_heads) job.heads = NAME(heads_together)(p);
  const int64_t items = p->batch * p->heads / job.heads * job.blocks, tiles = p->plan->col_tiles;
  if (!items) return SA_OK;
  // Few queries against many keys (decoding): the keys are split, by the shape alone, so that the bits do not depend on
  // how many threads there are.
  if (items < SHARES && tiles >= 16) {
    job.parts = (SHARES + items - 1) / items;
    if (job.parts > tiles / 8) job.parts = tiles / 8;
  }
  job.tiles_per_part = (tiles + job.parts - 1) / job.parts;
  const int workers = sa_workers(2 * sa_visible_pairs(p) * (p->width + p->value_width));
  sa_room measure = {0};
  NAME(take_forward)(&measure, p);
  job.room_bytes = measure.used;
  job.rooms = sa_allocate("sa_forward", job.room_bytes * workers);
  if (!job.rooms) return SA_NO_MEMORY;
  if (job.parts == 1) {
    sa_parallel(workers, items, NAME(forward_whole), &job);
  } else {
    measure = (sa_room){.used = 64};
    NAME(take_gathered)(&measure, p);
    job.gathered_bytes = measure.used;
    job.gathered = sa_allocate("sa_forward", job.gathered_bytes * items * job.parts);
    if (!job.gathered) {
      sa_release(job.rooms);
      return SA_NO_MEMORY;
    }
    sa_parallel(workers, items * job.parts, NAME(forward_part), &job);
    sa_parallel(workers, items, NAME(forward_join), &job);
    sa_release(job.gathered);
  }
  sa_release(job.rooms);
  return SA_OK;
}
