// exp(x - greatest x) along a line and its sum, for one REAL; what softmax and cross entropy share
//
// Included once per type, with REAL, REAL_DTYPE, WEIGHT (exp of what is not positive) and NAME(name) defined.

// NaN entries are passed over: they make the sum of weights NaN, and with it all that is divided by it.
static REAL NAME(greatest)(const sa_line *x) {
  REAL buffer[SA_PIECE], lane[LANES];
  for (int k = 0; k < LANES; k++) lane[k] = -INFINITY;
  for (int64_t i = 0; i < x->length; i += SA_PIECE) {
    const int64_t count = sa_line_piece(x, i);
    const REAL *v = sa_line_read(buffer, REAL_DTYPE, x, i);
    int64_t done = 0;
    for (; done + LANES <= count; done += LANES)
      for (int k = 0; k < LANES; k++) lane[k] = v[done + k] > lane[k] ? v[done + k] : lane[k];
    for (; done < count; done++) lane[0] = v[done] > lane[0] ? v[done] : lane[0];
  }
  for (int k = 1; k < LANES; k++) lane[0] = lane[k] > lane[0] ? lane[k] : lane[0];
  return lane[0];
}

static void NAME(weigh)(const REAL *x, REAL greatest, REAL *weights, int64_t count) {
  _Pragma("GCC ivdep") for (int64_t k = 0; k < count; k++) weights[k] = WEIGHT(x[k] - greatest);
}

static void NAME(add_up)(double lane[LANES], const REAL *v, int64_t count) {
  int64_t done = 0;
  for (; done + LANES <= count; done += LANES)
    for (int k = 0; k < LANES; k++) lane[k] += (double)v[done + k];
  for (int k = 0; done < count; done++, k++) lane[k] += (double)v[done];
}

static double NAME(total)(double lane[LANES]) {
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int k = 0; k < half; k++) lane[k] += lane[k + half];
  return lane[0];
}
