// the backward pass of half types in one, by columns of keys: dK and dV stay in registers, dQ is summed in memory
//
// Five products a step of 64 queries. A warp makes scores and their gradients of 32 keys and 32 queries. P and dS go by
// way of shared memory to the warps that make dV, which are half of them, and those that make dK, the others: 64 keys
// and half the columns each; and dQ's product finds dS there, too. At width 128: 128 keys, 8 warps, 255 registers a
// thread, 128 of them dK or dV, 163 KiB; 64 keys, 4 warps and 99 KiB where a block has no more. At 64: 64 keys, 4
// warps, 168 registers, three blocks a multiprocessor, 59 KiB each. What spills is read once a step, outside the loops
// of products.
//
// Columns that get shorter go past a row of all heads of a group before the next: of a head after the other a short
// column would be at the second while the longer one before it, for which it waits, is still at the first.
//
// bf16 at D128 and N8192 on an H200: 266 TFLOP/s with calls one behind the other, 270 after a pause. Latencies between
// products are the limit, and turns (without them 3 % more). docs/portable-backward.md has what was tried.
#ifndef SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_ONCE_CUH
#define SAFEATTN_KERNELS_CUDA_PORTABLE_BACKWARD_ONCE_CUH
#include "kernels/cuda/portable_backward_sums.cuh"

// Where the rows of a head begin.
struct head_rows {
  const char *queries, *douts;
};

// Q has two stages, dO one or two: with one, scores are made while it comes.
template <class Half, int WIDTH_, int WARPS_, int DOUT_STAGES_, int RESIDENT_>
struct once_shape {
  typedef Half element;
  typedef products_16<Half> products;
  enum {
    WIDTH = WIDTH_,
    WARPS = WARPS_,
    DOUT_STAGES = DOUT_STAGES_,
    RESIDENT = RESIDENT_,  // blocks a multiprocessor
    THREADS = 32 * WARPS,
    KEYS = 16 * WARPS,
    PARTS = SA_TILE / KEYS,
    QUERIES = 64,
    ROW = 2 * WIDTH,
    PAIR_ROW = 2 * QUERIES,
    // Of a warp's dK or dV, and columns of its dQ.
    GRADIENT_KEYS = 64,
    COLUMNS = WIDTH / 2,
    QUERY_COLUMNS = WIDTH / (WARPS / 2),
    KEY_TILE = KEYS * ROW,
    QUERY_TILE = QUERIES * ROW,
    PAIR_TILE = KEYS * PAIR_ROW,
    NUMBERS = 3 * QUERIES * 4,
    // Places in shared memory.
    VALUES = KEY_TILE,
    QUERY_STAGES = 2 * KEY_TILE,
    DOUTS = QUERY_STAGES + 2 * QUERY_TILE,
    WEIGHTS = DOUTS + DOUT_STAGES * QUERY_TILE,
    SLOPES = WEIGHTS + PAIR_TILE,
    NUMBER_STAGES = SLOPES + PAIR_TILE,
    TILES = NUMBER_STAGES + 2 * NUMBERS,
    TILES_KNOWN = 64,  // of a column, at once
    BAD = TILES + TILES_KNOWN * (int)sizeof(column_tile),
    HEAD = BAD + 4 * (2 + 2 + KEYS / 32),
    SHARED = HEAD + (int)sizeof(head_rows)
  };
};

// Products of a warp's 32 rows. What a step of 16 multiplies is read while the one before it is multiplied: two warps a
// scheduler do not hide that from each other.

// The right sides of a step, 8 columns of the product each.
template <int BLOCKS>
struct right_step {
  uint32_t block[BLOCKS][2];
};

// c = a b^T: 32 rows against 32, the first of each at the addresses of left_rows and right_rows.
template <class C>
static __device__ __forceinline__ void multiply_warp_rows(float (&c)[2][4][4], uint32_t left, uint32_t right) {
  enum { STEPS = C::WIDTH / 16 };
  left = hidden(left);
  uint32_t a[2][2][4];
  right_step<4> b[2];
  const auto load = [&](int step) {
#pragma unroll
    for (int f = 0; f < 2; f++) load_matrices(a[step % 2][f], tile_address<C::ROW>(left, 16 * f, 2 * step));
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      uint32_t r[4];
      load_matrices(r, tile_address<C::ROW>(right, 8 * n, 2 * step));
      two_blocks(b[step % 2].block[n], b[step % 2].block[n + 1], r);
    }
  };
  memset(c, 0, sizeof c);
  load(0);
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    if (step + 1 < STEPS) load(step + 1);
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int f = 0; f < 2; f++) multiply_halves(c[f][n], a[step % 2][f], b[step % 2].block[n], typename C::element());
  }
}

