// what the forward kernels of Hopper cover, and how a call of attention becomes a launch of them
#include "kernels/cuda/hopper_forward.cuh"

#include <float.h>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/hopper_operands.cuh"
#include "kernels/cuda/score_scale.cuh"

// A kernel's widths: those of q and v are rounded up to them with zeros, which TMA adds.
typedef struct shape_entry {
  int width, value_width, extras, keys, blocks;
  bool sends_output;
  int (*bf16)(const char *, const forward_call &, int, cudaStream_t);
  int (*f16)(const char *, const forward_call &, int, cudaStream_t);
} shape_entry;

#define SHAPES(X)                 \
  X(64, 64, 0)                    \
  X(96, 96, 0)                    \
  X(128, 128, 0)                  \
  X(192, 128, 0)                  \
  X(192, 192, 0)                  \
  X(256, 256, 0)                  \
  X(64, 64, FORWARD_SOFTCAP)      \
  X(64, 64, FORWARD_ALIBI)        \
  X(64, 64, FORWARD_DROPOUT)      \
  X(64, 64, FORWARD_HALF_BIAS)    \
  X(64, 64, FORWARD_FLOAT_BIAS)   \
  X(64, 64, FORWARD_ANY)          \
  X(128, 128, FORWARD_SOFTCAP)    \
  X(128, 128, FORWARD_ALIBI)      \
  X(128, 128, FORWARD_DROPOUT)    \
  X(128, 128, FORWARD_HALF_BIAS)  \
  X(128, 128, FORWARD_FLOAT_BIAS) \
  X(128, 128, FORWARD_ANY)
#define LAUNCH(type, ...) hopper_forward_launch<forward_shape<type, __VA_ARGS__>>
#define DECLARE(...)                                                                                             \
  extern template int LAUNCH(__nv_bfloat16, __VA_ARGS__)(const char *, const forward_call &, int, cudaStream_t); \
  extern template int LAUNCH(__half, __VA_ARGS__)(const char *, const forward_call &, int, cudaStream_t);
#define ENTRY(w, v, extras)                           \
  {w,                                                 \
   v,                                                 \
   extras,                                            \
   forward_shape<__half, w, v, extras>::keys,         \
   forward_shape<__half, w, v, extras>::blocks,       \
   forward_shape<__half, w, v, extras>::sends_output, \
   LAUNCH(__nv_bfloat16, w, v, extras),               \
   LAUNCH(__half, w, v, extras)},
SHAPES(DECLARE)
static const shape_entry shapes[] = {SHAPES(ENTRY)};

// What a kernel must be able to do: one thing, or anything.
static int extras_of(const sa_problem *p) {
  const bool bias = p->bias.data, softcap = p->softcap > 0, alibi = p->alibi.data, dropout = p->dropout > 0;
  if (bias + softcap + alibi + dropout > 1) return FORWARD_ANY;
  if (softcap) return p->softcap <= HOPPER_SOFTCAP ? FORWARD_SOFTCAP : FORWARD_ANY;
  if (alibi) return FORWARD_ALIBI;
  if (dropout) return FORWARD_DROPOUT;
  if (!bias) return 0;
  if (p->bias.dtype == SA_F32) return hopper_bias_pairs(p) ? FORWARD_FLOAT_BIAS : FORWARD_ANY;
  return p->bias_shape[3] == p->keys && sa_cuda_tensor_map_fits(&p->bias, p->bias_shape) ? FORWARD_HALF_BIAS
                                                                                         : FORWARD_ANY;
}

static const shape_entry *shape_of(const sa_problem *p) {
  const int extras = extras_of(p);
  for (const shape_entry &shape : shapes) {
    if (p->width <= shape.width && p->value_width <= shape.value_width && extras == shape.extras) return &shape;
  }
  return NULL;
}

static int64_t row_tiles(const sa_problem *p) {
  return (p->queries + SA_TILE - 1) / SA_TILE;
}

