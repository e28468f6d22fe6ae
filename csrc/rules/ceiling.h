// Not an optimizer: the least that a rule with the same streams can do, one addition per stream
// written. The benchmark measures with it how fast memory lets any such rule run.
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Ceiling {
  static constexpr const char* kName = "ceiling";
  static constexpr const char* kHypers = "states";
  static constexpr StateList kStates = {
      {{"first", Sign::kAny}, {"second", Sign::kAny}, {"third", Sign::kAny}}};
  static constexpr int kVariants = 4;  // the number of states
  struct Hypers {
    double states;
  };

  template <class V, int kVariant>
  struct Step {
    static constexpr StateMask kMask = (1 << kVariant) - 1;
    V nothing;

    FN void operator()(V& p, V g, V& first, V& second, V& third) const {
      p = p + g;
      if constexpr (kVariant > 0) first = first + g;
      if constexpr (kVariant > 1) second = second + g;
      if constexpr (kVariant > 2) third = third + g;
    }
  };

  FN static StateMask states(const Hypers& h) { return (1 << static_cast<int>(h.states)) - 1; }

  FN static int prepare(const Hypers& h, Clock&, Step<double, 0>& s) {
    s = {0};
    return static_cast<int>(h.states);
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
