// The part of the CUDA runtime that csrc/cuda uses, with the host as its device. See README.md.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "device.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalState = 401,
  cudaErrorNotReady = 600,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureIsolation = 905,
  cudaErrorCapturedEvent = 907,
  cudaErrorStreamCaptureWrongThread = 908,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};

enum cudaMemoryType {
  cudaMemoryTypeUnregistered = 0,
  cudaMemoryTypeHost = 1,
  cudaMemoryTypeDevice = 2,
  cudaMemoryTypeManaged = 3,
};

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2,
};

enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};

constexpr unsigned cudaHostAllocDefault = 0;
constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventDefault = 0, cudaEventDisableTiming = 2;

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlock;
  int warpSize, maxThreadsPerBlock;
  int major, minor, multiProcessorCount;
};
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
  void* devicePointer;
  void* hostPointer;
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion;
};

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
typedef struct CUgraph_st* cudaGraph_t;
typedef struct CUgraphExec_st* cudaGraphExec_t;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_on_host {

enum class Kind { kLaunch, kCopy, kOther };

// What a stream does, with its arguments by value.
struct Operation {
  Kind kind;
  std::function<cudaError_t()> run;
};

}  // namespace cuda_on_host

struct CUstream_st {
  int device;
  bool blocking;  // ordered with the default stream
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
  std::thread::id capture_thread = {};
  std::vector<cuda_on_host::Operation> captured = {};
};
struct CUevent_st {
  int device;
  bool captured = false;                            // last recorded in a capture
  std::shared_ptr<CUstream_st> recorded = nullptr;  // where it was last recorded, and after what
  uint64_t after = 0;
};
struct CUgraph_st {
  std::vector<cuda_on_host::Operation> operations;
};
struct CUgraphExec_st {
  std::shared_ptr<const std::vector<cuda_on_host::Operation>> operations;
};

namespace cuda_on_host {

using Stream = std::shared_ptr<CUstream_st>;

constexpr size_t kDeviceBytes = size_t{4} << 30;

struct ThreadState {
  int device = 0;
  cudaError_t last_error = cudaSuccess;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
};
inline ThreadState& this_thread() {
  thread_local ThreadState state;
  return state;
}

inline cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) this_thread().last_error = error;
  return error;
}

inline int device_count() { return static_cast<int>(environment("CUDA_ON_HOST_DEVICES", 2)); }

// Everything the runtime knows. Its mutex is held by every call that uses it and while a kernel
// runs; no member takes it.
class Runtime {
 public:
  std::mutex mutex;
  std::atomic<long long> live_allocations{0}, launches{0}, copies{0};
  std::map<cudaStream_t, Stream> streams;
  std::set<cudaEvent_t> events;
  std::set<cudaGraph_t> graphs;
  std::set<cudaGraphExec_t> graph_execs;

  Runtime() : default_stream_(std::make_shared<CUstream_st>(CUstream_st{-1, true})) {}

  // Memory.

  cudaError_t allocate(void** to, size_t bytes, bool device) {
    if (to == nullptr) return cudaErrorInvalidValue;
    *to = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (bytes > kDeviceBytes || live_bytes_ > kDeviceBytes - bytes) {
      return cudaErrorMemoryAllocation;
    }
    const size_t whole = (bytes + kGuard - 1) / kGuard * kGuard + 2 * kGuard;
    auto* base = static_cast<unsigned char*>(std::aligned_alloc(kGuard, whole));
    if (base == nullptr) return cudaErrorMemoryAllocation;
    memset(base, kGuardByte, whole);
    memset(base + kGuard, kFreshByte, bytes);
    allocations_[base + kGuard] = Allocation{bytes, whole, device};
    live_bytes_ += bytes;
    ++live_allocations;
    *to = base + kGuard;
    return cudaSuccess;
  }

