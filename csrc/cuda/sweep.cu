// The one kernel that every rule shares, for the pair of types that FUSEDSTEP_PAIR names.
#include <cuda_runtime.h>

#define FUSEDSTEP_TARGET cuda
#include "find.h"
#include "kernels/update.h"
#include "launch.h"
#include "vector.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {
namespace {

// This thread's eight elements of a stream's tile, in registers. Whole tiles of aligned streams move
// in 16-byte vectors, kLane elements at a time; others, element by element as far as there are any.
// In both a warp's accesses lie side by side.
template <bool kWhole, int kLane, class T>
FN void fetch(const T* from, int64_t begin, int rest, T (&to)[kPerThread]) {
  if constexpr (kWhole) {
    UNROLL
    for (int i = 0; i < kPerThread; i += kLane) {
      const T* here = from + begin + threadIdx.x * kLane + i * kThreads;
      UNROLL
      for (int k = 0; k < kLane; k += 16 / sizeof(T)) {
        const uint4 vector = load_vector(reinterpret_cast<const uint4*>(here + k));
        __builtin_memcpy(to + i + k, &vector, 16);
      }
    }
  } else {
    const T* here = from + begin + threadIdx.x;
    UNROLL
    for (int i = 0; i < kPerThread; ++i) to[i] = i * kThreads < rest ? here[i * kThreads] : T{};
  }
}
template <bool kWhole, int kLane, class T>
FN void put(T* to, int64_t begin, int rest, const T (&from)[kPerThread]) {
  if constexpr (kWhole) {
    UNROLL
    for (int i = 0; i < kPerThread; i += kLane) {
      T* here = to + begin + threadIdx.x * kLane + i * kThreads;
      UNROLL
      for (int k = 0; k < kLane; k += 16 / sizeof(T)) {
        uint4 vector;
        __builtin_memcpy(&vector, from + i + k, 16);
        store_vector(reinterpret_cast<uint4*>(here + k), vector);
      }
    }
  } else {
    T* here = to + begin + threadIdx.x;
    UNROLL
    for (int i = 0; i < kPerThread; ++i) {
      if (i * kThreads < rest) here[i * kThreads] = from[i];
    }
  }
}

// A tile of every stream through the rule.
template <bool kWhole, int kDecay, int kPair, class Step, class V>
FN void sweep_tile(const Step& step, V factor, V decay, const Piece& piece, int64_t begin) {
  using P = typename Types<kPair>::Param;
  using G = typename Types<kPair>::Grad;
  using S = typename Types<kPair>::State;
  constexpr int kStates = Step::kStates;
  constexpr int kLane = 16 / (sizeof(G) < sizeof(P) ? sizeof(G) : sizeof(P));
  // Elements of the tile from this thread's first one on, which may be none.
  const int64_t left = piece.n - begin;
  const int rest = static_cast<int>(left < kTile ? left : kTile) - static_cast<int>(threadIdx.x);
  P p[kPerThread];
  G g[kPerThread];
  S s[kRoom<Step>][kPerThread];
  fetch<kWhole, kLane>(static_cast<const P*>(piece.param), begin, rest, p);
  fetch<kWhole, kLane>(static_cast<const G*>(piece.grad), begin, rest, g);
  UNROLL
  for (int i = 0; i < kStates; ++i) {
    if (has_state<Step>(i)) {
      fetch<kWhole, kLane>(static_cast<const S*>(piece.state[i]), begin, rest, s[i]);
    }
  }
  UNROLL
  for (int k = 0; k < kPerThread; ++k) {
    S* here[kRoom<Step>];
    UNROLL
    for (int i = 0; i < kStates; ++i) here[i] = has_state<Step>(i) ? &s[i][k] : nullptr;
    update<kDecay>(step, factor, decay, &p[k], &g[k], here);
  }
  put<kWhole, kLane>(static_cast<P*>(piece.param), begin, rest, p);
  UNROLL
  for (int i = 0; i < kStates; ++i) {
    if (has_state<Step>(i)) {
      put<kWhole, kLane>(static_cast<S*>(piece.state[i]), begin, rest, s[i]);
    }
  }
}

// A row as the kernel computes with it.
template <class Rule, int kPair>
struct Scalars {
  using V = typename Types<kPair>::V;
  using S = typename Types<kPair>::State;
  typename Rule::template Step<V, 0> step;
  V factor, decay;
  int variant;
  bool coupled;

