// the backward pass, for one REAL; part of flash.h
//
// Reaches 84 to 88 % of the fused multiply-add peak in f32 and 76 to 81 % in f64 (D64 and D128, one core, AVX-512 and
// AVX2; bench/attention.lua bars): five products to one pass of exponentials, which takes 4 %. Heads of 128 tokens come
// to 79 %: packing, the rows' constants and memory that is touched for the first time weigh more there.
//
// Work is shared out by chunks of keys: an item owns dK and dV of its chunk, which are gathered where they are wanted,
// and walks the blocks of queries past it, with a block's dQ at rest in the first cache: where it belongs when no other
// chunk looks at the block and nothing is left to be done with it. Blocks of dQ that several chunks add to are added to
// in the order of the chunks, each waiting for its turn, so that the bits depend on the shape alone and no second copy
// of dQ is needed. The first chunks of all heads come before the second of any: under a causal mask a head's second has
// a third of the first's work, but beside it would wait for it at every block, and 2 threads were 1.33 times as fast as
// 1.
//
// Half types have dQ gathered in float, which for all heads would be as much again as Q and K: so heads come in
// windows, of one a thread at least, and a head's dQ is where that of a head of the last window was, a block as soon as
// that was written. That a chunk has to wait for it is rare: the last ones of a window have begun before.
//
// Heads that share dBias are one item's, and some of them take turns at every block of queries, so that its rows of the
// bias and of dBias are in the second cache for all but the first.
//
// 0 * NaN could leak through the products that sum over pairs: dS K into dQ, P^T dO into dV, dS^T Q into dK. What is
// not finite in K, Q or dO is known before (a look at a row of K when the chunk first meets it, at others once a
// block); tiles that it touches use copies with 0 in its place and then give it to the pairs that see it. Rows without
// a key are packed as zeros.

typedef struct NAME(backward_job) {
  const sa_problem *p;
  int64_t blocks;                     // of queries
  int64_t chunks, chunk;              // of keys: how many, and keys in one, at most
  int64_t whole;                      // chunks before the last, which are as long as that; the others are halves
  int stretch;                        // keys that a block looks at together, at most
  int64_t batch_groups, head_groups;  // items per chunk: planes that share a dBias are one item's, in order
  int together;                       // key heads of an item that take turns at every block of queries
  int64_t window;                     // groups whose chunks come before those of the next, dQ where theirs was
  int workers;
  char *memory;  // a room for each worker, then what follows
  int64_t room_bytes;
  REAL *delta;        // [B,H,L]: dO . o - dLSE
  REAL *base;         // [B,H,L]: what scores are relative to, in the block's unit
  REAL *factor;       // [B,H,L]: and what weights are then to be multiplied by, or dO and delta in their place
  int32_t *turn_of;   // per plane, row of tiles and chunk: how many chunks before it the row looks at
  atomic_int *turns;  // per batch, head and block: chunks that have added to its dQ
  REAL *dq;           // [window][planes of a group][L,E], when dQ is gathered over chunks and its dtype is narrower
  REAL *dbias;        // in bias_shape, per chunk when keys are broadcast; NULL: dBias is gathered in place
  int64_t dbias_count;
  atomic_int *sizes;  // of dS, where small numbers may be lost to dP (flash_sizes.h); NULL: they are not
  double *dsinks;     // [H][B][blocks]
  double *dalibi;     // [H][B][chunks]
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
  REAL *dkey, *dvalue;          // [together][chunk]: rows, or tails, of dK and dV that are not gathered in place
  NAME(stretch_room) stretch;
} NAME(backward_room);

// A chunk of the keys of one head, and where its gradients are gathered. Whoever comes first to some keys looks at them
// and writes their gradients instead of adding: to do so before for all of them would be to wait for memory.
typedef struct NAME(chunk) {
  int64_t index, first;
  int count;
  uint64_t met;     // bits of the segments that some block has looked at
  uint64_t called;  // and of those whose keys are called for, or were when they were looked at
  bool wild;        // something in K is not finite there
  NAME(gradient) dkey, dvalue;
} NAME(chunk);

// WORKER: the bytes that a worker gets.
enum { NAME(UNSEEN) = -1, NAME(TOGETHER) = 8, NAME(WORKER) = 1 << 20 };

// A gradient of a chunk's keys is gathered in place, but for what is beyond its last whole vector, unless it has
// another dtype.
static int64_t NAME(gradient_room)(const NAME(backward_job) * job, const sa_operand *x, int64_t width) {
  const int64_t row = x->dtype != DTYPE ? NAME(padded)(width) : width % LANES ? LANES : 0;
  return x->data ? job->chunk * row : 0;
}

