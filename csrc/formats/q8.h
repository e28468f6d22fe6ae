// 8-bit floats that share an exponent by blocks of 128: the leading bits of a float32's word, relative
// to a base that the block's largest decides on. Of a number of any sign a sign, 5 bits of exponent
// and 2 of fraction, so that it reaches 2^31 below the largest; of one that is never negative 6 and
// 2, 2^63. A number that is too small for its block becomes zero, or where it divides, as a second
// moment does, the least that is not: never more than it was in the one, never zero in the other.
//
// Bases are exponents, not factors, so a number's bits do not depend on its block as long as they
// reach, and what was once rounded stays as it is. Infinity and NaN are kept. All fits bfloat16.
#pragma once

#include "format.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <bool kPositive>
struct Q8 {
  using Element = uint8_t;
  using Beside = uint8_t;
  using Register = F32;
  static constexpr int kFraction = 2, kExponent = kPositive ? 6 : 5;
  static constexpr int kDropped = 23 - kFraction;  // bits of a float32's word
  static constexpr uint32_t kLargest = (1u << (kExponent + kFraction)) - 1;

  // The base of a block, from the largest of its words without their signs, NaN's aside.
  FN static uint32_t base_of(uint32_t largest) {
    const uint32_t exponent = (largest + ((1u << kDropped) - 1)) >> 23;
    const uint32_t reach = (1u << kExponent) - 1;
    return exponent > reach ? exponent - reach : 0;
  }
  // A register's words without their signs; every NaN as the same one.
  FN static auto magnitude(F32 x) {
    const auto word = words_of(x) & 0x7fffffffu;
    const auto nan = word - word + 0x7fc00000u;
    return select_word_gt<F32::kWidth>(word, nan, nan, word);
  }

  FN static F32 load(const uint8_t* from, uint32_t base) {
    const auto code = load_bytes<F32::kWidth>(from);
    const auto magnitude = code & kLargest;
    const auto zero = magnitude - magnitude;
    auto word = (magnitude << kDropped) + (base << 23);
    word = select_word_gt<F32::kWidth>(magnitude, zero, word, zero);
    if constexpr (!kPositive) word = word | (code >> 7) << 31;
    return float_of<F32::kWidth>(word);
  }
  // `up` is what the dropped bits are increased by before they are.
  template <class Words>
  FN static void put(uint8_t* to, F32 x, uint32_t base, Words up) {
    const auto word = magnitude(x);
    const auto zero = word - word;
    auto code = ((word + up) >> kDropped) - (base << kFraction);
    const auto least = kPositive ? select_word_gt<F32::kWidth>(word, zero, zero + 1u, zero) : zero;
    code = select_word_gt<F32::kWidth>(code, least, code, least);
    if constexpr (!kPositive) {
      const auto sign = (words_of(x) >> 31) << 7;
      code = select_word_gt<F32::kWidth>(code, zero, code | sign, zero);
    }
    store_bytes<F32::kWidth>(to, code);
  }
  FN static void store(uint8_t* to, F32 x, uint32_t base) {
    const auto word = magnitude(x);
    put(to, x, base, ((word >> kDropped) & 1u) + ((1u << (kDropped - 1)) - 1));
  }
  template <class Words>
  FN static void dither(uint8_t* to, F32 x, uint32_t base, Words random) {
    put(to, x, base, random >> (32 - kDropped));
  }
};

template <>
struct In<Format::kQ8> : Q8<false> {};
template <>
struct In<Format::kQ8Positive> : Q8<true> {};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
