// One register of every stream through what comes before every rule, and the rule: the whole
// arithmetic of a step, for a CPU's registers and for CUDA's lanes.
#pragma once

#include "rules/registry.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <DType>
struct Storage;
template <>
struct Storage<DType::f32> {
  using type = float;
};
template <>
struct Storage<DType::f64> {
  using type = double;
};
template <>
struct Storage<DType::bf16> {
  using type = bf16;
};
template <>
struct Storage<DType::f16> {
  using type = f16;
};

template <class T>
struct Register {
  using type = F32;
};
template <>
struct Register<double> {
  using type = F64;
};

// One entry of kTypePairs as types. Double is computed in under float64, float under all others.
template <int kPair>
struct Types {
  static constexpr bool kDouble = kTypePairs[kPair].param == DType::f64;
  using Param = typename Storage<kTypePairs[kPair].param>::type;
  using Grad = typename Storage<kTypePairs[kPair].grad>::type;
  using State = typename Storage<kDouble ? DType::f64 : DType::f32>::type;
  using V = typename Register<State>::type;
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

// The length of arrays with an entry for each state: one at least, as there are no empty arrays.
template <class Step>
constexpr int kRoom = Step::kStates > 0 ? Step::kStates : 1;

// The equation, on as many states as the rule has.
template <class Step, class V, class... State>
FN void apply(const Step& step, V& p, V g, V* states, State&... state) {
  if constexpr (sizeof...(state) < Step::kStates) {
    apply(step, p, g, states, state..., states[sizeof...(state)]);
  } else {
    step(p, g, state...);
  }
}

// One register of every stream. States that a rule or variant lacks are dead variables.
template <int kDecay, class V, class Step, class P, class G, class S>
FN void update(const Step& step, V factor, V decay, P* param, const G* grad, S* const* state) {
  constexpr int kStates = Step::kStates;
  static_assert(kStates <= kMaxStates, "kernels.h sizes its tables by kMaxStates");
  V p = load<V>(param), g = load<V>(grad) * factor, s[kRoom<Step>];
  UNROLL
  for (int i = 0; i < kStates; ++i) {
    if (has_state<Step>(i)) s[i] = load<V>(state[i]);
  }
  if constexpr (kDecay == kCoupled) {
    g = fma(decay, p, g);
  } else {
    p = decay * p;
  }
  apply(step, p, g, s);
  store(param, p);
  UNROLL
  for (int i = 0; i < kStates; ++i) {
    if (has_state<Step>(i)) store(state[i], s[i]);
  }
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
