// The kernels as the host launches them.
#pragma once

#include "table.h"

namespace fusedstep {

using SweepKernel = void (*)(Sweep);

// By rule, and by the states that the step has; null where there is no such variant.
struct SweepKernels {
  SweepKernel find[kRules][1 << kMaxStates];
};

template <int kPair>
const SweepKernels& sweep_kernels();

extern void (*const norm_kernel)(Norm);      // the norm, then the finish
extern void (*const finish_kernel)(Finish);  // the finish alone, in one block
extern void (*const enter_kernel)(const Enter*, int64_t);

}  // namespace fusedstep
