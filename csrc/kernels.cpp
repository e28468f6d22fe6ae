// Every rule, variant and type, compiled once for the instruction set that FUSEDSTEP_TARGET names.
#include "kernels.h"

#include "sweep.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {
namespace {

template <class Step, int kDecay>
constexpr void add_types(Kernel (&kernels)[kPairs]) {
  kernels[0] = sweep<Step, kDecay, float, float>;
  kernels[2] = sweep<Step, kDecay, bf16, bf16>;
  kernels[3] = sweep<Step, kDecay, f16, f16>;
  kernels[4] = sweep<Step, kDecay, float, bf16>;
  kernels[5] = sweep<Step, kDecay, float, f16>;
}

template <class Rule, int kVariant = 0>
constexpr void add_variants(Kernel (&kernels)[kMaxVariants][kDecays][kPairs]) {
  static_assert(Rule::kVariants <= kMaxVariants, "kernels.h sizes its table by kMaxVariants");
  add_types<typename Rule::template Step<F32, kVariant>, kScaled>(kernels[kVariant][kScaled]);
  add_types<typename Rule::template Step<F32, kVariant>, kCoupled>(kernels[kVariant][kCoupled]);
  using Double = typename Rule::template Step<F64, kVariant>;
  kernels[kVariant][kScaled][1] = sweep<Double, kScaled, double, double>;
  kernels[kVariant][kCoupled][1] = sweep<Double, kCoupled, double, double>;
  if constexpr (kVariant + 1 < Rule::kVariants) add_variants<Rule, kVariant + 1>(kernels);
}

template <class... Rule>
constexpr Kernels make(List<Rule...>) {
  Kernels kernels = {};
  int rule = 0;
  (add_variants<Rule>(kernels.find[rule++]), ...);
  kernels.lanes = F32::kWidth;
  return kernels;
}

}  // namespace

// Constant-initialized: loading the library runs no code of this set.
extern const Kernels kernels;
constexpr Kernels kernels = make(Registry{});

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
