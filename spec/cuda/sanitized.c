// every family of attention kernels on a CUDA device, forward and backward, against the CPU's: what compute-sanitizer
// watches (make test-sanitizers). `sanitized [word ...]` runs the cases whose names hold all the words
#include <math.h>
#include <safeattn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BATCH = 1, HEADS = 4, KEY_HEADS = 2, QUERIES = 200, KEYS = 330 };

// Every option is a bit; a case has all of its bits at once.
enum {
  BIAS = 1,
  SOFTCAP = 2,
  ALIBI = 4,
  DROPOUT = 8,
  SINKS = 16,
  DENSE = 32,   // a random mask with dead rows and keys, else a window
  POISON = 64,  // NaN in a key and in a query, so that the careful paths run
  ANY_ORDER = 128,
  FEW = 256,  // few queries and many keys: decoding
  ALL = 512   // no mask, and as many queries and keys as make it worth while to split f32 before
};

typedef struct sanitized_case {
  const char *name;
  int dtype, width, options;
} sanitized_case;

static const sanitized_case cases[] = {
    {"bf16-64-window", SA_BF16, 64, 0},
    {"bf16-128-window-sinks", SA_BF16, 128, SINKS},
    {"bf16-128-random-order", SA_BF16, 128, DENSE | ANY_ORDER},
    {"bf16-128-poison", SA_BF16, 128, POISON},
    {"bf16-96-random", SA_BF16, 96, DENSE},
    {"bf16-192-window", SA_BF16, 192, 0},
    {"bf16-256-random", SA_BF16, 256, DENSE},
    {"bf16-128-extras", SA_BF16, 128, BIAS | SOFTCAP | ALIBI | DROPOUT | SINKS | DENSE},
    {"bf16-128-bias-sinks", SA_BF16, 128, BIAS | SINKS | DENSE},
    {"bf16-64-alibi-dropout", SA_BF16, 64, ALIBI | DROPOUT},
    {"f16-128-softcap-poison", SA_F16, 128, SOFTCAP | BIAS | POISON},
    {"bf16-128-decoding", SA_BF16, 128, FEW},
    {"f16-64-poison", SA_F16, 64, POISON | DENSE | ANY_ORDER},
    {"f16-128-window", SA_F16, 128, 0},
    {"f32-64-random", SA_F32, 64, DENSE | POISON},
    {"f32-64-all", SA_F32, 64, ALL},
    {"f32-128-all", SA_F32, 128, ALL},
    {"f64-64-window", SA_F64, 64, ALIBI | BIAS},
};

static void check(int status) {
  if (status == SA_OK) return;
  printf("%s: %s\n", sa_status_name(status), sa_last_error());
  exit(1);
}

enum { Q, K, V, DOUT, DLSE, BIASES, SLOPES, LOGITS, INPUTS };
enum { OUT, LSE, DEAD, DQ, DK, DV, DBIAS, DSLOPES, DLOGITS, RESULTS };
static const char *const result_names[RESULTS] = {"out", "lse", "dead", "dq", "dk", "dv", "dbias", "dalibi", "dsinks"};

typedef struct run {
  sa_tensor in[INPUTS], result[RESULTS];
  char forward[36], backward[36];  // the kernels
} run;

static void make(sa_tensor *t, int dtype, int ndim, const int64_t *shape, int seed) {
  check(sa_tensor_new(t, dtype, SA_CPU, ndim, shape));
  check(sa_randn(t, (uint64_t)seed));
}

static void make_inputs(const sanitized_case *c, sa_tensor in[INPUTS]) {
  const int64_t queries = c->options & FEW ? 2 : c->options & ALL ? 2 * QUERIES : QUERIES;
  const int64_t keys = c->options & FEW ? 4096 : c->options & ALL ? 2 * QUERIES + 9 : KEYS;
  make(&in[Q], c->dtype, 4, (const int64_t[]){BATCH, HEADS, queries, c->width}, 1);
  make(&in[K], c->dtype, 4, (const int64_t[]){BATCH, KEY_HEADS, keys, c->width}, 2);
  make(&in[V], c->dtype, 4, (const int64_t[]){BATCH, KEY_HEADS, keys, c->width}, 3);
  make(&in[DOUT], c->dtype, 4, (const int64_t[]){BATCH, HEADS, queries, c->width}, 4);
  make(&in[DLSE], c->dtype == SA_F64 ? SA_F64 : SA_F32, 3, (const int64_t[]){BATCH, HEADS, queries}, 5);
  make(&in[BIASES], c->dtype, 4, (const int64_t[]){1, HEADS, queries, keys}, 6);
  make(&in[SLOPES], SA_F32, 1, (const int64_t[]){HEADS}, 7);
  make(&in[LOGITS], c->dtype, 1, (const int64_t[]){HEADS}, 8);
  check(sa_binary_scalar(SA_MUL, &in[SLOPES], 0.05, false, &in[SLOPES]));
  if (!(c->options & POISON)) return;
  // Some rows see the key, some do not.
  check(sa_set(&in[K], (const int64_t[]){0, 1, 100, 3}, NAN));
  check(sa_set(&in[V], (const int64_t[]){0, 0, 90, 5}, INFINITY));
  check(sa_set(&in[DOUT], (const int64_t[]){0, 2, 150, 7}, NAN));
  check(sa_set(&in[Q], (const int64_t[]){0, 3, 20, 0}, NAN));
}

