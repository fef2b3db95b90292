// the backward pass, for one REAL; part of flash.h
//
// Reaches 84 to 88 % of the fused multiply-add peak in f32 and 76 to 81 % in f64 (D64 and D128, one core, AVX-512 and
// AVX2; bench/attention.lua bars): five products to one pass of exponentials, which takes 4 %. Heads of 128 tokens come
// to 71 %: packing, the rows' constants and memory that is touched for the first time are an eighth of them.
//
// Work is shared out by chunks of keys: an item owns dK and dV of its chunk, which are gathered where they are wanted,
// and walks the blocks of queries past it, with a block's dQ at rest in the first cache. Blocks of dQ that several
// chunks add to are added to in the order of the chunks, each waiting for its turn, so that the bits depend on the
// shape alone and no second copy of dQ is needed.
//
// 0 * NaN could leak through the products that sum over pairs: dS K into dQ, P^T dO into dV, dS^T Q into dK. What is
// not finite in K, Q or dO is known before (a look at a row of K when the chunk first meets it, at others once a
// block); tiles that it touches use copies with 0 in its place and then give it to the pairs that see it. Rows without
// a key are packed as zeros.

typedef struct NAME(backward_job) {
  const sa_problem *p;
  int64_t blocks;                     // of queries
  int64_t chunks, chunk;              // of keys: how many, and keys in one
  int stretch;                        // keys that a block looks at together, at most
  int64_t batch_groups, head_groups;  // items per chunk: planes that share a dBias are one item's, in order
  int workers;
  char *rooms;
  int64_t room_bytes;
  REAL *delta;        // [B,H,L]: dO . o - dLSE
  REAL *base;         // [B,H,L]: what scores are relative to, in the block's unit; the LSE, or
  REAL *factor;       // [B,H,L]: with a factor beside it where the LSE is too coarse
  int32_t *turn_of;   // per plane, row of tiles and chunk: how many chunks before it the row looks at
  atomic_int *turns;  // per batch, head and block: chunks that have added to its dQ
  REAL *dq;           // [B,H,L,E], when dQ is gathered over chunks and its dtype is narrower
  REAL *dbias;        // in bias_shape, per chunk when keys are broadcast; NULL: dBias is gathered in place
  int64_t dbias_count;
  double *dsinks;  // [H][B][blocks]
  double *dalibi;  // [H][B][chunks]
} NAME(backward_job);

typedef struct NAME(backward_room) {
  NAME(element) * packed_query;  // as pack_query does, for S
  NAME(backward_products) products;
  REAL *query;                  // [QUERIES][width, padded]: Q for dK, where it cannot be read in place
  REAL *dout;                   // [QUERIES][value width, padded]: dO for dV, likewise
  REAL *base, *factor, *delta;  // [QUERIES]
  NAME(gathered) again;         // peaks and sums of rows whose LSE is too coarse
  REAL *dscores;                // [stretch][ROW]: dP^T, then dS^T
  REAL *dquery;                 // [QUERIES][width, padded]
  REAL *dkey, *dvalue;          // [chunk]: rows, or tails, of dK and dV, where they are not gathered in place
  NAME(stretch_room) stretch;
} NAME(backward_room);

// A chunk of the keys of one head, and where its gradients are gathered. Whoever comes first to some keys looks at them
// and writes their gradients instead of adding: to do so before for all of them would be to wait for memory.
typedef struct NAME(chunk) {
  int64_t index, first;
  int count;
  uint64_t met;  // bits of the segments that some block has looked at
  bool wild;     // something in K is not finite there
  NAME(gradient) dkey, dvalue;
} NAME(chunk);

// The rows of a block's Q or dO, for the products that sum over queries.
typedef struct NAME(query_rows) {
  const sa_operand *operand;
  int width;
  const REAL *rows;  // finite, dead rows 0, whole vectors
  int64_t stride;
  bool wild;  // something in the operand is not finite
} NAME(query_rows);

enum { NAME(UNSEEN) = -1 };

// A gradient of keys is gathered in place, but for what is beyond its last whole vector, unless it has another dtype.
static REAL *NAME(take_gradient)(sa_room *room, const sa_operand *x, int64_t chunk, int64_t width) {
  const int64_t row = x->dtype != DTYPE ? NAME(padded)(width) : width % LANES ? LANES : 0;
  return NAME(take)(room, x->data ? chunk * row : 0);
}

static NAME(backward_room) NAME(take_backward)(sa_room *room, const NAME(backward_job) * job) {
  const sa_problem *p = job->p;
  const int64_t width = NAME(padded)(p->width), value_width = NAME(padded)(p->value_width);
  return (NAME(backward_room)){
      .packed_query = sa_room_take(room, NAME(query_room)(p) * (int64_t)sizeof(NAME(element))),
      .products = NAME(take_backward_products)(room, p, job->stretch),
      .query = NAME(take)(room, QUERIES * width),
      .dout = NAME(take)(room, QUERIES * value_width),
      .base = NAME(take)(room, QUERIES),
      .factor = NAME(take)(room, QUERIES),
      .again = {.peak = NAME(take)(room, QUERIES), .sum = NAME(take)(room, QUERIES)},
      .delta = NAME(take)(room, QUERIES),
      .dscores = NAME(take)(room, job->stretch * NAME(ROW)),
      .dquery = NAME(take)(room, QUERIES * width),
      .dkey = NAME(take_gradient)(room, &p->dk, job->chunk, p->width),
      .dvalue = NAME(take_gradient)(room, &p->dv, job->chunk, p->value_width),
      .stretch = NAME(take_stretch)(room, p, job->stretch, true),
  };
}

