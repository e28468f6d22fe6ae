// Adam: m = b1*m + (1-b1)*g;  v = b2*v + (1-b2)*g^2;
//       p -= lr/(1-b1^t) * m / (sqrt(v/(1-b2^t) + eps_root) + eps).
// Kingma & Ba 2015, algorithm 1, arXiv:1412.6980. Without bias correction both 1-b^t are 1.
// With eps_hat the denominator is (sqrt(v) + eps)/sqrt(1-b2^t), as at the end of its section 2.
// With b1 = 0 there is no m: it is the gradient. An m that begins later begins as the gradient.
// AMSGrad (Reddi et al. 2018, algorithm 2, arXiv:1904.09237): vmax = max(vmax, v) in place of v;
// or, with amsgrad_corrected, vmax = max(vmax, v/(1-b2^t)) in place of v/(1-b2^t).
// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) is this rule under decoupled weight decay.
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr const char* kHypers =
      "lr beta1 beta2 eps amsgrad bias_correction eps_root eps_hat amsgrad_corrected";
  static constexpr StateList kStates = {{{"exp_avg", Sign::kAny},
                                         {"exp_avg_sq", Sign::kPositive},
                                         {"max_exp_avg_sq", Sign::kPositive}}};
  enum Option { kAmsgrad = 1, kNoAverage = 2, kVariants = 4 };
  struct Hypers {
    double lr, beta1, beta2, eps, amsgrad, bias_correction, eps_root, eps_hat, amsgrad_corrected;
  };

  template <class V, int kVariant>
  struct Step {
    static constexpr StateMask kMask =
        (kVariant & kNoAverage ? 2 : 3) | (kVariant & kAmsgrad ? 4 : 0);
    Average<V> average;
    SquareAverage<V> square_average;
    V step_size, rsqrt_bias2, eps, eps_root, debias;

    FN void operator()(V& p, V g, V& m, V& v, V& vmax) const {
      if constexpr (kVariant & kNoAverage) {
        m = g;
      } else {
        m = average(m, g);
      }
      v = square_average(v, g);
      if constexpr (kVariant & kAmsgrad) vmax = max(vmax, debias * v);
      p = fnma(step_size, m / divisor(m, v, vmax), p);
    }
    FN V divisor(const V&, const V& v, const V& vmax) const {
      if constexpr (kVariant & kAmsgrad) return fma(sqrt(vmax + eps_root), rsqrt_bias2, eps);
      return fma(sqrt(v + eps_root), rsqrt_bias2, eps);
    }
  };

  FN static StateMask states(const Hypers& h) {
    return (h.beta1 != 0 ? 1 : 0) | 2 | (h.amsgrad != 0 ? 4 : 0);
  }

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    const bool correct = h.bias_correction != 0;
    const double bias1 = correct ? 1 - power(h.beta1, clock.t) : 1;
    const double bias2 = correct ? 1 - power(h.beta2, clock.t) : 1;
    const bool begins = clock.t > 1 && clock.carry[1] != 0;
    clock.carry[1] = h.beta1 == 0;  // whether there is no m so far
    // What is left to correct in the denominator.
    const bool corrected = h.amsgrad != 0 && h.amsgrad_corrected != 0;
    const double left = corrected ? 1 : bias2;
    s = {Average<double>::of(begins ? 0 : h.beta1),
         SquareAverage<double>::of(h.beta2),
         h.lr / bias1,
         1 / __builtin_sqrt(left),
         h.eps_hat != 0 ? h.eps / __builtin_sqrt(bias2) : h.eps,
         h.eps_root * left,
         corrected ? 1 / bias2 : 1};
    return (h.amsgrad != 0 ? kAmsgrad : 0) | (h.beta1 != 0 ? 0 : kNoAverage);
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
