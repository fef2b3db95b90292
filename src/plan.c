// plans: found again for masks that were compiled before, counted, and shown as tensors
#include "plan.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "mask.h"
#include "memory.h"
#include "status.h"

/*  Plans that are kept
 *
 *  A mask keeps its own; those of calls without a mask are kept here, unless they are large. One lock serves all: it is
 *  held for a look at a few keys and never while compiling, allocating or releasing. It is taken around fork, so that a
 *  child does not find it held by a thread that it does not have.
 */

enum {
  KEPT_WITHOUT_MASK = 16,
  LARGEST_WITHOUT_MASK = 1 << 20  // bytes; causality for 2^19 positions is below
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static sa_kept_plan without_mask[KEPT_WITHOUT_MASK];
static uint64_t uses;

static void take_lock(void) {
  pthread_mutex_lock(&lock);
}

static void give_lock(void) {
  pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void guard_forks(void) {
  pthread_atfork(take_lock, give_lock, give_lock);
}

static int64_t *holders_of(const sa_plan *plan) {
  return &((sa_plan *)plan)->holders;
}

static void retain(const sa_plan *plan) {
  __atomic_fetch_add(holders_of(plan), 1, __ATOMIC_RELAXED);
}

/*  What devices keep with a plan: a list that only grows, so that reading it takes no lock  */

void *sa_plan_copy_on(const sa_plan *plan, int device) {
  for (const sa_plan_copy *c = __atomic_load_n(&plan->copies, __ATOMIC_ACQUIRE); c; c = c->next)
    if (c->device == device) return c->copy;
  return NULL;
}

// A plan is const to all but this list and its count of holders.
void *sa_plan_attach_copy(const sa_plan *plan, int device, void *copy, void (*drop)(void *copy)) {
  sa_plan_copy *made = sa_allocate("sa_mask_plan", sizeof *made);
  if (!made) return NULL;
  *made = (sa_plan_copy){device, copy, drop, NULL};
  take_lock();
  void *earlier = sa_plan_copy_on(plan, device);
  if (!earlier) {
    made->next = plan->copies;
    __atomic_store_n(&((sa_plan *)plan)->copies, made, __ATOMIC_RELEASE);
  }
  give_lock();
  if (!earlier) return copy;
  sa_release(made);
  drop(copy);
  return earlier;
}

void sa_plan_release(const sa_plan *plan) {
  if (!plan || __atomic_fetch_sub(holders_of(plan), 1, __ATOMIC_ACQ_REL) > 1) return;
  for (sa_plan_copy *c = plan->copies, *next; c; c = next) {
    next = c->next;
    c->drop(c->copy);
    sa_release(c);
  }
  sa_release((void *)plan);
}

void sa_plans_drop(sa_kept_plan *plans, int count) {
  for (int k = 0; k < count; k++) {
    sa_plan_release(plans[k].plan);
    plans[k].plan = NULL;
  }
}

// Sizes first: they differ most often.
static bool same_key(const sa_plan_key *a, const sa_plan_key *b) {
  return a->queries == b->queries && a->keys == b->keys && a->batch == b->batch && a->heads == b->heads &&
         a->causal == b->causal && a->window_left == b->window_left && a->window_right == b->window_right;
}

static sa_kept_plan *find(sa_kept_plan *plans, int count, const sa_plan_key *key) {
  for (int k = 0; k < count; k++)
    if (plans[k].plan && same_key(&plans[k].key, key)) return &plans[k];
  return NULL;
}

// The caller becomes a holder of what is found.
static const sa_plan *look_up(sa_kept_plan *plans, int count, const sa_plan_key *key) {
  take_lock();
  sa_kept_plan *found = find(plans, count, key);
  const sa_plan *plan = found ? found->plan : NULL;
  if (found) {
    found->used = ++uses;
    retain(plan);
  }
  give_lock();
  return plan;
}

// Keeps a plan, unless another thread was faster, in place of the one not used for longest.
static void keep(sa_kept_plan *plans, int count, const sa_plan_key *key, const sa_plan *plan) {
  const sa_plan *dropped = NULL;
  take_lock();
  if (!find(plans, count, key)) {
    sa_kept_plan *oldest = &plans[0];
    for (int k = 0; k < count && oldest->plan; k++)
      if (!plans[k].plan || plans[k].used < oldest->used) oldest = &plans[k];
    dropped = oldest->plan;
    retain(plan);
    *oldest = (sa_kept_plan){*key, plan, ++uses};
  }
  give_lock();
  sa_plan_release(dropped);
}

static int check_plan_arguments(const char *function, const sa_plan **out, int causal, const int64_t sizes[4]) {
  if (!out) return sa_fail(SA_INVALID, function, "out: got NULL, wanted a place for the plan");
  if (causal < SA_NO_CAUSAL || causal > SA_BOTTOM_RIGHT)
    return sa_fail(SA_INVALID, function,
                   "causal: got %d, wanted SA_NO_CAUSAL (0), SA_TOP_LEFT (1) or SA_BOTTOM_RIGHT (2)", causal);
  static const char *const names[4] = {"batch", "heads", "queries", "keys"};
  for (int k = 0; k < 4; k++)
    if (sizes[k] < 0)
      return sa_fail(SA_INVALID, function, "%s: got %lld, wanted at least 0", names[k], (long long)sizes[k]);
  return SA_OK;
}

int sa_mask_plan(const sa_plan **out, const sa_mask *mask, int causal, int64_t window_left, int64_t window_right,
                 int64_t batch, int64_t heads, int64_t queries, int64_t keys) {
  if (check_plan_arguments(__func__, out, causal, (const int64_t[4]){batch, heads, queries, keys})) return SA_INVALID;
  sa_kept_plan *plans = mask ? ((sa_mask *)mask)->plans : without_mask;
  const int count = mask ? SA_PLANS_KEPT : KEPT_WITHOUT_MASK;
  const sa_plan_key key = {causal,
                           sa_bounded(window_left),
                           sa_bounded(window_right),
                           mask && mask->per_batch ? batch : 1,
                           mask && mask->per_head ? heads : 1,
                           queries,
                           keys};
  // A plan may not depend on the batch although the mask's data is for so many: then only the key would fit.
  const bool fits = !mask || ((mask->batch == 1 || mask->batch == batch) && (mask->heads == 1 || mask->heads == heads));
  const sa_plan *known = fits ? look_up(plans, count, &key) : NULL;
  if (known) {
    *out = known;
    return SA_OK;
  }
  if (mask) atomic_store(&((sa_mask *)mask)->in_use, true);
  sa_plan *plan;
  const int status = sa_compile(&plan, mask, causal, key.window_left, key.window_right, batch, heads, queries, keys);
  if (status) return status;
  if (mask || plan->bytes <= LARGEST_WITHOUT_MASK) keep(plans, count, &key, plan);
  *out = plan;
  return SA_OK;
}

/*  What a plan says  */

static int64_t count_dead(const uint64_t *dead, int64_t planes, int64_t positions) {
  int64_t count = 0;
  for (int64_t k = 0; k < planes * ((positions + 63) / 64); k++) count += __builtin_popcountll(dead[k]);
  return count;
}

void sa_plan_count(const sa_plan *plan, sa_plan_counts *out) {
  if (!out) return;
  *out = (sa_plan_counts){0};
  if (!plan) return;
  const int64_t planes = plan->batch * plan->heads;
  *out = (sa_plan_counts){.batch = plan->batch,
                          .heads = plan->heads,
                          .queries = plan->queries,
                          .keys = plan->keys,
                          .visible = plan->visible,
                          .empty = plan->empty,
                          .partial = plan->partial,
                          .full = plan->full,
                          .dead_rows = count_dead(plan->dead_rows, planes, plan->queries),
                          .dead_keys = count_dead(plan->dead_keys, planes, plan->keys),
                          .bytes = plan->bytes,
                          .patterns = plan->pattern_count};
}

bool sa_plan_visible(const sa_plan *plan, int64_t batch, int64_t head, int64_t query, int64_t key) {
  if (!plan || batch < 0 || (plan->batch != 1 && batch >= plan->batch) || head < 0 ||
      (plan->heads != 1 && head >= plan->heads) || query < 0 || query >= plan->queries || key < 0 || key >= plan->keys)
    return false;
  const int64_t row = sa_plan_plane(plan, batch, head) * plan->row_tiles + query / SA_TILE;
  const int64_t column = key / SA_TILE, i = query % SA_TILE;
  for (int64_t k = plan->row_start[row]; k < plan->row_start[row + 1]; k++) {
    const sa_run run = plan->row_runs[k];
    if (column < run.first || column >= run.first + run.count) continue;
    return run.pattern == SA_FULL || (plan->patterns[run.pattern].word[key % SA_TILE][i / 64] >> (i % 64) & 1);
  }
  return false;
}

static int check_reading(const char *function, const sa_plan *plan, const sa_tensor *out) {
  if (!plan) return sa_fail(SA_INVALID, function, "plan: got NULL, wanted a plan");
  if (!out) return sa_fail(SA_INVALID, function, "out: got NULL, wanted a place for the tensor");
  return SA_OK;
}

// One query of a run of tiles with a pattern.
static void write_pattern_row(bool *row, const sa_plan *plan, sa_run run, int64_t i) {
  const sa_pattern *pattern = &plan->patterns[run.pattern];
  const int64_t last = (int64_t)(run.first + run.count) * SA_TILE;
  for (int64_t key = (int64_t)run.first * SA_TILE; key < last && key < plan->keys; key++)
    row[key] = pattern->word[key % SA_TILE][i / 64] >> (i % 64) & 1;
}

// One row of one plane; it is all false before.
static void write_row(bool *row, const sa_plan *plan, int64_t plane, int64_t query) {
  const int64_t tile = plane * plan->row_tiles + query / SA_TILE;
  for (int64_t k = plan->row_start[tile]; k < plan->row_start[tile + 1]; k++) {
    const sa_run run = plan->row_runs[k];
    if (run.pattern == SA_FULL)
      memset(row + (int64_t)run.first * SA_TILE, 1, (size_t)run.count * SA_TILE);
    else
      write_pattern_row(row, plan, run, query % SA_TILE);
  }
}

int sa_plan_dense(const sa_plan *plan, sa_tensor *out) {
  if (check_reading(__func__, plan, out)) return SA_INVALID;
  const int64_t shape[4] = {plan->batch, plan->heads, plan->queries, plan->keys};
  const int status = sa_tensor_new(out, SA_BOOL, SA_CPU, 4, shape);
  if (status) return status;
  bool *row = out->data;
  memset(row, 0, (size_t)sa_tensor_numel(out));
  for (int64_t plane = 0; plane < plan->batch * plan->heads; plane++)
    for (int64_t query = 0; query < plan->queries; query++, row += plan->keys) write_row(row, plan, plane, query);
  return SA_OK;
}

static int show_dead(const sa_plan *plan, const uint64_t *dead, int64_t positions, sa_tensor *out) {
  const int status = sa_tensor_new(out, SA_BOOL, SA_CPU, 3, (const int64_t[3]){plan->batch, plan->heads, positions});
  if (status) return status;
  bool *to = out->data;
  const int64_t words = (positions + 63) / 64;
  for (int64_t plane = 0; plane < plan->batch * plan->heads; plane++)
    for (int64_t k = 0; k < positions; k++) *to++ = dead[plane * words + k / 64] >> (k % 64) & 1;
  return SA_OK;
}

int sa_plan_dead_rows(const sa_plan *plan, sa_tensor *out) {
  return check_reading(__func__, plan, out) ? SA_INVALID : show_dead(plan, plan->dead_rows, plan->queries, out);
}

int sa_plan_dead_keys(const sa_plan *plan, sa_tensor *out) {
  return check_reading(__func__, plan, out) ? SA_INVALID : show_dead(plan, plan->dead_keys, plan->keys, out);
}
