// Streams of any format by way of shared memory, where each thread has a slot for each: there the
// elements arrive as they lie in memory, become numbers, and are encoded from. Loops over streams stay
// loops, so that a kernel has each conversion once.
#pragma once

#include "stream.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// A column of the formats' table, 4 bits each, for a format that is known at run time.
constexpr uint64_t column(int FormatInfo::* of) {
  uint64_t all = 0;
  for (int f = 0; f < kFormats; ++f) all |= static_cast<uint64_t>(kFormatInfo[f].*of & 15) << 4 * f;
  return all;
}
constexpr uint64_t kBytes = column(&FormatInfo::bytes), kBlocks = column(&FormatInfo::block);
static_assert(kTogether % 16 == 0, "of a block's length 4 bits say whether it is 1");

FN int bytes_of(Format format) { return kBytes >> 4 * static_cast<int>(format) & 15; }
FN bool has_halves(Format format) { return (kBlocks >> 4 * static_cast<int>(format) & 15) == 1; }
FN bool has_base(Format format) { return format == Format::kQ8 || format == Format::kQ8Positive; }

template <Format kFormat>
constexpr int kShared = kFormatInfo[static_cast<int>(kFormat)].block;

// Calls body with the format, of all.
template <int kNumber = 1, class Body>
FN void in_any_format(Format format, const Body& body) {
  if constexpr (kNumber + 1 < kFormats) {
    if (static_cast<int>(format) != kNumber) return in_any_format<kNumber + 1>(format, body);
  }
  body(std::integral_constant<Format, static_cast<Format>(kNumber)>());
}

// A thread's elements: kVector neighbours, of which there may be fewer at the ends of a tensor.
struct Part {
  int64_t at;     // the first one's index, which may be negative
  int64_t n;      // of the tensor's elements
  int64_t first;  // the place of its first one
  bool whole;     // of all of a block's: they move as vectors

  FN bool has(int i) const { return at + i >= 0 && at + i < n; }
  FN int64_t place() const { return first + at; }
  FN int64_t entry() const { return place() / kTogether - first / kTogether; }
};

// kVector numbers of a stream, or its elements. What shares a base has it in the second word; halves
// have theirs from the third on.
template <class V>
using Slot = uint4[kVector * sizeof(V) / sizeof(uint4)];

template <class V>
FN void load_slot(const Slot<V>& slot, Slot<V>& to) {
  UNROLL
  for (size_t i = 0; i < sizeof(to) / sizeof(to[0]); ++i) to[i] = slot[i];
}
template <class V>
FN void load_slot(const Slot<V>& slot, V (&values)[kVector]) {
  Slot<V> words;
  load_slot<V>(slot, words);
  copy_words<sizeof(values)>(values, words);
}
template <class V>
FN void store_slot(Slot<V>& slot, const V (&values)[kVector]) {
  Slot<V> words;
  copy_words<sizeof(words)>(words, values);
  load_slot<V>(words, slot);
}

// Copies to shared memory that go on while the thread does.
template <int kBytes>
FN void begin_copy(void* to, const void* from) {
  if constexpr (kBytes > 16) {
    begin_copy<16>(to, from);
    begin_copy<kBytes - 16>(static_cast<char*>(to) + 16, static_cast<const char*>(from) + 16);
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from)), "n"(kBytes)
                 : "memory");
#else
    using W = std::conditional_t<kBytes == 4, uint32_t, Words<uint8_t[kBytes / kVector]> >;
    W words;
    load_words(static_cast<const W*>(from), words);
    *static_cast<W*>(to) = words;
#endif
  }
}
FN void await_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The largest of a warp's words.
FN uint32_t largest_of_warp(uint32_t word) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xffffffffu, word);
#else
  UNROLL
  for (int lane = 16; lane > 0; lane /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, word, lane);
    word = other > word ? other : word;
  }
  return word;
#endif
}

template <class T>
FN void gather(const void* data, const Part& part, T (&own)[kVector]) {
  const T* from = static_cast<const T*>(data) + part.at;
  UNROLL
  for (int i = 0; i < kVector; ++i) own[i] = part.has(i) ? from[i] : T{};
}

// Elements of T's size to where they will be once copies have been awaited.
template <class T>
FN void bring(const void* data, const Part& part, void* to) {
  if (part.whole) {
    begin_copy<kVector * sizeof(T)>(to, static_cast<const T*>(data) + part.at);
  } else {
    T own[kVector];
    gather(data, part, own);
    __builtin_memcpy(to, own, sizeof(own));
  }
}
template <class V>
FN void bring(const Stream& stream, const Part& part, Slot<V>& slot) {
  switch (bytes_of(stream.format)) {
    case 1:
      return bring<uint8_t>(stream.data, part, slot);
    case 2:
      if (has_halves(stream.format)) {
        bring<uint16_t>(stream.beside, part, reinterpret_cast<uint2*>(slot) + 1);
      }
      return bring<uint16_t>(stream.data, part, slot);
    case 4:
      return bring<uint32_t>(stream.data, part, slot);
    default:
      if constexpr (kDouble<V>) {
        bring<uint64_t>(stream.data, part, slot);
      } else {  // has no room in the slot
        double own[kVector];
        V values[kVector];
        gather(stream.data, part, own);
        UNROLL
        for (int i = 0; i < kVector; ++i) values[i] = as<V>(F64(own[i]));
        store_slot<V>(slot, values);
      }
  }
}

