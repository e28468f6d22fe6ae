// One CUDA lane. The _rn intrinsics are never contracted, so the bits are the CPU's.
#pragma once

#include <cuda_fp16.h>

#define FN __device__ __forceinline__
#define UNROLL _Pragma("unroll")

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

struct F32 {
  static constexpr int kWidth = 1;
  using Scalar = float;
  float v;
  F32() = default;
  FN F32(float x) : v(x) {}
  FN friend F32 operator-(F32 a) { return -a.v; }
  FN friend F32 operator+(F32 a, F32 b) { return __fadd_rn(a.v, b.v); }
  FN friend F32 operator-(F32 a, F32 b) { return __fsub_rn(a.v, b.v); }
  FN friend F32 operator*(F32 a, F32 b) { return __fmul_rn(a.v, b.v); }
  FN friend F32 operator/(F32 a, F32 b) { return __fdiv_rn(a.v, b.v); }
  FN friend F32 fma(F32 a, F32 b, F32 c) { return __fmaf_rn(a.v, b.v, c.v); }
  FN friend F32 sqrt(F32 a) { return __fsqrt_rn(a.v); }
  FN friend F32 abs(F32 a) { return fabsf(a.v); }
  FN friend F32 select_gt(F32 a, F32 b, F32 x, F32 y) { return a.v > b.v ? x : y; }
};

struct F64 {
  static constexpr int kWidth = 1;
  using Scalar = double;
  double v;
  F64() = default;
  FN F64(double x) : v(x) {}
  FN friend F64 operator-(F64 a) { return -a.v; }
  FN friend F64 operator+(F64 a, F64 b) { return __dadd_rn(a.v, b.v); }
  FN friend F64 operator-(F64 a, F64 b) { return __dsub_rn(a.v, b.v); }
  FN friend F64 operator*(F64 a, F64 b) { return __dmul_rn(a.v, b.v); }
  FN friend F64 operator/(F64 a, F64 b) { return __ddiv_rn(a.v, b.v); }
  FN friend F64 fma(F64 a, F64 b, F64 c) { return __fma_rn(a.v, b.v, c.v); }
  FN friend F64 sqrt(F64 a) { return __dsqrt_rn(a.v); }
  FN friend F64 abs(F64 a) { return fabs(a.v); }
  FN friend F64 select_gt(F64 a, F64 b, F64 x, F64 y) { return a.v > b.v ? x : y; }
};

// As for a CPU's registers (lanes.h), of one lane.
template <class V>
FN V load(const typename V::Scalar* from) {
  return *from;
}
FN void store(float* to, F32 x) { *to = x.v; }
FN void store(double* to, F64 x) { *to = x.v; }
FN uint32_t words_of(F32 x) { return __float_as_uint(x.v); }
template <int N>
FN F32 float_of(uint32_t word) {
  return __uint_as_float(word);
}
template <int N>
FN uint32_t load_high(const uint16_t* from) {
  return static_cast<uint32_t>(*from) << 16;
}
template <int N>
FN void store_high(uint16_t* to, uint32_t x) {
  *to = static_cast<uint16_t>(x >> 16);
}
template <int N>
FN uint32_t load_low(const uint16_t* from) {
  return static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(*from)));
}
template <int N>
FN void store_low(uint16_t* to, uint32_t x) {
  *to = static_cast<uint16_t>(x);
}
template <int N>
FN uint32_t load_bytes(const uint8_t* from) {
  return *from;
}
template <int N>
FN uint32_t load_signed_bytes(const uint8_t* from) {
  return static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(*from)));
}
template <int N>
FN uint32_t abs_word(uint32_t a) {
  return static_cast<int32_t>(a) < 0 ? 0u - a : a;
}
template <int N>
FN uint32_t with_sign(uint32_t a, uint32_t sign) {
  return static_cast<int32_t>(sign) < 0 ? 0u - a : a;
}
template <int N>
FN uint32_t zero_where_zero(uint32_t a, uint32_t b) {
  return static_cast<int32_t>(b) > 0 ? a : b;
}
template <int N>
FN uint32_t select_word_gt(uint32_t a, uint32_t b, uint32_t x, uint32_t y) {
  return static_cast<int32_t>(a) > static_cast<int32_t>(b) ? x : y;
}
template <int N>
FN uint32_t max_word(uint32_t a, uint32_t b) {
  return select_word_gt<N>(a, b, a, b);
}
template <int N>
FN uint32_t min_word(uint32_t a, uint32_t b) {
  return select_word_gt<N>(a, b, b, a);
}
template <int N>
FN void store_bytes(uint8_t* to, uint32_t x) {
  *to = static_cast<uint8_t>(min_word<N>(x, 255));
}
template <int N>
FN void store_signed_bytes(uint8_t* to, uint32_t x) {
  *to = static_cast<uint8_t>(max_word<N>(min_word<N>(x, 127), 0u - 127u));
}
template <int N>
FN uint32_t count_from(uint32_t begin) {
  return begin;
}

// Floats as doubles, exactly, and doubles rounded to floats.
template <class To, class From>
FN To as(From x) {
  if constexpr (sizeof(To) < sizeof(From)) {
    return __double2float_rn(x.v);
  } else {
    return To(x.v);
  }
}

FN F32 load_f16(const uint16_t* from) { return __half2float(__half(__half_raw{*from})); }
FN void store_f16(uint16_t* to, F32 x) { *to = __half_raw(__float2half_rn(x.v)).x; }

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
