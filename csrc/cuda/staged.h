// Streams of any format that a step may have, kVector neighbours at a time: asked for, decoded,
// encoded. Numbers stay in registers, so loops over streams are unrolled, and each stream has the
// conversions of those formats alone that it may be in.
#pragma once

#include "stream.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <Format kFormat>
constexpr int kShared = kFormatInfo[static_cast<int>(kFormat)].block;

// The formats that stream k of a rule may be in, under parameters that are computed with in V.
template <class Rule, class V, int k>
constexpr FormatSet make_formats() {
  if (k == kParam && kDouble<V>) return kOwn<V>;
  if (k == kParam) return kOwn<V> | set_of(Format::kSplit) | set_of(Format::kKahan);
  if (k == kGrad || k >= kEma) return kArrays;
  const bool positive = Rule::kStates.state[k - kState].sign == Sign::kPositive;
  return set_of(Format::kF32) | (kDouble<V> ? set_of(Format::kF64) : 0) | set_of(Format::kBf16) |
         set_of(positive ? Format::kQ8Positive : Format::kQ8);
}
template <class Rule, class V, int k>
constexpr FormatSet kFormatsOf = make_formats<Rule, V, k>();

// A thread's elements: kVector neighbours, of which there may be fewer at the ends of a tensor.
struct Part {
  const Segment& segment;
  int64_t at;      // the first one's index, which may be negative
  uint32_t entry;  // of what its block shares
  int n, own;      // how many elements the tile has, and where among them are these
  bool whole;      // of all of its threads, and vectors fit: they move as such

  // Of a segment's tile, which begins at the place of a multiple of kTogether: the first one may
  // begin before the segment.
  FN Part(const Segment& segment, int64_t tile, int size, int aligned)
      : segment(segment),
        entry(static_cast<uint32_t>(tile) * (size / kTogether) +
              threadIdx.x * kVector / kTogether) {
    const int thread = static_cast<int>(threadIdx.x) * kVector;
    const int ahead = static_cast<int>(static_cast<uint64_t>(segment.first) % kTogether);
    const int64_t begin = tile * size - ahead, left = segment.n - begin;
    const int before = tile == 0 ? ahead : 0;
    at = begin + thread;
    n = (left < size ? static_cast<int>(left) : size) - before;
    own = thread - before;
    whole = n * aligned == size;  // one condition, as it is often asked
  }
  FN bool has(int i) const { return static_cast<unsigned>(own + i) < static_cast<unsigned>(n); }
  FN bool has_block() const { return own < n; }
  FN int64_t place() const { return segment.first + at; }
};

