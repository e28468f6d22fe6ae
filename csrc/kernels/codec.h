// Streams of any format to and from floats or doubles, for the blocks that a sweep stages.
#pragma once

#include "formats/formats.h"
#include "interface/kernels.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// A register's floats from and to floats or doubles.
FN F32 load_values(const float* from) { return load<F32>(from); }
FN F32 load_values(const double* from) { return narrow<F32>(from); }
FN void store_values(float* to, F32 x) { store(to, x); }
FN void store_values(double* to, F32 x) { widen(x, to); }

// Whether elements of a format have something beside them, of their own or shared by a block.
template <Format kFormat>
constexpr int kShared = kFormatInfo[static_cast<int>(kFormat)].block;

// As many elements of an array's format as a register has floats.
template <class F, class T>
FN void decode_register(const typename F::Element* from, T* to) {
  if constexpr (sizeof(*from) == sizeof(T)) {
    __builtin_memcpy(to, from, F32::kWidth * sizeof(T));
  } else if constexpr (sizeof(*from) == sizeof(double)) {
    store(to, narrow<F32>(from));
  } else {
    store_values(to, F::load(from));
  }
}
template <class F, class T>
FN void encode_register(const T* from, typename F::Element* to) {
  if constexpr (sizeof(*to) == sizeof(T)) {
    __builtin_memcpy(to, from, F32::kWidth * sizeof(T));
  } else if constexpr (sizeof(*to) == sizeof(double)) {
    widen(load<F32>(from), to);
  } else {
    F::store(to, load_values(from));
  }
}

template <class T>
FN void copy(T* to, const T* from, int64_t n) {
  __builtin_memcpy(to, from, n * sizeof(T));
}

// Calls whole(i) for each register of n elements, and part(i, how many) for what is left.
template <class Whole, class Part>
FN void each_register(int64_t n, const Whole& whole, const Part& part) {
  int64_t i = 0;
  _Pragma("GCC unroll 4") for (; i + F32::kWidth <= n; i += F32::kWidth) whole(i);
  if (i < n) part(i, n - i);
}

// Calls body(from, to, entry) for the parts [from, to) of n elements that share an entry beside
// them. Entries are counted from the stream's first element, which is `at` before the first of these.
template <class Body>
FN void each_block(int64_t block, int64_t at, int64_t place, int64_t n, const Body& body) {
  const int64_t first = (place - at) / block;
  for (int64_t from = 0; from < n;) {
    const int64_t here = place + from, left = block - here % block;
    const int64_t to = n - from < left ? n : from + left;
    body(from, to, here / block - first);
    from = to;
  }
}

template <Format kFormat, class T>
void decode(const Stream& stream, int64_t at, [[maybe_unused]] int64_t place, int64_t n, void* to) {
  using F = In<kFormat>;
  using Element = typename F::Element;
  const auto* from = static_cast<const Element*>(stream.data) + at;
  auto* result = static_cast<T*>(to);
  if constexpr (kShared<kFormat> > 1) {
    const auto* entries = static_cast<const typename F::Beside*>(stream.beside);
    each_block(kShared<kFormat>, at, place, n, [&](int64_t begin, int64_t end, int64_t entry) {
      const uint32_t base = entries[entry];
      each_register(
          end - begin,
          [&](int64_t i) { store_values(result + begin + i, F::load(from + begin + i, base)); },
          [&](int64_t i, int64_t left) {
            Element tail[F32::kWidth] = {};
            copy(tail, from + begin + i, left);
            store_values(result + begin + i, F::load(tail, base));
          });
    });
  } else if constexpr (kShared<kFormat> == 1) {
    const auto* beside = static_cast<const typename F::Beside*>(stream.beside) + at;
    each_register(
        n, [&](int64_t i) { store_values(result + i, F::load(from + i, beside + i)); },
        [&](int64_t i, int64_t left) {
          Element tail[F32::kWidth] = {};
          typename F::Beside tail_beside[F32::kWidth] = {};
          copy(tail, from + i, left);
          copy(tail_beside, beside + i, left);
          store_values(result + i, F::load(tail, tail_beside));
        });
  } else {
    each_register(
        n, [&](int64_t i) { decode_register<F>(from + i, result + i); },
        [&](int64_t i, int64_t left) {
          Element tail[F32::kWidth] = {};
          copy(tail, from + i, left);
          decode_register<F>(tail, result + i);
        });
  }
}

