// softmax and its gradient along lines, for one REAL; softmax.c includes it once per type, after line_weights.h

// Whether all entries are -inf.
static bool NAME(is_dead)(const sa_line *x) {
  REAL buffer[SA_PIECE];
  for (int64_t i = 0; i < x->length; i += SA_PIECE) {
    const REAL *v = sa_line_read(buffer, REAL_DTYPE, x, i);
    for (int64_t k = 0; k < sa_line_piece(x, i); k++)
      if (!(v[k] == -INFINITY)) return false;
  }
  return true;
}

// The weights wait in y for their sum, but not where y would round them: there they are computed twice.
static void NAME(forward_line)(const sa_line *x, const sa_line *y, int dead_rows) {
  const REAL greatest = NAME(greatest)(x);
  if (greatest == -INFINITY && NAME(is_dead)(x)) {
    sa_line_fill(y, dead_value(x->length, dead_rows));
    return;
  }
  const bool keeps = y->dtype == REAL_DTYPE;
  REAL x_buffer[SA_PIECE], y_buffer[SA_PIECE];
  double lane[LANES] = {0};
  for (int64_t i = 0; i < x->length; i += SA_PIECE) {
    const int64_t count = sa_line_piece(x, i);
    REAL *weights = keeps ? sa_line_target(y_buffer, REAL_DTYPE, y, i) : y_buffer;
    NAME(weigh)(sa_line_read(x_buffer, REAL_DTYPE, x, i), greatest, weights, count);
    NAME(add_up)(lane, weights, count);
    if (keeps) sa_line_write(y, i, weights, REAL_DTYPE);
  }
  const REAL sum = (REAL)NAME(total)(lane);
  for (int64_t i = 0; i < x->length; i += SA_PIECE) {
    const int64_t count = sa_line_piece(x, i);
    REAL *out = sa_line_target(y_buffer, REAL_DTYPE, y, i);
    const REAL *weights = keeps ? sa_line_read(y_buffer, REAL_DTYPE, y, i) : out;
    if (!keeps) NAME(weigh)(sa_line_read(x_buffer, REAL_DTYPE, x, i), greatest, out, count);
    _Pragma("GCC ivdep") for (int64_t k = 0; k < count; k++) out[k] = weights[k] / sum;
    sa_line_write(y, i, out, REAL_DTYPE);
  }
}

// The same for `lines` lines that lie side by side, x_apart and y_apart elements from one to the next, closer than the
// entries of one: entry by entry over all of them.
static void NAME(forward_lines)(const sa_line *x, const sa_line *y, int dead_rows, int64_t x_apart, int64_t y_apart,
                                int64_t lines) {
  const bool keeps = y->dtype == REAL_DTYPE;
  REAL x_buffer[SA_PIECE], y_buffer[SA_PIECE], greatest[SA_PIECE], sum[SA_PIECE];
  double sums[SA_PIECE] = {0};
  bool dead[SA_PIECE];
  for (int64_t k = 0; k < lines; k++) greatest[k] = -INFINITY;
  for (int64_t i = 0; i < x->length; i++) {
    const REAL *v = sa_piece_read(x_buffer, REAL_DTYPE, sa_line_entry(x, i), x->dtype, x_apart, lines);
    for (int64_t k = 0; k < lines; k++) greatest[k] = v[k] > greatest[k] ? v[k] : greatest[k];
  }
  for (int64_t k = 0; k < lines; k++) {
    const sa_line line = sa_line_at(*x, x->data + k * x_apart * sa_dtype_size(x->dtype));
    dead[k] = greatest[k] == -INFINITY && NAME(is_dead)(&line);
  }
  for (int64_t i = 0; i < x->length; i++) {
    const REAL *v = sa_piece_read(x_buffer, REAL_DTYPE, sa_line_entry(x, i), x->dtype, x_apart, lines);
    REAL *weights =
        keeps ? sa_piece_target(y_buffer, REAL_DTYPE, sa_line_entry(y, i), y->dtype, y_apart) : (void *)y_buffer;
    _Pragma("GCC ivdep") for (int64_t k = 0; k < lines; k++) weights[k] = WEIGHT(v[k] - greatest[k]);
    for (int64_t k = 0; k < lines; k++) sums[k] += (double)weights[k];
    if (keeps) sa_piece_write(sa_line_entry(y, i), y->dtype, y_apart, weights, REAL_DTYPE, lines);
  }
  const REAL if_dead = (REAL)dead_value(x->length, dead_rows);
  for (int64_t k = 0; k < lines; k++) sum[k] = (REAL)sums[k];
  for (int64_t i = 0; i < x->length; i++) {
    REAL *out = sa_piece_target(y_buffer, REAL_DTYPE, sa_line_entry(y, i), y->dtype, y_apart);
    const REAL *weights = out;
    if (keeps) {
      weights = sa_piece_read(y_buffer, REAL_DTYPE, sa_line_entry(y, i), y->dtype, y_apart, lines);
    } else {
      const REAL *v = sa_piece_read(x_buffer, REAL_DTYPE, sa_line_entry(x, i), x->dtype, x_apart, lines);
      _Pragma("GCC ivdep") for (int64_t k = 0; k < lines; k++) out[k] = WEIGHT(v[k] - greatest[k]);
    }
    _Pragma("GCC ivdep") for (int64_t k = 0; k < lines; k++) {
      const REAL weight = weights[k] / sum[k];
      out[k] = dead[k] ? if_dead : weight;
    }
    sa_piece_write(sa_line_entry(y, i), y->dtype, y_apart, out, REAL_DTYPE, lines);
  }
}

