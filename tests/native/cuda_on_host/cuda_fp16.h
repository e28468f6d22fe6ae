// fp16 as CUDA names it, converted by integer arithmetic; NaNs keep their payload as on CPUs.
#pragma once

#include "device.h"

struct __half_raw {
  unsigned short x;
};

struct __half {
  __half() = default;
  __half(const __half_raw& raw) : __x(raw.x) {}
  operator __half_raw() const { return __half_raw{__x}; }

 protected:
  unsigned short __x;
};

inline float __half2float(__half value) {
  const uint32_t half = static_cast<__half_raw>(value).x;
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 0) {  // zero or denormal: a multiple of 2^-24
    return __uint_as_float(__float_as_uint(static_cast<float>(fraction) * 0x1p-24f) | sign);
  }
  return __uint_as_float(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
}

inline __half __float2half_rn(float value) {
  const uint32_t word = __float_as_uint(value), magnitude = word & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {
    half = 0x7c00u;
  } else {
    // What the result keeps of the significand, rounded: a carry moves on into the exponent, and
    // from the largest number to infinity.
    const uint32_t exponent = magnitude >> 23;
    const bool normal = exponent >= 113;
    const uint32_t drop = normal ? 13 : exponent > 101 ? 126 - exponent : 25;
    const uint32_t whole = normal           ? magnitude - (112u << 23)
                           : exponent > 101 ? (magnitude & 0x7fffffu) | 0x800000u
                                            : 0;
    const uint32_t rest = whole & ((1u << drop) - 1), tie = 1u << (drop - 1);
    half = whole >> drop;
    half += rest > tie || (rest == tie && (half & 1u) != 0) ? 1 : 0;
  }
  return __half_raw{static_cast<unsigned short>(half | ((word >> 16) & 0x8000u))};
}
