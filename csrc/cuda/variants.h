// A rule's variants in a kernel: the row's scalars, the variant that it names, and kernels by number.
#pragma once

#include "kernels/update.h"
#include "launch.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// A thread's elements, each of all streams.
template <class V, int kAll>
using Elements = V[kVector][kAll];

// A row as the kernel computes with it.
template <class Rule, class V>
struct Scalars {
  typename Rule::template Step<V, 0> step;
  V factor, decay;
  int variant;
  bool coupled;

  FN void read(const Row& row, double multiplier) {
    using T = typename V::Scalar;
    step = broadcast<typename Rule::template Step<V, 0>, V>(row.scalars + 2);
    factor = V(static_cast<T>(row.scalars[0] * multiplier));
    decay = V(static_cast<T>(row.scalars[1]));
    variant = row.variant;
    coupled = row.decay == kCoupled;
  }
};

// The variant that the row names, of those with these states.
template <class Rule, StateMask kStates, class V, int kAll, int kVariant = 0>
FN void advance_all(const Scalars<Rule, V>& scalars, Elements<V, kAll>& e) {
  using Step = typename Rule::template Step<V, kVariant>;
  if constexpr (mask_of<Rule, Step>(0) == kStates) {
    if (scalars.variant == kVariant) {
      Step step;
      __builtin_memcpy(reinterpret_cast<char*>(&step), &scalars.step, sizeof(step));
      UNROLL
      for (int i = 0; i < kVector; ++i) {
        advance<Rule>(step, scalars.factor, scalars.decay, scalars.coupled, e[i][kParam],
                      e[i][kGrad], e[i] + kState);
      }
    }
  }
  if constexpr (kVariant + 1 < Rule::kVariants) {
    advance_all<Rule, kStates, V, kAll, kVariant + 1>(scalars, e);
  }
}

// By the rule's number and the states that a step has; null where there is no such variant.
struct SweepKernels {
  SweepKernel kernel[Registry::kSize][1 << kMaxStates];
};

// Outside of functions, as what has it is the host's, and mask_of the device's.
template <class Rule, class Step>
constexpr StateMask kMaskOf = mask_of<Rule, Step>(0);

template <class Kernel, class Rule, class V, int kVariant = 0>
constexpr void add(SweepKernel (&kernels)[1 << kMaxStates]) {
  constexpr StateMask kStates = kMaskOf<Rule, typename Rule::template Step<V, kVariant>>;
  kernels[kStates] = Kernel::template kernel<Rule, kStates, V>;
  if constexpr (kVariant + 1 < Rule::kVariants) add<Kernel, Rule, V, kVariant + 1>(kernels);
}

// The kernels of all rules; Kernel::kernel is the one of a rule and its states in V.
template <class Kernel, class V, class... Rule>
constexpr SweepKernels make(List<Rule...>) {
  SweepKernels all = {};
  int rule = 0;
  (add<Kernel, Rule, V>(all.kernel[rule++]), ...);
  return all;
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