// Whether 16 bytes of a row can be written at once, the rows of a tile 32 bits apart.
static bool writes_pieces(const sa_operand *x) {
  return (uintptr_t)x->data % 16 == 0 && x->stride[0] % 8 == 0 && x->stride[1] % 8 == 0 && x->stride[2] % 8 == 0 &&
         x->stride[2] < INT32_MAX / SA_TILE;
}

bool sa_cuda_hopper_forward_covers(const sa_problem *p) {
  if (p->dtype != SA_BF16 && p->dtype != SA_F16) return false;
  if (sa_cuda_properties_of(p->device)->major != 9) return false;
  if (!p->batch || !p->heads || !p->queries || !p->keys || !p->width || !p->value_width) return false;
  if (!shape_of(p) || p->value_width % 8 || p->weights.data) return false;
  const double scale_log2 = p->scale * 1.4426950408889634;
  if (hopper_has_extras(p) ? !hopper_scores_fit(p) : !(scale_log2 >= FLT_MIN && scale_log2 <= FLT_MAX)) return false;
  if (p->queries > INT32_MAX - SA_TILE || p->keys > INT32_MAX - SA_TILE) return false;
  if (p->batch * p->heads > INT32_MAX / 2 / row_tiles(p)) return false;
  if (!hopper_inputs_fit(p)) return false;
  // Where the output is not there yet, it will be new memory.
  if (p->out.data && !writes_pieces(&p->out)) return false;
  if (!hopper_fits(p, &p->out, p->heads, p->queries, p->value_width)) return false;
  // Few queries that hopper_decoding.cu does not take: the portable kernels read K and V once for all heads that share
  // them. On an H100, 16 x 8192 keys of 32:8 heads took these kernels 391 us, four times what one batch of 131072 keys,
  // the same bytes, took those; on an H200, 1 x 1024 keys 20 us, and those 15.5, 64 x 128 57 and 14. Where no heads
  // share keys, 16 x 512 keys of 16 heads with 16 queries and a bias 36 and 68.
  const int64_t group = p->heads / p->key_heads;
  if (p->queries * group <= 16 && p->keys >= (group > 1 && !hopper_has_extras(p) ? 1 : 8) * SA_TILE) return false;
  // Few rows of tiles with many keys each leave most of the device idle: the portable kernels split the keys.
  const int64_t items = p->batch * p->heads * row_tiles(p);
  return items * 2 >= sa_cuda_properties_of(p->device)->processors || p->keys <= 8 * SA_TILE;
}

// Heads that share a plane of the plan, and whose K and V fit the second-level cache together, are worked on together:
// the longest rows of tiles first, so that the blocks end at the same time.
static void group_heads(const sa_problem *p, forward_call *c) {
  const int64_t flat = p->batch * p->heads;
  const int64_t alike = p->plan->heads > 1 ? 1 : p->plan->batch > 1 ? p->heads : flat;
  const int64_t bytes = p->keys * (p->width + p->value_width) * 2 / (p->heads / p->key_heads) + 1;
  int64_t heads = (32 << 20) / bytes;
  if (heads > alike) heads = alike;
  if (heads < 1) heads = 1;
  while (alike % heads) heads--;
  c->group_heads = (int32_t)heads;
  c->group_items = (int32_t)(heads * row_tiles(p));
  const int64_t groups = flat / heads, planes = p->plan->batch * p->plan->heads;
  c->ordered = planes > 1 && groups <= FORWARD_GROUPS;
  if (!c->ordered) return;
  // Groups with most to do first. A group is of one plane, so a plane's visible pairs tell.
  int64_t cost[FORWARD_GROUPS];
  for (int64_t g = 0; g < groups; g++) {
    const int64_t plane = sa_plan_plane(p->plan, g * heads / p->heads, g * heads % p->heads);
    cost[g] = 0;
    for (int64_t row = 0; row < p->plan->row_tiles; row++)
      cost[g] += p->plan->row_visible[plane * p->plan->row_tiles + row];
    int64_t at = g;
    for (; at > 0 && cost[c->group_order[at - 1]] < cost[g]; at--) c->group_order[at] = c->group_order[at - 1];
    c->group_order[at] = (uint16_t)g;
  }
}

