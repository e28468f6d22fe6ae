// Nesterov's look-ahead: p -= lr*mu*b, where momentum b alone would take p. The buffer b comes as the
// gradient. Nesterov 1983; Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct LookAhead {
  static constexpr const char* kName = "lookahead";
  static constexpr const char* kHypers = "lr momentum";
  static constexpr StateList kStates = {};
  static constexpr int kVariants = 1;
  struct Hypers {
    double lr, momentum;
  };

  template <class V, int>
  struct Step {
    V reach;

    FN void operator()(V& p, V b) const { p = fnma(reach, b, p); }
  };

  FN static int prepare(const Hypers& h, Clock&, Step<double, 0>& s) {
    s = {h.lr * h.momentum};
    return 0;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
