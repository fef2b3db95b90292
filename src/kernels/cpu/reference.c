// attention and its gradients by the definition: plain loops in f64, the oracle of every other kernel
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "interrupt.h"
#include "kernels/cpu/copy.h"
#include "kernels/cpu/kernels.h"
#include "memory.h"
#include "random.h"

static inline int64_t offset_of(const sa_operand *t, int64_t batch, int64_t head, int64_t row) {
  return batch * t->stride[0] + head * t->stride[1] + row * t->stride[2];
}

static char *element(const sa_operand *t, int64_t offset) {
  return (char *)t->data + offset * sa_dtype_size(t->dtype);
}

static void read_row(double *to, const sa_operand *from, int64_t offset, int64_t count) {
  sa_cpu_cast(SA_F64, from->dtype)(to, 1, element(from, offset), from->stride[3], count);
}

static void write_row(const sa_operand *to, int64_t offset, const double *from, int64_t count) {
  sa_cpu_cast(to->dtype, SA_F64)(element(to, offset), to->stride[3], from, 1, count);
}

static double read_at(const sa_operand *from, int64_t offset) {
  double value;
  read_row(&value, from, offset, 1);
  return value;
}

static void write_at(const sa_operand *to, int64_t offset, double value) {
  write_row(to, offset, &value, 1);
}

static void clear(double *x, int64_t count) {
  for (int64_t d = 0; d < count; d++) x[d] = 0;
}

static inline void add_scaled(double *to, double factor, const double *x, int64_t count) {
  for (int64_t d = 0; d < count; d++) to[d] += factor * x[d];
}

