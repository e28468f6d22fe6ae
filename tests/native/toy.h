// A toy: two averages of the gradient, and the largest of one of its squares.
//   m = b1*m + (1-b1)*g;  n = b2*n + (1-b2)*g;  v = b3*v + (1-b3)*g^2;  w = max(w, v);
//   p -= lr*(m+n) / (sqrt(w)+eps).
// In no paper: tests/test_adding.py adds it, to see what an optimizer takes.
#pragma once

#include "common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct Toy {
  static constexpr const char* kName = "toy";
  static constexpr const char* kHypers = "lr beta1 beta2 beta3 eps";
  static constexpr StateList kStates = {{{"fast", Sign::kAny},
                                         {"slow", Sign::kAny},
                                         {"square", Sign::kPositive},
                                         {"largest", Sign::kPositive}}};
  static constexpr int kVariants = 1;
  struct Hypers {
    double lr, beta1, beta2, beta3, eps;
  };

  template <class V, int>
  struct Step {
    Average<V> fast, slow;
    SquareAverage<V> square;
    V lr, eps;

    FN void operator()(V& p, V g, V& m, V& n, V& v, V& w) const {
      m = fast(m, g);
      n = slow(n, g);
      v = square(v, g);
      w = max(w, v);
      p = fnma(lr, (m + n) / divisor(m, n, v, w), p);
    }
    FN V divisor(const V&, const V&, const V&, const V& w) const { return sqrt(w) + eps; }
  };

  FN static int prepare(const Hypers& h, Clock&, Step<double, 0>& s) {
    s = {Average<double>::of(h.beta1), Average<double>::of(h.beta2),
         SquareAverage<double>::of(h.beta3), h.lr, h.eps};
    return 0;
  }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
