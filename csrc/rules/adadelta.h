// Adadelta: s = rho*s + (1-rho)*g^2;  d = sqrt(a+eps)/sqrt(s+eps) * g;  a = rho*a + (1-rho)*d^2;
//           p -= lr*d.
// Zeiler 2012, algorithm 1, arXiv:1212.5701
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Adadelta {
  static constexpr const char* kName = "adadelta";
  static constexpr const char* kHypers = "lr rho eps";
  static constexpr StateList kStates = {
      {{"square_avg", Sign::kPositive}, {"acc_delta", Sign::kPositive}}};
  static constexpr int kVariants = 1;
  struct Hypers {
    double lr, rho, eps;
  };

  template <class V, int>
  struct Step {
    V lr, eps;
    SquareAverage<V> average;

    FN void operator()(V& p, V g, V& s, V& a) const {
      s = average(s, g);
      const V d = ratio(s, a) * g;
      a = average(a, d);
      p = fnma(lr, d, p);
    }
    FN V ratio(const V& s, const V& a) const { return sqrt(a + eps) / sqrt(s + eps); }
    FN V divisor(const V& s, const V& a) const { return V(1) / ratio(s, a); }
  };

  FN static int prepare(const Hypers& h, Clock&, Step<double, 0>& s) {
    s = {h.lr, h.eps, SquareAverage<double>::of(h.rho)};
    return 0;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
