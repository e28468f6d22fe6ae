// The one kernel that every rule shares, for each set of states, in float and in double. Formats are
// read at run time, all threads of a block the same, so that no branch on them divides a warp.
#include <cuda_runtime.h>

#define FUSEDSTEP_TARGET cuda
#include "kernels/update.h"
#include "launch.h"
#include "pieces.h"
#include "vector.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {
namespace {

// This thread's elements of a stream's tile. Whole tiles of aligned streams move in vectors; others,
// element by element as far as there are any. In both a warp's accesses lie side by side.
template <bool kWhole, class T>
FN void load_tile(const T* from, int64_t begin, int rest, T (&to)[kVector]) {
  if constexpr (kWhole) {
    load_vector(from + begin + threadIdx.x * kVector, to);
  } else {
    const T* here = from + begin + threadIdx.x;
    UNROLL
    for (int i = 0; i < kVector; ++i) to[i] = i * kThreads < rest ? here[i * kThreads] : T{};
  }
}
template <bool kWhole, class T>
FN void store_tile(T* to, int64_t begin, int rest, const T (&from)[kVector]) {
  if constexpr (kWhole) {
    store_vector(to + begin + threadIdx.x * kVector, from);
  } else {
    T* here = to + begin + threadIdx.x;
    UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (i * kThreads < rest) here[i * kThreads] = from[i];
    }
  }
}

// The first format, from number kNumber on, that a stream may be in: of all, as a gradient's may be,
// or of those that are computed with in V. kFormats where there is none.
template <class V, bool kAny, int kNumber>
FN constexpr int first_from() {
  if constexpr (kNumber < kFormats) {
    using F = In<static_cast<Format>(kNumber)>;
    if constexpr (kAny || kDouble<typename F::Register> == kDouble<V>) return kNumber;
    return first_from<V, kAny, kNumber + 1>();
  }
  return kFormats;
}

// Calls body with the format that a stream is in.
template <class V, bool kAny, int kNumber = first_from<V, kAny, 1>(), class Body>
FN void in_format(Format format, const Body& body) {
  constexpr int kNext = first_from<V, kAny, kNumber + 1>();
  if constexpr (kNext < kFormats) {
    if (static_cast<int>(format) != kNumber) return in_format<V, kAny, kNext>(format, body);
  }
  body(In<static_cast<Format>(kNumber)>());
}

// Elements as they lie in memory, so that nothing waits for one stream before all are asked for; or
// rounded to what is computed with, where they are wider.
template <class V>
struct Fetched {
  static constexpr int kWords = kVector * sizeof(V) / sizeof(uint32_t);
  uint32_t words[kWords];

  template <class T>
  FN void put(const T (&from)[kVector]) {  // word by word, else a part of them lies in the stack
    UNROLL
    for (unsigned i = 0; i < sizeof(from) / sizeof(uint32_t); ++i) {
      __builtin_memcpy(words + i, reinterpret_cast<const char*>(from) + 4 * i, 4);
    }
  }
  template <class T>
  FN void get(T (&to)[kVector]) const {
    UNROLL
    for (unsigned i = 0; i < sizeof(to) / sizeof(uint32_t); ++i) {
      __builtin_memcpy(reinterpret_cast<char*>(to) + 4 * i, words + i, 4);
    }
  }
};
template <class F, class V>
constexpr bool kFits = sizeof(typename F::Element) <= sizeof(V);

template <bool kWhole, bool kAny, class V>
FN void fetch(const Stream& stream, int64_t begin, int rest, Fetched<V>& fetched) {
  in_format<V, kAny>(stream.format, [&](auto format) {
    using F = decltype(format);
    typename F::Element own[kVector];
    load_tile<kWhole>(static_cast<const typename F::Element*>(stream.data), begin, rest, own);
    if constexpr (kFits<F, V>) {
      fetched.put(own);
    } else {
      typename V::Scalar rounded[kVector];
      UNROLL
      for (int i = 0; i < kVector; ++i) rounded[i] = as<V>(F::load(own + i)).v;
      fetched.put(rounded);
    }
  });
}

template <bool kAny, class V>
FN void decode(Format format, const Fetched<V>& fetched, V (&to)[kVector]) {
  in_format<V, kAny>(format, [&](auto format) {
    using F = decltype(format);
    if constexpr (kFits<F, V>) {
      typename F::Element own[kVector];
      fetched.get(own);
      UNROLL
      for (int i = 0; i < kVector; ++i) to[i] = as<V>(F::load(own + i));
    } else {
      typename V::Scalar own[kVector];
      fetched.get(own);
      UNROLL
      for (int i = 0; i < kVector; ++i) to[i] = V(own[i]);
    }
  });
}

template <bool kWhole, class V>
FN void put(const Stream& stream, int64_t begin, int rest, const V (&from)[kVector]) {
  in_format<V, false>(stream.format, [&](auto format) {
    using F = decltype(format);
    typename F::Element own[kVector];
    UNROLL
    for (int i = 0; i < kVector; ++i) F::store(own + i, from[i]);
    store_tile<kWhole>(static_cast<typename F::Element*>(stream.data), begin, rest, own);
  });
}

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

