// float32: IEEE 754 binary32.
#pragma once

#include "format.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <>
struct In<Format::kF32> : AsComputed<F32> {};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
