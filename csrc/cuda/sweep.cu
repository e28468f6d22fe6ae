// The kernel that every rule shares, for each set of states, in float and in double. Formats are
// read at run time, all threads of a block the same, so that no branch on them divides a warp.
#include <cuda_runtime.h>

#define FUSEDSTEP_TARGET cuda
#include "kernels/update.h"
#include "launch.h"
#include "pieces.h"
#include "stream.h"
#include "variants.h"

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

// What a thread keeps of a stream that it has asked for, so that nothing waits for one stream before
// all are asked for: elements as they lie in memory, or as floats where doubles would be too many.
template <class V>
using Fetched = uint32_t[kVector * sizeof(V) / sizeof(uint32_t)];
template <class F, class V>
constexpr bool kFits = sizeof(typename F::Element) <= sizeof(V);
template <class F, class V>
using Kept = std::conditional_t<kFits<F, V>, F, In<Format::kF32>>;

template <bool kWhole, FormatSet kSet, class V>
FN void fetch(const Stream& stream, int64_t begin, int rest, Fetched<V>& fetched) {
  in_format<kSet>(stream.format, [&](auto format) {
    using F = In<decltype(format)::value>;
    typename F::Element own[kVector];
    load_tile<kWhole>(static_cast<const typename F::Element*>(stream.data), begin, rest, own);
    if constexpr (kFits<F, V>) {
      copy_words<sizeof(own)>(fetched, own);
    } else {
      float rounded[kVector];
      UNROLL
      for (int i = 0; i < kVector; ++i) rounded[i] = as<V>(F::load(own + i)).v;
      copy_words<sizeof(rounded)>(fetched, rounded);
    }
  });
}

template <FormatSet kSet, class V, int kAll>
FN void decode(const Stream& stream, const Fetched<V>& fetched, Elements<V, kAll>& to, int k) {
  in_format<kSet>(stream.format, [&](auto format) {
    using F = Kept<In<decltype(format)::value>, V>;
    typename F::Element own[kVector];
    copy_words<sizeof(own)>(own, fetched);
    UNROLL
    for (int i = 0; i < kVector; ++i) to[i][k] = as<V>(F::load(own + i));
  });
}

template <bool kWhole, class V, int kAll>
FN void put(const Stream& stream, int64_t begin, int rest, const Elements<V, kAll>& from, int k) {
  in_format<kOwn<V>>(stream.format, [&](auto format) {
    using F = In<decltype(format)::value>;
    typename F::Element own[kVector];
    UNROLL
    for (int i = 0; i < kVector; ++i) F::store(own + i, from[i][k]);
    store_tile<kWhole>(static_cast<typename F::Element*>(stream.data), begin, rest, own);
  });
}

// A tile of every stream through the rule.
template <bool kWhole, class Rule, StateMask kStates, class V>
FN void sweep_tile(const Scalars<Rule, V>& scalars, const Segment& segment, int64_t begin) {
  constexpr int kAll = kState + count(Rule::kStates);
  // Of the parameter and the states that there are.
  constexpr StateMask kWritten = 1u << kParam | kStates << kState;
  const Stream(&stream)[kStreams] = segment.stream;
  // Elements of the tile from this thread's first one on, which may be none.
  const int64_t left = segment.n - begin;
  const int rest = static_cast<int>(left < kTile ? left : kTile) - static_cast<int>(threadIdx.x);
  Fetched<V> fetched[kAll];
  V e[kVector][kAll];
  fetch<kWhole, kArrays, V>(stream[kGrad], begin, rest, fetched[kGrad]);
  UNROLL
  for (int k = 0; k < kAll; ++k) {
    if (has(kWritten, k)) fetch<kWhole, kOwn<V>, V>(stream[k], begin, rest, fetched[k]);
  }
  decode<kArrays, V, kAll>(stream[kGrad], fetched[kGrad], e, kGrad);
  UNROLL
  for (int k = 0; k < kAll; ++k) {
    if (has(kWritten, k)) decode<kOwn<V>, V, kAll>(stream[k], fetched[k], e, k);
  }
  advance_all<Rule, kStates, V, kAll>(scalars, e);
  UNROLL
  for (int k = 0; k < kAll; ++k) {
    if (has(kWritten, k)) put<kWhole, V, kAll>(stream[k], begin, rest, e, k);
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

struct Plain {
  template <class Rule, StateMask kStates, class V>
  static constexpr SweepKernel kernel = sweep<Rule, kStates, V>;
};

}  // namespace
}  // namespace FUSEDSTEP_TARGET

SweepKernel sweep_kernel(int rule, StateMask states, bool wide) {
  using namespace FUSEDSTEP_TARGET;
  static constexpr SweepKernels all[] = {make<Plain, F32>(Registry{}),
                                         make<Plain, F64>(Registry{})};
  return all[wide].kernel[rule][states];
}

}  // namespace fusedstep
