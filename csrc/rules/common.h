// What several rules share. A rule is a struct with
//   kName, kHypers, kStates  its name, hyperparameters and states, named as in torch's state_dict
//   Hypers                   the hyperparameters as doubles, in the order of kHypers
//   Step<V, variant>         the per-step scalars, all V; kHas, whose bit i says that the variant
//                            has state i; and the equation. V is a register on a CPU, one lane in
//                            CUDA, double on the host
//   divisor                  in Step, of the states, where the rule divides: what it divides by,
//                            for the whole of lr; convergence.safe_lr asks for it
//   variant                  which variant the hyperparameters choose, where they decide on states
//   prepare                  computes the scalars of update number clock.t and picks the variant, of
//                            those with the same states
// Weight decay and the gradient's factor come before every rule, so the sweep applies them.
#pragma once

#include "interface/clock.h"
#include "interface/kernels.h"
#include "isa/isa.h"
#include "power.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <class V>
FN V fnma(V a, V b, V c) {  // c - a*b
  return fma(-a, b, c);
}
template <class V>
FN V max(V a, V b) {  // a > b ? a : b, so a NaN in b stays and a NaN in a goes
  return select_gt(a, b, a, b);
}
template <class V>
FN V min(V a, V b) {
  return select_gt(b, a, a, b);
}
template <class V>
FN V sign(V x) {  // 0 for 0 and, as torch.sign has it, for NaN
  return select_gt(x, V(0), V(1), select_gt(V(0), x, V(-1), V(0)));
}

// The exponential moving average  m = beta*m + (1-beta)*g  without the bias of rounding beta and
// 1-beta apart: m + (1-beta)*(g-m), or for beta <= 1/2, where g-m could lose g, g - beta*(g-m).
template <class V>
struct Average {
  V weight, from_new;

  FN static Average of(double beta) {
    if (beta <= 0.5) return {-beta, 1};
    return {1 - beta, 0};
  }
  FN V operator()(V m, V g) const { return fma(weight, g - m, select_gt(from_new, V(0), g, m)); }
};

// The exponential moving average of g^2:  v = beta*v + (1-beta)*g^2.
template <class V>
struct SquareAverage {
  V beta, one_minus_beta;

  FN static SquareAverage of(double beta) { return {beta, 1 - beta}; }
  FN V operator()(V v, V g) const { return fma(one_minus_beta, g * g, beta * v); }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
