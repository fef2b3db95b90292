// what sizes came up among numbers, where products take small ones for 0; for one REAL; part of flash_block.h
#ifndef SAFEATTN_SIZES
#define SAFEATTN_SIZES
enum { SA_ORDINARY = 1, SA_SMALL = 2, SA_NONFINITE = 4 };

// Whether what came up is of an ordinary size. What is not finite stands for an ordinary number unless others are
// small: a call is not to be computed in another way, with other bits for rows that do not see it, because of a NaN.
static inline bool sa_ordinary(int sizes) {
  return sizes & SA_ORDINARY || sizes == SA_NONFINITE;
}
#endif

// Notes the sizes of elements, until one is ordinary: 2^-60 and more.
static void NAME(note_sizes)(atomic_int *sizes, const REAL *rows, int64_t stride, int count, int width) {
  if (atomic_load_explicit(sizes, memory_order_relaxed) & SA_ORDINARY) return;
  int found = 0;
  for (int r = 0; r < count && !(found & SA_ORDINARY); r++) {
    for (int d = 0; d < width; d++) {
      const REAL x = rows[r * stride + d], size = x < 0 ? -x : x;
      const int finite = size >= (REAL)0x1p-60 ? SA_ORDINARY : size > 0 ? SA_SMALL : 0;
      found |= size < (REAL)INFINITY ? finite : SA_NONFINITE;
    }
  }
  atomic_fetch_or_explicit(sizes, found, memory_order_relaxed);
}
