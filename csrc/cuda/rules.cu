// Every rule, variant and type as a CUDA kernel, one element per thread: the proof that the rule
// headers compile for a GPU as they are. CI compiles this file; the wheel does not contain it.
#define FUSEDSTEP_TARGET cuda
#include "../update.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {
namespace {

template <class Rule, int kVariant, int kDecay, int kPair>
__global__ void sweep(Segment segment) {
  using V = typename Types<kPair>::V;
  using P = typename Types<kPair>::Param;
  using G = typename Types<kPair>::Grad;
  using S = typename Types<kPair>::State;
  using Step = typename Rule::template Step<V, kVariant>;
  constexpr int kStates = Step::kStates;
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= segment.n) return;
  const Step step = broadcast<Step, V, S>(segment.scalars + 2);
  const V factor(static_cast<S>(segment.scalars[0])), decay(static_cast<S>(segment.scalars[1]));
  S* state[kStates];
  for (int i = 0; i < kStates; ++i) {
    state[i] = has_state<Step>(i) ? static_cast<S*>(segment.state[i]) + at : nullptr;
  }
  update<kDecay>(step, factor, decay, static_cast<P*>(segment.param) + at,
                 static_cast<const G*>(segment.grad) + at, state);
}

template <class Rule, int kVariant, int kDecay, int kPair = 0>
void launch_types(const Segment& segment) {
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>((segment.n + kThreads - 1) / kThreads);
  sweep<Rule, kVariant, kDecay, kPair><<<blocks, kThreads>>>(segment);
  if constexpr (kPair + 1 < kPairs) launch_types<Rule, kVariant, kDecay, kPair + 1>(segment);
}

template <class Rule, int kVariant = 0>
void launch_variants(const Segment& segment) {
  launch_types<Rule, kVariant, kScaled>(segment);
  launch_types<Rule, kVariant, kCoupled>(segment);
  if constexpr (kVariant + 1 < Rule::kVariants) launch_variants<Rule, kVariant + 1>(segment);
}

template <class... Rule>
void launch_all(List<Rule...>, const Segment& segment) {
  (launch_variants<Rule>(segment), ...);
}

}  // namespace

// Nothing calls it; it makes the compiler instantiate every kernel.
void compile_all(const Segment& segment) { launch_all(Registry{}, segment); }

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
