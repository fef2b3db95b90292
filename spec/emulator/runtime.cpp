// the emulated runtime: two devices whose memory is this machine's, streams that are always done
#include "runtime_api.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <map>
#include <mutex>
#include <vector>

#include "cuda.h"

enum { PAGE = 4096, MAX_SHARED = 227 << 10, DEVICE_MEMORY_MIB = 8192 };

struct emulator_stream {
  int device;
};
struct emulator_event {
  double seconds;
};

namespace {

struct allocation {
  size_t bytes, mapped;
  unsigned char *mapping;
  int device;  // -1: host memory
  bool closed;
};

std::mutex lock;
std::map<uintptr_t, allocation> allocations;
std::map<const void *, int> dynamic_limits;
size_t used[64];
int at_work;                    // kernels and copies,
std::vector<uintptr_t> opened;  // and the allocations that they touched

// The thread's device and last error. Not thread_local: that is what shared memory is made of (block.cpp).
struct thread_state {
  int device;
  cudaError_t error;
};

thread_state *state() {
  static pthread_key_t key = [] {
    pthread_key_t made;
    pthread_key_create(&made, free);
    return made;
  }();
  thread_state *s = (thread_state *)pthread_getspecific(key);
  if (!s) {
    s = (thread_state *)calloc(1, sizeof *s);
    pthread_setspecific(key, s);
  }
  return s;
}

cudaError_t done(cudaError_t error) {
  if (error) state()->error = error;
  return error;
}

double setting(const char *name, double otherwise) {
  const char *text = getenv(name);
  return text && *text ? atof(text) : otherwise;
}

int device_count() {
  static const int count = (int)setting("SAFEATTN_EMULATED_DEVICES", 2);
  return count;
}

double capability() {
  static const double value = setting("SAFEATTN_EMULATED_CAPABILITY", 9.0);
  return value;
}

bool is_device(int device) {
  return device >= 0 && device < device_count();
}

// The allocation that holds these bytes; NULL when none does, or not all of them.
const allocation *holder(const void *p, size_t bytes) {
  auto after = allocations.upper_bound((uintptr_t)p);
  if (after == allocations.begin()) return NULL;
  const auto at = --after;
  return (uintptr_t)p + bytes <= at->first + at->second.bytes ? &at->second : NULL;
}

// Device memory is closed, so that the host cannot read it by mistake; what kernels and the copies below touch is
// opened until they are done. (To open all of it each time takes ten times as long.)
void close(allocation *a) {
  a->closed = !mprotect(a->mapping + PAGE, a->mapped - 2 * PAGE, PROT_NONE);
}

bool is_device_memory(const void *p, size_t bytes) {
  const allocation *a = holder(p, bytes);
  return a && a->device >= 0;
}

cudaError_t allocate(void **memory, size_t bytes, int device) {
  *memory = NULL;
  if (bytes == 0) return done(cudaSuccess);
  std::lock_guard<std::mutex> guard(lock);
  if (device >= 0 &&
      (bytes > (size_t)DEVICE_MEMORY_MIB << 20 || used[device] + bytes > (size_t)DEVICE_MEMORY_MIB << 20))
    return done(cudaErrorMemoryAllocation);
  const size_t room = (bytes + 255) / 256 * 256, pages = (room + PAGE - 1) / PAGE * PAGE;
  unsigned char *mapping =
      (unsigned char *)mmap(NULL, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return done(cudaErrorMemoryAllocation);
  if (mprotect(mapping + PAGE, pages, PROT_READ | PROT_WRITE)) {
    munmap(mapping, pages + 2 * PAGE);
    return done(cudaErrorMemoryAllocation);
  }
  unsigned char *p = mapping + PAGE + pages - room;
  emulator::poison(mapping + PAGE, pages);
  allocation *made = &allocations[(uintptr_t)p];
  *made = {bytes, pages + 2 * PAGE, mapping, device, false};
  if (device >= 0) {
    used[device] += bytes;
    emulator::watch_for_faults();
    close(made);
  }
  *memory = p;
  return done(cudaSuccess);
}

cudaError_t release(void *memory, bool of_device) {
  if (!memory) return done(cudaSuccess);
  std::lock_guard<std::mutex> guard(lock);
  const auto at = allocations.find((uintptr_t)memory);
  if (at == allocations.end() || (at->second.device >= 0) != of_device) return done(cudaErrorInvalidValue);
  if (at->second.device >= 0) used[at->second.device] -= at->second.bytes;
  munmap(at->second.mapping, at->second.mapped);
  allocations.erase(at);
  return done(cudaSuccess);
}

cudaError_t copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0) return done(cudaSuccess);
  {
    std::lock_guard<std::mutex> guard(lock);
    if ((kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice) && !is_device_memory(to, bytes))
      return done(cudaErrorInvalidValue);
    if ((kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice) && !is_device_memory(from, bytes))
      return done(cudaErrorInvalidValue);
  }
  const emulator::device_access access;
  memmove(to, from, bytes);
  return done(cudaSuccess);
}

}  // namespace

