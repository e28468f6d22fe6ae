// float64: IEEE 754 binary64.
#pragma once

#include "format.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <>
struct In<Format::kF64> : AsComputed<F64> {};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
