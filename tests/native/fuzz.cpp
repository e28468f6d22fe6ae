// Steps tensors of arbitrary bits, lengths, places, formats and options by every instruction set that this
// machine can run: at once, by several threads, in pieces, and staged by hand; aborts where two differ
// in a bit (but for NaN's payload), or where a byte has changed that no step may write.
//
// One input is the bytes of LLVMFuzzerTestOneInput, libFuzzer's form. Without libFuzzer this program
// makes its own inputs: see main, and CONTRIBUTING.md for the command.
#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "machine/dispatch.h"
#include "machine/float_mode.h"
#include "machine/parallel.h"
#include "step/engine.h"
#include "step/rules.h"

#if defined(__SANITIZE_ADDRESS__) || defined(FUSEDSTEP_ASAN)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) ((void)(at), (void)(bytes))
#endif

using namespace fusedstep;

namespace {

constexpr unsigned char kCanary = 0x5a;
constexpr int64_t kGap = 64;  // canaries around each stream, at least: a register of the widest set
constexpr int64_t kAlone = int64_t{1} << 17;  // elements from which a step has several threads

const FormatInfo& info(Format format) { return kFormatInfo[static_cast<int>(format)]; }

// An input's bytes, and when they are used up, random ones that follow from them.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : at_(data), left_(size) {
    for (size_t i = 0; i < size; ++i) state_ = (state_ ^ data[i]) * 0x100000001b3u;  // FNV-1a
  }

  uint64_t random() {  // SplitMix64 (Steele, Lea & Flood 2014)
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  uint8_t byte() {
    if (left_ == 0) return static_cast<uint8_t>(random());
    --left_;
    return *at_++;
  }
  // Below n.
  int64_t below(int64_t n) {
    uint64_t x = byte();
    for (int64_t more = n - 1; more >>= 8;) x = x << 8 | byte();
    return static_cast<int64_t>(x % static_cast<uint64_t>(n));
  }
  bool one_in(int n) { return below(n) == n - 1; }
  template <class T, size_t kSize>
  T of(const T (&choices)[kSize]) {
    return choices[below(kSize)];
  }
  uint64_t word() {
    uint64_t x = 0;
    for (int i = 0; i < 8; ++i) x = x << 8 | byte();
    return x;
  }

 private:
  const uint8_t* at_;
  size_t left_;
  uint64_t state_ = 0xcbf29ce484222325u;
};

// Hyperparameters: usual ones, and strange ones that Python takes as well.
double hyper(Input& in, const std::string& name) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double fractions[] = {0.9, 0.999, 0, 0.5, 0.25, 1 - 0x1p-53, 0x1p-1074, 0.51};
  const double numbers[] = {1e-3, 0.03, 0, 1, 0.5, 1e-8, 1e30, 1e-310, kInfinity};
  const double any[] = {0.1, 0, -0.5, 1, 3, 1e20, -1e-300};
  const auto is = [&](const char* other) { return name == other; };
  const auto begins = [&](const char* other) { return name.rfind(other, 0) == 0; };
  if (is("nesterov") || is("centered") || is("amsgrad") || is("bias_correction")) {
    return static_cast<double>(in.below(2));
  }
  if (is("states")) return static_cast<double>(in.below(4));
  if (is("eta_plus")) return 1 + in.of(fractions) + 0x1p-20;
  if (is("eta_minus")) return in.of(fractions) + 0x1p-60;
  if (begins("beta") || is("rho")) return in.of(fractions);
  if (is("dampening") || is("lambd") || is("t0")) return in.of(any);
  return in.of(numbers);
}

// Elements of a floating-point format are a sign, an exponent and a fraction.
struct Layout {
  int exponent, fraction;
};
Layout layout(Format format) {
  if (format == Format::kF64) return {11, 52};
  if (format == Format::kF32) return {8, 23};
  if (format == Format::kF16) return {5, 10};
  return {8, 7};  // bfloat16, and those that have something beside it
}