  // Waits for all work first, as freeing does.
  cudaError_t release(void* pointer, bool device) {
    const cudaError_t error = run_all();
    if (pointer == nullptr) return error;
    const auto found = allocations_.find(static_cast<unsigned char*>(pointer));
    if (found == allocations_.end() || found->second.device != device) {
      return cudaErrorInvalidValue;
    }
    unsigned char* at = found->first;
    const Allocation allocation = found->second;
    check_guards(at, allocation);
    memset(at - kGuard, kFreedByte, allocation.whole);
    allocations_.erase(found);
    live_bytes_ -= allocation.bytes;
    --live_allocations;
    std::free(at - kGuard);
    return error;
  }

  // Which side [pointer, pointer + bytes) is on, where an allocation says so; inside is false where
  // it crosses that allocation's end.
  enum class Side { kUnknown, kPinned, kDevice };
  struct Place {
    Side side;
    bool inside;
  };
  Place place(const void* pointer, size_t bytes) const {
    auto* at = static_cast<unsigned char*>(const_cast<void*>(pointer));
    auto found = allocations_.upper_bound(at);
    if (found == allocations_.begin()) return {Side::kUnknown, true};
    --found;
    const size_t offset = static_cast<size_t>(at - found->first);
    if (offset >= found->second.bytes) return {Side::kUnknown, true};
    return {found->second.device ? Side::kDevice : Side::kPinned,
            bytes <= found->second.bytes - offset};
  }

  // Streams.

  // Null where the handle is none; 1 and 2 name the default streams of the process and the thread.
  Stream find(cudaStream_t handle) const {
    if (reinterpret_cast<uintptr_t>(handle) <= 2) return default_stream_;
    const auto found = streams.find(handle);
    return found == streams.end() ? nullptr : found->second;
  }

  static bool on_device(const Stream& stream, int device) {
    return stream->device == -1 || stream->device == device;
  }

  // Hands the operation to the stream's capture, runs it, or leaves it for a synchronisation.
  cudaError_t submit(const Stream& stream, Operation operation) {
    if (stream->capture == cudaStreamCaptureStatusInvalidated) {
      return cudaErrorStreamCaptureInvalidated;
    }
    if (stream->capture == cudaStreamCaptureStatusActive) {
      stream->captured.push_back(std::move(operation));
      return cudaSuccess;
    }
    count(operation.kind);
    queue_.push_back({++issued_, stream, std::move(operation.run)});
    if (environment("CUDA_ON_HOST_LAZY", 0) == 0) return run_all();
    cudaError_t error = cudaSuccess;
    while (queue_.size() > kQueued) {
      keep_first(&error, run(queue_.begin()));
    }
    return error;
  }

  void count(Kind kind) {
    if (kind == Kind::kLaunch) ++launches;
    if (kind == Kind::kCopy) ++copies;
  }

  uint64_t issued() const { return issued_; }

  cudaError_t run_all() {
    cudaError_t error = cudaSuccess;
    while (!queue_.empty()) keep_first(&error, run(queue_.begin()));
    return error;
  }

  cudaError_t run_device(int device) {
    return run_if([=](const Queued& item) { return on_device(item.stream, device); });
  }

  // Runs what the stream must have done once its operations up to number `last` have run: with a
  // stream that the default stream is ordered with, everything before the last order between them.
  cudaError_t run_stream(const Stream& stream, uint64_t last = UINT64_MAX) {
    uint64_t ordered = 0;
    if (stream->blocking) {
      for (const Queued& item : queue_) {
        const bool orders = stream == default_stream_ || item.stream == default_stream_;
        if (item.number <= last && item.stream->blocking && orders) ordered = item.number;
      }
    }
    return run_if([=](const Queued& item) {
      return (item.stream == stream && item.number <= last) ||
             (item.stream->blocking && item.number <= ordered);
    });
  }

  bool pending(const CUevent_st& event) const {
    for (const Queued& item : queue_) {
      if (item.stream == event.recorded && item.number <= event.after) return true;
    }
    return false;
  }

  bool flip() {
    if (flips_++ == 0) random_ = Random(environment("CUDA_ON_HOST_SEED", 0));
    return (random_.next() >> 63) != 0;
  }

