// what the host calls: devices, memory, copies, streams, events; everything is done when the call returns
#ifndef EMULATOR_RUNTIME_API_H
#define EMULATOR_RUNTIME_API_H
#include <stddef.h>
#include <stdint.h>

#include "vector_types.h"

// name, number, text
#define EMULATOR_ERRORS(_)                                                    \
  _(cudaSuccess, 0, "no error")                                               \
  _(cudaErrorInvalidValue, 1, "invalid argument")                             \
  _(cudaErrorMemoryAllocation, 2, "out of memory")                            \
  _(cudaErrorInvalidConfiguration, 9, "invalid configuration argument")       \
  _(cudaErrorInvalidDevicePointer, 17, "invalid device pointer")              \
  _(cudaErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy") \
  _(cudaErrorInsufficientDriver, 35, "CUDA driver version is insufficient")   \
  _(cudaErrorNoDevice, 100, "no CUDA-capable device is detected")             \
  _(cudaErrorInvalidDevice, 101, "invalid device ordinal")                    \
  _(cudaErrorNoKernelImageForDevice, 209, "no kernel image is available")     \
  _(cudaErrorInvalidResourceHandle, 400, "invalid resource handle")           \
  _(cudaErrorSymbolNotFound, 500, "named symbol not found")                   \
  _(cudaErrorNotReady, 600, "device not ready")                               \
  _(cudaErrorIllegalAddress, 700, "an illegal memory access was encountered") \
  _(cudaErrorPeerAccessAlreadyEnabled, 704, "peer access is already enabled") \
  _(cudaErrorLaunchFailure, 719, "unspecified launch failure")                \
  _(cudaErrorNotSupported, 801, "operation not supported")                    \
  _(cudaErrorUnknown, 999, "unknown error")

#define EMULATOR_ENUMERATOR(name, number, text) name = number,
enum cudaError { EMULATOR_ERRORS(EMULATOR_ENUMERATOR) };
typedef enum cudaError cudaError_t;
const char *cudaGetErrorString(cudaError_t error);
const char *cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();

// Devices: SAFEATTN_EMULATED_DEVICES (2) of compute capability SAFEATTN_EMULATED_CAPABILITY (9.0) with
// SAFEATTN_EMULATED_PROCESSORS (4) multiprocessors.

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount, l2CacheSize, warpSize, maxThreadsPerBlock, maxThreadsPerMultiProcessor;
  size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
  int regsPerBlock, regsPerMultiprocessor, memoryBusWidth, integrated, unifiedAddressing, pciBusID, pciDeviceID;
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrUnifiedAddressing = 41,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMemoryPoolsSupported = 115
};

cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaDeviceReset();
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer);
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags);
cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device);

// Memory: fresh memory is full of NaN; what lies directly before and behind it cannot be touched.

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
  void *devicePointer, *hostPointer;
};
enum { cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };
enum { cudaMemAttachGlobal = 1 };

struct emulator_stream;
struct emulator_event;
typedef emulator_stream *cudaStream_t;
typedef emulator_event *cudaEvent_t;

cudaError_t cudaMalloc(void **memory, size_t bytes);
cudaError_t cudaMallocAsync(void **memory, size_t bytes, cudaStream_t stream);
cudaError_t cudaMallocHost(void **memory, size_t bytes);
cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags);
cudaError_t cudaFree(void *memory);
cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *p);
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream = NULL);
cudaError_t cudaMemcpyPeer(void *to, int to_device, const void *from, int from_device, size_t bytes);
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t stream = NULL);
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream = NULL);
cudaError_t cudaMemset(void *memory, int byte, size_t bytes);
cudaError_t cudaMemsetAsync(void *memory, int byte, size_t bytes, cudaStream_t stream = NULL);

template <class T>
static inline cudaError_t cudaMalloc(T **memory, size_t bytes) {
  return cudaMalloc((void **)memory, bytes);
}
template <class T>
static inline cudaError_t cudaMallocHost(T **memory, size_t bytes) {
  return cudaMallocHost((void **)memory, bytes);
}

// Streams and events

enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };

cudaError_t cudaStreamCreate(cudaStream_t *stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void *), void *argument);
cudaError_t cudaEventCreate(cudaEvent_t *event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = NULL);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end);

// Kernels

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel, int threads, size_t shared);
template <class T>
static inline cudaError_t cudaFuncSetAttribute(T *kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute((const void *)kernel, attribute, value);
}
template <class T>
static inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, T *kernel, int threads,
                                                                        size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, (const void *)kernel, threads, shared);
}

enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult {
  cudaDriverEntryPointSuccess,
  cudaDriverEntryPointSymbolNotFound,
  cudaDriverEntryPointVersionNotSufficent
};
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult *result = NULL);

namespace emulator {

// What CUDA would say of such a launch.
cudaError_t check_launch(const void *kernel, dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t stream);
void poison(void *memory, size_t bytes);
void watch_for_faults();  // from now on, who touches what is not there is named

// What lies at an address that faulted: nothing, device memory that the host may not touch, or some that is open now.
enum device_memory { NONE, CLOSED, OPENED };
device_memory touch(uintptr_t address);

// While one lives, device memory may be read and written. (Exported for libraries/.)
struct __attribute__((visibility("default"))) device_access {
  device_access();
  ~device_access();
};

}  // namespace emulator

#endif
