// the forward of bf16 past a run of keys, whose scores are q . k alone; part of amx_product.h
//
// Keys come in strips of 32. A strip's scores fit into the first cache and become weights, in two parts, while the
// tiles multiply the next strip's and, two tiles of V's columns by two of queries at a time, what the four strips
// before have become. A row's weights are relative to a peak that rises only where a score exceeds it by 2^8: only then
// are the strips in hand brought to an end and o scaled. Sums are closed strip by strip, so how long a run is changes
// no bit. All eight tiles are in use: 0 to 3 are sums, 4 and 5 the left operand, 6 and 7 the right.
//
// 1.22 times as fast as by stretches of 128 keys, one step after the other, at D128, 1.17 times at D64 (B1 H8 N2048,
// one core of a Sapphire Rapids).

enum {
  AMX_STRIP = AMX_DEPTH,
  AMX_RUN = 4 * KEYS,
  AMX_PASS = 4,  // strips of a product with V
  AMX_STRIP_PAIRS = AMX_STRIP / 2
};

typedef struct amx_run {
  const NAME(block) * block;
  NAME(gathered) * gathered;
  const uint16_t *query, *key, *values;
  int64_t key_row;  // bytes
  int first;        // among the KEYS keys that `values` begin with
  int tiles, value_tiles, steps;
  bool started;
  sa_forecast *forecast;  // may be NULL
  REAL *strips[2];        // [tile of queries][AMX_STRIP][LANES]: S^T of the even and the odd strips
  uint16_t *weights[2];   // [AMX_PASS][part][tile of queries][AMX_TILE]: P^T of the even and the odd passes
  // The strip whose weights are being made, and how many pairs of its keys, tile by tile, have theirs.
  const REAL *scores;
  uint16_t *to;
  int pair;
  _Alignas(64) REAL minus_base[QUERIES], sum[2][QUERIES];
} amx_run;

static NAME(vector) amx_run_scale(const NAME(block) * block) {
  return NAME(set)((REAL)(block->p->scale * 1.4426950408889634));
}

// Weights of so many times two pairs of keys more.
static inline __attribute__((always_inline)) void amx_weigh(amx_run *run, const uint64_t *visible, NAME(vector) scale,
                                                            int times) {
  for (; times && run->pair < run->tiles * AMX_STRIP_PAIRS; times--, run->pair += 2) {
    const int j = run->pair / AMX_STRIP_PAIRS * LANES;
    const REAL *from = run->scores + run->pair * 2 * LANES;
    const uint64_t *words = visible + run->pair % AMX_STRIP_PAIRS * 2;
    uint16_t *to = run->to + run->pair * AMX_DEPTH;
    const NAME(vector) minus_base = NAME(load)(run->minus_base + j);
    NAME(vector) sum[2] = {NAME(load)(run->sum[0] + j), NAME(load)(run->sum[1] + j)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++, from += 2 * LANES, to += AMX_DEPTH) {
      NAME(vector) x = NAME(fma)(NAME(load)(from), scale, minus_base);
      NAME(vector) y = NAME(fma)(NAME(load)(from + LANES), scale, minus_base);
      x = visible ? NAME(exp2_where)(words[2 * i] >> j, x) : NAME(exp2)(x);
      y = visible ? NAME(exp2_where)(words[2 * i + 1] >> j, y) : NAME(exp2)(y);
      sum[0] = sum[0] + x;
      sum[1] = sum[1] + y;
      amx_split(x, y, false, (REAL *)(void *)to, (REAL *)(void *)(to + run->tiles * AMX_TILE));
    }
    NAME(store)(run->sum[0] + j, sum[0]);
    NAME(store)(run->sum[1] + j, sum[1]);
  }
  atomic_signal_fence(memory_order_seq_cst);
}

// Calls for what will be wanted, twelve lines beside four products.
static inline __attribute__((always_inline)) void amx_call(amx_run *run) {
  if (!run->forecast || run->forecast->next == run->forecast->parts) return;
  sa_forecast_call(run->forecast);
  sa_forecast_call(run->forecast);
}

// Four tiles of A and B into four of C.
#define AMX_MULTIPLY(a, a_row, a_tile, b)              \
  _tile_loadd(4, a, a_row);                            \
  _tile_loadd(6, b, 64);                               \
  _tile_dpbf16ps(0, 4, 6);                             \
  _tile_loadd(7, (b) + AMX_TILE, 64);                  \
  _tile_dpbf16ps(1, 4, 7);                             \
  _tile_loadd(5, (const char *)(a) + (a_tile), a_row); \
  _tile_dpbf16ps(2, 5, 6);                             \
  _tile_dpbf16ps(3, 5, 7);