  // Capture.

  // Whether a call that a capture cannot contain is allowed now; where it is not, it invalidates
  // the captures that forbid it.
  bool may_be_unsafe() {
    const cudaStreamCaptureMode mode = this_thread().mode;
    if (mode == cudaStreamCaptureModeRelaxed) return true;
    bool allowed = true;
    for (const auto& entry : streams) {
      CUstream_st& stream = *entry.second;
      if (stream.capture == cudaStreamCaptureStatusNone) continue;
      const bool own = stream.capture_thread == std::this_thread::get_id() &&
                       stream.capture_mode != cudaStreamCaptureModeRelaxed;
      const bool all =
          mode == cudaStreamCaptureModeGlobal && stream.capture_mode == cudaStreamCaptureModeGlobal;
      if (own || all) {
        invalidate(&stream);
        allowed = false;
      }
    }
    return allowed;
  }

  // Waiting for a stream that captures, alone or with its device, is wrong in any mode.
  bool invalidate_if_capturing(const Stream& stream) {
    if (stream->capture == cudaStreamCaptureStatusNone) return false;
    invalidate(stream.get());
    return true;
  }

  // The operations of one stream or graph, in order.
  static cudaError_t run_in_order(const std::vector<Operation>& operations) {
    for (const Operation& operation : operations) {
      if (const cudaError_t error = operation.run()) return error;
    }
    return cudaSuccess;
  }

 private:
  static constexpr size_t kGuard = 256, kQueued = 64;
  static constexpr unsigned char kGuardByte = 0xfb, kFreshByte = 0xcd, kFreedByte = 0xdd;

  struct Allocation {
    size_t bytes, whole;
    bool device;
  };
  struct Queued {
    uint64_t number;
    Stream stream;
    std::function<cudaError_t()> run;
  };

  static void check_guards(const unsigned char* at, const Allocation& allocation) {
    const unsigned char *begin = at - kGuard, *end = begin + allocation.whole;
    for (const unsigned char* byte = begin; byte < end; ++byte) {
      if (byte == at) byte += allocation.bytes;
      if (*byte == kGuardByte) continue;
      std::fprintf(stderr,
                   "cuda_on_host: %s allocation of %zu bytes at %p was written out of bounds, "
                   "at offset %td\n",
                   allocation.device ? "device" : "pinned", allocation.bytes,
                   static_cast<const void*>(at), byte - at);
      std::abort();
    }
  }

  static void invalidate(CUstream_st* stream) {
    stream->capture = cudaStreamCaptureStatusInvalidated;
    stream->captured.clear();
  }

  static void keep_first(cudaError_t* error, cudaError_t next) {
    if (*error == cudaSuccess) *error = next;
  }

  cudaError_t run(std::deque<Queued>::iterator at) {
    const auto operation = std::move(at->run);
    queue_.erase(at);
    return operation();
  }

  // Looks from the front again after each: one that waits for an event runs others.
  template <class Predicate>
  cudaError_t run_if(Predicate predicate) {
    cudaError_t error = cudaSuccess;
    for (;;) {
      const auto at = std::find_if(queue_.begin(), queue_.end(), predicate);
      if (at == queue_.end()) return error;
      keep_first(&error, run(at));
    }
  }

  Stream default_stream_;
  std::map<unsigned char*, Allocation> allocations_;
  size_t live_bytes_ = 0;
  std::deque<Queued> queue_;  // of all streams, oldest first
  uint64_t issued_ = 0, flips_ = 0;
  Random random_;
};

// Leaked, as the_grid is.
inline Runtime& runtime() {
  static Runtime* it = new Runtime;
  return *it;
}

// Memory from cudaMalloc and cudaHostAlloc that was not freed; kernels and copies issued to run
// (each time a graph is launched for those in a graph, and not when they are captured).
inline long long live_allocations() { return runtime().live_allocations; }
inline long long launches() { return runtime().launches; }
inline long long copies() { return runtime().copies; }

using Lock = std::lock_guard<std::mutex>;

