// softmax and its gradient along lines, for one REAL; softmax.c includes it once per type

// Entries first .. first + count - 1 of the line that starts at `line`.
static inline const REAL *NAME(entries)(const job *j, REAL *buffer, const char *line, int64_t step, int64_t first,
                                        int64_t count) {
  return sa_piece_read(buffer, REAL_DTYPE, line + first * step * j->size, j->dtype, step, count);
}

static inline int64_t NAME(piece)(const job *j, int64_t first) {
  return j->length - first < SA_PIECE ? j->length - first : SA_PIECE;
}

static void NAME(fill)(const job *j, char *line, int64_t step, REAL value) {
  for (int64_t i = 0; i < j->length; i += SA_PIECE)
    sa_cpu_cast(j->dtype, REAL_DTYPE)(line + i * step * j->size, step, &value, 0, NAME(piece)(j, i));
}

// Whether all entries are -inf.
static bool NAME(is_dead)(const job *j, const char *x) {
  REAL buffer[SA_PIECE];
  for (int64_t i = 0; i < j->length; i += SA_PIECE) {
    const int64_t count = NAME(piece)(j, i);
    const REAL *v = NAME(entries)(j, buffer, x, j->x_step, i, count);
    for (int64_t k = 0; k < count; k++)
      if (!(v[k] == -INFINITY)) return false;
  }
  return true;
}