// The scores of strip n, and beside each step of them some weights.
static inline __attribute__((always_inline)) void amx_strip(amx_run *run, const uint64_t *visible, NAME(vector) scale,
                                                            int n, int times) {
  const char *key = (const char *)run->key + n * AMX_STRIP * run->key_row;
  for (int j = 0; j < run->tiles; j += 2) {
    REAL *to = run->strips[n % 2] + j * AMX_STRIP * LANES;
    const uint16_t *query = run->query + j * AMX_TILE;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < run->steps; step++, query += AMX_QUERY_TILES * AMX_TILE) {
      AMX_MULTIPLY(key + step * 64, run->key_row, AMX_SIDE * run->key_row, query)
      amx_call(run);
      amx_weigh(run, visible, scale, times);
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + AMX_STRIP * LANES, 64);
    _tile_stored(2, to + AMX_SIDE * LANES, 64);
    _tile_stored(3, to + (AMX_STRIP + AMX_SIDE) * LANES, 64);
    atomic_signal_fence(memory_order_seq_cst);
  }
}

// Strips [first, end) of one pass, of whose product with V so many squares are done.
typedef struct amx_pass {
  int first, end, squares;
} amx_pass;

static uint16_t *amx_weights_of(const amx_run *run, int strip) {
  return run->weights[strip / AMX_PASS % 2] + strip % AMX_PASS * 2 * run->tiles * AMX_TILE;
}

// More of a pass's squares, and beside each step of them some weights.
static inline __attribute__((always_inline)) void amx_values(amx_run *run, const uint64_t *visible, NAME(vector) scale,
                                                             amx_pass *pass, int until, int times) {
  enum { ROW_BYTES = NAME(ROW) * sizeof(REAL) };
  const int group = run->value_tiles * AMX_STEPS * AMX_TILE;
  for (; pass->squares < until; pass->squares++) {
    const int d = pass->squares / (run->tiles / 2) * 2, j = pass->squares % (run->tiles / 2) * 2;
    REAL *o = run->gathered->o + d * AMX_SIDE * NAME(ROW) + j * LANES, *below = o + AMX_SIDE * NAME(ROW);
    if (run->started) {
      _tile_loadd(0, o, ROW_BYTES);
      _tile_loadd(1, o + LANES, ROW_BYTES);
      _tile_loadd(2, below, ROW_BYTES);
      _tile_loadd(3, below + LANES, ROW_BYTES);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int n = pass->first; n < pass->end; n++) {
      const int key = run->first + n * AMX_STRIP;
      const uint16_t *value = run->values + key / KEYS * group + (d * AMX_STEPS + key % KEYS / AMX_STRIP) * AMX_TILE;
      const uint16_t *weights = amx_weights_of(run, n) + j * AMX_TILE, *low = weights + run->tiles * AMX_TILE;
      AMX_MULTIPLY(value, 64, AMX_STEPS * AMX_TILE * 2, weights)
      amx_call(run);
      amx_weigh(run, visible, scale, times);
      _tile_loadd(6, low, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, low + AMX_TILE, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
      amx_weigh(run, visible, scale, times);
    }
    _tile_stored(0, o, ROW_BYTES);
    _tile_stored(1, o + LANES, ROW_BYTES);
    _tile_stored(2, below, ROW_BYTES);
    _tile_stored(3, below + LANES, ROW_BYTES);
    atomic_signal_fence(memory_order_seq_cst);
  }
}
#undef AMX_MULTIPLY

// The rest of a pass.
static __attribute__((noinline)) void amx_settle(amx_run *run, amx_pass *pass) {
  if (pass->first == pass->end) return;
  amx_values(run, NULL, NAME(set)(0), pass, run->value_tiles / 2 * (run->tiles / 2), 0);
  run->started = true;
  *pass = (amx_pass){pass->end, pass->end, 0};
}

// Whether a score of the strip exceeds its row's peak by more than 2^8, and the largest of each row.
static inline __attribute__((always_inline)) bool amx_exceeds(const amx_run *run, const uint64_t *visible,
                                                              NAME(vector) scale, const REAL *strip, REAL *top) {
  uint64_t within = 0xffff;
  for (int j = 0; j < run->tiles * LANES; j += LANES, strip += AMX_STRIP * LANES) {
    NAME(vector) largest[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) largest[i] = NAME(set)(-(REAL)INFINITY);
    for (int r = 0; r < AMX_STRIP; r += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const NAME(vector) s = NAME(load)(strip + (r + i) * LANES);
        largest[i] = visible ? NAME(max_where)(visible[r + i] >> j, s, largest[i]) : NAME(max)(s, largest[i]);
      }
    }
    const NAME(vector) own = NAME(max)(NAME(max)(largest[0], largest[1]), NAME(max)(largest[2], largest[3])) * scale;
    NAME(store)(top + j, own);
    within &= NAME(below_or_equal)(own, NAME(load)(run->gathered->peak + j) + NAME(set)(8));
  }
  return within != 0xffff;
}

