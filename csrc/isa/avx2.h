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

FN F32 load_f16(const uint16_t* from) {
  return F32::of(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
FN void store_f16(uint16_t* to, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}

// As the loops of lanes.h, of which GCC goes through memory.
template <>
FN void widen<8>(F32 x, double* to) {
  _mm256_storeu_pd(to, _mm256_cvtps_pd(_mm256_castps256_ps128(x.v)));
  _mm256_storeu_pd(to + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1)));
}
template <>
FN F32 narrow<F32>(const double* from) {
  const __m128 low = _mm256_cvtpd_ps(_mm256_loadu_pd(from));
  return F32::of(_mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(from + 4)), low));
}

// One instruction widens, and two gather the upper halves: of the general forms GCC makes more.
template <>
FN vector<uint32_t, 8> load_high<8>(const uint16_t* from) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (vector<uint32_t, 8>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}
template <>
FN void store_high<8>(uint16_t* to, vector<uint32_t, 8> x) {
  const __m256i upper = _mm256_set1_epi64x(0x0f0e0b0a07060302);  // of each 16 bytes
  const __m256i joined = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)x, upper), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(joined));
}

template <>
FN vector<uint32_t, 8> load_bytes<8>(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (vector<uint32_t, 8>)_mm256_cvtepu8_epi32(bytes);
}
template <>
FN vector<uint32_t, 8> load_signed_bytes<8>(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return (vector<uint32_t, 8>)_mm256_cvtepi8_epi32(bytes);
}
template <>
FN vector<uint32_t, 8> with_sign<8>(vector<uint32_t, 8> a, vector<uint32_t, 8> sign) {
  return (vector<uint32_t, 8>)_mm256_sign_epi32((__m256i)a, (__m256i)sign);
}
template <>
FN vector<uint32_t, 8> zero_where_zero<8>(vector<uint32_t, 8> a, vector<uint32_t, 8> b) {
  return (vector<uint32_t, 8>)_mm256_sign_epi32((__m256i)a, (__m256i)b);
}
// Packing takes from each half of a register in turn.
template <>
FN void store_bytes<8>(uint8_t* to, const vector<uint32_t, 8> (&x)[4]) {
  const __m256i low = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]);
  const __m256i bytes = _mm256_packus_epi16(low, _mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
}
template <>
FN void store_signed_bytes<8>(uint8_t* to, const vector<uint32_t, 8> (&x)[4]) {
  const __m256i low = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]);
  const __m256i packed = _mm256_packs_epi16(low, _mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]));
  const __m256i bytes = _mm256_max_epi8(packed, _mm256_set1_epi8(-127));  // as the general form
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
