// what stands before every piece of the CPU's memory (sa_cpu_allocate in memory.h)
#ifndef SAFEATTN_PIECES_H
#define SAFEATTN_PIECES_H
#include "safeattn.h"

// Stands right before every piece and says how to give it back.
typedef struct sa_piece {
  void *base;      // what malloc or mmap gave
  int64_t mapped;  // bytes of the mapping; 0: base is malloc's
  int64_t bytes;   // that were asked for
  int64_t room;    // bytes that it has
  int64_t zeroed;  // 1 while the memory is fresh from the system
} sa_piece;

static inline sa_piece *sa_piece_of(void *memory) {
  return (sa_piece *)((char *)memory - sizeof(sa_piece));
}

// SA_NO_MEMORY, and an error that says so.
int sa_refused(const char *function, int64_t bytes);

#endif