static void NAME(forward)(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  sa_line x = sa_line_at(j->x, data[1]), y = sa_line_at(j->y, data[0]);
  if (count >= LANES && step[1] < x.step) {
    NAME(forward_lines)(&x, &y, j->dead_rows, step[1], step[0], count);
    return;
  }
  const int64_t size = sa_dtype_size(x.dtype);
  for (int64_t i = 0; i < count; i++, x.data += step[1] * size, y.data += step[0] * size)
    NAME(forward_line)(&x, &y, j->dead_rows);
}

// dx = y (dy - sum of y dy) over the visible entries; the others, -inf in x, get 0 and their dy is not used. A dead
// line has the gradient of what its stance says it is: of 0, of NaN, or of equal weights.
static void NAME(backward_line)(const sa_line *x, const sa_line *y, const sa_line *dy, const sa_line *dx,
                                int dead_rows) {
  REAL x_buffer[SA_PIECE], y_buffer[SA_PIECE], dy_buffer[SA_PIECE], dx_buffer[SA_PIECE];
  const bool dead = NAME(is_dead)(x);
  if (dead && dead_rows != SA_UNIFORM) {
    sa_line_fill(dx, dead_value(x->length, dead_rows));
    return;
  }
  const REAL masked = dead ? (REAL)NAN : (REAL)-INFINITY;  // nothing equals NaN: then no entry is masked
  double lane[LANES] = {0};
  for (int64_t i = 0; i < x->length; i += SA_PIECE) {
    const int64_t count = sa_line_piece(x, i);
    const REAL *v = sa_line_read(x_buffer, REAL_DTYPE, x, i);
    const REAL *weights = sa_line_read(y_buffer, REAL_DTYPE, y, i);
    const REAL *slopes = sa_line_read(dy_buffer, REAL_DTYPE, dy, i);
    double products[SA_PIECE];
    for (int64_t k = 0; k < count; k++) {
      const double product = (double)weights[k] * (double)slopes[k];
      products[k] = v[k] == masked ? 0 : product;
    }
    add_up_f64(lane, products, count);
  }
  const REAL dot = (REAL)NAME(total)(lane);
  for (int64_t i = 0; i < x->length; i += SA_PIECE) {
    const int64_t count = sa_line_piece(x, i);
    const REAL *v = sa_line_read(x_buffer, REAL_DTYPE, x, i);
    const REAL *weights = sa_line_read(y_buffer, REAL_DTYPE, y, i);
    const REAL *slopes = sa_line_read(dy_buffer, REAL_DTYPE, dy, i);
    REAL *out = sa_line_target(dx_buffer, REAL_DTYPE, dx, i);
    _Pragma("GCC ivdep") for (int64_t k = 0; k < count; k++) {
      const REAL slope = weights[k] * (slopes[k] - dot);
      out[k] = v[k] == masked ? 0 : slope;
    }
    sa_line_write(dx, i, out, REAL_DTYPE);
  }
}

