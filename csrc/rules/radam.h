// RAdam: m, v as Adam;  rinf = 2/(1-b2) - 1;  r_t = rinf - 2t*b2^t/(1-b2^t);
//        r_t > threshold: p -= lr/(1-b1^t) * r*sqrt(1-b2^t) * m/(sqrt(v)+eps),
//                         r = sqrt((r_t-4)(r_t-2)rinf / ((rinf-4)(rinf-2)r_t));
//        else:            p -= lr/(1-b1^t) * m.
// Without eps_hat the first is lr/(1-b1^t) * r * m/(sqrt(v/(1-b2^t) + eps_root) + eps).
// Liu et al. 2020, algorithm 2, arXiv:1908.03265
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct RAdam {
  static constexpr const char* kName = "radam";
  static constexpr const char* kHypers = "lr beta1 beta2 eps eps_root eps_hat threshold";
  static constexpr StateList kStates = {{{"exp_avg", Sign::kAny}, {"exp_avg_sq", Sign::kPositive}}};
  enum Variant { kUnrectified, kRectified, kVariants };
  struct Hypers {
    double lr, beta1, beta2, eps, eps_root, eps_hat, threshold;
  };

  template <class V, int kVariant>
  struct Step {
    Average<V> average;
    SquareAverage<V> square_average;
    V step_size, eps, eps_root, rectifier;

    FN void operator()(V& p, V g, V& m, V& v) const {
      m = average(m, g);
      v = square_average(v, g);
      V direction = m;
      if constexpr (kVariant == kRectified) direction = m / root(v);
      p = fnma(step_size, direction, p);
    }
    FN V root(const V& v) const { return sqrt(v + eps_root) + eps; }
    FN V divisor(const V&, const V& v) const {  // step_size has the rectifier
      return kVariant == kRectified ? root(v) / rectifier : V(1);
    }
  };

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    const double t = static_cast<double>(clock.t), beta2_t = power(h.beta2, clock.t);
    const double r_inf = 2 / (1 - h.beta2) - 1, r_t = r_inf - 2 * t * beta2_t / (1 - beta2_t);
    double step_size = h.lr / (1 - power(h.beta1, clock.t)), rectifier = 1;
    const bool rectified = r_t > h.threshold;
    if (rectified) {
      rectifier = __builtin_sqrt((r_t - 4) * (r_t - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r_t) *
                                 (1 - beta2_t));
      step_size *= rectifier;
    }
    s = {Average<double>::of(h.beta1),
         SquareAverage<double>::of(h.beta2),
         step_size,
         h.eps_hat != 0 ? h.eps : h.eps * __builtin_sqrt(1 - beta2_t),
         h.eps_root * (1 - beta2_t),
         rectifier};
    return rectified ? kRectified : kUnrectified;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
