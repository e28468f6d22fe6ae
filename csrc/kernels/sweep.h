// The loop that every rule shares, and how streams of any format come to it: read each stream once,
// update, write each changed stream once.
#pragma once

#include "interface/kernels.h"
#include "update.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// Whole registers of streams in a shape's formats.
template <class Rule, int kVariant, int kShape>
void update(const Row& row, void* const* at, int64_t n) {
  using P = In<kShapeList[kShape].param>;
  using G = In<kShapeList[kShape].grad>;
  using S = In<kShapeList[kShape].state>;
  using V = typename Computing<kShapeList[kShape].param>::type;
  using Step = typename Rule::template Step<V, kVariant>;
  constexpr int kCount = count(Rule::kStates);
  constexpr StateMask kMask = mask_of<Rule, Step>(0);

  const Step step = broadcast<Step, V>(row.scalars + 2);
  const V factor(static_cast<typename V::Scalar>(row.scalars[0]));
  const V decay(static_cast<typename V::Scalar>(row.scalars[1]));
  auto* param = static_cast<typename P::Element*>(at[kParam]);
  const auto* grad = static_cast<const typename G::Element*>(at[kGrad]);
  typename S::Element* state[kCount + 1];  // there are no empty arrays
  for (int s = 0; s < kCount; ++s) {
    state[s] = static_cast<typename S::Element*>(at[kState + s]);
  }
  const auto loop = [&](auto coupled) {
    _Pragma("GCC unroll 2") for (int64_t i = 0; i < n; i += V::kWidth) {
      V p = P::load(param + i), states[kCount + 1];
      const V g = G::load(grad + i);
      UNROLL
      for (int s = 0; s < kCount; ++s) {
        if (has(kMask, s)) states[s] = S::load(state[s] + i);
      }
      advance<Rule>(step, factor, decay, coupled.value, p, g, states);
      P::store(param + i, p);
      UNROLL
      for (int s = 0; s < kCount; ++s) {
        if (has(kMask, s)) S::store(state[s] + i, states[s]);
      }
    }
  };
  if (row.decay == kCoupled) {
    loop(Constant<true>());
  } else {
    loop(Constant<false>());
  }
}

// As many elements of a format as a register has floats, from and to floats or doubles.
template <class F, class T>
FN void decode_register(const typename F::Element* from, T* to) {
  if constexpr (sizeof(*from) == sizeof(T)) {
    __builtin_memcpy(to, from, F32::kWidth * sizeof(T));
  } else if constexpr (sizeof(*from) == sizeof(double)) {
    store(to, narrow<F32>(from));
  } else if constexpr (sizeof(T) == sizeof(double)) {
    widen(F::load(from), to);
  } else {
    store(to, F::load(from));
  }
}
template <class F, class T>
FN void encode_register(const T* from, typename F::Element* to) {
  if constexpr (sizeof(*to) == sizeof(T)) {
    __builtin_memcpy(to, from, F32::kWidth * sizeof(T));
  } else if constexpr (sizeof(*to) == sizeof(double)) {
    widen(load<F32>(from), to);
  } else if constexpr (sizeof(T) == sizeof(double)) {
    F::store(to, narrow<F32>(from));
  } else {
    F::store(to, load<F32>(from));
  }
}

// Copies fewer than 2*kLargest bytes, an even number, without a call.
template <int kLargest>
FN void copy_few(char* to, const char* from, int64_t bytes) {
  if (bytes & kLargest) {
    __builtin_memcpy(to, from, kLargest);
    to += kLargest;
    from += kLargest;
  }
  if constexpr (kLargest > 2) copy_few<kLargest / 2>(to, from, bytes);
}

template <Format kFormat, class T>
void decode(const Stream& stream, int64_t at, int64_t n, void* to) {
  using F = In<kFormat>;
  const auto* from = static_cast<const typename F::Element*>(stream.data) + at;
  auto* result = static_cast<T*>(to);
  int64_t i = 0;
  _Pragma("GCC unroll 4") for (; i + F32::kWidth <= n; i += F32::kWidth) {
    decode_register<F>(from + i, result + i);
  }
  if (i == n) return;
  typename F::Element tail[F32::kWidth] = {};
  __builtin_memcpy(tail, from + i, (n - i) * sizeof(tail[0]));
  decode_register<F>(tail, result + i);
}

template <Format kFormat, class T>
void encode(const Stream& stream, int64_t at, int64_t n, const void* from) {
  using F = In<kFormat>;
  auto* to = static_cast<typename F::Element*>(stream.data) + at;
  const auto* values = static_cast<const T*>(from);
  int64_t i = 0;
  _Pragma("GCC unroll 4") for (; i + F32::kWidth <= n; i += F32::kWidth) {
    encode_register<F>(values + i, to + i);
  }
  if (i == n) return;
  typename F::Element tail[F32::kWidth];
  encode_register<F>(values + i, tail);
  __builtin_memcpy(to + i, tail, (n - i) * sizeof(tail[0]));
}

