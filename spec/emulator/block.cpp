// runs the blocks of a grid: fibers, collectives, barriers, shared memory; names who waits for what in a deadlock
#include "block.h"
#include "runtime_api.h"

#include <link.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <thread>

#ifndef __x86_64__
#error "the emulator switches stacks on x86-64 only"
#endif

// Saves the caller's registers and stack pointer in *from and goes on where `to` was saved.
extern "C" void emulator_switch(void **from, void *to);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, . - emulator_switch
)");

namespace emulator {

static const char *function_at_work = "";

static long setting(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text && *text ? atol(text) : otherwise;
}

bool late() {
  static const bool is_late =
      !getenv("SAFEATTN_EMULATED_COPIES") || strcmp(getenv("SAFEATTN_EMULATED_COPIES"), "early");
  return is_late;
}

// Messages

static void describe(const thread *t) {
  if (t->done) {
    fprintf(stderr, "ended");
  } else if (t->waits) {
    fprintf(stderr, "waits for %s %#llx", t->waits, (unsigned long long)t->detail);
  } else {
    fprintf(stderr, "can run");
  }
}

static bool alike(const thread *a, const thread *b) {
  return a->done == b->done && a->waits == b->waits && (!a->waits || a->detail == b->detail);
}

static void describe_all(const block *b) {
  for (int first = 0; first < b->count;) {
    int last = first;
    while (last + 1 < b->count && alike(&b->threads[first], &b->threads[last + 1])) last++;
    fprintf(stderr, "  threads %d to %d: ", first, last);
    describe(&b->threads[first]);
    fprintf(stderr, "\n");
    first = last + 1;
  }
}

static void name_thread(const thread *t) {
  const uint3 at = t->home->index;
  fflush(stdout);
  fprintf(stderr, "emulated kernel of %s, block (%u, %u, %u), thread %d: ", function_at_work, at.x, at.y, at.z,
          t->number);
}

void fail(const char *format, ...) {
  const thread *t = current();
  name_thread(t);
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fprintf(stderr, "\n");
  describe_all(t->home);
  abort();
}

[[noreturn]] static void deadlock(block *b) {
  fprintf(stderr, "emulated kernel of %s, block (%u, %u, %u): no thread can go on\n", function_at_work, b->index.x,
          b->index.y, b->index.z);
  describe_all(b);
  abort();
}

// Which thread runs next

// SAFEATTN_EMULATED_ORDER: 0 first come first served, 1 last first at the start of a block, others: a seed by which
// ready threads are picked at random.
static const long order = setting("SAFEATTN_EMULATED_ORDER", 0);

static void make_ready(thread *t) {
  block *b = t->home;
  t->channel = NULL;
  t->waits = NULL;
  b->ready[(b->ready_first + b->ready_count++) % MAX_THREADS] = t;
}

static void one_arrives(block *b) {
  const bulk_copy copy = std::move(b->arriving.front());
  b->arriving.pop_front();
  copy();
}

static thread *pick(block *b) {
  while (!b->ready_count) {
    if (b->arriving.empty()) return NULL;
    one_arrives(b);
  }
  if (order > 1) {
    static uint64_t state = (uint64_t)order * 0x9e3779b97f4a7c15u;
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(b->ready[(b->ready_first + (state >> 33) % b->ready_count) % MAX_THREADS],
              b->ready[b->ready_first % MAX_THREADS]);
  }
  b->ready_count--;
  return b->ready[b->ready_first++ % MAX_THREADS];
}

static void leave(thread *t) {
  block *b = t->home;
  thread *next = pick(b);
  if (!next) {
    if (b->live) deadlock(b);
    emulator_switch(&t->stack_pointer, b->host_stack_pointer);
  } else if (next != t) {
    emulator_switch(&t->stack_pointer, next->stack_pointer);
  }
}

void wait(const void *channel, const char *waits, uint64_t detail) {
  thread *t = current();
  t->channel = channel;
  t->waits = waits;
  t->detail = detail;
  leave(t);
}

void wake(block *b, const void *channel) {
  b->idle = 0;
  for (int i = 0; i < b->count; i++) {
    if (b->threads[i].channel == channel) make_ready(&b->threads[i]);
  }
}

void pause() {
  thread *t = current();
  block *b = t->home;
  if (++b->idle > 50000000) fail("threads only read the same memory again and again");
  if (!b->ready_count && !b->arriving.empty()) one_arrives(b);
  if (!b->ready_count) sched_yield();
  make_ready(t);
  leave(t);
}

// Collectives and barriers

static void complete(warp *w, gathering *g) {
  const uint32_t mask = g->arrived;
  const thread *me = current();
  block *b = me->home;
  thread *lanes = b->threads + (w - b->warps) * WARP;
  if (g->compute) g->compute(g->operand, mask);
  g->mask = 0;
  w->open_count--;
  b->idle = 0;
  for (int lane = 0; lane < WARP; lane++) {
    if ((mask >> lane & 1) && lanes[lane].channel == g) make_ready(&lanes[lane]);
  }
}

void gather(const char *what, uint32_t mask, void *operand, collective compute) {
  thread *t = current();
  warp *w = &t->home->warps[t->number / WARP];
  const int lane = t->number % WARP;
  if (!(mask >> lane & 1)) fail("%s with mask %#x, which leaves out lane %d that calls it", what, mask, lane);
  gathering *g = NULL, *unused = NULL;
  int i = 0;
  for (int seen = 0; seen < w->open_count && !g; i++) {
    if (!w->open[i].mask) {
      if (!unused) unused = &w->open[i];
      continue;
    }
    seen++;
    if (w->open[i].mask == mask) g = &w->open[i];
  }
  if (!g) {
    g = unused ? unused : &w->open[i];
    *g = {what, mask, 0, {}, compute};
    w->open_count++;
  } else if (g->what != what && strcmp(g->what, what)) {
    fail("%s, where other lanes of the warp are in %s (mask %#x)", what, g->what, mask);
  }
  g->arrived |= 1u << lane;
  g->operand[lane] = operand;
  if (g->arrived == (mask & w->live)) {
    complete(w, g);
  } else {
    wait(g, what, mask);
  }
}

bool arrive(barrier *b, int expected) {
  if (b->arrived && b->expected != expected)
    fail("a barrier of %d threads, where others wait for %d", expected, b->expected);
  b->expected = expected;
  if (++b->arrived < expected) return false;
  b->arrived = 0;
  wake(current()->home, b);
  return true;
}

static void syncthreads_complete(block *b) {
  b->syncthreads.arrived = 0;
  b->vote_results[0] = b->vote_count;
  b->vote_results[1] = b->vote_or;
  b->vote_count = b->vote_or = 0;
  wake(b, &b->syncthreads);
}

void syncthreads() {
  block *b = current()->home;
  if (++b->syncthreads.arrived == b->live) {
    syncthreads_complete(b);
  } else {
    wait(&b->syncthreads, "__syncthreads", 0);
  }
}

void do_copy(const small_copy &copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
}

// Threads that have ended count as arrived.
static void end_thread(thread *t) {
  block *b = t->home;
  t->copies.commit();
  t->copies.finish(0, do_copy);
  if (!t->stores.empty()) fail("ends without waiting for its bulk copies, which may still read shared memory");
  if (!t->products.empty()) fail("ends without waiting for its wgmma");
  t->done = true;
  b->live--;
  b->idle = 0;
  warp *w = &b->warps[t->number / WARP];
  w->live &= ~(1u << t->number % WARP);
  for (gathering &g : w->open) {
    if (g.mask && g.arrived && g.arrived == (g.mask & w->live)) complete(w, &g);
  }
  if (b->live && b->syncthreads.arrived == b->live) syncthreads_complete(b);
}

// Shared memory. Dynamic memory begins at SHARED_BASE, as in a kernel without static shared memory; static shared
// variables are thread-local ones of the thread that runs the block, and have addresses far above.

enum { STATICS_BASE = 0x40000000 };

uint32_t shared_address(const void *p) {
  const block *b = current()->home;
  const unsigned char *byte = (const unsigned char *)p;
  if (byte >= b->dynamic && byte <= b->dynamic + b->dynamic_bytes) return (uint32_t)(byte - b->dynamic + SHARED_BASE);
  if (byte >= b->statics && byte <= b->statics + b->statics_bytes) return (uint32_t)(byte - b->statics + STATICS_BASE);
  fail("%p is not in shared memory", p);
}

unsigned char *shared_pointer(uint32_t address, size_t bytes) {
  const block *b = current()->home;
  if (address >= SHARED_BASE && address + bytes <= SHARED_BASE + b->dynamic_bytes)
    return b->dynamic + (address - SHARED_BASE);
  if (address >= STATICS_BASE && address + bytes <= STATICS_BASE + b->statics_bytes)
    return b->statics + (address - STATICS_BASE);
  fail("%zu bytes at %#x are not in the block's shared memory (%zu bytes from %#x on)", bytes, address,
       b->dynamic_bytes, (unsigned)SHARED_BASE);
}

// Static shared variables are all the thread-local memory of this library (cuda_runtime.h), so this thread's copy of it
// can be found and poisoned as a whole.
static thread_local char statics_mark;

static int find_statics(struct dl_phdr_info *info, size_t size, void *argument) {
  block *b = (block *)argument;
  const unsigned char *mark = (const unsigned char *)&statics_mark;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr) *header = &info->dlpi_phdr[i];
    unsigned char *data = (unsigned char *)info->dlpi_tls_data;
    if (header->p_type == PT_TLS && data && mark >= data && mark < data + header->p_memsz) {
      b->statics = data;
      b->statics_bytes = header->p_memsz;
      return 1;
    }
  }
  return 0;
}

