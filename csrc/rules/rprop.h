// Rprop: D grows by eta+ where g keeps its sign and shrinks by eta- where it turns, within its
//        bounds; where it turned, g = 0;  p -= sign(g)*D;  prev = g.  D starts at lr.
// Riedmiller & Braun 1993, doi:10.1109/ICNN.1993.298623 (the variant without weight backtracking)
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Rprop {
  static constexpr const char* kName = "rprop";
  static constexpr const char* kHypers = "lr eta_minus eta_plus step_size_min step_size_max";
  static constexpr StateList kStates = {{{"prev", Sign::kAny}, {"step_size", Sign::kPositive}}};
  static constexpr const char* kExact = "prev's signs and step_size's factors decide on steps";
  enum Variant { kLater, kFirst, kVariants };
  struct Hypers {
    double lr, eta_minus, eta_plus, step_size_min, step_size_max;
  };

  template <class V, int kVariant>
  struct Step {
    V lr, eta_minus, eta_plus, smallest, largest;

    FN void operator()(V& p, V g, V& prev, V& size) const {
      if constexpr (kVariant == kFirst) size = lr;
      const V agreement = g * prev, zero = V(0);
      const V factor =
          select_gt(agreement, zero, eta_plus, select_gt(zero, agreement, eta_minus, V(1)));
      size = min(max(size * factor, smallest), largest);
      prev = select_gt(zero, agreement, zero, g);
      p = fnma(sign(prev), size, p);
    }
  };

  FN static StateMask exact(const Hypers&) { return 3; }

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    s = {h.lr, h.eta_minus, h.eta_plus, h.step_size_min, h.step_size_max};
    return clock.t == 1 ? kFirst : kLater;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
