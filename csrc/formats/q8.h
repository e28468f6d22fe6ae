// 8-bit floats that share an exponent by blocks of 128. A code is what a number's word has above a
// base, which the block's largest decides on, with 3 bits of fraction in the upper half of the codes
// and 2 in the lower. A number of any sign has a sign and reaches 2^23 below the largest; one that is
// never negative reaches 2^47. What is too small for its block becomes zero, or where it divides, as
// a second moment does, the least that is not: never more than it was in the one, never zero in the
// other.
//
//   above = word - (base << 23), at least 0
//   at    = max(above, 2*above - kBend):  continuous, and twice as steep from kBend on
//   code  = at >> 21
//
// Bases are exponents, not factors, and what was once rounded stays as it is. Infinity and NaN are
// kept. All decoded numbers fit bfloat16.
#pragma once

#include "format.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <bool kPositive>
struct Q8 {
  using Element = uint8_t;
  using Beside = uint8_t;
  using Register = F32;
  static constexpr int kDropped = 21;  // bits of `at`
  static constexpr int kRandomBits = kDropped;
  static constexpr uint32_t kHalf = kPositive ? 128 : 64, kBend = kHalf << kDropped;
  static constexpr uint32_t kReach = kHalf / 4 + kHalf / 8 - 1;  // octaves, but for one
  static constexpr uint32_t kNan = 0x7fc00000;

  // The base of a block, from the largest of its words without their signs.
  FN static uint32_t base_of(uint32_t largest) {
    if (largest > kNan) largest = kNan;
    const uint32_t exponent = (largest + ((1u << 20) - 1)) >> 23;  // of what it is rounded up to
    return exponent > kReach ? exponent - kReach : 0;
  }
  FN static auto magnitude(F32 x) { return words_of(x) & 0x7fffffffu; }
  // The larger magnitudes, of which NaN's are the largest.
  template <class Words>
  FN static auto larger(Words most, F32 x) {
    return max_word<F32::kWidth>(most, magnitude(x));
  }

  FN static F32 load(const uint8_t* from, uint32_t base) {
    constexpr int kWidth = F32::kWidth;
    const auto byte = kPositive ? load_bytes<kWidth>(from) : load_signed_bytes<kWidth>(from);
    const auto code = kPositive ? byte : abs_word<kWidth>(byte);
    const auto once = code << (kDropped - 1);
    const auto above = min_word<kWidth>(once + once, once + (kBend >> 1));
    auto word = zero_where_zero<kWidth>(above + (base << 23), code);
    if constexpr (!kPositive) word = word | (byte & 0x80000000u);
    return float_of<kWidth>(word);
  }

  // Codes to memory. One that rounding carried beyond the largest, as a NaN's can be, is the largest.
  template <class Codes>
  FN static void store_codes(uint8_t* to, const Codes& codes) {
    if constexpr (kPositive) {
      store_bytes<F32::kWidth>(to, codes);
    } else {
      store_signed_bytes<F32::kWidth>(to, codes);
    }
  }

  // A register's codes, rounded to nearest, or at random by words of random bits.
  FN static auto nearest(F32 x, uint32_t base) {
    const auto at = place(magnitude(x), base);
    return code(x, at, ((at >> kDropped) & 1u) + ((1u << (kDropped - 1)) - 1));
  }
  template <class Words>
  FN static auto dithered(F32 x, uint32_t base, Words random) {
    const auto at = place(magnitude(x), base);
    auto up = random;
    if constexpr (kPositive) {
      // A step divides by the root, whose inverse's mean would be too large with the mean of the
      // number kept: what is kept is nearly that of its fourth root, by going up a little more often.
      const auto low = at & ((1u << kDropped) - 1);
      up = up + (min_word<F32::kWidth>(low, (1u << kDropped) - low) >> 5);
    }
    return code(x, at, up);
  }

 private:
  // `at` of a register's magnitudes.
  template <class Words>
  FN static auto place(Words word, uint32_t base) {
    constexpr int kWidth = F32::kWidth;
    const auto above = max_word<kWidth>(word - (base << 23), word - word);
    return max_word<kWidth>(above, above + above - kBend);
  }
  // `up` is what the dropped bits are increased by before they are.
  template <class Words>
  FN static auto code(F32 x, Words at, Words up) {
    constexpr int kWidth = F32::kWidth;
    const auto code = (at + up) >> kDropped;
    if constexpr (kPositive) {
      const auto word = magnitude(x);
      return max_word<kWidth>(code, min_word<kWidth>(word, word - word + 1u));
    } else {
      return with_sign<kWidth>(code, words_of(x));
    }
  }
};

template <>
struct In<Format::kQ8> : Q8<false> {};
template <>
struct In<Format::kQ8Positive> : Q8<true> {};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
