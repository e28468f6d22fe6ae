// float32: IEEE 754 binary32.
#pragma once

#include "format.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <>
struct In<Format::kF32> {
  using Element = float;
  using Register = F32;
  FN static F32 load(const float* from) { return FUSEDSTEP_TARGET::load<F32>(from); }
  FN static void store(float* to, F32 x) { FUSEDSTEP_TARGET::store(to, x); }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
