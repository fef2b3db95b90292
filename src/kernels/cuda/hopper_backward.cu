// backward attention on Hopper: what the kernels cover, their scratch memory, their launches
//
// Warpgroup 0 of hopper_backward_tiles has 24 registers a thread and may spill a few words: it waits most of the time.
// So may the others at width 128 where a job ends, a dozen words.
#include <string.h>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/columns.cuh"
#include "kernels/cuda/hopper_backward.cuh"
#include "kernels/cuda/hopper_backward_extras.cuh"
#include "kernels/cuda/hopper_backward_wide.cuh"
#include "kernels/cuda/hopper_bias_gradient.cuh"
#include "kernels/cuda/hopper_operands.cuh"
#include "kernels/cuda/score_scale.cuh"

static const char function[] = "sa_backward";

// Key heads whose jobs are mixed where jobs wait for their turns, so that fewer wait for each other: as many as have
// their Q, dO and sums of dQ in the second-level cache together. Jobs that walk the same rows at the same time have
// only some of them in use; causal jobs, each somewhere else, have all, and 16 heads of 2048 rows took 950 us, 4 took
// 819.
enum { MIXED_BYTES = 17 << 20, MIXED_BYTES_ALIKE = 34 << 20 };

// Of short heads whose columns are alike, as many as have one for nearly every multiprocessor take 2 to 6 % less than
// as many as fit; not always at width 64.
enum { MIXED_COLUMNS = 128, MIXED_HEADS_SHORT = 8 };

// Where columns are taken from the longest on they all begin with the last rows, and each waits for those before it: of
// more heads there are fewer of each. So it is with long columns of groups. Of more heads than these, or of as many as
// leave each fewer than eight columns at a time, the sums of dQ leave the cache.
enum { MIXED_BYTES_MANY = 64 << 20, MIXED_HEADS_LEAST = 8, MIXED_HEADS_MOST = 16 };

// Columns that get shorter, of so many tiles in the mean, are taken from the longest on. Of 5 tiles they took as long
// so as the other way round, of 9 to 65 2 to 5 % less; at width 64 as long.
enum { DESCENDED_TILES = 8 };

// As few queries as a column must have to be shared out by heads; as few tiles to be shared out by those; in how many
// jobs at most.
enum { SHARED_QUERIES = 8 * SA_TILE, SHARED_TILES = 16, MOST_PARTS = 16 };

// What a job that is a part is taken to need besides, in tiles, and how many parts more than there are rounds go by
// until all multiprocessors end, as they are not equally fast: weights by which, of the numbers of parts that were
// measured, the best or one as good is chosen.
enum { PART_TILES = 11, PARTS_MORE = 2 };

// Of so many columns for each multiprocessor all may be shared out by heads.
enum { SHARED_ROUNDS = 4 };

// Widths that hopper_backward.cuh is made for: to which those of a problem are padded with zeros, which TMA adds. 0 for
// wider ones.
static int bucket(const sa_problem *p) {
  const int64_t width = p->width > p->value_width ? p->width : p->value_width;
  // Extras have a kernel for 128 alone: with steps of 128 queries there are no registers for them.
  return width <= 64 && !hopper_has_extras(p) ? 64 : width <= 128 ? 128 : 0;
}

// Those of hopper_backward_wide.cuh.
typedef struct wide_entry {
  int width, value_width;
  int (*bf16)(const char *, const hopper_backward_call &, int, cudaStream_t);
  int (*f16)(const char *, const hopper_backward_call &, int, cudaStream_t);
} wide_entry;

#define WIDE(w, v)                                                    \
  {                                                                   \
    w, v, hopper_wide_launch<hopper_wide_shape<__nv_bfloat16, w, v>>, \
        hopper_wide_launch<hopper_wide_shape<__half, w, v>>           \
  }
#define DECLARE_WIDE(w, v)                                                                                            \
  extern template int hopper_wide_launch<hopper_wide_shape<__nv_bfloat16, w, v>>(                                     \
      const char *, const hopper_backward_call &, int, cudaStream_t);                                                 \
  extern template int hopper_wide_launch<hopper_wide_shape<__half, w, v>>(const char *, const hopper_backward_call &, \
                                                                          int, cudaStream_t);
