// What several rules share. A rule is a struct with
//   kName, kHypers    its name and its hyperparameters, as Python calls them
//   kStates           its states, up to kMaxStates, named as in torch's state_dict
//   Hypers            the hyperparameters as doubles, in the order of kHypers
//   Step<V, variant>  the per-step scalars, all V; the equation, over all states; and kMask, the
//                     states that the variant has, where it lacks some. V is a register on a CPU,
//                     one lane in CUDA, double on the host
//   divisor           in Step, of the states, where the rule divides: what it divides by, for the
//                     whole of lr; convergence.safe_lr asks for it
//   states            which states there are under some hyperparameters; not needed where all
//                     variants have the same
//   kExact, exact     why some states cannot be kept in a narrower format than the step computes in,
//                     and which those are under some hyperparameters; where there are such
//   prepare           computes the scalars of update number clock.t and picks the variant, of those
//                     with these states
// Weight decay and the gradient's factor come before every rule, so the sweep applies them.
#pragma once

#include "interface/clock.h"
#include "interface/kernels.h"
#include "isa/isa.h"
#include "power.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

FN constexpr int count(const StateList& states) {
  int n = 0;
  while (n < kMaxStates && states.state[n].name) ++n;
  return n;
}
FN constexpr bool has(StateMask mask, int state) { return mask >> state & 1; }

// The states that a variant has: its kMask, or all of the rule's.
template <class Rule, class Step>
FN constexpr auto mask_of(int) -> decltype(Step::kMask) {
  static_assert(Step::kMask >> count(Rule::kStates) == 0, "kMask: states that the rule has");
  return Step::kMask;
}
template <class Rule, class Step>
FN constexpr StateMask mask_of(long) {
  return (1u << count(Rule::kStates)) - 1;
}

template <class... Rule>
struct List {
  static constexpr int kSize = sizeof...(Rule);
};

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
