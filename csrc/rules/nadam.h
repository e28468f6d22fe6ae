// NAdam: m, v as Adam;  mu_t = b1*(1 - 0.96^(t*psi)/2);  P_t = mu_1 * ... * mu_t;
//        d = sqrt(v/(1-b2^t) + eps_root) + eps;
//        p -= lr*(1-mu_t)/(1-P_t) * g/d + lr*mu_(t+1)/(1-P_t*mu_(t+1)) * m/d.
// Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct NAdam {
  static constexpr const char* kName = "nadam";
  static constexpr const char* kHypers = "lr beta1 beta2 eps momentum_decay eps_root";
  static constexpr StateList kStates = {{{"exp_avg", Sign::kAny}, {"exp_avg_sq", Sign::kPositive}}};
  static constexpr int kVariants = 1;
  struct Hypers {
    double lr, beta1, beta2, eps, momentum_decay, eps_root;
  };

  template <class V, int>
  struct Step {
    Average<V> average;
    SquareAverage<V> square_average;
    V rsqrt_bias2, eps, eps_root, grad_size, mean_size;

    FN void operator()(V& p, V g, V& m, V& v) const {
      m = average(m, g);
      v = square_average(v, g);
      const V direction = fma(grad_size, g, mean_size * m);
      p = p - direction / divisor(m, v);
    }
    FN V divisor(const V&, const V& v) const { return fma(sqrt(v + eps_root), rsqrt_bias2, eps); }
  };

  FN static int prepare(const Hypers& h, Clock& clock, Step<double, 0>& s) {
    const auto mu = [&](int64_t t) {
      return h.beta1 * (1 - 0.5 * power(0.96, static_cast<double>(t) * h.momentum_decay));
    };
    double& mu_product = clock.carry[0];
    const double bias2 = 1 - power(h.beta2, clock.t);
    const double mu_now = mu(clock.t), mu_next = mu(clock.t + 1);
    mu_product = clock.t == 1 ? mu_now : mu_product * mu_now;
    s = {Average<double>::of(h.beta1),
         SquareAverage<double>::of(h.beta2),
         1 / __builtin_sqrt(bias2),
         h.eps,
         h.eps_root * bias2,
         h.lr * (1 - mu_now) / (1 - mu_product),
         h.lr * mu_next / (1 - mu_product * mu_next)};
    return 0;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