DECLARE_WIDE(192, 128)
DECLARE_WIDE(192, 192)
DECLARE_WIDE(256, 256)

static const wide_entry wide[] = {WIDE(192, 128), WIDE(192, 192), WIDE(256, 256)};

static const wide_entry *wide_of(const sa_problem *p) {
  for (const wide_entry &entry : wide) {
    if (p->width <= entry.width && p->value_width <= entry.value_width) return &entry;
  }
  return NULL;
}

static int64_t padded_queries(const sa_problem *p) {
  return (p->queries + SA_TILE - 1) / SA_TILE * SA_TILE;
}

static int64_t key_columns(const sa_problem *p) {
  return (p->keys + SA_TILE - 1) / SA_TILE;
}

bool sa_cuda_hopper_backward_covers(const sa_problem *p) {
  const int64_t heads = p->batch * p->heads, padded = padded_queries(p);
  if (p->dtype != SA_BF16 && p->dtype != SA_F16) return false;
  if (hopper_has_extras(p) && (!bucket(p) || !hopper_scores_fit(p))) return false;
  // A slope's gradient wants dS without the softcap's part.
  if (p->dalibi.data && p->softcap > 0) return false;
  if (heads == 0 || p->queries == 0 || p->keys == 0) return false;
  if (!wide_of(p) || p->width == 0 || p->value_width == 0 || p->width % 8 || p->value_width % 8) return false;
  if (p->queries > INT32_MAX / 2 || p->keys > INT32_MAX / 2) return false;
  if (heads * (padded / 64) * (bucket(p) ? bucket(p) / 64 : 1) > INT32_MAX) return false;
  if (p->batch * p->key_heads * key_columns(p) > INT32_MAX / 2) return false;
  // Sums of many short heads are mostly padding.
  if (p->queries < 64 && heads * padded * bucket(p) * 4 > (int64_t)1 << 30) return false;
  return hopper_inputs_fit(p) && hopper_fits(p, &p->out, p->heads, p->queries, p->value_width) &&
         hopper_fits(p, &p->dout, p->heads, p->queries, p->value_width) &&
         hopper_fits(p, &p->dq, p->heads, p->queries, p->width) &&
         hopper_fits(p, &p->dk, p->key_heads, p->keys, p->width) &&
         hopper_fits(p, &p->dv, p->key_heads, p->keys, p->value_width);
}

static int map_operands(const sa_problem *p, hopper_backward_call *c) {
  const int rows = bucket(p) == 64 ? 128 : 64, key_rows = bucket(p) ? (int)SA_TILE : (int)HOPPER_WIDE_ROWS;
  const int64_t queries = p->queries, keys = p->keys, width = p->width, value_width = p->value_width;
  int status = hopper_map(function, p, &c->q, &p->q, p->heads, queries, width, rows, &c->q_batch_step, &c->q_head_step);
  if (!status) {
    status =
        hopper_map(function, p, &c->k, &p->k, p->key_heads, keys, width, key_rows, &c->k_batch_step, &c->k_head_step);
  }
  if (!status) {
    status = hopper_map(function, p, &c->v, &p->v, p->key_heads, keys, value_width, key_rows, &c->v_batch_step,
                        &c->v_head_step);
  }
  if (!status) {
    status = hopper_map(function, p, &c->dout, &c->dout_values, p->heads, queries, value_width, rows,
                        &c->dout_batch_step, &c->dout_head_step);
  }
  if (!status) status = hopper_map(function, p, &c->dq_map, &p->dq, p->heads, queries, width, 64, NULL, NULL);
  if (!status) status = hopper_map(function, p, &c->dk, &p->dk, p->key_heads, keys, width, 64, NULL, NULL);
  if (!status) status = hopper_map(function, p, &c->dv, &p->dv, p->key_heads, keys, value_width, 64, NULL, NULL);
  return status;
}

