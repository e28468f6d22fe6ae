// A GPU as a Stepper sees it: a step's table in its memory, and at most two launches.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "backend.h"
#include "launch.h"

#ifndef FUSEDSTEP_DEVICE_KIND
#define FUSEDSTEP_DEVICE_KIND 2  // DLPack's kDLCUDA
#endif

namespace fusedstep {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next call of anybody would report it
  throw std::runtime_error(std::string("CUDA could not ") + what + ": " +
                           cudaGetErrorString(error));
}

// Makes a device the thread's current one, for as long as an object of it lives.
class OnDevice {
 public:
  explicit OnDevice(int index) {
    check(cudaGetDevice(&before_), "tell the current device");
    changed_ = before_ != index;  // to set a device for nothing would open one that nobody uses
    if (changed_) check(cudaSetDevice(index), "use the device");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Lets this thread allocate and ask while a stream, of this thread or another, is being recorded:
// none of that touches the stream.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status;
  check(cudaStreamIsCapturing(stream, &status), "tell whether the stream is being recorded");
  return status != cudaStreamCaptureStatusNone;
}

// A stream of our own for what must happen at once, also while another is being recorded.
class Aside {
 public:
  Aside() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "make a stream"); }
  ~Aside() { cudaStreamDestroy(stream_); }
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;
  cudaStream_t stream() const { return stream_; }
  void finish() const { check(cudaStreamSynchronize(stream_), "finish a stream"); }

 private:
  const Relaxed relaxed_;
  cudaStream_t stream_ = nullptr;
};

struct FreeHost {
  void operator()(char* memory) const {
    const Relaxed relaxed;
    cudaFreeHost(memory);
  }
};
using HostMemory = std::unique_ptr<char, FreeHost>;

DeviceMemory device_memory(size_t bytes) {
  const Relaxed relaxed;
  void* memory;
  check(cudaMalloc(&memory, bytes), "allocate memory for the step's table");
  return DeviceMemory(static_cast<char*>(memory));
}
HostMemory host_memory(size_t bytes) {
  const Relaxed relaxed;
  void* memory;
  check(cudaHostAlloc(&memory, bytes, cudaHostAllocDefault), "allocate page-locked memory");
  return HostMemory(static_cast<char*>(memory));
}

size_t room_for(size_t bytes) { return std::max<size_t>(4096, bytes + bytes / 2); }

// Memory of zeros, before any stream uses it.
DeviceMemory cleared_memory(size_t bytes) {
  DeviceMemory memory = device_memory(std::max<size_t>(bytes, 1));
  const Aside aside;
  check(cudaMemsetAsync(memory.get(), 0, bytes, aside.stream()), "clear memory");
  aside.finish();
  return memory;
}

// Device memory that grows, and is of zeros at first. What it was stays: a step under way, or a graph,
// may be using it.
class Growing {
 public:
  char* get(size_t bytes) {
    if (bytes > room_) {
      DeviceMemory larger = cleared_memory(room_for(bytes));
      if (here_) kept_.push_back(std::move(here_));
      here_ = std::move(larger);
      room_ = room_for(bytes);
    }
    return here_.get();
  }

 private:
  DeviceMemory here_;
  size_t room_ = 0;
  std::vector<DeviceMemory> kept_;
};

// Bytes that come again in most steps, and are sent when they differ.
class Mirror {
 public:
  // Where `bytes` will be once the stream has come this far.
  const char* put(const std::vector<char>& bytes, cudaStream_t stream) {
    if (bytes.empty()) return nullptr;
    if (capturing(stream)) return put_to_stay(bytes);
    if (bytes == sent_) return here_.get(bytes.size());
    sent_.clear();
    char* const here = here_.get(bytes.size());
    Staging& staging = staging_for(bytes.size());
    std::memcpy(staging.memory.get(), bytes.data(), bytes.size());
    check(cudaMemcpyAsync(here, staging.memory.get(), bytes.size(), cudaMemcpyHostToDevice, stream),
          "send the step's table");
    check(cudaEventRecord(staging.sent, stream), "record an event");
    sent_ = bytes;
    return here;
  }

