// The stages of a step for a caller that keeps states and counts itself, as JAX does: plain data and
// functions, so that the module that calls them need not be linked with this one.
#pragma once

#include <cstddef>

#include "clock.h"
#include "group.h"
#include "options.h"

namespace fusedstep {

// What gradients measure: the sum of their squares, and whether all are finite.
struct Sum {
  double squares;
  int finite, padding;
};

// Every function returns null, or what went wrong, which is said until the thread's next call;
// nothing has been written then.
struct Stages {
  size_t size;  // of this struct, for a mismatch of builds
  // A rule's number and how many hyperparameters it has; -1 for an unknown name.
  int (*rule)(const char* name, int* hypers);
  // Of all segments' gradients.
  const char* (*measure)(const Segment* segments, size_t n, Sum* sum);
  // One row for each group, of the update that follows `clock`, which is advanced to it unless the
  // verdict is to skip. `sum` is read where the options measure.
  const char* (*prepare)(int rule, const Group* groups, size_t n, const Sum* sum,
                         const Options* options, Clock* clock, Row* rows, Verdict* verdict);
  // Where there are origins, one for each segment, parameters are read from there, and the segment
  // gets what is to be added to them, also where its gradient lies.
  const char* (*sweep)(int rule, const Segment* segments, size_t n, const Row* rows, size_t n_rows,
                       const void* const* origins);
};

}  // namespace fusedstep
