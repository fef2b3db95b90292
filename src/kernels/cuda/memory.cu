// device memory: what is released is kept for the next, as asking CUDA for memory stops the device
#include <pthread.h>
#include <stdlib.h>

#include "kernels/cuda/operations.cuh"

/*  Pieces are cut to classes of size, eight to an octave, so that a piece fits the next tensor of about its size and
 *  wastes at most an eighth. A released piece goes on top of the pile of its class and the next one of that class is
 *  taken from there.
 *
 *  While all work of a device is on one stream, a piece may be handed out at once: what uses it next runs after what
 *  used it last. With more streams a released piece first waits for what is on each of them by then (an event a
 *  stream), so that a tensor may be used on any stream without telling the allocator.
 */

enum { LEAST = 512, CLASSES = 8 * 48, BUCKETS = 4096, STREAMS = 32 };

typedef struct piece {
  char *memory;
  int64_t bytes;       // of its class
  struct piece *next;  // in its bucket, its pile, or among those that wait
  int64_t released;    // when, counted in releases
  cudaEvent_t event[STREAMS];
  int events;
} piece;

typedef struct pool {
  piece *held[BUCKETS];   // by address
  piece *pile[CLASSES];   // free, by class; newest first
  piece *waiting, *last;  // oldest first
  cudaEvent_t *spare;     // events to be used again
  int spares, spare_room;
  int64_t bytes, blocks, peak, cached, releases;
} pool;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pool pools[SA_CUDA_DEVICES];

// The class of so many bytes, and what it has.
static int class_of(int64_t bytes, int64_t *room) {
  if (bytes < LEAST) bytes = LEAST;
  int octave = 63 - __builtin_clzll((unsigned long long)bytes);
  const int64_t step = ((int64_t)1 << octave) / 8;
  const int64_t steps = (bytes - ((int64_t)1 << octave) + step - 1) / step;
  *room = ((int64_t)1 << octave) + steps * step;
  return (octave - 9) * 8 + (int)steps;
}

static piece **bucket_of(pool *p, const void *memory) {
  return &p->held[((uintptr_t)memory >> 9) * 0x9E3779B97F4A7C15u >> 52];
}

/*  Events  */

static bool take_event(pool *p, cudaEvent_t *event) {
  if (p->spares) {
    *event = p->spare[--p->spares];
    return true;
  }
  return cudaEventCreateWithFlags(event, cudaEventDisableTiming) == cudaSuccess;
}

static void keep_event(pool *p, cudaEvent_t event) {
  if (p->spares == p->spare_room) {
    const int room = p->spare_room ? 2 * p->spare_room : 64;
    cudaEvent_t *more = (cudaEvent_t *)realloc(p->spare, (size_t)room * sizeof *more);
    if (!more) {
      cudaEventDestroy(event);
      return;
    }
    p->spare = more;
    p->spare_room = room;
  }
  p->spare[p->spares++] = event;
}

/*  The piles  */

static void put_on_pile(pool *p, piece *x) {
  int64_t room;
  piece **pile = &p->pile[class_of(x->bytes, &room)];
  for (int i = 0; i < x->events; i++) keep_event(p, x->event[i]);
  x->events = 0;
  x->next = *pile;
  *pile = x;
}

// Puts on their piles those whose events have passed.
static void look_at_waiting(pool *p) {
  while (p->waiting) {
    piece *x = p->waiting;
    for (int i = 0; i < x->events; i++)
      if (cudaEventQuery(x->event[i]) != cudaSuccess) {
        cudaGetLastError();  // "not ready" is no error
        return;
      }
    p->waiting = x->next;
    if (!p->waiting) p->last = NULL;
    put_on_pile(p, x);
  }
}

static void give_back(pool *p, piece *x) {
  p->cached -= x->bytes;
  cudaFree(x->memory);
  free(x);
}

// Gives back the pieces released longest ago until at most `most` bytes are kept.
static void shrink(pool *p, int64_t most) {
  while (p->cached > most) {
    piece **oldest = NULL;
    for (int k = 0; k < CLASSES; k++) {
      piece **x = &p->pile[k];
      if (!*x) continue;
      while ((*x)->next) x = &(*x)->next;
      if (!oldest || (*x)->released < (*oldest)->released) oldest = x;
    }
    if (!oldest) return;
    piece *x = *oldest;
    *oldest = x->next;
    give_back(p, x);
  }
}

static void drop_all(pool *p) {
  cudaDeviceSynchronize();
  look_at_waiting(p);
  shrink(p, 0);
  cudaGetLastError();
}

/*  Allocation  */

static piece *take(pool *p, int k) {
  piece *x = p->pile[k];
  if (!x) return NULL;
  p->pile[k] = x->next;
  p->cached -= x->bytes;
  return x;
}

static piece *ask_for(pool *p, int64_t bytes, cudaError_t *error) {
  piece *x = (piece *)calloc(1, sizeof *x);
  if (!x) {
    *error = cudaErrorMemoryAllocation;
    return NULL;
  }
  void *memory = NULL;
  *error = cudaMalloc(&memory, (size_t)bytes);
  if (*error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    drop_all(p);
    *error = cudaMalloc(&memory, (size_t)bytes);
  }
  if (*error != cudaSuccess) {
    free(x);
    return NULL;
  }
  x->memory = (char *)memory;
  x->bytes = bytes;
  return x;
}

// SAFEATTN_CUDA_POISON=1 fills fresh memory with NaN, so that tests see what a kernel forgets to write.
static bool poisons(void) {
  static const char *const wanted = getenv("SAFEATTN_CUDA_POISON");
  return wanted && *wanted == '1';
}