// How the elements of a stream come about.
enum Kind { kBits, kUsual, kSpecial, kMixed, kPalette, kKinds };

class Elements {
 public:
  Elements(Input& in, Format format, bool positive)
      : in_(in), format_(format), kind_(static_cast<Kind>(in.below(kKinds))), positive_(positive) {
    if (kind_ == kPalette) {
      for (uint64_t& word : palette_) word = in.word();
    }
  }
  uint64_t operator()() {
    const uint64_t word = in_.random();
    if (kind_ == kBits || info(format_).block > 1) return word;
    if (kind_ == kPalette) return palette_[word >> 61];
    const auto [exponent, fraction] = layout(format_);
    const uint64_t most = (uint64_t{1} << exponent) - 1, all = (uint64_t{1} << fraction) - 1;
    const uint64_t sign = (positive_ ? 0 : word & 1) << (exponent + fraction);
    if (kind_ == kUsual || (kind_ == kMixed && word >> 60)) {  // of magnitude 2^-6 to 2^4
      return sign | (most / 2 - 6 + (word >> 8) % 10) << fraction | (word >> 20 & all);
    }
    const uint64_t exponents[] = {0, 0, 1, most / 2, most - 1, most, most, most / 2 + 15};
    const uint64_t fractions[] = {0, 0, 0, 1, all, all / 2 + 1, all / 2, word >> 20 & all};
    return sign | exponents[word >> 4 & 7] << fraction | fractions[word >> 8 & 7];
  }

 private:
  Input& in_;
  Format format_;
  Kind kind_;
  bool positive_;
  uint64_t palette_[8] = {};
};

// The bits of an element, every NaN as one.
uint64_t canonical(Format format, uint64_t bits) {
  const auto [exponent, fraction] = layout(format);
  const uint64_t magnitude = bits & ((uint64_t{1} << (exponent + fraction)) - 1);
  const uint64_t infinity = ((uint64_t{1} << exponent) - 1) << fraction;
  return magnitude > infinity ? infinity + 1 : bits;
}

// Where a stream lies in a case's memory.
struct Lain {
  Format format = Format::kNone;
  Rounding rounding = Rounding::kNearest;
  int64_t data = 0, beside = 0;    // offsets
  int64_t bytes = 0, entries = 0;  // entries take bytes of their own: info().beside each

  int64_t beside_bytes() const { return entries * info(format).beside; }
};

struct Tensor {
  Segment segment;  // but for the streams' memory
  Lain lain[kStreams];
  Counted counted;
};

// A case: tensors, their memory before the steps, and the steps' options.
struct Case {
  int rule, steps, threads;
  std::vector<Tensor> tensors;
  std::vector<Group> groups;
  Options options;
  std::vector<unsigned char> memory;  // canaries, but for the streams
  int64_t elements = 0;
  uint64_t cuts;  // where the pieces are, when it is swept in pieces

  // What lies at `offset` is aligned to 64 bytes with `room`'s memory where it is a multiple.
  static unsigned char* aligned(std::vector<unsigned char>& room) {
    const auto at = reinterpret_cast<uintptr_t>(room.data());
    return room.data() + (64 - at % 64) % 64;
  }
};

int64_t pick_length(Input& in, int64_t table) {
  const int64_t lengths[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 127, 128, 129, 511, 512, 513, 1025};
  if (table == 1) return in.below(24);  // many small tensors
  if (in.one_in(8)) return 0;
  return in.one_in(2) ? in.below(2100) : in.of(lengths);
}

