// Adamax: m as Adam;  u = max(b2*u, |g| + eps);  p -= lr/(1-b1^t) * m/u.
// Kingma & Ba 2015, algorithm 2, arXiv:1412.6980; eps inside the maximum as in torch.
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Adamax {
  static constexpr const char* kName = "adamax";
  static constexpr const char* kHypers = "lr beta1 beta2 eps";
  static constexpr StateList kStates = {{{"exp_avg", Sign::kAny}, {"exp_inf", Sign::kPositive}}};
  static constexpr int kVariants = 1;
  struct Hypers {
    double lr, beta1, beta2, eps;
  };

  template <class V, int>
  struct Step {
    Average<V> average;
    V beta2, step_size, eps;

    FN void operator()(V& p, V g, V& m, V& u) const {
      m = average(m, g);
      u = max(beta2 * u, abs(g) + eps);
      p = fnma(step_size, m / divisor(m, u), p);
    }
    FN V divisor(const V&, const V& u) const { return u; }
  };

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    s = {Average<double>::of(h.beta1), h.beta2, h.lr / (1 - power(h.beta1, clock.t)), h.eps};
    return 0;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
