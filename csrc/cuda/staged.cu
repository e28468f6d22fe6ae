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

// What a row asks for beside the rule.
template <class V>
struct Asked {
  V scale, most;  // where gradients are clipped: of them, before; and to what
  Average<V> average;
  uint64_t key;
  bool clips, zero_grad;

  // Clipping multiplies first; then there is no factor.
  FN void read(const Row& row, V& factor) {
    using T = typename V::Scalar;
    const Average<double> exact = Average<double>::of(row.ema_decay);
    average = {V(static_cast<T>(exact.weight)), V(static_cast<T>(exact.from_new))};
    key = row.key;
    zero_grad = row.zero_grad != 0;
    clips = row.clip < HUGE_VAL;
    if (!clips) return;
    most = V(static_cast<T>(row.clip));
    scale = factor;
    factor = V(1);
  }
  FN V clipped(V g) const {
    const V least = -most;
    g = g * scale;
    return select_gt(g, most, most, select_gt(least, g, least, g));
  }
};

template <class Rule>
constexpr int kSlots = kState + count(Rule::kStates) + 1;  // the last is the average's

template <class Rule>
constexpr int kCounted = count(Rule::kStates);

// A thread's elements of all streams. Neighbouring slots are other threads', kThreads of them.
template <class Rule, StateMask kStates, class V, int kThreadsHere>
FN void sweep_part(const Scalars<Rule, V>& scalars, const Asked<V>& asked, const Segment& segment,
                   const Part& part, bool begins, Slot<V> (*slots)[kThreadsHere]) {
  constexpr int kAll = kSlots<Rule> - 1;
  const int thread = static_cast<int>(threadIdx.x);
  const auto slot = [&](int k) -> Slot<V>& { return slots[k < kAll ? k : kAll][thread]; };
  const Stream(&stream)[kStreams] = segment.stream;
  const auto present = [&](int k) { return stream[k].format != Format::kNone; };
  const bool updates = present(kGrad), averages = present(kEma), copies = present(kShadow);
  constexpr StateMask kParamBit = 1u << kParam, kGradBit = 1u << kGrad,
                      kStateBits = kStates << kState;
  const StateMask reads = kParamBit | (updates ? kGradBit | kStateBits : 0) |
                          static_cast<StateMask>(averages && !begins) << kEma;
  const StateMask writes =
      (updates ? kParamBit | kStateBits : 0) | (updates && asked.zero_grad ? kGradBit : 0) |
      static_cast<StateMask>(averages) << kEma | static_cast<StateMask>(copies) << kShadow;

#pragma unroll 1
  for (int k = 0; k <= kEma; ++k) {
    if (has(reads, k)) bring<V>(stream[k], part, slot(k));
  }
  uint32_t base[kAll] = {};  // asked for together
  UNROLL
  for (int k = kState; k < kAll; ++k) {
    if (has(kStateBits, k) && updates && has_base(stream[k].format) && part.at < part.n) {
      base[k] = static_cast<const uint8_t*>(stream[k].beside)[part.entry()];
    }
  }
  await_copies();
  UNROLL
  for (int k = kState; k < kAll; ++k) {
    if (has(kStateBits, k) && updates && has_base(stream[k].format)) slot(k)[0].y = base[k];
  }
#pragma unroll 1
  for (int k = 0; k <= kEma; ++k) {
    if (has(reads, k)) decode<V>(stream[k].format, slot(k));
  }

  if (updates) {
    Elements<V, kAll> e;
    UNROLL
    for (int k = 0; k < kAll; ++k) {
      if (!has(kParamBit | kGradBit | kStateBits, k)) continue;
      V values[kVector];
      load_slot<V>(slot(k), values);
      UNROLL
      for (int i = 0; i < kVector; ++i) e[i][k] = values[i];
    }
    if (asked.clips) {
      UNROLL
      for (int i = 0; i < kVector; ++i) e[i][kGrad] = asked.clipped(e[i][kGrad]);
    }
    advance_all<Rule, kStates, V, kAll>(scalars, e);
    UNROLL
    for (int k = 0; k < kAll; ++k) {
      if (!has(kParamBit | kStateBits, k)) continue;
      V values[kVector];
      UNROLL
      for (int i = 0; i < kVector; ++i) values[i] = e[i][k];
      store_slot<V>(slot(k), values);
    }
  }

#pragma unroll 1
  for (int k = 0; k <= kShadow; ++k) {
    if (!has(writes, k)) continue;
    V values[kVector];
    load_slot<V>(slot(k < kAll ? k : kParam), values);
    if (k == kGrad) {
      UNROLL
      for (int i = 0; i < kVector; ++i) values[i] = V(0);
    } else if (k == kEma && !begins) {
      V before[kVector];
      load_slot<V>(slot(kEma), before);
      UNROLL
      for (int i = 0; i < kVector; ++i) values[i] = asked.average(before[i], values[i]);
    }
    const bool wanted = k == kParam && (averages || copies);
    encode<V>(stream[k], k, asked.key, part, wanted, values);
    if (wanted) store_slot<V>(slot(kParam), values);
  }
}

template <class Rule, StateMask kStates, class V>
__global__ void __launch_bounds__(kStagedThreads[kDouble<V>], 1)
    staged(const __grid_constant__ SweepArguments sweep) {
  constexpr int kThreadsHere = kStagedThreads[kDouble<V>], kTileHere = kThreadsHere * kVector;
  __shared__ Slot<V> slots[kSlots<Rule>][kThreadsHere];
  double multiplier = 1;
  if (sweep.gate) {
    if (sweep.gate->skip) return;
    multiplier = sweep.gate->multiplier;
  }
  const Row* rows = sweep.rows ? sweep.rows : sweep.here;
  Scalars<Rule, V> scalars;
  Asked<V> asked;
  int row = -1, place = 0;
  for (int64_t tile = blockIdx.x; tile < sweep.pieces.end; tile += gridDim.x) {
    int64_t start = 0;
    const Piece& piece =
        sweep.pieces.n == 1 ? sweep.pieces.only : find_many(sweep.pieces, tile, place, start);
    const Segment& segment = piece.segment;
    const int64_t begin = (tile - start) * kTileHere - segment.first % kTogether;
    if (segment.row != row) {
      row = segment.row;
      scalars.read(rows[row], multiplier);
      asked.read(rows[row], scalars.factor);
    }
    const Part part = {begin + threadIdx.x * kVector, segment.n, segment.first,
                       piece.aligned && begin >= 0 && begin + kTileHere <= segment.n};
    const bool begins = sweep.begins ? sweep.begins[row] : segment.ema_begins;
    sweep_part<Rule, kStates, V, kThreadsHere>(scalars, asked, segment, part, begins, slots);
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