// Stacks and dynamic shared memory are kept for the next kernel.

struct memory {
  unsigned char *stacks, *shared;
};
enum { PAGE = 4096, SHARED_PAGES = 228 << 10 };
static std::mutex memory_lock;
static std::vector<memory> memory_kept, memory_all;

static unsigned char *map(size_t bytes, int protection) {
  void *p = mmap(NULL, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("the emulator's mmap");
    abort();
  }
  return (unsigned char *)p;
}

static memory take_memory() {
  std::lock_guard<std::mutex> lock(memory_lock);
  if (!memory_kept.empty()) {
    const memory m = memory_kept.back();
    memory_kept.pop_back();
    return m;
  }
  const size_t bytes = (size_t)STACK_BYTES * MAX_THREADS;
  unsigned char *whole = map(bytes + STACK_BYTES, PROT_READ | PROT_WRITE);
  memory m;
  m.stacks = (unsigned char *)(((uintptr_t)whole + STACK_BYTES - 1) / STACK_BYTES * STACK_BYTES);
  for (int i = 0; i < MAX_THREADS; i++) mprotect(m.stacks + (size_t)i * STACK_BYTES, PAGE, PROT_NONE);
  // The bytes behind the end fault, as do those before the beginning.
  m.shared = map(SHARED_PAGES + 2 * PAGE, PROT_NONE);
  mprotect(m.shared + PAGE, SHARED_PAGES, PROT_READ | PROT_WRITE);
  m.shared += PAGE + SHARED_PAGES;
  memory_all.push_back(m);
  return m;
}