// The body of calls that a capture forbids.
template <class Body>
cudaError_t unsafe_call(Body body) {
  if (device_count() == 0) return result(cudaErrorNoDevice);
  Lock lock(runtime().mutex);
  if (!runtime().may_be_unsafe()) return result(cudaErrorStreamCaptureUnsupported);
  return result(body(runtime()));
}

// The body of calls on a stream.
template <class Body>
cudaError_t stream_call(cudaStream_t handle, Body body) {
  if (device_count() == 0) return result(cudaErrorNoDevice);
  Lock lock(runtime().mutex);
  const Stream stream = runtime().find(handle);
  if (stream == nullptr) return result(cudaErrorInvalidResourceHandle);
  return result(body(runtime(), stream));
}

// The body of calls that look at an event's progress.
template <class Body>
cudaError_t event_call(cudaEvent_t event, Body body) {
  return unsafe_call([&](Runtime& runtime) {
    if (runtime.events.count(event) == 0) return cudaErrorInvalidResourceHandle;
    if (event->captured) return cudaErrorCapturedEvent;
    return body(runtime);
  });
}

// Whether each end of a copy is inside its allocation and on the side that `kind` says.
inline bool copy_is_valid(const Runtime& runtime, const void* to, const void* from, size_t bytes,
                          cudaMemcpyKind kind) {
  using Side = Runtime::Side;
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return false;
  if (bytes != 0 && (to == nullptr || from == nullptr)) return false;
  const Runtime::Place a = runtime.place(to, bytes), b = runtime.place(from, bytes);
  const bool to_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyDeviceToHost;
  const bool from_host = kind == cudaMemcpyHostToHost || kind == cudaMemcpyHostToDevice;
  if (to_host && a.side == Side::kDevice) return false;
  if (from_host && b.side == Side::kDevice) return false;
  return a.inside && b.inside;
}

// One launch: the kernel and its arguments, from which every thread gets its own copy.
template <class... Args>
struct Launch {
  dim3 grid, block;
  void (*kernel)(Args...);
  std::tuple<Args...> args;

  Launch(dim3 grid, dim3 block, void (*kernel)(Args...), Args... args)
      : grid(grid), block(block), kernel(kernel), args(std::move(args)...) {}
  static void call(const void* self) {
    const auto& launch = *static_cast<const Launch*>(self);
    std::apply(launch.kernel, launch.args);
  }
  cudaError_t run() const {
    return the_grid().run(grid, block, call, this) ? cudaSuccess : cudaErrorLaunchFailure;
  }
};

inline bool launchable(const cudaLaunchConfig_t& config) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
         grid.z <= 65535 && uint64_t{grid.x} * grid.y * grid.z <= 0xffffffffu && block.x <= 1024 &&
         block.y <= 1024 && block.z <= 64 && threads >= 1 && threads <= 1024 &&
         config.dynamicSmemBytes <= 232448;
}

}  // namespace cuda_on_host

// Errors.

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define CUDA_ON_HOST_NAME(name) \
  case name:                    \
    return #name;
    CUDA_ON_HOST_NAME(cudaSuccess)
    CUDA_ON_HOST_NAME(cudaErrorInvalidValue)
    CUDA_ON_HOST_NAME(cudaErrorMemoryAllocation)
    CUDA_ON_HOST_NAME(cudaErrorInvalidConfiguration)
    CUDA_ON_HOST_NAME(cudaErrorNoDevice)
    CUDA_ON_HOST_NAME(cudaErrorInvalidDevice)
    CUDA_ON_HOST_NAME(cudaErrorInvalidResourceHandle)
    CUDA_ON_HOST_NAME(cudaErrorIllegalState)
    CUDA_ON_HOST_NAME(cudaErrorNotReady)
    CUDA_ON_HOST_NAME(cudaErrorLaunchFailure)
    CUDA_ON_HOST_NAME(cudaErrorStreamCaptureUnsupported)
    CUDA_ON_HOST_NAME(cudaErrorStreamCaptureInvalidated)
    CUDA_ON_HOST_NAME(cudaErrorStreamCaptureIsolation)
    CUDA_ON_HOST_NAME(cudaErrorCapturedEvent)
    CUDA_ON_HOST_NAME(cudaErrorStreamCaptureWrongThread)
