// Encodings of optimizer states in 8 bits, for bench/encodings.py: floats in, floats out, by blocks.
// Loops for the compiler to vectorise, one thread.
//
// An encoding is a struct with
//   Scale                         what a block shares
//   scale<positive>(largest)      of a block, from its largest number without its sign
//   code<positive, random>(x, scale, bits)  a number's code; `bits` decide what is rounded at random
//   value<positive>(code, scale)
// `positive`: of second moments, which no code may make zero out of more than zero. The dynamic map
// is as published and does.

#include <bit>
#include <cmath>
#include <cstdint>

namespace {

inline uint32_t word_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t word) { return std::bit_cast<float>(word); }
inline float float_of(uint32_t magnitude, uint8_t code, bool positive) {
  return float_of(positive ? magnitude : magnitude | static_cast<uint32_t>(code >> 7) << 31);
}
inline int larger(int a, int b) { return a > b ? a : b; }

// A code that has room for x's sign unless it is positive, and is then none but zero's.
template <bool positive>
uint8_t with_sign(int code, float x) {
  if constexpr (positive) return static_cast<uint8_t>(larger(code, x > 0));
  return static_cast<uint8_t>(code > 0 ? code | static_cast<int>(word_of(x) >> 31 << 7) : 0);
}

// 32 random bits of a number's place (the finaliser lowbias32, Wellons 2018).
inline uint32_t random_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
inline float uniform(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }

// Floats of few bits above a base exponent: the leading bits of a float32's word. kExponent and
// kFraction are of a positive number; one that has a sign has an exponent bit less.
template <int kExponent, int kFraction>
struct Floats {
  using Scale = uint32_t;
  static constexpr int kBlock = 128, kDropped = 23 - kFraction;

  template <bool positive>
  static Scale scale(float largest) {
    constexpr uint32_t reach = (1u << (positive ? kExponent : kExponent - 1)) - 1;
    const uint32_t exponent = (word_of(largest) + ((1u << kDropped) - 1)) >> 23;
    return exponent > reach ? exponent - reach : 0;
  }
  template <bool positive, bool random>
  static uint8_t code(float x, Scale base, uint32_t bits) {
    const uint32_t word = word_of(x) & 0x7fffffffu;
    const uint32_t nearest = ((word >> kDropped) & 1) + (1u << (kDropped - 1)) - 1;
    const uint32_t up = random ? bits >> (32 - kDropped) : nearest;
    const int rounded =
        static_cast<int>((word + up) >> kDropped) - static_cast<int>(base << kFraction);
    return with_sign<positive>(rounded, x);
  }
  template <bool positive>
  static float value(uint8_t code, Scale base) {
    const uint32_t magnitude = positive ? code : code & 0x7f;
    return float_of(magnitude > 0 ? (magnitude << kDropped) + (base << 23) : 0, code, positive);
  }
};

// Floats with three bits of fraction in the upper half of the codes and two in the lower: the greater
// of two lines, of which the second is twice as steep. The library's format, but for where a sign is.
//
// kLifted: a random rounding goes up a little likelier, so that 1/sqrt(x) keeps its mean, not x.
template <bool kLifted>
struct Tapered {
  using Scale = uint32_t;
  static constexpr int kBlock = 128, kDropped = 21;
  template <bool positive>
  static constexpr uint32_t kHalf = positive ? 128 : 64;  // of the codes

  template <bool positive>
  static Scale scale(float largest) {
    constexpr uint32_t reach = kHalf<positive> / 8 + kHalf<positive> / 4 - 1;
    const uint32_t exponent = (word_of(largest) + ((1u << 20) - 1)) >> 23;
    return exponent > reach ? exponent - reach : 0;
  }
  template <bool positive, bool random>
  static uint8_t code(float x, Scale base, uint32_t bits) {
    constexpr int bend = kHalf<positive> << kDropped;
    const int word = static_cast<int>(word_of(x) & 0x7fffffffu);
    const int above = larger(word - static_cast<int>(base << 23), 0);
    const int at = larger(above, 2 * above - bend);
    int up = ((at >> kDropped) & 1) + (1 << (kDropped - 1)) - 1;
    if constexpr (random) {
      up = static_cast<int>(bits >> (32 - kDropped));
      if constexpr (positive && kLifted) {
        const int low = at & ((1 << kDropped) - 1), rest = (1 << kDropped) - low;
        up += (low < rest ? low : rest) >> 5;  // 3/8 of the spacing's logarithm, about
      }
    }
    return with_sign<positive>((at + up) >> kDropped, x);
  }
  template <bool positive>
  static float value(uint8_t code, Scale base) {
    const uint32_t magnitude = positive ? code : code & 0x7f;
    const uint32_t one = magnitude << 21, two = (magnitude + kHalf<positive>) << 20;
    const uint32_t above = one < two ? one : two;
    return float_of(magnitude > 0 ? above + (base << 23) : 0, code, positive);
  }
};

// Shares of the block's largest number, evenly spaced, or their square roots are.
template <bool kRoot>
struct Linear {
  using Scale = float;
  static constexpr int kBlock = 128;

  template <bool positive>
  static Scale scale(float largest) {
    return largest;
  }
  template <bool positive, bool random>
  static uint8_t code(float x, Scale largest, uint32_t bits) {
    constexpr float most = positive ? 255 : 127;
    const float share = std::fabs(x) / (largest > 0 ? largest : 1);
    const float at = (kRoot ? std::sqrt(share) : share) * most;
    int code = static_cast<int>(at);
    const float below = static_cast<float>(code);
    const float part = kRoot && random ? (at * at - below * below) / (2 * below + 1) : at - below;
    code += random ? uniform(bits) < part : part >= 0.5f;
    code = code > most ? static_cast<int>(most) : code;
    return with_sign<positive>(code, x);
  }
  template <bool positive>
  static float value(uint8_t code, Scale largest) {
    constexpr float most = positive ? 255 : 127;
    const float at = static_cast<float>(positive ? code : code & 0x7f) / most;
    const float x = (kRoot ? at * at : at) * largest;
    return float_of(word_of(x), code, positive);
  }
};

