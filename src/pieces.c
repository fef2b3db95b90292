// aligned pieces of the CPU's memory: small ones kept by each thread, large ones mapped
#include "pieces.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "memory.h"
#include "status.h"

enum {
  ALIGNMENT = 64,
  PAGE = 4096,
  HUGE_PAGE = 2 << 20,
  MAPPED_FROM = 1 << 20,  // pieces of so many bytes are mapped, smaller ones come from malloc
  STEPS = 32,             // pieces of up to so many times ALIGNMENT are kept by their size,
  SMALL_BYTES_AT_MOST = 2 << 20,
  MIDDLING = 4,  // and so many larger ones
  MIDDLING_BYTES_AT_MOST = 256 << 10,
  SPARE_SLOTS = 16,  // released mappings kept for the next piece of their size
  SPARE_BYTES_AT_MOST = 64 << 20
};

_Static_assert(sizeof(sa_piece) <= ALIGNMENT, "the header fits before an aligned piece");

static char *align_up(char *address, uintptr_t alignment) {
  return address + (-(uintptr_t)address & (alignment - 1));
}

static void *finish_piece(char *memory, void *base, int64_t mapped, int64_t room) {
  *sa_piece_of(memory) = (sa_piece){base, mapped, room, room, mapped != 0};
  return memory;
}

static void *new_piece(int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  // Ends where the piece ends, so that the sanitizer sees the first byte beyond.
  char *base = NULL;
  if (posix_memalign((void **)&base, ALIGNMENT, (size_t)bytes + ALIGNMENT)) return NULL;
#else
  char *base = malloc((size_t)bytes + sizeof(sa_piece) + ALIGNMENT);  // half the time of posix_memalign
  if (!base) return NULL;
#endif
  return finish_piece(align_up(base + sizeof(sa_piece), ALIGNMENT), base, 0, bytes);
}

/*  Small and middling pieces
 *
 *  A collector gives tensors back by the thousand, and malloc then joins and sorts what the next calls take apart
 * again; scratch of 64 KiB and more makes it do so at every call. That was a tenth of a small call. So each thread
 * keeps small pieces by their size, and a few larger ones, until it ends.
 */

static _Thread_local struct {
  void *pile[STEPS + 1];     // of small pieces; each begins with the next
  int64_t small_bytes;       // in all piles
  void *middling[MIDDLING];  // any may be NULL
  unsigned oldest;           // roughly: the next of them to be given up
  bool watched;              // whether the end of the thread frees them
} kept;

static int steps_of(int64_t bytes) {
  return bytes > 0 ? (int)((bytes + ALIGNMENT - 1) / ALIGNMENT) : 1;
}

static void free_piece(void *memory) {
  if (memory) free(sa_piece_of(memory)->base);
}

static void free_kept(void *unused) {
  for (int steps = 0; steps <= STEPS; steps++) {
    for (void *memory = kept.pile[steps], *next; memory; memory = next) {
      next = *(void **)memory;
      free_piece(memory);
    }
  }
  for (int k = 0; k < MIDDLING; k++) free_piece(kept.middling[k]);
  memset(&kept, 0, sizeof kept);
}

static pthread_key_t end_of_thread;

static void make_key(void) {
  pthread_key_create(&end_of_thread, free_kept);
}

static void watch_thread(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, make_key);
  pthread_setspecific(end_of_thread, &kept);
  kept.watched = true;
}

static void *take_small(int steps) {
  void *memory = kept.pile[steps];
  if (!memory) return NULL;
  kept.pile[steps] = *(void **)memory;
  kept.small_bytes -= (int64_t)steps * ALIGNMENT;
  return memory;
}

static bool keep_small(void *memory, int steps) {
  if (kept.small_bytes > SMALL_BYTES_AT_MOST) return false;
  if (!kept.watched) watch_thread();
  *(void **)memory = kept.pile[steps];
  kept.pile[steps] = memory;
  kept.small_bytes += (int64_t)steps * ALIGNMENT;
  return true;
}

// A kept piece that has room for `bytes` and wastes at most an eighth of itself.
static void *take_middling(int64_t bytes) {
  for (int k = 0; k < MIDDLING; k++) {
    void *memory = kept.middling[k];
    const int64_t room = memory ? sa_piece_of(memory)->room : 0;
    if (room < bytes || room - room / 8 > bytes) continue;
    kept.middling[k] = NULL;
    return memory;
  }
  return NULL;
}

// Gives the piece that is not kept: this one, or one that makes room for it, or NULL.
static void *keep_middling(void *memory) {
  if (sa_piece_of(memory)->room > MIDDLING_BYTES_AT_MOST) return memory;
  if (!kept.watched) watch_thread();
  int slot = 0;
  while (slot < MIDDLING && kept.middling[slot]) slot++;
  if (slot == MIDDLING) slot = (int)(kept.oldest++ % MIDDLING);
  void *before = kept.middling[slot];
  kept.middling[slot] = memory;
  return before;
}

static bool keeps_pieces(void) {
#ifdef __SANITIZE_ADDRESS__
  return false;  // it is to see each piece freed
#else
  return true;
#endif
}