void add_stream(Input& in, Case& all, Tensor& tensor, int k, Format format, Rounding rounding,
                bool positive) {
  Lain& lain = tensor.lain[k];
  Segment& segment = tensor.segment;
  segment.stream[k] = {nullptr, format, rounding, nullptr};
  lain.format = format;
  lain.rounding = rounding;
  const int64_t size = info(format).bytes;
  const auto place = [&](int64_t bytes, int64_t alignment) {
    const int64_t shift = in.one_in(2) ? in.below(64) / alignment * alignment : 0;
    int64_t at = static_cast<int64_t>(all.memory.size()) + kGap;
    at = (at + 63) / 64 * 64 + shift;
    all.memory.resize(at + bytes, kCanary);
    return at;
  };
  lain.bytes = segment.n * size;
  lain.data = place(lain.bytes, size);
  Elements elements(in, format, positive);
  for (int64_t i = 0; i < lain.bytes; i += size) {
    const uint64_t bits = elements();
    std::memcpy(&all.memory[lain.data + i], &bits, size);  // little-endian
  }
  if (info(format).block == 0) return;
  lain.entries = info(format).block == 1 ? segment.n : beside_entries(segment, format);
  lain.beside = place(lain.beside_bytes(), info(format).beside);
  const bool plausible = in.one_in(2);
  for (int64_t i = 0; i < lain.beside_bytes(); ++i) {
    const uint64_t bits = in.random();
    const bool tops = format == Format::kKahan && plausible && i % 2;  // 2^-20
    all.memory[lain.beside + i] =
        static_cast<unsigned char>(tops                                  ? 0x35
                                   : plausible && info(format).block > 1 ? 80 + bits % 8
                                                                         : bits);
  }
}

void add_tensor(Input& in, Case& all, int64_t n) {
  const Format params[] = {Format::kF32,  Format::kF32,   Format::kF64,   Format::kBf16,
                           Format::kBf16, Format::kSplit, Format::kKahan, Format::kF16};
  const Format arrays[] = {Format::kF32, Format::kBf16, Format::kF16, Format::kF64};
  const int64_t half = int64_t{1} << 32;
  const int64_t firsts[] = {0,       0,   1,        77,         127,          128,
                            512 * 3, 511, half - 5, half - 512, half / 2 - 3, half * 256 + 17};
  const int64_t counts[] = {0, 0, 1, 2, 5, 1000, half * 16};
  const double carries[] = {0.5, 1, 0, 0.9};
  const Rule& rule = rules()[all.rule];
  const auto rounding = [&](bool can) {
    return can && in.one_in(2) ? Rounding::kStochastic : Rounding::kNearest;
  };

  Tensor& tensor = all.tensors.emplace_back();
  Segment& segment = tensor.segment;
  segment.n = n;
  segment.first = in.of(firsts);
  tensor.counted.group = static_cast<int>(in.below(static_cast<int64_t>(all.groups.size())));
  tensor.counted.clock = {in.of(counts), {0, 0}};
  for (double& carry : tensor.counted.clock.carry) {
    if (tensor.counted.clock.t) carry = in.of(carries);
  }
  const Format param = in.of(params);
  add_stream(in, all, tensor, kParam, param, rounding(param == Format::kBf16), false);
  if (!in.one_in(12)) {
    const Format grad = in.one_in(2) ? Format::kF32 : in.of(arrays);
    add_stream(in, all, tensor, kGrad, grad, Rounding::kNearest, false);
  }
  const StateMask states = rule.mask_of(all.groups[tensor.counted.group].hypers);
  const bool plain = in.one_in(2), quantized = in.one_in(2);
  const Rounding how = rounding(true);  // one for all states, as Python's
  for (size_t s = 0; s < rule.states.size(); ++s) {
    if (!(states >> s & 1)) continue;
    const bool positive = rule.signs[s] == Sign::kPositive;
    Format format = state_format(param);
    if (!plain) format = quantized || in.one_in(3) ? Format::kQ8 : in.of(arrays);
    const bool block = format == Format::kQ8;
    if (block && positive) format = Format::kQ8Positive;
    add_stream(in, all, tensor, kState + static_cast<int>(s), format,
               block || format == Format::kBf16 ? how : Rounding::kNearest,
               positive && !in.one_in(8));
  }
  if (all.options.average && !in.one_in(4)) {
    const Format ema = in.of(arrays);
    add_stream(in, all, tensor, kEma, ema, rounding(ema == Format::kBf16), false);
    segment.ema_begins = in.one_in(2);
  }
  if (in.one_in(3)) {
    const Format shadow = in.of(arrays);
    add_stream(in, all, tensor, kShadow, shadow, rounding(shadow == Format::kBf16), false);
  }
  all.elements += n;
}