static const int32_t *NAME(turns_of)(const NAME(backward_job) * job, const NAME(block) * block) {
  const int64_t row = block->plane * job->p->plan->row_tiles + block->query / SA_TILE;
  return job->turn_of + row * (job->chunks + 1);
}

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
    NAME(score)(block, &stretch, key, stride, room->packed_query, &room->stretch, room->factor);
    NAME(soften)(block, stretch.count, room->stretch.scores, room->factor, &again, room->delta, NULL);
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
  // doing, has no digit for the number of keys): those blocks get peaks and sums afresh.
  bool coarse = false;
  for (int i = 0; i < block->count; i++) coarse |= fabs(lse[i * lse_row]) > 1024 && !(dead_rows >> i & 1);
  if (coarse) NAME(gather_again)(job, block, room);
  if (p->dout.data) NAME(output_dots)(block, dots);
  double dsink = 0;
  for (int i = 0; i < block->count; i++) {
    const bool dead = dead_rows >> i & 1;
    // A row that sees only its sink gives it all its weight.
    NAME(row_scale) scale = {INFINITY, 1, sink, 1};
    if (!dead && coarse) {
      scale = NAME(scale_row)(block, i, room->again.peak[i], room->again.sum[i]);
    } else if (!dead) {
      const double known = lse[i * lse_row];
      scale.base = block->plain ? known * 1.4426950408889634 : known;
      scale.lse = known;
      scale.sink = p->sinks.data ? exp(sink - known) : 0;
    }
    job->base[first + i] = (REAL)scale.base;
    job->factor[first + i] = (REAL)scale.factor;
    double dlse = 0;
    if (p->dlse.data) dlse = *(const REAL *)sa_at(&p->dlse, block->batch, block->head, block->query + i, 0);
    const double delta = (!dead && p->dout.data ? (double)dots[i] : 0) - dlse;
    job->delta[first + i] = dead ? 0 : (REAL)delta;
    if (!p->dsinks.data || sink == -(REAL)INFINITY) continue;
    // The dO of a row that sees only its sink meets o = 0, which does not depend on the sink.
    dsink += dead ? dlse : -delta * scale.sink;
  }
  const int64_t index = (block->head * p->batch + block->batch) * job->blocks + block->query / QUERIES;
  if (p->dsinks.data) job->dsinks[index] = dsink;
}

// First pass, where several chunks meet the same blocks.
static void NAME(prepare)(void *argument, int64_t item, int worker) {
  const NAME(backward_job) *job = argument;
  const sa_problem *p = job->p;
  const int64_t head = item / job->blocks;
  const NAME(block) block = NAME(block_at)(p, head / p->heads, head % p->heads, item % job->blocks, 1);
  const NAME(backward_room) room =
      NAME(take_backward)(&(sa_room){.memory = job->rooms + worker * job->room_bytes}, job);
  NAME(prepare_block)(job, &block, &room);
}

// Whether rows so far apart can be a product's right side as they lie: rows that are a power of two apart, but not next
// to each other, would fall into few sets of the first cache.
static bool NAME(apart)(int64_t stride) {
  return stride % (4 * 64 / (int64_t)sizeof(REAL)) || stride <= TILE_VECTORS * LANES;
}