static void *new_small(int64_t bytes) {
  if (!keeps_pieces()) return new_piece(bytes);
  const int steps = bytes <= STEPS * ALIGNMENT ? steps_of(bytes) : 0;
  void *memory = steps ? take_small(steps) : take_middling(bytes);
  if (!memory) memory = new_piece(steps ? steps * ALIGNMENT : bytes);
  if (memory) sa_piece_of(memory)->bytes = bytes;
  return memory;
}

static void release_small(void *memory) {
  const int64_t room = sa_piece_of(memory)->room;
  if (!keeps_pieces())
    free_piece(memory);
  else if (room > STEPS * ALIGNMENT)
    free_piece(keep_middling(memory));
  else if (!keep_small(memory, (int)(room / ALIGNMENT)))
    free_piece(memory);
}

/*  Large pieces
 *
 *  glibc raises its threshold for mapping to the largest piece that was freed and then keeps such pieces in its heap,
 *  where one small neighbour holds all the memory below it. So large pieces are mapped here and go back to the system
 *  when they are released. Fresh pages are dear, though (2.6 us each on a virtual machine: a fresh piece of 16 MiB
 *  takes five times as long as filling it), so a few released mappings are kept. Slots are atomic instead of locked:
 *  a lock that another thread holds would stay locked in a forked child.
 */

static _Atomic(char *) spare_slots[SPARE_SLOTS];
static _Atomic int64_t spare_bytes;
static _Atomic unsigned oldest_slot;  // roughly: the next to be given up

static void unmap(char *memory) {
  munmap(sa_piece_of(memory)->base, (size_t)sa_piece_of(memory)->mapped);
}

// Whoever gets a piece out of a slot is its only owner, and may read its header.
static char *swap_slot(unsigned slot, char *memory) {
  char *before = atomic_exchange(&spare_slots[slot % SPARE_SLOTS], memory);
  if (before) atomic_fetch_sub(&spare_bytes, sa_piece_of(before)->mapped);
  return before;
}

static bool fill_empty_slot(char *memory) {
  for (unsigned slot = 0; slot < SPARE_SLOTS; slot++) {
    char *empty = NULL;
    if (atomic_compare_exchange_strong(&spare_slots[slot], &empty, memory)) return true;
  }
  return false;
}

// Keeps a released piece; older ones make room for it.
static void keep_spare(char *memory) {
  const int64_t mapped = sa_piece_of(memory)->mapped;
  if (mapped > SPARE_BYTES_AT_MOST) {
    unmap(memory);
    return;
  }
  int64_t kept = atomic_fetch_add(&spare_bytes, mapped) + mapped;
  for (int tries = 0; tries < SPARE_SLOTS && kept > SPARE_BYTES_AT_MOST; tries++) {
    char *old = swap_slot(atomic_fetch_add(&oldest_slot, 1), NULL);
    if (old) unmap(old);
    kept = atomic_load(&spare_bytes);
  }
  if (fill_empty_slot(memory)) return;
  char *old = swap_slot(atomic_fetch_add(&oldest_slot, 1), memory);
  if (old) unmap(old);
}

// A kept piece that has room for `bytes` and wastes at most an eighth of itself; NULL when there is none.
static char *take_spare(int64_t bytes) {
  for (unsigned slot = 0; slot < SPARE_SLOTS; slot++) {
    char *memory = swap_slot(slot, NULL);
    if (!memory) continue;
    sa_piece *const piece = sa_piece_of(memory);
    if (piece->room >= bytes && piece->room - piece->room / 8 <= bytes) {
      piece->bytes = bytes;
      piece->zeroed = 0;
      return memory;
    }
    keep_spare(memory);
  }
  return NULL;
}

// Starts at a huge page (with them, fresh memory comes three times as fast), its header on a page of its own before.
static void *new_large(int64_t bytes) {
  char *spare = take_spare(bytes);
  if (spare) return spare;
  const int64_t length = (bytes + PAGE - 1) / PAGE * PAGE;
  const int64_t reserved = length + HUGE_PAGE + PAGE;
  char *start = mmap(NULL, (size_t)reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return NULL;
  char *memory = align_up(start + PAGE, HUGE_PAGE);
  char *base = memory - PAGE, *end = memory + length;
  if (base > start) munmap(start, (size_t)(base - start));
  if (start + reserved > end) munmap(end, (size_t)(start + reserved - end));
  madvise(memory, (size_t)length, MADV_HUGEPAGE);  // refused where there are none: no loss
  finish_piece(memory, base, end - base, length);
  sa_piece_of(memory)->bytes = bytes;
  return memory;
}

static int64_t mapped_from(void) {
#ifdef __SANITIZE_ADDRESS__
  return INT64_MAX;  // the sanitizer watches malloc's pieces only
#else
  return MAPPED_FROM;
#endif
}

int sa_refused(const char *function, int64_t bytes) {
  return sa_fail(SA_NO_MEMORY, function, "out of memory: %lld bytes were refused", (long long)bytes);
}

void *sa_cpu_allocate(const char *function, int64_t bytes) {
  const bool possible = bytes <= INT64_MAX / 2;
  void *memory = !possible ? NULL : bytes < mapped_from() ? new_small(bytes) : new_large(bytes);
  if (!memory) sa_refused(function, bytes);
  return memory;
}

void sa_cpu_release(void *memory) {
  if (!memory) return;
  if (sa_piece_of(memory)->mapped == 0)
    release_small(memory);
  else
    keep_spare(memory);
}
