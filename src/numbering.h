// numbers by 64-bit keys: of documents by their ids, of terms by the addresses of masks
#ifndef SAFEATTN_NUMBERING_H
#define SAFEATTN_NUMBERING_H
#include "safeattn.h"

// Open addressing, never more than half full. Begins as zeros; to be released.
typedef struct sa_numbering {
  struct sa_numbered {
    int64_t key, number;  // number + 1; 0: a free place
  } * place;
  int64_t capacity, count;  // capacity is a power of two, or 0
} sa_numbering;

// The number of a key, or -1.
int64_t sa_number_of(const sa_numbering *known, int64_t key);

// Gives `key`, which has none, a number of at least 0. SA_OK or SA_NO_MEMORY.
int sa_number(sa_numbering *known, const char *function, int64_t key, int64_t number);

void sa_numbering_release(sa_numbering *known);

#endif
