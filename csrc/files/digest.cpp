#include "files/digest.h"

#include <cstring>
#include <initializer_list>

namespace fusedstep {
namespace {

// The specification's names.
constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87, kPrime2 = 0xC2B2AE3D27D4EB4F,
                   kPrime3 = 0x165667B19E3779F9, kPrime4 = 0x85EBCA77C2B2AE63,
                   kPrime5 = 0x27D4EB2F165667C5;

// Of little-endian machines, which are all that files are written on.
template <class Word>
Word word(const uint8_t* bytes) {
  Word result;
  std::memcpy(&result, bytes, sizeof(result));
  return result;
}

uint64_t rotated(uint64_t x, int by) { return x << by | x >> (64 - by); }

uint64_t round(uint64_t sum, uint64_t lane) { return rotated(sum + lane * kPrime2, 31) * kPrime1; }

}  // namespace

uint64_t digest(const uint8_t* bytes, size_t n, uint8_t* copy) {
  const uint8_t* end = bytes + n;
  uint64_t result = kPrime5;
  if (n >= 32) {
    // Four sums, which do not wait for each other; an array of them GCC would put into vectors,
    // which have no such product.
    uint64_t a = kPrime1 + kPrime2, b = kPrime2, c = 0, d = 0 - kPrime1;
    for (; end - bytes >= 32; bytes += 32) {
      const uint64_t lanes[] = {word<uint64_t>(bytes), word<uint64_t>(bytes + 8),
                                word<uint64_t>(bytes + 16), word<uint64_t>(bytes + 24)};
      if (copy) {
        std::memcpy(copy, lanes, sizeof(lanes));
        copy += sizeof(lanes);
      }
      a = round(a, lanes[0]);
      b = round(b, lanes[1]);
      c = round(c, lanes[2]);
      d = round(d, lanes[3]);
    }
    result = rotated(a, 1) + rotated(b, 7) + rotated(c, 12) + rotated(d, 18);
    for (const uint64_t one : {a, b, c, d}) result = (result ^ round(0, one)) * kPrime1 + kPrime4;
  }
  result += n;
  if (copy) {  // whose last bytes are digested where they are now
    std::memcpy(copy, bytes, end - bytes);
    end = copy + (end - bytes);
    bytes = copy;
  }
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

}  // namespace fusedstep