// The left side of a product with pairs: 16 of the rows at `pairs` and 16 columns; or TRANSPOSED.
template <bool TRANSPOSED>
static __device__ __forceinline__ void load_pairs(uint32_t (&a)[4], uint32_t pairs, int f, int step) {
  if (TRANSPOSED)
    load_matrices_transposed(a, tile_address<128>(pairs, 16 * step, 2 * f));
  else
    load_matrices(a, tile_address<128>(pairs, 16 * f, 2 * step));
}

// to += pairs rows, DEPTH of them, for GROUPS times 16 rows of pairs; `right` is the address of right_columns.
template <class C, bool TRANSPOSED, int DEPTH, int GROUPS, int BLOCKS>
static __device__ __forceinline__ void multiply_warp_columns(float (&to)[GROUPS][BLOCKS][4], uint32_t pairs,
                                                             uint32_t right) {
  // Four columns of blocks at a time.
  enum { ABREAST = BLOCKS < 4 ? BLOCKS : 4, PIECES = BLOCKS / ABREAST, STEPS = DEPTH / 16 * PIECES };
  pairs = hidden(pairs), right = hidden(right);
  uint32_t a[2][GROUPS][4];
  right_step<ABREAST> b[2];
  const auto load = [&](int step) {
    if (step % PIECES == 0) {
#pragma unroll
      for (int f = 0; f < GROUPS; f++) load_pairs<TRANSPOSED>(a[step / PIECES % 2][f], pairs, f, step / PIECES);
    }
#pragma unroll
    for (int n = 0; n < ABREAST; n += 2) {
      uint32_t r[4];
      load_matrices_transposed(r, tile_address<C::ROW>(right, step / PIECES * 16, step % PIECES * ABREAST + n));
      two_blocks(b[step % 2].block[n], b[step % 2].block[n + 1], r);
    }
  };
  load(0);
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    if (step + 1 < STEPS) load(step + 1);
#pragma unroll
    for (int n = 0; n < ABREAST; n++)
#pragma unroll
      for (int f = 0; f < GROUPS; f++)
        multiply_halves(to[f][step % PIECES * ABREAST + n], a[step / PIECES % 2][f], b[step % 2].block[n],
                        typename C::element());
  }
}

// A warp's pairs, 32 keys x 32 queries, to the tile of all; `at` is its lane's first place there.
template <class C>
static __device__ __forceinline__ void store_pairs(char *shared, uint32_t at, const float (&x)[2][4][4]) {
#pragma unroll
  for (int f = 0; f < 2; f++)
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *(uint32_t *)(shared + tile_address<C::PAIR_ROW>(at, 16 * f + 8 * half, n)) =
            C::products::pack(x[f][n][2 * half], x[f][n][2 * half + 1]);
}

// What is not finite in the rows that meet a group of 16 rows of pairs; bits 4 n + i of `visible` are of its blocks.
template <class C, bool TRANSPOSED, int BLOCKS>
static __device__ __forceinline__ void give_pairs(float (&to)[BLOCKS][4], uint32_t pairs, int f, uint32_t visible,
                                                  const uint32_t *bad, const tile_source &source, int64_t first,
                                                  int column) {
  float values[8][4];
  for (int step = 0; step < 4; step++) {
    uint32_t a[4];
    load_pairs<TRANSPOSED>(a, pairs, f, step);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      const uint16_t half = (uint16_t)(a[k / 2] >> 16 * (k % 2));
      typename C::element x;
      memcpy(&x, &half, 2);
      values[2 * step + k / 4][k % 4] = real_of(x);
    }
  }
  give_nonfinite<typename C::products, 8 * BLOCKS>(to, values, visible, bad, source, first, column);
}

