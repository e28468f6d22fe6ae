// What XLA calls, and who evaluates schedules for it.
#pragma once

#include <pybind11/pybind11.h>

#include "interface/stages.h"

namespace fusedstep::jax {

// Of fusedstep._core; and a function (text, t) -> floats, the values at step t of the schedules that a
// text describes.
void use(const Stages* stages, pybind11::object evaluate);

// Each as a capsule that jax.ffi registers, by the name of its target.
pybind11::dict targets();

}  // namespace fusedstep::jax
