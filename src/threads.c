// a small pool of threads that survives fork, blocks signals and never changes a result
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "threads.h"

enum {
  MAX_WORKERS = 256,
  // A worker that waits spins so long before it lies down: waking it takes 5 to 40 us (virtual machines).
  SPIN_NANOSECONDS = 50000,
  SPIN_ROUNDS = 64  // between two looks at the clock, some 1 to 3 us
};

// Where a worker waits: CALLED while the caller wants it at a job that it has not joined.
enum { IDLE, ASLEEP, CALLED, AT_WORK };
typedef struct seat {
  _Alignas(64) _Atomic uint32_t state;  // what the worker waits for is on a cache line of its own
  atomic_int core;                      // that the worker joined its job on
} seat;

// One job at a time. The caller is worker 0; worker w sits at seats[w], and jobs for few call the first ones: these are
// awake, and the others are left alone.
static struct {
  pthread_mutex_t owner;  // held by the thread whose job runs
  int started;            // threads besides the caller; changed under `owner`
  _Alignas(64) sa_task task;
  void *argument;
  int64_t items;
  int helpers;  // workers besides the caller
  unsigned int float_modes;
  atomic_int core;                 // that the caller was on
  _Alignas(64) atomic_llong next;  // item
  seat seats[MAX_WORKERS];
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER};

static _Thread_local bool inside_task;

static inline void relax(void) {
#if defined(__SSE__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
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

static bool change(seat *at, uint32_t from, uint32_t to) {
  return atomic_compare_exchange_strong(&at->state, &from, to);
}

// Spins a moment while a seat is in a state. A worker often wakes on the caller's own core, where one that spins keeps
// the other from its work; but to let anyone else run would be to lose the core for milliseconds.
static bool stays(const seat *at, uint32_t state, const atomic_int *core) {
  for (int round = 0; round < SPIN_ROUNDS; round++) {
    if (atomic_load_explicit(&at->state, memory_order_acquire) != state) return false;
    relax();
  }
  if (sched_getcpu() == atomic_load_explicit(core, memory_order_relaxed)) sched_yield();
  return true;
}

static void wait_for_call(seat *own) {
  const int64_t start = nanoseconds();
  do {
    if (!stays(own, IDLE, &pool.core)) return;
  } while (nanoseconds() - start < SPIN_NANOSECONDS);
  if (!change(own, IDLE, ASLEEP)) return;
  while (atomic_load(&own->state) == ASLEEP) {
    syscall(SYS_futex, &own->state, FUTEX_WAIT_PRIVATE, ASLEEP, NULL, NULL, 0);
  }
}

static void *work(void *argument) {
  seat *own = argument;
  const int worker = (int)(own - pool.seats);
  for (;;) {
    wait_for_call(own);
    if (!change(own, CALLED, AT_WORK)) continue;
    atomic_store_explicit(&own->core, sched_getcpu(), memory_order_relaxed);
#if defined(__SSE__)
    // The caller's rounding and denormal modes, so that a result cannot depend on which thread computed it.
    _mm_setcsr(pool.float_modes);
#endif
    take_items(worker);
    atomic_store_explicit(&own->state, IDLE, memory_order_release);
  }
  return NULL;
}

// A forked child has none of its parent's threads, and may have copied a lock that one of them held.
static void forget_threads(void) {
  pthread_mutex_init(&pool.owner, NULL);
  pool.started = 0;
  for (int worker = 0; worker < MAX_WORKERS; worker++) atomic_store(&pool.seats[worker].state, IDLE);
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
    if (pthread_create(&thread, NULL, work, &pool.seats[pool.started + 1])) break;
    pthread_detach(thread);
    pool.started++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

// Wakes those who sleep one by one: where each woke two more, four of them had all come 3 us later.
static void call_helpers(void) {
  for (int worker = 1; worker <= pool.helpers; worker++) {
    seat *at = &pool.seats[worker];
    if (atomic_exchange(&at->state, CALLED) != ASLEEP) continue;
    syscall(SYS_futex, &at->state, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
  }
}

// Nobody may join any more; waits for those who did.
static void dismiss_helpers(void) {
  for (int worker = 1; worker <= pool.helpers; worker++) {
    seat *at = &pool.seats[worker];
    if (change(at, CALLED, IDLE)) continue;
    for (int64_t start = nanoseconds(); stays(at, AT_WORK, &at->core);) {
      if (nanoseconds() - start > SPIN_NANOSECONDS) sched_yield();
    }
  }
}

void sa_parallel(int workers, int64_t items, sa_task task, void *argument) {
  if (workers > MAX_WORKERS) workers = MAX_WORKERS;
  if (workers > items) workers = (int)items;
  if (workers <= 1 || inside_task || pthread_mutex_trylock(&pool.owner)) {
    for (int64_t item = 0; item < items; item++) task(argument, item, 0);
    return;
  }
  start_threads(workers - 1);
  pool.task = task;
  pool.argument = argument;
  pool.items = items;
  pool.helpers = pool.started < workers - 1 ? pool.started : workers - 1;
#if defined(__SSE__)
  pool.float_modes = _mm_getcsr();
#endif
  atomic_store_explicit(&pool.core, sched_getcpu(), memory_order_relaxed);
  atomic_store(&pool.next, 0);
  call_helpers();
  take_items(0);
  dismiss_helpers();
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