  FN void read(const Row& row, double multiplier) {
    step = broadcast<typename Rule::template Step<V, 0>, V, S>(row.scalars + 2);
    factor = V(static_cast<S>(row.scalars[0] * multiplier));
    decay = V(static_cast<S>(row.scalars[1]));
    variant = row.variant;
    coupled = row.decay == kCoupled;
  }
};

// Runs the variant that the row names, of those with the states kUses. All threads of a block have
// the same, so no branch divides a warp.
template <class Rule, unsigned kUses, int kPair, int kVariant = 0>
FN void sweep_variant(const Scalars<Rule, kPair>& scalars, const Piece& piece, int64_t begin) {
  using V = typename Types<kPair>::V;
  using Step = typename Rule::template Step<V, kVariant>;
  if constexpr (Step::kMask == kUses) {
    if (scalars.variant == kVariant) {
      Step step;
      __builtin_memcpy(reinterpret_cast<char*>(&step), &scalars.step, sizeof(step));
      const bool whole = piece.aligned && begin + kTile <= piece.n;
      const V factor = scalars.factor, decay = scalars.decay;
      if (scalars.coupled) {
        if (whole) {
          sweep_tile<true, kCoupled, kPair>(step, factor, decay, piece, begin);
        } else {
          sweep_tile<false, kCoupled, kPair>(step, factor, decay, piece, begin);
        }
      } else {
        if (whole) {
          sweep_tile<true, kScaled, kPair>(step, factor, decay, piece, begin);
        } else {
          sweep_tile<false, kScaled, kPair>(step, factor, decay, piece, begin);
        }
      }
    }
  }
  if constexpr (kVariant + 1 < Rule::kVariants) {
    sweep_variant<Rule, kUses, kPair, kVariant + 1>(scalars, piece, begin);
  }
}

// One block at least on each multiprocessor: ptxas would rather spill than go below some more.
template <class Rule, unsigned kUses, int kPair>
__global__ void __launch_bounds__(kThreads, 1) sweep(const __grid_constant__ Sweep sweep) {
  double multiplier = 1;
  if (sweep.gate) {
    if (sweep.gate->skip) return;
    multiplier = sweep.gate->multiplier;
  }
  const Row* rows = sweep.rows ? sweep.rows : sweep.here;
  Scalars<Rule, kPair> scalars;
  int row = -1, place = 0;
  for (int64_t tile = blockIdx.x; tile < sweep.pieces.end; tile += gridDim.x) {
    int64_t start;
    const Piece piece = find(sweep.pieces, tile, place, start);
    if (piece.row != row) scalars.read(rows[row = piece.row], multiplier);
    sweep_variant<Rule, kUses, kPair>(scalars, piece, (tile - start) * kTile);
  }
}

template <class Rule, unsigned kUses, int kVariant = 0>
constexpr bool has_variant() {
  if (Rule::template Step<F32, kVariant>::kMask == kUses) return true;
  if constexpr (kVariant + 1 < Rule::kVariants) return has_variant<Rule, kUses, kVariant + 1>();
  return false;
}

template <class Rule, unsigned kUses = 0>
constexpr void add(SweepKernel (&kernels)[1 << kMaxStates]) {
  if constexpr (has_variant<Rule, kUses>()) kernels[kUses] = sweep<Rule, kUses, FUSEDSTEP_PAIR>;
  if constexpr (kUses + 1 < 1 << kMaxStates) add<Rule, kUses + 1>(kernels);
}

template <class... Rule>
constexpr SweepKernels make(List<Rule...>) {
  SweepKernels kernels = {};
  int rule = 0;
  (add<Rule>(kernels.find[rule++]), ...);
  return kernels;
}

}  // namespace
}  // namespace FUSEDSTEP_TARGET

template <>
const SweepKernels& sweep_kernels<FUSEDSTEP_PAIR>() {
  static constexpr SweepKernels kernels = FUSEDSTEP_TARGET::make(FUSEDSTEP_TARGET::Registry{});
  return kernels;
}

}  // namespace fusedstep