static NAME(backward_room) NAME(take_backward)(sa_room *room, const NAME(backward_job) * job) {
  const sa_problem *p = job->p;
  const int64_t width = NAME(padded)(p->width), value_width = NAME(padded)(p->value_width);
  return (NAME(backward_room)){
      .packed_query = sa_room_take(room, NAME(query_room)(p) * (int64_t)sizeof(NAME(element))),
      .products = NAME(take_backward_products)(room, p, job->stretch, job->sizes),
      .query = NAME(take)(room, QUERIES * width),
      .dout = NAME(take)(room, QUERIES * value_width),
      .base = NAME(take)(room, QUERIES),
      .factor = NAME(take)(room, QUERIES),
      .again = {.peak = NAME(take)(room, QUERIES), .sum = NAME(take)(room, QUERIES)},
      .delta = NAME(take)(room, QUERIES),
      .dscores = NAME(take)(room, job->stretch * NAME(ROW)),
      .dquery = NAME(take)(room, QUERIES * width),
      .dkey = NAME(take)(room, job->together * NAME(gradient_room)(job, &p->dk, p->width)),
      .dvalue = NAME(take)(room, job->together * NAME(gradient_room)(job, &p->dv, p->value_width)),
      .stretch = NAME(take_stretch)(room, p, job->stretch, true),
  };
}

// The first key of a chunk, or, behind the last one, where it would be: a whole number of tiles. What the whole chunks
// leave is halved, and what is left of that again, as long as there are chunks.
static int64_t NAME(chunk_start)(const NAME(backward_job) * job, int64_t index) {
  const int64_t whole = index < job->whole ? index : job->whole, start = whole * job->chunk;
  int64_t left = (job->p->keys - start + SA_TILE - 1) / SA_TILE, tiles = 0;
  for (int64_t at = whole; at < index; at++) {
    const int64_t taken = at + 1 < job->chunks ? (left + 1) / 2 : left;
    tiles += taken;
    left -= taken;
  }
  return start + tiles * SA_TILE;
}

// How many keys a chunk has.
static int64_t NAME(chunk_length)(const NAME(backward_job) * job, int64_t index) {
  const int64_t end = NAME(chunk_start)(job, index + 1);
  return (end < job->p->keys ? end : job->p->keys) - NAME(chunk_start)(job, index);
}

static int64_t NAME(chunk_of_tile)(const NAME(backward_job) * job, int64_t tile) {
  int64_t index = tile * SA_TILE / job->chunk;
  if (index > job->whole) index = job->whole;
  while (NAME(chunk_start)(job, index + 1) <= tile * SA_TILE) index++;
  return index;
}

static const int32_t *NAME(turns_of)(const NAME(backward_job) * job, const NAME(block) * block) {
  const int64_t row = block->plane * job->p->plan->row_tiles + block->query / SA_TILE;
  return job->turn_of + row * (job->chunks + 1);
}

// Whether one chunk alone looks at a block, or none: the chunk then prepares it, which brings rows to the caches that
// it needs anyway, and writes its dQ.
static bool NAME(looks_alone)(const NAME(backward_job) * job, const NAME(block) * block) {
  return job->chunks == 1 || NAME(turns_of)(job, block)[job->chunks] == 1;
}

// The scale of the scores reaches dQ and dK through dO and delta (scales_dout), or is left to the end.
static REAL NAME(scale_in_advance)(const sa_problem *p) {
  return NAME(scales_dout)(p) ? (REAL)p->scale : 1;
}
static REAL NAME(scale_left)(const sa_problem *p) {
  return NAME(scales_dout)(p) ? 1 : (REAL)p->scale;
}

#include "kernels/cpu/flash_queries.h"

#include "kernels/cpu/flash_gradient.h"

static void NAME(write_dquery)(const NAME(block) * block, int i, const REAL *sum) {
  const sa_problem *p = block->p;
  const int width = (int)p->width;
  const REAL scale = NAME(scale_left)(p);
  REAL converted[SA_FUSED_WIDTH];
  void *const dq = sa_at(&p->dq, block->batch, block->head, block->query + i, 0);
  REAL *const to = p->dq.dtype == DTYPE ? dq : converted;
  for (int d = 0; d < width; d++) to[d] = sum[d] * scale;
  if (to == converted) NAME(write_row)(dq, p->dq.dtype, width, to);
}

// The planes of a group: of every so many batches, and heads.
static int64_t NAME(group_batches)(const NAME(backward_job) * job) {
  return job->p->batch / job->batch_groups;
}
static int64_t NAME(group_heads)(const NAME(backward_job) * job) {
  return job->p->heads / job->head_groups;
}

static int64_t NAME(group_of)(const NAME(backward_job) * job, const NAME(block) * block) {
  return block->batch / NAME(group_batches)(job) * job->head_groups + block->head / NAME(group_heads)(job);
}

// Where dQ of a block is gathered over chunks, when not in place.
static REAL *NAME(dquery_sums)(const NAME(backward_job) * job, const NAME(block) * block) {
  const int64_t batches = NAME(group_batches)(job), heads = NAME(group_heads)(job);
  const int64_t plane = block->batch % batches * heads + block->head % heads;
  const int64_t row = (NAME(group_of)(job, block) % job->window * batches * heads + plane) * job->p->queries;
  return job->dq + (row + block->query) * job->p->width;
}

