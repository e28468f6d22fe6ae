// What a format's header defines: In<format>, with
//   Element   what lies in memory for each number
//   Register  the register that it converts to and from: F64 for float64, F32 for all others
//   load      one register's elements
//   store     likewise, rounded to nearest, ties to even
//   dither    likewise, rounded at random by words of kRandomBits random bits, where the format can
// One whose elements share an entry makes codes, `nearest` or `dithered`, for store_bytes.
// A format with something beside its elements takes a pointer to that, too. All conversions to
// Register are exact.
#pragma once

#include "interface/format.h"
#include "isa/isa.h"
#include "random.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <Format>
struct In;

// A format that is what a register holds.
template <class V>
struct AsComputed {
  using Element = typename V::Scalar;
  using Register = V;
  FN static V load(const Element* from) { return FUSEDSTEP_TARGET::load<V>(from); }
  FN static void store(Element* to, V x) { FUSEDSTEP_TARGET::store(to, x); }
};

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
