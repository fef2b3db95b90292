// few queries against many keys on Hopper: what is covered, and how a call of attention becomes a launch
#include "kernels/cuda/hopper_decoding.cuh"

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/hopper_operands.cuh"

// A kernel's width: those of q and v are rounded up to it with zeros, which TMA adds.
typedef struct decoding_entry {
  int width, keys;  // of a step
  int (*bf16)(const char *, const decoding_job &, dim3, cudaStream_t);
  int (*f16)(const char *, const decoding_job &, dim3, cudaStream_t);
} decoding_entry;

#define WIDTHS(X) X(64) X(128) X(256)
#define LAUNCH(products, width) hopper_decoding_launch<decoding_shape<products, width>>
#define ENTRY(width) \
  {width, decoding_shape<products_f16, width>::KEYS, LAUNCH(products_bf16, width), LAUNCH(products_f16, width)},
static const decoding_entry entries[] = {WIDTHS(ENTRY)};

static const decoding_entry *entry_of(const sa_problem *p) {
  for (const decoding_entry &entry : entries)
    if (p->width <= entry.width && p->value_width <= entry.width) return &entry;
  return NULL;
}

enum {
  DECODING_FEW_ROWS = 16,        // of an item: a group
  DECODING_KEYS = 8 * SA_TILE,   // at least
  DECODING_SHORT = 2 * SA_TILE,  // the same of few rows of several heads
  DECODING_EVEN_SHARE = 768      // units of a block up to which it matters where items end
};

// Up to 16 rows the portable kernels are faster where blocks have many ends of items: 256 x 1024 keys of 32:8 heads
// take them 256 us, these 272, but 128 x 1024 146 and 143. Of lists that differ from batch to batch each is looked up
// in memory, in the stream of keys: 64 x 2048 keys with padding 92 and 129, but 16 x 8192 98 and 85. More rows would
// take them the keys once per 16.
static bool ends_are_few(const sa_problem *p) {
  const bool alike = p->plan->batch * p->plan->heads == 1, narrow = p->width <= 128 && p->value_width <= 128;
  const int64_t items = p->batch * (p->plan->heads == 1 ? p->key_heads : p->heads);
  return items <= sa_cuda_properties_of(p->device)->processors * (alike && narrow ? 8 : 1);
}

bool sa_cuda_hopper_decoding_covers(const sa_problem *p) {
  if (p->dtype != SA_BF16 && p->dtype != SA_F16) return false;
  if (sa_cuda_properties_of(p->device)->major != 9) return false;
  if (!p->batch || !p->heads || !p->queries || !p->width || !p->value_width) return false;
  const int64_t group = p->heads / p->key_heads, rows = p->queries * group;
  const bool few = rows <= DECODING_FEW_ROWS;
  if (rows > DECODING_ROWS || p->keys < (few && group > 1 ? DECODING_SHORT : DECODING_KEYS)) return false;
  if (!entry_of(p) || p->width % 8 || p->value_width % 8 || !plain_forward(*p)) return false;
  // Units are counted in 32 bits.
  if (p->keys > INT32_MAX - SA_TILE || p->batch * p->heads > INT32_MAX / ((p->keys + SA_TILE) / 16)) return false;
  return (!few || ends_are_few(p)) && hopper_inputs_fit(p);
}

// Fewer blocks where these have whole items, or items whole blocks, each: a block that has an item's end and the next
// one's beginning is late. 8192 keys of 8 heads take 128 blocks 12.6 us and 132 blocks 15.3, 131072 keys 127 and 126,
// 16 queries of them 171 and 175.
static int64_t even_blocks(int64_t items, int64_t blocks) {
  for (int64_t fewer = blocks; fewer >= blocks - blocks / 8; fewer--)
    if (fewer % items == 0 || items % fewer == 0) return fewer;
  return blocks;
}

// What are the items, and how their units are shared out among at most so many blocks; returns the grid of these.
static dim3 share_items(const sa_problem *p, const sa_device_plan *plan, int pieces, int64_t blocks, decoding_job *d) {
  forward_job &job = d->forward;
  job.group = p->heads / p->key_heads;
  job.packed = plan->heads == 1;
  const int64_t heads = job.packed ? p->key_heads : p->heads;
  d->heads = (int32_t)heads;
  d->rows = (int32_t)(job.packed ? job.group * p->queries : p->queries);
  // A power of two, so that all teams of warps are whole.
  d->groups = d->rows <= 16 ? 1 : d->rows <= 32 ? 2 : 4;
  d->teams = DECODING_WARPS / d->groups;
  d->planes = (int32_t)(plan->batch * plan->heads);
  const int64_t items = p->batch * heads;
  d->repeats = (int32_t)(d->planes == 1 ? items : plan->heads == 1 ? heads : 1);
  d->tiles = (int32_t)plan->listed;
  d->cycle = (int32_t)(plan->listed * d->repeats * pieces);
  const int64_t units = items / (d->planes * d->repeats) * d->cycle;
  if (d->planes == 1 && units / blocks <= DECODING_EVEN_SHARE) blocks = even_blocks(items, blocks);
  if (blocks > units) blocks = units;
  d->together = d->planes == 1 && blocks > items && blocks % items == 0;
  const int64_t spans = d->together ? items : 1, sharers = blocks / spans;
  d->span = (int32_t)(units / spans);
  d->share = (int32_t)(d->span / sharers);
  d->longer = (int32_t)(d->span % sharers);
  if (d->planes == 1 && p->plan->row_start[1] <= DECODING_RUNS) {
    d->run_count = (int32_t)p->plan->row_start[1];
    memcpy(d->runs, p->plan->row_runs, d->run_count * sizeof *d->runs);
  }
  return dim3((unsigned)sharers, (unsigned)spans);
}

int sa_cuda_hopper_decoding(const sa_problem *p) {
  cudaStream_t stream;
  int status = sa_cuda_use(forward_name, p->device, &stream);
  if (status) return status;
  const sa_device_plan *plan = sa_cuda_plan(forward_name, p->plan, p->device);
  if (!plan) return SA_NO_MEMORY;
  const decoding_entry *entry = entry_of(p);
  decoding_job d = {};
  d.forward.p = *p;
  d.forward.plan = *plan;
  d.forward.v = tile_source_of(p->v, 2, 0, 0, p->keys, p->value_width, true);
  d.forward.out_aligned = rows_aligned(p->out, 2);
  d.factor = (float)(score_scale(*p) * 1.4426950408889634);
  const int64_t processors = sa_cuda_properties_of(p->device)->processors;
  const dim3 grid = share_items(p, plan, SA_TILE / entry->keys, processors, &d);
  // 256 bytes at a time take 8 % longer than 128, with which memory is read as fast as it can be.
  const CUtensorMapL2promotion fetched = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  status = hopper_map(forward_name, p, &d.k, &p->k, p->key_heads, p->keys, p->width, entry->keys, &d.k_batch_step,
                      &d.k_head_step, fetched);
  if (!status)
    status = hopper_map(forward_name, p, &d.v, &p->v, p->key_heads, p->keys, p->value_width, entry->keys,
                        &d.v_batch_step, &d.v_head_step, fetched);
  if (!status)
    status =
        sa_cuda_zeros(forward_name, p->device, processors * DECODING_ROWS * DECODING_ROW_WORDS, (uint32_t **)&d.parts);
  if (status) return status;
  return (p->dtype == SA_BF16 ? entry->bf16 : entry->f16)(forward_name, d, grid, stream);
}
