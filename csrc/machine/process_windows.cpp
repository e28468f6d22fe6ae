#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include <algorithm>
#include <thread>

#include "process.h"

namespace fusedstep {

int usable_cores() {
  DWORD_PTR ours = 0, all = 0;
  // Both are 0 in a process whose threads run in several groups of 64 cores.
  GetProcessAffinityMask(GetCurrentProcess(), &ours, &all);
  if (ours) return __builtin_popcountll(ours);
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

void after_fork(void (*)()) {}  // there are none

std::FILE* open_file(const char* path) { return std::fopen(path, "rN"); }

}  // namespace fusedstep
