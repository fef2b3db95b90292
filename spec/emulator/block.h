// a block at work: its threads are fibers of one thread of the operating system, and meet in collectives and barriers
#ifndef EMULATOR_BLOCK_H
#define EMULATOR_BLOCK_H
#include <stddef.h>
#include <stdint.h>

#include <deque>
#include <functional>
#include <vector>

#include "vector_types.h"

namespace emulator {

enum { WARP = 32, NAMED_BARRIERS = 16, SHARED_BASE = 1024, STACK_BYTES = 256 << 10, MAX_THREADS = 1024 };

struct block;

// Work that was issued and is not yet waited for: the items since the last commit, and the committed groups.
template <class Work>
struct groups {
  struct item {
    Work work;
    int group;
  };
  std::vector<item> items;
  size_t first = 0;
  int committed = 0;

  void add(const Work &work) { items.push_back({work, committed}); }
  void commit() { committed++; }
  // Calls act(work) for what is in all groups but the newest `pending`, oldest first.
  template <class Act>
  void finish(int pending, Act act) {
    for (; first < items.size() && items[first].group < committed - pending; first++) act(items[first].work);
    if (first == items.size()) {
      items.clear();
      first = 0;
    }
  }
  bool empty() const { return first == items.size(); }
};

// cp.async
struct small_copy {
  unsigned char *to;
  const unsigned char *from;
  int bytes;  // of 16; the rest becomes 0
};

typedef std::function<void()> bulk_copy;

// One product of a warpgroup, as one of its threads sees it: d[rows][columns] (+)= a b.
struct product {
  float *d;
  int columns;
  bool half, accumulate, a_in_registers, a_transposed, b_transposed;
  uint32_t a, b;            // low words of descriptors
  uint32_t a_registers[4];  // when a_in_registers
};

struct thread {
  void *stack_pointer;
  block *home;
  uint3 index;
  int number;  // row-major in the block
  bool done;
  // What it waits for: wake(channel) lets it go on. `waits` and `detail` are for messages.
  const void *channel;
  const char *waits;
  uint64_t detail;
  groups<small_copy> copies;
  groups<bulk_copy> stores;
  groups<product> products;
};

// Threads that meet: the last to arrive acts for all.
typedef void (*collective)(void *const operand[WARP], uint32_t mask);

struct gathering {
  const char *what;
  uint32_t mask, arrived;  // lanes of the warp
  void *operand[WARP];
  collective compute;
};

struct warp {
  uint32_t live;  // lanes that have not ended
  int open_count;
  gathering open[WARP];  // mask 0: not in use
};

struct barrier {
  int arrived, expected;
};

struct block {
  uint3 index;
  dim3 grid, size;
  int count, live;
  thread *threads;
  warp warps[WARP];
  barrier syncthreads, named[NAMED_BARRIERS], warpgroups[8];
  int vote_count, vote_or;  // of __syncthreads_count and its like
  int vote_results[2];
  unsigned char *dynamic, *statics;
  size_t dynamic_bytes, statics_bytes;
  thread *ready[MAX_THREADS];  // a ring: ready_first, ready_first + 1, ..., ready_count of them
  unsigned ready_first, ready_count;
  std::deque<bulk_copy> arriving;  // bulk loads under way
  void *host_stack_pointer;
  long idle;  // pauses since something last happened
};

// Whose stack this is: every stack is aligned to its size and ends with its thread.
static inline thread *current() {
  uintptr_t here;
  asm("mov %%rsp, %0" : "=r"(here));
  return *(thread **)((here | (STACK_BYTES - 1)) - 7);
}

// Blocks of `grid` one after another (SAFEATTN_EMULATED_THREADS > 1: on so many threads); returns when all are done.
void run_grid(const char *function, dim3 grid, dim3 size, size_t dynamic_bytes, const std::function<void()> &kernel);

// Ends the process with a message that names the calling thread.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

// The caller waits until wake(channel).
void wait(const void *channel, const char *waits, uint64_t detail);
void wake(block *b, const void *channel);
void pause();  // lets others run

// All live lanes of `mask` call this with the same `what`; the last calls compute(operands by lane, live lanes).
void gather(const char *what, uint32_t mask, void *operand, collective compute);
void syncthreads();
// Arrives at a barrier of `expected` threads; whether this was the last one, which has woken the others. When not, the
// caller may wait(b).
bool arrive(barrier *b, int expected);

// Shared memory: what 32-bit addresses stand for.
uint32_t shared_address(const void *p);
unsigned char *shared_pointer(uint32_t address, size_t bytes);

// Whether copies and products happen as late as they may (the default) or at once (SAFEATTN_EMULATED_COPIES=early).
bool late();
void do_copy(const small_copy &copy);

}  // namespace emulator

#define threadIdx (emulator::current()->index)
#define blockIdx (emulator::current()->home->index)
#define blockDim (emulator::current()->home->size)
#define gridDim (emulator::current()->home->grid)
static const int warpSize = 32;

#endif