Case make_case(Input& in) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double factors[] = {1, 1, 0.5, 1.0 / 65536, 0, -1, 1e30};
  const double norms[] = {kInfinity, kInfinity, 1, 1e-3, 0};
  const double values[] = {kInfinity, kInfinity, 1, 0.25, 1e-30, 1e30};
  const double decays[] = {0, 0.01, 0.1, 1, 1e10};
  Case all = {};
  all.rule = static_cast<int>(in.below(static_cast<int64_t>(rules().size())));
  const Rule& rule = rules()[all.rule];
  for (int64_t i = in.below(3); i >= 0; --i) {
    Group& group = all.groups.emplace_back();
    group.maximize = in.one_in(2);
    group.decoupled = in.one_in(2);
    group.weight_decay = in.of(decays);
    for (size_t h = 0; h < rule.hypers.size(); ++h) group.hypers[h] = hyper(in, rule.hypers[h]);
  }
  Options& options = all.options;
  options.factor = in.of(factors);
  options.measure = in.one_in(3);
  if (options.measure) options.max_norm = in.of(norms);
  options.skip_nonfinite = options.measure && in.one_in(4);
  options.clip_value = in.of(values);
  options.zero_grad = in.one_in(4);
  options.average = in.one_in(2);
  options.ema_decay = hyper(in, "beta1");
  options.seed = in.one_in(2) ? in.word() : 0;
  all.threads = 2 + static_cast<int>(in.below(6));
  all.cuts = in.word();

  const int64_t table = in.below(16);  // 0: a large tensor; 1: many small ones; else a few
  all.steps = table ? 1 + static_cast<int>(in.below(3)) : 1;
  if (table == 0) add_tensor(in, all, kAlone + in.below(kAlone / 2));
  const int64_t tensors = table == 1 ? in.below(300) : 1 + in.below(5);
  for (int64_t i = 0; i < tensors; ++i) add_tensor(in, all, pick_length(in, table));
  all.memory.resize(all.memory.size() + kGap, kCanary);
  return all;
}

// The segments of a case in some memory.
std::vector<Segment> segments_at(const Case& all, unsigned char* memory) {
  std::vector<Segment> segments;
  for (const Tensor& tensor : all.tensors) {
    Segment& segment = segments.emplace_back(tensor.segment);
    for (int k = 0; k < kStreams; ++k) {
      const Lain& lain = tensor.lain[k];
      if (lain.format == Format::kNone) continue;
      segment.stream[k].data = memory + lain.data;
      segment.stream[k].beside = lain.entries ? memory + lain.beside : nullptr;
    }
  }
  return segments;
}

// Elements [begin, end) of a segment. Where elements share an entry beside them it begins with a block.
Segment piece_of(const Segment& whole, int64_t begin, int64_t end) {
  Segment piece = whole;
  piece.n = end - begin;
  piece.first = whole.first + begin;
  for (Stream& stream : piece.stream) {
    if (stream.format == Format::kNone) continue;
    const FormatInfo& own = info(stream.format);
    stream.data = static_cast<char*>(stream.data) + begin * own.bytes;
    if (own.block == 0 || begin == end) continue;
    const int64_t entry = piece.first / own.block - whole.first / own.block;
    stream.beside = static_cast<char*>(stream.beside) + entry * own.beside;
  }
  return piece;
}

