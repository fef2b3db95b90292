// numbers about whole tensors: statistics and comparisons
#include <math.h>

#include "backend.h"
#include "near.h"
#include "status.h"
#include "tensor.h"

enum { CHUNK = 512, LANES = 8 };  // values read at a time; running sums side by side, for the compiler to vectorise

/*  Statistics  */

// Element i of the row-major order goes to lane i % LANES, whatever the strides, so that equal values have equal sums.
typedef struct totals {
  double min[LANES], max[LANES], sum[LANES], squares[LANES];
  int64_t nan, posinf, neginf, zero;
} totals;

// Sums of scale * value over the finite ones. The lanes are local because the compiler keeps only such in registers.
static void add_values(totals *all, const double *values, int64_t count, double scale) {
  totals t = *all;
  for (int64_t first = 0; first < count; first += LANES)
    for (int lane = 0; lane < LANES; lane++) {
      const double value = values[first + lane], scaled = value - value == 0 ? value * scale : 0;
      t.min[lane] = value - value == 0 && value < t.min[lane] ? value : t.min[lane];
      t.max[lane] = value - value == 0 && value > t.max[lane] ? value : t.max[lane];
      t.sum[lane] += scaled;
      t.squares[lane] += scaled * scaled;
    }
  *all = t;
}

static void count_values(totals *all, const double *values, int64_t count) {
  int64_t zero = 0, finite = 0;
  for (int64_t i = 0; i < count; i++) {
    zero += values[i] == 0;
    finite += fabs(values[i]) < INFINITY;
  }
  all->zero += zero;
  for (int64_t i = 0; i < count && finite < count; i++) {
    all->nan += values[i] != values[i];
    all->posinf += values[i] == INFINITY;
    all->neginf += values[i] == -INFINITY;
  }
}

static totals total(const sa_tensor *t, double scale) {
  totals all = {.nan = 0};
  for (int lane = 0; lane < LANES; lane++) {
    all.min[lane] = INFINITY;
    all.max[lane] = -INFINITY;
  }
  sa_stream elements;
  sa_stream_open(&elements, t);
  while (elements.left) {
    double values[CHUNK];
    const int64_t count = sa_stream_read(&elements, values, SA_F64, CHUNK);
    count_values(&all, values, count);
    int64_t filled = count;
    while (filled % LANES) values[filled++] = NAN;  // which no sum takes
    add_values(&all, values, filled, scale);
  }
  return all;
}

static double add_lanes(const double *values) {
  double sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += values[lane];
  return sum;
}

static int total_on_host(const sa_tensor *t, double scale, sa_totals *out) {
  sa_tensor host;
  const int status = sa_tensor_on_host(&host, t);
  if (status) return status;
  const totals all = total(&host, scale);
  *out = (sa_totals){.min = INFINITY,
                     .max = -INFINITY,
                     .sum = add_lanes(all.sum),
                     .squares = add_lanes(all.squares),
                     .nan = all.nan,
                     .posinf = all.posinf,
                     .neginf = all.neginf,
                     .zero = all.zero};
  for (int lane = 0; lane < LANES; lane++) {
    out->min = fmin(out->min, all.min[lane]);
    out->max = fmax(out->max, all.max[lane]);
  }
  sa_tensor_release(&host);
  return SA_OK;
}

int sa_tensor_stats(const sa_tensor *t, sa_stats *out) {
  int status = sa_tensor_check(__func__, "t", t);
  if (status) return status;
  if (!out) return sa_fail(SA_INVALID, __func__, "out: got NULL, wanted where to put the statistics");
  const sa_backend *backend = sa_backend_of(__func__, t->device);
  if (!backend) return SA_NO_DEVICE;
  int (*const total_of)(const sa_tensor *, double, sa_totals *) = backend->totals ? backend->totals : total_on_host;
  sa_totals all;
  status = total_of(t, 1, &all);
  if (status) return status;
  sa_stats s = {.min = all.min,
                .max = all.max,
                .count = sa_tensor_numel(t),
                .nan = all.nan,
                .posinf = all.posinf,
                .neginf = all.neginf,
                .zero = all.zero};
  const int64_t finite = s.count - s.nan - s.posinf - s.neginf;
  // Squares of very large or small f64 leave the range of f64: those are scaled, at the price of a second pass.
  const double largest = finite ? fmax(fabs(s.min), fabs(s.max)) : 0;
  int exponent = 0;
  if (largest > 0x1p400 || (largest > 0 && largest < 0x1p-400)) {
    frexp(largest, &exponent);
    exponent = exponent < -1000 ? -1000 : exponent;  // 2^-exponent must be finite
    status = total_of(t, ldexp(1, -exponent), &all);
    if (status) return status;
  }
  s.mean = ldexp(all.sum / (double)finite, exponent);
  s.norm = ldexp(sqrt(all.squares), exponent);
  if (!finite) s.min = s.max = s.mean = NAN;
  *out = s;
  return SA_OK;
}

