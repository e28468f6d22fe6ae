// float16: IEEE 754 binary16, rounded to nearest, ties to even.
#pragma once

#include "format.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <>
struct In<Format::kF16> {
  using Element = uint16_t;
  using Register = F32;
  FN static F32 load(const uint16_t* from) { return load_f16(from); }
  FN static void store(uint16_t* to, F32 x) { store_f16(to, x); }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