static void keep_memory(memory m) {
  std::lock_guard<std::mutex> lock(memory_lock);
  memory_kept.push_back(m);
}

// Who touches memory that is not there is named before the process ends.

static struct sigaction handler_before;

static void report_fault(int signal, siginfo_t *fault, void *context) {
  const uintptr_t here = (uintptr_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_RSP];
  const uintptr_t address = (uintptr_t)fault->si_addr;
  const device_memory there = touch(address);
  if (there == OPENED) return;
  if (there == CLOSED) fprintf(stderr, "the host touches %#tx, memory of an emulated device\n", address);
  // No lock: the thread may hold it, and the list only grows while kernels begin.
  for (const memory &m : memory_all) {
    const auto on_stacks = [&](uintptr_t x) {
      return x >= (uintptr_t)m.stacks && x < (uintptr_t)m.stacks + (size_t)STACK_BYTES * MAX_THREADS;
    };
    const auto owner = [](uintptr_t x) { return *(thread **)((x | (STACK_BYTES - 1)) - 7); };
    if (on_stacks(address)) {
      name_thread(owner(address));
      fprintf(stderr, "needs more than the stack of %d KiB that a thread has\n", STACK_BYTES >> 10);
    } else if (on_stacks(here)) {
      name_thread(owner(here));
      const intptr_t behind = (intptr_t)(address - (uintptr_t)m.shared);
      if (behind >= -SHARED_PAGES - PAGE && behind < PAGE) {
        fprintf(stderr, "touches the byte %td after the dynamic shared memory's end\n", behind);
      } else {
        fprintf(stderr, "touches %#tx, which is no memory of the device\n", address);
      }
    }
  }
  sigaction(signal, &handler_before, NULL);  // the access faults again
}