static atomic_int *NAME(turn_at)(const NAME(backward_job) * job, const NAME(block) * block) {
  return &job->turns[(block->batch * job->p->heads + block->head) * job->blocks + block->query / QUERIES];
}

// Waits until so many chunks have added to a block's dQ. They are handed out before the one that waits, so they are
// done or at work.
static void NAME(wait_for_turn)(const NAME(backward_job) * job, const NAME(block) * block, int32_t turn) {
  while (atomic_load_explicit(NAME(turn_at)(job, block), memory_order_acquire) != turn) {
    if (sa_interrupt_pending()) return;
    sched_yield();
  }
}

// Waits until the block whose dQ was gathered in the same place has it written.
static void NAME(wait_for_place)(const NAME(backward_job) * job, const NAME(block) * block) {
  const int64_t batches = NAME(group_batches)(job), heads = NAME(group_heads)(job);
  for (int64_t group = NAME(group_of)(job, block) - job->window; group >= 0; group -= job->window) {
    NAME(block) before = *block;
    before.batch = group / job->head_groups * batches + block->batch % batches;
    before.head = group % job->head_groups * heads + block->head % heads;
    before.plane = sa_plan_plane(job->p->plan, before.batch, before.head);
    const int32_t all = NAME(turns_of)(job, &before)[job->chunks];
    if (all <= 1) continue;  // it was not gathered
    NAME(wait_for_turn)(job, &before, all);
    return;
  }
}

// Adds a chunk's share of a block's dQ when its turn has come; the last one writes it out.
static void NAME(add_dquery)(const NAME(backward_job) * job, const NAME(block) * block, int64_t chunk,
                             const REAL *share) {
  const sa_problem *p = job->p;
  const int32_t *turn_of = NAME(turns_of)(job, block);
  const int32_t mine = turn_of[chunk], all = turn_of[job->chunks];
  NAME(wait_for_turn)(job, block, mine);
  if (job->dq && !mine) NAME(wait_for_place)(job, block);
  REAL *const sums = job->dq ? NAME(dquery_sums)(job, block) : NULL;
  for (int i = 0; i < block->count; i++, share += NAME(padded)(p->width)) {
    REAL *sum = sums ? sums + i * p->width : sa_at(&p->dq, block->batch, block->head, block->query + i, 0);
    for (int d = 0; d < p->width; d++) sum[d] = mine ? sum[d] + share[d] : share[d];
    if (mine + 1 == all) NAME(write_dquery)(block, i, sum);
  }
  atomic_store_explicit(NAME(turn_at)(job, block), mine + 1, memory_order_release);
}

static sa_walk NAME(walk_chunk)(const NAME(backward_job) * job, const NAME(block) * block, int64_t chunk) {
  return sa_walk_start(job->p->plan, block->plane, block->query, block->count, NAME(chunk_start)(job, chunk) / SA_TILE,
                       NAME(chunk_start)(job, chunk + 1) / SA_TILE, job->stretch);
}

// The keys of a chunk that the block `after` will be the first to look at, and the rows of their gradients; `block` is
// what looks at keys now, maybe those of another head.
static void NAME(foresee_fresh)(sa_forecast *forecast, const NAME(backward_job) * job, const NAME(block) * block,
                                const NAME(block) * after, NAME(chunk) * chunk) {
  const sa_problem *p = job->p;
  const int segments = (chunk->count + SEGMENT - 1) / SEGMENT;
  if (!(~(chunk->met | chunk->called) & ~UINT64_C(0) >> (64 - segments))) return;
  sa_stretch stretch;
  sa_walk walk = NAME(walk_chunk)(job, block, chunk->index);
  while (block->key_head == after->key_head && sa_walk_next(&walk, &stretch)) {
    chunk->called |= NAME(segments_of)(chunk, &stretch);
  }
  walk = NAME(walk_chunk)(job, after, chunk->index);
  while (sa_walk_next(&walk, &stretch)) {
    const uint64_t fresh = NAME(segments_of)(chunk, &stretch) & ~(chunk->met | chunk->called);
    if (!fresh) continue;
    chunk->called |= fresh;
    NAME(foresee_keys)(forecast, after, stretch.first, stretch.count);
    for (int i = 0; i < 2; i++) {
      const sa_operand *x = i ? &p->dv : &p->dk;
      const int64_t width = i ? p->value_width : p->width;
      if (x->data && x->dtype == DTYPE)
        NAME(foresee)(forecast, x, sa_at(x, after->batch, after->key_head, stretch.first, 0), width, stretch.count);
    }
    return;
  }
}