// A job: KEYS keys of a key head, against all queries of the heads that share it.
template <class C, bool CAREFUL>
struct once_job {
  typedef typename C::element Element;
  enum { THREADS = C::THREADS, KEYS = C::KEYS, QUERIES = C::QUERIES, ROW = C::ROW, WARPS = C::WARPS };
  enum { GRADIENT_GROUPS = C::GRADIENT_KEYS / 16, QUERY_BLOCKS = C::QUERY_COLUMNS / 8 };

  const sa_problem &p;
  const sa_device_plan &plan;
  const backward_rows<float> &rows;
  const backward_aligned &aligned;
  const backward_sums &sums;
  char *const shared;
  const int warp, lane;
  const bool of_keys;  // it makes dK, not dV
  // A warp's first key and query of scores, first key and column of dK or dV, and first column of dQ.
  const int keys_at, queries_at, gradient_keys_at, column, query_column;
  // Addresses of a warp's operands; those of V and dO lie behind those of K and Q.
  const uint32_t key_rows, query_rows, query_columns, key_columns, pair_rows, pair_columns;
  int batch, key_head, key_column;
  float gradient[GRADIENT_GROUPS][C::COLUMNS / 8][4];

  __device__ __forceinline__ once_job(const sa_problem &problem, const sa_device_plan &device_plan,
                                      const backward_rows<float> &known, const backward_aligned &rows_aligned,
                                      const backward_sums &backward)
      : p(problem),
        plan(device_plan),
        rows(known),
        aligned(rows_aligned),
        sums(backward),
        shared(dynamic_shared<char>()),
        warp(threadIdx.x / 32),
        lane(threadIdx.x & 31),
        of_keys(warp >= WARPS / 2),
        keys_at(warp / 2 * 32),
        queries_at(warp % 2 * 32),
        gradient_keys_at(warp % (WARPS / 2) / 2 * C::GRADIENT_KEYS),
        column(warp % 2 * C::COLUMNS),
        query_column(warp / 2 * C::QUERY_COLUMNS),
        key_rows(left_rows_address<ROW>(shared + keys_at * ROW, 0, 0)),
        query_rows(right_rows_address<ROW>(shared + C::QUERY_STAGES + queries_at * ROW, 0, 0)),
        query_columns(right_columns_address<ROW>(shared + C::QUERY_STAGES, 0, column)),
        key_columns(right_columns_address<ROW>(shared, 0, query_column)),
        pair_rows(left_rows_address<C::PAIR_ROW>(
            shared + (of_keys ? C::SLOPES : C::WEIGHTS) + gradient_keys_at * C::PAIR_ROW, 0, 0)),
        pair_columns(right_rows_address<C::PAIR_ROW>(shared + C::SLOPES, 0, queries_at / 16)) {
    memset(gradient, 0, sizeof gradient);
  }

  __device__ __forceinline__ column_tile *tiles() const { return (column_tile *)(shared + C::TILES); }
  __device__ __forceinline__ head_rows &rows_of_head() const { return *(head_rows *)(shared + C::HEAD); }
  __device__ __forceinline__ int part() const { return key_column % C::PARTS; }
  __device__ __forceinline__ int first_key() const { return key_column * KEYS; }
  __device__ __forceinline__ int first_of(int step) const {
    return tiles()[step / 2].row * SA_TILE + step % 2 * QUERIES;
  }
  __device__ __forceinline__ bool flagged(int step) const { return tiles()[step / 2].notes >> (2 + step % 2) & 1; }
  __device__ __forceinline__ int beside(int step) const { return tiles()[step / 2].notes >> 4; }
  __device__ __forceinline__ int chunk_of(int head, int step) const {
    return (int)((batch * p.heads + head) * (rows.padded / QUERIES)) + first_of(step) / QUERIES;
  }

  // Jobs in the order of turns; those of some key heads take turns, too.
  __device__ __forceinline__ int take() {
    if (threadIdx.x == 0) tiles()[0].row = atomicAdd(sums.next_job + CAREFUL, 1);
    __syncthreads();
    const int job = tiles()[0].row, columns = plan.col_tiles * C::PARTS, all = (int)(p.batch * p.key_heads);
    const int first_head = (int)(job / (sums.mixed * columns) * sums.mixed), rest = job - first_head * columns;
    const int here = min((int)sums.mixed, all - first_head), head = first_head + rest % here;
    batch = head / (int)p.key_heads;
    key_head = head % (int)p.key_heads;
    key_column = sums.descending ? rest / here : columns - 1 - rest / here;
    return job;
  }

