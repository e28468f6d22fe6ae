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

FN F32 load_f16(const uint16_t* from) {
  return F32::of(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))));
}
FN void store_f16(uint16_t* to, F32 x) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(x.v))); }

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
