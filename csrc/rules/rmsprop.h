// RMSprop: v = a*v + (1-a)*g^2;  d = sqrt(v) + eps;  p -= lr*g/d.
// Tieleman & Hinton 2012, lecture 6.5,
// https://www.cs.toronto.edu/~hinton/coursera/lecture6/lec6.pdf
// Centered: m = a*m + (1-a)*g;  d = sqrt(v - m^2) + eps. Graves 2013, eq. 38-41, arXiv:1308.0850
// Momentum: b = mu*b + g/d;  p -= lr*b.
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct RmsProp {
  static constexpr const char* kName = "rmsprop";
  static constexpr const char* kHypers = "lr alpha eps momentum centered";
  static constexpr StateList kStates = {
      {{"square_avg", Sign::kPositive}, {"momentum_buffer", Sign::kAny}, {"grad_avg", Sign::kAny}}};
  static constexpr const char* kExact =
      "centered: square_avg - grad_avg^2 is a small difference of large numbers";
  enum Option { kMomentum = 1, kCentered = 2, kVariants = 4 };
  struct Hypers {
    double lr, alpha, eps, momentum, centered;
  };

  template <class V, int kVariant>
  struct Step {
    static constexpr StateMask kMask = 1 | kVariant
                                               << 1;  // the options are the bits of their states
    V lr, eps, mu;
    SquareAverage<V> square_average;
    Average<V> average;

    FN void operator()(V& p, V g, V& v, V& b, V& m) const {
      v = square_average(v, g);
      if constexpr (kVariant & kCentered) m = average(m, g);
      V d = g / divisor(v, b, m);
      if constexpr (kVariant & kMomentum) d = b = fma(mu, b, d);
      p = fnma(lr, d, p);
    }
    FN V divisor(const V& v, const V&, const V& m) const {
      V variance = v;
      // Rounding may leave v just below m^2: 0, not NaN.
      if constexpr (kVariant & kCentered) variance = max(V(0), fnma(m, m, v));
      return sqrt(variance) + eps;
    }
  };

  FN static StateMask states(const Hypers& h) { return 1 | options(h) << 1; }

  FN static StateMask exact(const Hypers& h) { return h.centered != 0 ? 5 : 0; }

  FN static int prepare(const Hypers& h, Clock&, Step<double, 0>& s) {
    s = {h.lr, h.eps, h.momentum, SquareAverage<double>::of(h.alpha), Average<double>::of(h.alpha)};
    return static_cast<int>(options(h));
  }

 private:
  FN static StateMask options(const Hypers& h) {
    return (h.momentum != 0 ? kMomentum : 0) | (h.centered != 0 ? kCentered : 0);
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
