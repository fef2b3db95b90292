// tensors of random numbers, drawn as random.h says
#include "random.h"

#include "backend.h"
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
        const float value = sa_uniform_f32(words.word[w]);
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
      for (int w = 0; w < 2; w++) values[2 * k + w] = sa_uniform_f64(words.word[2 * w], words.word[2 * w + 1]);
    }
    sa_stream_write(elements, values, SA_F64, 2 * BLOCKS);
  }
}

static void produce_normal(sa_stream *elements, const void *argument) {
  const draw *const d = argument;
  double values[4 * BLOCKS];
  for (uint64_t first = 0; elements->left; first += BLOCKS) {
    for (int k = 0; k < BLOCKS; k++) {
      const sa_words words = sa_random_block(d->seed, first + (uint64_t)k);
      sa_normals(words.word[0], words.word[1], values + 4 * k);
      sa_normals(words.word[2], words.word[3], values + 4 * k + 2);
    }
    sa_stream_write(elements, values, SA_F64, 4 * BLOCKS);
  }
}

// On the device where it can, else on the CPU by `produce`.
static int draw_values(const char *function, sa_tensor *t, const draw *d, bool normal, sa_producer produce) {
  const sa_backend *backend = sa_backend_of(function, t->device);
  if (!backend) return SA_NO_DEVICE;
  return backend->draw ? backend->draw(t, d->seed, normal, d->most) : sa_tensor_produce(t, produce, d);
}

static int check_float(const char *function, const sa_tensor *t) {
  const int status = sa_tensor_check_writable(function, "t", t);
  if (status || t->dtype <= SA_BF16) return status;
  return sa_fail(SA_INVALID, function, "t: got %s, wanted f32, f64, f16 or bf16", sa_dtype_name(t->dtype));
}

int sa_rand(sa_tensor *t, uint64_t seed) {
  const int status = check_float(__func__, t);
  if (status) return status;
  const float most = t->dtype == SA_F16 ? 0x1.ffcp-1f : t->dtype == SA_BF16 ? 0x1.fep-1f : 0x1.fffffep-1f;
  return draw_values(__func__, t, &(draw){seed, most}, false,
                     t->dtype == SA_F64 ? produce_uniform_f64 : produce_uniform_f32);
}

int sa_randn(sa_tensor *t, uint64_t seed) {
  const int status = check_float(__func__, t);
  return status ? status : draw_values(__func__, t, &(draw){.seed = seed}, true, produce_normal);
}