void watch_for_faults() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = report_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &handler_before);
  });
}

// Blocks

static const std::function<void()> *kernel_at_work;

static void begin_thread() {
  (*kernel_at_work)();
  thread *t = current();
  end_thread(t);
  leave(t);
  abort();
}

static void prepare_stack(thread *t, unsigned char *stack, int number) {
  *(thread **)(stack + STACK_BYTES - 8) = t;
  // Stacks begin at different cache lines, or those of a block would compete for the same sets.
  void **top = (void **)(stack + STACK_BYTES - 64 - number % 61 * 576);
  *--top = NULL;
  *--top = (void *)begin_thread;
  top -= 6;
  memset(top, 0, 6 * sizeof *top);
  t->stack_pointer = top;
}

static void run_block(block *b, const memory &m, uint3 index) {
  b->index = index;
  b->live = b->count;
  b->idle = 0;
  b->vote_count = b->vote_or = 0;
  b->syncthreads.arrived = 0;
  for (barrier &x : b->named) x.arrived = 0;
  for (barrier &x : b->warpgroups) x.arrived = 0;
  poison(b->dynamic, (size_t)(m.shared - b->dynamic));
  poison(b->statics, b->statics_bytes);
  for (int i = 0; i < WARP; i++) {
    const int lanes = b->count - i * WARP;
    b->warps[i].live = lanes <= 0 ? 0 : lanes >= WARP ? ~0u : (1u << lanes) - 1;
    b->warps[i].open_count = 0;
    for (gathering &g : b->warps[i].open) g.mask = 0;
  }
  for (int i = 0; i < b->count; i++) {
    thread *t = &b->threads[i];
    t->home = b;
    t->number = i;
    t->index =
        make_uint3((unsigned)i % b->size.x, (unsigned)i / b->size.x % b->size.y, (unsigned)i / (b->size.x * b->size.y));
    t->done = false;
    t->channel = NULL;
    t->waits = NULL;
    prepare_stack(t, m.stacks + (size_t)i * STACK_BYTES, i);
  }
  b->ready_first = b->ready_count = 0;
  for (int i = 0; i < b->count; i++) make_ready(&b->threads[order == 1 ? b->count - 1 - i : i]);
  thread *first = pick(b);
  emulator_switch(&b->host_stack_pointer, first->stack_pointer);
  if (!b->arriving.empty()) {
    fprintf(stderr, "emulated kernel of %s: a block ends while a copy to its shared memory is under way\n",
            function_at_work);
    abort();
  }
}

void run_grid(const char *function, dim3 grid, dim3 size, size_t dynamic_bytes, const std::function<void()> &kernel) {
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  const device_access access;
  function_at_work = function;
  kernel_at_work = &kernel;
  const uint64_t blocks = (uint64_t)grid.x * grid.y * grid.z;
  std::atomic<uint64_t> next(0);
  const auto work = [&] {
    const memory m = take_memory();
    std::vector<unsigned char> signal_stack(64 << 10);
    const stack_t fault_stack = {signal_stack.data(), 0, signal_stack.size()};
    sigaltstack(&fault_stack, NULL);
    std::vector<thread> threads(size.x * size.y * size.z);
    std::unique_ptr<block> b(new block());
    b->grid = grid;
    b->size = size;
    b->count = (int)threads.size();
    b->threads = threads.data();
    b->dynamic_bytes = dynamic_bytes;
    b->dynamic = m.shared - (dynamic_bytes + 1023) / 1024 * 1024;
    statics_mark = 1;
    dl_iterate_phdr(find_statics, b.get());
    for (uint64_t i; (i = next++) < blocks;)
      run_block(b.get(), m,
                make_uint3((unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y)));
    const stack_t none = {NULL, SS_DISABLE, 0};
    sigaltstack(&none, NULL);
    keep_memory(m);
  };
  // Never on the caller's thread: all thread-local memory of the thread that runs a block is poisoned.
  const long workers = std::max(1L, std::min(setting("SAFEATTN_EMULATED_THREADS", 1), (long)blocks));
  std::vector<std::thread> pool;
  for (long i = 0; i < workers; i++) pool.emplace_back(work);
  for (std::thread &worker : pool) worker.join();
}

}  // namespace emulator