// initcheck does not see what TMA writes, but it sees copies: the output goes to the host and back.
static void copy_there_and_back(sa_tensor *t) {
  sa_tensor host = {0};
  check(sa_tensor_new(&host, t->dtype, SA_CPU, t->ndim, t->shape));
  check(sa_copy(&host, t));
  check(sa_copy(t, &host));
  sa_tensor_release(&host);
}

static void attend(const sanitized_case *c, int device, const sa_tensor *inputs, const sa_mask *mask, run *r) {
  for (int i = 0; i < INPUTS; i++) {
    check(sa_tensor_new(&r->in[i], inputs[i].dtype, device, inputs[i].ndim, inputs[i].shape));
    check(sa_copy(&r->in[i], &inputs[i]));
  }
  sa_attention a;
  sa_attention_init(&a);
  a.q = &r->in[Q], a.k = &r->in[K], a.v = &r->in[V], a.mask = mask;
  if (c->options & BIAS) a.bias = &r->in[BIASES];
  if (c->options & SOFTCAP) a.softcap = 20;
  if (c->options & ALIBI) a.alibi = &r->in[SLOPES];
  if (c->options & DROPOUT) a.dropout = 0.25, a.seed = 9;
  if (c->options & SINKS) a.sinks = &r->in[LOGITS];
  a.deterministic = !(c->options & ANY_ORDER);
  a.out = &r->result[OUT], a.lse = &r->result[LSE], a.dead = &r->result[DEAD];
  check(sa_forward(&a));
  memcpy(r->forward, a.kernel, sizeof a.kernel);
  copy_there_and_back(a.out);
  a.dout = &r->in[DOUT], a.dlse = &r->in[DLSE];
  a.dq = &r->result[DQ], a.dk = &r->result[DK], a.dv = &r->result[DV];
  if (a.bias) a.dbias = &r->result[DBIAS];
  if (a.alibi) a.dalibi = &r->result[DSLOPES];
  if (a.sinks) a.dsinks = &r->result[DLOGITS];
  check(sa_backward(&a));
  memcpy(r->backward, a.kernel, sizeof a.kernel);
}

static void release(run *r) {
  for (int i = 0; i < INPUTS; i++) sa_tensor_release(&r->in[i]);
  for (int i = 0; i < RESULTS; i++) sa_tensor_release(&r->result[i]);
}

static sa_mask *mask_of(const sanitized_case *c) {
  sa_mask *mask;
  if (c->options & (FEW | ALL)) {
    check(sa_mask_all(&mask));
  } else if (c->options & DENSE) {
    sa_mask *random, *first, *rest;
    check(sa_mask_random(&random, 0.4, 1));
    check(sa_mask_padding(&first, (const int64_t[]){250}, (const int64_t[]){170}, 1));
    check(sa_mask_and(&rest, random, first));
    sa_mask_release(random);
    sa_mask_release(first);
    return rest;
  } else {
    check(sa_mask_window(&mask, 48, 3, SA_TOP_LEFT));
  }
  return mask;
}

// Returns how many results differ.
static int compare(const sanitized_case *c, const run *got, const run *wanted) {
  // The CPU keeps f32 where a GPU has halves on the way.
  const double tolerance = c->dtype == SA_BF16 ? 6e-2 : c->dtype == SA_F16 ? 2e-2 : c->dtype == SA_F32 ? 1e-3 : 1e-7;
  int failures = 0;
  for (int i = 0; i < RESULTS; i++) {
    if (!got->result[i].data) continue;
    sa_tensor here = {0};
    int near = 0;
    check(sa_tensor_new(&here, got->result[i].dtype, SA_CPU, got->result[i].ndim, got->result[i].shape));
    check(sa_copy(&here, &got->result[i]));
    // Sums over all queries and keys.
    const double more = i >= DBIAS ? 10 : 1;
    check(sa_allclose(&here, &wanted->result[i], more * tolerance, tolerance, true, &near));
    if (!near) printf("%s: %s differs\n", c->name, result_names[i]);
    failures += !near;
    sa_tensor_release(&here);
  }
  return failures;
}

static int run_case(const sanitized_case *c) {
  sa_tensor inputs[INPUTS] = {{0}};
  run gpu = {0}, cpu = {0};
  make_inputs(c, inputs);
  sa_mask *mask = mask_of(c);
  attend(c, SA_CUDA, inputs, mask, &gpu);
  attend(c, SA_CPU, inputs, mask, &cpu);
  const int failures = compare(c, &gpu, &cpu);
  printf("%-24s %s, %s\n", c->name, gpu.forward, gpu.backward);
  fflush(stdout);
  release(&gpu);
  release(&cpu);
  for (int i = 0; i < INPUTS; i++) sa_tensor_release(&inputs[i]);
  sa_mask_release(mask);
  return failures;
}

int main(int count, char **words) {
  int failures = 0, chosen = 0;
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    bool wanted = true;
    for (int k = 1; k < count; k++) wanted = wanted && strstr(cases[i].name, words[k]);
    if (!wanted) continue;
    chosen++;
    failures += run_case(&cases[i]);
  }
  sa_cuda_empty_cache(SA_CUDA);
  if (!chosen) printf("no case has these words\n");
  return failures > 0 || !chosen;
}
