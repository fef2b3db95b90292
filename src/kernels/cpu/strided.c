// walks the elements of several strided tensors of one shape, in pieces that are read and written in one type
#include "kernels/cpu/strided.h"

#include <string.h>

#include "threads.h"

void sa_strided_run(const sa_strided *walk, int64_t first, int64_t last, sa_piece_task task, void *argument) {
  if (first >= last) return;
  const int row = walk->ndim - 1;
  int64_t index[SA_MAX_DIMS], row_step[SA_STRIDED_TENSORS];
  char *data[SA_STRIDED_TENSORS] = {0};
  for (int i = 0; i < walk->tensors; i++) {
    data[i] = walk->data[i];
    row_step[i] = walk->step[i][row];
  }
  int64_t rest = first;
  for (int dim = row; dim >= 0; dim--) {
    index[dim] = rest % walk->shape[dim];
    rest /= walk->shape[dim];
    for (int i = 0; i < walk->tensors; i++) data[i] += index[dim] * walk->step[i][dim] * walk->size[i];
  }
  for (int64_t left = last - first;;) {
    int64_t count = walk->shape[row] - index[row];
    if (count > SA_PIECE) count = SA_PIECE;
    if (count > left) count = left;
    task(argument, data, row_step, count);
    left -= count;
    if (left == 0) return;
    index[row] += count;
    for (int i = 0; i < walk->tensors; i++) data[i] += count * row_step[i] * walk->size[i];
    for (int dim = row; index[dim] == walk->shape[dim]; dim--) {
      index[dim] = 0;
      index[dim - 1]++;
      for (int i = 0; i < walk->tensors; i++)
        data[i] += (walk->step[i][dim - 1] - walk->shape[dim] * walk->step[i][dim]) * walk->size[i];
    }
  }
}

typedef struct job {
  const sa_strided *walk;
  int64_t grain;
  sa_piece_task task;
  void *argument;
} job;

static void run_item(void *argument, int64_t item, int worker) {
  const job *j = argument;
  const int64_t first = item * j->grain, rest = j->walk->numel - first;
  sa_strided_run(j->walk, first, first + (rest < j->grain ? rest : j->grain), j->task, j->argument);
}

void sa_strided_run_all(const sa_strided *walk, double cost, sa_piece_task task, void *argument) {
  const int workers = sa_workers((double)walk->numel * cost);
  if (workers == 1) {
    sa_strided_run(walk, 0, walk->numel, task, argument);
    return;
  }
  // Items of about 2^18 flops: tens of microseconds, against one for handing an item out.
  const double grain = 262144 / cost;
  const job j = {walk, grain < 1 ? 1 : (int64_t)grain, task, argument};
  sa_parallel(workers, (walk->numel + j.grain - 1) / j.grain, run_item, (void *)&j);
}
