// VirtualAlloc, as mmap in pages_posix.cpp. Huge pages would need a privilege that few users have, and
// are granted at once or not at all: nobody gets them.
#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

#include <algorithm>
#include <new>

#include "pages.h"

namespace fusedstep {

Pages::Pages(size_t bytes, bool /*huge*/) : length_(std::max<size_t>(bytes, 1)) {
  mapping_ = VirtualAlloc(nullptr, length_, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
  if (!mapping_) throw std::bad_alloc();
  data_ = mapping_;  // a boundary of 64 KiB, so kAlignment holds
}

Pages::~Pages() { VirtualFree(mapping_, 0, MEM_RELEASE); }

}  // namespace fusedstep