// The same tensors as tables of pieces, cut wherever no block is.
std::vector<Segment> in_pieces(const std::vector<Segment>& segments, Input cuts) {
  std::vector<Segment> pieces;
  for (const Segment& whole : segments) {
    int64_t unit = 1, begin = 0;
    for (const Stream& stream : whole.stream) {
      if (info(stream.format).block > 1) unit = info(stream.format).block;
    }
    for (int64_t i = cuts.below(4); i > 0 && whole.n > 0; --i) {
      const int64_t place = (whole.first + cuts.below(whole.n)) / unit * unit;
      const int64_t cut = place - whole.first;
      if (cut < begin) continue;
      pieces.push_back(piece_of(whole, begin, cut));
      begin = cut;
    }
    pieces.push_back(piece_of(whole, begin, whole.n));
  }
  return pieces;
}

// What sweep() does of one segment, in plain words: every stream staged, in float or double.
template <class T>
void sweep_by_hand(const Kernels& kernels, int rule, const Segment& segment, const Row& row) {
  constexpr bool kWide = sizeof(T) == sizeof(double);
  const RuleKernels& own = kernels.rules[rule];
  const auto codec = [&](int k) -> const Codec& {
    return kernels.codec[static_cast<int>(segment.stream[k].format)][kWide];
  };
  const auto has = [&](int k) {
    if (segment.stream[k].format == Format::kNone) return false;
    return k < kState || (k < kEma && own.mask[row.variant] >> (k - kState) & 1);
  };
  alignas(64) T staged[kStreams][kBlock + kNormLanes];
  for (int64_t begin = 0, n; begin < segment.n; begin += n) {
    const int64_t place = segment.first + begin;
    n = std::min(kBlock - place % kBlock, segment.n - begin);
    const auto decode = [&](int k) {
      codec(k).decode(segment.stream[k], begin, place, n, staged[k]);
    };
    const auto encode = [&](int k, const T* from) {
      codec(k).encode(segment.stream[k], k, begin, place, n, from, row.key);
    };
    if (takes_part(segment)) {
      Run run = {};
      Row scaled = row;
      for (int k = 0; k < kEma; ++k) {
        run.at[k] = staged[k];
        if (has(k)) decode(k);
      }
      if (row.clip < std::numeric_limits<double>::infinity()) {
        const T most = static_cast<T>(row.clip);
        for (int64_t i = 0; i < n; ++i) {
          const T g = staged[kGrad][i] * static_cast<T>(row.scalars[0]);
          staged[kGrad][i] = g > most ? most : -most > g ? -most : g;
        }
        scaled.scalars[0] = 1;
      }
      own.update[row.variant][kWide](scaled, run,
                                     (n + kernels.lanes - 1) / kernels.lanes * kernels.lanes);
      for (int k = 0; k < kEma; ++k) {
        if (has(k) && k != kGrad) encode(k, staged[k]);
      }
    }
    decode(kParam);
    if (segment.stream[kEma].format != Format::kNone) {
      const double decay = row.ema_decay;
      const T weight = static_cast<T>(decay <= 0.5 ? -decay : 1 - decay);
      if (!segment.ema_begins) decode(kEma);
      for (int64_t i = 0; i < n; ++i) {
        T &m = staged[kEma][i], p = staged[kParam][i];
        m = segment.ema_begins ? p : std::fma(weight, p - m, decay <= 0.5 ? p : m);
      }
      encode(kEma, staged[kEma]);
    }
    if (segment.stream[kShadow].format != Format::kNone) encode(kShadow, staged[kParam]);
    if (row.zero_grad && takes_part(segment)) {
      const Stream& grad = segment.stream[kGrad];
      std::memset(static_cast<char*>(grad.data) + begin * info(grad.format).bytes, 0,
                  n * info(grad.format).bytes);
    }
  }
}

enum Way { kAtOnce, kThreads, kPieces, kByHand };
constexpr const char* kWays[] = {"at once", "by threads", "in pieces", "by hand"};