// Rows of Q or dO: as they lie, when nothing has to change, else copied to `room`, dead rows and what is not finite 0.
static NAME(query_rows)
    NAME(rows_of_queries)(const sa_operand *x, const NAME(block) * block, int width, uint64_t dead, REAL *room) {
  const int64_t padded = NAME(padded)(width);
  NAME(query_rows) result = {.operand = x, .width = width, .rows = room, .stride = padded};
  const bool complete = !(dead << (QUERIES - block->count));
  if (x->data && x->dtype == DTYPE && complete && NAME(columns)(width) == width && NAME(apart)(x->stride[2])) {
    const REAL *rows = NAME(row_at)(x, block, 0);
    if (!NAME(has_nonfinite)(rows, x->stride[2], block->count, width)) {
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
    for (int d = width; d < padded; d++) room[d] = 0;
  }
  REAL *own = room - block->count * padded;
  result.wild = NAME(has_nonfinite)(own, padded, block->count, width);
  if (result.wild) NAME(finite_part)(own, padded, block->count, width, own);
  return result;
}

// What is not finite in rows of queries, given to the keys that see them, rows of `to` from `at` on: to[key] +=
// pair[key][query] row.
static void NAME(give_to_keys)(const NAME(block) * block, int keys, const uint64_t *visible, uint64_t dead,
                               const REAL *pairs, const NAME(query_rows) * from, const NAME(gradient) * to,
                               int64_t at) {
  REAL room[SA_FUSED_WIDTH];
  for (int i = 0; i < block->count; i++) {
    if (dead >> i & 1) continue;
    const REAL *row = NAME(row_of)(NAME(row_at)(from->operand, block, i), from->operand->dtype, from->width, room);
    for (int d = 0; d < from->width; d++) {
      if (row[d] * 0 == 0) continue;
      const bool whole = d < to->columns;
      REAL *sum = whole ? to->rows + at * to->row + d : to->tail + at * LANES + d - to->columns;
      for (int r = 0; r < keys; r++, sum += whole ? to->row : LANES) {
        if (!visible || visible[r] >> i & 1) *sum += pairs[r * NAME(ROW) + i] * row[d];
      }
    }
  }
}

// What turns S^T and dP^T into P^T and dS^T; NULL: nothing is masked, everything is kept, no factor.
typedef struct NAME(pairing) {
  const uint64_t *visible, *kept;
  const REAL *base, *factor, *delta;  // [QUERIES]
} NAME(pairing);

static inline __attribute__((always_inline)) void NAME(differentiate_so)(const NAME(block) * block, int keys,
                                                                         NAME(pairing) by, bool plain, REAL *scores,
                                                                         REAL *dscores) {
  const NAME(vector) unit = NAME(set)(block->unit), zero = NAME(set)(0);
  const NAME(vector) more = NAME(set)((REAL)(1 / (1 - block->p->dropout)));
  for (int j = 0; j < block->vectors; j++) {
    const NAME(vector) base = NAME(load)(by.base + j * LANES), delta = NAME(load)(by.delta + j * LANES);
    const NAME(vector) factor = by.factor ? NAME(load)(by.factor + j * LANES) : zero;
    REAL *s = scores + j * LANES, *ds = dscores + j * LANES;
    for (int r = 0; r < keys; r++, s += NAME(ROW), ds += NAME(ROW)) {
      NAME(vector) x = NAME(load)(s) - base;
      if (!plain) x = x * unit;
      NAME(vector) weight = NAME(exp2)(x);
      if (by.factor) weight = weight * factor;
      if (by.visible) weight = NAME(select)(by.visible[r] >> (j * LANES), weight, zero);
      NAME(vector) dweight = NAME(load)(ds), shown = weight;
      if (by.kept) {
        dweight = NAME(select)(by.kept[r] >> (j * LANES), dweight * more, zero);
        shown = NAME(select)(by.kept[r] >> (j * LANES), weight * more, zero);
      }
      NAME(store)(s, shown);
      const NAME(vector) dscore = weight * (dweight - delta);
      NAME(store)(ds, by.visible ? NAME(select)(by.visible[r] >> (j * LANES), dscore, zero) : dscore);
    }
  }
}

// P^T in place of S^T, and dS^T = P^T (dP^T - delta) in place of dP^T, both 0 for masked pairs. Dropout acts on P in dV
// and on dP in dS: `scores` becomes what dV wants.
static void NAME(differentiate)(const NAME(block) * block, int keys, const NAME(pairing) * by, REAL *scores,
                                REAL *dscores) {
  NAME(pairing) own = *by;
  if (block->plain && !own.visible && !own.kept && !own.factor) {
    own.visible = own.kept = NULL;
    own.factor = NULL;
    NAME(differentiate_so)(block, keys, own, true, scores, dscores);
  } else {
    NAME(differentiate_so)(block, keys, own, block->plain, scores, dscores);
  }
}

// Where dBias of a query of the plane is gathered.
static REAL *NAME(dbias_row)(const NAME(backward_job) * job, int64_t batch, int64_t head, int64_t query) {
  const int64_t *shape = job->p->bias_shape;
  batch = shape[0] == 1 ? 0 : batch;
  head = shape[1] == 1 ? 0 : head;
  query = shape[2] == 1 ? 0 : query;
  if (!job->dbias) return sa_at(&job->p->dbias, batch, head, query, 0);
  return job->dbias + ((batch * shape[1] + head) * shape[2] + query) * shape[3];
}

// The rows of dBias that a stretch adds to, too far apart for the hardware to foresee.
static sa_forecast NAME(foresee_dbias)(const NAME(backward_job) * job, const NAME(block) * block,
                                       const sa_stretch *stretch) {
  const int64_t *shape = job->p->bias_shape;
  sa_forecast forecast = {0};
  if (shape[2] == 1 || shape[3] == 1) return forecast;
  const REAL *rows = NAME(dbias_row)(job, block->batch, block->head, block->query);
  const int64_t stride = job->dbias ? shape[3] : job->p->dbias.stride[2];
  sa_forecast_add(&forecast, rows + stretch->first, stride * (int64_t)sizeof *rows,
                  stretch->count * (int64_t)sizeof *rows, block->count);
  return forecast;
}

// dBias += dS, in the order in which the item meets it.
static void NAME(add_dbias)(const NAME(backward_job) * job, const NAME(block) * block, const sa_stretch *stretch,
                            int64_t chunk, const REAL *dscores) {
  const bool broadcast = job->p->bias_shape[3] == 1;
  REAL square[LANES * LANES];
  for (int first = 0; first < block->count; first += LANES) {
    REAL *rows[LANES];
    const int queries = block->count - first < LANES ? block->count - first : LANES;
    for (int i = 0; i < queries; i++) {
      rows[i] = NAME(dbias_row)(job, block->batch, block->head, block->query + first + i);
      rows[i] += broadcast ? chunk * job->dbias_count : stretch->first;
    }
    int r = 0;
    for (; !broadcast && r + LANES <= stretch->count; r += LANES) {
      NAME(transpose)(dscores + r * NAME(ROW) + first, NAME(ROW), 1, square, LANES);
      for (int i = 0; i < queries; i++) {
        NAME(store)(rows[i] + r, NAME(load)(rows[i] + r) + NAME(load)(square + i * LANES));
      }
    }
    for (int i = 0; i < queries; i++) {
      REAL sum = 0;
      for (int key = r; key < stretch->count; key++) {
        const REAL dscore = dscores[key * NAME(ROW) + first + i];
        if (broadcast)
          sum += dscore;
        else
          rows[i][key] += dscore;
      }
      if (broadcast) *rows[i] += sum;
    }
  }
}

// What a step of ALiBi's slope does: the sum of -|j - i - d| dS; a stretch's share per query in REAL, then in double.
static double NAME(slope_gradient)(const NAME(block) * block, const sa_stretch *stretch, const REAL *dscores) {
  const int64_t origin = block->query + block->p->diagonal;
  REAL lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = (REAL)i;
  double sum = 0;
  for (int j = 0; j < block->vectors; j++) {
    const NAME(vector) offset = NAME(load)(lanes) + NAME(set)((REAL)(j * LANES));
    NAME(vector) share = NAME(set)(0);
    for (int r = 0; r < stretch->count; r++) {
      const NAME(vector) distance = NAME(magnitude)(NAME(set)((REAL)(stretch->first + r - origin)) - offset);
      // A masked pair's dS is 0, and so is its share.
      share = NAME(fma)(distance, NAME(load)(dscores + r * NAME(ROW) + j * LANES), share);
    }
    REAL shares[LANES];
    NAME(store)(shares, share);
    for (int i = 0; i < LANES; i++) sum -= (double)shares[i];
  }
  return sum;
}

static void NAME(clear_gradients)(const NAME(chunk) * chunk, int64_t first, int count) {
  for (int i = 0; i < 2; i++) {
    const NAME(gradient) *gradient = i ? &chunk->dvalue : &chunk->dkey;
    for (int64_t r = first; gradient->rows && r < first + count; r++) {
      memset(gradient->rows + r * gradient->row, 0, sizeof(REAL) * gradient->columns);
      if (gradient->tail) memset(gradient->tail + r * LANES, 0, sizeof(REAL) * LANES);
    }
  }
}

// Looks at the keys of a stretch when nobody has before. Returns whether all of them are new, so that their gradients
// are still to be written; those of a half that is new are cleared.
static bool NAME(meet_keys)(const NAME(block) * block, const sa_stretch *stretch, NAME(chunk) * chunk) {
  const int64_t offset = stretch->first - chunk->first;
  const uint64_t all = (stretch->count > SEGMENT ? 3 : 1) << (offset / SEGMENT), fresh = all & ~chunk->met;
  if (!fresh) return false;
  chunk->met |= all;
  chunk->wild |= NAME(wild_keys)(block, stretch->first, stretch->count);
  if (fresh == all) return true;
  const bool second = fresh >> (offset / SEGMENT) == 2;
  const int half = second ? stretch->count - SEGMENT : SEGMENT;
  NAME(clear_gradients)(chunk, offset + (second ? SEGMENT : 0), half);
  return false;
}

// One block of queries against one stretch of a chunk's keys.
static void NAME(backward_stretch)(const NAME(backward_job) * job, const NAME(block) * block, sa_stretch *stretch,
                                   NAME(chunk) * chunk, uint64_t dead, bool factor, const NAME(query_rows) * query,
                                   const NAME(query_rows) * dout, bool first, const NAME(backward_room) * room,
                                   double *dslope) {
  const sa_problem *p = job->p;
  const int width = (int)p->width, keys = stretch->count;
  int64_t key_stride;
  const NAME(element) *key =
      NAME(rows_of)(&p->k, block, stretch->first, keys, width, true, room->products.key_rows, &key_stride);
  stretch->outline = NAME(outline)(block, stretch, &room->stretch);
  sa_stretch scored = *stretch;
  sa_forecast forecast;
  if (p->dbias.data && stretch->forecast) {
    forecast = NAME(foresee_dbias)(job, block, stretch);
    scored.forecast = &forecast;
  }
  const uint64_t *visible = NAME(score)(block, &scored, key, key_stride, room->packed_query, &room->stretch, NULL);
  REAL *weights = room->stretch.scores, *dscores = room->dscores;
  const int64_t offset = stretch->first - chunk->first;
  bool fresh = NAME(meet_keys)(block, stretch, chunk);
  // What is not finite is given before a product, which may take the pairs apart (amx_product.h), adds to it.
  if (fresh && (query->wild || dout->wild)) {
    NAME(clear_gradients)(chunk, offset, keys);
    fresh = false;
  }
  NAME(dweight_product)(block, stretch, &room->products, dscores);
  const uint64_t *kept = NAME(keep)(block, stretch, &room->stretch);
  const NAME(pairing) by = {visible, kept, room->base, factor ? room->factor : NULL, room->delta};
  NAME(differentiate)(block, keys, &by, weights, dscores);
  if (p->dv.data) {
    if (dout->wild) NAME(give_to_keys)(block, keys, visible, dead, weights, dout, &chunk->dvalue, offset);
    NAME(add_dvalues)
    (block, stretch, weights, dout->rows, dout->stride, fresh, &room->products, &chunk->dvalue, offset);
  }
  if (p->dbias.data) NAME(add_dbias)(job, block, stretch, chunk->index, dscores);
  if (job->dalibi) *dslope += NAME(slope_gradient)(block, stretch, dscores);
  if (p->softcap > 0) {
    // d/ds of cap tanh(s / cap) is 1 - tanh^2; a masked pair may hold NaN there.
    for (int r = 0; r < keys; r++) {
      for (int j = 0; j < block->vectors; j++) {
        const NAME(vector) t = NAME(load)(room->stretch.capped + r * NAME(ROW) + j * LANES);
        REAL *ds = dscores + r * NAME(ROW) + j * LANES;
        const NAME(vector) inner = NAME(load)(ds) * (NAME(set)(1) - t * t);
        NAME(store)(ds, visible ? NAME(select)(visible[r] >> (j * LANES), inner, NAME(set)(0)) : inner);
      }
    }
  }
  if (p->dk.data) {
    if (query->wild) NAME(give_to_keys)(block, keys, visible, dead, dscores, query, &chunk->dkey, offset);
    NAME(add_dkeys)
    (block, stretch, dscores, query->rows, query->stride, fresh, &room->products, &chunk->dkey, offset);
  }
  if (p->dq.data) {
    NAME(add_dqueries)
    (block, stretch, visible, key, key_stride, dscores, chunk->wild, first, &room->products, room->dquery);
  }
}

static void NAME(write_dquery)(const NAME(block) * block, int i, const REAL *sum) {
  const sa_problem *p = block->p;
  const int width = (int)p->width;
  const REAL scale = (REAL)p->scale;
  REAL converted[SA_FUSED_WIDTH];
  void *const dq = sa_at(&p->dq, block->batch, block->head, block->query + i, 0);
  REAL *const to = p->dq.dtype == DTYPE ? dq : converted;
  for (int d = 0; d < width; d++) to[d] = sum[d] * scale;
  if (to == converted) NAME(write_row)(dq, p->dq.dtype, width, to);
}

// Adds a chunk's share of a block's dQ when its turn has come; the last one writes it out.
static void NAME(add_dquery)(const NAME(backward_job) * job, const NAME(block) * block, int64_t chunk,
                             const REAL *share) {
  const sa_problem *p = job->p;
  const int64_t head = block->batch * p->heads + block->head;
  const int32_t *turn_of = NAME(turns_of)(job, block);
  const int32_t mine = turn_of[chunk], all = turn_of[job->chunks];
  atomic_int *turn = &job->turns[head * job->blocks + block->query / QUERIES];
  // Chunks are handed out in rising order, so the one waited for is done or at work.
  while (atomic_load_explicit(turn, memory_order_acquire) != mine) {
    if (sa_interrupt_pending()) return;
    sched_yield();
  }
  for (int i = 0; i < block->count; i++, share += NAME(padded)(p->width)) {
    const int64_t query = block->query + i;
    REAL *sum =
        job->dq ? job->dq + (head * p->queries + query) * p->width : sa_at(&p->dq, block->batch, block->head, query, 0);
    for (int d = 0; d < p->width; d++) sum[d] = mine ? sum[d] + share[d] : share[d];
    if (mine + 1 == all) NAME(write_dquery)(block, i, sum);
  }
  atomic_store_explicit(turn, mine + 1, memory_order_release);
}

// What will be wanted while a block is at work and after it: the rows of dQ and the block `after` (may be NULL).
static sa_forecast NAME(foresee_block)(const NAME(backward_job) * job, const NAME(block) * block,
                                       const NAME(block) * after) {
  const sa_problem *p = job->p;
  sa_forecast forecast = {0};
  if (after) {
    const sa_operand *dout = &p->dout, *out = &p->out;
    NAME(foresee)(&forecast, &p->q, NAME(row_at)(&p->q, after, 0), p->width, after->count);
    if (dout->data) NAME(foresee)(&forecast, dout, NAME(row_at)(dout, after, 0), p->value_width, after->count);
    if (job->chunks == 1) NAME(foresee)(&forecast, out, NAME(row_at)(out, after, 0), p->value_width, after->count);
  }
  if (job->dq) {
    const int64_t row = p->width * (int64_t)sizeof(REAL), head = block->batch * p->heads + block->head;
    sa_forecast_add(&forecast, job->dq + (head * p->queries + block->query) * p->width, row, row, block->count);
  } else if (p->dq.data) {
    NAME(foresee)(&forecast, &p->dq, NAME(row_at)(&p->dq, block, 0), p->width, block->count);
  }
  return forecast;
}

// What the next chunk begins with, and the gradients: its own where they are gathered in place, else this chunk's,
// which are to be written. Long chunks have other things to call for.
static sa_forecast NAME(foresee_chunk)(const NAME(backward_job) * job, const NAME(block) * keys, int64_t index,
                                       const NAME(block) * next, int64_t next_index) {
  const sa_problem *p = job->p;
  sa_forecast forecast = {0};
  if (!next || job->chunk > 2 * SA_TILE) return forecast;
  NAME(foresee_keys)(&forecast, next, next_index * job->chunk, job->chunk);
  for (int i = 0; i < 2; i++) {
    const sa_operand *x = i ? &p->dv : &p->dk;
    const int64_t width = i ? p->value_width : p->width;
    const bool in_place = x->dtype == DTYPE;
    const NAME(block) *of = in_place ? next : keys;
    const int64_t first = (in_place ? next_index : index) * job->chunk;
    const int64_t count = p->keys - first < job->chunk ? p->keys - first : job->chunk;
    if (x->data) NAME(foresee)(&forecast, x, sa_at(x, of->batch, of->key_head, first, 0), width, count);
  }
  return forecast;
}

// One block of queries of one head against a whole chunk.
static void NAME(backward_block)(const NAME(backward_job) * job, const NAME(block) * block, NAME(chunk) * chunk,
                                 sa_forecast *forecast, const NAME(backward_room) * room, double *dslope) {
  const sa_problem *p = job->p;
  const int64_t tiles = job->chunk / SA_TILE;
  if (job->chunks == 1) NAME(prepare_block)(job, block, room);
  // Whether the row of tiles looks at this chunk is the plan's word, the same for both halves of a tile.
  if (NAME(turns_of)(job, block)[chunk->index] == NAME(UNSEEN)) return;
  const uint64_t dead = NAME(dead_rows)(block);
  bool factor = false;
  const int64_t rows = (block->batch * p->heads + block->head) * p->queries + block->query;
  for (int i = 0; i < QUERIES; i++) {
    const bool absent = dead >> i & 1;
    room->base[i] = absent ? (REAL)INFINITY : job->base[rows + i];
    room->factor[i] = absent ? 1 : job->factor[rows + i];
    room->delta[i] = absent ? 0 : job->delta[rows + i];
    factor |= room->factor[i] != 1;
  }
  NAME(pack_query)(block, dead, room->packed_query);
  const NAME(query_rows) query = NAME(rows_of_queries)(&p->q, block, (int)p->width, dead, room->query);
  const NAME(query_rows) dout = NAME(rows_of_queries)(&p->dout, block, (int)p->value_width, dead, room->dout);
  NAME(open_queries)(block, dead, query.rows, dout.rows, &room->products);
  bool first = true;
  sa_walk walk = sa_walk_start(p->plan, block->plane, block->query, block->count, chunk->index * tiles,
                               (chunk->index + 1) * tiles, job->stretch);
  for (sa_stretch stretch; sa_walk_next(&walk, &stretch); first = false) {
    stretch.forecast = forecast;
    NAME(backward_stretch)(job, block, &stretch, chunk, dead, factor, &query, &dout, first, room, dslope);
  }
  if (!p->dq.data) return;
  const int64_t padded = NAME(padded)(p->width);
  if (first)
    memset(room->dquery, 0, sizeof(REAL) * block->count * padded);
  else
    NAME(close_queries)(block, &room->products, room->dquery);
  if (job->chunks > 1) {
    NAME(add_dquery)(job, block, chunk->index, room->dquery);
  } else {
    for (int i = 0; i < block->count; i++) NAME(write_dquery)(block, i, room->dquery + i * padded);
  }
}

// Where a gradient of the keys is gathered.
static NAME(gradient)
    NAME(open_gradient)(const sa_operand *x, const NAME(block) * keys, int64_t first, int width, REAL *room) {
  if (!x->data) return (NAME(gradient)){0};
  if (x->dtype != DTYPE) {
    return (NAME(gradient)){.rows = room, .row = NAME(padded)(width), .columns = NAME(columns)(width)};
  }
  const int columns = width / LANES * LANES;
  return (NAME(gradient)){.rows = sa_at(x, keys->batch, keys->key_head, first, 0),
                          .row = x->stride[2],
                          .columns = columns,
                          .tail = columns < width ? room : NULL};
}

static void NAME(close_gradient)(const sa_operand *x, const NAME(block) * keys, const NAME(chunk) * chunk, int width,
                                 REAL factor, const NAME(gradient) * gradient) {
  REAL *rows = gradient->rows;
  for (int r = 0; r < chunk->count; r++, rows += gradient->row) {
    for (int d = gradient->columns; gradient->tail && d < width; d++) {
      rows[d] = gradient->tail[r * LANES + d - gradient->columns];
    }
    for (int d = 0; factor != 1 && d < width; d++) rows[d] *= factor;
    if (x->dtype == DTYPE) continue;
    NAME(write_row)(sa_at(x, keys->batch, keys->key_head, chunk->first + r, 0), x->dtype, width, rows);
  }
}

// A chunk of one key head: all query heads that read it, all blocks of queries.
static void NAME(backward_chunk)(const NAME(backward_job) * job, int64_t batch, int64_t key_head, int64_t index,
                                 const NAME(block) * next, int64_t next_chunk, const NAME(backward_room) * room) {
  const sa_problem *p = job->p;
  const int width = (int)p->width, value_width = (int)p->value_width;
  const int64_t group = p->heads / p->key_heads, first = index * job->chunk;
  const int count = (int)(p->keys - first < job->chunk ? p->keys - first : job->chunk);
  const NAME(block) keys = {.p = p, .batch = batch, .key_head = key_head};
  NAME(chunk)
  chunk = {.index = index,
           .first = first,
           .count = count,
           .dkey = NAME(open_gradient)(&p->dk, &keys, first, width, room->dkey),
           .dvalue = NAME(open_gradient)(&p->dv, &keys, first, value_width, room->dvalue)};
  sa_forecast far = NAME(foresee_chunk)(job, &keys, index, next, next_chunk);
  for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) {
    double dslope = 0;
    for (int64_t at = 0; at < job->blocks && !sa_interrupt_pending(); at++) {
      const NAME(block) block = NAME(block_at)(p, batch, head, at, 1);
      const bool last = at + 1 == job->blocks, last_of_all = last && head + 1 == (key_head + 1) * group;
      NAME(block) after;
      if (!last_of_all) after = NAME(block_at)(p, batch, head + last, last ? 0 : at + 1, 1);
      sa_forecast forecast = NAME(foresee_block)(job, &block, last_of_all ? next : &after);
      const int near = forecast.parts;
      sa_forecast_append(&forecast, &far, 0);
      NAME(backward_block)(job, &block, &chunk, block.few ? NULL : &forecast, room, &dslope);
      far.parts = 0;
      sa_forecast_append(&far, &forecast, near);
    }
    if (job->dalibi) job->dalibi[(head * p->batch + batch) * job->chunks + index] = dslope;
  }
  // Keys that nobody sees, though there may be no query heads at all, have gradients of zeros.
  for (int at = 0; at < count; at += SEGMENT) {
    const int left = count - at < SEGMENT ? count - at : SEGMENT;
    if (!(chunk.met >> (at / SEGMENT) & 1)) NAME(clear_gradients)(&chunk, at, left);
  }
  if (p->dk.data) NAME(close_gradient)(&p->dk, &keys, &chunk, width, (REAL)p->scale, &chunk.dkey);
  if (p->dv.data) NAME(close_gradient)(&p->dv, &keys, &chunk, value_width, 1, &chunk.dvalue);
}

