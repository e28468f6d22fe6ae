// SGD with momentum: b = mu*b + (1-tau)*g, first b = g;  p -= lr*b.
// Polyak 1964; Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html
// Nesterov: p -= lr*(g + mu*b), the look-ahead method after a change of variables.
// The rate may stand in the buffer: b = mu*b + (1-tau)*lr*g;  p -= b, or p -= lr*g + mu*b.
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr const char* kHypers =
      "lr momentum dampening nesterov lr_in_momentum dampen_first";
  static constexpr StateList kStates = {{{"momentum_buffer", Sign::kAny}}};
  enum Variant { kPlain, kMomentum, kNesterov, kVariants };
  struct Hypers {
    double lr, momentum, dampening, nesterov, lr_in_momentum, dampen_first;
  };

  template <class V, int kVariant>
  struct Step {
    static constexpr StateMask kMask = kVariant != kPlain ? 1 : 0;
    V lr, mu, keep, take, into_buffer;

    FN void operator()(V& p, V g, V& b) const {
      V d = g;
      if constexpr (kVariant != kPlain) d = b = fma(take, g, keep * b);
      if constexpr (kVariant == kNesterov) d = fma(mu, b, into_buffer * g);
      p = fnma(lr, d, p);
    }
  };

  FN static StateMask states(const Hypers& h) { return h.momentum != 0 ? 1 : 0; }

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    const bool first = clock.carry[0] == 0;  // of the buffer, which may come later than t = 1
    const bool within = h.lr_in_momentum != 0 && h.momentum != 0;
    const double rate = within ? h.lr : 1;
    s = {within ? 1 : h.lr, h.momentum, first ? 0 : h.momentum,
         first && h.dampen_first == 0 ? rate : rate * (1 - h.dampening), rate};
    if (h.momentum == 0) return kPlain;
    clock.carry[0] = 1;
    return h.nesterov != 0 ? kNesterov : kMomentum;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
