// Random bits for rounding: a function of a key and an element's place in its parameter, so that neither
// threads, sets, shards nor the order of anything can change them.
#pragma once

#include "isa/isa.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// One stream's bits in one update, of which the upper 16 of each word count. Two rounds of
// multiplication and shift, as Wellons' lowbias32 has them
// (https://nullprogram.com/blog/2018/07/31), with the key before and between them.
struct Random {
  uint32_t before, between, place;
  int shift;

  // `key` is the update's, k the stream's number: two streams share a word. The elements begin at
  // `place`, and the upper half of their places is one.
  FN Random(uint64_t key, int k, int64_t place)
      : place(static_cast<uint32_t>(place)), shift(k % 2 * 16) {
    key += static_cast<uint64_t>(k / 2) * 0x9e3779b97f4a7c15u;
    key ^= static_cast<uint64_t>(place) >> 32 << 8;
    key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9u;
    key ^= key >> 29;
    before = static_cast<uint32_t>(key);
    between = static_cast<uint32_t>(key >> 32);
  }

  // Of the register that begins i elements later.
  FN auto words(int64_t i) const {
    auto x = count_from<F32::kWidth>(place + static_cast<uint32_t>(i)) ^ before;
    x = (x ^ (x >> 16)) * 0x7feb352du + between;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return (x ^ (x >> 16)) << shift;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
