#include "files/digest.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <initializer_list>

namespace fusedstep {
namespace {

// The specification's names.
constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87, kPrime2 = 0xC2B2AE3D27D4EB4F,
                   kPrime3 = 0x165667B19E3779F9, kPrime4 = 0x85EBCA77C2B2AE63,
                   kPrime5 = 0x27D4EB2F165667C5;

constexpr size_t kBlock = 1 << 13;

// Of little-endian machines, which are all that files are written on.
template <class Word>
Word word(const uint8_t* bytes) {
  Word result;
  std::memcpy(&result, bytes, sizeof(result));
  return result;
}

uint64_t rotated(uint64_t x, int by) { return x << by | x >> (64 - by); }

uint64_t round(uint64_t sum, uint64_t lane) { return rotated(sum + lane * kPrime2, 31) * kPrime1; }

// What fewer than 32 bytes add.
uint64_t finished(uint64_t result, const uint8_t* bytes, const uint8_t* end) {
  for (; end - bytes >= 8; bytes += 8) {
    result = rotated(result ^ round(0, word<uint64_t>(bytes)), 27) * kPrime1 + kPrime4;
  }
  if (end - bytes >= 4) {
    result = rotated(result ^ word<uint32_t>(bytes) * kPrime1, 23) * kPrime2 + kPrime3;
    bytes += 4;
  }
  for (; bytes < end; ++bytes) result = rotated(result ^ *bytes * kPrime5, 11) * kPrime1;
  result = (result ^ result >> 33) * kPrime2;
  result = (result ^ result >> 29) * kPrime3;
  return result ^ result >> 32;
}

}  // namespace

uint64_t digest(const uint8_t* bytes, size_t n, uint8_t* copy) {
  const uint8_t* const end = bytes + n;
  // Copied as many bytes at a time as stay in the first-level cache, and read from the copy alone: not
  // even the compiler may look at both.
  const auto block = [&](const uint8_t* from, size_t size) {
    if (!copy) return from;
    std::memcpy(copy, from, size);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    const uint8_t* const copied = copy;
    copy += size;
    return copied;
  };
  uint64_t result = kPrime5;
  if (n >= 32) {
    // Four sums, which do not wait for each other; an array of them GCC would put into vectors,
    // which have no such product.
    uint64_t a = kPrime1 + kPrime2, b = kPrime2, c = 0, d = 0 - kPrime1;
    while (end - bytes >= 32) {
      const size_t size = std::min<size_t>(kBlock, (end - bytes) / 32 * 32);
      const uint8_t* at = block(bytes, size);
      bytes += size;
      for (const uint8_t* const last = at + size; at < last; at += 32) {
        a = round(a, word<uint64_t>(at));
        b = round(b, word<uint64_t>(at + 8));
        c = round(c, word<uint64_t>(at + 16));
        d = round(d, word<uint64_t>(at + 24));
      }
    }
    result = rotated(a, 1) + rotated(b, 7) + rotated(c, 12) + rotated(d, 18);
    for (const uint64_t one : {a, b, c, d}) result = (result ^ round(0, one)) * kPrime1 + kPrime4;
  }
  result += n;
  const size_t left = end - bytes;
  bytes = block(bytes, left);
  return finished(result, bytes, bytes + left);
}

}  // namespace fusedstep