// What steps leave behind.
struct Result {
  std::string isa;
  Way way;
  std::vector<unsigned char> memory;
  unsigned char* at;             // of the case's first byte
  std::vector<double> measured;  // sums of squares, and whether all is finite
  bool wrote = false;            // not all steps were skipped
};

// Elements that lie in no stream, as addresses for which body(begin, end) is called.
template <class Body>
void each_gap(const Case& all, const Body& body) {
  int64_t at = 0;
  const auto stream = [&](int64_t begin, int64_t bytes) {
    body(at, begin);
    at = begin + bytes;
  };
  for (const Tensor& tensor : all.tensors) {
    for (const Lain& lain : tensor.lain) {
      if (lain.format == Format::kNone) continue;
      stream(lain.data, lain.bytes);
      if (lain.entries) stream(lain.beside, lain.beside_bytes());
    }
  }
  body(at, static_cast<int64_t>(all.memory.size()));
}

void step(const Case& all, const std::string& isa, Way way, Result& result) {
  result.isa = isa;
  result.way = way;
  result.wrote = false;
  result.measured.clear();
  result.memory.resize(all.memory.size() + 64);
  result.at = Case::aligned(result.memory);
  std::memcpy(result.at, all.memory.data(), all.memory.size());
  set_isa(isa);
  set_num_threads(way == kThreads ? all.threads : 1);
  std::vector<Segment> segments = segments_at(all, result.at);
  std::vector<Counted> counted;
  for (const Tensor& tensor : all.tensors) counted.push_back(tensor.counted);
  const auto shut = [&](bool closed) {  // to reads, too
    each_gap(all, [&](int64_t begin, int64_t end) {
      if (closed) {
        ASAN_POISON_MEMORY_REGION(result.at + begin, end - begin);
      } else {
        ASAN_UNPOISON_MEMORY_REGION(result.at + begin, end - begin);
      }
    });
  };

  shut(true);
  Options options = all.options;
  for (int number = 0; number < all.steps; ++number) {
    Verdict verdict = {0, options.factor, 0};
    if (options.measure) {
      const Measured measured = measure(segments);
      for (const auto& own : measured.each) {
        if (!own) continue;
        result.measured.push_back(own->sum);
        result.measured.push_back(own->finite);
      }
      result.measured.push_back(measured.all.sum);
      verdict = judge(measured.all.sum, !measured.all.finite, false, options);
    }
    if (verdict.skip) continue;
    result.wrote = true;
    Plan plan;
    plan.make(all.rule, counted, all.groups, verdict.factor, options, segments);
    if (way == kPieces) {
      const auto* cuts = reinterpret_cast<const uint8_t*>(&all.cuts);
      run(all.rule, in_pieces(segments, Input(cuts, sizeof(all.cuts))), plan.rows());
    } else if (way == kByHand) {
      for (const Segment& segment : segments) {
        if (!is_written(segment)) continue;
        const bool wide = segment.stream[kParam].format == Format::kF64;
        const auto sweep = wide ? sweep_by_hand<double> : sweep_by_hand<float>;
        sweep(kernels(), all.rule, segment, plan.rows()[segment.row]);
      }
    } else {
      run(all.rule, segments, plan.rows());
    }
    for (size_t i = 0; i < segments.size(); ++i) {
      if (takes_part(segments[i])) counted[i].clock = plan.after(segments[i]);
      segments[i].ema_begins = 0;
    }
    options.average += options.average > 0;
  }
  shut(false);
}

[[noreturn]] void fail(const Case& all, const Result& result, const char* what, size_t tensor = 0,
                       int k = -1, int64_t at = 0) {
  std::fprintf(stderr, "%s %s: %s", result.isa.c_str(), kWays[result.way], what);
  if (k >= 0) {
    const Segment& segment = all.tensors[tensor].segment;
    std::fprintf(stderr, ", tensor %zu stream %d at %lld (%s, n %lld, first %lld)", tensor, k,
                 static_cast<long long>(at), info(segment.stream[k].format).name,
                 static_cast<long long>(segment.n), static_cast<long long>(segment.first));
  }
  std::fprintf(stderr, "; rule %s, %d steps, %zu tensors\n", rules()[all.rule].name.c_str(),
               all.steps, all.tensors.size());
  std::abort();
}