#undef CUDA_ON_HOST_NAME
  }
  return "unrecognized error code";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorIllegalState:
      return "the operation cannot be performed in the present state";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureIsolation:
      return "dependency created on uncaptured work in another stream";
    case cudaErrorCapturedEvent:
      return "operation not permitted on an event last recorded in a capturing stream";
    case cudaErrorStreamCaptureWrongThread:
      return "attempt to terminate a thread-local capture sequence from another thread";
  }
  return "unrecognized error code";
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(cuda_on_host::this_thread().last_error, cudaSuccess);
}
inline cudaError_t cudaPeekAtLastError() { return cuda_on_host::this_thread().last_error; }

// Devices.

inline cudaError_t cudaGetDeviceCount(int* count) {
  if (count == nullptr) return cuda_on_host::result(cudaErrorInvalidValue);
  *count = cuda_on_host::device_count();
  return cuda_on_host::result(*count == 0 ? cudaErrorNoDevice : cudaSuccess);
}
inline cudaError_t cudaSetDevice(int device) {
  const int count = cuda_on_host::device_count();
  if (count == 0) return cuda_on_host::result(cudaErrorNoDevice);
  if (device < 0 || device >= count) return cuda_on_host::result(cudaErrorInvalidDevice);
  cuda_on_host::this_thread().device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  if (device == nullptr) return cuda_on_host::result(cudaErrorInvalidValue);
  if (cuda_on_host::device_count() == 0) return cuda_on_host::result(cudaErrorNoDevice);
  *device = cuda_on_host::this_thread().device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (properties == nullptr) return cuda_on_host::result(cudaErrorInvalidValue);
  if (device < 0 || device >= cuda_on_host::device_count()) {
    return cuda_on_host::result(cudaErrorInvalidDevice);
  }
  *properties = cudaDeviceProp{};
  std::strcpy(properties->name, "host");
  properties->totalGlobalMem = cuda_on_host::kDeviceBytes;
  properties->sharedMemPerBlock = 49152;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->major = 9;
  properties->minor = 0;
  properties->multiProcessorCount = 3;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (value == nullptr) return cuda_on_host::result(cudaErrorInvalidValue);
  cudaDeviceProp properties;
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, device)) return error;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      return cudaSuccess;
  }
  return cuda_on_host::result(cudaErrorInvalidValue);
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  if (version == nullptr) return cuda_on_host::result(cudaErrorInvalidValue);
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

inline cudaError_t cudaDeviceSynchronize() {
  return cuda_on_host::unsafe_call([](cuda_on_host::Runtime& runtime) {
    const int device = cuda_on_host::this_thread().device;
    bool capturing = false;
    for (const auto& entry : runtime.streams) {
      if (!runtime.on_device(entry.second, device)) continue;
      capturing |= runtime.invalidate_if_capturing(entry.second);
    }
    return capturing ? cudaErrorStreamCaptureUnsupported : runtime.run_device(device);
  });
}

// Memory.

inline cudaError_t cudaMalloc(void** to, size_t bytes) {
  return cuda_on_host::unsafe_call(
      [=](cuda_on_host::Runtime& runtime) { return runtime.allocate(to, bytes, true); });
}
template <class T>
cudaError_t cudaMalloc(T** to, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(to), bytes);
}
inline cudaError_t cudaFree(void* pointer) {
  return cuda_on_host::unsafe_call(
      [=](cuda_on_host::Runtime& runtime) { return runtime.release(pointer, true); });
}
inline cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned /*flags*/) {
  return cuda_on_host::unsafe_call(
      [=](cuda_on_host::Runtime& runtime) { return runtime.allocate(to, bytes, false); });
}
template <class T>
cudaError_t cudaHostAlloc(T** to, size_t bytes, unsigned flags) {
  return cudaHostAlloc(reinterpret_cast<void**>(to), bytes, flags);
}
inline cudaError_t cudaFreeHost(void* pointer) {
  return cuda_on_host::unsafe_call(
      [=](cuda_on_host::Runtime& runtime) { return runtime.release(pointer, false); });
}

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  using namespace cuda_on_host;
  return unsafe_call([=](Runtime& runtime) {
    if (!copy_is_valid(runtime, to, from, bytes, kind)) return cudaErrorInvalidValue;
    const cudaError_t error = runtime.run_stream(runtime.find(nullptr));
    if (error != cudaSuccess) return error;
    runtime.count(Kind::kCopy);
    if (bytes != 0) memcpy(to, from, bytes);
    return cudaSuccess;
  });
}