// The planes that are an item's: [batch, batch_end) and [head, head_end) of the key heads, and its chunk of keys.
typedef struct NAME(backward_share) {
  int64_t batch, batch_end, head, head_end, chunk;
} NAME(backward_share);

static NAME(backward_share) NAME(share_of)(const NAME(backward_job) * job, int64_t item) {
  const sa_problem *p = job->p;
  const int64_t group = item / job->chunks;
  const int64_t batches = p->batch / job->batch_groups, heads = p->key_heads / job->head_groups;
  const int64_t batch = group / job->head_groups * batches, head = group % job->head_groups * heads;
  return (NAME(backward_share)){batch, batch + batches, head, head + heads, item % job->chunks};
}

static void NAME(backward_item)(void *argument, int64_t item, int worker) {
  const NAME(backward_job) *job = argument;
  const sa_problem *p = job->p;
  const NAME(backward_room) room =
      NAME(take_backward)(&(sa_room){.memory = job->rooms + worker * job->room_bytes}, job);
  const NAME(backward_share) share = NAME(share_of)(job, item);
  // What the worker will likely have next.
  const bool goes_on =
      p->heads && job->blocks && item + job->workers < job->batch_groups * job->head_groups * job->chunks;
  const NAME(backward_share) following = NAME(share_of)(job, goes_on ? item + job->workers : item);
  NAME(block) next;
  if (goes_on) next = NAME(block_at)(p, following.batch, following.head * (p->heads / p->key_heads), 0, 1);
  for (int64_t batch = share.batch; batch < share.batch_end; batch++) {
    for (int64_t head = share.head; head < share.head_end; head++) {
      const bool last = batch + 1 == share.batch_end && head + 1 == share.head_end;
      NAME(backward_chunk)(job, batch, head, share.chunk, last && goes_on ? &next : NULL, following.chunk, &room);
    }
  }
}