// A NaN of every float type, and one that LuaJIT does not take for another kind of value.
void emulator::poison(void *memory, size_t bytes) {
  static const unsigned char nan[2] = {0xff, 0x7f};
  for (size_t i = 0; i < bytes; i++) ((unsigned char *)memory)[i] = nan[i % 2];
}

emulator::device_access::device_access() {
  std::lock_guard<std::mutex> guard(lock);
  at_work++;
}

emulator::device_access::~device_access() {
  std::lock_guard<std::mutex> guard(lock);
  if (--at_work) return;
  for (uintptr_t p : opened) {
    const auto at = allocations.find(p);
    if (at != allocations.end()) close(&at->second);
  }
  opened.clear();
}

// Called where a thread faulted, which holds no lock then: not in allocate() and the like.
emulator::device_memory emulator::touch(uintptr_t address) {
  std::lock_guard<std::mutex> guard(lock);
  auto at = allocations.upper_bound(address + PAGE);  // an allocation begins in its first page
  if (at == allocations.begin()) return NONE;
  allocation *a = &(--at)->second;
  if (a->device < 0 || address - (uintptr_t)(a->mapping + PAGE) >= a->mapped - 2 * PAGE) return NONE;
  if (!a->closed) return OPENED;  // by another thread, meanwhile
  if (!at_work || mprotect(a->mapping + PAGE, a->mapped - 2 * PAGE, PROT_READ | PROT_WRITE)) return CLOSED;
  a->closed = false;
  opened.push_back(at->first);
  return OPENED;
}

// Errors

const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
#define TEXT(name, number, text) \
  case name:                     \
    return text;
    EMULATOR_ERRORS(TEXT)
  }
  return "unrecognized error code";
}

const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define NAME(name, number, text) \
  case name:                     \
    return #name;
    EMULATOR_ERRORS(NAME)
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = state()->error;
  state()->error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() {
  return state()->error;
}

// Devices

cudaError_t cudaDriverGetVersion(int *version) {
  *version = 13000;
  return done(cudaSuccess);
}

cudaError_t cudaRuntimeGetVersion(int *version) {
  *version = 13000;
  return done(cudaSuccess);
}

