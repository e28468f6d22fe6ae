// AVX2 with FMA and F16C: 8 float lanes.
#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

using F32 = Lanes<float, 8>;
using F64 = Lanes<double, 4>;

FN F32 fma(F32 a, F32 b, F32 c) { return F32::of(_mm256_fmadd_ps(a.v, b.v, c.v)); }
FN F64 fma(F64 a, F64 b, F64 c) { return F64::of(_mm256_fmadd_pd(a.v, b.v, c.v)); }
FN F32 sqrt(F32 a) { return F32::of(_mm256_sqrt_ps(a.v)); }
FN F64 sqrt(F64 a) { return F64::of(_mm256_sqrt_pd(a.v)); }

template <class V>
FN V load(const f16* from) {
  return F32::of(_mm256_cvtph_ps((__m128i)load_halves<8>(from)));
}
FN void store(f16* to, F32 x) {
  store_halves<8>(to, (vector<uint16_t, 8>)_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
