// The gradients' sum of squares: one number, whatever the instruction set and the threads.
#pragma once

#include <cstdint>
#include <vector>

#include "interface/kernels.h"

namespace fusedstep {

// One contiguous gradient.
struct Run {
  const void* grad;
  int64_t n;  // elements
  DType dtype;
};

struct Squared {
  double sum;
  bool finite;  // all elements are; a float64 sum may be infinite nevertheless
};

// The runs' blocks end to end, each run beginning a new one; their sums are padded with zeros to a
// power of two and added in pairs, level by level. The caller sets the FloatMode, as a step does.
Squared sum_of_squares(const std::vector<Run>& runs);

}  // namespace fusedstep
