// Memory for large buffers: aligned, zeroed, on huge pages where the system grants them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedstep {

constexpr size_t kAlignment = 64;  // one cache line, one AVX-512 register
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kHugeFrom = 2 * kHugePage;  // smaller buffers are not worth rounding up to pages

// A zeroed block that frees itself.
class Pages {
 public:
  // Throws std::bad_alloc. With `huge`, blocks of kHugeFrom bytes and more start at a huge page's
  // boundary and ask for huge pages (madvise); the system may still decline, and Windows does.
  Pages(size_t bytes, bool huge);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  void* data() const { return data_; }

 private:
  void* mapping_;
  size_t length_;
  void* data_;
};

}  // namespace fusedstep
