// a small pool of threads that survives fork, blocks signals and never changes a result
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "threads.h"

enum {
  MAX_WORKERS = 256,
  SPIN_ROUNDS = 2000  // about 20 us: waking a sleeping thread costs as much (5 to 80 us measured)
};

// One job at a time. A worker that wakes takes part while `wanted` says so; the caller is worker 0. What workers wait
// for, what they all write, and what the caller waits for lie on cache lines of their own.
static struct {
  pthread_mutex_t owner;  // held by the thread whose job runs
  pthread_mutex_t lock;   // guards the sleepers
  pthread_cond_t wake;
  int started;          // threads besides the caller; changed under `owner`
  atomic_int sleepers;  // changed under `lock`
  _Alignas(64) atomic_uint generation;
  sa_task task;
  void *argument;
  int64_t items;
  int helpers;  // workers besides the caller
  unsigned int float_modes;
  _Alignas(64) atomic_llong next;
  _Alignas(64) atomic_int wanted;  // workers that may still join this job
  _Alignas(64) atomic_int left;    // that finished
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static _Thread_local bool inside_task;

static inline void relax(void) {
#if defined(__SSE__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void take_items(int worker) {
  const bool was_inside = inside_task;
  inside_task = true;
  for (;;) {
    const int64_t item = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed);
    if (item >= pool.items) break;
    pool.task(pool.argument, item, worker);
  }
  inside_task = was_inside;
}

// Joins the job in hand unless it has all the workers that it wants.
static void join_job(void) {
  int wanted = atomic_load(&pool.wanted);
  while (wanted > 0) {
    if (!atomic_compare_exchange_weak(&pool.wanted, &wanted, wanted - 1)) continue;
    const int worker = 1 + pool.helpers - wanted;
#if defined(__SSE__)
    // The caller's rounding and denormal modes, so that a result cannot depend on which thread computed it.
    _mm_setcsr(pool.float_modes);
#endif
    take_items(worker);
    atomic_fetch_add(&pool.left, 1);
    return;
  }
}

static void *work(void *unused) {
  unsigned seen = 0;
  for (;;) {
    int spin = 0;
    while (atomic_load_explicit(&pool.generation, memory_order_acquire) == seen && spin++ < SPIN_ROUNDS) relax();
    if (atomic_load(&pool.generation) == seen) {
      pthread_mutex_lock(&pool.lock);
      atomic_fetch_add(&pool.sleepers, 1);
      while (atomic_load(&pool.generation) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
      atomic_fetch_sub(&pool.sleepers, 1);
      pthread_mutex_unlock(&pool.lock);
    }
    seen = atomic_load(&pool.generation);
    join_job();
  }
  return unused;
}

// A forked child has none of its parent's threads, and may have copied a lock that one of them held.
static void forget_threads(void) {
  pthread_mutex_init(&pool.owner, NULL);
  pthread_mutex_init(&pool.lock, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pool.started = 0;
  atomic_store(&pool.generation, 0);
  atomic_store(&pool.wanted, 0);
  atomic_store(&pool.sleepers, 0);
  inside_task = false;
}

static void watch_forks(void) {
  pthread_atfork(NULL, NULL, forget_threads);
}

// Starts threads until `count` run beside the caller; fewer, when the system refuses, is no error.
static void start_threads(int count) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  if (pool.started >= count) return;
  pthread_once(&once, watch_forks);
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (pool.started < count) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, NULL)) break;
    pthread_detach(thread);
    pool.started++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void sa_parallel(int workers, int64_t items, sa_task task, void *argument) {
  if (workers > MAX_WORKERS) workers = MAX_WORKERS;
  if (workers > items) workers = (int)items;
  if (workers <= 1 || inside_task || pthread_mutex_trylock(&pool.owner)) {
    for (int64_t item = 0; item < items; item++) task(argument, item, 0);
    return;
  }
  start_threads(workers - 1);
  const int helpers = pool.started < workers - 1 ? pool.started : workers - 1;
  pool.task = task;
  pool.argument = argument;
  pool.items = items;
  pool.helpers = helpers;
  atomic_store(&pool.next, 0);
  atomic_store(&pool.left, 0);
#if defined(__SSE__)
  pool.float_modes = _mm_getcsr();
#endif
  atomic_store(&pool.wanted, helpers);
  atomic_fetch_add(&pool.generation, 1);
  // Whoever lies down after this looks at `generation` once more.
  if (atomic_load(&pool.sleepers)) {
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
  }

  take_items(0);
  // Nobody may join any more; wait for those who did.
  const int absent = atomic_exchange(&pool.wanted, 0);
  const int came = helpers - absent;
  for (int spin = 0; atomic_load(&pool.left) < came; spin++) {
    if (spin < SPIN_ROUNDS)
      relax();
    else
      sched_yield();
  }
  pthread_mutex_unlock(&pool.owner);
}

int sa_cores(void) {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  const long online = sysconf(_SC_NPROCESSORS_ONLN);
  return online > 0 ? (int)online : 1;
}

static int default_threads;

static void read_environment(void) {
  const char *text = getenv("SAFEATTN_THREADS");
  const int wanted = text ? atoi(text) : 0;
  default_threads = wanted > 0 ? wanted : sa_cores();
  if (default_threads > MAX_WORKERS) default_threads = MAX_WORKERS;
}

static _Thread_local int own_threads;  // 0: the default

int sa_threads(int threads) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, read_environment);
  if (threads > 0) own_threads = threads < MAX_WORKERS ? threads : MAX_WORKERS;
  return own_threads ? own_threads : default_threads;
}

int sa_workers(double flops) {
  return flops < 2e6 ? 1 : sa_threads(0);
}
