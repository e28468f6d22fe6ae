// What the system tells of this process and does for it: process_posix.cpp, process_windows.cpp.
#pragma once

#include <cstdio>

namespace fusedstep {

// The cores that this process may use. At least 1.
int usable_cores();

// Has `child` run in every forked child, where there are forks.
void after_fork(void (*child)());

// Opens a file to read, which child processes do not inherit; null where there is none.
std::FILE* open_file(const char* path);

}  // namespace fusedstep