  __device__ __forceinline__ tile_source key_source() const {
    return tile_source_of(p.k, 2, batch, key_head, p.keys, p.width, aligned.k);
  }
  __device__ __forceinline__ tile_source value_source() const {
    return tile_source_of(p.v, 2, batch, key_head, p.keys, p.value_width, aligned.v);
  }
  __device__ __forceinline__ tile_source query_source(int head) const {
    return tile_source_of(p.q, 2, batch, head, p.queries, p.width, aligned.q);
  }
  __device__ __forceinline__ tile_source dout_source(int head) const {
    tile_source source = tile_source_of(p.dout, 2, batch, head, p.queries, p.value_width, aligned.dout);
    if (!p.dout.data) source.rows = 0;
    return source;
  }

  __device__ __forceinline__ void load_keys() const {
    load_tile<Element, ROW, KEYS, THREADS>(shared, key_source(), first_key(), threadIdx.x);
  }

  // load_tile of a step's rows. Its common case once more, with one product an address: there, for all kernels, that
  // costs the forward 1 %.
  __device__ __forceinline__ void load_rows(char *tile, const tile_source &source, int first, int thread) const {
    constexpr int CHUNKS = ROW / 16, STEP = THREADS / CHUNKS;
    if (!source.whole || source.rows - first < QUERIES) {
      load_tile<Element, ROW, QUERIES, THREADS>(tile, source, first, thread);
      return;
    }
    const int row = thread / CHUNKS, chunk = thread % CHUNKS;
    const char *place = source.data + (int64_t)(first + row) * source.stride + chunk * 16;
    const uint32_t to = shared_address(tile + tile_offset<ROW>(row, chunk));
#pragma unroll
    for (int n = 0; n < QUERIES / STEP; n++, place += STEP * source.stride)
      copy_async(tile_address<ROW>(to, n * STEP, 0), place, chunk * 16 >= source.bytes);
  }

  // Q and what is known of its rows; `head` is the first of those abreast.
  __device__ __forceinline__ void load_queries(int head, int step, int stage) const {
    const int thread = hidden((int)threadIdx.x), first = first_of(step);
    tile_source source = query_source(0);
    source.data = rows_of_head().queries + beside(step) * p.q.stride[1] * (int)sizeof(Element);
    load_rows(shared + C::QUERY_STAGES + stage * C::QUERY_TILE, source, first, thread);
    constexpr int CHUNKS = QUERIES * 4 / 16;
    if (thread >= 3 * CHUNKS) return;
    const float *from = thread < CHUNKS ? rows.base : thread < 2 * CHUNKS ? rows.factor : rows.delta;
    copy_async(shared_address(shared + C::NUMBER_STAGES + stage * C::NUMBERS + thread * 16),
               from + (batch * p.heads + head + beside(step)) * rows.padded + first + thread % CHUNKS * 4);
  }

  __device__ __forceinline__ void load_douts(int step, int stage) const {
    tile_source source = dout_source(0);
    source.data = rows_of_head().douts + beside(step) * p.dout.stride[1] * (int)sizeof(Element);
    load_rows(shared + C::DOUTS + stage * C::QUERY_TILE, source, first_of(step), hidden((int)threadIdx.x));
  }

  // The next tiles of a column into shared memory, from number `place` on, and where rows begin of the first of the
  // heads abreast; how many.
  __device__ __forceinline__ int find_tiles(int head, int place, int all) const {
    const int known = min(all - place, (int)C::TILES_KNOWN), thread = threadIdx.x;
    __syncthreads();
    if (thread == 0) rows_of_head() = head_rows{query_source(head).data, dout_source(head).data};
    if (thread < known) {
      const int number = sums.descending ? all - 1 - place - thread : place + thread, beside = number % sums.abreast;
      column_tile tile = find_tile<C::PARTS>(plan, sa_device_plane(plan, batch, head), key_column / C::PARTS, part(),
                                             number / sums.abreast, sums.descending);
      const int64_t chunk = ((batch * p.heads + head + beside) * rows.padded + tile.row * SA_TILE) / QUERIES;
      tile.notes = (rows.coarse[chunk] != 0) | (rows.coarse[chunk + 1] != 0) << 1 | beside << 4;
      if (CAREFUL && p.dq.data) tile.notes |= sums.bad_query[chunk] << 2 | sums.bad_query[chunk + 1] << 3;
      tiles()[thread] = tile;
    }
    __syncthreads();
    return known;
  }

