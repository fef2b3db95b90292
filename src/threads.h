// the pool of threads
#ifndef SAFEATTN_THREADS_H
#define SAFEATTN_THREADS_H
#include "safeattn.h"

// Runs task(argument, item, worker) for item 0 .. items-1, each once, on up to `workers` threads of which the caller is
// worker 0; returns when all are done. Items are handed out in rising order, so an item may wait for what a lower one
// does. Runs inline when the pool is busy or the caller is itself inside a task.
typedef void (*sa_task)(void *argument, int64_t item, int worker);
void sa_parallel(int workers, int64_t items, sa_task task, void *argument);
// How many workers a job of so many flops deserves: 1 below the size at which waking them costs more than it gives.
int sa_workers(double flops);
int sa_cores(void);  // that the affinity mask allows

#endif