  // At once, in memory of its own: what a graph reads never changes.
  const char* put_to_stay(const std::vector<char>& bytes) {
    recorded_.push_back(device_memory(bytes.size()));
    const Aside aside;
    check(cudaMemcpyAsync(recorded_.back().get(), bytes.data(), bytes.size(),
                          cudaMemcpyHostToDevice, aside.stream()),
          "send the table of a recorded step");
    aside.finish();
    return recorded_.back().get();
  }

  Mirror() = default;
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;
  ~Mirror() {
    for (const Staging& staging : staging_) cudaEventDestroy(staging.sent);
  }

 private:
  struct Staging {
    HostMemory memory;
    size_t room;
    cudaEvent_t sent;  // when the memory may be written again
  };

  // The one used longest ago, or a new one.
  Staging& staging_for(size_t bytes) {
    if (!staging_.empty()) {
      next_ = (next_ + 1) % staging_.size();
      Staging& oldest = staging_[next_];
      if (cudaEventQuery(oldest.sent) == cudaSuccess) {
        if (oldest.room < bytes) {
          oldest.memory = host_memory(room_for(bytes));
          oldest.room = room_for(bytes);
        }
        return oldest;
      }
      cudaGetLastError();  // cudaErrorNotReady
    }
    Staging staging = {host_memory(room_for(bytes)), room_for(bytes), nullptr};
    check(cudaEventCreateWithFlags(&staging.sent, cudaEventDisableTiming), "make an event");
    return *staging_.insert(staging_.begin() + static_cast<std::ptrdiff_t>(next_),
                            std::move(staging));
  }

  Growing here_;
  std::vector<char> sent_;
  std::deque<Staging> staging_;  // in a ring
  size_t next_ = 0;              // the last one used
  std::vector<DeviceMemory> recorded_;
};

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value;
  check(cudaDeviceGetAttribute(&value, attribute, device), "tell an attribute of the device");
  return value;
}

// How many blocks of a kernel the current device holds at a time.
template <class Kernel>
int resident_blocks(Kernel kernel, int threads, int device) {
  static std::mutex mutex;
  static std::map<std::pair<int, Kernel>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{device, kernel}];
  if (!blocks) {
    int each;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0),
          "size a launch");
    blocks = std::max(1, each) * device_attribute(cudaDevAttrMultiProcessorCount, device);
  }
  return blocks;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch a kernel");
}

// The first pieces, as many as have starts, whose arrays lie at offsets of `base`, or travel with the
// launch.
Pieces pieces_of(const Table& table, const std::vector<int64_t>& starts, size_t all_at,
                 size_t starts_at, const char* base) {
  Pieces pieces = {};
  pieces.n = static_cast<int64_t>(starts.size()) - 1;
  pieces.end = starts.back();
  if (pieces.n == 1) {
    pieces.only = table.pieces[0];
  } else {
    pieces.all = reinterpret_cast<const Piece*>(base + all_at);
    pieces.starts = reinterpret_cast<const int64_t*>(base + starts_at);
  }
  return pieces;
}

int threads_of(const Launch& launch) {
  return launch.staged ? kStagedThreads[launch.wide] : kThreads;
}

