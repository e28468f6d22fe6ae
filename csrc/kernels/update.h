// What comes before every rule, and the rule: the whole arithmetic of a step, for a CPU's registers
// and for CUDA's lanes.
#pragma once

#include "formats/formats.h"
#include "rules/registry.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
  constexpr operator int() const { return kValue; }
};

// Calls body(Constant<i>) for i = kNext, ..., kEnd - 1.
template <int kEnd, int kNext = 0, class Body>
FN void each(const Body& body) {
  if constexpr (kNext < kEnd) {
    body(Constant<kNext>());
    each<kEnd, kNext + 1>(body);
  }
}

// The register that a step computes in: of doubles under a float64 parameter, else of floats.
template <Format kParam>
struct Computing {
  using type = F32;
};
template <>
struct Computing<Format::kF64> {
  using type = F64;
};

template <class V>
constexpr bool kDouble = sizeof(V{}.v) / V::kWidth == sizeof(double);

// A rule whose scalars, doubles in memory, are broadcast to registers.
template <class Step, class V>
FN Step broadcast(const double* scalars) {
  using T = typename V::Scalar;
  Step step;
  UNROLL
  for (unsigned i = 0; i < sizeof(Step) / sizeof(V); ++i) {
    const V lanes(static_cast<T>(scalars[i]));
    __builtin_memcpy(reinterpret_cast<char*>(&step) + i * sizeof(V), &lanes, sizeof(V));
  }
  return step;
}

// The equation, on as many states as the rule has.
template <int kStates, class Step, class V, class... State>
FN void apply(const Step& step, V& p, V g, V* states, State&... state) {
  if constexpr (sizeof...(state) < kStates) {
    apply<kStates>(step, p, g, states, state..., states[sizeof...(state)]);
  } else {
    step(p, g, state...);
  }
}

// One register of every stream. States that a rule or variant lacks are dead variables.
template <class Rule, class Step, class V>
FN void advance(const Step& step, V factor, V decay, bool coupled, V& p, V g, V* states) {
  g = g * factor;
  if (coupled) {
    g = fma(decay, p, g);
  } else {
    p = decay * p;
  }
  apply<count(Rule::kStates)>(step, p, g, states);
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
