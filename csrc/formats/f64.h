// float64: IEEE 754 binary64.
#pragma once

#include "format.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <>
struct In<Format::kF64> {
  using Element = double;
  using Register = F64;
  FN static F64 load(const double* from) { return FUSEDSTEP_TARGET::load<F64>(from); }
  FN static void store(double* to, F64 x) { FUSEDSTEP_TARGET::store(to, x); }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
