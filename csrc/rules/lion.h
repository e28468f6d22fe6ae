// Lion: p -= lr*sign(b1*m + (1-b1)*g);  m = b2*m + (1-b2)*g;  sign(0) = 0.
// Chen et al. 2023, algorithm 2, arXiv:2302.06675
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr const char* kHypers = "lr beta1 beta2";
  static constexpr StateList kStates = {{{"exp_avg", Sign::kAny}}};
  static constexpr int kVariants = 1;
  struct Hypers {
    double lr, beta1, beta2;
  };

  template <class V, int>
  struct Step {
    V lr;
    Average<V> direction, average;

    FN void operator()(V& p, V g, V& m) const {
      p = fnma(lr, sign(direction(m, g)), p);
      m = average(m, g);
    }
  };

  FN static int prepare(const Hypers& h, Clock&, Step<double, 0>& s) {
    s = {h.lr, Average<double>::of(h.beta1), Average<double>::of(h.beta2)};
    return 0;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
