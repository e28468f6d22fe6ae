// Every rule, variant and type, compiled once for the instruction set that FUSEDSTEP_TARGET names.
#include "interface/kernels.h"

#include "squares.h"
#include "sweep.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {
namespace {

template <class Rule, int kVariant, int kDecay, int kPair = 0>
constexpr void add_types(Kernel (&kernels)[kPairs]) {
  kernels[kPair] = sweep<Rule, kVariant, kDecay, kPair>;
  if constexpr (kPair + 1 < kPairs) add_types<Rule, kVariant, kDecay, kPair + 1>(kernels);
}

template <class Rule, int kVariant = 0>
constexpr void add_variants(Kernel (&kernels)[kMaxVariants][kDecays][kPairs]) {
  static_assert(Rule::kVariants <= kMaxVariants, "kernels.h sizes its table by kMaxVariants");
  add_types<Rule, kVariant, kScaled>(kernels[kVariant][kScaled]);
  add_types<Rule, kVariant, kCoupled>(kernels[kVariant][kCoupled]);
  if constexpr (kVariant + 1 < Rule::kVariants) add_variants<Rule, kVariant + 1>(kernels);
}

template <int kType = 0>
constexpr void add_squares(Squares (&table)[kDTypes]) {
  table[kType] = squares<typename Storage<static_cast<DType>(kType)>::type>;
  if constexpr (kType + 1 < kDTypes) add_squares<kType + 1>(table);
}

template <class... Rule>
constexpr Kernels make(List<Rule...>) {
  Kernels kernels = {};
  int rule = 0;
  (add_variants<Rule>(kernels.find[rule++]), ...);
  add_squares(kernels.squares);
  kernels.lanes = F32::kWidth;
  return kernels;
}

}  // namespace

// Constant-initialized: loading the library runs no code of this set.
extern const Kernels kernels;
constexpr Kernels kernels = make(Registry{});

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
