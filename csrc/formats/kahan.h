// A number as the sum of two of bfloat16: itself rounded, and beside it what the rounding left, rounded.
// Kahan 1965, doi:10.1145/363707.363723, as Zamirai et al. 2020 compensate updates, arXiv:2010.06192.
#pragma once

#include "bf16.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <>
struct In<Format::kKahan> {
  using Element = uint16_t;
  using Beside = uint16_t;
  using Register = F32;
  FN static F32 load(const uint16_t* sum, const uint16_t* rest) {
    return In<Format::kBf16>::load(sum) + In<Format::kBf16>::load(rest);
  }
  FN static void store(uint16_t* sum, uint16_t* rest, F32 x) {
    In<Format::kBf16>::store(sum, x);
    const F32 left = x - In<Format::kBf16>::load(sum);
    // Of an infinity or NaN, or what became one, nothing is left.
    In<Format::kBf16>::store(rest, select_gt(F32(0x1p127f), abs(left), left, F32(0)));
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