// Eight partial sums, so that an addition need not wait for the one before it.
static double dot(const double *a, const double *b, int64_t count) {
  double sum[8] = {0};
  int64_t d = 0;
  for (; d + 8 <= count; d += 8)
    for (int lane = 0; lane < 8; lane++) sum[lane] += a[d + lane] * b[d + lane];
  for (int lane = 0; d < count; d++, lane++) sum[lane] += a[d] * b[d];
  return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// What one worker needs for one (batch, key head). The lists of a row run over its visible keys alone, in rising order:
// element n belongs to key[n]. So nothing of a masked pair is ever computed with.
typedef struct scratch {
  double *k, *v, *q, *out;      // [S,E], [S,Ev], [E], [Ev]
  double *dk, *dv, *dq, *dout;  // the same; for the backward
  int64_t *key;
  double *p;      // scores, then softmax weights
  double *keep;   // what dropout multiplies a weight by: 1/(1-p), or 0 for a dropped one
  double *slope;  // of the softcap: d score / d (scale * q.k)
} scratch;

// One (batch, query head, query).
typedef struct row {
  int64_t batch, head, query;
  int64_t count;  // of visible keys
  double lse, p_sink;
} row;

typedef struct job {
  const sa_problem *p;
  bool backward;
  double *scratch;         // scratch_size() numbers per worker
  double *dbias;           // [bias_shape], summed over broadcast dims
  int64_t bias_stride[4];  // of dbias; 0 where broadcast
  double *dsinks;          // [B,H]: what a batch adds to its head
  double *dalibi;          // [B,H]
} job;

// The keys of a run of tiles that `query` sees, appended to key[count..]. Returns the new count.
static int64_t list_run(const sa_plan *plan, const sa_run *run, int64_t query, int64_t *key, int64_t count) {
  const int64_t first = (int64_t)run->first * SA_TILE, last = first + (int64_t)run->count * SA_TILE;
  if (run->pattern == SA_FULL) {
    for (int64_t j = first; j < last; j++) key[count++] = j;
    return count;
  }
  const sa_pattern *pattern = &plan->patterns[run->pattern];
  const int64_t word = query % SA_TILE / 64, bit = query % 64;
  for (int64_t tile = first; tile < last; tile += SA_TILE)
    for (int64_t j = 0; j < SA_TILE; j++)
      if (pattern->word[j][word] >> bit & 1) key[count++] = tile + j;
  return count;
}

// The keys that the plan shows to a query, in rising order: its PARTIAL and its FULL runs, each ascending, merged.
static int64_t list_keys(const sa_plan *plan, const row *r, int64_t *key) {
  const int64_t plane = sa_plan_plane(plan, r->batch, r->head);
  const int64_t *start = &plan->row_start[plane * plan->row_tiles + r->query / SA_TILE];
  const sa_run *partial = plan->row_runs + start[0], *last = plan->row_runs + start[1], *full = partial;
  while (full < last && full->pattern != SA_FULL) full++;
  const sa_run *const partial_last = full;
  int64_t count = 0;
  while (partial < partial_last || full < last) {
    const bool take_full = partial == partial_last || (full < last && full->first < partial->first);
    count = list_run(plan, take_full ? full++ : partial++, r->query, key, count);
  }
  return count;
}

// Takes the keys out of the list whose bias is -inf.
static int64_t drop_biased(const sa_problem *p, const row *r, int64_t *key, int64_t count) {
  const int64_t offset = offset_of(&p->bias, r->batch, r->head, r->query);
  int64_t kept = 0;
  for (int64_t n = 0; n < count; n++)
    if (read_at(&p->bias, offset + key[n] * p->bias.stride[3]) != -INFINITY) key[kept++] = key[n];
  return kept;
}

static double sink_of(const sa_problem *p, int64_t head) {
  return read_at(&p->sinks, head * p->sinks.stride[1]);
}

static double distance(const sa_problem *p, int64_t query, int64_t key) {
  return (double)llabs(key - query - p->diagonal);
}

// Scores of the visible keys, into s->p; s->q holds the query.
static void score_row(const sa_problem *p, const row *r, const scratch *s) {
  for (int64_t n = 0; n < r->count; n++) {
    // Without a width the product is an empty sum, whatever 1/sqrt(0) makes of the scale.
    s->p[n] = p->width ? p->scale * dot(s->q, s->k + s->key[n] * p->width, p->width) : 0;
    s->slope[n] = 1;
  }
  if (p->softcap > 0)
    for (int64_t n = 0; n < r->count; n++) {
      const double t = tanh(s->p[n] / p->softcap);
      s->p[n] = p->softcap * t;
      s->slope[n] = 1 - t * t;
    }
  if (p->bias.data) {
    const int64_t offset = offset_of(&p->bias, r->batch, r->head, r->query);
    for (int64_t n = 0; n < r->count; n++) s->p[n] += read_at(&p->bias, offset + s->key[n] * p->bias.stride[3]);
  }
  if (p->alibi.data) {
    const double slope = read_at(&p->alibi, r->head * p->alibi.stride[1]);
    for (int64_t n = 0; n < r->count; n++) s->p[n] -= slope * distance(p, r->query, s->key[n]);
  }
}

// Scores into weights, and the LSE. A NaN that the comparisons of the maximum pass over comes back with its exp. When
// all scores, and the sink, are -inf (or one is +inf), inf - inf makes the row NaN: it is not a dead row.
static void softmax_row(const sa_problem *p, row *r, const scratch *s) {
  const double sink = p->sinks.data ? sink_of(p, r->head) : -INFINITY;
  double max = sink, sum = 0;
  for (int64_t n = 0; n < r->count; n++)
    if (s->p[n] > max) max = s->p[n];
  for (int64_t n = 0; n < r->count; n++) sum += s->p[n] = exp(s->p[n] - max);
  if (p->sinks.data) sum += r->p_sink = exp(sink - max);
  for (int64_t n = 0; n < r->count; n++) s->p[n] /= sum;
  r->p_sink /= sum;
  r->lse = max + log(sum);
}

static void drop_out_row(const sa_problem *p, const row *r, const scratch *s) {
  const uint64_t first = (uint64_t)(((r->batch * p->heads + r->head) * p->queries + r->query) * p->keys);
  const uint32_t threshold = sa_dropout_threshold(p->dropout);
  for (int64_t n = 0; n < r->count; n++) {
    const bool dropped = threshold > 0 && sa_dropped(p->seed, first + (uint64_t)s->key[n], threshold);
    s->keep[n] = dropped ? 0 : 1 / (1 - p->dropout);
  }
}

// A dropped weight is 0 whatever it was, NaN too.
static double keep(double factor, double x) {
  return factor > 0 ? factor * x : 0;
}

// Everything the forward finds out about a row, in `r` and `s`. A dead row has count 0.
static void attend_row(const sa_problem *p, row *r, const scratch *s) {
  r->count = list_keys(p->plan, r, s->key);
  if (p->bias.data) r->count = drop_biased(p, r, s->key, r->count);
  clear(s->out, p->value_width);
  if (r->count == 0) {
    r->lse = p->sinks.data ? sink_of(p, r->head) : -INFINITY;
    return;
  }
  read_row(s->q, &p->q, offset_of(&p->q, r->batch, r->head, r->query), p->width);
  score_row(p, r, s);
  softmax_row(p, r, s);
  drop_out_row(p, r, s);
  // A NaN row is one even when all of its weights are dropped.
  for (int64_t d = 0; isnan(r->lse) && d < p->value_width; d++) s->out[d] = NAN;
  for (int64_t n = 0; n < r->count; n++)
    add_scaled(s->out, keep(s->keep[n], s->p[n]), s->v + s->key[n] * p->value_width, p->value_width);
}

static void read_keys(const sa_problem *p, int64_t batch, int64_t key_head, const scratch *s) {
  for (int64_t j = 0; j < p->keys; j++) {
    read_row(s->k + j * p->width, &p->k, offset_of(&p->k, batch, key_head, j), p->width);
    read_row(s->v + j * p->value_width, &p->v, offset_of(&p->v, batch, key_head, j), p->value_width);
  }
}

static void write_keys(const sa_problem *p, int64_t batch, int64_t key_head, const scratch *s) {
  for (int64_t j = 0; j < p->keys; j++) {
    if (p->dk.data) write_row(&p->dk, offset_of(&p->dk, batch, key_head, j), s->dk + j * p->width, p->width);
    if (p->dv.data)
      write_row(&p->dv, offset_of(&p->dv, batch, key_head, j), s->dv + j * p->value_width, p->value_width);
  }
}

// In f32 the LSE of scores beyond its range stays a finite number: only a dead row's is -inf.
static double storable_lse(const sa_problem *p, double lse) {
  return p->lse.dtype == SA_F32 && isfinite(lse) ? fmax(-FLT_MAX, fmin(lse, FLT_MAX)) : lse;
}

static void forward_row(const sa_problem *p, const row *r, const scratch *s) {
  write_row(&p->out, offset_of(&p->out, r->batch, r->head, r->query), s->out, p->value_width);
  if (p->lse.data) write_at(&p->lse, offset_of(&p->lse, r->batch, r->head, r->query), storable_lse(p, r->lse));
  if (p->dead.data) ((bool *)p->dead.data)[offset_of(&p->dead, r->batch, r->head, r->query)] = r->count == 0;
  if (p->weights.data) {
    const int64_t offset = offset_of(&p->weights, r->batch, r->head, r->query), step = p->weights.stride[3];
    for (int64_t j = 0; j < p->keys; j++) write_at(&p->weights, offset + j * step, 0);
    for (int64_t n = 0; n < r->count; n++) write_at(&p->weights, offset + s->key[n] * step, s->p[n]);
  }
}

// The row's part of every gradient: dK and dV into `s`, the extras' into the job.
static void backward_row(const job *job, const row *r, const scratch *s) {
  const sa_problem *p = job->p;
  clear(s->dq, p->width);
  const double dlse = p->dlse.data ? read_at(&p->dlse, offset_of(&p->dlse, r->batch, r->head, r->query)) : 0;
  double *const dsink = &job->dsinks[r->batch * p->heads + r->head];
  if (r->count == 0) {
    // All that a dead row has is lse = sink.
    if (p->sinks.data && sink_of(p, r->head) != -INFINITY) *dsink += dlse;
  } else {
    clear(s->dout, p->value_width);
    if (p->dout.data) read_row(s->dout, &p->dout, offset_of(&p->dout, r->batch, r->head, r->query), p->value_width);
    const double delta = dot(s->dout, s->out, p->value_width);
    if (p->sinks.data) *dsink += r->p_sink * (dlse - delta);
    for (int64_t n = 0; n < r->count; n++) {
      const int64_t j = s->key[n];
      const double dp = keep(s->keep[n], dot(s->dout, s->v + j * p->value_width, p->value_width));
      const double ds = s->p[n] * (dp - delta + dlse);
      const double dz = p->scale * s->slope[n] * ds;
      if (p->dq.data) add_scaled(s->dq, dz, s->k + j * p->width, p->width);
      if (p->dk.data) add_scaled(s->dk + j * p->width, dz, s->q, p->width);
      if (p->dv.data) add_scaled(s->dv + j * p->value_width, keep(s->keep[n], s->p[n]), s->dout, p->value_width);
      if (p->dbias.data)
        job->dbias[r->batch * job->bias_stride[0] + r->head * job->bias_stride[1] + r->query * job->bias_stride[2] +
                   j * job->bias_stride[3]] += ds;
      if (p->dalibi.data) job->dalibi[r->batch * p->heads + r->head] -= distance(p, r->query, j) * ds;
    }
  }
  if (p->dq.data) write_row(&p->dq, offset_of(&p->dq, r->batch, r->head, r->query), s->dq, p->width);
}

static void write_head_sums(const sa_problem *p, const sa_operand *to, const double *parts) {
  if (!to->data) return;
  for (int64_t head = 0; head < p->heads; head++) {
    double sum = 0;
    for (int64_t batch = 0; batch < p->batch; batch++) sum += parts[batch * p->heads + head];
    write_at(to, head * to->stride[1], sum);
  }
}

static void write_extras(const job *job) {
  const sa_problem *p = job->p;
  write_head_sums(p, &p->dsinks, job->dsinks);
  write_head_sums(p, &p->dalibi, job->dalibi);
  if (!p->dbias.data) return;
  const int64_t *shape = p->bias_shape;
  const double *from = job->dbias;
  for (int64_t b = 0; b < shape[0]; b++)
    for (int64_t h = 0; h < shape[1]; h++)
      for (int64_t i = 0; i < shape[2]; i++, from += shape[3])
        write_row(&p->dbias, offset_of(&p->dbias, b, h, i), from, shape[3]);
}

// In doubles, and as one: sizes that no machine has are refused by the allocation instead of wrapping round.
static double scratch_size(const sa_problem *p, bool backward) {
  return (backward ? 2. : 1.) * ((double)p->keys + 1) * ((double)p->width + (double)p->value_width) +
         4. * (double)p->keys;
}

static double *take(double **memory, int64_t count) {
  double *const taken = *memory;
  *memory += count;
  return taken;
}

static scratch scratch_of(const job *job, int worker) {
  const sa_problem *p = job->p;
  double *memory = job->scratch + worker * (int64_t)scratch_size(p, job->backward);
  scratch s = {
      .k = take(&memory, p->keys * p->width),
      .v = take(&memory, p->keys * p->value_width),
      .q = take(&memory, p->width),
      .out = take(&memory, p->value_width),
      .key = (int64_t *)take(&memory, p->keys),
      .p = take(&memory, p->keys),
      .keep = take(&memory, p->keys),
      .slope = take(&memory, p->keys),
  };
  if (job->backward) {
    s.dk = take(&memory, p->keys * p->width);
    s.dv = take(&memory, p->keys * p->value_width);
    s.dq = take(&memory, p->width);
    s.dout = take(&memory, p->value_width);
  }
  return s;
}

// An item is a (batch, key head): the query heads that share the keys add to dK and dV in turn.
static void run_item(void *argument, int64_t item, int worker) {
  const job *job = argument;
  const sa_problem *p = job->p;
  const scratch s = scratch_of(job, worker);
  const int64_t group = p->heads / p->key_heads, batch = item / p->key_heads, key_head = item % p->key_heads;
  read_keys(p, batch, key_head, &s);
  if (job->backward) {
    clear(s.dk, p->keys * p->width);
    clear(s.dv, p->keys * p->value_width);
  }
  for (int64_t head = key_head * group; head < (key_head + 1) * group; head++)
    for (int64_t i = 0; i < p->queries && !sa_interrupt_pending(); i++) {
      row r = {.batch = batch, .head = head, .query = i};
      attend_row(p, &r, &s);
      if (job->backward)
        backward_row(job, &r, &s);
      else
        forward_row(p, &r, &s);
    }
  if (job->backward) write_keys(p, batch, key_head, &s);
}

static int run(const char *function, const sa_problem *p, bool backward) {
  const int64_t items = p->batch * p->key_heads, planes = p->batch * p->heads, *shape = p->bias_shape;
  const int64_t bias_size = p->dbias.data ? shape[0] * shape[1] * shape[2] * shape[3] : 0;
  // One worker takes the items in order, as a sum over several of them wants it.
  const bool shared_bias = p->dbias.data && (shape[0] < p->batch || (shape[1] < p->heads && p->key_heads > 1));
  const double flops = (backward ? 10. : 4.) * (double)planes * (double)p->queries * (double)p->keys *
                       (double)(p->width + p->value_width) / 2;
  int workers = shared_bias ? 1 : sa_workers(flops);
  if (workers > items) workers = items > 0 ? (int)items : 1;

  const int64_t extras = backward ? bias_size + 2 * planes : 0;
  const double bytes = sizeof(double) * (workers * scratch_size(p, backward) + (double)extras);
  double *memory = sa_allocate(function, bytes < 0x1p53 ? (int64_t)bytes : INT64_MAX);
  if (!memory) return SA_NO_MEMORY;
  clear(memory, extras);
  job job = {.p = p, .backward = backward};
  double *rest = memory;
  if (backward) {
    job.dbias = take(&rest, bias_size);
    job.dsinks = take(&rest, planes);
    job.dalibi = take(&rest, planes);
    for (int64_t dim = 3, stride = 1; dim >= 0; stride *= shape[dim--])
      job.bias_stride[dim] = shape[dim] == 1 ? 0 : stride;
  }
  job.scratch = rest;
  sa_parallel(workers, items, run_item, &job);
  if (backward) write_extras(&job);
  sa_release(memory);
  return SA_OK;
}

static int forward(const sa_problem *p) {
  return run("sa_forward", p, false);
}

static int backward(const sa_problem *p) {
  return run("sa_backward", p, true);
}

const sa_attention_kernels *sa_cpu_reference(const sa_problem *p) {
  static const sa_attention_kernels kernels = {"reference-f64", forward, backward};
  return &kernels;
}
