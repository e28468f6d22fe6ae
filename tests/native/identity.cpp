// Runs every rule of one instruction set in every mix of formats, on fixed inputs, and prints a hash
// of what was written, by the sweep and by the same update staged by hand, one line each:
// `rule variant decay param grad swept staged`. Then, in lines that begin with `+`, steps over shards
// with narrow parameters and states, clipped, averaged, copied and their gradients zeroed:
// `+ rule variant param state rounding hash`. Two sets agree when their texts do. See test_cross.py.
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "interface/clock.h"
#include "interface/kernels.h"
#include "step/rules.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {
extern const Kernels kernels;
}
}  // namespace fusedstep

using namespace fusedstep;

namespace {

constexpr int64_t kLengths[] = {1, 3, 4, 5, 15, 16, 17, 67, 513, 1025};
constexpr int64_t kOffset = 1;  // elements before the data, so that nothing is aligned

// Knuth's MMIX generator; the high bits are the good ones.
class Random {
 public:
  uint32_t operator()() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }

 private:
  uint64_t state_ = 1;
};

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// A float32 of magnitude 2^-6 to 2^4, or now and then one of the numbers that break things.
float number(Random& random) {
  static constexpr uint32_t kSpecial[] = {
      0x00000000, 0x80000000,              // 0, -0
      0x00000001, 0x807fffff,              // denormals
      0x7f800000, 0xff800000, 0x7fc00000,  // infinities, NaN
      0x7f7fffff, 0x00800000,              // largest, smallest normal
      0x33000000, 0x477ff000, 0x387fc000,  // where fp16 underflows, overflows, becomes denormal
  };
  const uint32_t word = random();
  if (word % 11 == 0) return bits<float>(kSpecial[random() % (sizeof(kSpecial) / 4)]);
  const uint32_t exponent = 127 - 6 + (word >> 8) % 10;
  return bits<float>((word & 0x80000000u) | exponent << 23 | (random() >> 9));
}

// Elements of a format, as bits, from float32, by truncation: any fixed map will do.
uint64_t element(Format format, float x) {
  const uint32_t word = bits<uint32_t>(x), sign = (word >> 16) & 0x8000u;
  const double wide = x;
  switch (format) {
    case Format::kF64:
      return bits<uint64_t>(wide + wide * 0x1p-40);  // beyond float's precision
    case Format::kBf16:
      return word >> 16;
    case Format::kF16: {
      const int exponent = static_cast<int>((word >> 23) & 255u) - 112;
      const uint32_t fraction = (word >> 13) & 0x3ffu;
      uint32_t half = static_cast<uint32_t>(exponent) << 10 | fraction;
      if (exponent <= 0) half = fraction;  // zero and denormals
      if (exponent >= 31) half = 0x7c00u | ((word & 0x7fffffu) ? 0x200u : 0u);
      return half | sign;
    }
    default:
      return word;
  }
}

// An element's bits, with one pattern for every NaN: payloads may differ between sets.
uint64_t canonical(Format format, uint64_t element) {
  const auto nan = [&](int bits, int fraction) {
    const uint64_t magnitude = element & ((uint64_t{1} << (bits - 1)) - 1);
    const uint64_t infinity = ((uint64_t{1} << (bits - 1 - fraction)) - 1) << fraction;
    return magnitude > infinity ? infinity | uint64_t{1} << (fraction - 1) : element;
  };
  switch (format) {
    case Format::kF64:
      return nan(64, 52);
    case Format::kBf16:
      return nan(16, 7);
    case Format::kF16:
      return nan(16, 10);
    default:
      return nan(32, 23);
  }
}

// FNV-1a, 64 bits.
struct Hash {
  uint64_t value = 0xcbf29ce484222325u;
  void add(uint64_t word) {
    for (int i = 0; i < 64; i += 8) value = (value ^ (word >> i & 255u)) * 0x100000001b3u;
  }
};

// Canary elements on both sides show a write that does not belong to the segment.
class Elements {
 public:
  Elements(Format format, int64_t n, Random& random, Sign sign)
      : format_(format), bytes_(kFormatInfo[static_cast<int>(format)].bytes) {
    for (int64_t i = 0; i < kOffset + n + 1; ++i) {
      float value = number(random);
      if (sign == Sign::kPositive && value < 0) value = -value;
      const uint64_t word = element(format, value);
      memory_.insert(memory_.end(), bytes_, 0);
      std::memcpy(memory_.data() + memory_.size() - bytes_, &word, bytes_);  // little-endian
    }
  }
  Stream stream() { return {memory_.data() + kOffset * bytes_, format_}; }
  void add_to(Hash& hash) const {
    for (size_t at = 0; at < memory_.size(); at += bytes_) {
      uint64_t word = 0;
      std::memcpy(&word, memory_.data() + at, bytes_);
      hash.add(canonical(format_, word));
    }
  }

 private:
  Format format_;
  size_t bytes_;
  std::vector<unsigned char> memory_;
};