// The block that is at work in a turn of so many key heads.
static NAME(block)
    NAME(block_of_turn)(const NAME(backward_job) * job, int64_t batch, int64_t key_head, int together, int64_t turn) {
  const int64_t group = job->p->heads / job->p->key_heads, at = turn / together;
  const int64_t head = (key_head + turn % together) * group + at / job->blocks;
  return NAME(block_at)(job->p, batch, head, at % job->blocks, 1);
}

// What comes after a block: another (NULL: none) with its chunk, of which keys are called for when it is `near`.
typedef struct NAME(following) {
  const NAME(block) * block;
  int64_t index;
  NAME(chunk) * near;
} NAME(following);

// What will be wanted while a block is at work and after it: the rows of dQ and the block that follows.
static sa_forecast NAME(foresee_block)(const NAME(backward_job) * job, const NAME(block) * block,
                                       const NAME(following) * following) {
  const sa_problem *p = job->p;
  sa_forecast forecast = {0};
  if (job->dq && !NAME(looks_alone)(job, block)) {
    const int64_t row = p->width * (int64_t)sizeof(REAL);
    sa_forecast_add(&forecast, NAME(dquery_sums)(job, block), row, row, block->count);
  } else if (p->dq.data) {
    NAME(foresee)(&forecast, &p->dq, NAME(row_at)(&p->dq, block, 0), p->width, block->count);
  }
  const NAME(block) *after = following->block;
  if (after) {
    const sa_operand *dout = &p->dout, *out = &p->out;
    NAME(foresee)(&forecast, &p->q, NAME(row_at)(&p->q, after, 0), p->width, after->count);
    if (dout->data) NAME(foresee)(&forecast, dout, NAME(row_at)(dout, after, 0), p->value_width, after->count);
    if (NAME(looks_alone)(job, after))
      NAME(foresee)(&forecast, out, NAME(row_at)(out, after, 0), p->value_width, after->count);
    if (following->near) NAME(foresee_fresh)(&forecast, job, block, after, following->near);
  }
  return forecast;
}

// What the next chunk begins with, and the gradients: its own where they are gathered in place, else this chunk's,
// which are to be written. Long chunks have other things to call for.
static sa_forecast NAME(foresee_chunk)(const NAME(backward_job) * job, const NAME(block) * keys, int64_t index,
                                       const NAME(following) * following) {
  const sa_problem *p = job->p;
  const NAME(block) *next = following->block;
  const int64_t next_index = following->index;
  sa_forecast forecast = {0};
  if (!next || job->chunk > 2 * SA_TILE) return forecast;
  NAME(foresee_keys)
  (&forecast, next, NAME(chunk_start)(job, next_index), NAME(chunk_length)(job, next_index));
  for (int i = 0; i < 2; i++) {
    const sa_operand *x = i ? &p->dv : &p->dk;
    const int64_t width = i ? p->value_width : p->width;
    const bool in_place = x->dtype == DTYPE;
    const NAME(block) *of = in_place ? next : keys;
    const int64_t wanted = in_place ? next_index : index;
    const int64_t first = NAME(chunk_start)(job, wanted), count = NAME(chunk_length)(job, wanted);
    if (x->data) NAME(foresee)(&forecast, x, sa_at(x, of->batch, of->key_head, first, 0), width, count);
  }
  return forecast;
}

// What prepare_block found, and beyond the last query what makes weights of 0; delta times the factor where dO takes
// it. Returns whether some row has a factor.
static bool NAME(take_rows)(const NAME(backward_job) * job, const NAME(block) * block,
                            const NAME(backward_room) * room) {
  const int64_t first = (block->batch * job->p->heads + block->head) * job->p->queries + block->query;
  bool factor = false;
  for (int i = 0; i < block->count; i++) {
    room->base[i] = job->base[first + i];
    room->factor[i] = job->factor[first + i];
    room->delta[i] = job->delta[first + i] * (NAME(weighs_dout)(job->p) ? room->factor[i] : 1);
    factor |= room->factor[i] != 1;
  }
  for (int i = block->count; i < block->vectors * LANES; i++) {
    room->base[i] = (REAL)INFINITY;
    room->factor[i] = 1;
    room->delta[i] = 0;
  }
  return factor;
}

// Where a block's dQ is gathered against a chunk: in place, where nothing is left to be done with it.
static NAME(gradient)
    NAME(open_dquery)(const NAME(backward_job) * job, const NAME(block) * block, const NAME(backward_room) * room) {
  const sa_operand *dq = &job->p->dq;
  const int width = (int)job->p->width, columns = NAME(columns)(width);
  const bool alone = NAME(looks_alone)(job, block) && NAME(scales_dout)(job->p);
  if (dq->data && dq->dtype == DTYPE && alone && columns == width && NAME(apart)(dq->stride[2])) {
    return (NAME(gradient)){.rows = NAME(row_at)(dq, block, 0), .row = dq->stride[2], .columns = columns};
  }
  return (NAME(gradient)){.rows = room->dquery, .row = NAME(padded)(width), .columns = columns};
}