// As with the real one, memory that is not pinned is safe to reuse when the call returns: a source
// has been read by then, and a destination written.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t handle = nullptr) {
  using namespace cuda_on_host;
  return stream_call(handle, [=](Runtime& runtime, const Stream& stream) {
    if (!copy_is_valid(runtime, to, from, bytes, kind)) return cudaErrorInvalidValue;
    const auto pageable = [&](const void* pointer) {
      return runtime.place(pointer, bytes).side == Runtime::Side::kUnknown &&
             stream->capture == cudaStreamCaptureStatusNone;
    };
    const bool from_host = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyHostToHost;
    const bool to_host = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToHost;
    std::function<cudaError_t()> copy = [=] {
      if (bytes != 0) memcpy(to, from, bytes);
      return cudaSuccess;
    };
    if (from_host && bytes != 0 && pageable(from)) {
      const auto* begin = static_cast<const unsigned char*>(from);
      const auto staged = std::make_shared<std::vector<unsigned char>>(begin, begin + bytes);
      copy = [=] {
        memcpy(to, staged->data(), bytes);
        return cudaSuccess;
      };
    }
    const cudaError_t error = runtime.submit(stream, {Kind::kCopy, std::move(copy)});
    if (error != cudaSuccess) return error;
    return to_host && pageable(to) ? runtime.run_stream(stream) : cudaSuccess;
  });
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes,
                                   cudaStream_t handle = nullptr) {
  using namespace cuda_on_host;
  return stream_call(handle, [=](Runtime& runtime, const Stream& stream) {
    if ((bytes != 0 && to == nullptr) || !runtime.place(to, bytes).inside) {
      return cudaErrorInvalidValue;
    }
    return runtime.submit(stream, {Kind::kOther, [=] {
                                     if (bytes != 0) memset(to, value, bytes);
                                     return cudaSuccess;
                                   }});
  });
}

// On the default stream, and done when the call returns only where the memory is pinned.
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  using namespace cuda_on_host;
  return unsafe_call([=](Runtime& runtime) {
    const Runtime::Place place = runtime.place(to, bytes);
    if ((bytes != 0 && to == nullptr) || !place.inside) return cudaErrorInvalidValue;
    const Stream stream = runtime.find(nullptr);
    const cudaError_t error = runtime.submit(stream, {Kind::kOther, [=] {
                                                        if (bytes != 0) memset(to, value, bytes);
                                                        return cudaSuccess;
                                                      }});
    if (error != cudaSuccess || place.side != Runtime::Side::kPinned) return error;
    return runtime.run_stream(stream);
  });
}

// Any memory is device memory here, so that arrays of the host can stand for tensors.
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes,
                                            const void* pointer) {
  if (attributes == nullptr) return cuda_on_host::result(cudaErrorInvalidValue);
  *attributes = {cudaMemoryTypeDevice, 0, const_cast<void*>(pointer), nullptr};
  return cudaSuccess;
}