// The dynamic map (Dettmers 2015; Dettmers et al. 2021): by each decade below the largest number half
// as many codes, evenly spaced in it; 0 and 1.
template <bool positive>
struct Map {
  float entry[256], middle[256];  // middle[i]: between entries i and i + 1
  Map() {
    int n = 0;
    double decade = 1e-6;
    double all[256];
    for (int i = 0; i < 7; ++i, decade *= 10) {
      const int count = (positive ? 2 : 1) << i;
      for (int k = 0; k < count; ++k) {
        const double x = decade * (0.1 + 0.9 * (k + 0.5) / count);
        all[n++] = x;
        if (!positive) all[n++] = -x;
      }
    }
    all[n++] = 0;
    all[n++] = 1;
    for (int i = 1; i < 256; ++i) {  // sorted by insertion
      for (int k = i; k > 0 && all[k] < all[k - 1]; --k) {
        const double x = all[k];
        all[k] = all[k - 1];
        all[k - 1] = x;
      }
    }
    for (int i = 0; i < 256; ++i) entry[i] = static_cast<float>(all[i]);
    for (int i = 0; i < 255; ++i) middle[i] = static_cast<float>((all[i] + all[i + 1]) / 2);
    middle[255] = INFINITY;
  }
};
template <bool positive>
const Map<positive> kMap;

template <int kSize>
struct Dynamic {
  using Scale = float;
  static constexpr int kBlock = kSize;

  template <bool positive>
  static Scale scale(float largest) {
    return largest;
  }
  template <bool positive, bool random>
  static uint8_t code(float x, Scale largest, uint32_t bits) {
    const Map<positive>& map = kMap<positive>;
    const float share = x / (largest > 0 ? largest : 1);
    int code = 0;  // how many of the middles, or of the entries but the first, are not above it
    for (int half = 128; half > 0; half /= 2) {
      const float bound = random ? map.entry[code + half] : map.middle[code + half - 1];
      code += bound <= share ? half : 0;
    }
    if constexpr (random) {
      const int next = code < 255 ? code + 1 : 255;
      const float below = map.entry[code];
      code = uniform(bits) * (map.entry[next] - below) < share - below ? next : code;
    }
    return static_cast<uint8_t>(code);
  }
  template <bool positive>
  static float value(uint8_t code, Scale largest) {
    return kMap<positive>.entry[code] * largest;
  }
};

template <class Encoding, bool positive, bool random>
void encode(const float* from, uint8_t* codes, void* scales, int n, uint32_t key) {
  constexpr int size = Encoding::kBlock;
  auto* shared = static_cast<typename Encoding::Scale*>(scales);
  for (int begin = 0; begin < n; begin += size) {
    const int count = n - begin < size ? n - begin : size;
    const float* x = from + begin;
    uint8_t* to = codes + begin;
    uint32_t largest = 0;
    for (int i = 0; i < count; ++i) {
      const uint32_t word = word_of(x[i]) & 0x7fffffffu;
      largest = word > largest ? word : largest;
    }
    const auto scale = Encoding::template scale<positive>(float_of(largest));
    shared[begin / size] = scale;
    for (int i = 0; i < count; ++i) {
      const uint32_t bits = random ? random_bits(key + static_cast<uint32_t>(begin + i)) : 0;
      to[i] = Encoding::template code<positive, random>(x[i], scale, bits);
    }
  }
}

template <class Encoding, bool positive>
void decode(const uint8_t* codes, const void* scales, float* to, int n) {
  constexpr int size = Encoding::kBlock;
  const auto* shared = static_cast<const typename Encoding::Scale*>(scales);
  for (int begin = 0; begin < n; begin += size) {
    const int count = n - begin < size ? n - begin : size;
    const auto scale = shared[begin / size];
    for (int i = 0; i < count; ++i) {
      to[begin + i] = Encoding::template value<positive>(codes[begin + i], scale);
    }
  }
}

template <class Encoding>
void round_trips(float* values, uint8_t* codes, void* scales, int n, bool positive, bool random,
                 uint32_t key, int times) {
  for (int i = 0; i < times; ++i) {
    if (positive) {
      (random ? encode<Encoding, true, true> : encode<Encoding, true, false>)(values, codes, scales,
                                                                              n, key);
      decode<Encoding, true>(codes, scales, values, n);
    } else {
      (random ? encode<Encoding, false, true> : encode<Encoding, false, false>)(values, codes,
                                                                                scales, n, key);
      decode<Encoding, false>(codes, scales, values, n);
    }
  }
}

using RoundTrips = void (*)(float*, uint8_t*, void*, int, bool, bool, uint32_t, int);
constexpr RoundTrips kEncodings[] = {
    round_trips<Tapered<true>>, round_trips<Tapered<false>>, round_trips<Floats<6, 2>>,
    round_trips<Floats<5, 3>>,  round_trips<Linear<true>>,   round_trips<Linear<false>>,
    round_trips<Dynamic<256>>,
};

}  // namespace

// n values through encoding number `which` and back, `times` times. `codes` and `scales`, four bytes
// for each 128 values, are what lies between.
extern "C" void round_trips(int which, float* values, uint8_t* codes, void* scales, int n,
                            int positive, int random, uint32_t key, int times) {
  kEncodings[which](values, codes, scales, n, positive, random, key, times);
}
