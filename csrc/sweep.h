// The loop that every rule shares: read each stream once, update, write each changed stream once.
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

// The overloads of lanes.h at this set's widths; fp16 is the set's own.
FN F32 load(const float* from) { return load_lanes<float, F32::kWidth>(from); }
FN F64 load(const double* from) { return load_lanes<double, F64::kWidth>(from); }
FN F32 load(const bf16* from) { return widen<F32::kWidth>(from); }

// A rule whose scalars, doubles in memory, are broadcast to registers.
template <class Step, class V, class T>
FN Step broadcast(const double* scalars) {
  Step step;
#pragma GCC unroll 16
  for (unsigned i = 0; i < sizeof(Step) / sizeof(V); ++i) {
    const V lanes(static_cast<T>(scalars[i]));
    __builtin_memcpy(reinterpret_cast<char*>(&step) + i * sizeof(V), &lanes, sizeof(V));
  }
  return step;
}

// One register of every stream. States that a variant lacks are dead variables.
template <int kDecay, class V, class Step, class P, class G, class S>
FN void update(const Step& step, V factor, V decay, P* param, const G* grad, S* const* state) {
  constexpr int kStates = sizeof(Step::kHas);
  V p = load(param), g = load(grad) * factor, s[kStates];
#pragma GCC unroll 3
  for (int i = 0; i < kStates; ++i) {
    if (Step::kHas[i]) s[i] = load(state[i]);
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
#pragma GCC unroll 3
  for (int i = 0; i < kStates; ++i) {
    if (Step::kHas[i]) store(state[i], s[i]);
  }
}

template <class Step, int kDecay, class P, class G>
void sweep(const Segment& segment, int64_t begin, int64_t end) {
  using V = typename Types<P>::V;
  using S = typename Types<P>::State;
  constexpr int kStates = sizeof(Step::kHas);

  const Step step = broadcast<Step, V, S>(segment.scalars + 2);
  const V factor(static_cast<S>(segment.scalars[0])), decay(static_cast<S>(segment.scalars[1]));
  P* param = static_cast<P*>(segment.param);
  const G* grad = static_cast<const G*>(segment.grad);
  S* state[kStates];
  for (int i = 0; i < kStates; ++i) state[i] = static_cast<S*>(segment.state[i]);

  int64_t at = begin;
  for (; at + V::kWidth <= end; at += V::kWidth) {
    S* here[kStates];
    for (int i = 0; i < kStates; ++i) here[i] = state[i] + at;
    update<kDecay>(step, factor, decay, param + at, grad + at, here);
  }
  if (at == end) return;

  // The tail goes through the same update on padded copies.
  const int64_t rest = end - at;
  P tail_param[V::kWidth] = {};
  G tail_grad[V::kWidth] = {};
  S tail_state[kStates][V::kWidth] = {};
  S* here[kStates];
  __builtin_memcpy(tail_param, param + at, rest * sizeof(P));
  __builtin_memcpy(tail_grad, grad + at, rest * sizeof(G));
  for (int i = 0; i < kStates; ++i) {
    here[i] = tail_state[i];
    if (Step::kHas[i]) __builtin_memcpy(tail_state[i], state[i] + at, rest * sizeof(S));
  }
  update<kDecay>(step, factor, decay, tail_param, tail_grad, here);
  __builtin_memcpy(param + at, tail_param, rest * sizeof(P));
  for (int i = 0; i < kStates; ++i) {
    if (Step::kHas[i]) __builtin_memcpy(state[i] + at, tail_state[i], rest * sizeof(S));
  }
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
