// In place of csrc/rules/registry.h: rules with the most states and with none. See test_rules.py.
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// Sums of sums of the gradients.
struct Four {
  static constexpr const char* kName = "four";
  static constexpr const char* kHypers = "lr";
  static constexpr StateList kStates = {{{"first", Sign::kAny},
                                         {"second", Sign::kAny},
                                         {"third", Sign::kAny},
                                         {"fourth", Sign::kAny}}};
  static constexpr int kVariants = 1;
  struct Hypers {
    double lr;
  };

  template <class V, int>
  struct Step {
    V lr;

    FN void operator()(V& p, V g, V& a, V& b, V& c, V& d) const {
      a = a + g;
      b = b + a;
      c = c + b;
      d = d + c;
      p = fnma(lr, d, p);
    }
    FN V divisor(const V& a, const V& b, const V& c, const V& d) const { return a + b + c + d; }
  };

  FN static int prepare(const Hypers& h, Clock&, Step<double, 0>& s) {
    s = {h.lr};
    return 0;
  }
};

// Plain descent.
struct None {
  static constexpr const char* kName = "none";
  static constexpr const char* kHypers = "lr";
  static constexpr StateList kStates = {};
  static constexpr int kVariants = 1;
  struct Hypers {
    double lr;
  };

  template <class V, int>
  struct Step {
    V lr;

    FN void operator()(V& p, V g) const { p = fnma(lr, g, p); }
    FN V divisor() const { return V(1); }
  };

  FN static int prepare(const Hypers& h, Clock&, Step<double, 0>& s) {
    s = {h.lr};
    return 0;
  }
};

using Registry = List<Four, None>;

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
