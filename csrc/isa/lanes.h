// A register of N lanes with the operations that rules are written in, over the compiler's vector
// extension, so that one text serves every CPU set; a set adds its width, fma, sqrt and fp16.
#pragma once

#include <stdint.h>

#define FN [[gnu::always_inline]] inline
#define FN_LAMBDA __attribute__((always_inline))
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

// A register in memory.
template <class V>
FN V load(const typename V::Scalar* from) {
  return V::of(*reinterpret_cast<const typename V::Unaligned*>(from));
}
template <class T, int N>
FN void store(T* to, Lanes<T, N> x) {
  *reinterpret_cast<typename Lanes<T, N>::Unaligned*>(to) = x.v;
}

// The bits of floats as words, and words of which only the upper half is in memory.
template <int N>
FN vector<uint32_t, N> words_of(Lanes<float, N> x) {
  return bits<vector<uint32_t, N>>(x.v);
}
template <int N>
FN Lanes<float, N> float_of(vector<uint32_t, N> word) {
  return Lanes<float, N>::of(bits<vector<float, N>>(word));
}
template <int N>
FN vector<uint32_t, N> load_high(const uint16_t* from) {
  const auto halves = *reinterpret_cast<const typename Vector<uint16_t, N>::unaligned*>(from);
  return convert<uint32_t, uint16_t, N>(halves) << 16;
}
template <int N>
FN void store_high(uint16_t* to, vector<uint32_t, N> x) {
  *reinterpret_cast<typename Vector<uint16_t, N>::unaligned*>(to) =
      convert<uint16_t, uint32_t, N>(x >> 16);
}

// Words of which only the lower half is in memory, as signed numbers.
template <int N>
FN vector<uint32_t, N> load_low(const uint16_t* from) {
  const auto shifted = bits<vector<int32_t, N>>(load_high<N>(from));
  return bits<vector<uint32_t, N>>(vector<int32_t, N>(shifted >> 16));
}
template <int N>
FN void store_low(uint16_t* to, vector<uint32_t, N> x) {
  store_high<N>(to, x << 16);
}

// Words of which only the lowest byte is in memory.
template <int N>
FN vector<uint32_t, N> load_bytes(const uint8_t* from) {
  return convert<uint32_t, uint8_t, N>(
      *reinterpret_cast<const typename Vector<uint8_t, N>::unaligned*>(from));
}
template <int N>
FN vector<uint32_t, N> load_signed_bytes(const uint8_t* from) {
  const auto x = bits<vector<int32_t, N>>(load_bytes<N>(from) << 24);
  return bits<vector<uint32_t, N>>(vector<int32_t, N>(x >> 24));
}

// Words as signed numbers: without their signs, and with those of others.
template <int N>
FN vector<uint32_t, N> abs_word(vector<uint32_t, N> a) {
  const auto x = bits<vector<int32_t, N>>(a);
  return bits<vector<uint32_t, N>>(vector<int32_t, N>(x < 0 ? -x : x));
}
template <int N>
FN vector<uint32_t, N> with_sign(vector<uint32_t, N> a, vector<uint32_t, N> sign) {
  const auto x = bits<vector<int32_t, N>>(sign);
  const auto all = bits<vector<uint32_t, N>>(vector<int32_t, N>(x >> 31));
  return (a ^ all) - all;
}

// Zero where b is, else a; b is not negative.
template <int N>
FN vector<uint32_t, N> zero_where_zero(vector<uint32_t, N> a, vector<uint32_t, N> b) {
  return bits<vector<int32_t, N>>(b) > 0 ? a : b;
}

// a > b ? x : y of words as signed numbers.
template <int N>
FN vector<uint32_t, N> select_word_gt(vector<uint32_t, N> a, vector<uint32_t, N> b,
                                      vector<uint32_t, N> x, vector<uint32_t, N> y) {
  using Signed = vector<int32_t, N>;
  return bits<Signed>(a) > bits<Signed>(b) ? x : y;
}

// The larger and the smaller of words as signed numbers, in the form that is one instruction.
template <int N>
FN vector<uint32_t, N> max_word(vector<uint32_t, N> a, vector<uint32_t, N> b) {
  const auto x = bits<vector<int32_t, N>>(a), y = bits<vector<int32_t, N>>(b);
  return bits<vector<uint32_t, N>>(vector<int32_t, N>(x > y ? x : y));
}
template <int N>
FN vector<uint32_t, N> min_word(vector<uint32_t, N> a, vector<uint32_t, N> b) {
  const auto x = bits<vector<int32_t, N>>(a), y = bits<vector<int32_t, N>>(b);
  return bits<vector<uint32_t, N>>(vector<int32_t, N>(x < y ? x : y));
}

// Words, which are 0 or more, as bytes, and words as signed bytes; those out of range as the nearest.
template <int N>
FN void store_bytes(uint8_t* to, vector<uint32_t, N> x) {
  const auto most = x - x + 255u;
  *reinterpret_cast<typename Vector<uint8_t, N>::unaligned*>(to) =
      convert<uint8_t, uint32_t, N>(min_word<N>(x, most));
}
template <int N>
FN void store_signed_bytes(uint8_t* to, vector<uint32_t, N> x) {
  const auto most = x - x + 127u;
  *reinterpret_cast<typename Vector<uint8_t, N>::unaligned*>(to) =
      convert<uint8_t, uint32_t, N>(max_word<N>(min_word<N>(x, most), 0u - most) & 255u);
}
// The same of four registers.
template <int N>
FN void store_bytes(uint8_t* to, const vector<uint32_t, N> (&x)[4]) {
  UNROLL
  for (int64_t r = 0; r < 4; ++r) store_bytes<N>(to + r * N, x[r]);
}
template <int N>
FN void store_signed_bytes(uint8_t* to, const vector<uint32_t, N> (&x)[4]) {
  UNROLL
  for (int64_t r = 0; r < 4; ++r) store_signed_bytes<N>(to + r * N, x[r]);
}

// The numbers begin, begin + 1, ... in the lanes.
template <int N>
FN vector<uint32_t, N> count_from(uint32_t begin) {
  uint32_t lanes[N];
  UNROLL
  for (int l = 0; l < N; ++l) lanes[l] = l;
  vector<uint32_t, N> x;
  __builtin_memcpy(&x, lanes, sizeof(x));
  return x + begin;
}

// Floats as doubles, exactly, and doubles rounded to floats. One value at a time: GCC makes
// whole-register conversions of these loops, but puts __builtin_convertvector together from halves.
template <int N>
FN void widen(Lanes<float, N> x, double* to) {
  float lanes[N];
  store(lanes, x);
  UNROLL
  for (int l = 0; l < N; ++l) to[l] = lanes[l];
}
template <class V>
FN V narrow(const double* from) {
  float lanes[V::kWidth];
  UNROLL
  for (int l = 0; l < V::kWidth; ++l) lanes[l] = static_cast<float>(from[l]);
  __asm__("" : "+m"(lanes));  // GCC 12's vectorizer leaves out some that are widened again
  return load<V>(lanes);
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