// A thread's elements of every stream.
template <class Rule, class V>
struct Elements {
  V p[kVector], g[kVector];
  V s[count(Rule::kStates) + 1][kVector];  // there are no empty arrays
};

// The variant that the row names, of those with these states.
template <class Rule, StateMask kStates, class V, int kVariant = 0>
FN void advance_all(const Scalars<Rule, V>& scalars, Elements<Rule, V>& e) {
  using Step = typename Rule::template Step<V, kVariant>;
  constexpr int kCount = count(Rule::kStates);
  if constexpr (mask_of<Rule, Step>(0) == kStates) {
    if (scalars.variant == kVariant) {
      Step step;
      __builtin_memcpy(reinterpret_cast<char*>(&step), &scalars.step, sizeof(step));
      UNROLL
      for (int i = 0; i < kVector; ++i) {
        V states[kCount + 1];
        UNROLL
        for (int s = 0; s < kCount; ++s) {
          if (has(kStates, s)) states[s] = e.s[s][i];
        }
        advance<Rule>(step, scalars.factor, scalars.decay, scalars.coupled, e.p[i], e.g[i], states);
        UNROLL
        for (int s = 0; s < kCount; ++s) {
          if (has(kStates, s)) e.s[s][i] = states[s];
        }
      }
    }
  }
  if constexpr (kVariant + 1 < Rule::kVariants) {
    advance_all<Rule, kStates, V, kVariant + 1>(scalars, e);
  }
}

// A tile of every stream through the rule.
template <bool kWhole, class Rule, StateMask kStates, class V>
FN void sweep_tile(const Scalars<Rule, V>& scalars, const Segment& segment, int64_t begin) {
  constexpr int kCount = count(Rule::kStates);
  // Elements of the tile from this thread's first one on, which may be none.
  const int64_t left = segment.n - begin;
  const int rest = static_cast<int>(left < kTile ? left : kTile) - static_cast<int>(threadIdx.x);
  const Stream &param = segment.stream[kParam], &grad = segment.stream[kGrad];
  Fetched<V> p, g, s[kCount + 1];
  fetch<kWhole, false>(param, begin, rest, p);
  fetch<kWhole, true>(grad, begin, rest, g);
  UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (has(kStates, i)) fetch<kWhole, false>(segment.stream[kState + i], begin, rest, s[i]);
  }
  Elements<Rule, V> e;
  decode<false>(param.format, p, e.p);
  decode<true>(grad.format, g, e.g);
  UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (has(kStates, i)) decode<false>(segment.stream[kState + i].format, s[i], e.s[i]);
  }
  advance_all<Rule, kStates>(scalars, e);
  put<kWhole>(param, begin, rest, e.p);
  UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (has(kStates, i)) put<kWhole>(segment.stream[kState + i], begin, rest, e.s[i]);
  }
}

// One block at least on each multiprocessor: ptxas would rather spill than go below some more.
template <class Rule, StateMask kStates, class V>
__global__ void __launch_bounds__(kThreads, 1) sweep(const __grid_constant__ SweepArguments sweep) {
  double multiplier = 1;
  if (sweep.gate) {
    if (sweep.gate->skip) return;
    multiplier = sweep.gate->multiplier;
  }
  const Row* rows = sweep.rows ? sweep.rows : sweep.here;
  Scalars<Rule, V> scalars;
  int row = -1, place = 0;
  for (int64_t tile = blockIdx.x; tile < sweep.pieces.end; tile += gridDim.x) {
    int64_t start;
    const Piece piece = find(sweep.pieces, tile, place, start);
    const Segment& segment = piece.segment;
    const int64_t begin = (tile - start) * kTile;
    if (segment.row != row) scalars.read(rows[row = segment.row], multiplier);
    if (piece.aligned && begin + kTile <= segment.n) {
      sweep_tile<true, Rule, kStates>(scalars, segment, begin);
    } else {
      sweep_tile<false, Rule, kStates>(scalars, segment, begin);
    }
  }
}

// By the rule's number and the states that a step has; null where there is no such variant.
struct SweepKernels {
  SweepKernel kernel[Registry::kSize][1 << kMaxStates];
};

// Outside of functions, as what has it is the host's, and mask_of the device's.
template <class Rule, class Step>
constexpr StateMask kMaskOf = mask_of<Rule, Step>(0);

template <class Rule, class V, int kVariant = 0>
constexpr void add(SweepKernel (&kernels)[1 << kMaxStates]) {
  constexpr StateMask kStates = kMaskOf<Rule, typename Rule::template Step<V, kVariant>>;
  kernels[kStates] = sweep<Rule, kStates, V>;
  if constexpr (kVariant + 1 < Rule::kVariants) add<Rule, V, kVariant + 1>(kernels);
}

template <class V, class... Rule>
constexpr SweepKernels make(List<Rule...>) {
  SweepKernels all = {};
  int rule = 0;
  (add<Rule, V>(all.kernel[rule++]), ...);
  return all;
}

}  // namespace
}  // namespace FUSEDSTEP_TARGET

SweepKernel sweep_kernel(int rule, StateMask states, bool wide) {
  using namespace FUSEDSTEP_TARGET;
  static constexpr SweepKernels all[] = {make<F32>(Registry{}), make<F64>(Registry{})};
  return all[wide].kernel[rule][states];
}

}  // namespace fusedstep