// Gives the pieces of one piece of scratch memory to a call; with `memory` NULL only counts. Returns the bytes.
static int64_t lay_out(const sa_problem *p, hopper_backward_call *c, char *memory) {
  const int64_t rows = p->batch * p->heads * c->padded, chunks = rows / 64 * (bucket(p) / 64);
  char *at = memory;
  c->dq = (float *)at;
  at += rows * bucket(p) * 4;
  c->lse_log2 = (float *)at;
  at += rows * 4;
  c->delta = (float *)at;
  at += rows * 4;
  if (hopper_has_extras(p)) {
    c->log2_sum = (float *)at;
    at += rows * 4;
  }
  if (p->bias.data) {
    c->coarse = (int32_t *)at;
    at += (rows / 64 * 4 + 255) / 256 * 256;
  }
  c->sink_part = p->dsinks.data ? (float *)at : NULL;
  if (p->dsinks.data) at += (rows / 64 * 4 + 255) / 256 * 256;
  if (!p->dout.data) {  // zeros, the same for all heads
    c->dout_values.data = at;
    c->dout_values.dtype = p->dtype;
    c->dout_values.stride[2] = p->value_width;
    c->dout_values.stride[3] = 1;
    at += (p->queries * p->value_width * 2 + 255) / 256 * 256;
  }
  const int64_t shared = c->jobs - c->whole;
  c->part_sums = (float *)at;
  at += shared * SA_TILE * bucket(p) * 8;
  c->zeroed = c->next_job = (int32_t *)at;
  c->flagged = c->next_job + 4;
  c->bad_key = c->flagged + 1;
  c->bad_query = c->bad_key + c->jobs;
  c->turn = c->bad_query + (bucket(p) ? chunks : rows / SA_TILE);
  const int64_t slopes = p->dalibi.data ? p->batch * p->heads * key_columns(p) * 8 : 0;
  c->slope_part = slopes ? (float *)(c->turn + chunks) : NULL;
  c->part_turn = c->turn + chunks + slopes;
  c->zeroed_count = c->part_turn + 2 * shared - c->zeroed;
  return (char *)(c->zeroed + c->zeroed_count) - memory;
}

// The statistics of the rows, those with a coarse LSE again where `bases`, and dSinks.
template <class T, int WIDTH>
static int launch_rows(const hopper_backward_call &c, bool bases, cudaStream_t stream) {
  const unsigned blocks = (unsigned)(c.batch * (int64_t)c.heads * (c.padded / 64));
  int status =
      sa_cuda_launch(function, hopper_backward_rows<T, WIDTH>, blocks, HOPPER_BACKWARD_ROWS_THREADS, 0, stream, c);
  if (!status && c.coarse && (bases || c.sink_part)) {
    status = sa_cuda_launch(function, hopper_backward_bases<T>, blocks, HOPPER_BACKWARD_BASES_THREADS, 0, stream, c);
  }
  if (!status && c.sink_part) {
    status = sa_cuda_launch(function, hopper_backward_sinks<T>, (unsigned)c.heads, 32, 0, stream, c);
  }
  return status;
}

// Whether columns are taken from the longest on. Those of groups then go past heads abreast, which must see the same,
// and a slope's gradient is summed up one head after the other.
static bool longest_first(const sa_problem *p) {
  const sa_plan *plan = p->plan;
  const int64_t group = p->heads / p->key_heads;
  return p->deterministic && (group == 1 ? bucket(p) == 128 : bucket(p) && plan->heads == 1 && !p->dalibi.data) &&
         sa_columns_shrink(plan, group, DESCENDED_TILES);
}

// Whether the longest column, as one of `parts` jobs, is at most what a multiprocessor has to do.
static bool parts_are_short(const sa_problem *p, int64_t jobs, int64_t parts) {
  const sa_plan *plan = p->plan;
  const int64_t columns = plan->batch * plan->heads * plan->col_tiles;
  double longest = 0, all = 0;
  for (int64_t n = 0; n < columns; n++) {
    const double visible = (double)plan->col_visible[n];
    if (visible > longest) longest = visible;
    all += visible;
  }
  return all / columns * jobs * parts >= longest * sa_cuda_properties_of(p->device)->processors;
}

