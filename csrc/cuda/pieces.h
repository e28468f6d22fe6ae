// Which piece a tile of the sweep or a row of the norm lies in.
#pragma once

#include "isa/isa.h"
#include "table.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// The piece that `at` lies in, and where it starts. `place` is the number of one that lies not
// behind it, at first 0, and becomes the number of the piece: mostly it is the same again.
FN const Piece& find_many(const Pieces& pieces, int64_t at, int& place, int64_t& start) {
  int64_t low = place, high = pieces.n;  // starts[low] <= at < starts[high]
  if (at < pieces.starts[low + 1]) high = low + 1;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (pieces.starts[middle] <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  place = static_cast<int>(low);
  start = pieces.starts[low];
  return pieces.all[low];
}
FN Piece find(const Pieces& pieces, int64_t at, int& place, int64_t& start) {
  start = 0;
  if (pieces.n == 1) return pieces.only;
  return find_many(pieces, at, place, start);
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
