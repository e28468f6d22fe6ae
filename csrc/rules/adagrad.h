// Adagrad: s += g^2;  p -= clr*g / (sqrt(s + eps_root) + eps),  clr = lr / (1 + (t-1)*lr_decay).
// Duchi, Hazan, Singer 2011, https://jmlr.org/papers/v12/duchi11a.html
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Adagrad {
  static constexpr const char* kName = "adagrad";
  static constexpr const char* kHypers = "lr lr_decay eps eps_root";
  static constexpr StateList kStates = {{{"sum", Sign::kPositive}}};
  static constexpr int kVariants = 1;
  struct Hypers {
    double lr, lr_decay, eps, eps_root;
  };

  template <class V, int>
  struct Step {
    V clr, eps, eps_root, slowdown;

    FN void operator()(V& p, V g, V& s) const {
      s = fma(g, g, s);
      p = fnma(clr, g / root(s), p);
    }
    FN V root(const V& s) const { return sqrt(s + eps_root) + eps; }
    FN V divisor(const V& s) const { return slowdown * root(s); }  // clr is lr / slowdown
  };

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    const double slowdown = 1 + static_cast<double>(clock.t - 1) * h.lr_decay;
    s = {h.lr / slowdown, h.eps, h.eps_root, slowdown};
    return 0;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