// Whether the walk of a block that looks at one chunk alone is one stretch, with nothing but the pairs in the sum of
// the weights and in delta. Of half types only, whose out was rounded: in float it took 5 % of a backward of 128 keys.
static bool NAME(sees_one_stretch)(const NAME(backward_job) * job, const NAME(block) * block, sa_walk walk) {
  const sa_problem *p = job->p;
  sa_stretch stretch;
  if (p->out.dtype == DTYPE || p->sinks.data || p->dlse.data || !p->dout.data || p->dropout > 0) return false;
  return NAME(looks_alone)(job, block) && sa_walk_next(&walk, &stretch) && !sa_walk_next(&walk, &stretch);
}

// Where dBias is gathered in place, by rows of each query's own, who comes first to a block's part of a chunk clears
// it, which is in the caches then.
static bool NAME(clears_dbias)(const sa_problem *p) {
  const int64_t *shape = p->bias_shape;
  return p->dbias.data && p->dbias.dtype == DTYPE && shape[2] != 1 && shape[3] != 1 && p->batch && p->heads;
}

static void NAME(clear_dbias)(const NAME(backward_job) * job, const NAME(block) * block, const NAME(chunk) * chunk) {
  const int64_t *shape = job->p->bias_shape;
  if (!NAME(clears_dbias)(job->p) || (shape[0] == 1 && block->batch) || (shape[1] == 1 && block->head)) return;
  for (int i = 0; i < block->count; i++) {
    REAL *row = NAME(dbias_row)(job, block->batch, block->head, block->query + i);
    memset(row + chunk->first, 0, sizeof *row * chunk->count);
  }
}

