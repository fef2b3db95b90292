// the fused kernels for bf16 with AMX: the algorithm of flash.h, its products by tiles (amx_product.h)
//
// Reached 2.3 times (D64) and 3 times (D128) the speed of AVX-512's forward, 2.2 and 2.8 times that of its backward (B1
// H8 N2048, one core of a Sapphire Rapids); where keys come in strips (amx_run.h) the forward has become 1.17 and 1.22
// times as fast since. In stretches, S^T, P^T, V and o together are twice the first cache, so P is split in the
// rows of the scores; stretches of 64 keys, which would fit, read and write o twice as often and lost 15 % at D128.
//
// The softmax is that of AVX-512. What AMX's products do that fused multiply-adds do not: a subnormal operand counts as
// 0, and a sum below 2^-126 becomes 0. A score does not care. Outputs and gradients do where everything is that small:
// a sum of n products may be off by some n 2^-126. So every call notes whether something of an ordinary size (2^-60)
// came up among the outputs, or among Q, dO, dS and dQ; when not, it is computed again as AVX-512 does it. Both look at
// what is visible alone, and take what is not finite for ordinary unless something smaller came up: else a NaN that
// some rows see would change bits of others. What remains: elements below 2^-110 beside others above 2^-60, subnormal
// ones that all became 0 beside a NaN, and a subnormal number that meets an infinite one, which gives NaN, not
// infinity.
#if defined(__AMX_BF16__) || defined(SAFEATTN_EMULATED_AMX)
#include <immintrin.h>
#if defined(SAFEATTN_EMULATED_AMX)
#include "spec/emulator/amx.h"
#endif

#include "threads.h"

#define VECTOR_BYTES 64
#define OWN_PRODUCTS

// Runs every task between the loading of the tiles' shape and their release, after which a thread's state is small
// again.
typedef struct amx_task {
  sa_task task;
  void *argument;
} amx_task;

static void with_tiles(void *argument, int64_t item, int worker) {
  static const struct {
    _Alignas(64) uint8_t palette;
    uint8_t start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shape = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
  const amx_task *own = argument;
  _tile_loadconfig(&shape);
  own->task(own->argument, item, worker);
  _tile_release();
}

static void parallel_with_tiles(int workers, int64_t items, sa_task task, void *argument) {
  sa_parallel(workers, items, with_tiles, &(amx_task){task, argument});
}
#define sa_parallel parallel_with_tiles

#include "kernels/cpu/flash_needs.h"

#include "kernels/cpu/real_f32.h"
#include "kernels/cpu/avx512_f32.h"
#include "kernels/cpu/flash_tile.h"

#include "kernels/cpu/flash_forward.h"

#include "kernels/cpu/flash_backward.h"

// Dot products of few queries are AVX-512's, and so is what a scale beyond all reason would make of a score that was
// taken for 0.
static bool serves(const sa_problem *p) {
  return p->key_heads && p->queries * (p->heads / p->key_heads) > FEW_f32 && fabs(p->scale) < 0x1p60;
}

typedef struct turning {
  const sa_problem *p;
  const sa_operand *x;
  int width;
  bool finite;
  const amx_problem *to;
} turning;

static void turn_tile(void *argument, int64_t item, int worker) {
  const turning *job = argument;
  const sa_problem *p = job->p;
  const int64_t plane = item / job->to->groups, first = item % job->to->groups * KEYS;
  const int64_t size = job->to->tiles * AMX_STEPS * AMX_TILE;
  uint16_t *to = job->to->turned + item * size;
  for (int64_t key = first; key < p->keys && key < first + KEYS; key += AMX_DEPTH) {
    const int count = p->keys - key < AMX_DEPTH ? (int)(p->keys - key) : AMX_DEPTH;
    amx_turn_keys(job->x, plane / p->key_heads, plane % p->key_heads, key, count, job->width,
                  to + (key - first) / AMX_DEPTH * AMX_TILE);
  }
  if (job->finite) amx_finite_part(to, size, to);
}

// A problem with V or K turned, every non-finite element 0 when only the `finite` ones are wanted.
static int open_problem(const char *function, const sa_problem *p, const sa_operand *x, int64_t width, bool finite,
                        amx_problem *problem) {
  *problem = (amx_problem){.base = *p, .groups = (p->keys + KEYS - 1) / KEYS, .tiles = amx_tiles(width)};
  const int64_t planes = p->batch * p->key_heads;
  const int64_t elements = planes * problem->groups * problem->tiles * AMX_STEPS * AMX_TILE;
  problem->turned = sa_allocate(function, elements * (int64_t)sizeof *problem->turned);
  if (!problem->turned) return SA_NO_MEMORY;
  turning job = {p, x, (int)width, finite, problem};
  sa_parallel(sa_workers(4.0 * (double)elements), planes * problem->groups, turn_tile, &job);
  return SA_OK;
}

static int forward(const sa_problem *p) {
  const sa_attention_kernels *other = &sa_cpu_avx512.fused[SA_BF16];
  if (!serves(p)) return other->forward(p);
  amx_problem problem;
  int status = open_problem("sa_forward", p, &p->v, p->value_width, false, &problem);
  if (status) return status;
  status = forward_f32(&problem.base);
  sa_release(problem.turned);
  return status || amx_ordinary(&problem, AMX_OUT) ? status : other->forward(p);
}

static int backward(const sa_problem *p) {
  const sa_attention_kernels *other = &sa_cpu_avx512.fused[SA_BF16];
  if (!serves(p)) return other->backward(p);
  amx_problem problem;
  int status = open_problem("sa_backward", p, &p->k, p->width, true, &problem);
  if (status) return status;
  status = backward_f32(&problem.base);
  sa_release(problem.turned);
  const bool dscores = amx_ordinary(&problem, AMX_DSCORES);
  const bool fine = (!p->dk.data || (amx_ordinary(&problem, AMX_QUERY) && dscores)) &&
                    (!p->dq.data || (amx_ordinary(&problem, AMX_DQUERY) && dscores)) &&
                    (!p->dv.data || amx_ordinary(&problem, AMX_DOUT));
  return status || fine ? status : other->backward(p);
}

const sa_cpu_kernels sa_cpu_amx = {.fused = {[SA_BF16] = {"fused-bf16-amx", forward, backward}}};
#endif
