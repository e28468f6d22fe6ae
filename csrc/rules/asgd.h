// Averaged SGD: p *= 1 - lambd*eta;  p -= eta*g;  ax += mu*(p - ax), or ax = p while mu is 1;
//               then eta = lr/(1 + lambd*lr*t)^alpha, mu = 1/max(1, t - t0) for the next step.
// Polyak & Juditsky 1992, doi:10.1137/0330046
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Asgd {
  static constexpr const char* kName = "asgd";
  static constexpr const char* kHypers = "lr lambd alpha t0";
  static constexpr StateList kStates = {{{"ax", Sign::kAny}}};
  static constexpr const char* kExact = "ax averages parameters by ever smaller steps";
  enum Variant { kAveraging, kCopying, kVariants };
  struct Hypers {
    double lr, lambd, alpha, t0;
  };

  template <class V, int kVariant>
  struct Step {
    V eta, keep, mu;

    FN void operator()(V& p, V g, V& ax) const {
      p = fnma(eta, g, keep * p);
      if constexpr (kVariant == kCopying) {
        ax = p;
      } else {
        ax = fma(mu, p - ax, ax);
      }
    }
  };

  FN static StateMask exact(const Hypers&) { return 1; }

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    double &eta = clock.carry[0], &mu = clock.carry[1];
    const double t = static_cast<double>(clock.t);
    if (clock.t == 1) eta = h.lr, mu = 1;
    s = {eta, 1 - h.lambd * eta, mu};
    const bool copying = mu == 1;
    eta = h.lr / power(1 + h.lambd * h.lr * t, h.alpha);
    mu = 1 / (t - h.t0 > 1 ? t - h.t0 : 1);
    return copying ? kCopying : kAveraging;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