// Streams and events.

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  using namespace cuda_on_host;
  if (stream == nullptr || flags > cudaStreamNonBlocking) return result(cudaErrorInvalidValue);
  if (device_count() == 0) return result(cudaErrorNoDevice);
  const bool blocking = flags != cudaStreamNonBlocking;
  const auto made = std::make_shared<CUstream_st>(CUstream_st{this_thread().device, blocking});
  Lock lock(runtime().mutex);
  *stream = made.get();
  runtime().streams[*stream] = made;
  return cudaSuccess;
}
// What the stream was given still runs later, as on a device.
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  using namespace cuda_on_host;
  Lock lock(runtime().mutex);
  return result(runtime().streams.erase(stream) == 1 ? cudaSuccess
                                                     : cudaErrorInvalidResourceHandle);
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  using namespace cuda_on_host;
  return stream_call(handle, [](Runtime& runtime, const Stream& stream) {
    if (runtime.invalidate_if_capturing(stream)) return cudaErrorStreamCaptureUnsupported;
    return runtime.run_stream(stream);
  });
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned /*flags*/) {
  using namespace cuda_on_host;
  if (event == nullptr) return result(cudaErrorInvalidValue);
  if (device_count() == 0) return result(cudaErrorNoDevice);
  *event = new CUevent_st{this_thread().device};
  Lock lock(runtime().mutex);
  runtime().events.insert(*event);
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  using namespace cuda_on_host;
  Lock lock(runtime().mutex);
  if (runtime().events.erase(event) == 0) return result(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle = nullptr) {
  using namespace cuda_on_host;
  return stream_call(handle, [=](Runtime& runtime, const Stream& stream) {
    if (runtime.events.count(event) == 0 || !runtime.on_device(stream, event->device)) {
      return cudaErrorInvalidResourceHandle;
    }
    event->captured = stream->capture != cudaStreamCaptureStatusNone;
    // Captured, it is an edge of the graph, which a launch does not record again.
    const cudaError_t error = runtime.submit(stream, {Kind::kOther, [] { return cudaSuccess; }});
    event->recorded = stream;
    event->after = runtime.issued();
    return error;
  });
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event,
                                       unsigned /*flags*/ = 0) {
  using namespace cuda_on_host;
  return stream_call(handle, [=](Runtime& runtime, const Stream& stream) {
    if (runtime.events.count(event) == 0) return cudaErrorInvalidResourceHandle;
    const Stream recorded = event->recorded;
    if (recorded == nullptr) return cudaSuccess;
    if (event->captured && recorded != stream) {
      // It would draw the stream into the capture, which is not modelled.
      return runtime.invalidate_if_capturing(recorded) ? cudaErrorStreamCaptureUnsupported
                                                       : cudaErrorCapturedEvent;
    }
    if (!event->captured && runtime.invalidate_if_capturing(stream)) {
      return cudaErrorStreamCaptureIsolation;
    }
    const bool captured = event->captured;
    const uint64_t after = event->after;
    return runtime.submit(stream, {Kind::kOther, [=] {
                                     return captured ? cudaSuccess
                                                     : cuda_on_host::runtime().run_stream(recorded,
                                                                                          after);
                                   }});
  });
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  using namespace cuda_on_host;
  return event_call(event, [=](Runtime& runtime) {
    if (!runtime.pending(*event)) return cudaSuccess;
    if (!runtime.flip()) return cudaErrorNotReady;
    return runtime.run_stream(event->recorded, event->after);
  });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  using namespace cuda_on_host;
  return event_call(event, [=](Runtime& runtime) {
    if (!runtime.pending(*event)) return cudaSuccess;
    return runtime.run_stream(event->recorded, event->after);
  });
}

// Capture and graphs.

inline cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  using namespace cuda_on_host;
  if (status == nullptr) return result(cudaErrorInvalidValue);
  return stream_call(handle, [=](Runtime&, const Stream& stream) {
    *status = stream->capture;
    return cudaSuccess;
  });
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  if (mode == nullptr) return cuda_on_host::result(cudaErrorInvalidValue);
  std::swap(*mode, cuda_on_host::this_thread().mode);
  return cudaSuccess;
}
inline cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  using namespace cuda_on_host;
  return stream_call(handle, [=](Runtime& runtime, const Stream& stream) {
    if (stream == runtime.find(nullptr)) return cudaErrorStreamCaptureUnsupported;
    if (stream->capture != cudaStreamCaptureStatusNone) return cudaErrorIllegalState;
    stream->capture = cudaStreamCaptureStatusActive;
    stream->capture_mode = mode;
    stream->capture_thread = std::this_thread::get_id();
    return cudaSuccess;
  });
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  using namespace cuda_on_host;
  if (graph == nullptr) return result(cudaErrorInvalidValue);
  *graph = nullptr;
  return stream_call(handle, [=](Runtime& runtime, const Stream& stream) {
    if (stream->capture == cudaStreamCaptureStatusNone) return cudaErrorIllegalState;
    if (stream->capture_mode != cudaStreamCaptureModeRelaxed &&
        stream->capture_thread != std::this_thread::get_id()) {
      return cudaErrorStreamCaptureWrongThread;
    }
    const auto status = std::exchange(stream->capture, cudaStreamCaptureStatusNone);
    auto captured = std::exchange(stream->captured, {});
    if (status == cudaStreamCaptureStatusInvalidated) return cudaErrorStreamCaptureInvalidated;
    *graph = new CUgraph_st{std::move(captured)};
    runtime.graphs.insert(*graph);
    return cudaSuccess;
  });
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph,
                                        unsigned long long /*flags*/ = 0) {
  using namespace cuda_on_host;
  Lock lock(runtime().mutex);
  if (exec == nullptr || runtime().graphs.count(graph) == 0) return result(cudaErrorInvalidValue);
  *exec = new CUgraphExec_st{std::make_shared<const std::vector<Operation>>(graph->operations)};
  runtime().graph_execs.insert(*exec);
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  using namespace cuda_on_host;
  return stream_call(handle, [=](Runtime& runtime, const Stream& stream) {
    if (runtime.graph_execs.count(exec) == 0) return cudaErrorInvalidValue;
    const auto operations = exec->operations;
    if (stream->capture == cudaStreamCaptureStatusNone) {
      for (const Operation& operation : *operations) runtime.count(operation.kind);
    }
    return runtime.submit(
        stream, {Kind::kOther, [operations] { return Runtime::run_in_order(*operations); }});
  });
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  using namespace cuda_on_host;
  Lock lock(runtime().mutex);
  if (runtime().graphs.erase(graph) == 0) return result(cudaErrorInvalidValue);
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  using namespace cuda_on_host;
  Lock lock(runtime().mutex);
  if (runtime().graph_execs.erase(exec) == 0) return result(cudaErrorInvalidValue);
  delete exec;
  return cudaSuccess;
}

