// makes room for the next real_*.h
#undef REAL
#undef BITS
#undef NAME
#undef DTYPE
#undef MANTISSA_BITS
#undef EXPONENT_BIAS
#undef LOWEST_EXPONENT
#undef LANES
#undef TILE_VECTORS
#undef STRETCH
#undef OWN_FMA
#undef OWN_MAX
#undef OWN_EXP2
#undef OWN_BITS_OF
#undef OWN_COLUMNS
#undef OWN_SUMS
#undef LOG
