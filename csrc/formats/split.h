// A float32 in two streams of 16 bits: bfloat16, which is the float32 rounded to nearest, ties away
// from zero, and beside it the lower half of the word as a signed number. word = high << 16 + low.
#pragma once

#include "format.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <>
struct In<Format::kSplit> {
  using Element = uint16_t;
  using Beside = uint16_t;
  using Register = F32;
  FN static F32 load(const uint16_t* high, const uint16_t* low) {
    return float_of<F32::kWidth>(load_high<F32::kWidth>(high) + load_low<F32::kWidth>(low));
  }
  FN static void store(uint16_t* high, uint16_t* low, F32 x) {
    const auto word = words_of(x);
    const auto nan = word - word + 0x7fc00000u;  // one without a lower half, which could carry
    const auto kept = x.v == x.v ? word : nan;
    store_high<F32::kWidth>(high, kept + 0x8000u);
    store_low<F32::kWidth>(low, kept);
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