// What one Stepper has on its device.
class Memory {
 public:
  explicit Memory(int device) : device_(device) {
    const OnDevice on(device_);
    gate_ = cleared_memory(sizeof(Gate));
    check(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming), "make an event");
  }
  ~Memory() {
    int before;
    if (cudaGetDevice(&before) != cudaSuccess) return;
    cudaSetDevice(device_);
    cudaEventDestroy(done_);
    kept_.clear();
    gate_.reset();
    cudaSetDevice(before);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void step(const DeviceStep& step) {
    const OnDevice on(device_);
    const Relaxed relaxed;
    const Options& options = step.options;
    const auto stream = static_cast<cudaStream_t>(options.stream);
    if (!options.live && capturing(stream)) {
      throw std::runtime_error(
          "a step can be recorded in a CUDA graph only with capturable=True, of fusedstep.torch");
    }
    const Table table = build_table(step, [this](int64_t slot) { return kept_at(slot); });
    await_other_stream(stream);
    if (options.live) enter(step, stream);

    // The tensors, which are mostly the same in the next step, apart from what mostly is not.
    Packed tensors, scalars;
    const bool one = table.pieces.size() == 1, measures = options.measure && table.measured > 0;
    const size_t tallies = tensors.add(table.tallies);
    const size_t pieces = one ? 0 : tensors.add(table.pieces);
    const size_t norm_starts = one ? 0 : tensors.add(table.norm_starts);
    std::vector<size_t> starts;
    for (const Launch& l : table.launches) starts.push_back(one ? 0 : tensors.add(l.starts));
    const size_t groups = scalars.add(std::vector<Group>(step.groups, step.groups + step.n_groups));
    const size_t rows = step.n_rows <= kRowsHere
                            ? 0
                            : scalars.add(std::vector<Row>(step.rows, step.rows + step.n_rows));
    const char* const tensors_at = tensors_.put(tensors.bytes(), stream);
    const char* const scalars_at = scalars_.put(scalars.bytes(), stream);

    // All that can fail, before anything is launched.
    std::vector<SweepKernel> kernels;
    std::vector<int64_t> resident;
    for (const Launch& l : table.launches) {
      kernels.push_back((l.staged ? staged_kernel : sweep_kernel)(step.rule, l.states, l.wide));
      resident.push_back(resident_blocks(kernels.back(), threads_of(l), device_));
    }
    const int64_t norm_resident =
        measures ? resident_blocks(norm_kernel, kNormThreads, device_) : 0;

    const bool gated = options.live || options.measure;
    auto* const gate = reinterpret_cast<Gate*>(gate_.get());
    Row* counted = nullptr;
    int* begins = nullptr;
    if (gated) {
      Finish finish = {gate, options, step.rule, 0, nullptr, 0, nullptr, nullptr, nullptr};
      if (options.live) {
        counted = reinterpret_cast<Row*>(rows_.get(step.n_tensors * sizeof(Row)));
        finish.tallies = reinterpret_cast<const Tally*>(tensors_at + tallies);
        finish.n = static_cast<int64_t>(table.tallies.size());
        finish.groups = reinterpret_cast<const Group*>(scalars_at + groups);
        begins = reinterpret_cast<int*>(begins_.get(step.n_tensors * sizeof(int)));
        finish.rows = counted;
        finish.begins = begins;
      }
      if (measures) {
        NormArguments norm = {};
        norm.pieces = pieces_of(table, table.norm_starts, pieces, norm_starts, tensors_at);
        norm.sums = reinterpret_cast<NormSum*>(
            sums_.get(table.norm_nodes * size_t{kFan} * sizeof(NormSum)));
        norm.arrived =
            reinterpret_cast<unsigned*>(arrived_.get(table.norm_nodes * sizeof(unsigned)));
        norm.finish = finish;
        const int64_t tiles = (norm.pieces.end + kFan - 1) / kFan;
        launch(norm_kernel, std::min(tiles, norm_resident), kNormThreads, stream, norm);
      } else {
        launch(finish_kernel, 1, kNormThreads, stream, finish);
      }
    }
    for (size_t i = 0; i < table.launches.size(); ++i) {
      SweepArguments sweep = {};
      sweep.pieces = pieces_of(table, table.launches[i].starts, pieces, starts[i], tensors_at);
      sweep.gate = gated ? gate : nullptr;
      if (options.live) {
        sweep.rows = counted;
        sweep.begins = begins;
      } else if (step.n_rows > kRowsHere) {
        sweep.rows = reinterpret_cast<const Row*>(scalars_at + rows);
      } else {
        std::copy(step.rows, step.rows + step.n_rows, sweep.here);
      }
      launch(kernels[i], std::min(sweep.pieces.end, resident[i]), threads_of(table.launches[i]),
             stream, sweep);
    }
    if (capturing(stream)) return;
    check(cudaEventRecord(done_, stream), "record an event");
    last_ = stream;
  }

  void read_clocks(const int64_t* slots, size_t n, Clock* clocks, int* begins) {
    const OnDevice on(device_);
    check(cudaDeviceSynchronize(), "finish the steps under way");
    std::map<int64_t, std::vector<Kept>> chunks;
    for (size_t i = 0; i < n; ++i) {
      std::vector<Kept>& chunk = chunks[slots[i] / kChunk];
      if (chunk.empty()) {
        chunk.resize(kChunk);
        check(cudaMemcpy(chunk.data(), kept_at(slots[i] / kChunk * kChunk), kChunk * sizeof(Kept),
                         cudaMemcpyDeviceToHost),
              "read the steps' counts");
      }
      const Kept& kept = chunk[slots[i] % kChunk];
      clocks[i] = kept.clock;
      if (begins) begins[i] = kept.begins != 0;
    }
  }

  double read_norm() {
    const OnDevice on(device_);
    return read_gate().norm;
  }

  void read_norms(size_t n, double* norms, int* finite) {
    const OnDevice on(device_);
    const Gate gate = read_gate();
    std::vector<NormSum> sums(n);
    check(cudaMemcpy(sums.data(), sums_.get(0), n * sizeof(NormSum), cudaMemcpyDeviceToHost),
          "read the tensors' norms");
    for (size_t i = 0; i < n; ++i) {
      norms[i] = std::sqrt(sums[i].sum) * gate.factor;
      finite[i] = !sums[i].bad;
    }
  }

 private:
  Gate read_gate() {
    Gate gate;
    check(cudaDeviceSynchronize(), "finish the steps under way");
    check(cudaMemcpy(&gate, gate_.get(), sizeof(gate), cudaMemcpyDeviceToHost), "read the norm");
    return gate;
  }

  static constexpr int64_t kChunk = 1024;  // tensors of which what is kept lies together

  Kept* kept_at(int64_t slot) {
    while (static_cast<int64_t>(kept_.size()) <= slot / kChunk) {
      kept_.push_back(device_memory(kChunk * sizeof(Kept)));
    }
    return reinterpret_cast<Kept*>(kept_[slot / kChunk].get()) + slot % kChunk;
  }

  // Two streams that step different tensors must not write one table at once.
  void await_other_stream(cudaStream_t stream) {
    if (stream == last_ || capturing(stream)) return;
    check(cudaStreamWaitEvent(stream, done_, 0), "order two streams");
  }

  // Puts the clocks in place that the device has not counted so far: at once, and not in a graph,
  // which would put them there again in each replay.
  void enter(const DeviceStep& step, cudaStream_t stream) {
    std::vector<Enter> entries;
    for (size_t i = 0; i < step.n_tensors; ++i) {
      const DeviceTensor& t = step.tensors[i];
      if (t.enters) entries.push_back({kept_at(t.slot), t.clock});
    }
    if (entries.empty()) return;
    Packed packed;
    packed.add(entries);
    const auto n = static_cast<int64_t>(entries.size());
    const int64_t blocks = (n + kThreads - 1) / kThreads;
    if (!capturing(stream)) {
      const char* const at = entering_.put(packed.bytes(), stream);
      launch(enter_kernel, blocks, kThreads, stream, reinterpret_cast<const Enter*>(at), n);
      return;
    }
    const Aside aside;
    const char* const at = entering_.put_to_stay(packed.bytes());
    launch(enter_kernel, blocks, kThreads, aside.stream(), reinterpret_cast<const Enter*>(at), n);
    aside.finish();
  }

  int device_;
  cudaEvent_t done_ = nullptr;  // the last step
  cudaStream_t last_ = nullptr;
  DeviceMemory gate_;
  std::deque<DeviceMemory> kept_;  // its places stay
  Mirror tensors_, scalars_, entering_;
  Growing sums_, arrived_, rows_, begins_;  // which only the device writes
};