// NaN entries are passed over: they make the sum of weights NaN, and with it every weight.
static REAL NAME(greatest)(const job *j, const char *x) {
  REAL buffer[SA_PIECE], lane[LANES];
  for (int k = 0; k < LANES; k++) lane[k] = -INFINITY;
  for (int64_t i = 0; i < j->length; i += SA_PIECE) {
    const int64_t count = NAME(piece)(j, i);
    const REAL *v = NAME(entries)(j, buffer, x, j->x_step, i, count);
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

static void NAME(sum)(double lane[LANES], const REAL *v, int64_t count) {
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

static REAL NAME(dead_value)(const job *j) {
  return j->dead_rows == SA_ZERO ? 0 : j->dead_rows == SA_NAN ? (REAL)NAN : (REAL)(1.0 / (double)j->length);
}

// Weights wait in y for their sum, but not where y would round them: there they are computed twice.
static void NAME(forward_line)(const job *j, const char *x, char *y) {
  const REAL greatest = NAME(greatest)(j, x);
  if (greatest == -INFINITY && NAME(is_dead)(j, x)) {
    NAME(fill)(j, y, j->y_step, NAME(dead_value)(j));
    return;
  }
  const bool keeps = j->dtype == REAL_DTYPE;
  REAL x_buffer[SA_PIECE], y_buffer[SA_PIECE];
  double lane[LANES] = {0};
  for (int64_t i = 0; i < j->length; i += SA_PIECE) {
    const int64_t count = NAME(piece)(j, i);
    char *to = y + i * j->y_step * j->size;
    REAL *weights = sa_piece_target(y_buffer, REAL_DTYPE, to, j->dtype, j->y_step);
    NAME(weigh)(NAME(entries)(j, x_buffer, x, j->x_step, i, count), greatest, weights, count);
    NAME(sum)(lane, weights, count);
    if (keeps) sa_piece_write(to, j->dtype, j->y_step, weights, REAL_DTYPE, count);
  }
  const REAL sum = (REAL)NAME(total)(lane);
  for (int64_t i = 0; i < j->length; i += SA_PIECE) {
    const int64_t count = NAME(piece)(j, i);
    char *to = y + i * j->y_step * j->size;
    REAL *out = sa_piece_target(y_buffer, REAL_DTYPE, to, j->dtype, j->y_step);
    const REAL *weights = out;
    if (keeps)
      weights = NAME(entries)(j, y_buffer, y, j->y_step, i, count);
    else
      NAME(weigh)(NAME(entries)(j, x_buffer, x, j->x_step, i, count), greatest, out, count);
    _Pragma("GCC ivdep") for (int64_t k = 0; k < count; k++) out[k] = weights[k] / sum;
    sa_piece_write(to, j->dtype, j->y_step, out, REAL_DTYPE, count);
  }
}

// The same for `lines` lines that lie side by side, closer than the entries of one: entry by entry over all of them.
static void NAME(forward_lines)(const job *j, char *x, int64_t x_step, char *y, int64_t y_step, int64_t lines) {
  const bool keeps = j->dtype == REAL_DTYPE;
  REAL x_buffer[SA_PIECE], y_buffer[SA_PIECE], greatest[SA_PIECE], sum[SA_PIECE];
  double sums[SA_PIECE];
  for (int64_t k = 0; k < lines; k++) {
    greatest[k] = -INFINITY;
    sums[k] = 0;
  }
  for (int64_t i = 0; i < j->length; i++) {
    const REAL *v = sa_piece_read(x_buffer, REAL_DTYPE, x + i * j->x_step * j->size, j->dtype, x_step, lines);
    for (int64_t k = 0; k < lines; k++) greatest[k] = v[k] > greatest[k] ? v[k] : greatest[k];
  }
  bool dead[SA_PIECE];
  for (int64_t k = 0; k < lines; k++) dead[k] = greatest[k] == -INFINITY && NAME(is_dead)(j, x + k * x_step * j->size);
  for (int64_t i = 0; i < j->length; i++) {
    const REAL *v = sa_piece_read(x_buffer, REAL_DTYPE, x + i * j->x_step * j->size, j->dtype, x_step, lines);
    char *to = y + i * j->y_step * j->size;
    REAL *weights = sa_piece_target(y_buffer, REAL_DTYPE, to, j->dtype, y_step);
    _Pragma("GCC ivdep") for (int64_t k = 0; k < lines; k++) weights[k] = WEIGHT(v[k] - greatest[k]);
    for (int64_t k = 0; k < lines; k++) sums[k] += (double)weights[k];
    if (keeps) sa_piece_write(to, j->dtype, y_step, weights, REAL_DTYPE, lines);
  }
  for (int64_t k = 0; k < lines; k++) sum[k] = (REAL)sums[k];
  for (int64_t i = 0; i < j->length; i++) {
    char *to = y + i * j->y_step * j->size;
    REAL *out = sa_piece_target(y_buffer, REAL_DTYPE, to, j->dtype, y_step);
    const REAL *weights = out;
    if (keeps) {
      weights = sa_piece_read(y_buffer, REAL_DTYPE, to, j->dtype, y_step, lines);
    } else {
      const REAL *v = sa_piece_read(x_buffer, REAL_DTYPE, x + i * j->x_step * j->size, j->dtype, x_step, lines);
      _Pragma("GCC ivdep") for (int64_t k = 0; k < lines; k++) out[k] = WEIGHT(v[k] - greatest[k]);
    }
    _Pragma("GCC ivdep") for (int64_t k = 0; k < lines; k++) {
      const REAL weight = weights[k] / sum[k];
      out[k] = dead[k] ? NAME(dead_value)(j) : weight;
    }
    sa_piece_write(to, j->dtype, y_step, out, REAL_DTYPE, lines);
  }
}

static void NAME(forward)(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  if (count >= LANES && step[1] < j->x_step) {
    NAME(forward_lines)(j, data[1], step[1], data[0], step[0], count);
    return;
  }
  for (int64_t i = 0; i < count; i++)
    NAME(forward_line)(j, data[1] + i * step[1] * j->size, data[0] + i * step[0] * j->size);
}

// dx = y (dy - sum of y dy) over the visible entries; the others, -inf in x, get 0 and their dy is not used. A dead
// line has the gradient of what its stance says it is: of 0, of NaN, or of equal weights.
static void NAME(backward_line)(const job *j, const char *x, const char *y, const char *dy, char *dx) {
  REAL x_buffer[SA_PIECE], y_buffer[SA_PIECE], dy_buffer[SA_PIECE], dx_buffer[SA_PIECE];
  const bool dead = NAME(is_dead)(j, x);
  if (dead && j->dead_rows != SA_UNIFORM) {
    NAME(fill)(j, dx, j->dx_step, NAME(dead_value)(j));
    return;
  }
  // No entry equals NaN, so that none is masked.
  const REAL masked = dead ? (REAL)NAN : (REAL)-INFINITY;
  double lane[LANES] = {0};
  for (int64_t i = 0; i < j->length; i += SA_PIECE) {
    const int64_t count = NAME(piece)(j, i);
    const REAL *v = NAME(entries)(j, x_buffer, x, j->x_step, i, count);
    const REAL *weights = NAME(entries)(j, y_buffer, y, j->y_step, i, count);
    const REAL *slopes = NAME(entries)(j, dy_buffer, dy, j->dy_step, i, count);
    for (int64_t done = 0; done < count; done += LANES) {
      const int64_t lanes = count - done < LANES ? count - done : LANES;
      for (int k = 0; k < lanes; k++) {
        const double product = (double)weights[done + k] * (double)slopes[done + k];
        lane[k] += v[done + k] == masked ? 0 : product;
      }
    }
  }
  const REAL dot = (REAL)NAME(total)(lane);
  for (int64_t i = 0; i < j->length; i += SA_PIECE) {
    const int64_t count = NAME(piece)(j, i);
    const REAL *v = NAME(entries)(j, x_buffer, x, j->x_step, i, count);
    const REAL *weights = NAME(entries)(j, y_buffer, y, j->y_step, i, count);
    const REAL *slopes = NAME(entries)(j, dy_buffer, dy, j->dy_step, i, count);
    char *to = dx + i * j->dx_step * j->size;
    REAL *out = sa_piece_target(dx_buffer, REAL_DTYPE, to, j->dtype, j->dx_step);
    _Pragma("GCC ivdep") for (int64_t k = 0; k < count; k++) {
      const REAL slope = weights[k] * (slopes[k] - dot);
      out[k] = v[k] == masked ? 0 : slope;
    }
    sa_piece_write(to, j->dtype, j->dx_step, out, REAL_DTYPE, count);
  }
}

static void NAME(backward)(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  for (int64_t i = 0; i < count; i++) {
    NAME(backward_line)
    (j, data[1] + i * step[1] * j->size, data[2] + i * step[2] * j->size, data[3] + i * step[3] * j->size,
     data[0] + i * step[0] * j->size);
  }
}

#undef REAL
#undef REAL_DTYPE
#undef WEIGHT
#undef NAME
