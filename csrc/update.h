// One register of every stream through what comes before every rule, and the rule: the whole
// arithmetic of a step, for a CPU's registers and for CUDA's lanes.
#pragma once

#include "rules/registry.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// Compute and state types of a parameter type: double for float64, float for all others.
template <class P>
struct Types {
  using V = F32;
  using State = float;
};
template <>
struct Types<double> {
  using V = F64;
  using State = double;
};

// A rule whose scalars, doubles in memory, are broadcast to registers.
template <class Step, class V, class T>
FN Step broadcast(const double* scalars) {
  Step step;
  UNROLL
  for (unsigned i = 0; i < sizeof(Step) / sizeof(V); ++i) {
    const V lanes(static_cast<T>(scalars[i]));
    __builtin_memcpy(reinterpret_cast<char*>(&step) + i * sizeof(V), &lanes, sizeof(V));
  }
  return step;
}

template <class Step>
FN constexpr bool has_state(int i) {
  return Step::kHas >> i & 1;
}

// One register of every stream. States that a variant lacks are dead variables.
template <int kDecay, class V, class Step, class P, class G, class S>
FN void update(const Step& step, V factor, V decay, P* param, const G* grad, S* const* state) {
  constexpr int kStates = Step::kStates;
  V p = load<V>(param), g = load<V>(grad) * factor, s[kStates];
  UNROLL
  for (int i = 0; i < kStates; ++i) {
    if (has_state<Step>(i)) s[i] = load<V>(state[i]);
  }
  if constexpr (kDecay == kCoupled) {
    g = fma(decay, p, g);
  } else {
    p = decay * p;
  }
  if constexpr (kStates == 1) step(p, g, s[0]);
  if constexpr (kStates == 2) step(p, g, s[0], s[1]);
  if constexpr (kStates == 3) step(p, g, s[0], s[1], s[2]);
  store(param, p);
  UNROLL
  for (int i = 0; i < kStates; ++i) {
    if (has_state<Step>(i)) store(state[i], s[i]);
  }
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
