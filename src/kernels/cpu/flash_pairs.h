// products of bf16 as pairs lie, on processors that multiply them (OWN_PAIRS), for one REAL; part of flash_product.h
//
// A row of bf16 is one of words with two elements each, and one instruction adds the products of two pairs to a sum:
// half of the multiply-adds, and nothing to convert. Both operands are bf16 in S = Q K^T and dP = dO V^T; weights have
// more digits. A Zen 4 takes 0.76 of the time forward and 0.80 backward (D64 and D128, one thread).
//
// The processor takes subnormal elements, and sums below 2^-126, for 0. Under a scale of ordinary size a score does not
// care unless other elements are beyond 2^100. A gradient does where all are that small: then, when no dS of an
// ordinary size came up, the backward is done again by multiply-adds (flash_backward.h). What remains are elements
// below 2^-110 beside others above 2^-60, as with AMX (amx.c).

// Whether rows of so many elements, which are read where they lie, can be multiplied as pairs with rows of another
// operand; by the problem alone, so that forward and backward agree to the bit.
static bool NAME(multiplies_pairs)(const sa_problem *p, const sa_operand *x, const sa_operand *other, int64_t width) {
#ifdef OWN_PAIRS
  const double size = fabs(p->scale);
  const bool halves = x->dtype == SA_BF16 && other->dtype == SA_BF16, ordinary = size >= 0x1p-30 && size <= 1;
  return halves && ordinary && width % 2 == 0 && NAME(has_pairs)();
#else
  return false;
#endif
}

// Whether all rows begin where a word does.
static bool NAME(lies_in_words)(const sa_operand *x) {
  return (((uintptr_t)x->data / 2 | (uintptr_t)(x->stride[0] | x->stride[1] | x->stride[2])) & 1) == 0;
}

// Whether scores are sums of pairs. Few queries read whole vectors, wherever they begin.
static bool NAME(pairs)(const NAME(block) * block) {
  const sa_operand *k = &block->p->k;
  const int64_t width = block->p->width;
  if (!NAME(multiplies_pairs)(block->p, k, &block->p->q, width)) return false;
  return block->few ? width % (2 * LANES) == 0 : NAME(lies_in_words)(k);
}

// Whether dP is sums of pairs unless small numbers matter.
static bool NAME(dweight_pairs)(const sa_problem *p) {
  return NAME(multiplies_pairs)(p, &p->v, &p->dout, p->value_width) && NAME(lies_in_words)(&p->v);
}

// The power of two in a factor; the rest of it is 1 to 2.
static REAL NAME(power_of_two_in)(double factor, REAL *rest) {
  int exponent;
  *rest = (REAL)(2 * frexp(factor, &exponent));
  return (REAL)ldexp(1, exponent - 1);
}

// What queries take of the scale of scores: all of it, or with pairs the power of two in it, which changes no digit of
// theirs. Scores take the rest, 1 to 2, so that no sum overflows which they do not.
static REAL NAME(scale_of_queries)(const NAME(block) * block, REAL *rest) {
  const double scale = block->p->scale * (block->plain ? 1.4426950408889634 : 1);
  *rest = 1;
  return NAME(pairs)(block) ? NAME(power_of_two_in)(scale, rest) : (REAL)scale;
}

// A row of numbers that bf16 can hold, as bf16.
static void NAME(narrow_row)(REAL *row, int width) {
  for (int d = 0; d < width; d++) {
    const float x = (float)row[d];
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint16_t half = (uint16_t)(bits >> 16);
    memcpy((char *)row + d * sizeof half, &half, sizeof half);
  }
}

// Words times a power of two.
static inline NAME(vector) NAME(scaled_pairs)(NAME(vector) words, NAME(vector) power) {
  const NAME(order) bits = (NAME(order))words, upper = bits - bits + (BITS)0xffff0000;
  const NAME(vector) low = (NAME(vector))(bits << 16) * power, high = (NAME(vector))(bits & upper) * power;
  return (NAME(vector))((NAME(order))low >> 16 | ((NAME(order))high & upper));
}

// to[pair][ROW] = power * rows of bf16, words transposed, 0 beyond the block and in the rows whose bit is set in
// `skip`.
static void NAME(pack_pairs)(const sa_operand *x, const NAME(block) * block, int width, REAL power, uint64_t skip,
                             REAL *to) {
  enum { WORDS = SA_FUSED_WIDTH / 2 };
  const int words = width / 2;
  const uint64_t lanes = ((uint64_t)2 << (LANES - 1)) - 1;
  const bool in_place = block->each == block->count && words % LANES == 0 && x->stride[2] % 2 == 0;
  REAL rows[LANES * WORDS];
  for (int first = 0; first < block->vectors * LANES; first += LANES, to += LANES) {
    const bool copied = !in_place || first + LANES > block->count || skip >> first & lanes;
    for (int i = 0; copied && i < LANES; i++) {
      const bool absent = first + i >= block->count || skip >> (first + i) & 1;
      memset(rows + i * WORDS, 0, sizeof *rows * NAME(columns)(words));
      if (!absent) memcpy(rows + i * WORDS, NAME(row_at)(x, block, first + i), sizeof *rows * words);
    }
    const REAL *from = copied ? rows : NAME(row_at)(x, block, first);
    for (int d = 0; d < words; d += LANES) {
      NAME(vector) column[LANES];
      NAME(columns_of)(from + d, copied ? WORDS : x->stride[2] / 2, column);
      for (int i = 0; i < LANES && d + i < words; i++) {
        NAME(store)(to + (d + i) * NAME(ROW), NAME(scaled_pairs)(column[i], NAME(set)(power)));
      }
    }
  }
}
