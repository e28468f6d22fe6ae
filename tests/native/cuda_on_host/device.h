// The device side of CUDA for a host compiler: the language's keywords, variables and intrinsics,
// and the grid that runs a kernel, block by block, each thread of a block on a stack of its own.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cfenv>
#include <cstdio>
#include <memory>  // before __noinline__ becomes a macro: it says __attribute__((__noinline__))
#include <utility>
#include <vector>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time in the process, so one object serves every block.
#define __shared__ static

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return uint3{x, y, z}; }
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_host {

// SplitMix64: any seed is a good one.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  template <class T>
  void shuffle(std::vector<T>* items) {
    for (size_t n = items->size(); n > 1; --n) std::swap((*items)[n - 1], (*items)[next() % n]);
  }

 private:
  uint64_t state_;
};

inline uint64_t environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : otherwise;
}

// Device arithmetic rounds to nearest and keeps denormals, whatever the launching thread set.
class DeviceArithmetic {
 public:
  DeviceArithmetic() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DeviceArithmetic() { std::fesetenv(&saved_); }
  DeviceArithmetic(const DeviceArithmetic&) = delete;
  DeviceArithmetic& operator=(const DeviceArithmetic&) = delete;

 private:
  std::fenv_t saved_;
};

// Where a thread waits: the call in the source, since the compiler may copy its instructions.
struct Barrier {
  const char* file;
  int line;
  bool operator==(const Barrier& other) const {
    return line == other.line && strcmp(file, other.file) == 0;
  }
};

// Runs grids; the caller sees to it that only one runs at a time.
class Grid {
 public:
  // Calls kernel(context) once for every thread of the grid; false where a block's threads did not
  // all come to the same barriers, after saying so on stderr.
  bool run(dim3 grid, dim3 block, void (*kernel)(const void*), const void* context) {
    DeviceArithmetic arithmetic;
    gridDim = grid;
    blockDim = block;
    kernel_ = kernel;
    context_ = context;
    running_ = true;
    launching_thread_.become_current_thread();
    const uint64_t seed = environment("CUDA_ON_HOST_SEED", 0);
    scrambled_ = seed != 0;
    random_ = Random(seed * 0x100000001b3u + ++runs_);

    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    bool converged = true;
    order_.resize(block.x * block.y * block.z);
    for (unsigned i = 0; i < order_.size(); ++i) order_[i] = i;
    std::vector<uint32_t> block_order;
    if (scrambled_) {
      block_order.resize(blocks);
      for (uint64_t i = 0; i < blocks; ++i) block_order[i] = static_cast<uint32_t>(i);
      random_.shuffle(&block_order);
    }
    for (uint64_t i = 0; i < blocks && converged; ++i) {
      const uint64_t at = scrambled_ ? block_order[i] : i;
      blockIdx.x = static_cast<unsigned>(at % grid.x);
      blockIdx.y = static_cast<unsigned>(at / grid.x % grid.y);
      blockIdx.z = static_cast<unsigned>(at / grid.x / grid.y);
      if (scrambled_) random_.shuffle(&order_);
      converged = run_block();
    }
    running_ = false;
    return converged;
  }

  // The running thread waits for its block; true if any of the block's threads came with true.
  bool wait(Barrier barrier, bool flag) {
    if (!running_) {
      std::fprintf(stderr, "cuda_on_host: barrier outside a kernel\n");
      std::abort();
    }
    Thread* self = current_;
    self->waiting = true;
    self->barrier = barrier;
    self->index = threadIdx;
    any_ |= flag;
    self->switch_to(&launching_thread_);
    return released_any_;
  }

 private:
  struct Thread : Fiber {
    explicit Thread(void (*entry)()) : Fiber(entry) {}
    bool waiting = false;
    Barrier barrier = {};
    uint3 index = {};
  };

  static void enter();

  // A fiber runs one thread after the other for as long as none waits: without barriers a block
  // costs two switches.
  void serve() {
    current_->entered(&launching_thread_);
    for (;;) {
      while (started_ < order_.size()) {
        const unsigned i = order_[started_++];
        threadIdx.x = i % blockDim.x;
        threadIdx.y = i / blockDim.x % blockDim.y;
        threadIdx.z = i / blockDim.x / blockDim.y;
        kernel_(context_);
        ++ended_;
      }
      current_->switch_to(&launching_thread_);
    }
  }

