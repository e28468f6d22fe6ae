// Adagrad: s += g^2;  p -= clr*g / (sqrt(s) + eps),  clr = lr / (1 + (t-1)*lr_decay).
// Duchi, Hazan, Singer 2011, https://jmlr.org/papers/v12/duchi11a.html
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Adagrad {
  static constexpr const char* kName = "adagrad";
  static constexpr const char* kHypers = "lr lr_decay eps";
  static constexpr StateList kStates = {{{"sum", Sign::kPositive}}};
  static constexpr int kVariants = 1;
  struct Hypers {
    double lr, lr_decay, eps;
  };

  template <class V, int>
  struct Step {
    V clr, eps, slowdown;

    FN void operator()(V& p, V g, V& s) const {
      s = fma(g, g, s);
      p = fnma(clr, g / root(s), p);
    }
    FN V root(const V& s) const { return sqrt(s) + eps; }
    FN V divisor(const V& s) const { return slowdown * root(s); }  // clr is lr / slowdown
  };

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    const double slowdown = 1 + static_cast<double>(clock.t - 1) * h.lr_decay;
    s = {h.lr / slowdown, h.eps, slowdown};
    return 0;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
