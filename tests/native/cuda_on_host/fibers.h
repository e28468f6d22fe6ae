// Stacks that a thread of a CUDA block can be suspended on, and the switch between two of them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__has_feature)
#define CUDA_ON_HOST_HAS_FEATURE(x) __has_feature(x)
#else
#define CUDA_ON_HOST_HAS_FEATURE(x) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || CUDA_ON_HOST_HAS_FEATURE(address_sanitizer)
#define CUDA_ON_HOST_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__) || CUDA_ON_HOST_HAS_FEATURE(thread_sanitizer)
#define CUDA_ON_HOST_TSAN 1
#include <sanitizer/tsan_interface.h>
#endif

// The compiler may assume nothing about which registers the switch leaves alone beyond the ABI.
#if defined(__clang__)
#define CUDA_ON_HOST_OPAQUE __attribute__((noinline))
#else
#define CUDA_ON_HOST_OPAQUE __attribute__((noipa))
#endif

namespace cuda_on_host {

// Suspends the caller, with its stack pointer in *from, and resumes what `to` was stored by; a new
// stack is laid out by Fiber so that resuming it enters its function. By hand, because swapcontext
// makes two system calls and a barrier of 1024 threads would make two thousand.
CUDA_ON_HOST_OPAQUE inline void switch_stack(void** from, void* to) {
#if defined(__x86_64__)
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n\t"  // the red zone
      "pushq %%rbp\n\t"
      "leaq 1f(%%rip), %%rax\n\t"
      "pushq %%rax\n\t"
      "movq %%rsp, (%%rdi)\n\t"
      "movq %%rsi, %%rsp\n\t"
      "popq %%rax\n\t"
      "jmpq *%%rax\n"
      "1:\n\t"
      "popq %%rbp\n\t"
      "leaq 128(%%rsp), %%rsp"
      : "+D"(from), "+S"(to)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc",
        "memory");
#elif defined(__aarch64__)
  register void** from_register asm("x0") = from;
  register void* to_register asm("x1") = to;
  asm volatile(
      "stp x29, x30, [sp, #-32]!\n\t"
      "adr x16, 1f\n\t"
      "str x16, [sp, #16]\n\t"
      "mov x16, sp\n\t"
      "str x16, [x0]\n\t"
      "mov sp, x1\n\t"
      "ldr x16, [sp, #16]\n\t"
      "br x16\n"
      "1:\n\t"
      "hint #38\n\t"  // bti jc: a valid target where branch protection is on
      "ldp x29, x30, [sp], #32"
      : "+r"(from_register), "+r"(to_register)
      :
      : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15",
        "x16", "x17", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "d8",
        "d9", "d10", "d11", "d12", "d13", "d14", "d15", "cc", "memory");
#else
#error "stack switching is written for x86-64 and aarch64"
#endif
}

// A context that can be switched away from and back to; the launching thread is one without a stack
// of its own.
class Context {
 public:
  // Leaves `this`, which is running, for `to`.
  void switch_to(Context* to) {
#if defined(CUDA_ON_HOST_ASAN)
    __sanitizer_start_switch_fiber(&asan_, to->bottom_, to->size_);
#endif
#if defined(CUDA_ON_HOST_TSAN)
    __tsan_switch_to_fiber(to->tsan_, 0);
#endif
    switch_stack(&sp_, to->sp_);
    arrived(to);
  }

  // The launching thread, whose stack the sanitizer tells on the first arrival elsewhere.
  void become_current_thread() {
#if defined(CUDA_ON_HOST_TSAN)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

 protected:
  // `back` is where this context returns to and, by the order of switches, was resumed from.
  void arrived([[maybe_unused]] Context* back) {
#if defined(CUDA_ON_HOST_ASAN)
    __sanitizer_finish_switch_fiber(asan_, &back->bottom_, &back->size_);
#endif
  }

  void* sp_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#if defined(CUDA_ON_HOST_ASAN)
  void* asan_ = nullptr;
#endif
#if defined(CUDA_ON_HOST_TSAN)
  void* tsan_ = nullptr;
#endif
};

// A stack with an inaccessible page below it, so that running over its end is a fault.
class Fiber : public Context {
 public:
  explicit Fiber(void (*entry)()) : entry_(entry) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_ = kBytes;
    void* map = mmap(nullptr, page + kBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED || mprotect(map, page, PROT_NONE) != 0) {
      std::fprintf(stderr, "cuda_on_host: no memory for the stack of a thread\n");
      std::abort();
    }
    bottom_ = static_cast<char*>(map) + page;
    rewind();
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Drops what the fiber was doing: resumed next, it enters its function anew.
  void rewind() {
    char* bottom = static_cast<char*>(const_cast<void*>(bottom_));
#if defined(CUDA_ON_HOST_ASAN)
    __asan_unpoison_memory_region(bottom, size_);
    asan_ = nullptr;
#endif
#if defined(CUDA_ON_HOST_TSAN)
    if (tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
    tsan_ = __tsan_create_fiber(0);
#endif
    void** top = reinterpret_cast<void**>(bottom + size_);
    void* entry = reinterpret_cast<void*>(entry_);
#if defined(__x86_64__)
    top[-1] = nullptr;  // where a call would have left its return address
    top[-2] = entry;
    sp_ = top - 2;
#else
    top[-2] = entry;
    sp_ = top - 4;
#endif
  }

  // To be called first in the function, with the context that resumed the fiber.
  void entered(Context* from) { arrived(from); }

 private:
#if defined(CUDA_ON_HOST_ASAN)
  static constexpr size_t kBytes = size_t{1} << 20;  // its frames are several times as large
#else
  static constexpr size_t kBytes = size_t{1} << 18;
#endif
  void (*entry_)();
};

}  // namespace cuda_on_host
