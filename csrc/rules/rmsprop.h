// RMSprop: v = a*v + (1-a)*g^2;  d = sqrt(v + eps_root) + eps;  p -= lr*g/d.
// Tieleman & Hinton 2012, lecture 6.5,
// https://www.cs.toronto.edu/~hinton/coursera/lecture6/lec6.pdf
// Centered: m = a*m + (1-a)*g;  v - m^2 for v in d. Graves 2013, eq. 38-41, arXiv:1308.0850
// Bias correction: v/(1-a^t) and m/(1-a^t) in d.
// Momentum: b = mu*b + g/d;  p -= lr*b. Nesterov: p -= lr*(g/d + mu*b).
// The rate may stand in the buffer: b = mu*b + lr*g/d;  p -= b, or p -= lr*g/d + mu*b.
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct RmsProp {
  static constexpr const char* kName = "rmsprop";
  static constexpr const char* kHypers =
      "lr alpha eps momentum centered eps_root bias_correction nesterov lr_in_momentum";
  static constexpr StateList kStates = {
      {{"square_avg", Sign::kPositive}, {"momentum_buffer", Sign::kAny}, {"grad_avg", Sign::kAny}}};
  static constexpr const char* kExact =
      "centered: square_avg - grad_avg^2 is a small difference of large numbers";
  enum Option { kMomentum = 1, kCentered = 2, kVariants = 4 };
  struct Hypers {
    double lr, alpha, eps, momentum, centered, eps_root, bias_correction, nesterov, lr_in_momentum;
  };

  template <class V, int kVariant>
  struct Step {
    static constexpr StateMask kMask = 1 | kVariant
                                               << 1;  // the options are the bits of their states
    V lr, eps, eps_root, debias, mu, into_buffer, nesterov;
    SquareAverage<V> square_average;
    Average<V> average;

    FN void operator()(V& p, V g, V& v, V& b, V& m) const {
      v = square_average(v, g);
      if constexpr (kVariant & kCentered) m = average(m, g);
      V d = g / root(v, m);
      if constexpr (kVariant & kMomentum) {
        d = into_buffer * d;
        b = fma(mu, b, d);
        d = select_gt(nesterov, V(0), fma(mu, b, d), b);
      }
      p = fnma(lr, d, p);
    }
    FN V divisor(const V& v, const V&, const V& m) const { return sqrt(debias) * root(v, m); }

   private:
    FN V root(const V& v, const V& m) const {
      V variance = v + eps_root;
      // Rounding may leave v just below m^2: 0, not NaN.
      if constexpr (kVariant & kCentered) variance = max(eps_root, fnma(debias * m, m, variance));
      return sqrt(variance) + eps;
    }
  };

  FN static StateMask states(const Hypers& h) { return 1 | options(h) << 1; }

  FN static StateMask exact(const Hypers& h) { return h.centered != 0 ? 5 : 0; }

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    // sqrt(v/left + eps_root) + eps = (sqrt(v + eps_root*left) + eps*sqrt(left)) / sqrt(left)
    const double left = h.bias_correction != 0 ? 1 - power(h.alpha, clock.t) : 1;
    const double bias = __builtin_sqrt(left);
    const bool buffered = h.momentum != 0, within = buffered && h.lr_in_momentum != 0;
    s = {within     ? 1
         : buffered ? h.lr
                    : h.lr * bias,
         h.eps * bias,
         h.eps_root * left,
         1 / left,
         h.momentum,
         within ? h.lr * bias : bias,
         h.nesterov,
         SquareAverage<double>::of(h.alpha),
         Average<double>::of(h.alpha)};
    return static_cast<int>(options(h));
  }

 private:
  FN static StateMask options(const Hypers& h) {
    return (h.momentum != 0 ? kMomentum : 0) | (h.centered != 0 ? kCentered : 0);
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