// That nothing was written but what a step writes.
void check_untouched(const Case& all, const Result& result) {
  const unsigned char* before = all.memory.data();
  each_gap(all, [&](int64_t begin, int64_t end) {
    if (std::memcmp(before + begin, result.at + begin, end - begin) != 0) {
      fail(all, result, "a byte outside the streams was written");
    }
  });
  for (size_t i = 0; i < all.tensors.size(); ++i) {
    const Tensor& tensor = all.tensors[i];
    for (int k = 0; k < kStreams; ++k) {
      const Lain& lain = tensor.lain[k];
      const bool made = k >= kEma;  // of a parameter that sits the update out as well
      if (lain.format == Format::kNone || lain.bytes == 0) continue;
      if (k != kGrad && result.wrote && (made || takes_part(tensor.segment))) continue;
      const unsigned char* now = result.at + lain.data;
      if (k == kGrad && result.wrote && all.options.zero_grad) {
        if (now[0] || std::memcmp(now, now + 1, lain.bytes - 1) != 0) {
          fail(all, result, "not all zeros", i, k);
        }
      } else if (std::memcmp(before + lain.data, now, lain.bytes) != 0 ||
                 std::memcmp(before + lain.beside, result.at + lain.beside, lain.beside_bytes()) !=
                     0) {
        fail(all, result, "written, and may only be read", i, k);
      }
    }
  }
}

// That two elements of a stream are the same: the same bits, or both NaN.
bool same(const Lain& lain, const Segment& segment, const unsigned char* a, const unsigned char* b,
          int64_t i) {
  const FormatInfo& own = info(lain.format);
  uint64_t x = 0, y = 0;
  std::memcpy(&x, a + lain.data + i * own.bytes, own.bytes);
  std::memcpy(&y, b + lain.data + i * own.bytes, own.bytes);
  if (own.block > 1) {  // 8 bits; their exponents are compared as bytes
    if (x == y) return true;
    const int64_t entry = (segment.first + i) / own.block - segment.first / own.block;
    uint8_t codes[] = {static_cast<uint8_t>(x), static_cast<uint8_t>(y)};
    uint8_t exponent = a[lain.beside + entry];
    alignas(64) float values[kNormLanes];
    const Stream both = {codes, lain.format, Rounding::kNearest, &exponent};
    kernels().codec[static_cast<int>(lain.format)][0].decode(both, 0, 0, 2, values);
    return std::isnan(values[0]) && std::isnan(values[1]);
  }
  return canonical(lain.format, x) == canonical(lain.format, y);
}

void check_same(const Case& all, const Result& wanted, const Result& result) {
  if (result.measured.size() != wanted.measured.size()) fail(all, result, "another verdict");
  for (size_t i = 0; i < wanted.measured.size(); ++i) {
    const double a = wanted.measured[i], b = result.measured[i];
    if (std::memcmp(&a, &b, sizeof(a)) != 0 && !(std::isnan(a) && std::isnan(b))) {
      fail(all, result, "another sum of squares");
    }
  }
  if (std::memcmp(wanted.at, result.at, all.memory.size()) == 0) return;
  check_untouched(all, result);
  for (size_t t = 0; t < all.tensors.size(); ++t) {
    const Tensor& tensor = all.tensors[t];
    for (int k = 0; k < kStreams; ++k) {
      const Lain& lain = tensor.lain[k];
      if (lain.format == Format::kNone) continue;
      if (std::memcmp(wanted.at + lain.beside, result.at + lain.beside, lain.beside_bytes()) != 0) {
        fail(all, result, "other bytes beside", t, k);
      }
      for (int64_t i = 0; i < tensor.segment.n; ++i) {
        if (same(lain, tensor.segment, wanted.at, result.at, i)) continue;
        fail(all, result, "another element", t, k, i);
      }
    }
  }
}

