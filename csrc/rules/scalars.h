// A step's scalars, all in double: computed on the host, or on a GPU where only it knows the step.
#pragma once

#include "interface/group.h"
#include "interface/options.h"
#include "registry.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <class Rule>
FN typename Rule::Hypers hypers_of(const double* values) {
  typename Rule::Hypers hypers;
  static_assert(sizeof(hypers) / sizeof(double) <= kMaxHypers, "interface/kernels.h: kMaxHypers");
  __builtin_memcpy(&hypers, values, sizeof(hypers));
  return hypers;
}

// A number spread over all 64 bits: the finalizer of SplitMix64 (Steele, Lea & Flood 2014).
FN uint64_t spread(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The row of the update that follows `clock`, which is advanced to it; gradients are multiplied by
// `factor` first.
template <class Rule>
FN Row prepare(const Group& group, Clock& clock, double factor, const Options& options) {
  Row row = {};
  typename Rule::template Step<double, 0> step;
  static_assert(sizeof(step) / sizeof(double) + 2 <= kMaxScalars,
                "interface/kernels.h: kMaxScalars");
  ++clock.t;
  const double lr = group.hypers[0];
  double kept = 1;  // of the parameter; 1 without decay, even where lr is infinite
  row.decay = group.weight_decay != 0 && group.decoupled == kPartOfGradient ? kCoupled : kScaled;
  if (group.weight_decay != 0 && row.decay == kScaled) kept = 1 - lr * group.weight_decay;
  // (p - lr*d)*kept = p*kept - (lr*kept)*d: what comes after shrinks the update too.
  const double rate = group.decoupled == kAfterUpdate ? lr * kept : lr;
  auto hypers = hypers_of<Rule>(group.hypers);
  __builtin_memcpy(&hypers, &rate, sizeof(rate));  // lr is the first
  row.variant = Rule::prepare(hypers, clock, step);
  __builtin_memcpy(row.scalars + 2, &step, sizeof(step));
  row.scalars[0] = group.maximize ? -factor : factor;
  row.scalars[1] = row.decay == kCoupled ? group.weight_decay : kept;
  row.clip = options.clip_value;
  row.ema_decay = options.ema_decay;
  row.zero_grad = options.zero_grad;
  row.key = spread(spread(options.seed) + static_cast<uint64_t>(clock.t));
  return row;
}

// What clips gradients of this norm to max_norm, as torch.nn.utils.clip_grad_norm_ does; a NaN norm
// makes all of them NaN.
FN double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor >= 1 ? 1 : factor;
}

// What becomes of gradients of this sum of squares, which are to be multiplied by `factor`.
FN Verdict judge(double sum, bool nonfinite, bool found_inf, double factor,
                 const Options& options) {
  Verdict verdict = {__builtin_sqrt(sum) * factor, factor, 0};
  verdict.skip = (options.skip_nonfinite && nonfinite) || found_inf;
  if (options.max_norm < __builtin_inf()) {  // inf only measures
    verdict.factor = factor * clip_factor(verdict.norm, options.max_norm);
  }
  return verdict;
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
