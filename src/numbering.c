// numbers by 64-bit keys: of documents by their ids, of terms by the addresses of masks
#include "numbering.h"

#include "memory.h"

// Where `key` is, or the free place where it would be.
static struct sa_numbered *place_of(const sa_numbering *known, int64_t key) {
  // The high half of the product is well mixed; the low bits of keys that are multiples of something are not.
  uint64_t place = ((uint64_t)key * 0x9e3779b97f4a7c15u) >> 32;
  for (;; place++) {
    struct sa_numbered *found = &known->place[place & (uint64_t)(known->capacity - 1)];
    if (found->number == 0 || found->key == key) return found;
  }
}

static int make_room(sa_numbering *known, const char *function) {
  if (2 * (known->count + 1) <= known->capacity) return SA_OK;
  sa_numbering larger = {NULL, known->capacity ? 4 * known->capacity : 16, known->count};
  larger.place = sa_allocate_zeroed(function, larger.capacity * (int64_t)sizeof *larger.place);
  if (!larger.place) return SA_NO_MEMORY;
  for (int64_t k = 0; k < known->capacity; k++)
    if (known->place[k].number) *place_of(&larger, known->place[k].key) = known->place[k];
  sa_release(known->place);
  *known = larger;
  return SA_OK;
}

int64_t sa_number_of(const sa_numbering *known, int64_t key) {
  return known->capacity ? place_of(known, key)->number - 1 : -1;
}

int sa_number(sa_numbering *known, const char *function, int64_t key, int64_t number) {
  if (make_room(known, function)) return SA_NO_MEMORY;
  *place_of(known, key) = (struct sa_numbered){key, number + 1};
  known->count++;
  return SA_OK;
}

void sa_numbering_release(sa_numbering *known) {
  sa_release(known->place);
}