// Kernels.

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (attributes == nullptr || kernel == nullptr) {
    return cuda_on_host::result(cudaErrorInvalidValue);
  }
  *attributes = cudaFuncAttributes{};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel* kernel) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel /*kernel*/,
                                                          int block_size, size_t /*shared*/) {
  if (blocks == nullptr || block_size < 1 || block_size > 1024) {
    return cuda_on_host::result(cudaErrorInvalidValue);
  }
  *blocks = 2;
  return cudaSuccess;
}

template <class... ExpTypes, class... ActTypes>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(ExpTypes...),
                               ActTypes&&... args) {
  using namespace cuda_on_host;
  static_assert((0 + ... + sizeof(ExpTypes)) <= 32764, "a kernel's parameters are this large");
  if (config == nullptr || kernel == nullptr) return result(cudaErrorInvalidValue);
  if (!launchable(*config)) return result(cudaErrorInvalidConfiguration);
  const auto launch = std::make_shared<const Launch<ExpTypes...>>(
      config->gridDim, config->blockDim, kernel, std::forward<ActTypes>(args)...);
  return stream_call(config->stream, [&](Runtime& runtime, const Stream& stream) {
    if (!runtime.on_device(stream, this_thread().device)) return cudaErrorInvalidResourceHandle;
    return runtime.submit(stream, {Kind::kLaunch, [launch] { return launch->run(); }});
  });
}