static int tensor_maps(const char *function, const sa_problem *p, const shape_entry *shape, forward_call *c) {
  int status =
      hopper_map(function, p, &c->q, &p->q, p->heads, p->queries, p->width, SA_TILE, &c->q_batch_step, &c->q_head_step);
  if (!status) {
    status = hopper_map(function, p, &c->k, &p->k, p->key_heads, p->keys, p->width, shape->keys, &c->k_batch_step,
                        &c->k_head_step);
  }
  if (!status) {
    status = hopper_map(function, p, &c->v, &p->v, p->key_heads, p->keys, p->value_width, shape->keys, &c->v_batch_step,
                        &c->v_head_step);
  }
  if (!status && shape->sends_output) {
    status = hopper_map(function, p, &c->o, &p->out, p->heads, p->queries, p->value_width, SA_TILE / 8,
                        &c->o_batch_step, &c->o_head_step);
  }
  if (status || shape->extras != FORWARD_HALF_BIAS) return status;
  c->bias_batch_step = sa_cuda_tensor_map_step(&p->bias, p->bias_shape, 0);
  c->bias_head_step = sa_cuda_tensor_map_step(&p->bias, p->bias_shape, 1);
  c->bias_row_step = sa_cuda_tensor_map_step(&p->bias, p->bias_shape, 2);
  return sa_cuda_tensor_map(function, &c->bias, &p->bias, p->bias_shape, c->bias_row_step ? SA_TILE : 1);
}

int sa_cuda_hopper_forward(const sa_problem *p) {
  static const char function[] = "sa_forward";
  cudaStream_t stream;
  int status = sa_cuda_use(function, p->device, &stream);
  if (status) return status;
  const sa_device_plan *plan = sa_cuda_plan(function, p->plan, p->device);
  if (!plan) return SA_NO_MEMORY;
  const shape_entry *shape = shape_of(p);
  forward_call c = {};
  c.plan = *plan;
  c.values = p->v;
  c.out = p->out;
  c.lse = p->lse;
  c.dead = p->dead;
  c.sinks = p->sinks;
  c.heads = (int32_t)p->heads;
  c.key_heads = (int32_t)p->key_heads;
  c.queries = (int32_t)p->queries;
  c.keys = (int32_t)p->keys;
  c.value_width = (int32_t)p->value_width;
  c.scale_log2 = (float)(score_scale(*p) * 1.4426950408889634);
  c.scores = hopper_scores_of(p);
  const bool one_plane = p->plan->batch * p->plan->heads == 1, one_bias = p->bias.data && p->bias.stride[0] == 0;
  if (one_plane && one_bias && p->bias.stride[1] != 0) c.batches = (int32_t)p->batch;
  c.items = (int32_t)(p->batch * p->heads * row_tiles(p));
  group_heads(p, &c);
  status = tensor_maps(function, p, shape, &c);
  if (!status) status = sa_cuda_zeros(function, p->device, 2, (uint32_t **)&c.counter);
  if (status) return status;
  c.flagged_next = (int32_t *)sa_cuda_scratch(function, p->device, (int64_t)c.items * sizeof(int32_t));
  if (!c.flagged_next) return SA_NO_MEMORY;
  const int most = sa_cuda_properties_of(p->device)->processors * shape->blocks;
  const int blocks = c.items < most ? c.items : most;
  status = (p->dtype == SA_BF16 ? shape->bf16 : shape->f16)(function, c, blocks, stream);
  sa_cuda_scratch_release(p->device, c.flagged_next);
  return status;
}
