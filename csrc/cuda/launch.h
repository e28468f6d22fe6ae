// The kernels as the host launches them.
#pragma once

#include "table.h"

namespace fusedstep {

using SweepKernel = void (*)(SweepArguments);

// Of a rule, by its number, for the states that a step has; null where there is no such variant.
// `wide` computes in double, for float64 parameters, else in float. A staged kernel takes streams of
// all formats, and does what comes after the update.
SweepKernel sweep_kernel(int rule, StateMask states, bool wide);
SweepKernel staged_kernel(int rule, StateMask states, bool wide);

extern void (*const norm_kernel)(NormArguments);  // the norm, then the finish
extern void (*const finish_kernel)(Finish);       // the finish alone, in one block
extern void (*const enter_kernel)(const Enter*, int64_t);

}  // namespace fusedstep