// The numbers that a slot's elements are, in the slot.
template <class V>
FN void decode(Format format, Slot<V>& slot) {
  if (format == Format::kF64 || (!kDouble<V> && format == Format::kF32)) return;  // they are
  in_any_format(format, [&](auto constant) {
    constexpr Format kFormat = decltype(constant)::value;
    using F = In<kFormat>;
    if constexpr (!kDouble<typename F::Register>) {
      Slot<V> words;
      load_slot<V>(slot, words);
      typename F::Element own[kVector];
      copy_words<sizeof(own)>(own, words);
      V values[kVector];
      if constexpr (kShared<kFormat> == 0) {
        UNROLL
        for (int i = 0; i < kVector; ++i) values[i] = as<V>(F::load(own + i));
      } else if constexpr (kShared<kFormat> == 1) {
        typename F::Beside beside[kVector];
        copy_words<sizeof(beside)>(beside, reinterpret_cast<const uint2*>(words) + 1);
        UNROLL
        for (int i = 0; i < kVector; ++i) values[i] = as<V>(F::load(own + i, beside + i));
      } else {
        UNROLL
        for (int i = 0; i < kVector; ++i) values[i] = as<V>(F::load(own + i, words[0].y));
      }
      store_slot<V>(slot, values);
    }
  });
}

template <class T>
FN void send(const T (&own)[kVector], void* data, const Part& part) {
  T* to = static_cast<T*>(data) + part.at;
  if (part.whole) {
    store_vector(to, own);
  } else {
    UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (part.has(i)) to[i] = own[i];
    }
  }
}

template <Format kFormat>
constexpr bool kCanDither = kFormat == Format::kBf16 || kShared<kFormat> > 1;

// What one base serves, of numbers that all of a warp's threads have: the base for their largest.
template <class F, class V>
FN uint32_t base_of(const Part& part, const V (&values)[kVector]) {
  uint32_t largest = 0;
  UNROLL
  for (int i = 0; i < kVector; ++i) {
    const uint32_t word = F::magnitude(as<F32>(values[i]));
    if (part.has(i) && word > largest) largest = word;
  }
  return F::base_of(largest_of_warp(largest));
}

// A number to an element of a format, of which one base serves a block; the nearest or, of random
// bits, one of its neighbours.
template <class F, class V>
FN void store_one(typename F::Element* to, V x) {
  F::store(to, as<typename F::Register>(x));
}
template <class F, class V>
FN void store_one(uint8_t* to, V x, uint32_t base) {
  F::store_codes(to, F::nearest(as<F32>(x), base));
}
template <class F, class V>
FN void dither_one(typename F::Element* to, V x, uint32_t random) {
  F::dither(to, as<F32>(x), random);
}
template <class F, class V>
FN void dither_one(uint8_t* to, V x, uint32_t random, uint32_t base) {
  F::store_codes(to, F::dithered(as<F32>(x), base, random));
}

// Numbers to elements of a format, rounded as the stream says.
template <Format kFormat, class V, class... Base>
FN void store_rounded(const Stream& stream, int k, uint64_t key, const Part& part,
                      typename In<kFormat>::Element (&own)[kVector], const V (&values)[kVector],
                      Base... base) {
  using F = In<kFormat>;
  if constexpr (kCanDither<kFormat>) {
    if (stream.rounding == Rounding::kStochastic) {
      const Random random(key, k, part.place());
      UNROLL
      for (int i = 0; i < kVector; ++i) {
        dither_one<F>(own + i, values[i], random.words<F::kRandomBits>(i), base...);
      }
      return;
    }
  }
  UNROLL
  for (int i = 0; i < kVector; ++i) store_one<F>(own + i, values[i], base...);
}

// Numbers to stream k, by all of a block's threads. They become those that are stored where that is
// wanted.
template <class V>
FN void encode(const Stream& stream, int k, uint64_t key, const Part& part, bool wanted,
               V (&values)[kVector]) {
  in_any_format(stream.format, [&](auto constant) {
    constexpr Format kFormat = decltype(constant)::value;
    using F = In<kFormat>;
    typename F::Element own[kVector];
    if constexpr (kShared<kFormat> == 0) {
      store_rounded<kFormat>(stream, k, key, part, own, values);
      UNROLL
      for (int i = 0; i < kVector; ++i) {
        if (wanted) values[i] = as<V>(F::load(own + i));
      }
    } else if constexpr (kShared<kFormat> == 1) {
      typename F::Beside beside[kVector];
      UNROLL
      for (int i = 0; i < kVector; ++i) {
        F::store(own + i, beside + i, as<F32>(values[i]));
        if (wanted) values[i] = as<V>(F::load(own + i, beside + i));
      }
      send(beside, stream.beside, part);
    } else {
      const uint32_t base = base_of<F>(part, values);
      if (threadIdx.x % 32 == 0 && part.at < part.n) {
        static_cast<typename F::Beside*>(stream.beside)[part.entry()] =
            static_cast<typename F::Beside>(base);
      }
      store_rounded<kFormat>(stream, k, key, part, own, values, base);
    }
    send(own, stream.data, part);
  });
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