int64_t inputs = 0, elements = 0, swept = 0;  // swept: counted for each set and way

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  start_pool();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<std::string> isas = usable_isas();
  static Result wanted, result;
  const FloatMode mode;
  Input in(data, size);
  const Case all = make_case(in);
  step(all, isas[0], kAtOnce, wanted);
  check_untouched(all, wanted);
  int64_t runs = 1;
  for (const std::string& isa : isas) {
    for (const Way way : {kAtOnce, kThreads, kPieces, kByHand}) {
      if (way == kAtOnce && isa == isas[0]) continue;
      // Less is over on the calling thread in any case.
      if (way == kThreads && all.elements < kAlone) continue;
      step(all, isa, way, result);
      check_same(all, wanted, result);
      ++runs;
    }
  }
  ++inputs;
  elements += all.elements * all.steps;
  swept += all.elements * all.steps * runs;
  return 0;
}

#if !defined(FUSEDSTEP_LIBFUZZER)
namespace {

std::vector<uint8_t> current;  // the input that is being run

// Leaves the input that has failed where it can be run again.
void keep(int signal) {
  const int file = open("fuzz-failed", O_WRONLY | O_CREAT | O_TRUNC, 0644);
  const bool kept = file >= 0 && write(file, current.data(), current.size()) ==
                                     static_cast<ssize_t>(current.size());
  const char text[] = "the input is in ./fuzz-failed: give the program its name\n";
  if (kept && write(2, text, sizeof(text) - 1) < 0) _exit(1);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void run_current() { LLVMFuzzerTestOneInput(current.data(), current.size()); }

}  // namespace

// fuzz [--seconds S] [--elements N] [--seed K] FILES...: the inputs in files first, then random ones, until
// so much time has passed or so many parameters have been stepped by every set.
int main(int argc, char** argv) {
  double seconds = 0, wanted = 0;
  uint64_t seed = 1;
  LLVMFuzzerInitialize(&argc, &argv);
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE}) std::signal(signal, keep);
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) == 0) {
      char* end = nullptr;
      const double value = ++i < argc ? std::strtod(argv[i], &end) : 0;
      if (!end || end == argv[i] || *end || value < 0) {
        std::fprintf(stderr, "%s must have a number >= 0\n", word.c_str());
        return 2;
      }
      if (word == "--seconds") {
        seconds = value;
      } else if (word == "--elements") {
        wanted = value;
      } else if (word == "--seed") {
        seed = static_cast<uint64_t>(value);
      } else {
        std::fprintf(stderr, "%s is unknown: --seconds, --elements, --seed, or files\n",
                     word.c_str());
        return 2;
      }
      continue;
    }
    std::FILE* file = std::fopen(word.c_str(), "rb");
    if (!file) {
      std::fprintf(stderr, "%s cannot be read\n", word.c_str());
      return 1;
    }
    current.resize(1 << 16);
    current.resize(std::fread(current.data(), 1, current.size(), file));
    std::fclose(file);
    run_current();
  }
  const int64_t replayed = inputs;
  const auto begin = std::chrono::steady_clock::now();
  const auto spent = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  const auto bytes = reinterpret_cast<const uint8_t*>(&seed);
  Input random(bytes, sizeof(seed));
  while (spent() < seconds || static_cast<double>(elements) < wanted) {
    current.resize(random.random() % 256);
    for (uint8_t& byte : current) byte = static_cast<uint8_t>(random.random());
    run_current();
  }
  std::printf("%lld inputs (%lld from files), %lld elements stepped by each of", (long long)inputs,
              (long long)replayed, (long long)elements);
  for (const std::string& isa : usable_isas()) std::printf(" %s", isa.c_str());
  std::printf(": %lld updates, no difference\n", (long long)swept);
}
#endif
