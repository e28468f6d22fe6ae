// Adam: m = b1*m + (1-b1)*g;  v = b2*v + (1-b2)*g^2;
//       p -= lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps).
// Kingma & Ba 2015, algorithm 1, arXiv:1412.6980. Without bias correction both 1-b^t are 1.
// AMSGrad (Reddi et al. 2018, algorithm 2, arXiv:1904.09237): vmax = max(vmax, v) in place of v.
// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) is this rule under decoupled weight decay.
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr const char* kHypers = "lr beta1 beta2 eps amsgrad bias_correction";
  static constexpr StateList kStates = {{{"exp_avg", Sign::kAny},
                                         {"exp_avg_sq", Sign::kPositive},
                                         {"max_exp_avg_sq", Sign::kPositive}}};
  enum Variant { kPlain, kAmsgrad, kVariants };
  struct Hypers {
    double lr, beta1, beta2, eps, amsgrad, bias_correction;
  };

  template <class V, int kVariant>
  struct Step {
    static constexpr StateMask kMask = 3 | (kVariant == kAmsgrad ? 4 : 0);
    Average<V> average;
    SquareAverage<V> square_average;
    V step_size, rsqrt_bias2, eps;

    FN void operator()(V& p, V g, V& m, V& v, V& vmax) const {
      m = average(m, g);
      v = square_average(v, g);
      if constexpr (kVariant == kAmsgrad) vmax = max(vmax, v);
      p = fnma(step_size, m / divisor(m, v, vmax), p);
    }
    FN V divisor(const V&, const V& v, const V& vmax) const {
      if constexpr (kVariant == kAmsgrad) return fma(sqrt(vmax), rsqrt_bias2, eps);
      return fma(sqrt(v), rsqrt_bias2, eps);
    }
  };

  FN static StateMask states(const Hypers& h) { return h.amsgrad != 0 ? 7 : 3; }

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    const bool correct = h.bias_correction != 0;
    const double bias1 = correct ? 1 - power(h.beta1, clock.t) : 1;
    const double bias2 = correct ? 1 - power(h.beta2, clock.t) : 1;
    s = {Average<double>::of(h.beta1), SquareAverage<double>::of(h.beta2), h.lr / bias1,
         1 / __builtin_sqrt(bias2), h.eps};
    return h.amsgrad != 0 ? kAmsgrad : kPlain;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
