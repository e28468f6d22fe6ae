// A register of N lanes with the operations that rules are written in, over the compiler's vector
// extension, so that one text serves every CPU set; a set adds its width, fma, sqrt and fp16.
#pragma once

#include <stdint.h>

#include "interface/kernels.h"

#define FN [[gnu::always_inline]] inline
#define UNROLL _Pragma("GCC unroll 16")

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// N values of T in a register; a single lane is T itself.
template <class T, int N>
struct Vector {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
  typedef T unaligned __attribute__((vector_size(sizeof(T) * N), aligned(1), may_alias));
};
template <class T>
struct Vector<T, 1> {
  typedef T type;
  typedef T unaligned __attribute__((aligned(1), may_alias));
};
template <class T, int N>
using vector = typename Vector<T, N>::type;

// Value by value conversion, and the same bits read as another type.
template <class To, class From, int N>
FN vector<To, N> convert(vector<From, N> x) {
  if constexpr (N == 1) {
    return static_cast<To>(x);
  } else {
    return __builtin_convertvector(x, vector<To, N>);
  }
}
template <class To, class From>
FN To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr type kAbs = 0x7fffffff;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr type kAbs = 0x7fffffffffffffff;
};

template <class T, int N>
struct Lanes {
  static constexpr int kWidth = N;
  using Scalar = T;
  using Register = vector<T, N>;
  using Unaligned = typename Vector<T, N>::unaligned;
  Register v;

  Lanes() = default;
  FN Lanes(T x) : v(x - Register{}) {}  // x - 0 broadcasts and, unlike x + 0, keeps the sign of -0
  FN static Lanes of(Register r) {
    Lanes x;
    x.v = r;
    return x;
  }

  FN friend Lanes operator-(Lanes a) { return of(-a.v); }
  FN friend Lanes operator+(Lanes a, Lanes b) { return of(a.v + b.v); }
  FN friend Lanes operator-(Lanes a, Lanes b) { return of(a.v - b.v); }
  FN friend Lanes operator*(Lanes a, Lanes b) { return of(a.v * b.v); }
  FN friend Lanes operator/(Lanes a, Lanes b) { return of(a.v / b.v); }

  FN friend Lanes abs(Lanes a) {
    using Integers = vector<typename Bits<T>::type, N>;
    return of(bits<Register>(bits<Integers>(a.v) & Bits<T>::kAbs));
  }
  // a > b ? x : y in each lane; a comparison with NaN is false.
  FN friend Lanes select_gt(Lanes a, Lanes b, Lanes x, Lanes y) {
    return of(a.v > b.v ? x.v : y.v);
  }
};

// load<V> and store convert between a storage type and V, one overload per type; fp16 is the set's.
template <class V>
FN V load(const typename V::Scalar* from) {
  return V::of(*reinterpret_cast<const typename V::Unaligned*>(from));
}
template <class T, int N>
FN void store(T* to, Lanes<T, N> x) {
  *reinterpret_cast<typename Lanes<T, N>::Unaligned*>(to) = x.v;
}

// N sixteen-bit patterns in memory, for bf16 and fp16.
template <int N>
FN vector<uint16_t, N> load_halves(const void* from) {
  return *static_cast<const typename Vector<uint16_t, N>::unaligned*>(from);
}
template <int N>
FN void store_halves(void* to, vector<uint16_t, N> x) {
  *static_cast<typename Vector<uint16_t, N>::unaligned*>(to) = x;
}

template <class V>
FN V load(const bf16* from) {
  const auto halves = convert<uint32_t, uint16_t, V::kWidth>(load_halves<V::kWidth>(from));
  return V::of(bits<typename V::Register>(halves << 16));
}

// Round to nearest, ties to even, in integers: the AVX-512 bf16 instruction would flush denormals.
template <int N>
FN void store(bf16* to, Lanes<float, N> x) {
  const auto word = bits<vector<uint32_t, N>>(x.v);
  const auto rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  const auto quiet = (word >> 16) | 0x40u;  // rounding could carry a NaN's payload into infinity
  const auto magnitude = word & 0x7fffffffu;
  const auto half = magnitude > 0x7f800000u ? quiet : rounded;
  store_halves<N>(to, convert<uint16_t, uint32_t, N>(half));
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
