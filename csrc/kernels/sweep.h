// The loop that every rule shares, and how streams of any format come to it: read each stream once,
// update, write each changed stream once.
#pragma once

#include "after.h"
#include "codec.h"
#include "interface/kernels.h"
#include "update.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

// Asks memory for what is to be read soon, and mostly written.
FN void fetch(const void* at, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    __builtin_prefetch(static_cast<const char*>(at) + byte, 1);
  }
}

// The format of state s where a shape's states are in 8 bits or in any other format.
template <class Rule, int kShape, int s>
constexpr Format state_in() {
  constexpr Format kFormat = kShapeList[kShape].state;
  if (kFormat != Format::kQ8) return kFormat;
  return Rule::kStates.state[s].sign == Sign::kPositive ? Format::kQ8Positive : kFormat;
}

// What an update left of states in 8 bits in the first-level cache, as codes: elements
// [first, first + n), at most a block. It knows which states there are and no rule, so that a set has
// few of it. Memory would be idle meanwhile: it fetches what the next block begins with.
template <bool kRandom, StateMask kMask, StateMask kPositive>
[[gnu::noinline]] void store_coded(const Row& row, const Run& run, const float (*values)[kBlock],
                                   const uint32_t (*base)[kBlock / kShared<Format::kQ8>],
                                   int64_t first, int64_t n) {
  constexpr int kWidth = F32::kWidth, kFour = 4 * kWidth;
  // Local, as bytes that are stored could be anything else in memory.
  const auto* param = static_cast<const float*>(run.at[kParam]);
  const auto* grad = static_cast<const float*>(run.at[kGrad]);
  uint8_t* codes[kMaxStates];
  [[maybe_unused]] Random bits[kMaxStates];
  // Calls body with the number of each state and its format.
  const auto each_state = [&](const auto& body) FN_LAMBDA {
    each<kMaxStates>([&](auto index) FN_LAMBDA {
      constexpr int s = decltype(index)::value;
      if constexpr (has(kMask, s)) {
        body(index, In<has(kPositive, s) ? Format::kQ8Positive : Format::kQ8>());
      }
    });
  };
  each_state([&](auto s, auto) FN_LAMBDA {
    codes[s.value] = static_cast<uint8_t*>(run.at[kState + s.value]) + first;
    if constexpr (kRandom) bits[s.value] = Random(row.key, kState + s.value, run.place);
  });
  const auto code_at = [&](auto s, auto format, int64_t i, uint32_t own) FN_LAMBDA {
    const F32 x = load<F32>(values[s.value] + i);
    if constexpr (kRandom) {
      constexpr int kBits = decltype(format)::kRandomBits;
      return format.dithered(x, own, bits[s.value].template words<kBits>(first + i));
    } else {
      return format.nearest(x, own);
    }
  };
  int64_t i = 0;
  for (; i + kFour <= n; i += kFour) {
    fetch(param + first + kBlock + i, kFour * sizeof(*param));
    fetch(grad + first + kBlock + i, kFour * sizeof(*grad));
    each_state([&](auto s, auto) FN_LAMBDA { fetch(codes[s.value] + kBlock + i, kFour); });
    each_state([&](auto s, auto format) FN_LAMBDA {
      const uint32_t own = base[s.value][i / kShared<Format::kQ8>];
      decltype(words_of(F32())) four[4];
      UNROLL
      for (int64_t r = 0; r < 4; ++r) four[r] = code_at(s, format, i + r * kWidth, own);
      format.store_codes(codes[s.value] + i, four);
    });
  }
  for (; i < n; i += kWidth) {
    each_state([&](auto s, auto format) FN_LAMBDA {
      const uint32_t own = base[s.value][i / kShared<Format::kQ8>];
      format.store_codes(codes[s.value] + i, code_at(s, format, i, own));
    });
  }
}

// Of a rule's states those that are never negative.
template <class Rule>
constexpr StateMask positive_states() {
  StateMask mask = 0;
  for (int s = 0; s < count(Rule::kStates); ++s) {
    if (Rule::kStates.state[s].sign == Sign::kPositive) mask |= 1u << s;
  }
  return mask;
}

