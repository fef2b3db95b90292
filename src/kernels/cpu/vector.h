// vectors of one REAL in the compiler's own terms, for ISAs that need no better; part of flash.h's vectors
//
// Before including: REAL, BITS (the unsigned integer of its size), NAME(x), LANES, VECTOR_BYTES, and for the exponent
// MANTISSA_BITS, EXPONENT_BIAS, LOWEST_EXPONENT (real_f32.h, real_f64.h). An ISA with a fused multiply-add, a maximum,
// a quick way from a comparison to bits or to 2^x defines OWN_FMA, OWN_MAX, OWN_BITS_OF or OWN_EXP2 to its function.

typedef REAL NAME(vector) __attribute__((vector_size(VECTOR_BYTES)));
typedef BITS NAME(bits) __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL NAME(loose) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

static inline NAME(vector) NAME(load)(const REAL *from) {
  return *(const NAME(loose) *)from;
}
static inline void NAME(store)(REAL *to, NAME(vector) x) {
  *(NAME(loose) *)to = x;
}
static inline NAME(vector) NAME(set)(REAL x) {
  return x - (NAME(vector)){0};
}

static inline NAME(vector) NAME(choose)(NAME(bits) mask, NAME(vector) a, NAME(vector) b) {
  return (NAME(vector))((mask & (NAME(bits))a) | (~mask & (NAME(bits))b));
}

static inline NAME(vector) NAME(fma)(NAME(vector) a, NAME(vector) b, NAME(vector) c) {
#if defined(OWN_FMA)
  return OWN_FMA(a, b, c);
#else
  return a * b + c;
#endif
}

// One bit a lane: whether a <= b.
static inline uint64_t NAME(below_or_equal)(NAME(vector) a, NAME(vector) b) {
  const NAME(bits) mask = (NAME(bits))(a <= b);
#if defined(OWN_BITS_OF)
  return (uint64_t)(unsigned)OWN_BITS_OF((NAME(vector))mask);
#else
  uint64_t lanes = 0;
  for (int i = 0; i < LANES; i++) lanes |= (uint64_t)(mask[i] & 1) << i;
  return lanes;
#endif
}

// Lanes of a whose bit is set, else of b.
static inline NAME(vector) NAME(select)(uint64_t lanes, NAME(vector) a, NAME(vector) b) {
  NAME(bits) bit;
  for (int i = 0; i < LANES; i++) bit[i] = (BITS)1 << i;
  const NAME(bits) all = (BITS)lanes - (NAME(bits)){0};
  return NAME(choose)((NAME(bits))((all & bit) == bit), a, b);
}

// The larger; the second where one is NaN.
static inline NAME(vector) NAME(max)(NAME(vector) a, NAME(vector) b) {
#if defined(OWN_MAX)
  return OWN_MAX(a, b);
#else
  return NAME(choose)((NAME(bits))(a > b), a, b);
#endif
}

// That in the lanes whose bit is set, else the second.
static inline NAME(vector) NAME(max_where)(uint64_t lanes, NAME(vector) a, NAME(vector) b) {
  return NAME(select)(lanes, NAME(max)(a, b), b);
}

static inline NAME(vector) NAME(magnitude)(NAME(vector) x) {
  return (NAME(vector))((NAME(bits))x & (~(NAME(bits)){0} >> 1));
}

// 2^x for x <= 0 or NaN, and 0 below 2^LOWEST_EXPONENT, whose mantissa's worth above the smallest normal number keeps
// products with such a weight from being subnormal: those cost 60 times as much. A weight that small changes no digit.
static inline NAME(vector) NAME(exp2)(NAME(vector) x) {
#if defined(OWN_EXP2)
  return OWN_EXP2(x);
#else
  // Adding 1.5 * 2^MANTISSA_BITS leaves x rounded to an integer in the lowest bits.
  const NAME(vector) shift = NAME(set)((REAL)1.5 * (REAL)(UINT64_C(1) << MANTISSA_BITS));
  NAME(vector) whole = (x + shift) - shift;
  if (sizeof(REAL) == sizeof(float)) whole = NAME(choose)((NAME(bits))(whole > x), whole - NAME(set)(1), whole);
  const NAME(vector) part = x - whole;
  static const REAL terms[] = {NAME(EXP2_TERMS)};
  NAME(vector) power = NAME(set)(terms[0]);
  for (int k = 1; k < (int)(sizeof terms / sizeof *terms); k++) power = NAME(fma)(power, part, NAME(set)(terms[k]));
  const NAME(bits) exponent = (NAME(bits))(whole + shift) + EXPONENT_BIAS;
  const NAME(vector) scaled = power * (NAME(vector))(exponent << MANTISSA_BITS);
  return NAME(choose)((NAME(bits))(x < NAME(set)(LOWEST_EXPONENT)), NAME(set)(0), scaled);
#endif
}

// That in the lanes whose bit is set, else 0, whatever x is.
static inline NAME(vector) NAME(exp2_where)(uint64_t lanes, NAME(vector) x) {
  return NAME(select)(lanes, NAME(exp2)(x), NAME(set)(0));
}
