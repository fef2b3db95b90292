// opens OpenBLAS on first use, in a way that its host does not notice
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "matmul.h"

// As in cblas.h, with the 32-bit integers of every distribution's libopenblas.
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
typedef void (*sgemm)(int order, int a_trans, int b_trans, int m, int n, int k, float alpha, const float *a, int lda,
                      const float *b, int ldb, float beta, float *c, int ldc);
typedef void (*dgemm)(int order, int a_trans, int b_trans, int m, int n, int k, double alpha, const double *a, int lda,
                      const double *b, int ldb, double beta, double *c, int ldc);

enum { SEQUENTIAL = 0, OPENMP = 2 };  // what openblas_get_parallel() says

static struct {
  sgemm sgemm;
  dgemm dgemm;
  int parallel;
  pid_t process;
  pthread_mutex_t one_at_a_time;
  char name[128];
} blas = {.one_at_a_time = PTHREAD_MUTEX_INITIALIZER};
static atomic_bool opened;

#if defined(__x86_64__)
#define PTHREAD_FLAVOUR "/usr/lib/x86_64-linux-gnu/openblas-pthread/"
#elif defined(__aarch64__)
#define PTHREAD_FLAVOUR "/usr/lib/aarch64-linux-gnu/openblas-pthread/"
#else
#define PTHREAD_FLAVOUR ""
#endif

static void *open_library(void) {
  // Debian's alternatives may point libopenblas.so.0 to another flavour, so the one with threads of its own comes
  // first.
  static const char *const paths[] = {PTHREAD_FLAVOUR "libopenblas.so.0", "libopenblas.so.0", "libopenblas.so"};
  void *library = NULL;
  for (size_t i = 0; i < sizeof paths / sizeof *paths && !library; i++)
    library = dlopen(paths[i], RTLD_NOW | RTLD_LOCAL);
  return library;
}

// Before 0.3.25 OpenBLAS takes CPUs newer than itself for a Prescott and is five times slower. A core type that it does
// not know makes it look at the CPU's features. It reads the variable while it is loaded, so it is set for just that
// long, and only when the user has not set it. setenv and getenv of other threads are not safe beside each other: a
// host that calls getenv from several threads should run one product, or set OPENBLAS_CORETYPE, before it starts them.
static void *open_with_core_type(void) {
  const bool ours = !getenv("OPENBLAS_CORETYPE");
  if (ours) setenv("OPENBLAS_CORETYPE", "auto", 1);
  void *library = open_library();
  if (ours) unsetenv("OPENBLAS_CORETYPE");
  return library;
}

static void describe(void *library) {
  const char *(*config)(void) = (const char *(*)(void))dlsym(library, "openblas_get_config");
  const char *(*core)(void) = (const char *(*)(void))dlsym(library, "openblas_get_corename");
  const char *config_text = config ? config() : "OpenBLAS", *core_text = core ? core() : "";
  const bool said = !*core_text || strstr(config_text, core_text);
  snprintf(blas.name, sizeof blas.name, "%s%s%s", config_text, said ? "" : " ", said ? "" : core_text);
  const size_t length = strlen(blas.name);
  if (length && blas.name[length - 1] == ' ') blas.name[length - 1] = 0;
}

static void open_blas(void) {
  // OpenBLAS starts its threads while it is loaded; they inherit the mask, so that no signal of the host lands there.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  void *library = open_with_core_type();
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (library) {
    int (*parallel)(void) = (int (*)(void))dlsym(library, "openblas_get_parallel");
    blas.parallel = parallel ? parallel() : SEQUENTIAL;
    blas.sgemm = (sgemm)dlsym(library, "cblas_sgemm");
    blas.dgemm = (dgemm)dlsym(library, "cblas_dgemm");
    blas.process = getpid();
  }
  if (blas.sgemm && blas.dgemm)
    describe(library);
  else
    snprintf(blas.name, sizeof blas.name, "plain loops (no libopenblas.so.0 could be opened)");
  atomic_store(&opened, true);
}

const char *sa_blas_name(void) {
  return atomic_load(&opened) ? blas.name : "not loaded";
}

// Opens it if need be; holds the lock of a library that cannot be called twice at once.
static bool enter(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, open_blas);
  if (!blas.sgemm || !blas.dgemm) return false;
  // A forked child has none of the threads that libgomp believes in, and would wait for them for ever.
  if (blas.parallel == OPENMP && getpid() != blas.process) return false;
  // The sequential flavour gives wrong products when two threads call it.
  if (blas.parallel == SEQUENTIAL) pthread_mutex_lock(&blas.one_at_a_time);
  return true;
}

static void leave(void) {
  if (blas.parallel == SEQUENTIAL) pthread_mutex_unlock(&blas.one_at_a_time);
}

bool sa_blas_f32(const sa_product *p, const float *a, const float *b, float *y) {
  if (!enter()) return false;
  blas.sgemm(ROW_MAJOR, p->a_transposed ? TRANS : NO_TRANS, p->b_transposed ? TRANS : NO_TRANS, p->m, p->n, p->k, 1, a,
             p->a_step, b, p->b_step, 0, y, p->y_step);
  leave();
  return true;
}

bool sa_blas_f64(const sa_product *p, const double *a, const double *b, double *y) {
  if (!enter()) return false;
  blas.dgemm(ROW_MAJOR, p->a_transposed ? TRANS : NO_TRANS, p->b_transposed ? TRANS : NO_TRANS, p->m, p->n, p->k, 1, a,
             p->a_step, b, p->b_step, 0, y, p->y_step);
  leave();
  return true;
}