// Which chunks each row of tiles looks at, as turns: UNSEEN, or how many before it do; last, how many in all.
static void NAME(count_turns)(const NAME(backward_job) * job) {
  const sa_plan *plan = job->p->plan;
  const int64_t tiles = job->chunk / SA_TILE, rows = plan->batch * plan->heads * plan->row_tiles;
  for (int64_t row = 0; row < rows; row++) {
    int32_t *turn_of = job->turn_of + row * (job->chunks + 1);
    for (int64_t chunk = 0; chunk < job->chunks; chunk++) turn_of[chunk] = NAME(UNSEEN);
    for (int64_t run = plan->row_start[row]; run < plan->row_start[row + 1]; run++) {
      const int64_t last = plan->row_runs[run].first + plan->row_runs[run].count - 1;
      for (int64_t chunk = plan->row_runs[run].first / tiles; chunk <= last / tiles; chunk++) turn_of[chunk] = 0;
    }
    int32_t turn = 0;
    for (int64_t chunk = 0; chunk < job->chunks; chunk++) {
      if (turn_of[chunk] != NAME(UNSEEN)) turn_of[chunk] = turn++;
    }
    turn_of[job->chunks] = turn;
  }
}

// dQ of rows of tiles that no chunk writes: nothing is visible to them.
static void NAME(clear_unseen)(const NAME(backward_job) * job) {
  const sa_problem *p = job->p;
  const REAL zeros[SA_FUSED_WIDTH] = {0};
  for (int64_t head = 0; head < p->batch * p->heads; head++) {
    const int64_t plane = sa_plan_plane(p->plan, head / p->heads, head % p->heads);
    for (int64_t query = 0; query < p->queries; query++) {
      const int64_t row = plane * p->plan->row_tiles + query / SA_TILE;
      if (job->turn_of[row * (job->chunks + 1) + job->chunks]) continue;
      NAME(write_row)(sa_at(&p->dq, head / p->heads, head % p->heads, query, 0), p->dq.dtype, (int)p->width, zeros);
    }
  }
}