template <class Body>
const char* guarded(const Body& body) {
  static thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

const char* open(int index, void** memory) {
  return guarded([&] { *memory = new Memory(index); });
}
void close(void* memory) { delete static_cast<Memory*>(memory); }
const char* take_step(void* memory, const DeviceStep* step) {
  return guarded([&] { static_cast<Memory*>(memory)->step(*step); });
}
const char* use(int index, int* before) {
  return guarded([&] {
    check(cudaGetDevice(before), "tell the current device");
    if (*before != index) check(cudaSetDevice(index), "use the device");
  });
}
const char* index_of(const void* at, int* index) {
  return guarded([&] {
    cudaPointerAttributes attributes;
    check(cudaPointerGetAttributes(&attributes, at), "tell whose memory it is");
    *index = attributes.device;
  });
}
const char* order(int index, void* first, void* then) {
  return guarded([&] {
    const OnDevice on(index);
    cudaEvent_t event;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "make an event");
    check(cudaEventRecord(event, static_cast<cudaStream_t>(first)), "record an event");
    check(cudaStreamWaitEvent(static_cast<cudaStream_t>(then), event, 0), "order two streams");
    cudaEventDestroy(event);
  });
}
const char* read_clocks(void* memory, const int64_t* slots, size_t n, Clock* clocks, int* begins) {
  return guarded([&] { static_cast<Memory*>(memory)->read_clocks(slots, n, clocks, begins); });
}
const char* read_norm(void* memory, double* norm) {
  return guarded([&] { *norm = static_cast<Memory*>(memory)->read_norm(); });
}
const char* read_norms(void* memory, size_t n, double* norms, int* finite) {
  return guarded([&] { static_cast<Memory*>(memory)->read_norms(n, norms, finite); });
}

}  // namespace

