// a block of queries against a stretch of keys, backward: P and dS, and what they give to each gradient; part of
// flash_backward.h

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

static inline __attribute__((always_inline)) void NAME(differentiate_so)(const NAME(block) * block,
                                                                         const sa_stretch *stretch, NAME(pairing) by,
                                                                         bool plain, REAL *scores, REAL *dscores) {
  const NAME(vector) unit = NAME(set)(block->unit), zero = NAME(set)(0);
  const NAME(vector) more = NAME(set)((REAL)(1 / (1 - block->p->dropout)));
  for (int j = 0; j < block->vectors; j++) {
    const NAME(vector) base = NAME(load)(by.base + j * LANES), delta = NAME(load)(by.delta + j * LANES);
    const NAME(vector) factor = by.factor ? NAME(load)(by.factor + j * LANES) : zero;
    // What is added to scores has gradients that read all pairs.
    const sa_extent reach = plain ? NAME(reach)(stretch, j) : (sa_extent){0, stretch->count};
    REAL *s = scores + reach.first * NAME(ROW) + j * LANES, *ds = dscores + reach.first * NAME(ROW) + j * LANES;
    for (int r = reach.first; r < reach.end; r++, s += NAME(ROW), ds += NAME(ROW)) {
      NAME(vector) x = NAME(load)(s) - base;
      if (!plain) x = x * unit;
      NAME(vector) weight = by.visible ? NAME(exp2_where)(by.visible[r] >> (j * LANES), x) : NAME(exp2)(x);
      if (by.factor) weight = weight * factor;
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
// and on dP in dS: `scores` becomes what dV wants. A loop for what is common, so that it asks nothing at every vector.
static void NAME(differentiate)(const NAME(block) * block, const sa_stretch *stretch, const NAME(pairing) * by,
                                REAL *scores, REAL *dscores) {
  const NAME(pairing) common = {NULL, NULL, by->base, NULL, by->delta};
  NAME(pairing) masked = common;
  masked.visible = by->visible;
  if (!block->plain || by->kept || by->factor)
    NAME(differentiate_so)(block, stretch, *by, block->plain, scores, dscores);
  else if (by->visible)
    NAME(differentiate_so)(block, stretch, masked, true, scores, dscores);
  else
    NAME(differentiate_so)(block, stretch, common, true, scores, dscores);
}

static inline __attribute__((always_inline)) void NAME(differentiate_whole_so)(const NAME(block) * block,
                                                                               const sa_stretch *stretch,
                                                                               const uint64_t *visible, bool plain,
                                                                               const REAL *base, REAL *scores,
                                                                               REAL *dscores) {
  const NAME(vector) unit = NAME(set)(block->unit), zero = NAME(set)(0);
  for (int j = 0; j < block->vectors; j++) {
    const NAME(vector) from = NAME(load)(base + j * LANES);
    const sa_extent reach = plain ? NAME(reach)(stretch, j) : (sa_extent){0, stretch->count};
    REAL *s = scores + reach.first * NAME(ROW) + j * LANES, *ds = dscores + reach.first * NAME(ROW) + j * LANES;
    NAME(vector) sum = zero, dot = zero;
    for (int r = reach.first; r < reach.end; r++, s += NAME(ROW), ds += NAME(ROW)) {
      NAME(vector) x = NAME(load)(s) - from, dweight = NAME(load)(ds);
      if (!plain) x = x * unit;
      const NAME(vector) weight = visible ? NAME(exp2_where)(visible[r] >> (j * LANES), x) : NAME(exp2)(x);
      if (visible) dweight = NAME(select)(visible[r] >> (j * LANES), dweight, zero);
      NAME(store)(s, weight);
      sum = sum + weight;
      dot = NAME(fma)(weight, dweight, dot);
    }
    // Rows without a key have weights of 0.
    const NAME(vector) factor = NAME(select)(NAME(below_or_equal)(sum, zero), zero, NAME(set)(1) / sum);
    const NAME(vector) delta = dot * factor;
    s = scores + reach.first * NAME(ROW) + j * LANES, ds = dscores + reach.first * NAME(ROW) + j * LANES;
    for (int r = reach.first; r < reach.end; r++, s += NAME(ROW), ds += NAME(ROW)) {
      const NAME(vector) weight = NAME(load)(s) * factor, dscore = weight * (NAME(load)(ds) - delta);
      NAME(store)(s, visible ? NAME(select)(visible[r] >> (j * LANES), weight, zero) : weight);
      NAME(store)(ds, visible ? NAME(select)(visible[r] >> (j * LANES), dscore, zero) : dscore);
    }
  }
}

// The same for queries that see no other keys: the sums of their weights and delta are those of the pairs themselves,
// and so err with them, not with an LSE and an output that were rounded. A row of one key gets a dS of 0. Some 2 % of a
// backward of 128 keys.
static void NAME(differentiate_whole)(const NAME(block) * block, const sa_stretch *stretch, const uint64_t *visible,
                                      const REAL *base, REAL *scores, REAL *dscores) {
  if (!block->plain)
    NAME(differentiate_whole_so)(block, stretch, visible, false, base, scores, dscores);
  else if (visible)
    NAME(differentiate_whole_so)(block, stretch, visible, true, base, scores, dscores);
  else
    NAME(differentiate_whole_so)(block, stretch, NULL, true, base, scores, dscores);
}

// What of dS^T is visible is looked at, what else there is may be anything.
static void NAME(note_dscores)(const NAME(block) * block, const sa_stretch *stretch, const REAL *dscores,
                               atomic_int *sizes) {
  for (int j = 0; j < block->vectors; j++) {
    const sa_extent reach = NAME(reach)(stretch, j);
    const int left = block->count - j * LANES;
    NAME(note_sizes)
    (sizes, dscores + reach.first * NAME(ROW) + j * LANES, NAME(ROW), reach.end - reach.first,
     left < LANES ? left : LANES);
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

// The rows of dBias that a stretch adds to, and those of the bias that `coming` reads, which the block `after` looks at
// next; NULL: no block does. Of heads that take turns, all but the first find both in the second cache.
static sa_forecast NAME(foresee_biases)(const NAME(backward_job) * job, const NAME(block) * block,
                                        const sa_stretch *stretch, const NAME(block) * after,
                                        const sa_stretch *coming) {
  const int64_t *shape = job->p->bias_shape;
  sa_forecast forecast = {0};
  if (job->p->dbias.data && shape[2] != 1 && shape[3] != 1 && block->key_head % job->together == 0) {
    const REAL *rows = NAME(dbias_row)(job, block->batch, block->head, block->query);
    const int64_t stride = job->dbias ? shape[3] : job->p->dbias.stride[2];
    sa_forecast_add(&forecast, rows + stretch->first, stride * (int64_t)sizeof *rows,
                    stretch->count * (int64_t)sizeof *rows, block->count);
  }
  if (after && after->key_head % job->together == 0) {
    NAME(foresee_bias)(&forecast, after, coming->first, coming->count);
  }
  return forecast;
}

// dBias += dS, in the order in which the item meets it.
static void NAME(add_dbias)(const NAME(backward_job) * job, const NAME(block) * block, const sa_stretch *stretch,
                            int64_t chunk, const REAL *dscores) {
  const bool broadcast = job->p->bias_shape[3] == 1;
  for (int first = 0; first < block->count; first += LANES) {
    REAL *rows[LANES];
    const int queries = block->count - first < LANES ? block->count - first : LANES;
    for (int i = 0; i < queries; i++) {
      rows[i] = NAME(dbias_row)(job, block->batch, block->head, block->query + first + i);
      rows[i] += broadcast ? chunk * job->dbias_count : stretch->first;
    }
    int r = 0;
    for (; !broadcast && r + LANES <= stretch->count; r += LANES) {
      NAME(vector) column[LANES];
      NAME(columns_of)(dscores + r * NAME(ROW) + first, NAME(ROW), column);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) {
        if (i < queries) NAME(store)(rows[i] + r, NAME(load)(rows[i] + r) + column[i]);
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
    // Behind the last query is NaN where a key holds it or an infinity.
    for (int i = 0; i < LANES && j * LANES + i < block->count; i++) sum -= (double)shares[i];
  }
  return sum;
}

static void NAME(clear_gradients)(const NAME(chunk) * chunk, int64_t first, int count) {
  for (int i = 0; i < 2; i++) {
    const NAME(gradient) *gradient = i ? &chunk->dvalue : &chunk->dkey;
    if (gradient->rows) NAME(clear_rows)(gradient, first, count);
  }
}

// Bits of the segments that a stretch is.
static uint64_t NAME(segments_of)(const NAME(chunk) * chunk, const sa_stretch *stretch) {
  return (uint64_t)(stretch->count > SEGMENT ? 3 : 1) << (stretch->first - chunk->first) / SEGMENT;
}

// Looks at the keys of a stretch when nobody has before. Returns whether all of them are new, so that their gradients
// are still to be written; those of a half that is new are cleared.
static bool NAME(meet_keys)(const NAME(block) * block, const sa_stretch *stretch, NAME(chunk) * chunk) {
  const int64_t offset = stretch->first - chunk->first;
  const uint64_t all = NAME(segments_of)(chunk, stretch), fresh = all & ~chunk->met;
  if (!fresh) return false;
  chunk->met |= all;
  chunk->wild |= NAME(wild_keys)(block, stretch->first, stretch->count);
  if (fresh == all) return true;
  const bool second = fresh >> (offset / SEGMENT) == 2;
  const int half = second ? stretch->count - SEGMENT : SEGMENT;
  NAME(clear_gradients)(chunk, offset + (second ? SEGMENT : 0), half);
  return false;
}

// One block of queries against one stretch of a chunk's keys. `scoring`: what to call for during the products of dP and
// the scores.
static void NAME(backward_stretch)(const NAME(backward_job) * job, const NAME(block) * block, sa_stretch *stretch,
                                   sa_forecast *scoring, NAME(chunk) * chunk, uint64_t dead, bool factor,
                                   const NAME(query_rows) * query, const NAME(query_rows) * dout, bool first,
                                   bool whole, const NAME(gradient) * dquery, const NAME(backward_room) * room,
                                   double *dslope) {
  const sa_problem *p = job->p;
  const int width = (int)p->width, keys = stretch->count;
  int64_t key_stride;
  const NAME(element) *key =
      NAME(rows_of)(&p->k, block, stretch->first, keys, width, true, room->products.key_rows, &key_stride);
  stretch->outline = NAME(outline)(block, stretch, &room->stretch);
  sa_stretch scored = *stretch;
  scored.forecast = scoring;
  const uint64_t *visible = NAME(score)(block, &scored, key, key_stride, room->packed_query, &room->stretch, NULL);
  REAL *weights = room->stretch.scores, *dscores = room->dscores;
  const int64_t offset = stretch->first - chunk->first;
  bool fresh = NAME(meet_keys)(block, stretch, chunk);
  // What is not finite is given before a product, which may take the pairs apart (amx_product.h), adds to it.
  if (fresh && (query->wild || dout->wild)) {
    NAME(clear_gradients)(chunk, offset, keys);
    fresh = false;
  }
  NAME(dweight_product)(block, &scored, &room->products, dscores);
  const uint64_t *kept = NAME(keep)(block, stretch, &room->stretch);
  const NAME(pairing) by = {visible, kept, room->base, factor ? room->factor : NULL, room->delta};
  if (whole)
    NAME(differentiate_whole)(block, stretch, visible, room->base, weights, dscores);
  else
    NAME(differentiate)(block, stretch, &by, weights, dscores);
  if (job->sizes) NAME(note_dscores)(block, stretch, dscores, job->sizes);
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
    (block, stretch, visible, key, key_stride, dscores, chunk->wild, first, &room->products, dquery);
  }
}