// A copy in its final dtype, or, gathered in place, nothing to do; and before the work, zeros.
static void NAME(write_dbias)(const NAME(backward_job) * job, bool before) {
  const sa_problem *p = job->p;
  const int64_t *shape = p->bias_shape;
  const int64_t parts = shape[3] == 1 ? job->chunks : 1;
  if (!before == !job->dbias) return;
  for (int64_t row = 0; row < shape[0] * shape[1] * shape[2]; row++) {
    const int64_t batch = row / (shape[1] * shape[2]), head = row / shape[2] % shape[1], query = row % shape[2];
    REAL *sum = NAME(dbias_row)(job, batch, head, query);
    if (before) {
      memset(sum, 0, sizeof *sum * shape[3]);
      continue;
    }
    for (int64_t part = 1; part < parts; part++) sum[0] += sum[part * job->dbias_count];
    for (int64_t key = 0; key < shape[3]; key += KEYS) {
      const int count = shape[3] - key < KEYS ? (int)(shape[3] - key) : KEYS;
      NAME(write_row)(sa_at(&p->dbias, batch, head, query, key), p->dbias.dtype, count, sum + key);
    }
  }
}

// Sums `parts` shares per head, in order, into a gradient of shape [H].
static void NAME(write_heads)(const sa_problem *p, const sa_operand *to, const double *shares, int64_t parts) {
  for (int64_t head = 0; head < p->heads; head++) {
    double sum = 0;
    for (int64_t part = 0; part < parts; part++) sum += shares[head * parts + part];
    const REAL rounded = (REAL)sum;
    NAME(write_row)(sa_at(to, 0, head, 0, 0), to->dtype, 1, &rounded);
  }
}

