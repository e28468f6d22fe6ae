// NEON on aarch64, whose base instruction set has fma, sqrt and fp16 conversion: 4 float lanes.
#pragma once

#include <arm_neon.h>

#include "lanes.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

using F32 = Lanes<float, 4>;
using F64 = Lanes<double, 2>;

FN F32 fma(F32 a, F32 b, F32 c) { return F32::of(vfmaq_f32(c.v, a.v, b.v)); }
FN F64 fma(F64 a, F64 b, F64 c) { return F64::of(vfmaq_f64(c.v, a.v, b.v)); }
FN F32 sqrt(F32 a) { return F32::of(vsqrtq_f32(a.v)); }
FN F64 sqrt(F64 a) { return F64::of(vsqrtq_f64(a.v)); }

template <class V>
FN V load(const f16* from) {
  return F32::of(vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)load_halves<4>(from))));
}
FN void store(f16* to, F32 x) {
  store_halves<4>(to, (vector<uint16_t, 4>)vreinterpret_u16_f16(vcvt_f16_f32(x.v)));
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