void *sa_cuda_allocate(const char *function, int device, int64_t bytes) {
  if (bytes > INT64_MAX / 4) {
    sa_cuda_host->fail(SA_NO_MEMORY, function, "out of memory: %lld bytes were refused", (long long)bytes);
    return NULL;
  }
  int64_t room;
  const int k = class_of(bytes, &room);
  pool *p = &pools[device - SA_CUDA];
  cudaStream_t stream = NULL;
  cudaError_t error = cudaSuccess;
  // Nothing is asked of CUDA for a piece that is at hand.
  if (poisons() && sa_cuda_use(function, device, &stream)) return NULL;
  pthread_mutex_lock(&lock);
  if (p->waiting) look_at_waiting(p);
  piece *x = take(p, k);
  if (!x) error = cudaSetDevice(device - SA_CUDA);
  if (!x && error == cudaSuccess) x = ask_for(p, room, &error);
  if (x) {
    piece **bucket = bucket_of(p, x->memory);
    x->next = *bucket;
    *bucket = x;
    p->bytes += x->bytes;
    p->blocks++;
    if (p->bytes > p->peak) p->peak = p->bytes;
  }
  pthread_mutex_unlock(&lock);
  if (x) {
    if (poisons()) cudaMemsetAsync(x->memory, 0xff, (size_t)x->bytes, stream);
    return x->memory;
  }
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    sa_cuda_host->fail(SA_NO_MEMORY, function, "out of memory: %lld bytes were refused by cuda:%d: %s",
                       (long long)bytes, device - SA_CUDA, cudaGetErrorString(error));
  } else {
    sa_cuda_check(function, error);
  }
  return NULL;
}

static bool record_streams(pool *p, piece *x, const cudaStream_t *streams, int count) {
  bool marked = true;
  for (int i = 0; marked && i < count; i++) {
    cudaEvent_t event;
    marked = take_event(p, &event);
    if (!marked) break;
    x->event[x->events++] = event;
    marked = cudaEventRecord(event, streams[i]) == cudaSuccess;
  }
  return marked;
}

// Marks the place that every stream has come to; false when there is but one, or nothing can be asked of the device.
static bool mark_streams(pool *p, piece *x, int device) {
  const cudaStream_t *streams;
  const int count = sa_cuda_streams_lock(device, &streams);
  if (count == 1) {
    sa_cuda_streams_unlock();
    return false;
  }
  int before = 0;
  cudaGetDevice(&before);
  if (before != device - SA_CUDA) cudaSetDevice(device - SA_CUDA);
  const bool marked = record_streams(p, x, streams, count);
  sa_cuda_streams_unlock();
  if (!marked) cudaDeviceSynchronize();
  cudaGetLastError();
  if (before != device - SA_CUDA) cudaSetDevice(before);
  return marked;
}

static int64_t most_kept(int device) {
  size_t free_bytes = 0, total = 0;
  int before = 0;
  cudaGetDevice(&before);
  if (before != device - SA_CUDA) cudaSetDevice(device - SA_CUDA);
  cudaMemGetInfo(&free_bytes, &total);
  if (before != device - SA_CUDA) cudaSetDevice(before);
  return (int64_t)(total / 2);
}

void sa_cuda_release(int device, void *memory) {
  if (!memory) return;
  static int64_t most[SA_CUDA_DEVICES];
  pool *p = &pools[device - SA_CUDA];
  pthread_mutex_lock(&lock);
  piece **at = bucket_of(p, memory);
  while (*at && (*at)->memory != memory) at = &(*at)->next;
  piece *x = *at;
  if (x) {
    *at = x->next;
    x->next = NULL;
    x->released = ++p->releases;
    p->bytes -= x->bytes;
    p->blocks--;
    p->cached += x->bytes;
    if (!mark_streams(p, x, device)) {
      put_on_pile(p, x);
    } else {
      if (p->last) p->last->next = x;
      if (!p->waiting) p->waiting = x;
      p->last = x;
    }
    int64_t *bound = &most[device - SA_CUDA];
    if (!*bound) *bound = most_kept(device);
    if (p->cached > *bound) shrink(p, *bound);
  }
  pthread_mutex_unlock(&lock);
}

int sa_cuda_settle(const char *function, int device) {
  return sa_cuda_synchronize(function, device);
}

int sa_cuda_drop_cache(const char *function, int device) {
  const int status = sa_cuda_synchronize(function, device);
  if (status) return status;
  pthread_mutex_lock(&lock);
  drop_all(&pools[device - SA_CUDA]);
  pthread_mutex_unlock(&lock);
  return SA_OK;
}

int sa_cuda_count_memory(const char *function, int device, sa_device_memory *out) {
  cudaStream_t stream;
  int status = sa_cuda_use(function, device, &stream);
  size_t free_bytes = 0, total = 0;
  if (!status) status = sa_cuda_check(function, cudaMemGetInfo(&free_bytes, &total));
  if (status) return status;
  pthread_mutex_lock(&lock);
  const pool *p = &pools[device - SA_CUDA];
  out->bytes = p->bytes;
  out->blocks = p->blocks;
  out->peak_bytes = p->peak;
  out->cached_bytes = p->cached;
  pthread_mutex_unlock(&lock);
  out->free_bytes = (int64_t)free_bytes;
  out->total_bytes = (int64_t)total;
  return SA_OK;
}

void *sa_cuda_scratch(const char *function, int device, int64_t bytes) {
  return sa_cuda_allocate(function, device, bytes);
}

void sa_cuda_scratch_release(int device, void *memory) {
  sa_cuda_release(device, memory);
}