cudaError_t cudaGetDeviceCount(int *count) {
  *count = device_count();
  return done(*count ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int *device) {
  *device = state()->device;
  return done(cudaSuccess);
}

cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return done(cudaErrorInvalidDevice);
  state()->device = device;
  return done(cudaSuccess);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
  if (!is_device(device)) return done(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "Emulated GPU");
  p->major = (int)(capability() + 0.01);
  p->minor = (int)(capability() * 10 + 0.1) % 10;
  p->multiProcessorCount = (int)setting("SAFEATTN_EMULATED_PROCESSORS", 4);
  p->l2CacheSize = 50 << 20;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->totalGlobalMem = (size_t)DEVICE_MEMORY_MIB << 20;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = p->major == 9 ? MAX_SHARED : p->minor == 6 ? 99 << 10 : 163 << 10;
  p->sharedMemPerMultiprocessor = p->sharedMemPerBlockOptin + (1 << 10);
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->memoryBusWidth = 5120;
  p->unifiedAddressing = 1;
  p->pciDeviceID = device;
  return done(cudaSuccess);
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  const cudaError_t error = cudaGetDeviceProperties(&p, device);
  if (error) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = p.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = (int)p.sharedMemPerBlock;
      break;
    case cudaDevAttrWarpSize:
      *value = p.warpSize;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      break;
    case cudaDevAttrL2CacheSize:
      *value = p.l2CacheSize;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = p.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrUnifiedAddressing:
      *value = p.unifiedAddressing;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = p.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = p.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = (int)p.sharedMemPerMultiprocessor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = (int)p.sharedMemPerBlockOptin;
      break;
    case cudaDevAttrMemoryPoolsSupported:
      *value = 1;
      break;
    default:
      return done(cudaErrorInvalidValue);
  }
  return done(cudaSuccess);
}

cudaError_t cudaDeviceSynchronize() {
  return done(cudaSuccess);
}
cudaError_t cudaDeviceReset() {
  return done(cudaSuccess);
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
  *can = device != peer && is_device(device) && is_device(peer);
  return done(cudaSuccess);
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
  return done(is_device(peer) ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
  snprintf(text, (size_t)length, "0000:00:%02x.0", device);
  return done(is_device(device) ? cudaSuccess : cudaErrorInvalidDevice);
}

// Memory

cudaError_t cudaMalloc(void **memory, size_t bytes) {
  return allocate(memory, bytes, state()->device);
}
cudaError_t cudaMallocAsync(void **memory, size_t bytes, cudaStream_t) {
  return cudaMalloc(memory, bytes);
}
cudaError_t cudaMallocHost(void **memory, size_t bytes) {
  return allocate(memory, bytes, -1);
}
cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned) {
  return allocate(memory, bytes, -1);
}
cudaError_t cudaFree(void *memory) {
  return release(memory, true);
}
cudaError_t cudaFreeAsync(void *memory, cudaStream_t) {
  return release(memory, true);
}
cudaError_t cudaFreeHost(void *memory) {
  return release(memory, false);
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
  std::lock_guard<std::mutex> guard(lock);
  *total_bytes = (size_t)DEVICE_MEMORY_MIB << 20;
  *free_bytes = *total_bytes - used[state()->device];
  return done(cudaSuccess);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *p) {
  std::lock_guard<std::mutex> guard(lock);
  const allocation *a = holder(p, 1);
  *attributes = {a ? (a->device >= 0 ? cudaMemoryTypeDevice : cudaMemoryTypeHost) : cudaMemoryTypeUnregistered,
                 a && a->device >= 0 ? a->device : 0, a ? (void *)p : NULL, a && a->device >= 0 ? NULL : (void *)p};
  return done(cudaSuccess);
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
  return copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyPeer(void *to, int to_device, const void *from, int from_device, size_t bytes) {
  if (!is_device(to_device) || !is_device(from_device)) return done(cudaErrorInvalidDevice);
  return copy(to, from, bytes, cudaMemcpyDeviceToDevice);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t) {
  return cudaMemcpyPeer(to, to_device, from, from_device, bytes);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t) {
  for (size_t row = 0; row < height; row++) {
    const cudaError_t error = copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind);
    if (error) return error;
  }
  return done(cudaSuccess);
}

cudaError_t cudaMemset(void *memory, int byte, size_t bytes) {
  if (bytes == 0) return done(cudaSuccess);
  {
    std::lock_guard<std::mutex> guard(lock);
    if (!holder(memory, bytes)) return done(cudaErrorInvalidValue);
  }
  const emulator::device_access access;
  memset(memory, byte, bytes);
  return done(cudaSuccess);
}