// In how many jobs columns of `tiles` tiles are done in the least time, by all multiprocessors.
static int32_t parts_that_fit(int64_t columns, int64_t tiles, int64_t processors) {
  int32_t best = 1;
  int64_t least = INT64_MAX;
  for (int32_t parts = 1; parts <= MOST_PARTS && parts <= tiles; parts++) {
    const int64_t each = (tiles + parts - 1) / parts, besides = parts > 1 ? PART_TILES : 0;
    const int64_t rounds = (columns * parts + processors - 1) / processors;
    const int64_t time = rounds * (each + besides) + PARTS_MORE * each;
    if (time >= least) continue;
    least = time;
    best = parts;
  }
  return best;
}

static int64_t at_least(int64_t x, int64_t least) {
  return x < least ? least : x;
}

static int32_t mixed_heads(const sa_problem *p, bool descending) {
  if (!p->deterministic || !bucket(p)) {
    // Nobody waits. A job that takes a whole group of heads is long beside all the rest: then heads begin together, so
    // many that each multiprocessor has a column, and as many every time.
    const int64_t columns = key_columns(p) * (bucket(p) ? 1 : 2), count = p->batch * p->key_heads;
    const int64_t together = sa_cuda_properties_of(p->device)->processors / columns;
    const int64_t rounds = count / (together < 2 ? 2 : together);
    if (p->heads == p->key_heads) return 1;
    return (int32_t)(rounds < 2 ? count : (count + rounds - 1) / rounds);
  }
  const int64_t bytes = p->queries * (2 * p->width + 2 * p->value_width + 4 * bucket(p));
  const int64_t together = MIXED_COLUMNS / key_columns(p);
  const bool alike = sa_columns_alike(p->plan), grouped = p->heads > p->key_heads;
  if (descending || (alike && grouped)) {
    const int64_t heads = MIXED_BYTES_MANY / bytes;
    const int64_t enough = at_least(descending ? 2 * together : 0, MIXED_HEADS_MOST);
    return (int32_t)at_least(heads < enough ? heads : enough, MIXED_HEADS_LEAST);
  }
  const int64_t heads = (alike ? MIXED_BYTES_ALIKE : MIXED_BYTES) / bytes;
  const int64_t enough = at_least(together, MIXED_HEADS_SHORT);
  return (int32_t)at_least(alike && bucket(p) == 128 && heads > enough ? enough : heads, 1);
}

// Which columns are shared out, in how many jobs.
static void share_out(const sa_problem *p, hopper_backward_call *c) {
  const int processors = sa_cuda_properties_of(p->device)->processors;
  c->whole = c->jobs;
  c->parts = c->abreast = 1;
  c->alternate = c->descending;
  if (!c->deterministic || !bucket(p) || p->plan->heads > 1) return;
  const int64_t tiles = c->group * (int64_t)(c->padded / SA_TILE);
  if (c->descending) {
    // A group of heads abreast; of long groups and few columns some of its heads, as many every time. Without groups
    // each column ends only a tile sooner than the one that was begun a step before it, and the next ones would begin
    // too close to each other, and wait again: every second one is left for later.
    if (c->jobs <= SHARED_ROUNDS * processors) {
      while (c->parts < c->group && (c->group % c->parts > 0 || !parts_are_short(p, c->jobs, c->parts))) c->parts++;
    }
    c->abreast = c->group / c->parts;
    if (c->parts > 1) c->whole = 0;
    c->alternate = c->abreast == 1;
  } else if (p->plan->batch == 1 && tiles >= SHARED_TILES && !p->dalibi.data &&
             p->plan->partial + p->plan->full == sa_tiles_of_alike(p->plan)) {
    // Columns that are the same are done in rounds of all multiprocessors, and those of the last round in parts that
    // fit it. As halves they would mostly take a whole one: 68 columns have 136, and 132 multiprocessors.
    c->parts = parts_that_fit(c->jobs % processors, tiles, processors);
    if (c->parts > 1) c->whole -= c->jobs % processors;
  } else if (c->group > 1 && p->queries >= SHARED_QUERIES) {
    // Jobs of whole groups of heads are long, and in the order of turns the longest come last: of the columns that are
    // taken last, one a multiprocessor, each head is a job. Where heads are short, a job's beginning costs as much as
    // that gains.
    c->parts = c->group;
    c->whole -= c->jobs > processors ? processors : c->jobs;
  }
}

