// The loop that every rule shares: read each stream once, update, write each changed stream once.
#pragma once

#include "update.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <class Rule, int kVariant, int kDecay, int kPair>
void sweep(const Segment& segment, int64_t begin, int64_t end) {
  using V = typename Types<kPair>::V;
  using P = typename Types<kPair>::Param;
  using G = typename Types<kPair>::Grad;
  using S = typename Types<kPair>::State;
  using Step = typename Rule::template Step<V, kVariant>;
  constexpr int kStates = Step::kStates;

  const Step step = broadcast<Step, V, S>(segment.scalars + 2);
  const V factor(static_cast<S>(segment.scalars[0])), decay(static_cast<S>(segment.scalars[1]));
  P* param = static_cast<P*>(segment.param);
  const G* grad = static_cast<const G*>(segment.grad);
  S* state[kRoom<Step>];
  for (int i = 0; i < kStates; ++i) state[i] = static_cast<S*>(segment.state[i]);

  int64_t at = begin;
  for (; at + V::kWidth <= end; at += V::kWidth) {
    S* here[kRoom<Step>];
    for (int i = 0; i < kStates; ++i) here[i] = has_state<Step>(i) ? state[i] + at : nullptr;
    update<kDecay>(step, factor, decay, param + at, grad + at, here);
  }
  if (at == end) return;

  // The tail goes through the same update on padded copies.
  const int64_t rest = end - at;
  P tail_param[V::kWidth] = {};
  G tail_grad[V::kWidth] = {};
  S tail_state[kRoom<Step>][V::kWidth] = {};
  S* here[kRoom<Step>];
  __builtin_memcpy(tail_param, param + at, rest * sizeof(P));
  __builtin_memcpy(tail_grad, grad + at, rest * sizeof(G));
  for (int i = 0; i < kStates; ++i) {
    here[i] = tail_state[i];
    if (has_state<Step>(i)) __builtin_memcpy(tail_state[i], state[i] + at, rest * sizeof(S));
  }
  update<kDecay>(step, factor, decay, tail_param, tail_grad, here);
  __builtin_memcpy(param + at, tail_param, rest * sizeof(P));
  for (int i = 0; i < kStates; ++i) {
    if (has_state<Step>(i)) __builtin_memcpy(state[i] + at, tail_state[i], rest * sizeof(S));
  }
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
