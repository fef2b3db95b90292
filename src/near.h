// when two numbers are near, for every device: what sa_allclose asks of each pair
#ifndef SAFEATTN_NEAR_H
#define SAFEATTN_NEAR_H
#include <math.h>

#include "backend.h"
#include "everywhere.h"

SA_EVERYWHERE bool sa_reals_near(double a, double b, const sa_tolerance *wanted) {
  if (a == b) return true;
  if (a != a || b != b) return wanted->equal_nan && a != a && b != b;
  if (isinf(a) || isinf(b)) return false;
  return fabs(a - b) <= wanted->absolute + wanted->relative * fabs(b);
}

SA_EVERYWHERE bool sa_integers_near(int64_t a, int64_t b, const sa_tolerance *wanted) {
  const uint64_t apart = a > b ? (uint64_t)a - (uint64_t)b : (uint64_t)b - (uint64_t)a;
  return apart == 0 || (double)apart <= wanted->absolute + wanted->relative * fabs((double)b);
}

#endif
