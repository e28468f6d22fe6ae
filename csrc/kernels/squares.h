// The sum of squares of a gradient's blocks, in an order that no register width can change.
#pragma once

#include "formats/formats.h"
#include "interface/kernels.h"
#include "update.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

constexpr int kNormRegisters = kNormLanes / F64::kWidth;

// A row of kNormLanes elements as doubles: what a step that computes in V reads, exactly.
template <class F, class V>
FN void load_row(const typename F::Element* from, F64 (&row)[kNormRegisters]) {
  if constexpr (kDouble<typename F::Register> && kDouble<V>) {
    UNROLL
    for (int64_t r = 0; r < kNormRegisters; ++r) row[r] = F::load(from + r * F64::kWidth);
  } else {
    double wide[kNormLanes];
    UNROLL
    for (int l = 0; l < kNormLanes; l += F32::kWidth) {
      if constexpr (kDouble<typename F::Register>) {
        widen(narrow<F32>(from + l), wide + l);
      } else {
        widen(F::load(from + l), wide + l);
      }
    }
    UNROLL
    for (int64_t r = 0; r < kNormRegisters; ++r) row[r] = load<F64>(wide + r * F64::kWidth);
  }
}

// fma where a*b is exact, so that two operations round as one does: the scalar set's fma may be a
// library call.
FN F64 fma_exact(F64 a, F64 b, F64 c) {
  if constexpr (F64::kWidth == 1) {
    return a * b + c;
  } else {
    return fma(a, b, c);
  }
}

template <class F, class V>
FN void add_row(const typename F::Element* from, F64 (&sum)[kNormRegisters],
                F64 (&bad)[kNormRegisters]) {
  F64 x[kNormRegisters];
  load_row<F, V>(from, x);
  UNROLL
  for (int r = 0; r < kNormRegisters; ++r) {
    if constexpr (kDouble<typename F::Register> && kDouble<V>) {
      sum[r] = fma(x[r], x[r], sum[r]);
      bad[r] = fma_exact(x[r], F64(0.0), bad[r]);  // NaN from infinity or NaN, else zero
    } else {
      sum[r] = fma_exact(x[r], x[r], sum[r]);
    }
  }
}

// Halves the lanes, and what is left of them, until one is left: first whole registers, then the
// lanes of the last.
FN double combine(F64 (&sum)[kNormRegisters]) {
  UNROLL
  for (int half = kNormRegisters / 2; half > 0; half /= 2) {
    UNROLL
    for (int r = 0; r < half; ++r) sum[r] = sum[r] + sum[r + half];
  }
  double lanes[F64::kWidth];
  store(lanes, sum[0]);
  UNROLL
  for (int half = F64::kWidth / 2; half > 0; half /= 2) {
    UNROLL
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

template <Format kFormat, class V>
bool squares(const void* grad, int64_t n, int64_t begin, int64_t end, double* sums) {
  using F = In<kFormat>;
  using Element = typename F::Element;
  bool finite = true;
  for (int64_t block = begin; block < end; ++block) {
    const Element* from = static_cast<const Element*>(grad) + block * kNormBlock;
    const int64_t rest = n - block * kNormBlock;
    const int64_t count = rest < kNormBlock ? rest : kNormBlock;
    F64 sum[kNormRegisters], bad[kNormRegisters];
    UNROLL
    for (int r = 0; r < kNormRegisters; ++r) sum[r] = bad[r] = F64(0.0);
    int64_t at = 0;
    for (; at + kNormLanes <= count; at += kNormLanes) add_row<F, V>(from + at, sum, bad);
    if (at < count) {
      Element tail[kNormLanes] = {};
      __builtin_memcpy(tail, from + at, (count - at) * sizeof(Element));
      add_row<F, V>(tail, sum, bad);
    }
    const double total = combine(sum);
    sums[block - begin] = total;
    // Squares of finite doubles may overflow; those of floats, 512 of them, do not in double.
    const bool wide = kDouble<typename F::Register> && kDouble<V>;
    const double witness = wide ? combine(bad) : total;
    finite &= witness * 0 == 0;
  }
  return finite;
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
