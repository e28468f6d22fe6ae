// mmap rather than malloc: the pages come zeroed, untouched, and go back to the system at once.
#include <sys/mman.h>

#include <new>

#include "pages.h"

namespace fusedstep {

Pages::Pages(size_t bytes, bool huge) {
  const bool large = bytes >= kHugeFrom;
  const size_t slack = large && huge ? kHugePage : 0;
  if (bytes > SIZE_MAX - slack) throw std::bad_alloc();
  length_ = bytes + slack > 0 ? bytes + slack : 1;
  mapping_ = mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  auto address = reinterpret_cast<uintptr_t>(mapping_);  // a page boundary, so kAlignment holds
  if (slack) address = (address + kHugePage - 1) & ~(kHugePage - 1);
  data_ = reinterpret_cast<void*>(address);
#if defined(MADV_HUGEPAGE)  // Linux; declined, it means ordinary pages and the same results
  if (large) madvise(data_, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
}

Pages::~Pages() { munmap(mapping_, length_); }

}  // namespace fusedstep
