// The kernel of segments that have more than a plain update: streams beside which something lies, or
// that are rounded at random, an average or a copy, gradients that are clipped or become zero.
#include <cuda_runtime.h>

#define FUSEDSTEP_TARGET cuda
#include "launch.h"
#include "pieces.h"
#include "staged.h"
#include "variants.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {
namespace {

template <class V>
FN V clipped(V x, V most) {
  const V least = -most;
  return select_gt(x, most, most, select_gt(least, x, least, x));
}

// A thread's elements of all streams.
template <class Rule, StateMask kStates, class V>
FN void sweep_part(Scalars<Rule, V> scalars, const Row& row, const Part& part, const int* begins) {
  using T = typename V::Scalar;
  constexpr int kAll = kState + count(Rule::kStates);
  // The parameter and the states that there are; and the gradient.
  constexpr StateMask kUpdated = 1u << kParam | kStates << kState, kRead = kUpdated | 1u << kGrad;
  const Segment& segment = part.segment;
  const auto present = [&](int k) { return segment.stream[k].format != Format::kNone; };
  const bool updates = present(kGrad), averages = present(kEma), copies = present(kShadow);
  const bool goes_on = averages && !(begins ? begins[segment.row] : segment.ema_begins);

  Stream from[kAll];  // asked for together
  UNROLL
  for (int k = 0; k < kAll; ++k) {
    if (has(kRead, k)) from[k] = segment.stream[k];
  }
  Fetched<V> fetched[kAll], average;
  each<kAll>([&](auto index) {
    constexpr int k = decltype(index)::value;
    if constexpr (has(kRead, k)) {
      if (k == kParam || updates) fetch<kFormatsOf<Rule, V, k>>(from[k], part, fetched[k]);
    }
  });
  if (goes_on) fetch<kArrays>(segment.stream[kEma], part, average);

  Drawn drawn;
  const auto random = [&](int k) { return segment.stream[k].rounding == Rounding::kStochastic; };
  V param[kVector];  // at last as it is stored
  decode<kFormatsOf<Rule, V, kParam>>(from[kParam].format, fetched[kParam], param);
  if (updates) {
    Elements<V, kAll> e;
    UNROLL
    for (int i = 0; i < kVector; ++i) e[i][kParam] = param[i];
    each<kAll, kGrad>([&](auto index) {
      constexpr int k = decltype(index)::value;
      if constexpr (has(kRead, k)) {
        V values[kVector];
        decode<kFormatsOf<Rule, V, k>>(from[k].format, fetched[k], values);
        UNROLL
        for (int i = 0; i < kVector; ++i) e[i][k] = values[i];
      }
    });
    if (row.clip < HUGE_VAL) {  // which multiplies first; then there is no factor
      const V most(static_cast<T>(row.clip));
      UNROLL
      for (int i = 0; i < kVector; ++i) e[i][kGrad] = clipped(e[i][kGrad] * scalars.factor, most);
      scalars.factor = V(1);
    }
    advance_all<Rule, kStates, V, kAll>(scalars, e);
    each<kAll>([&](auto index) {
      constexpr int k = decltype(index)::value;
      if constexpr (has(kUpdated, k)) {
        const Stream to = segment.stream[k];
        // Streams 2*i and 2*i + 1 share what is drawn.
        if constexpr (k % 2 == 0 || !has(kUpdated, k - 1)) {
          constexpr bool kTwo = k % 2 == 0 && has(kUpdated, k + 1);
          if (random(k) || (kTwo && random(k + 1))) drawn.draw(row.key, k, part.place());
        }
        V values[kVector];
        UNROLL
        for (int i = 0; i < kVector; ++i) values[i] = e[i][k];
        encode<kFormatsOf<Rule, V, k>, k>(to, drawn, part, k == kParam && (averages || copies),
                                          values);
        if constexpr (k == kParam) {
          UNROLL
          for (int i = 0; i < kVector; ++i) param[i] = values[i];
        }
      }
    });
    if (row.zero_grad) {
      in_format<kArrays>(segment.stream[kGrad].format, [&](auto format) {
        const typename In<decltype(format)::value>::Element zeros[kVector] = {};
        store_part(segment.stream[kGrad].data, part, zeros);
      });
    }
  }
  if (random(kEma) || random(kShadow)) drawn.draw(row.key, kEma, part.place());
  if (copies) {
    V values[kVector];
    UNROLL
    for (int i = 0; i < kVector; ++i) values[i] = param[i];
    encode<kArrays, kShadow>(segment.stream[kShadow], drawn, part, false, values);
  }
  if (averages) {
    if (goes_on) {
      const Average<double> exact = Average<double>::of(row.ema_decay);
      const Average<V> next = {V(static_cast<T>(exact.weight)), V(static_cast<T>(exact.from_new))};
      V before[kVector];
      decode<kArrays>(segment.stream[kEma].format, average, before);
      UNROLL
      for (int i = 0; i < kVector; ++i) param[i] = next(before[i], param[i]);
    }
    encode<kArrays, kEma>(segment.stream[kEma], drawn, part, false, param);
  }
}

// Blocks that a multiprocessor is to have at least: as many as registers allow without a spill.
template <StateMask kStates, class V>
constexpr int kBlocks = kDouble<V> ? 1 : 3 - (__builtin_popcount(kStates) > 2);

template <class Rule, StateMask kStates, class V>
__global__ void __launch_bounds__(kStagedThreads[kDouble<V>], (kBlocks<kStates, V>))
    staged(const __grid_constant__ SweepArguments sweep) {
  constexpr int kTileHere = kStagedThreads[kDouble<V>] * kVector;
  if (sweep.gate && sweep.gate->skip) return;
  const Row* rows = sweep.rows ? sweep.rows : sweep.here;
  Scalars<Rule, V> scalars;
  int row = -1, place = 0;
  for (int64_t tile = blockIdx.x; tile < sweep.pieces.end; tile += gridDim.x) {
    int64_t start = 0;
    const Piece& piece =
        sweep.pieces.n == 1 ? sweep.pieces.only : find_many(sweep.pieces, tile, place, start);
    const Segment& segment = piece.segment;
    if (segment.row != row) {
      row = segment.row;
      scalars.read(rows[row], sweep.gate ? sweep.gate->multiplier : 1);
    }
    const Part part(segment, tile - start, kTileHere, piece.aligned);
    sweep_part<Rule, kStates>(scalars, rows[row], part, sweep.begins);
  }
}

struct Staged {
  template <class Rule, StateMask kStates, class V>
  static constexpr SweepKernel kernel = staged<Rule, kStates, V>;
};

}  // namespace
}  // namespace FUSEDSTEP_TARGET

SweepKernel staged_kernel(int rule, StateMask states, bool wide) {
  using namespace FUSEDSTEP_TARGET;
  static constexpr SweepKernels all[] = {make<Staged, F32>(Registry{}),
                                         make<Staged, F64>(Registry{})};
  return all[wide].kernel[rule][states];
}

}  // namespace fusedstep
