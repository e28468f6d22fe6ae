// Adamax: m as Adam;  u = max(b2*u, |g| + eps);  p -= lr/(1-b1^t) * m/u.
// Kingma & Ba 2015, algorithm 2, arXiv:1412.6980, which has no eps: beside the gradient as in torch;
// eps_norm beside the norm so far, max(b2*u + eps_norm, |g|); eps_divisor in m/(u + eps_divisor).
// Without bias correction 1-b1^t is 1.
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Adamax {
  static constexpr const char* kName = "adamax";
  static constexpr const char* kHypers = "lr beta1 beta2 eps eps_norm eps_divisor bias_correction";
  static constexpr StateList kStates = {{{"exp_avg", Sign::kAny}, {"exp_inf", Sign::kPositive}}};
  static constexpr int kVariants = 1;
  struct Hypers {
    double lr, beta1, beta2, eps, eps_norm, eps_divisor, bias_correction;
  };

  template <class V, int>
  struct Step {
    Average<V> average;
    V beta2, step_size, eps, eps_norm, eps_divisor;

    FN void operator()(V& p, V g, V& m, V& u) const {
      m = average(m, g);
      u = max(fma(beta2, u, eps_norm), abs(g) + eps);
      p = fnma(step_size, m / divisor(m, u), p);
    }
    FN V divisor(const V&, const V& u) const { return u + eps_divisor; }
  };

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    const double bias1 = h.bias_correction != 0 ? 1 - power(h.beta1, clock.t) : 1;
    s = {Average<double>::of(h.beta1), h.beta2, h.lr / bias1, h.eps, h.eps_norm, h.eps_divisor};
    return 0;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