// The plane of the head that comes `place`th.
static int64_t plane_of(const sa_problem *p, const hopper_backward_call *c, int64_t place) {
  return sa_plan_plane(p->plan, c->head_order[place] / p->heads, c->head_order[place] % p->heads);
}

// Heads with most to do first, so that the blocks end at the same time.
static void order_heads(const sa_problem *p, hopper_backward_call *c) {
  const int64_t count = p->batch * p->key_heads;
  c->sorted = p->plan->batch * p->plan->heads > 1 && count <= HOPPER_BACKWARD_HEADS;
  if (!c->sorted) return;
  int64_t cost[HOPPER_BACKWARD_HEADS];
  for (int64_t flat = 0; flat < count; flat++) {
    cost[flat] = 0;
    for (int64_t head = flat % p->key_heads * c->group; head < (flat % p->key_heads + 1) * c->group; head++) {
      const int64_t plane = sa_plan_plane(p->plan, flat / p->key_heads, head);
      for (int64_t row = 0; row < p->plan->row_tiles; row++) {
        cost[flat] += p->plan->row_visible[plane * p->plan->row_tiles + row];
      }
    }
    int64_t at = flat;
    for (; at > 0 && cost[c->head_order[at - 1]] < cost[flat]; at--) c->head_order[at] = c->head_order[at - 1];
    c->head_order[at] = (uint16_t)flat;
  }
}

// The longest column of a head, in visible pairs.
static int64_t longest_column(const sa_problem *p, const hopper_backward_call *c, int64_t place) {
  const int64_t columns = key_columns(p);
  const int64_t *visible = p->plan->col_visible + columns * plane_of(p, c, place);
  int64_t most = 0;
  for (int64_t n = 0; n < columns; n++) most = at_least(most, visible[n]);
  return most;
}

// How many columns of all heads from `place` on that are mixed are seen by no query, of those that are taken first.
static int64_t columns_of_none(const sa_problem *p, const hopper_backward_call *c, int64_t place) {
  const int64_t columns = key_columns(p);
  int64_t seen = 0;
  for (int64_t head = place; head < place + c->mixed; head++) {
    const int64_t *visible = p->plan->col_visible + columns * plane_of(p, c, head);
    for (int64_t n = seen; n < columns; n++) {
      if (visible[n] > 0) seen = n + 1;
    }
  }
  return columns - seen;
}

// Of columns that begin together those of one head wait for each other at every row, and so do the next ones, as they
// begin in the order in which these end. Where heads differ, half of the first ones are of heads whose columns are at
// most half as long.
static void bring_forward(const sa_problem *p, hopper_backward_call *c) {
  if (!c->sorted || !c->deterministic || c->descending || bucket(p) != 128 || c->whole < c->jobs) return;
  if (c->group > 1 || !sa_columns_alike(p->plan)) return;
  const int64_t heads = p->batch * p->key_heads, columns = key_columns(p), longest = longest_column(p, c, 0);
  const int64_t half = sa_cuda_properties_of(p->device)->processors / 2 / c->mixed * c->mixed;
  for (int64_t place = c->mixed; place + c->mixed <= heads; place += c->mixed) {
    if (2 * longest_column(p, c, place) > longest) continue;
    const int64_t none = columns_of_none(p, c, place), first = place * columns + none * c->mixed;
    const int64_t left = (columns - none) * c->mixed, fit = left < first ? left : first;
    c->brought = (int32_t)first;
    c->lead = (int32_t)(fit < half ? fit : half);
    return;
  }
}