template <class Words>
FN uint32_t largest_lane(Words words) {
  uint32_t lanes[F32::kWidth], most = 0;
  __builtin_memcpy(lanes, &words, sizeof(lanes));
  UNROLL
  for (int l = 0; l < F32::kWidth; ++l) most = lanes[l] > most ? lanes[l] : most;
  return most;
}

// The word of the largest of n values, without its sign.
template <class F, class T>
FN uint32_t largest_word(const T* values, int64_t n) {
  auto largest = F::magnitude(F32(0));
  const auto compare = [&](const T* x) { largest = F::larger(largest, load_values(x)); };
  each_register(
      n, [&](int64_t i) { compare(values + i); },
      [&](int64_t i, int64_t left) {
        T tail[F32::kWidth] = {};
        copy(tail, values + i, left);
        compare(tail);
      });
  return largest_lane(largest);
}

// `kRandom`: rounded at random, by a format that can be.
template <Format kFormat, bool kRandom, class T>
FN void encode_as(const Stream& stream, [[maybe_unused]] int k, int64_t at,
                  [[maybe_unused]] int64_t place, int64_t n, const T* values,
                  [[maybe_unused]] uint64_t key) {
  using F = In<kFormat>;
  using Element = typename F::Element;
  auto* to = static_cast<Element*>(stream.data) + at;
  [[maybe_unused]] const Random random(key, k, place);
  if constexpr (kShared<kFormat> > 1) {
    auto* entries = static_cast<typename F::Beside*>(stream.beside);
    each_block(kShared<kFormat>, at, place, n, [&](int64_t begin, int64_t end, int64_t entry) {
      const uint32_t base = F::base_of(largest_word<F>(values + begin, end - begin));
      entries[entry] = static_cast<typename F::Beside>(base);
      const auto put = [&](Element* into, F32 x, int64_t i) {
        if constexpr (kRandom) {
          F::store_codes(into, F::dithered(x, base, random.template words<F::kRandomBits>(i)));
        } else {
          F::store_codes(into, F::nearest(x, base));
        }
      };
      each_register(
          end - begin,
          [&](int64_t i) { put(to + begin + i, load_values(values + begin + i), begin + i); },
          [&](int64_t i, int64_t left) {
            Element tail[F32::kWidth];
            put(tail, load_values(values + begin + i), begin + i);
            copy(to + begin + i, tail, left);
          });
    });
  } else if constexpr (kShared<kFormat> == 1) {
    auto* beside = static_cast<typename F::Beside*>(stream.beside) + at;
    each_register(
        n, [&](int64_t i) { F::store(to + i, beside + i, load_values(values + i)); },
        [&](int64_t i, int64_t left) {
          Element tail[F32::kWidth];
          typename F::Beside tail_beside[F32::kWidth];
          F::store(tail, tail_beside, load_values(values + i));
          copy(to + i, tail, left);
          copy(beside + i, tail_beside, left);
        });
  } else {
    const auto put = [&](Element* into, const T* x, [[maybe_unused]] int64_t i) {
      if constexpr (kRandom) {
        F::dither(into, load_values(x), random.template words<F::kRandomBits>(i));
      } else {
        encode_register<F>(x, into);
      }
    };
    each_register(
        n, [&](int64_t i) { put(to + i, values + i, i); },
        [&](int64_t i, int64_t left) {
          Element tail[F32::kWidth];
          put(tail, values + i, i);
          copy(to + i, tail, left);
        });
  }
}

template <Format kFormat>
constexpr bool kCanDither = kFormat == Format::kBf16 || kShared<kFormat> > 1;

template <Format kFormat, class T>
void encode(const Stream& stream, int k, int64_t at, int64_t place, int64_t n, const void* from,
            uint64_t key) {
  const auto* values = static_cast<const T*>(from);
  if constexpr (kCanDither<kFormat>) {
    if (stream.rounding == Rounding::kStochastic) {
      encode_as<kFormat, true>(stream, k, at, place, n, values, key);
      return;
    }
  }
  encode_as<kFormat, false>(stream, k, at, place, n, values, key);
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
