#include <pthread.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <thread>

#include "process.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace fusedstep {

int usable_cores() {
#if defined(__linux__)
  // The kernel refuses a mask that is too short.
  for (int cpus = 1024; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t* mask = CPU_ALLOC(cpus);
    const size_t size = CPU_ALLOC_SIZE(cpus);
    const bool fits = sched_getaffinity(0, size, mask) == 0;
    const int count = fits ? CPU_COUNT_S(size, mask) : 0;
    const bool too_short = !fits && errno == EINVAL;
    CPU_FREE(mask);
    if (count > 0) return count;
    if (!too_short) break;
  }
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

void after_fork(void (*child)()) {
  const int error = pthread_atfork(nullptr, nullptr, child);
  if (error) throw std::system_error(error, std::generic_category(), "pthread_atfork");
}

std::FILE* open_file(const char* path) { return std::fopen(path, "re"); }

}  // namespace fusedstep
