// bfloat16: the upper half of a float32.
#pragma once

#include "format.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <>
struct In<Format::kBf16> {
  using Element = uint16_t;
  using Register = F32;
  FN static F32 load(const uint16_t* from) {
    return float_of<F32::kWidth>(load_high<F32::kWidth>(from));
  }
  // Round to nearest, ties to even, in integers: the AVX-512 bf16 instruction would flush denormals.
  FN static void store(uint16_t* to, F32 x) {
    const auto word = words_of(x);
    const auto rounded = word + 0x7fffu + ((word >> 16) & 1u);
    const auto quiet = word | 0x400000u;  // rounding could carry a NaN's payload into infinity
    store_high<F32::kWidth>(to, x.v == x.v ? rounded : quiet);
  }
  static constexpr int kRandomBits = 16;
  template <class Words>
  FN static void dither(uint16_t* to, F32 x, Words random) {
    const auto word = words_of(x);
    const auto quiet = word | 0x400000u;
    store_high<F32::kWidth>(to, x.v == x.v ? word + random : quiet);
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