  // Bits 4 n + i of the pairs of 16 of the block's keys, from `key` on, with all queries of a step.
  __device__ __forceinline__ uint32_t visible_queries(int pattern, int step, int key) const {
    if (pattern == SA_FULL) return ~0u;
    return plan.col_bits[(int64_t)pattern * 512 + step % 2 * 256 + 2 * (part() * KEYS + key) + hidden(lane)];
  }

  // The same of a group of 16 of the warp's queries with 64 keys of the block.
  __device__ __forceinline__ uint32_t visible_keys(int pattern, int step, int group, int keys) const {
    if (pattern == SA_FULL) return ~0u;
    const int query = step % 2 * QUERIES + queries_at, at = (part() * KEYS + keys) / 4;
    const uint2 bits = plan.row_bits[(int64_t)pattern * 256 + (query / 16 + group) * 32 + lane];
    uint32_t visible = 0;
    for (int n = 0; n < 8; n++)
      visible |= ((bits.x >> (at + 2 * n) & 3) | (bits.y >> (at + 2 * n) & 3) << 2) << (4 * n);
    return visible;
  }

  // P and dS of a step to shared memory. What masks and coarse bases need is done apart from the rest.
  __device__ __forceinline__ void weigh(int step, int stage, uint32_t query_tile, uint32_t dout_tile) {
    const int pattern = tiles()[step / 2].pattern, t = lane & 3;
    const bool full = pattern == SA_FULL, coarse = tiles()[step / 2].notes >> step % 2 & 1;
    const float *const base = (const float *)(shared + C::NUMBER_STAGES + stage * C::NUMBERS) + queries_at + 2 * t,
                       *const factor = base + QUERIES, *const delta = factor + QUERIES;
    const uint32_t place =
        C::SLOPES + tile_offset<C::PAIR_ROW>(keys_at + hidden(lane) / 4, queries_at / 8) + 4 * (hidden(lane) & 3);
    uint32_t visible[2];
#pragma unroll
    for (int f = 0; f < 2; f++) visible[f] = visible_queries(pattern, step, keys_at + 16 * f) >> queries_at / 2;
    float weights[2][4][4], slopes[2][4][4];
    multiply_warp_rows<C>(weights, key_rows, query_rows + query_tile);
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int f = 0; f < 2; f++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          weights[f][n][i] = exp2_of(weights[f][n][i] * sums.scale_log2 - base[8 * n + i % 2]);
    if (!full || coarse) {
#pragma unroll
      for (int f = 0; f < 2; f++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float share = coarse ? factor[8 * n + i % 2] : 1;
            weights[f][n][i] = visible[f] >> (4 * n + i) & 1 ? weights[f][n][i] * share : 0;
          }
    }
    store_pairs<C>(shared, place + C::WEIGHTS - C::SLOPES, weights);
    if (C::DOUT_STAGES == 1) {
      copy_async_wait<1>();
      __syncthreads();
    }
    multiply_warp_rows<C>(slopes, key_rows + C::VALUES, query_rows + dout_tile);
#pragma unroll
    for (int n = 0; n < 4; n++)
#pragma unroll
      for (int f = 0; f < 2; f++)
#pragma unroll
        for (int i = 0; i < 4; i++) slopes[f][n][i] = weights[f][n][i] * (slopes[f][n][i] - delta[8 * n + i % 2]);
    if (!full) {
#pragma unroll
      for (int f = 0; f < 2; f++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) slopes[f][n][i] = visible[f] >> (4 * n + i) & 1 ? slopes[f][n][i] : 0;
    }
    store_pairs<C>(shared, place, slopes);
  }

  __device__ __forceinline__ uint32_t *bad(int operand) const {  // of Q, dO and K
    return (uint32_t *)(shared + C::BAD) + 2 * operand;
  }