// One block of queries of one head against a whole chunk.
static void NAME(backward_block)(const NAME(backward_job) * job, const NAME(block) * block, NAME(chunk) * chunk,
                                 const NAME(following) * following, sa_forecast *forecast,
                                 const NAME(backward_room) * room, double *dslope) {
  const sa_problem *p = job->p;
  // Whether the row of tiles looks at this chunk is the plan's word, the same for both halves of a tile.
  const bool looks = NAME(turns_of)(job, block)[chunk->index] != NAME(UNSEEN);
  if (job->chunks == 1 || (looks && NAME(looks_alone)(job, block))) NAME(prepare_block)(job, block, room);
  NAME(clear_dbias)(job, block, chunk);
  if (!looks) return;
  const uint64_t dead = NAME(dead_rows)(block);
  const bool factor = NAME(take_rows)(job, block, room);
  NAME(pack_query)(block, dead, room->packed_query);
  const REAL *factors = factor && NAME(weighs_dout)(p) ? room->factor : NULL;
  const NAME(query_rows) query = NAME(rows_of_queries)(&p->q, block, (int)p->width, dead, NULL, room->query);
  const NAME(query_rows) dout = NAME(rows_of_queries)(&p->dout, block, (int)p->value_width, dead, factors, room->dout);
  NAME(open_queries)(block, dead, query.rows, dout.rows, factors, &room->products);
  const NAME(gradient) dquery = NAME(open_dquery)(job, block, room);
  bool first = true;
  sa_walk walk = NAME(walk_chunk)(job, block, chunk->index);
  const bool whole = NAME(sees_one_stretch)(job, block, walk);
  const NAME(block) *after = following->block;
  sa_stretch stretch, coming = {0};
  for (bool more = sa_walk_next(&walk, &stretch); more; first = false, stretch = coming) {
    sa_forecast biases, *scoring = stretch.forecast = forecast;
    more = sa_walk_next(&walk, &coming);
    if (forecast && p->bias.data) {
      sa_walk beyond;
      sa_stretch start = coming;
      if (!more && after) beyond = NAME(walk_chunk)(job, after, following->index);
      const bool starts = !more && after && sa_walk_next(&beyond, &start);
      biases = NAME(foresee_biases)(job, block, &stretch, more ? block : starts ? after : NULL, &start);
      scoring = &biases;
    }
    NAME(backward_stretch)
    (job, block, &stretch, scoring, chunk, dead, factor && !factors, &query, &dout, first, whole, &dquery, room,
     dslope);
  }
  if (!p->dq.data) return;
  if (first)
    NAME(clear_rows)(&dquery, 0, block->count);
  else
    NAME(close_queries)(block, &room->products, dquery.rows);
  if (!NAME(looks_alone)(job, block)) {
    NAME(add_dquery)(job, block, chunk->index, room->dquery);
  } else if (dquery.rows == room->dquery) {
    for (int i = 0; i < block->count; i++) NAME(write_dquery)(block, i, room->dquery + i * dquery.row);
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

static void NAME(close_chunk)(const NAME(backward_job) * job, const NAME(block) * keys, NAME(chunk) * chunk) {
  const sa_problem *p = job->p;
  // Keys that nobody sees, though there may be no query heads at all, have gradients of zeros.
  for (int at = 0; at < chunk->count; at += SEGMENT) {
    const int left = chunk->count - at < SEGMENT ? chunk->count - at : SEGMENT;
    if (!(chunk->met >> (at / SEGMENT) & 1)) NAME(clear_gradients)(chunk, at, left);
  }
  if (p->dk.data) NAME(close_gradient)(&p->dk, keys, chunk, (int)p->width, NAME(scale_left)(p), &chunk->dkey);
  if (p->dv.data) NAME(close_gradient)(&p->dv, keys, chunk, (int)p->value_width, 1, &chunk->dvalue);
}

// A chunk of `together` key heads from `key_head` on, which take turns at every block of queries; of each key head, all
// query heads that read it, one after the other.
static void NAME(backward_chunk)(const NAME(backward_job) * job, int64_t batch, int64_t key_head, int together,
                                 int64_t index, const NAME(following) * next, const NAME(backward_room) * room) {
  const sa_problem *p = job->p;
  const int width = (int)p->width, value_width = (int)p->value_width;
  const int64_t group = p->heads / p->key_heads, first = NAME(chunk_start)(job, index);
  const int count = (int)NAME(chunk_length)(job, index);
  NAME(block) keys[NAME(TOGETHER)];
  NAME(chunk) chunks[NAME(TOGETHER)];
  for (int n = 0; n < together; n++) {
    keys[n] = (NAME(block)){.p = p, .batch = batch, .key_head = key_head + n};
    REAL *dkey = room->dkey + n * NAME(gradient_room)(job, &p->dk, width);
    REAL *dvalue = room->dvalue + n * NAME(gradient_room)(job, &p->dv, value_width);
    chunks[n] = (NAME(chunk)){.index = index,
                              .first = first,
                              .count = count,
                              .dkey = NAME(open_gradient)(&p->dk, &keys[n], first, width, dkey),
                              .dvalue = NAME(open_gradient)(&p->dv, &keys[n], first, value_width, dvalue)};
  }
  sa_forecast far = NAME(foresee_chunk)(job, &keys[0], index, next);
  const int64_t turns = group * job->blocks * together;
  for (int64_t turn = 0; turn < turns && !sa_interrupt_pending(); turn++) {
    const NAME(block) block = NAME(block_of_turn)(job, batch, key_head, together, turn);
    NAME(chunk) *chunk = &chunks[turn % together];
    NAME(following) following = *next;
    NAME(block) after;
    if (turn + 1 < turns) {
      after = NAME(block_of_turn)(job, batch, key_head, together, turn + 1);
      following = (NAME(following)){&after, index, &chunks[(turn + 1) % together]};
    }
    sa_forecast forecast = NAME(foresee_block)(job, &block, &following);
    const int near = forecast.parts;
    sa_forecast_append(&forecast, &far, 0);
    double *dslope = job->dalibi ? &job->dalibi[(block.head * p->batch + batch) * job->chunks + index] : NULL;
    NAME(backward_block)(job, &block, chunk, &following, block.few ? NULL : &forecast, room, dslope);
    far.parts = 0;
    sa_forecast_append(&far, &forecast, near);
  }
  for (int n = 0; n < together; n++) NAME(close_chunk)(job, &keys[n], &chunks[n]);
}

// The planes that are an item's: [batch, batch_end) and [head, head_end) of the key heads, and its chunk of keys.
typedef struct NAME(backward_share) {
  int64_t batch, batch_end, head, head_end, chunk;
} NAME(backward_share);

static NAME(backward_share) NAME(share_of)(const NAME(backward_job) * job, int64_t item) {
  const sa_problem *p = job->p;
  const int64_t groups = job->batch_groups * job->head_groups, each = job->window * job->chunks;
  const int64_t first = item / each * job->window, left = groups - first;
  const int64_t here = left < job->window ? left : job->window;
  const int64_t group = first + item % each % here, chunk = item % each / here;
  const int64_t batches = p->batch / job->batch_groups, heads = p->key_heads / job->head_groups;
  const int64_t batch = group / job->head_groups * batches, head = group % job->head_groups * heads;
  return (NAME(backward_share)){batch, batch + batches, head, head + heads, chunk};
}

static void NAME(backward_item)(void *argument, int64_t item, int worker) {
  const NAME(backward_job) *job = argument;
  const sa_problem *p = job->p;
  const NAME(backward_room) room =
      NAME(take_backward)(&(sa_room){.memory = job->memory + worker * job->room_bytes}, job);
  const NAME(backward_share) share = NAME(share_of)(job, item);
  // What the worker will likely have next.
  const bool goes_on =
      p->heads && job->blocks && item + job->workers < job->batch_groups * job->head_groups * job->chunks;
  const NAME(backward_share) following = NAME(share_of)(job, goes_on ? item + job->workers : item);
  NAME(block) first;
  if (goes_on) first = NAME(block_at)(p, following.batch, following.head * (p->heads / p->key_heads), 0, 1);
  for (int64_t batch = share.batch; batch < share.batch_end; batch++) {
    for (int64_t head = share.head, together; head < share.head_end; head += together) {
      together = share.head_end - head < job->together ? share.head_end - head : job->together;
      const bool last = batch + 1 == share.batch_end && head + together == share.head_end;
      const NAME(following) next = {last && goes_on ? &first : NULL, following.chunk, NULL};
      NAME(backward_chunk)(job, batch, head, (int)together, share.chunk, &next, &room);
    }
  }
}

// Which chunks each row of tiles looks at, as turns: UNSEEN, or how many before it do; last, how many in all.
static void NAME(count_turns)(const NAME(backward_job) * job) {
  const sa_plan *plan = job->p->plan;
  const int64_t rows = plan->batch * plan->heads * plan->row_tiles;
  for (int64_t row = 0; row < rows; row++) {
    int32_t *turn_of = job->turn_of + row * (job->chunks + 1);
    for (int64_t chunk = 0; chunk < job->chunks; chunk++) turn_of[chunk] = NAME(UNSEEN);
    for (int64_t run = plan->row_start[row]; run < plan->row_start[row + 1]; run++) {
      const int64_t first = plan->row_runs[run].first, last = first + plan->row_runs[run].count - 1;
      const int64_t end = NAME(chunk_of_tile)(job, last) + 1;
      for (int64_t chunk = NAME(chunk_of_tile)(job, first); chunk < end; chunk++) turn_of[chunk] = 0;
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
    for (int64_t row = 0; row < p->plan->row_tiles; row++) {
      if (job->turn_of[(plane * p->plan->row_tiles + row) * (job->chunks + 1) + job->chunks]) continue;
      for (int64_t query = row * SA_TILE; query < p->queries && query < (row + 1) * SA_TILE; query++) {
        NAME(write_row)(sa_at(&p->dq, head / p->heads, head % p->heads, query, 0), p->dq.dtype, (int)p->width, zeros);
      }
    }
  }
}

// A copy in its final dtype, or, gathered in place, nothing to do; and before the work, zeros, unless blocks are
// cleared.
static void NAME(write_dbias)(const NAME(backward_job) * job, bool before) {
  const sa_problem *p = job->p;
  const int64_t *shape = p->bias_shape;
  const int64_t parts = shape[3] == 1 ? job->chunks : 1;
  if (!before == !job->dbias || (before && NAME(clears_dbias)(p))) return;
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

// How many chunks there are. The last are shorter, down to 256 keys, where there are few for the threads: these then
// end at about the same time, though one of the cores be slower.
static void NAME(count_chunks)(NAME(backward_job) * job, int64_t items) {
  enum { MANY = 64 };
  job->chunks = (job->p->keys + job->chunk - 1) / job->chunk;
  job->whole = job->chunks ? job->chunks - 1 : 0;
  if (items * job->chunks >= MANY) return;
  int64_t left = (job->p->keys - job->whole * job->chunk + SA_TILE - 1) / SA_TILE;
  for (; left > 2; left /= 2) job->chunks++;
}

// How many key heads take turns: where they share dBias, as many as have their rows of a chunk, and of the gradients,
// in the second cache together. Else one.
static int NAME(choose_together)(const NAME(backward_job) * job) {
  enum { ENOUGH = 1 << 20 };
  const sa_problem *p = job->p;
  const int64_t *shape = p->bias_shape;
  if (!p->dbias.data || shape[1] != 1 || shape[2] == 1 || shape[3] == 1) return 1;
  const int64_t row = 2 * (NAME(padded)(p->width) + NAME(padded)(p->value_width)) * (int64_t)sizeof(REAL);
  int together = 1;
  while (together < NAME(TOGETHER) && together < p->key_heads && (together + 1) * job->chunk * row <= ENOUGH)
    together++;
  return together;
}

// Bytes of dQ of a group, where it is gathered beside its place; else 0.
static int64_t NAME(gathered_bytes)(const NAME(backward_job) * job) {
  const sa_problem *p = job->p;
  const int64_t groups = job->batch_groups * job->head_groups;
  if (!p->dq.data || p->dq.dtype == DTYPE || !groups) return 0;
  return p->batch * p->heads / groups * p->queries * p->width * (int64_t)sizeof(REAL);
}

// What a worker needs: at most WORKER bytes, its group's dQ among them where that takes no more than half. (Where it
// takes more, chunks as short as half of WORKER wants would be 2 to 3 % slower, for little.) Gradients that are
// gathered are most of it: then fewer heads take turns, or chunks are shorter.
static int64_t NAME(measure_room)(NAME(backward_job) * job) {
  const int64_t gathered = NAME(gathered_bytes)(job);
  const int64_t enough = gathered <= NAME(WORKER) / 2 ? NAME(WORKER) - gathered : NAME(WORKER);
  for (;;) {
    sa_room measure = {0};
    NAME(take_backward)(&measure, job);
    if (measure.used <= enough || (job->together == 1 && job->chunk <= SA_TILE)) return measure.used;
    if (job->together > 1)
      job->together--;
    else
      job->chunk = (job->chunk / SA_TILE + 1) / 2 * SA_TILE;
  }
}

// How many groups are at work at a time, where dQ is gathered beside its place: those for whom there is room, or one a
// worker, and as many in all windows. In a last one of fewer than a group a worker they would wait for each other
// (three heads on two threads took 4 % longer under a causal mask): then windows are longer, of less than two a worker.
static int64_t NAME(choose_window)(const NAME(backward_job) * job) {
  const int64_t groups = job->batch_groups * job->head_groups, bytes = NAME(gathered_bytes)(job);
  const int64_t fit = bytes ? (NAME(WORKER) - job->room_bytes) / bytes : groups;
  const int64_t most = (fit > 1 ? fit : 1) * job->workers, windows = (groups + most - 1) / most;
  if (windows < 2) return groups;
  const int64_t window = (groups + windows - 1) / windows, last = groups - window * (windows - 1);
  return last < job->workers ? (groups + windows - 2) / (windows - 1) : window;
}

// The workers' rooms and what every call keeps beside them. Returns the bytes of all.
static int64_t NAME(take_memory)(NAME(backward_job) * job) {
  const sa_problem *p = job->p;
  const int64_t rows = p->batch * p->heads * p->queries;
  const int64_t row_tiles = p->plan->batch * p->plan->heads * p->plan->row_tiles;
  sa_room room = {.memory = job->memory};
  sa_room_take(&room, job->room_bytes * job->workers);
  job->delta = NAME(take)(&room, rows);
  job->base = NAME(take)(&room, rows);
  job->factor = NAME(take)(&room, rows);
  job->turn_of = sa_room_take(&room, row_tiles * (job->chunks + 1) * (int64_t)sizeof *job->turn_of);
  return room.used;
}

static void NAME(free_backward)(NAME(backward_job) * job) {
  sa_release(job->memory);
  sa_release(job->turns);
  sa_release(job->dq);
  sa_release(job->dbias);
  sa_release(job->dsinks);
  sa_release(job->dalibi);
}

static int NAME(backward_with)(const sa_problem *p, atomic_int *sizes) {
  enum { WIDE = 320 };
  const int64_t planes = p->batch * p->heads;
  const bool share_batches = p->dbias.data && p->bias_shape[0] == 1,
             share_heads = p->dbias.data && p->bias_shape[1] == 1;
  NAME(backward_job)
  job = {
      .p = p,
      .sizes = sizes,
      .blocks = (p->queries + QUERIES - 1) / QUERIES,
      .batch_groups = share_batches && p->batch ? 1 : p->batch,
      .head_groups = share_heads && p->key_heads ? 1 : p->key_heads,
  };
  const int64_t groups = job.batch_groups * job.head_groups;
  // Rows of 128 keys that are wider than this do not fit beside a block's, nor do their S^T and dS^T in double: D64 and
  // D128 took 4 % longer.
  const bool fits = sizeof(REAL) == 4 && NAME(padded)(p->width) + NAME(padded)(p->value_width) <= WIDE;
  job.stretch = fits ? STRETCH : SEGMENT;
  job.chunk = NAME(choose_chunk)(p, groups);
  job.together = NAME(choose_together)(&job);
  job.room_bytes = NAME(measure_room)(&job);
  NAME(count_chunks)(&job, groups);
  const double flops = 2 * sa_visible_pairs(p) * (3.0 * p->width + 2.0 * p->value_width);
  const int workers = job.workers = sa_workers(flops);
  job.window = NAME(choose_window)(&job);
  const int64_t *shape = p->bias_shape;
  job.dbias_count = shape[0] * shape[1] * shape[2] * shape[3];
  const char *name = "sa_backward";
  const int64_t real = sizeof(REAL);
  bool complete = (job.memory = sa_allocate(name, NAME(take_memory)(&job)));
  if (complete) NAME(take_memory)(&job);
  if (complete && p->dq.data && job.chunks > 1) {
    complete = (job.turns = sa_allocate_zeroed(name, planes * job.blocks * (int64_t)sizeof *job.turns));
    if (complete && p->dq.dtype != DTYPE) {
      complete = (job.dq = sa_allocate(name, job.window * NAME(gathered_bytes)(&job)));
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

static int NAME(backward)(const sa_problem *p) {
  if (!NAME(dweight_pairs)(p)) return NAME(backward_with)(p, NULL);
  atomic_int sizes = 0;
  const int status = NAME(backward_with)(p, &sizes);
  return status || sa_ordinary(sizes) ? status : NAME(backward_with)(p, NULL);
}