// Whole registers of streams in a shape's formats.
template <class Rule, int kVariant, int kShape>
void update(const Row& row, const Run& run, int64_t n) {
  using P = In<kShapeList[kShape].param>;
  using G = In<kShapeList[kShape].grad>;
  using V = typename Computing<kShapeList[kShape].param>::type;
  using Step = typename Rule::template Step<V, kVariant>;
  constexpr int kCount = count(Rule::kStates);
  constexpr StateMask kMask = mask_of<Rule, Step>(0);
  // States in 8 bits are encoded when all of their block is known.
  constexpr int kTogether = kShared<kShapeList[kShape].state>;

  const Step step = broadcast<Step, V>(row.scalars + 2);
  const V factor(static_cast<typename V::Scalar>(row.scalars[0]));
  const V decay(static_cast<typename V::Scalar>(row.scalars[1]));
  auto* param = static_cast<typename P::Element*>(run.at[kParam]);
  const auto* grad = static_cast<const typename G::Element*>(run.at[kGrad]);
  // Local, as bytes that are stored could be anything else in memory.
  void* state[kCount + 1];
  [[maybe_unused]] uint8_t* exponents[kCount + 1];
  [[maybe_unused]] Random bits[kCount + 1];
  for (int s = 0; s < kCount; ++s) {
    if (!has(kMask, s)) continue;
    state[s] = run.at[kState + s];
    if constexpr (kTogether > 1) exponents[s] = run.exponents[s];
    if constexpr (kCanDither<kShapeList[kShape].state> && kTogether == 0) {
      bits[s] = Random(row.key, kState + s, run.place);
    }
  }
  // Calls body with the number of each state, its format, and where element i of it is.
  const auto each_state = [&](int64_t i, const auto& body) FN_LAMBDA {
    each<kCount>([&](auto index) FN_LAMBDA {
      constexpr int s = decltype(index)::value;
      using S = In<state_in<Rule, kShape, s>()>;
      if constexpr (has(kMask, s)) {
        body(index, S(), static_cast<typename S::Element*>(state[s]) + i);
      }
    });
  };

  const auto loop = [&](auto coupled, auto random) FN_LAMBDA {
    const auto advance_at = [&](int64_t i, const auto& load_state,
                                const auto& store_state) FN_LAMBDA {
      V p = P::load(param + i), states[kCount + 1];  // there are no empty arrays
      const V g = G::load(grad + i);
      each_state(i, [&](auto s, auto format, const auto* from)
                        FN_LAMBDA { states[s.value] = load_state(s, format, from); });
      advance<Rule>(step, factor, decay, coupled, p, g, states);
      P::store(param + i, p);
      each_state(i, [&](auto s, auto format, auto* to)
                        FN_LAMBDA { store_state(s, format, to, states[s.value]); });
    };
    if constexpr (kTogether > 1 && kMask != 0) {
      alignas(64) float values[kCount][kBlock];
      uint32_t base[kCount][kBlock / kTogether];
      constexpr StateMask kPositive = positive_states<Rule>() & kMask;
      const auto store_all = run.stochastic ? store_coded<true, kMask, kPositive>
                                            : store_coded<false, kMask, kPositive>;
      for (int64_t first = 0; first < n; first += kBlock) {
        const int64_t size = n - first < kBlock ? n - first : kBlock;
        for (int64_t begin = 0; begin < size; begin += kTogether) {
          const int64_t end = size - begin < kTogether ? size : begin + kTogether;
          const int64_t block = begin / kTogether;
          decltype(words_of(V())) largest[kCount];
          uint32_t before[kCount];
          each_state(0, [&](auto s, auto, auto*) FN_LAMBDA {
            before[s.value] = exponents[s.value][first / kTogether + block];
            largest[s.value] = words_of(V(0));
          });
          _Pragma("GCC unroll 2") for (int64_t i = begin; i < end; i += V::kWidth) {
            advance_at(
                first + i,
                [&](auto s, auto format, const auto* from)
                    FN_LAMBDA { return format.load(from, before[s.value]); },
                [&](auto s, auto format, auto*, V x) FN_LAMBDA {
                  store(values[s.value] + i, x);
                  auto& most = largest[s.value];
                  most = format.larger(most, x);
                });
          }
          each_state(0, [&](auto s, auto format, auto*) FN_LAMBDA {
            const uint32_t own = format.base_of(largest_lane(largest[s.value]));
            base[s.value][block] = own;
            exponents[s.value][first / kTogether + block] = static_cast<uint8_t>(own);
          });
        }
        store_all(row, run, values, base, first, size);
      }
    } else {
      _Pragma("GCC unroll 2") for (int64_t i = 0; i < n; i += V::kWidth) {
        advance_at(
            i, [&](auto, auto format, const auto* from) FN_LAMBDA { return format.load(from); },
            [&](auto s, auto format, auto* to, V x) FN_LAMBDA {
              if constexpr (random.value) {
                constexpr int kBits = decltype(format)::kRandomBits;
                format.dither(to, x, bits[s.value].template words<kBits>(i));
              } else {
                format.store(to, x);
              }
            });
      }
    }
  };
  // Where states are converted, a branch on decay costs nothing, where they are not a tenth in cache.
  const bool coupled = row.decay == kCoupled;
  if constexpr (kTogether > 1 && kMask != 0) {
    loop(coupled, Constant<false>());
  } else if constexpr (kCanDither<kShapeList[kShape].state> && kMask != 0) {
    if (run.stochastic) {
      loop(coupled, Constant<true>());
    } else {
      loop(coupled, Constant<false>());
    }
  } else if (coupled) {
    loop(Constant<true>(), Constant<false>());
  } else {
    loop(Constant<false>(), Constant<false>());
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

// The bytes between two staged streams: an odd number of cache lines, so that rows and arrays do not
// meet in the same sets, and room for the register that a shard's first block may end in.
constexpr int64_t kStride = kBlock * sizeof(double) + 192;

// Whether a step with these states updates stream k.
FN bool has_stream(StateMask mask, int k) {
  return k < kState || (k < kEma && has(mask, k - kState));
}

constexpr bool tails_fit() {
  for (const Shape& shape : kShapeList) {
    const int room = shape.param == Format::kF64 ? sizeof(double) : sizeof(float);
    if (kFormatInfo[static_cast<int>(shape.state)].block > 0) continue;  // never as it lies
    const Format formats[] = {shape.param, shape.grad, shape.state};
    for (const Format format : formats) {
      const int bytes = kFormatInfo[static_cast<int>(format)].bytes;
      if (bytes > room || bytes % 2 != 0) return false;
    }
  }
  return true;
}
static_assert(tails_fit(), "sweep_tail's copies have room for a register, and no odd bytes");

FN void* address(const Stream& stream, int64_t at) {
  return static_cast<char*>(stream.data) + at * kFormatInfo[static_cast<int>(stream.format)].bytes;
}

// A shape's elements [begin, end), fewer than a register holds: the same update on padded copies.
FN void sweep_tail(Update update, const Segment& segment, StateMask mask, const Row& row,
                   int64_t width, int64_t begin, int64_t end) {
  alignas(64) char copies[kStreams][sizeof(F32)];
  Run run;  // of which no more is set than is read: small tensors are many
  run.place = run.stochastic = 0;
  const auto each_stream = [&](const auto& body) {
    for (int k = 0; k < kStreams; ++k) {
      if (!has_stream(mask, k)) continue;
      const int64_t bytes = kFormatInfo[static_cast<int>(segment.stream[k].format)].bytes;
      body(k, static_cast<char*>(address(segment.stream[k], begin)), (end - begin) * bytes);
    }
  };
  each_stream([&](int k, const char* data, int64_t bytes) {
    run.at[k] = copies[k];
    __builtin_memset(copies[k], 0, sizeof(copies[k]));
    copy_few<sizeof(F32) / 2>(copies[k], data, bytes);
  });
  update(row, run, width);
  each_stream([&](int k, char* data, int64_t bytes) {
    if (k != kGrad) copy_few<sizeof(F32) / 2>(data, copies[k], bytes);
  });
}

// Whether stream k of a segment can be updated as it lies by a shape whose format there is this.
FN bool fits(const Stream& stream, int k, Format format) {
  if (k == kParam && stream.rounding == Rounding::kStochastic) return false;
  return stream.format == format || (format == Format::kQ8 && stream.format == Format::kQ8Positive);
}

FN Format format_in(const Shape& shape, int k) {
  return k == kParam ? shape.param : k == kGrad ? shape.grad : shape.state;
}

// The shape by which the fewest of a segment's streams are staged, and how many those are.
struct Choice {
  int shape, staged;
};
FN Choice shape_for(const Update (&update)[kShapes], const Segment& segment, StateMask mask,
                    Format computing, bool clips) {
  Choice best = {-1, kStreams + 1};
  for (int shape = 0; shape < kShapes; ++shape) {
    const Shape& formats = kShapeList[shape];
    if (!update[shape] || (formats.param == Format::kF64) != (computing == Format::kF64)) continue;
    int staged = 0;
    for (int k = 0; k < kEma && staged < best.staged; ++k) {
      if (!has_stream(mask, k)) continue;
      const bool clipped = clips && k == kGrad;  // on the way
      if (fits(segment.stream[k], k, format_in(formats, k)) && !clipped) continue;
      // Only what is computed with can be staged.
      staged += format_in(formats, k) == computing ? 1 : kStreams + 1;
    }
    if (staged < best.staged) {
      best = {shape, staged};
      if (staged == 0) break;  // small tensors are many, and mostly in the first shape
    }
  }
  return best;
}

// The stored parameters of a block: their average, their copy; then the gradients' zeros.
FN void finish_block(const Kernels& kernels, const Segment& segment, const Row& row, bool wide,
                     int64_t at, int64_t n) {
  alignas(64) char values_here[kStride], average_here[kStride];
  const int64_t place = segment.first + at;
  const Stream &param = segment.stream[kParam], &ema = segment.stream[kEma],
               &shadow = segment.stream[kShadow], &grad = segment.stream[kGrad];
  const auto codec = [&](const Stream& stream) -> const Codec& {
    return kernels.codec[static_cast<int>(stream.format)][wide];
  };
  // Where a stream's elements are as floats or doubles.
  const auto decoded = [&](const Stream& stream, char* here) -> void* {
    if (stream.format == (wide ? Format::kF64 : Format::kF32) && n % F32::kWidth == 0) {
      return address(stream, at);
    }
    codec(stream).decode(stream, at, place, n, here);
    return here;
  };
  void* values = values_here;
  if (ema.format != Format::kNone || shadow.format != Format::kNone) {
    values = decoded(param, values_here);
  }
  if (ema.format != Format::kNone) {
    void* next = values;
    if (!segment.ema_begins) {
      next = decoded(ema, average_here);
      if (wide) {
        average_values<F64>(static_cast<double*>(next), static_cast<const double*>(values), n,
                            row.ema_decay);
      } else {
        average_values<F32>(static_cast<float*>(next), static_cast<const float*>(values), n,
                            row.ema_decay);
      }
    }
    if (next != address(ema, at)) {
      codec(ema).encode(ema, kEma, at, place, n, next, row.key);
    }
  }
  if (shadow.format != Format::kNone) {
    codec(shadow).encode(shadow, kShadow, at, place, n, values, row.key);
  }
  if (row.zero_grad && grad.format != Format::kNone) {
    __builtin_memset(address(grad, at), 0, n * kFormatInfo[static_cast<int>(grad.format)].bytes);
  }
}

FN void sweep(const Kernels& kernels, int rule, const Segment& segment, const Row& row,
              int64_t begin, int64_t end) {
  const bool wide = segment.stream[kParam].format == Format::kF64;
  const bool updates = segment.stream[kGrad].format != Format::kNone;
  const bool clips = row.clip < __builtin_inf();
  const bool finishes = segment.stream[kEma].format != Format::kNone ||
                        segment.stream[kShadow].format != Format::kNone || row.zero_grad;
  const StateMask mask = kernels.rules[rule].mask[row.variant];
  const Update(&update)[kShapes] = kernels.rules[rule].update[row.variant];
  const Format computing = wide ? Format::kF64 : Format::kF32;
  const int64_t width = wide ? F64::kWidth : F32::kWidth;
  const Choice choice = shape_for(update, segment, mask, computing, clips);
  const bool shared = kFormatInfo[static_cast<int>(kShapeList[choice.shape].state)].block > 0;

  Run run;  // of which no more is set than is read: small tensors are many
  bool random = false;
  for (int k = kState; k < kEma; ++k) {
    random = random || (has_stream(mask, k) && segment.stream[k].rounding == Rounding::kStochastic);
  }
  run.place = segment.first + begin;
  run.stochastic = random;
  // Whether nothing is done block by block.
  const bool flows = updates && choice.staged == 0 && !clips && !finishes;
  if (flows && !shared && !random) {
    const int64_t whole = (end - begin) / width * width;
    for (int k = 0; k < kStreams; ++k) {
      if (has_stream(mask, k)) run.at[k] = address(segment.stream[k], begin);
    }
    update[choice.shape](row, run, whole);
    if (begin + whole < end) {
      sweep_tail(update[choice.shape], segment, mask, row, width, begin + whole, end);
    }
    return;
  }

  alignas(64) char staged[kStreams][kStride];
  Row own = row;
  if (clips) own.scalars[0] = 1;  // clipping multiplies first
  for (int64_t n; begin < end; begin += n) {
    const int64_t place = segment.first + begin;
    n = kBlock - place % kBlock;
    if (flows && n == kBlock && end - begin > n) {
      const int64_t same_half = (int64_t{1} << 32) - place % (int64_t{1} << 32);  // of random bits
      n = end - begin < same_half ? (end - begin) / kBlock * kBlock : same_half;
    }
    if (n > end - begin) n = end - begin;
    run.place = place;
    // A block that ends within a register is staged as a whole.
    const bool whole = n % width == 0 && place % kBlock == 0;
    const int shape = whole ? choice.shape : wide;
    bool encoded[kStreams] = {};
    for (int k = 0; updates && k < kEma; ++k) {
      const Stream& stream = segment.stream[k];
      if (!has_stream(mask, k)) continue;
      if (whole && fits(stream, k, format_in(kShapeList[shape], k)) && !(clips && k == kGrad)) {
        run.at[k] = address(stream, begin);
        if (k < kState || !shared) continue;
        const int64_t entry = place / kShared<Format::kQ8> - segment.first / kShared<Format::kQ8>;
        run.exponents[k - kState] = static_cast<uint8_t*>(stream.beside) + entry;
        continue;
      } else {
        // The update that follows asks memory for nothing of this stream: its next block comes now.
        fetch(address(stream, begin + n), n * kFormatInfo[static_cast<int>(stream.format)].bytes);
        kernels.codec[static_cast<int>(stream.format)][wide].decode(stream, begin, place, n,
                                                                    staged[k]);
        run.at[k] = staged[k];
      }
      encoded[k] = k != kGrad;
    }
    if (updates) {
      const int64_t padded = (n + width - 1) / width * width;
      if (clips && wide) {
        clip_values<F64>(reinterpret_cast<double*>(staged[kGrad]), padded, row.scalars[0],
                         row.clip);
      } else if (clips) {
        clip_values<F32>(reinterpret_cast<float*>(staged[kGrad]), padded, row.scalars[0], row.clip);
      }
      update[shape](own, run, padded);
    }
    for (int k = 0; k < kEma; ++k) {
      const Stream& stream = segment.stream[k];
      if (!encoded[k]) continue;
      kernels.codec[static_cast<int>(stream.format)][wide].encode(stream, k, begin, place, n,
                                                                  staged[k], row.key);
    }
    if (finishes) finish_block(kernels, segment, row, wide, begin, n);
  }
}

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