// The same for `lines` lines side by side, `apart` elements from one to the next of dx, x, y and dy.
static void NAME(backward_lines)(const sa_line *x, const sa_line *y, const sa_line *dy, const sa_line *dx,
                                 int dead_rows, const int64_t *apart, int64_t lines) {
  REAL x_buffer[SA_PIECE], y_buffer[SA_PIECE], dy_buffer[SA_PIECE], dx_buffer[SA_PIECE];
  REAL dot[SA_PIECE], masked[SA_PIECE], visible[SA_PIECE] = {0};
  double sums[SA_PIECE] = {0}, sums_if_dead[SA_PIECE] = {0};
  for (int64_t i = 0; i < x->length; i++) {
    const REAL *v = sa_piece_read(x_buffer, REAL_DTYPE, sa_line_entry(x, i), x->dtype, apart[1], lines);
    const REAL *weights = sa_piece_read(y_buffer, REAL_DTYPE, sa_line_entry(y, i), y->dtype, apart[2], lines);
    const REAL *slopes = sa_piece_read(dy_buffer, REAL_DTYPE, sa_line_entry(dy, i), dy->dtype, apart[3], lines);
    for (int64_t k = 0; k < lines; k++) {
      const double product = (double)weights[k] * (double)slopes[k];
      sums[k] += v[k] == -INFINITY ? 0 : product;
      sums_if_dead[k] += product;
      visible[k] = v[k] == -INFINITY ? visible[k] : 1;
    }
  }
  bool dead[SA_PIECE];
  for (int64_t k = 0; k < lines; k++) {
    dead[k] = visible[k] == 0;
    dot[k] = (REAL)(dead[k] ? sums_if_dead[k] : sums[k]);
    masked[k] = dead[k] ? (REAL)NAN : (REAL)-INFINITY;
    if (dead_rows == SA_UNIFORM) dead[k] = false;
  }
  const REAL if_dead = (REAL)dead_value(x->length, dead_rows);
  for (int64_t i = 0; i < x->length; i++) {
    const REAL *v = sa_piece_read(x_buffer, REAL_DTYPE, sa_line_entry(x, i), x->dtype, apart[1], lines);
    const REAL *weights = sa_piece_read(y_buffer, REAL_DTYPE, sa_line_entry(y, i), y->dtype, apart[2], lines);
    const REAL *slopes = sa_piece_read(dy_buffer, REAL_DTYPE, sa_line_entry(dy, i), dy->dtype, apart[3], lines);
    REAL *out = sa_piece_target(dx_buffer, REAL_DTYPE, sa_line_entry(dx, i), dx->dtype, apart[0]);
    _Pragma("GCC ivdep") for (int64_t k = 0; k < lines; k++) {
      const REAL slope = weights[k] * (slopes[k] - dot[k]);
      const REAL of_live = v[k] == masked[k] ? 0 : slope;
      out[k] = dead[k] ? if_dead : of_live;
    }
    sa_piece_write(sa_line_entry(dx, i), dx->dtype, apart[0], out, REAL_DTYPE, lines);
  }
}

static void NAME(backward)(void *argument, char *const *data, const int64_t *step, int64_t count) {
  const job *j = argument;
  sa_line dx = sa_line_at(j->dx, data[0]), x = sa_line_at(j->x, data[1]);
  sa_line y = sa_line_at(j->y, data[2]), dy = sa_line_at(j->dy, data[3]);
  if (count >= LANES && step[1] < x.step) {
    NAME(backward_lines)(&x, &y, &dy, &dx, j->dead_rows, step, count);
    return;
  }
  const int64_t size = sa_dtype_size(x.dtype);
  for (int64_t i = 0; i < count; i++) {
    NAME(backward_line)(&x, &y, &dy, &dx, j->dead_rows);
    dx.data += step[0] * size;
    x.data += step[1] * size;
    y.data += step[2] * size;
    dy.data += step[3] * size;
  }
}
