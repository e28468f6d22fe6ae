// Every rule, variant and type as a CUDA kernel, one element per thread: the proof that the rule
// headers compile for a GPU as they are. CI compiles this file; the wheel does not contain it.
#define FUSEDSTEP_TARGET cuda
#include "../update.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {
namespace {

template <class Step, int kDecay, class P, class G>
__global__ void sweep(Segment segment) {
  using V = typename Types<P>::V;
  using S = typename Types<P>::State;
  constexpr int kStates = Step::kStates;
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= segment.n) return;
  const Step step = broadcast<Step, V, S>(segment.scalars + 2);
  const V factor(static_cast<S>(segment.scalars[0])), decay(static_cast<S>(segment.scalars[1]));
  S* state[kStates];
  for (int i = 0; i < kStates; ++i) state[i] = static_cast<S*>(segment.state[i]) + at;
  update<kDecay>(step, factor, decay, static_cast<P*>(segment.param) + at,
                 static_cast<const G*>(segment.grad) + at, state);
}

template <class Step, int kDecay, class P, class G>
void launch(const Segment& segment) {
  constexpr int kThreads = 256;
  const auto blocks = static_cast<unsigned>((segment.n + kThreads - 1) / kThreads);
  sweep<Step, kDecay, P, G><<<blocks, kThreads>>>(segment);
}

template <class Rule, int kVariant, int kDecay>
void launch_types(const Segment& segment) {
  using Single = typename Rule::template Step<F32, kVariant>;
  using Double = typename Rule::template Step<F64, kVariant>;
  launch<Single, kDecay, float, float>(segment);
  launch<Double, kDecay, double, double>(segment);
  launch<Single, kDecay, bf16, bf16>(segment);
  launch<Single, kDecay, f16, f16>(segment);
  launch<Single, kDecay, float, bf16>(segment);
  launch<Single, kDecay, float, f16>(segment);
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
