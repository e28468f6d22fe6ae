// Random bits for rounding: a function of a key and an element's place in its parameter, so that neither
// threads, sets, shards nor the order of anything can change them.
#pragma once

#include "isa/isa.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// One stream's bits in one update: places multiplied and folded, as Wellons' hash functions do
// (https://nullprogram.com/blog/2018/07/31), with the key before and between. Two streams share a
// word, from its two ends.
struct Random {
  uint32_t before, between;
  bool upper;

  Random() = default;
  // `key` is the update's, k the stream's number. The elements begin at `place`, and the upper half of
  // their places is one.
  FN Random(uint64_t key, int k, int64_t place) : upper(k % 2 != 0) {
    key += static_cast<uint64_t>(k / 2) * 0x9e3779b97f4a7c15u;
    key ^= static_cast<uint64_t>(place) >> 32 << 8;
    key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9u;
    key ^= key >> 29;
    before = static_cast<uint32_t>(key) + static_cast<uint32_t>(place);
    between = static_cast<uint32_t>(key >> 32);
  }

  // The words that two streams share, of which each has its end.
  FN auto shared(int64_t i) const {
    auto x = count_from<F32::kWidth>(before + static_cast<uint32_t>(i)) * 0x9e3779b1u;
    x = (x ^ (x >> 15) ^ between) * 0x846ca68bu;
    return x ^ (x >> 15);
  }
  template <int kBits, class Words>
  FN static auto end(Words x, bool upper) {
    return upper ? x >> (32 - kBits) : x & ((1u << kBits) - 1);
  }

  // So many random bits in each lane of the register that begins i elements later.
  template <int kBits>
  FN auto words(int64_t i) const {
    return end<kBits>(shared(i), upper);
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
