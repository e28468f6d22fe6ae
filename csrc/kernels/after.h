// What comes before and after a rule, by blocks that are in the first-level cache: clipping by value, the
// moving average of the new parameter, its copy, the gradient's zeros.
#pragma once

#include "codec.h"
#include "rules/common.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// g*factor within [-clip, clip]; NaN stays. Whole registers.
template <class V>
FN void clip_values(typename V::Scalar* grad, int64_t n, double factor, double clip) {
  using T = typename V::Scalar;
  const V most(static_cast<T>(clip)), least = -most, scale(static_cast<T>(factor));
  for (int64_t i = 0; i < n; i += V::kWidth) {
    const V g = load<V>(grad + i) * scale;
    store(grad + i, select_gt(g, most, most, select_gt(least, g, least, g)));
  }
}

// The average's next values, in place. Whole registers.
template <class V>
FN void average_values(typename V::Scalar* ema, const typename V::Scalar* param, int64_t n,
                       double decay) {
  using T = typename V::Scalar;
  const Average<double> exact = Average<double>::of(decay);
  const Average<V> average = {V(static_cast<T>(exact.weight)), V(static_cast<T>(exact.from_new))};
  for (int64_t i = 0; i < n; i += V::kWidth) {
    store(ema + i, average(load<V>(ema + i), load<V>(param + i)));
  }
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