// A row that has seen nothing yet, or nothing but -inf, must not compute -inf - -inf.
static NAME(vector) amx_base(NAME(vector) peak) {
  return NAME(select)(NAME(below_or_equal)(peak, NAME(set)(-(REAL)INFINITY)), NAME(set)(0), peak);
}

// Raises the peaks that `top` exceeds by more than 2^8, and scales sums and o to them.
static __attribute__((noinline)) void amx_raise(amx_run *run, const REAL *top) {
  REAL factor[QUERIES];
  const NAME(gathered) *gathered = run->gathered;
  for (int j = 0; j < run->tiles * LANES; j += LANES) {
    const NAME(vector) old = NAME(load)(gathered->peak + j), own = NAME(load)(top + j);
    const NAME(vector) peak = NAME(select)(NAME(below_or_equal)(own, old + NAME(set)(8)), old, own);
    const NAME(vector) base = amx_base(peak), decay = NAME(exp2)(old - base);
    NAME(store)(gathered->peak + j, peak);
    NAME(store)(gathered->sum + j, NAME(load)(gathered->sum + j) * decay);
    NAME(store)(run->minus_base + j, -base);
    NAME(store)(factor + j, decay);
  }
  for (int d = 0; run->started && d < run->value_tiles * AMX_SIDE; d++) {
    REAL *sums = gathered->o + d * NAME(ROW);
    for (int j = 0; j < run->tiles * LANES; j += LANES) {
      NAME(store)(sums + j, NAME(load)(sums + j) * NAME(load)(factor + j));
    }
  }
}

static void amx_close_sums(amx_run *run) {
  for (int j = 0; j < run->tiles * LANES; j += LANES) {
    const NAME(vector) own = NAME(load)(run->sum[0] + j) + NAME(load)(run->sum[1] + j);
    NAME(store)(run->gathered->sum + j, NAME(load)(run->gathered->sum + j) + own);
    NAME(store)(run->sum[0] + j, NAME(set)(0));
    NAME(store)(run->sum[1] + j, NAME(set)(0));
  }
}

// Past so many strips; `visible` (NULL: everybody sees all) has the words of who sees a key, of whole strips.
static inline __attribute__((always_inline)) void amx_pass_strips(amx_run *run, int strips, const uint64_t *visible) {
  const NAME(vector) scale = amx_run_scale(run->block);
  const int squares = run->value_tiles / 2 * (run->tiles / 2);
  _Alignas(64) REAL top[QUERIES];
  amx_pass own = {0}, before = {0};
  for (int j = 0; j < run->tiles * LANES; j += LANES) {
    NAME(store)(run->minus_base + j, -amx_base(NAME(load)(run->gathered->peak + j)));
  }
  run->pair = run->tiles * AMX_STRIP_PAIRS;
  amx_strip(run, NULL, scale, 0, 0);
  for (int n = 0; n < strips; n++) {
    if (amx_exceeds(run, visible, scale, run->strips[n % 2], top)) {
      amx_settle(run, &before);
      amx_settle(run, &own);
      amx_raise(run, top);
    }
    run->scores = run->strips[n % 2];
    run->to = amx_weights_of(run, n);
    run->pair = 0;
    const bool waits = before.first < before.end;
    if (n + 1 < strips) amx_strip(run, visible, scale, n + 1, (waits ? 8 : 16) / run->steps);
    if (waits) {
      const int until = squares * (n % AMX_PASS + 1) / AMX_PASS;
      amx_values(run, visible, scale, &before, until, (8 + run->value_tiles - 1) / run->value_tiles);
    }
    amx_weigh(run, visible, scale, INT32_MAX);
    amx_close_sums(run);
    if (visible) visible += AMX_STRIP;
    own.end = n + 1;
    if (own.end % AMX_PASS && own.end < strips) continue;
    amx_settle(run, &before);
    before = own;
    own = (amx_pass){n + 1, n + 1, 0};
  }
  amx_settle(run, &before);
}

// A loop for each, so that none asks about masks at every vector.
static __attribute__((noinline)) void amx_pass_seen(amx_run *run, int strips) {
  amx_pass_strips(run, strips, NULL);
}
static __attribute__((noinline)) void amx_pass_masked(amx_run *run, int strips, const uint64_t *visible) {
  amx_pass_strips(run, strips, visible);
}