// The same update in blocks that the caller stages: decoded, updated in float32 or float64, encoded.
void sweep_staged(const Kernels& kernels, int rule, const Segment& segment, const Row& row) {
  const int wide = segment.stream[kParam].format == Format::kF64;
  const RuleKernels& own = kernels.rules[rule];
  std::vector<double> staged[kStreams];  // as much room as either type needs
  Run run = {};
  const auto has = [&](int k) {
    return k < kState || (k < kEma && own.mask[row.variant] >> (k - kState) & 1);
  };
  const auto codec = [&](int k) -> const Codec& {
    return kernels.codec[static_cast<int>(segment.stream[k].format)][wide];
  };
  const int64_t lanes = kernels.lanes, whole = (segment.n + lanes - 1) / lanes * lanes;
  for (int k = 0; k < kStreams; ++k) {
    if (!has(k)) continue;
    staged[k].resize(whole);
    run.at[k] = staged[k].data();
    codec(k).decode(segment.stream[k], 0, 0, segment.n, run.at[k]);
  }
  own.update[row.variant][wide](row, run, whole);
  for (int k = 0; k < kStreams; ++k) {
    if (has(k) && k != kGrad) codec(k).encode(segment.stream[k], k, 0, 0, segment.n, run.at[k], 0);
  }
}

// The hash of what a sweep leaves behind.
template <class Sweeper>
void run(const Sweeper& sweep, const Rule& rule, StateMask states, Format param, Format grad,
         Random& random, Hash& hash) {
  for (const int64_t n : kLengths) {
    std::vector<Elements> streams = {{param, n, random, Sign::kAny}, {grad, n, random, Sign::kAny}};
    for (const Sign sign : rule.signs) {
      streams.emplace_back(param == Format::kF64 ? param : Format::kF32, n, random, sign);
    }
    Segment segment = {};
    segment.n = n;
    for (size_t k = 0; k < streams.size(); ++k) {
      if (k < kState || states >> (k - kState) & 1) segment.stream[k] = streams[k].stream();
    }
    sweep(segment);
    for (const Elements& stream : streams) stream.add_to(hash);
  }
}

// A finite number of magnitude 2^-6 to 2^4.
float finite(Random& random) {
  const uint32_t word = random();
  return bits<float>((word & 0x80000000u) | (121 + (word >> 8) % 10) << 23 | (random() >> 9));
}

// Memory of a stream in any format, its elements those of numbers, what is beside them arbitrary.
struct Narrow {
  std::vector<unsigned char> data, beside;
  Stream stream;

  Narrow(Format format, Rounding rounding, int64_t n, Sign sign, Random& random) {
    const FormatInfo& info = kFormatInfo[static_cast<int>(format)];
    for (int64_t i = 0; i < n; ++i) {
      const float x = finite(random);
      const bool bytes = info.bytes == 1;
      const bool halves = info.block == 1;  // whose elements are bfloat16
      const uint64_t word = bytes ? random() & (sign == Sign::kPositive ? 255u : 127u)
                                  : element(halves ? Format::kBf16 : format,
                                            sign == Sign::kPositive && x < 0 ? -x : x);
      data.insert(data.end(), info.bytes, 0);
      std::memcpy(data.data() + data.size() - info.bytes, &word, info.bytes);
    }
    if (info.block > 1) {
      for (int64_t i = 0; i < n / info.block + 2; ++i) beside.push_back(80 + random() % 8);
    } else if (info.block == 1) {
      for (int64_t i = 0; i < n; ++i) {  // bfloat16 of 2^-20, or a lower half
        beside.push_back(random() & 255u);
        beside.push_back(0x35);
      }
    }
    stream = {data.data(), format, rounding, beside.data()};
  }
  void add_to(Hash& hash) const {
    for (const unsigned char byte : data) hash.add(byte);
    for (const unsigned char byte : beside) hash.add(byte);
  }
};

// What a sweep in two pieces leaves of shards of a parameter.
uint64_t narrow(const Kernels& kernels, int number, const Rule& rule, const Row& row, Format param,
                Rounding rounding, Format state, Rounding state_rounding) {
  Random random;
  Hash hash;
  const StateMask states = kernels.rules[number].mask[row.variant];
  for (const int64_t n : {int64_t{5}, int64_t{67}, int64_t{512}, int64_t{1500}}) {
    for (const int64_t first : {int64_t{0}, int64_t{77}, (int64_t{1} << 32) - 512}) {
      std::vector<Narrow> all;
      all.reserve(kStreams);
      Segment segment = {};
      segment.n = n;
      segment.first = first;
      const auto add = [&](int k, Format format, Rounding how, Sign sign) {
        all.emplace_back(format, how, n, sign, random);
        segment.stream[k] = all.back().stream;
      };
      add(kParam, param, rounding, Sign::kAny);
      add(kGrad, Format::kBf16, Rounding::kNearest, Sign::kAny);
      for (size_t s = 0; s < rule.signs.size(); ++s) {
        if (!(states >> s & 1)) continue;
        const bool positive = state == Format::kQ8 && rule.signs[s] == Sign::kPositive;
        add(kState + static_cast<int>(s), positive ? Format::kQ8Positive : state, state_rounding,
            rule.signs[s]);
      }
      add(kEma, Format::kBf16, Rounding::kStochastic, Sign::kAny);
      add(kShadow, Format::kF16, Rounding::kNearest, Sign::kAny);
      segment.ema_begins = n == 67;
      const int64_t piece = kBlock - first % kBlock;
      if (piece < n) kernels.sweep(number, segment, row, 0, piece);
      kernels.sweep(number, segment, row, piece < n ? piece : 0, n);
      for (const Narrow& one : all) one.add_to(hash);
    }
  }
  return hash.value;
}

