// Every rule, variant and shape, and every format, compiled once for the instruction set that
// FUSEDSTEP_TARGET names.
#include "interface/kernels.h"

#include "squares.h"
#include "sweep.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

extern const Kernels kernels;

namespace {

// A scalar set that stages all but the two shapes that computing needs has a third of the code.
constexpr int kCompiled = F32::kWidth == 1 ? 2 : kShapes;

template <class Rule, int kVariant, int kShape = 0>
constexpr void add_shapes(RuleKernels& rule) {
  // Without states their formats make no difference.
  constexpr bool kSame = kShapeList[kShape].state != Format::kF32 && kShape > 1 &&
                         mask_of<Rule, typename Rule::template Step<F32, kVariant>>(0) == 0;
  if constexpr (!kSame) rule.update[kVariant][kShape] = update<Rule, kVariant, kShape>;
  if constexpr (kShape + 1 < kCompiled) add_shapes<Rule, kVariant, kShape + 1>(rule);
}

template <class Rule, int kVariant = 0>
constexpr void add_variants(RuleKernels& rule) {
  static_assert(Rule::kVariants <= kMaxVariants, "interface/kernels.h: kMaxVariants");
  add_shapes<Rule, kVariant>(rule);
  rule.mask[kVariant] = mask_of<Rule, typename Rule::template Step<F32, kVariant>>(0);
  if constexpr (kVariant + 1 < Rule::kVariants) add_variants<Rule, kVariant + 1>(rule);
}

template <int kNumber = 1>
constexpr void add_formats(Kernels& all) {
  constexpr auto kFormat = static_cast<Format>(kNumber);
  all.codec[kNumber][0] = {decode<kFormat, float>, encode<kFormat, float>};
  all.codec[kNumber][1] = {decode<kFormat, double>, encode<kFormat, double>};
  if constexpr (kNumber < kArrayFormats) {
    all.squares[kNumber][0] = squares<kFormat, F32>;
    all.squares[kNumber][1] = squares<kFormat, typename In<kFormat>::Register>;
  }
  if constexpr (kNumber + 1 < kFormats) add_formats<kNumber + 1>(all);
}

struct Rules {
  RuleKernels rule[Registry::kSize];
};

template <class... Rule>
constexpr Rules make_rules(List<Rule...>) {
  Rules all = {};
  int number = 0;
  (add_variants<Rule>(all.rule[number++]), ...);
  return all;
}
constexpr Rules rules = make_rules(Registry{});

void sweep_any(int rule, const Segment& segment, const Row& row, int64_t begin, int64_t end) {
  sweep(kernels, rule, segment, row, begin, end);
}

constexpr Kernels make() {
  Kernels all = {};
  all.rules = rules.rule;
  all.sweep = sweep_any;
  add_formats(all);
  all.lanes = F32::kWidth;
  return all;
}

}  // namespace

// Constant-initialized: loading the library runs no code of this set.
constexpr Kernels kernels = make();

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