cudaError_t cudaMemsetAsync(void *memory, int byte, size_t bytes, cudaStream_t) {
  return cudaMemset(memory, byte, bytes);
}

// Streams and events

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  *stream = new emulator_stream{state()->device};
  return done(cudaSuccess);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
  return cudaStreamCreate(stream);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return done(stream ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return done(cudaSuccess);
}
cudaError_t cudaStreamQuery(cudaStream_t) {
  return done(cudaSuccess);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned) {
  return done(event ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t, void (*function)(void *), void *argument) {
  function(argument);
  return done(cudaSuccess);
}

cudaError_t cudaEventCreate(cudaEvent_t *event) {
  *event = new emulator_event{0};
  return done(cudaSuccess);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
  return cudaEventCreate(event);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return done(event ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  if (!event) return done(cudaErrorInvalidResourceHandle);
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  event->seconds = (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
  return done(cudaSuccess);
}

cudaError_t cudaEventSynchronize(cudaEvent_t) {
  return done(cudaSuccess);
}
cudaError_t cudaEventQuery(cudaEvent_t) {
  return done(cudaSuccess);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = (float)(1000 * (end->seconds - start->seconds));
  return done(cudaSuccess);
}

// Kernels

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return done(cudaSuccess);
  cudaDeviceProp p;
  cudaGetDeviceProperties(&p, state()->device);
  if (value < 0 || (size_t)value > p.sharedMemPerBlockOptin) return done(cudaErrorInvalidValue);
  std::lock_guard<std::mutex> guard(lock);
  dynamic_limits[kernel] = value;
  return done(cudaSuccess);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *, int threads, size_t shared) {
  const int by_threads = 2048 / (threads > 0 ? threads : 1), by_shared = (int)((228u << 10) / (shared + 1024));
  *blocks = by_threads < by_shared ? by_threads : by_shared;
  return done(cudaSuccess);
}

cudaError_t emulator::check_launch(const void *kernel, dim3 grid, dim3 block, size_t dynamic_bytes,
                                   cudaStream_t stream) {
  if (stream && stream->device != state()->device) return done(cudaErrorInvalidResourceHandle);
  if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
    return done(cudaErrorInvalidConfiguration);
  if (!block.x || !block.y || !block.z || block.z > 64 || (uint64_t)block.x * block.y * block.z > 1024)
    return done(cudaErrorInvalidConfiguration);
  std::lock_guard<std::mutex> guard(lock);
  const auto limit = dynamic_limits.find(kernel);
  if (dynamic_bytes > (limit == dynamic_limits.end() ? (size_t)48 << 10 : (size_t)limit->second))
    return done(cudaErrorInvalidValue);
  return done(cudaSuccess);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *result) {
  const bool known = !strcmp(symbol, "cuTensorMapEncodeTiled");
  *function = known ? (void *)cuTensorMapEncodeTiled : NULL;
  if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return done(cudaSuccess);
}

// The driver's own conditions, for tiles without interleave.
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *base,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  static const uint32_t bytes_of[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  const uint32_t element = bytes_of[type];
  if (rank < 1 || rank > 5 || (uintptr_t)map % 64 || (uintptr_t)base % 16) return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * element % 16 || (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && box[0] * element > 128))
    return CUDA_ERROR_INVALID_VALUE;
  *map = CUtensorMap();
  map->base = (unsigned char *)base;
  map->rank = rank;
  map->element_bytes = element;
  map->swizzle_128 = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  for (uint32_t d = 0; d < rank; d++) {
    if (sizes[d] < 1 || sizes[d] > (uint64_t)1 << 32 || box[d] < 1 || box[d] > 256 || element_strides[d] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    if (d > 0 && (strides[d - 1] % 16 || strides[d - 1] == 0 || strides[d - 1] >= (uint64_t)1 << 40))
      return CUDA_ERROR_INVALID_VALUE;
    map->size[d] = sizes[d];
    map->box[d] = box[d];
    map->stride[d] = d > 0 ? strides[d - 1] : element;
  }
  return CUDA_SUCCESS;
}