#define LAUNCH(type, careful, extras) hopper_backward_launch<type, 128, careful, extras>
#define DECLARE(careful, extras)                                                                                    \
  extern template int LAUNCH(__nv_bfloat16, careful, extras)(const hopper_backward_call &, unsigned, cudaStream_t); \
  extern template int LAUNCH(__half, careful, extras)(const hopper_backward_call &, unsigned, cudaStream_t);
DECLARE(false, HOPPER_BACKWARD_BIAS)
DECLARE(false, HOPPER_BACKWARD_SOFTCAP)
DECLARE(false, HOPPER_BACKWARD_ALIBI)
DECLARE(false, HOPPER_BACKWARD_DROPOUT)
DECLARE(false, HOPPER_BACKWARD_ANY)
DECLARE(true, HOPPER_BACKWARD_ANY)

// What the kernel of a problem must be able to do.
static int extras_of(const sa_problem *p) {
  const bool softcap = p->softcap > 0, alibi = p->alibi.data, dropout = p->dropout > 0, bias = p->bias.data;
  if (bias + softcap + alibi + dropout > 1 || p->softcap > HOPPER_SOFTCAP) return HOPPER_BACKWARD_ANY;
  return (bias ? HOPPER_BACKWARD_BIAS : 0) | (softcap ? HOPPER_BACKWARD_SOFTCAP : 0) |
         (alibi ? HOPPER_BACKWARD_ALIBI : 0) | (dropout ? HOPPER_BACKWARD_DROPOUT : 0);
}

template <class T, int WIDTH, bool CAREFUL>
static int launch_products(int extras, const hopper_backward_call &c, cudaStream_t stream, unsigned blocks) {
  if (extras && CAREFUL) return LAUNCH(T, true, HOPPER_BACKWARD_ANY)(c, blocks, stream);
  switch (extras) {
    case 0:
      return hopper_backward_launch<T, WIDTH, CAREFUL, 0>(c, blocks, stream);
    case HOPPER_BACKWARD_BIAS:
      return LAUNCH(T, false, HOPPER_BACKWARD_BIAS)(c, blocks, stream);
    case HOPPER_BACKWARD_SOFTCAP:
      return LAUNCH(T, false, HOPPER_BACKWARD_SOFTCAP)(c, blocks, stream);
    case HOPPER_BACKWARD_ALIBI:
      return LAUNCH(T, false, HOPPER_BACKWARD_ALIBI)(c, blocks, stream);
    case HOPPER_BACKWARD_DROPOUT:
      return LAUNCH(T, false, HOPPER_BACKWARD_DROPOUT)(c, blocks, stream);
    default:
      return LAUNCH(T, false, HOPPER_BACKWARD_ANY)(c, blocks, stream);
  }
}

template <class T, int WIDTH>
static int launch(const sa_problem *p, const hopper_backward_call &c, cudaStream_t stream) {
  const unsigned row_blocks = (unsigned)(c.batch * (int64_t)c.heads * (c.padded / 64)), heads = (unsigned)c.heads;
  const int processors = sa_cuda_properties_of(p->device)->processors, extras = extras_of(p);
  const int64_t jobs = c.whole + (int64_t)(c.jobs - c.whole) * c.parts;
  const unsigned blocks = (unsigned)(jobs < processors ? jobs : processors);
  const bool products = c.dq_out.data || c.dk_out.data || c.dv_out.data || c.slope_part;
  const bool bias = p->dbias.data && hopper_bias_gradient_covers(p);
  int status = launch_rows<T, WIDTH>(c, products || bias, stream);
  if (!status && bias) status = hopper_bias_gradient_launch(p, c, stream);
  if (!products) return status;
  if (!status) status = launch_products<T, WIDTH, false>(extras, c, stream, blocks);
  if (!status && c.dq_out.data && !c.deterministic) {
    status = sa_cuda_launch(function, hopper_backward_convert<T, WIDTH>, row_blocks, 2 * WIDTH, 0, stream, c);
  }
  if (!status && hopper_backward_leaks(c)) status = launch_products<T, WIDTH, true>(extras, c, stream, blocks);
  if (!status && c.slope_part) status = sa_cuda_launch(function, hopper_backward_slopes, heads, 256, 0, stream, c);
  return status;
}

