// Which piece a tile or block belongs to.
#pragma once

#include "table.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// The piece that `at` lies in, and where it starts.
template <class P>
FN P find(const Pieces<P>& pieces, int64_t at, int64_t& start) {
  start = 0;
  if (pieces.n == 1) return pieces.only;
  int64_t low = 0, high = pieces.n;  // starts[low] <= at < starts[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (pieces.starts[middle] <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  start = pieces.starts[low];
  return pieces.all[low];
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
