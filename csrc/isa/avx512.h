// AVX-512 F, BW, DQ and VL: 16 float lanes.
#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

using F32 = Lanes<float, 16>;
using F64 = Lanes<double, 8>;

FN F32 fma(F32 a, F32 b, F32 c) { return F32::of(_mm512_fmadd_ps(a.v, b.v, c.v)); }
FN F64 fma(F64 a, F64 b, F64 c) { return F64::of(_mm512_fmadd_pd(a.v, b.v, c.v)); }
FN F32 sqrt(F32 a) { return F32::of(_mm512_sqrt_ps(a.v)); }
FN F64 sqrt(F64 a) { return F64::of(_mm512_sqrt_pd(a.v)); }

FN F32 load_f16(const uint16_t* from) {
  return F32::of(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
FN void store_f16(uint16_t* to, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

// As the loops of lanes.h, of which GCC goes through memory.
template <>
FN void widen<16>(F32 x, double* to) {
  _mm512_storeu_pd(to, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
  _mm512_storeu_pd(to + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
}
template <>
FN F32 narrow<F32>(const double* from) {
  const __m512 low = _mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(from)));
  return F32::of(_mm512_insertf32x8(low, _mm512_cvtpd_ps(_mm512_loadu_pd(from + 8)), 1));
}

// One instruction widens, and one narrows: of the general forms GCC makes more.
template <>
FN vector<uint32_t, 16> load_high<16>(const uint16_t* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (vector<uint32_t, 16>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
template <>
FN void store_high<16>(uint16_t* to, vector<uint32_t, 16> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x, 16)));
}

template <>
FN vector<uint32_t, 16> load_bytes<16>(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (vector<uint32_t, 16>)_mm512_cvtepu8_epi32(bytes);
}
template <>
FN void store_bytes<16>(uint8_t* to, vector<uint32_t, 16> x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8((__m512i)x));
}
template <>
FN void store_signed_bytes<16>(uint8_t* to, vector<uint32_t, 16> x) {
  const __m128i bytes = _mm512_cvtsepi32_epi8((__m512i)x);
  const __m128i least = _mm_set1_epi8(-127);  // as the general form
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_max_epi8(bytes, least));
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