// The bias's gradient where there are other extras.
static int launch_portable_bias(const sa_problem *p) {
  sa_problem rest = *p;
  rest.dq.data = rest.dk.data = rest.dv.data = rest.dsinks.data = rest.dalibi.data = NULL;
  return sa_cuda_portable_backward(&rest);
}

template <class T>
static int launch_wide(const sa_problem *p, const hopper_backward_call &c, cudaStream_t stream) {
  const wide_entry *entry = wide_of(p);
  const int status = launch_rows<T, 256>(c, false, stream);
  const int processors = sa_cuda_properties_of(p->device)->processors;
  return status ? status : (p->dtype == SA_BF16 ? entry->bf16 : entry->f16)(function, c, processors, stream);
}

template <class T>
static int launch_any(const sa_problem *p, const hopper_backward_call &c, cudaStream_t stream) {
  return bucket(p) == 64    ? launch<T, 64>(p, c, stream)
         : bucket(p) == 128 ? launch<T, 128>(p, c, stream)
                            : launch_wide<T>(p, c, stream);
}

int sa_cuda_hopper_backward(const sa_problem *p) {
  cudaStream_t stream;
  int status = sa_cuda_use(function, p->device, &stream);
  if (status) return status;
  const sa_device_plan *plan = sa_cuda_plan(function, p->plan, p->device);
  if (!plan) return SA_NO_MEMORY;
  hopper_backward_call c;
  memset(&c, 0, sizeof c);
  c.plan = *plan;
  c.q_values = p->q;
  c.k_values = p->k;
  c.dout_values = p->dout;
  c.out = p->out;
  c.lse = p->lse;
  c.dlse = p->dlse;
  c.dq_out = p->dq;
  c.dk_out = p->dk;
  c.dv_out = p->dv;
  c.sinks = p->sinks;
  c.dsinks = p->dsinks;
  c.batch = (int32_t)p->batch;
  c.heads = (int32_t)p->heads;
  c.key_heads = (int32_t)p->key_heads;
  c.queries = (int32_t)p->queries;
  c.keys = (int32_t)p->keys;
  c.width = (int32_t)p->width;
  c.value_width = (int32_t)p->value_width;
  c.group = (int32_t)(p->heads / p->key_heads);
  c.padded = (int32_t)padded_queries(p);
  c.scale = (float)p->scale;
  c.scale_log2 = (float)(score_scale(*p) * 1.4426950408889634);
  c.lse_unit = 1.44269504f;
  if (hopper_has_extras(p)) {
    c.scores = hopper_scores_of(p);
    c.lse_unit = c.scores.base;
    if (p->bias.data) c.dead = p->dead;
    c.dalibi = p->dalibi;
  }
  c.deterministic = p->deterministic || !bucket(p);
  c.jobs = (int32_t)(p->batch * p->key_heads * key_columns(p)) * (bucket(p) ? 1 : 2);
  c.descending = longest_first(p);
  c.mixed = mixed_heads(p, c.descending);
  share_out(p, &c);
  order_heads(p, &c);
  bring_forward(p, &c);
  void *scratch = sa_cuda_scratch(function, p->device, lay_out(p, &c, NULL));
  if (!scratch) return SA_NO_MEMORY;
  lay_out(p, &c, (char *)scratch);
  status = map_operands(p, &c);
  if (!status && !p->dout.data) {
    const int64_t bytes = p->queries * p->value_width * 2;
    status = sa_cuda_check(function, cudaMemsetAsync(c.dout_values.data, 0, (size_t)bytes, stream));
  }
  if (status) {
    sa_cuda_scratch_release(p->device, scratch);
    return status;
  }
  status = p->dtype == SA_BF16 ? launch_any<__nv_bfloat16>(p, c, stream) : launch_any<__half>(p, c, stream);
  sa_cuda_scratch_release(p->device, scratch);
  return !status && p->dbias.data && !hopper_bias_gradient_covers(p) ? launch_portable_bias(p) : status;
}
