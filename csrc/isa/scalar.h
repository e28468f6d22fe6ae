// The scalar set: one lane, any machine. Slow where fma is a library call; the yardstick of the
// rest.
#pragma once

#include "lanes.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

using F32 = Lanes<float, 1>;
using F64 = Lanes<double, 1>;

FN F32 fma(F32 a, F32 b, F32 c) { return __builtin_fmaf(a.v, b.v, c.v); }
FN F64 fma(F64 a, F64 b, F64 c) { return __builtin_fma(a.v, b.v, c.v); }
FN F32 sqrt(F32 a) { return __builtin_sqrtf(a.v); }
FN F64 sqrt(F64 a) { return __builtin_sqrt(a.v); }

// fp16 by bit fields: sign 1, exponent 5 (bias 15), fraction 10.
FN F32 load_f16(const uint16_t* from) {
  const uint32_t half = *from;
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 0) {  // zero or denormal: fraction * 2^-24, exact in float32
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return bits<float>(bits<uint32_t>(magnitude) | sign);
  }
  const uint32_t rebiased = exponent == 31 ? 255u : exponent + 112u;
  return bits<float>(sign | rebiased << 23 | fraction << 13);
}
FN void store_f16(uint16_t* to, F32 x) {
  const uint32_t word = bits<uint32_t>(x.v), magnitude = word & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN stays NaN
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: round the dropped 13 bits to nearest even
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  } else {  // denormal: the addition rounds to a multiple of 2^-24, to nearest even
    half = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  }
  *to = static_cast<uint16_t>(half | ((word >> 16) & 0x8000u));
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