template <class T>
FN void load_part(const void* data, const Part& part, T (&own)[kVector]) {
  const T* from = static_cast<const T*>(data) + part.at;
  if (part.whole) {
    load_vector(from, own);
  } else {
    UNROLL
    for (int i = 0; i < kVector; ++i) own[i] = part.has(i) ? from[i] : T{};
  }
}
template <class T>
FN void store_part(void* data, const Part& part, const T (&own)[kVector]) {
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

// What a thread keeps of a stream that it has asked for, so that nothing waits for one stream
// before all are asked for: elements as they lie in memory, or floats where doubles would be too
// many.
template <class V>
struct Fetched {
  uint32_t own[kVector * sizeof(V) / sizeof(uint32_t)];
  uint32_t beside[kVector * sizeof(uint16_t) / sizeof(uint32_t)];  // halves, or one base
};
template <class F, class V>
constexpr bool kFits = sizeof(typename F::Element) <= sizeof(V);

template <FormatSet kSet, class V>
FN void fetch(const Stream& stream, const Part& part, Fetched<V>& to) {
  in_format<kSet>(stream.format, [&](auto format) {
    constexpr Format kFormat = decltype(format)::value;
    using F = In<kFormat>;
    typename F::Element own[kVector];
    load_part(stream.data, part, own);
    if constexpr (kFits<F, V>) {
      copy_words<sizeof(own)>(to.own, own);
    } else {
      V values[kVector];
      UNROLL
      for (int i = 0; i < kVector; ++i) values[i] = as<V>(F::load(own + i));
      copy_words<sizeof(values)>(to.own, values);
    }
    if constexpr (kShared<kFormat> == 1) {
      typename F::Beside beside[kVector];
      load_part(stream.beside, part, beside);
      copy_words<sizeof(beside)>(to.beside, beside);
    } else if constexpr (kShared<kFormat> > 1) {
      const auto* bases = static_cast<const typename F::Beside*>(stream.beside);
      to.beside[0] = part.has_block() ? bases[part.entry] : 0;
    }
  });
}

template <FormatSet kSet, class V>
FN void decode(Format format, const Fetched<V>& from, V (&values)[kVector]) {
  in_format<kSet>(format, [&](auto constant) {
    constexpr Format kFormat = decltype(constant)::value;
    using F = In<kFormat>;
    if constexpr (!kFits<F, V>) {
      copy_words<sizeof(values)>(values, from.own);
    } else {
      typename F::Element own[kVector];
      copy_words<sizeof(own)>(own, from.own);
      if constexpr (kShared<kFormat> == 0) {
        UNROLL
        for (int i = 0; i < kVector; ++i) values[i] = as<V>(F::load(own + i));
      } else if constexpr (kShared<kFormat> == 1) {
        typename F::Beside beside[kVector];
        copy_words<sizeof(beside)>(beside, from.beside);
        UNROLL
        for (int i = 0; i < kVector; ++i) values[i] = as<V>(F::load(own + i, beside + i));
      } else {
        UNROLL
        for (int i = 0; i < kVector; ++i) values[i] = as<V>(F::load(own + i, from.beside[0]));
      }
    }
  });
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

// Random words for a thread's elements, which two streams share.
struct Drawn {
  uint32_t words[kVector];

  FN void draw(uint64_t key, int k, int64_t place) {
    const Random random(key, k, place);
    UNROLL
    for (int i = 0; i < kVector; ++i) words[i] = random.shared(i);
  }
};

template <Format kFormat>
constexpr bool kCanDither = kFormat == Format::kBf16 || kShared<kFormat> > 1;

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
template <Format kFormat, int k, class V, class... Base>
FN void store_rounded(Rounding rounding, const Drawn& drawn,
                      typename In<kFormat>::Element (&own)[kVector], const V (&values)[kVector],
                      Base... base) {
  using F = In<kFormat>;
  if constexpr (kCanDither<kFormat>) {
    if (rounding == Rounding::kStochastic) {
      UNROLL
      for (int i = 0; i < kVector; ++i) {
        const uint32_t random = Random::end<F::kRandomBits>(drawn.words[i], k % 2 != 0);
        dither_one<F>(own + i, values[i], random, base...);
      }
      return;
    }
  }
  UNROLL
  for (int i = 0; i < kVector; ++i) store_one<F>(own + i, values[i], base...);
}

// Numbers to stream k, by all of a block's threads. They become those that are stored where that is
// wanted.
template <FormatSet kSet, int k, class V>
FN void encode(const Stream& stream, const Drawn& drawn, const Part& part, bool wanted,
               V (&values)[kVector]) {
  in_format<kSet>(stream.format, [&](auto constant) {
    constexpr Format kFormat = decltype(constant)::value;
    using F = In<kFormat>;
    typename F::Element own[kVector];
    if constexpr (kShared<kFormat> == 0) {
      store_rounded<kFormat, k>(stream.rounding, drawn, own, values);
      if (wanted) {
        UNROLL
        for (int i = 0; i < kVector; ++i) values[i] = as<V>(F::load(own + i));
      }
    } else if constexpr (kShared<kFormat> == 1) {
      typename F::Beside beside[kVector];
      UNROLL
      for (int i = 0; i < kVector; ++i) {
        F::store(own + i, beside + i, as<F32>(values[i]));
        if (wanted) values[i] = as<V>(F::load(own + i, beside + i));
      }
      store_part(stream.beside, part, beside);
    } else {
      const uint32_t base = base_of<F>(part, values);
      if (threadIdx.x % 32 == 0 && part.has_block()) {
        static_cast<typename F::Beside*>(stream.beside)[part.entry] =
            static_cast<typename F::Beside>(base);
      }
      store_rounded<kFormat, k>(stream.rounding, drawn, own, values, base);
    }
    store_part(stream.data, part, own);
  });
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