// Chunks are chosen by the shape alone. dK and dV of a chunk stay in the second cache (1 MiB of its usual 2), and there
// are 16 items or more for the threads unless that takes chunks of under 256 keys, whose blocks would be packed too
// often (a block's packing costs as much as 10 keys).
static int64_t NAME(choose_chunk)(const sa_problem *p, int64_t items) {
  const int64_t row = (NAME(padded)(p->width) + NAME(padded)(p->value_width)) * (int64_t)sizeof(REAL);
  int64_t chunk = 8 * SA_TILE;
  if (chunk > p->keys) chunk = (p->keys + SA_TILE - 1) / SA_TILE * SA_TILE;
  if (chunk < SA_TILE) return SA_TILE;
  while (chunk * row > 5 << 17 && chunk > 2 * SA_TILE) chunk = (chunk / SA_TILE + 1) / 2 * SA_TILE;
  while (items * ((p->keys + chunk - 1) / chunk) < 16 && chunk > 2 * SA_TILE) {
    chunk = (chunk / SA_TILE + 1) / 2 * SA_TILE;
  }
  return chunk;
}

// What a worker needs. It is to be no more than 1 MiB, and gradients that are gathered in it are most of it: then
// chunks are shorter.
static int64_t NAME(measure_room)(NAME(backward_job) * job) {
  enum { ENOUGH = 1 << 20 };
  for (;;) {
    sa_room measure = {0};
    NAME(take_backward)(&measure, job);
    if (measure.used <= ENOUGH || job->chunk <= SA_TILE) return measure.used;
    job->chunk = (job->chunk / SA_TILE + 1) / 2 * SA_TILE;
  }
}