/*  Comparisons  */

static bool is_integer(const sa_tensor *t) {
  return t->dtype == SA_BOOL || t->dtype == SA_I32 || t->dtype == SA_I64;
}

// Reads both tensors, of one shape and on the CPU, side by side; integers as such, because f64 cannot hold all of i64.
static bool all_near(const sa_tensor *a, const sa_tensor *b, const sa_tolerance *wanted) {
  const bool integers = is_integer(a) && is_integer(b);
  union {
    double real[CHUNK];
    int64_t integer[CHUNK];
  } x, y;
  sa_stream a_elements, b_elements;
  sa_stream_open(&a_elements, a);
  sa_stream_open(&b_elements, b);
  while (a_elements.left) {
    const int64_t count = sa_stream_read(&a_elements, &x, integers ? SA_I64 : SA_F64, CHUNK);
    sa_stream_read(&b_elements, &y, integers ? SA_I64 : SA_F64, CHUNK);
    for (int64_t k = 0; k < count; k++) {
      const bool near =
          integers ? sa_integers_near(x.integer[k], y.integer[k], wanted) : sa_reals_near(x.real[k], y.real[k], wanted);
      if (!near) return false;
    }
  }
  return true;
}

static int compare(const sa_tensor *a, const sa_tensor *b, const sa_tolerance *wanted, int *result) {
  const sa_backend *backend = a->device == b->device ? sa_backend_of("sa_allclose", a->device) : NULL;
  if (backend && backend->all_near) return backend->all_near(a, b, wanted, result);
  sa_tensor a_host, b_host;
  int status = sa_tensor_on_host(&a_host, a);
  if (status) return status;
  status = sa_tensor_on_host(&b_host, b);
  if (!status) *result = all_near(&a_host, &b_host, wanted);
  sa_tensor_release(&a_host);
  if (!status) sa_tensor_release(&b_host);
  return status;
}

static int check_pair(const char *function, const sa_tensor *a, const sa_tensor *b, const int *result) {
  int status = sa_tensor_check(function, "a", a);
  if (!status) status = sa_tensor_check(function, "b", b);
  if (!status && !result) status = sa_fail(SA_INVALID, function, "result: got NULL, wanted where to put it");
  return status;
}

int sa_equal(const sa_tensor *a, const sa_tensor *b, int *result) {
  const int status = check_pair(__func__, a, b, result);
  if (status) return status;
  if (a->dtype == b->dtype && sa_tensor_same_shape(a, b)) return compare(a, b, &(sa_tolerance){0}, result);
  *result = 0;
  return SA_OK;
}

int sa_allclose(const sa_tensor *a, const sa_tensor *b, double atol, double rtol, bool equal_nan, int *result) {
  const int status = check_pair(__func__, a, b, result);
  if (status) return status;
  if (!(atol >= 0)) return sa_fail(SA_INVALID, __func__, "atol: got %g, wanted a number >= 0", atol);
  if (!(rtol >= 0)) return sa_fail(SA_INVALID, __func__, "rtol: got %g, wanted a number >= 0", rtol);
  if (!sa_tensor_same_shape(a, b))
    return sa_fail(SA_INVALID, __func__, "b: got %s, wanted the shape of a, %s", sa_describe(b), sa_describe(a));
  return compare(a, b, &(sa_tolerance){atol, rtol, equal_nan}, result);
}