void FreeDevice::operator()(char* memory) const {
  const Relaxed relaxed;
  cudaFree(memory);
}

const Device& device() {
  static const Device offered = {
      sizeof(Device), FUSEDSTEP_DEVICE_KIND, open,      close,     take_step, use, index_of,
      order,          read_clocks,           read_norm, read_norms};
  return offered;
}

Allocation::Allocation(size_t bytes, int index) : bytes_(bytes), index_(index) {
  const OnDevice on(index);
  memory_ = cleared_memory(bytes);
}
void Allocation::check_range(size_t at, size_t bytes) const {
  if (at > bytes_ || bytes > bytes_ - at) {
    throw std::out_of_range("the range must lie within " + std::to_string(bytes_) + " bytes");
  }
}
void Allocation::read(size_t from, void* to, size_t bytes) const {
  check_range(from, bytes);
  const OnDevice on(index_);
  check(cudaDeviceSynchronize(), "finish what is under way");
  check(cudaMemcpy(to, memory_.get() + from, bytes, cudaMemcpyDeviceToHost), "read memory");
}
void Allocation::write(size_t to, const void* from, size_t bytes) {
  check_range(to, bytes);
  const OnDevice on(index_);
  check(cudaDeviceSynchronize(), "finish what is under way");
  check(cudaMemcpy(memory_.get() + to, from, bytes, cudaMemcpyHostToDevice), "write memory");
}

std::vector<DeviceInfo> devices() {
  int n = 0;
  std::vector<DeviceInfo> all;
  if (cudaGetDeviceCount(&n) != cudaSuccess) {
    cudaGetLastError();  // no driver, or no device: there is none
    return all;
  }
  for (int i = 0; i < n; ++i) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, i), "describe a device");
    all.push_back({properties.name, properties.major, properties.minor,
                   static_cast<int64_t>(properties.totalGlobalMem),
                   properties.multiProcessorCount});
  }
  return all;
}

}  // namespace fusedstep
