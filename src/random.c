// tensors of random numbers, drawn as random.h says
#include "random.h"

#include <math.h>

#include "status.h"
#include "tensor.h"

enum { BLOCKS = 128 };  // drawn at a time

typedef struct draw {
  uint64_t seed;
  float most;  // the largest value below 1 in the tensor's dtype
} draw;

static void produce_uniform_f32(sa_stream *elements, const void *argument) {
  const draw *const d = argument;
  float values[4 * BLOCKS];
  for (uint64_t first = 0; elements->left; first += BLOCKS) {
    for (int k = 0; k < BLOCKS; k++) {
      const sa_words words = sa_random_block(d->seed, first + (uint64_t)k);
      for (int w = 0; w < 4; w++) {
        const float value = (float)(words.word[w] >> 8) * 0x1p-24f;
        values[4 * k + w] = value < d->most ? value : d->most;
      }
    }
    sa_stream_write(elements, values, SA_F32, 4 * BLOCKS);
  }
}

static void produce_uniform_f64(sa_stream *elements, const void *argument) {
  const draw *const d = argument;
  double values[2 * BLOCKS];
  for (uint64_t first = 0; elements->left; first += BLOCKS) {
    for (int k = 0; k < BLOCKS; k++) {
      const sa_words words = sa_random_block(d->seed, first + (uint64_t)k);
      for (int w = 0; w < 2; w++)
        values[2 * k + w] = ((words.word[2 * w] >> 5) * 0x1p26 + (words.word[2 * w + 1] >> 6)) * 0x1p-53;
    }
    sa_stream_write(elements, values, SA_F64, 2 * BLOCKS);
  }
}

// Box and Muller's: two words make two normal numbers. Quarter turns are taken off the angle in integers, which is
// exact, so that a sine or cosine near 0 keeps all its digits on every device.
static void make_normals(uint32_t a, uint32_t b, double *values) {
  const double radius = sqrt(-2 * log((a + 1.0) * 0x1p-32));
  const uint32_t quarters = (b + 0x20000000u) >> 30;
  const double rest = (int32_t)(b - (quarters << 30)) * (0x1.921fb54442d18p0 * 0x1p-30);  // pi/2 is a quarter turn
  const double sine = radius * sin(rest), cosine = radius * cos(rest);
  const double x = quarters & 1 ? sine : cosine, y = quarters & 1 ? cosine : sine;
  values[0] = quarters == 1 || quarters == 2 ? -x : x;
  values[1] = quarters >= 2 ? -y : y;
}

static void produce_normal(sa_stream *elements, const void *argument) {
  const draw *const d = argument;
  double values[4 * BLOCKS];
  for (uint64_t first = 0; elements->left; first += BLOCKS) {
    for (int k = 0; k < BLOCKS; k++) {
      const sa_words words = sa_random_block(d->seed, first + (uint64_t)k);
      make_normals(words.word[0], words.word[1], values + 4 * k);
      make_normals(words.word[2], words.word[3], values + 4 * k + 2);
    }
    sa_stream_write(elements, values, SA_F64, 4 * BLOCKS);
  }
}

static int check_float(const char *function, const sa_tensor *t) {
  const int status = sa_tensor_check_writable(function, "t", t);
  if (status || t->dtype <= SA_BF16) return status;
  return sa_fail(SA_INVALID, function, "t: is %s, wanted f32, f64, f16 or bf16", sa_dtype_name(t->dtype));
}

int sa_rand(sa_tensor *t, uint64_t seed) {
  const int status = check_float(__func__, t);
  if (status) return status;
  const float most = t->dtype == SA_F16 ? 0x1.ffcp-1f : t->dtype == SA_BF16 ? 0x1.fep-1f : 0x1.fffffep-1f;
  return sa_tensor_produce(t, t->dtype == SA_F64 ? produce_uniform_f64 : produce_uniform_f32, &(draw){seed, most});
}

int sa_randn(sa_tensor *t, uint64_t seed) {
  const int status = check_float(__func__, t);
  return status ? status : sa_tensor_produce(t, produce_normal, &(draw){.seed = seed});
}
