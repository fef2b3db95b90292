// the CPU's table: finds the ISA, picks the kernels, and tells the host what it found
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "backend.h"
#include "kernels/cpu/copy.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/operations.h"
#include "matmul.h"
#include "memory.h"
#include "status.h"
#include "threads.h"

// Tiers in rising order; the last one that the machine can run is the default. What a tier has no kernels for, the one
// below it does.
static const struct {
  const char *name;
  const sa_cpu_kernels *kernels;
} tiers[] = {
    {"generic", &sa_cpu_generic},
#if defined(__x86_64__)
    {"avx2", &sa_cpu_avx2},
    {"avx512", &sa_cpu_avx512},
    {"amx", &sa_cpu_amx},
#endif
};
enum { TIERS = sizeof tiers / sizeof *tiers };

// Whether there are tiles of bf16, and the system lets this process use them. It is to be asked once: from then on it
// keeps room for the tiles of each thread, and of each signal handler that interrupts their use.
#if defined(SAFEATTN_EMULATED_AMX)
static bool has_tiles(void) {
  return true;
}
#elif defined(__x86_64__) && defined(__linux__)
static bool tiles_granted;
static void ask_for_tiles(void) {
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };  // <asm/prctl.h> before Linux 5.16 has no name for them
  unsigned a, b, c, d = 0;
  const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & bit_AMX_TILE && d & bit_AMX_BF16;
  tiles_granted = there && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}
static bool has_tiles(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, ask_for_tiles);
  return tiles_granted;
}
#elif defined(__x86_64__)
static bool has_tiles(void) {
  return false;
}
#endif

static bool runs_here(int tier) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the system saves the registers.
  if (tier == 1)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (tier == 2) {
    return runs_here(1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512cd");
  }
  if (tier == 3) return runs_here(2) && has_tiles();
#endif
  return tier == 0;
}

static atomic_int tier_in_force;

static int find_tier(const char *name) {
  for (int tier = 0; tier < TIERS; tier++) {
    if (!strcmp(tiers[tier].name, name)) return tier;
  }
  return -1;
}

static int best_tier(void) {
  int tier = TIERS - 1;
  while (!runs_here(tier)) tier--;
  return tier;
}

// SAFEATTN_ISA lowers the tier; a name that is unknown, or that the machine cannot run, is ignored in favour of the
// best.
static void choose_tier(void) {
  const char *wanted = getenv("SAFEATTN_ISA");
  const int tier = wanted ? find_tier(wanted) : -1;
  atomic_store(&tier_in_force, tier >= 0 && runs_here(tier) ? tier : best_tier());
}

static int tier_now(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, choose_tier);
  return atomic_load_explicit(&tier_in_force, memory_order_relaxed);
}

// The highest tier in force that has kernels for a dtype.
static const sa_cpu_kernels *kernels_for(int dtype) {
  int tier = tier_now();
  while (!tiers[tier].kernels->fused[dtype].forward) tier--;
  return tiers[tier].kernels;
}

int sa_set_isa(const char *name) {
  tier_now();
  if (!name)
    return sa_fail(SA_INVALID, __func__,
                   "name: got NULL, wanted \"generic\", \"avx2\", \"avx512\", \"amx\" or \"auto\"");
  const int tier = strcmp(name, "auto") ? find_tier(name) : best_tier();
  if (tier < 0 || !runs_here(tier)) {
    return sa_fail(tier < 0 ? SA_INVALID : SA_UNSUPPORTED, __func__,
                   "name: got \"%.40s\", which %s; wanted \"auto\" or one of sa_info()'s isas", name,
                   tier < 0 ? "is no ISA that this build has kernels for" : "this machine cannot run");
  }
  atomic_store(&tier_in_force, tier);
  return SA_OK;
}

void sa_info(sa_host_info *out) {
  if (!out) return;
  memset(out, 0, sizeof *out);
  snprintf(out->isa, sizeof out->isa, "%s", tiers[tier_now()].name);
  out->threads = sa_threads(0);
  out->cores = sa_cores();
  for (int tier = 0; tier < TIERS; tier++) {
    if (!runs_here(tier)) continue;
    const size_t used = strlen(out->isas);
    snprintf(out->isas + used, sizeof out->isas - used, "%s%s", used ? " " : "", tiers[tier].name);
  }
  snprintf(out->blas, sizeof out->blas, "%s", sa_blas_name());
  out->cuda = sa_describe_cuda();
}

// How much the calling thread's threads do in a second, of an amount that items make up.
static double rate_of(double amount, int64_t items, sa_task task, void *argument) {
  struct timespec from, to;
  clock_gettime(CLOCK_MONOTONIC, &from);
  sa_parallel(sa_threads(0), items, task, argument);
  clock_gettime(CLOCK_MONOTONIC, &to);
  return amount / ((double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec));
}

enum { BURSTS = 20 };  // of multiplications in an item: so many take long beside a call of the threads

static void multiply(void *dtype, int64_t item, int worker) {
  for (int burst = 0; burst < BURSTS; burst++) kernels_for(*(const int *)dtype)->multiply(*(const int *)dtype);
}

double sa_measure_peak(int dtype) {
  int real = dtype == SA_F64 ? SA_F64 : SA_F32;
  const int threads = sa_threads(0);
  return rate_of(kernels_for(real)->multiply(real) * BURSTS * threads, threads, multiply, &real);
}

enum { READ_PIECE = 1 << 20, READ_PIECES = 512 };  // more than caches hold

typedef struct reading {
  const char *memory;
  int places;
} reading;

static void read_piece(void *argument, int64_t piece, int worker) {
  const reading *job = argument;
  kernels_for(SA_F32)->read_memory(job->memory + piece * READ_PIECE, READ_PIECE, job->places);
}

// A core's prefetchers follow several places at once, and then wait less at the ends of pages: on an Ice Lake it reads
// 13 GB/s in one place, 14.6 in 4, 16.8 in 16, 16.1 in 32. Calling for lines ahead changed none of these.
double sa_measure_read(void) {
  const double bytes = (double)READ_PIECE * READ_PIECES;
  char *memory = sa_allocate(__func__, (int64_t)READ_PIECE * READ_PIECES);
  if (!memory) return 0;
  memset(memory, 1, (size_t)READ_PIECE * READ_PIECES);
  double best = 0;
  for (int places = 1; places <= 16; places *= 4) {
    for (int attempt = 0; attempt < 5; attempt++) {
      const double rate = rate_of(bytes, READ_PIECES, read_piece, &(reading){memory, places});
      if (rate > best) best = rate;
    }
  }
  sa_release(memory);
  return best;
}

static const sa_attention_kernels *choose_fused(const sa_problem *p, bool backward) {
  if (p->width > SA_FUSED_WIDTH || p->value_width > SA_FUSED_WIDTH) return NULL;
  return &kernels_for(p->dtype)->fused[p->dtype];
}

static void *allocate(const char *function, int device, int64_t bytes) {
  return sa_cpu_allocate(function, bytes);
}

static void release(int device, void *memory) {
  sa_cpu_release(memory);
}

const sa_backend sa_cpu_backend = {
    .name = "cpu",
    .count = 1,
    .allocate = allocate,
    .release = release,
    .copy = sa_cpu_copy,
    .fill = sa_cpu_fill,
    .reference = sa_cpu_reference,
    .fused = choose_fused,
    .operations = &sa_cpu_operations,
};