// Hyperparameters that leave no term of an equation out; an unknown name is some number.
double hyper(const std::string& name) {
  static const std::map<std::string, double> values = {
      {"lr", 0.03},           {"beta1", 0.9},
      {"beta2", 0.95},        {"eps", 1e-3},
      {"alpha", 0.9},         {"rho", 0.9},
      {"eta_minus", 0.5},     {"eta_plus", 1.2},
      {"momentum", 0.9},      {"step_size_min", 1e-3},
      {"step_size_max", 1.5}, {"dampening", 0.1},
      {"lr_decay", 0.1},      {"momentum_decay", 4e-3},
      {"lambd", 0.1},         {"t0", 1},
      {"states", 3},
  };
  const auto found = values.find(name);
  return found == values.end() ? 0.5 : found->second;
}

}  // namespace

int main() {
  const Kernels& kernels = FUSEDSTEP_TARGET::kernels;
  std::fprintf(stderr, "lanes %d\n", kernels.lanes);
  for (size_t r = 0; r < rules().size(); ++r) {
    const Rule& rule = rules()[r];
    const int number = static_cast<int>(r);
    Group group = {};
    for (size_t h = 0; h < rule.hypers.size(); ++h) group.hypers[h] = hyper(rule.hypers[h]);
    for (int variant = 0; variant < kMaxVariants && kernels.rules[r].update[variant][0];
         ++variant) {
      for (const Decay decay : {kScaled, kCoupled}) {
        for (int mix = 0; mix < (kArrayFormats - 1) * (kArrayFormats - 1); ++mix) {
          const auto param = static_cast<Format>(1 + mix / (kArrayFormats - 1));
          const auto grad = static_cast<Format>(1 + mix % (kArrayFormats - 1));
          Hash swept, staged;
          Random random, again;
          // Every variant reads the same scalars, so those of any will do.
          Clock clock = {0, {0, 0}};
          for (int t = 1; t <= 9; ++t) {
            Row row = rule.prepare(group, clock, t == 1 ? 1 : -1, {});
            if (t != 1 && t != 9) continue;
            row.variant = variant;
            row.decay = decay;
            row.scalars[1] = decay == kCoupled ? 0.01 : 1 - 0.03 * 0.01;
            const StateMask states = kernels.rules[r].mask[variant];
            const auto at_once = [&](const Segment& s) { kernels.sweep(number, s, row, 0, s.n); };
            run(at_once, rule, states, param, grad, random, swept);
            const auto by_hand = [&](const Segment& s) { sweep_staged(kernels, number, s, row); };
            run(by_hand, rule, states, param, grad, again, staged);
          }
          std::printf("%s %d %d %s %s %016" PRIx64 " %016" PRIx64 "\n", rule.name.c_str(), variant,
                      decay, kFormatInfo[static_cast<int>(param)].name,
                      kFormatInfo[static_cast<int>(grad)].name, swept.value, staged.value);
        }
      }
      Clock clock = {1, {0.5, 0.5}};
      Options options;
      options.clip_value = 2;
      options.ema_decay = 0.9;
      options.zero_grad = true;
      options.seed = 5;
      Row row = rule.prepare(group, clock, 1, options);
      row.variant = variant;
      const std::pair<Format, Rounding> params[] = {{Format::kF32, Rounding::kNearest},
                                                    {Format::kF64, Rounding::kNearest},
                                                    {Format::kBf16, Rounding::kStochastic},
                                                    {Format::kSplit, Rounding::kNearest},
                                                    {Format::kKahan, Rounding::kNearest}};
      for (const auto& [param, rounding] : params) {
        for (const Format state : {Format::kF32, Format::kBf16, Format::kQ8}) {
          for (const Rounding how : {Rounding::kNearest, Rounding::kStochastic}) {
            const uint64_t hash = narrow(kernels, number, rule, row, param, rounding, state, how);
            std::printf("+ %s %d %s %s %d %016" PRIx64 "\n", rule.name.c_str(), variant,
                        kFormatInfo[static_cast<int>(param)].name,
                        kFormatInfo[static_cast<int>(state)].name, static_cast<int>(how), hash);
          }
        }
      }
    }
  }
}
