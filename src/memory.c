// memory that is counted, and made to fail on request: the core's own allocations, and the blocks that tensors hold
#include "memory.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "backend.h"
#include "pieces.h"

/*  Counts, and failures on request  */

static _Atomic int64_t block_bytes, block_count, peak_bytes, internal_bytes, device_bytes;
static _Thread_local int64_t allocations_made, fail_after;  // fail_after 0: never

static bool fails_on_request(void) {
  allocations_made++;
  return fail_after > 0 && --fail_after == 0;
}

int64_t sa_memory_fail(int64_t n) {
  const int64_t made = allocations_made;
  allocations_made = 0;
  fail_after = n > 0 ? n : 0;
  return made;
}

void sa_memory(sa_memory_use *out) {
  if (!out) return;
  *out = (sa_memory_use){block_bytes, block_count, peak_bytes, internal_bytes};
}

void sa_memory_reset_peak(void) {
  atomic_store(&peak_bytes, atomic_load(&block_bytes));
}

static void count_block(int64_t bytes, int64_t blocks) {
  const int64_t now = atomic_fetch_add(&block_bytes, bytes) + bytes;
  atomic_fetch_add(&block_count, blocks);
  int64_t peak = atomic_load(&peak_bytes);
  while (now > peak && !atomic_compare_exchange_weak(&peak_bytes, &peak, now)) continue;
}

static void count(int device, int64_t bytes, int64_t blocks) {
  if (device == SA_CPU)
    count_block(bytes, blocks);
  else
    atomic_fetch_add(&device_bytes, bytes);
}

int64_t sa_device_bytes(void) {
  return atomic_load(&device_bytes);
}

void *sa_allocate(const char *function, int64_t bytes) {
  if (fails_on_request()) {
    sa_refused(function, bytes);
    return NULL;
  }
  void *memory = sa_cpu_allocate(function, bytes);
  if (memory) atomic_fetch_add(&internal_bytes, bytes);
  return memory;
}

void *sa_allocate_zeroed(const char *function, int64_t bytes) {
  void *memory = sa_allocate(function, bytes);
  if (memory && !sa_piece_of(memory)->zeroed) memset(memory, 0, (size_t)bytes);
  return memory;
}

void sa_release(void *memory) {
  if (!memory) return;
  atomic_fetch_sub(&internal_bytes, sa_piece_of(memory)->bytes);
  sa_cpu_release(memory);
}

/*  Blocks  */

struct sa_block {
  _Atomic int64_t holders;
  int64_t bytes;
  void *data;
  const sa_backend *backend;  // of the device that the memory is on: it gives the memory back
  int32_t device;
};

int sa_block_new(const char *function, int device, int64_t bytes, sa_block **block, void **data) {
  const sa_backend *backend = sa_backend_of(function, device);
  if (!backend) return SA_NO_DEVICE;
  if (fails_on_request()) return sa_refused(function, bytes);
  sa_block *made = malloc(sizeof *made);
  if (!made) return sa_refused(function, sizeof *made);
  void *memory = backend->allocate(function, device, bytes);
  if (!memory) {
    free(made);
    return SA_NO_MEMORY;
  }
  atomic_init(&made->holders, 1);
  made->bytes = bytes;
  made->data = memory;
  made->backend = backend;
  made->device = device;
  count(device, bytes, 1);
  *block = made;
  *data = memory;
  return SA_OK;
}

void sa_block_retain(sa_block *block) {
  if (block) atomic_fetch_add_explicit(&block->holders, 1, memory_order_relaxed);
}

void sa_block_release(sa_block *block) {
  // The last holder must see all that the others wrote before they let go.
  if (!block || atomic_fetch_sub_explicit(&block->holders, 1, memory_order_acq_rel) > 1) return;
  count(block->device, -block->bytes, -1);
  block->backend->release(block->device, block->data);
  free(block);
}

void sa_blocks_release(sa_block **blocks, int64_t count) {
  if (!blocks) return;
  for (int64_t k = 0; k < count; k++) {
    sa_block_release(blocks[k]);
    blocks[k] = NULL;
  }
}