  void resume(Thread* thread) {
    current_ = thread;
    thread->waiting = false;
    threadIdx = thread->index;
    launching_thread_.switch_to(thread);
    (thread->waiting ? waiting_ : idle_).push_back(thread);
  }

  bool run_block() {
    started_ = ended_ = 0;
    any_ = false;
    while (started_ < order_.size()) {
      if (idle_.empty()) idle_.push_back(new Thread(enter));
      Thread* thread = idle_.back();
      idle_.pop_back();
      resume(thread);
    }
    while (!waiting_.empty()) {
      if (!converged()) {
        for (Thread* thread : waiting_) {
          thread->rewind();
          idle_.push_back(thread);
        }
        waiting_.clear();
        return false;
      }
      released_any_ = any_;
      any_ = false;
      released_.clear();
      released_.swap(waiting_);
      if (scrambled_) random_.shuffle(&released_);
      for (Thread* thread : released_) resume(thread);
    }
    return true;
  }

  bool converged() const {
    const Thread& one = *waiting_.front();
    for (const Thread* thread : waiting_) {
      if (thread->barrier == one.barrier) continue;
      std::fprintf(stderr,
                   "cuda_on_host: divergent barriers in block (%u, %u, %u): "
                   "thread (%u, %u, %u) waits at %s:%d, thread (%u, %u, %u) at %s:%d\n",
                   blockIdx.x, blockIdx.y, blockIdx.z, one.index.x, one.index.y, one.index.z,
                   one.barrier.file, one.barrier.line, thread->index.x, thread->index.y,
                   thread->index.z, thread->barrier.file, thread->barrier.line);
      return false;
    }
    if (ended_ == 0) return true;
    std::fprintf(stderr,
                 "cuda_on_host: divergent barriers in block (%u, %u, %u): "
                 "thread (%u, %u, %u) waits at %s:%d, and %zu of %zu threads have ended\n",
                 blockIdx.x, blockIdx.y, blockIdx.z, one.index.x, one.index.y, one.index.z,
                 one.barrier.file, one.barrier.line, ended_, order_.size());
    return false;
  }

  Context launching_thread_;
  Thread* current_ = nullptr;
  std::vector<Thread*> idle_, waiting_, released_;  // kept for the life of the process
  std::vector<unsigned> order_;
  size_t started_ = 0, ended_ = 0;
  bool any_ = false, released_any_ = false;  // of the barrier being filled, and of the one before
  bool running_ = false, scrambled_ = false;
  Random random_;
  uint64_t runs_ = 0;
  void (*kernel_)(const void*) = nullptr;
  const void* context_ = nullptr;
};

// Leaked: a library may launch from a destructor that runs after those of this header.
inline Grid& the_grid() {
  static Grid* grid = new Grid;
  return *grid;
}
inline void Grid::enter() { the_grid().serve(); }

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace cuda_on_host

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_host::the_grid().wait({file, line}, false);
}
// All threads of the block must come to it, not only those of a warp.
inline unsigned __reduce_max_sync(unsigned /*lanes*/, unsigned value,
                                  const char* file = __builtin_FILE(),
                                  int line = __builtin_LINE()) {
  static unsigned values[1024];
  const unsigned thread = threadIdx.x;
  values[thread] = value;
  cuda_on_host::the_grid().wait({file, line}, false);
  for (unsigned i = thread / 32 * 32; i < thread / 32 * 32 + 32 && i < blockDim.x; ++i) {
    if (values[i] > value) value = values[i];
  }
  cuda_on_host::the_grid().wait({file, line}, true);
  return value;
}
inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE()) {
  return cuda_on_host::the_grid().wait({file, line}, predicate != 0) ? 1 : 0;
}
// Threads take turns, so that only the compiler could reorder what another one sees.
inline void __threadfence() { asm volatile("" ::: "memory"); }
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
inline int atomicOr(int* at, int value) { return __atomic_fetch_or(at, value, __ATOMIC_RELAXED); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline double __dsqrt_rn(double a) { return __builtin_sqrt(a); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
inline unsigned __float_as_uint(float a) { return cuda_on_host::bits<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return cuda_on_host::bits<float>(a); }
inline double __longlong_as_double(long long a) { return cuda_on_host::bits<double>(a); }
inline long long __double_as_longlong(double a) { return cuda_on_host::bits<long long>(a); }