  // 0 in place of what is not finite in Q, dO and K, and dV or dK of what was.
  __device__ __forceinline__ void clean(int head, int step, uint32_t query_tile, uint32_t dout_tile) {
    const int thread = threadIdx.x, first = first_of(step), pattern = tiles()[step / 2].pattern;
    if (thread < 4 + KEYS / 32) bad(0)[thread] = 0;
    __syncthreads();
    make_finite<Element, ROW, QUERIES, THREADS>(shared + C::QUERY_STAGES + query_tile, bad(0), thread);
    make_finite<Element, ROW, QUERIES, THREADS>(shared + C::QUERY_STAGES + dout_tile, bad(1), thread);
    make_finite<Element, ROW, KEYS, THREADS>(shared, bad(2), thread);
    __syncthreads();
#pragma unroll
    for (int f = 0; f < GRADIENT_GROUPS; f++)
      give_pairs<C, false>(gradient[f], pair_rows, f, visible_queries(pattern, step, gradient_keys_at + 16 * f),
                           bad(of_keys ? 0 : 1), of_keys ? query_source(head) : dout_source(head), first, column);
  }

  // What a warp adds to dQ of a step.
  struct query_turn {
    int chunk, turn;
    bool wanted, last;
  };

  __device__ __forceinline__ query_turn turn_of(int head, int step) const {
    const int turn = tiles()[step / 2].turn;
    return query_turn{chunk_of(head, step), turn / 2, p.dq.data && (!CAREFUL || flagged(step)), (turn & 1) != 0};
  }

  __device__ __forceinline__ int *counter(const query_turn &mine) const {
    return sums.turn + mine.chunk * WARPS + warp;
  }

  __device__ __forceinline__ void wait(const query_turn &mine) const {
    if (!mine.wanted || mine.turn == 0) return;
    while (load_acquire(counter(mine)) != mine.turn) continue;
  }

  __device__ __forceinline__ void publish(const query_turn &mine) const {
    if (!mine.wanted) return;
    __syncwarp();
    if (lane == 0) store_release(counter(mine), mine.last ? 0 : mine.turn + 1);
  }

  // dQ of a step: a warp adds its 32 queries and QUERY_COLUMNS columns to the sums, in its turn.
  __device__ __forceinline__ void add(int head, int step, const query_turn &mine) {
    if (!mine.wanted) return;
    float dq[2][QUERY_BLOCKS][4];
    memset(dq, 0, sizeof dq);
    if constexpr (CAREFUL) {
      for (int keys = 0; keys < KEYS; keys += 64)
#pragma unroll
        for (int f = 0; f < 2; f++)
          give_pairs<C, true>(dq[f], pair_columns + keys * C::PAIR_ROW, f,
                              visible_keys(tiles()[step / 2].pattern, step, f, keys), bad(2) + keys / 32, key_source(),
                              first_key() + keys, query_column);
    }
    multiply_warp_columns<C, true, KEYS>(dq, pair_columns, key_columns);
    wait(mine);
    float *const sum = sums.sums + (int64_t)(mine.chunk * WARPS + warp) * (8 * QUERY_BLOCKS * 32) + hidden(lane);
    const auto all = [&](const auto &change) {
#pragma unroll
      for (int f = 0; f < 2; f++)
#pragma unroll
        for (int n = 0; n < QUERY_BLOCKS; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) change(sum + ((f * QUERY_BLOCKS + n) * 4 + i) * 32, dq[f][n][i]);
    };
    if (!mine.last) {
      if (mine.turn == 0)
        all([](float *to, float x) { *to = x; });
      else
        all([](float *to, float x) { atomicAdd(to, x); });
      return;
    }
    if (mine.turn != 0) all([](const float *from, float &x) { x += __ldcg(from); });
#pragma unroll
    for (int f = 0; f < 2; f++)
      write_rows<Element>(p.dq, batch, head, first_of(step) + queries_at + 16 * f, p.queries, p.width, query_column,
                          (float)p.scale, dq[f]);
    if (!CAREFUL && !(all_finite(dq[0]) && all_finite(dq[1]))) sums.bad_query[mine.chunk] = *sums.flagged = 1;
  }

