// what pictures of masks are made from: how many pairs of each cell of a grid are visible, from the plan alone
#include "plan.h"
#include "safeattn.h"
#include "status.h"

// A plane cut into a grid of cells: cell r of n over a size begins at floor(r * size / n).
typedef struct grid {
  int64_t rows, columns, queries, keys;
  int64_t *visible;
} grid;

static int64_t first_of(int64_t cell, int64_t cells, int64_t size) {
  return (int64_t)((__int128)cell * size / cells);
}

// The cell that holds a position: the greatest whose first position is not beyond it.
static int64_t cell_of(int64_t position, int64_t cells, int64_t size) {
  return (int64_t)((((__int128)position + 1) * cells - 1) / size);
}

static int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Every pair of the queries [q0, q1) and keys [k0, k1).
static void add_rectangle(const grid *g, int64_t q0, int64_t q1, int64_t k0, int64_t k1) {
  for (int64_t i = q0, next; i < q1; i = next) {
    const int64_t row = cell_of(i, g->rows, g->queries);
    next = least(q1, first_of(row + 1, g->rows, g->queries));
    for (int64_t j = k0, end; j < k1; j = end) {
      const int64_t column = cell_of(j, g->columns, g->keys);
      end = least(k1, first_of(column + 1, g->columns, g->keys));
      g->visible[row * g->columns + column] += (next - i) * (end - j);
    }
  }
}

// Bits [first, last) of a key's word pair.
static int64_t count_bits(const uint64_t *word, int64_t first, int64_t last) {
  int64_t count = 0;
  for (int64_t w = 0; w < SA_TILE / 64; w++) {
    const int64_t low = first > w * 64 ? first - w * 64 : 0, high = least(64, last - w * 64);
    if (low >= 64 || high <= low) continue;
    const uint64_t below = high == 64 ? ~UINT64_C(0) : (UINT64_C(1) << high) - 1;
    count += __builtin_popcountll(word[w] & below & ~UINT64_C(0) << low);
  }
  return count;
}

// A tile with a pattern, whose first query and key are q0, k0.
static void add_pattern(const grid *g, const sa_pattern *pattern, int64_t q0, int64_t k0) {
  const int64_t q1 = least(q0 + SA_TILE, g->queries), k1 = least(k0 + SA_TILE, g->keys);
  for (int64_t i = q0, next; i < q1; i = next) {
    const int64_t row = cell_of(i, g->rows, g->queries);
    next = least(q1, first_of(row + 1, g->rows, g->queries));
    int64_t *cells = g->visible + row * g->columns;
    for (int64_t j = k0; j < k1; j++)
      cells[cell_of(j, g->columns, g->keys)] += count_bits(pattern->word[j - k0], i - q0, next - q0);
  }
}

int sa_plan_coverage(const sa_plan *plan, int64_t batch, int64_t head, int64_t rows, int64_t columns,
                     int64_t *visible) {
  if (!plan) return sa_fail(SA_INVALID, __func__, "plan: got NULL, wanted a plan");
  if (!visible) return sa_fail(SA_INVALID, __func__, "visible: got NULL, wanted a place for the counts");
  if (batch < 0 || (plan->batch != 1 && batch >= plan->batch))
    return sa_fail(SA_INVALID, __func__, "batch: got %lld, wanted 0 to %lld", (long long)batch,
                   (long long)plan->batch - 1);
  if (head < 0 || (plan->heads != 1 && head >= plan->heads))
    return sa_fail(SA_INVALID, __func__, "head: got %lld, wanted 0 to %lld", (long long)head,
                   (long long)plan->heads - 1);
  if (rows < 1 || rows > plan->queries || columns < 1 || columns > plan->keys)
    return sa_fail(SA_INVALID, __func__, "rows, columns: got %lld, %lld, wanted 1 to %lld and 1 to %lld",
                   (long long)rows, (long long)columns, (long long)plan->queries, (long long)plan->keys);
  const grid g = {.rows = rows, .columns = columns, .queries = plan->queries, .keys = plan->keys, .visible = visible};
  for (int64_t cell = 0; cell < rows * columns; cell++) visible[cell] = 0;
  const int64_t plane = sa_plan_plane(plan, batch, head) * plan->row_tiles;
  for (int64_t tile = 0; tile < plan->row_tiles; tile++) {
    const int64_t q0 = tile * SA_TILE;
    for (int64_t k = plan->row_start[plane + tile]; k < plan->row_start[plane + tile + 1]; k++) {
      const sa_run run = plan->row_runs[k];
      const int64_t k0 = (int64_t)run.first * SA_TILE, k1 = k0 + (int64_t)run.count * SA_TILE;
      if (run.pattern == SA_FULL)
        add_rectangle(&g, q0, q0 + SA_TILE, k0, k1);
      else
        for (int64_t key = k0; key < k1; key += SA_TILE) add_pattern(&g, &plan->patterns[run.pattern], q0, key);
    }
  }
  return SA_OK;
}