// Elements that are staged at a time, and the bytes between two streams of them: an odd number of
// cache lines, so that rows and arrays do not meet in the same sets.
constexpr int64_t kBlock = 512;
constexpr int64_t kStride = kBlock * sizeof(double) + 64;

// Whether a step with these states has stream k.
FN bool has_stream(StateMask mask, int k) { return k < kState || has(mask, k - kState); }

// The shape that a segment's streams are in as they lie, or none.
FN int shape_of(const Segment& segment, StateMask mask) {
  for (int shape = 0; shape < kShapes; ++shape) {
    const Shape& formats = kShapeList[shape];
    bool fits = segment.stream[kParam].format == formats.param &&
                segment.stream[kGrad].format == formats.grad;
    for (int s = 0; fits && s < kMaxStates; ++s) {
      fits = !has(mask, s) || segment.stream[kState + s].format == formats.state;
    }
    if (fits) return shape;
  }
  return -1;
}

constexpr bool tails_fit() {
  for (const Shape& shape : kShapeList) {
    const int room = shape.param == Format::kF64 ? sizeof(double) : sizeof(float);
    const Format formats[] = {shape.param, shape.grad, shape.state};
    for (const Format format : formats) {
      const int bytes = kFormatInfo[static_cast<int>(format)].bytes;
      if (bytes > room || bytes % 2 != 0) return false;
    }
  }
  return true;
}
static_assert(tails_fit(), "sweep_tail's copies have room for a register, and no odd bytes");

// A shape's elements [begin, end), fewer than a register holds: the same update on padded copies.
FN void sweep_tail(Update update, const Segment& segment, StateMask mask, const Row& row,
                   int64_t width, int64_t begin, int64_t end) {
  alignas(64) char copies[kStreams][sizeof(F32)];
  void* at[kStreams] = {};
  const auto each = [&](const auto& body) {
    for (int k = 0; k < kStreams; ++k) {
      if (!has_stream(mask, k)) continue;
      const int64_t bytes = kFormatInfo[static_cast<int>(segment.stream[k].format)].bytes;
      body(k, static_cast<char*>(segment.stream[k].data) + begin * bytes, (end - begin) * bytes);
    }
  };
  each([&](int k, const char* data, int64_t bytes) {
    at[k] = copies[k];
    __builtin_memset(copies[k], 0, sizeof(copies[k]));
    copy_few<sizeof(F32) / 2>(copies[k], data, bytes);
  });
  update(row, at, width);
  each([&](int k, char* data, int64_t bytes) {
    if (k != kGrad) copy_few<sizeof(F32) / 2>(data, copies[k], bytes);
  });
}

FN void sweep(const Kernels& kernels, int rule, const Segment& segment, const Row& row,
              int64_t begin, int64_t end) {
  const StateMask mask = kernels.rules[rule].mask[row.variant];
  const Update(&update)[kShapes] = kernels.rules[rule].update[row.variant];
  const bool wide = segment.stream[kParam].format == Format::kF64;
  const Format computing = wide ? Format::kF64 : Format::kF32;
  const int64_t width = wide ? F64::kWidth : F32::kWidth;

  void* at[kStreams] = {};
  const auto point = [&](int k) {
    const Stream& stream = segment.stream[k];
    at[k] = static_cast<char*>(stream.data) +
            begin * kFormatInfo[static_cast<int>(stream.format)].bytes;
  };
  if (const int shape = shape_of(segment, mask); shape >= 0) {
    const int64_t whole = (end - begin) / width * width;
    for (int k = 0; k < kStreams; ++k) {
      if (has_stream(mask, k)) point(k);
    }
    update[shape](row, at, whole);
    if (begin + whole < end) {
      sweep_tail(update[shape], segment, mask, row, width, begin + whole, end);
    }
    return;
  }

  alignas(64) char staged[kStreams][kStride];
  while (begin < end) {
    int64_t n = end - begin < kBlock ? end - begin : kBlock;
    if (n > width) n -= n % width;  // the tail comes last, by itself
    for (int k = 0; k < kStreams; ++k) {
      const Stream& stream = segment.stream[k];
      if (!has_stream(mask, k)) continue;
      if (stream.format == computing && n % width == 0) {
        point(k);
      } else {
        kernels.codec[static_cast<int>(stream.format)][wide].decode(stream, begin, n, staged[k]);
        at[k] = staged[k];
      }
    }
    update[wide](row, at, (n + width - 1) / width * width);
    for (int k = 0; k < kStreams; ++k) {
      const Stream& stream = segment.stream[k];
      if (k == kGrad || at[k] != staged[k]) continue;
      kernels.codec[static_cast<int>(stream.format)][wide].encode(stream, begin, n, staged[k]);
    }
    begin += n;
  }
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