  // A step, whose Q and dO have come; those of step `later` are called for.
  __device__ __forceinline__ void go(int head, int step, int later, int end, int stage) {
    head = hidden(head);
    if (C::DOUT_STAGES == 1) {
      load_douts(step, 0);
      copy_async_commit();
    }
    if (later < end) {
      load_queries(head, later, stage ^ 1);
      if (C::DOUT_STAGES == 2) load_douts(later, stage ^ 1);
    }
    copy_async_commit();
    const uint32_t query_tile = stage * C::QUERY_TILE,
                   dout_tile = C::DOUTS - C::QUERY_STAGES + (C::DOUT_STAGES == 2 ? query_tile : 0);
    weigh(step, stage, query_tile, dout_tile);
    __syncthreads();
    if (CAREFUL) clean(head + beside(step), step, query_tile, dout_tile);
    // Half of the warps add to dQ first, the others between the halves of their dK, so that some multiply while others
    // wait for their turn. It is given on last: a release waits for what was added before to arrive.
    head += beside(step);
    const query_turn mine = turn_of(head, step);
    const uint32_t right = query_columns + (of_keys ? query_tile : dout_tile);
#pragma unroll 1
    for (int part = 0; part < 3; part++) {
      if (part == of_keys) {
        add(head, step, mine);
      } else {
        const int half = part == 2;
        multiply_warp_columns<C, false, QUERIES / 2>(gradient, pair_rows ^ 64 * half,
                                                     right + half * (QUERIES / 2 * ROW));
      }
    }
    publish(mine);
    if (CAREFUL) {
      __syncthreads();
      load_keys();
      copy_async_commit();
    }
  }

  __device__ __forceinline__ void run() {
    const int job = take();
    if (!CAREFUL && p.dq.data) clear_unseen<Element, THREADS>(p, plan, job, sums.jobs);
    const bool keys_wanted = !CAREFUL || sums.bad_key[job];
    load_keys();
    load_tile<Element, ROW, KEYS, THREADS>(shared + C::VALUES, value_source(), first_key(), threadIdx.x);
    const int group = (int)(p.heads / p.key_heads);
    bool masked = false;
#pragma unroll 1
    for (int head = key_head * group; head < (key_head + 1) * group; head += sums.abreast) {
      const int64_t *const start =
          plan.col_start + sa_device_plane(plan, batch, head) * plan.col_tiles + key_column / C::PARTS;
      const int all = count_tiles(plan.col_runs + start[0], start[1] - start[0]) * sums.abreast;
      masked |= all && plan.col_runs[start[0]].pattern != SA_FULL;
#pragma unroll 1
      for (int place = 0; place < all; place += C::TILES_KNOWN) {
        const int end = 2 * find_tiles(head, place, all);
        const auto next = [&](int step) {
          while (step < end && (first_of(step) >= p.queries || !(keys_wanted || flagged(step)))) step++;
          return step;
        };
        int step = next(0);
        if (step < end) {
          load_queries(head, step, 0);
          if (C::DOUT_STAGES == 2) load_douts(step, 0);
        }
        copy_async_commit();
#pragma unroll 1
        for (int stage = 0; step < end; stage ^= 1) {
          const int later = next(step + 1);
          copy_async_wait<0>();
          __syncthreads();
          go(head, step, later, end, stage);
          step = later;
        }
      }
    }
    copy_async_wait<0>();
    if (!keys_wanted) return;
    const sa_operand &to = of_keys ? p.dk : p.dv;
    bool finite = true;
#pragma unroll
    for (int f = 0; f < GRADIENT_GROUPS; f++) {
      if (to.data)
        write_rows<Element>(to, batch, key_head, first_key() + gradient_keys_at + 16 * f, p.keys,
                            of_keys ? p.width : p.value_width, column, of_keys ? (float)p.scale : 1.f, gradient[f]);
      finite = finite && all_finite(gradient[f]);
    }
    if (!CAREFUL && masked && !finite) sums.bad_key[job] = *sums.flagged = 1;
  }
};

// The careful launch, which is there where some pair is masked, goes through what the first one has flagged once more.
template <class C, bool CAREFUL>
static __global__ void __launch_bounds__(C::THREADS, C::RESIDENT)
    backward_once(const __grid_constant__ sa_problem p, const __grid_constant__ sa_device_plan plan,
                  const __grid_constant__ backward_rows<float> rows, const __grid_constant__ backward_aligned aligned,
                  const __grid_constant__ backward_sums sums) {
  if (CAREFUL) {
    dependency_wait();
    if (!*sums.flagged) return;
  } else {
    dependents_launch();
  }
  once_job<C, CAREFUL>(p, plan, rows, aligned, sums).run();
}

#endif