static void NAME(free_backward)(NAME(backward_job) * job) {
  sa_release(job->rooms);
  sa_release(job->delta);
  sa_release(job->base);
  sa_release(job->factor);
  sa_release(job->turn_of);
  sa_release(job->turns);
  sa_release(job->dq);
  sa_release(job->dbias);
  sa_release(job->dsinks);
  sa_release(job->dalibi);
}

static int NAME(backward)(const sa_problem *p) {
  enum { WIDE = 320 };
  const int64_t planes = p->batch * p->heads;
  const bool share_batches = p->dbias.data && p->bias_shape[0] == 1,
             share_heads = p->dbias.data && p->bias_shape[1] == 1;
  NAME(backward_job)
  job = {
      .p = p,
      .blocks = (p->queries + QUERIES - 1) / QUERIES,
      .batch_groups = share_batches && p->batch ? 1 : p->batch,
      .head_groups = share_heads && p->key_heads ? 1 : p->key_heads,
  };
  const int64_t groups = job.batch_groups * job.head_groups;
  // Rows of 128 keys that are wider than this do not fit beside a block's.
  job.stretch = NAME(padded)(p->width) + NAME(padded)(p->value_width) > WIDE ? SEGMENT : STRETCH;
  job.chunk = NAME(choose_chunk)(p, groups);
  job.room_bytes = NAME(measure_room)(&job);
  job.chunks = (p->keys + job.chunk - 1) / job.chunk;
  const double flops = 2 * sa_visible_pairs(p) * (3.0 * p->width + 2.0 * p->value_width);
  const int workers = job.workers = sa_workers(flops);
  const int64_t rows = p->plan->batch * p->plan->heads * p->plan->row_tiles;
  const int64_t *shape = p->bias_shape;
  job.dbias_count = shape[0] * shape[1] * shape[2] * shape[3];
  const char *name = "sa_backward";
  const int64_t real = sizeof(REAL);
  bool complete = (job.rooms = sa_allocate(name, job.room_bytes * workers)) &&
                  (job.delta = sa_allocate(name, planes * p->queries * real)) &&
                  (job.base = sa_allocate(name, planes * p->queries * real)) &&
                  (job.factor = sa_allocate(name, planes * p->queries * real)) &&
                  (job.turn_of = sa_allocate(name, rows * (job.chunks + 1) * (int64_t)sizeof *job.turn_of));
  if (complete && p->dq.data && job.chunks > 1) {
    complete = (job.turns = sa_allocate_zeroed(name, planes * job.blocks * (int64_t)sizeof *job.turns));
    if (complete && p->dq.dtype != DTYPE) {
      complete = (job.dq = sa_allocate(name, planes * p->queries * p->width * real));
    }
  }
  if (complete && p->dbias.data && (shape[3] == 1 || p->dbias.dtype != DTYPE)) {
    const int64_t parts = shape[3] == 1 && job.chunks > 1 ? job.chunks : 1;
    complete = (job.dbias = sa_allocate_zeroed(name, job.dbias_count * parts * real));
  }
  if (complete && p->dsinks.data) {
    complete = (job.dsinks = sa_allocate_zeroed(name, planes * job.blocks * (int64_t)sizeof(double)));
  }
  if (complete && p->dalibi.data) {
    complete = (job.dalibi = sa_allocate_zeroed(name, planes * job.chunks * (int64_t)sizeof(double)));
  }
  if (complete) {
    NAME(count_turns)(&job);
    if (p->dbias.data) NAME(write_dbias)(&job, true);
    if (job.chunks != 1) sa_parallel(workers, planes * job.blocks, NAME(prepare), &job);
    sa_parallel(workers, groups * job.chunks, NAME(backward_item), &job);
    if (p->dq.data) NAME(clear_unseen)(&job);
    if (p->dbias.data) NAME(write_dbias)(&job, false);
    if (p->dsinks.data) NAME(write_heads)(p, &p->dsinks, job.dsinks, p->batch * job.blocks);
    if (p->dalibi.data) NAME(write_heads)(p, &p->dalibi, job.dalibi, p->batch * job.chunks);
  }
  NAME(free_backward)(&job);
  return complete ? SA_OK : SA_NO_MEMORY;
}
