// Runs every kernel of one instruction set on fixed inputs and prints a hash of what it wrote, one
// line each: `rule variant decay pair hash`. Two sets agree when their texts do. See test_cross.py.
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
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

constexpr int64_t kLengths[] = {1, 3, 4, 5, 15, 16, 17, 67};
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

// Storage types from float32, by truncation: any fixed map will do.
void put(float* to, float x) { *to = x; }
void put(double* to, float x) { *to = x + x * 0x1p-40; }  // beyond float's precision
void put(bf16* to, float x) { to->bits = static_cast<uint16_t>(bits<uint32_t>(x) >> 16); }
void put(f16* to, float x) {
  const uint32_t word = bits<uint32_t>(x), sign = (word >> 16) & 0x8000u;
  const int exponent = static_cast<int>((word >> 23) & 255u) - 112;
  const uint32_t fraction = (word >> 13) & 0x3ffu;
  uint32_t half = static_cast<uint32_t>(exponent) << 10 | fraction;
  if (exponent <= 0) half = fraction;  // zero and denormals
  if (exponent >= 31) half = 0x7c00u | ((word & 0x7fffffu) ? 0x200u : 0u);
  to->bits = static_cast<uint16_t>(half | sign);
}

// A value's bits, with one pattern for every NaN: payloads may differ between sets.
uint64_t canonical(float x) { return x == x ? bits<uint32_t>(x) : 0x7fc00000u; }
uint64_t canonical(double x) { return x == x ? bits<uint64_t>(x) : 0x7ff8000000000000u; }
uint64_t canonical(bf16 x) { return (x.bits & 0x7fffu) > 0x7f80u ? 0x7fc0u : x.bits; }
uint64_t canonical(f16 x) { return (x.bits & 0x7fffu) > 0x7c00u ? 0x7e00u : x.bits; }

// FNV-1a, 64 bits.
struct Hash {
  uint64_t value = 0xcbf29ce484222325u;
  void add(uint64_t word) {
    for (int i = 0; i < 64; i += 8) value = (value ^ (word >> i & 255u)) * 0x100000001b3u;
  }
};

// Canary elements on both sides show a write that does not belong to the segment.
template <class T>
struct Stream {
  std::vector<T> memory;
  Stream(int64_t n, Random& random, bool positive) : memory(kOffset + n + 1) {
    for (T& x : memory) {
      float value = number(random);
      if (positive && value < 0) value = -value;
      put(&x, value);
    }
  }
  T* data() { return memory.data() + kOffset; }
  void add_to(Hash& hash) const {
    for (const T& x : memory) hash.add(canonical(x));
  }
};

template <class P, class G, class S>
void run(Kernel kernel, const Rule& rule, unsigned uses, const double* scalars, Random& random,
         Hash& hash) {
  for (const int64_t n : kLengths) {
    Stream<P> param(n, random, false);
    Stream<G> grad(n, random, false);
    std::vector<Stream<S>> states;
    for (const std::string& name : rule.states) {
      const bool squares = name.find("sq") != std::string::npos || name == "sum" ||
                           name == "exp_inf" || name == "acc_delta" || name == "step_size";
      states.emplace_back(n, random, squares);
    }
    Segment segment = {param.data(), grad.data(), {}, n, scalars, kernel};
    for (size_t s = 0; s < states.size(); ++s) {
      if (uses >> s & 1) segment.state[s] = states[s].data();
    }
    kernel(segment, 0, n);
    param.add_to(hash);
    grad.add_to(hash);
    for (const Stream<S>& state : states) state.add_to(hash);
  }
}

void run_pair(int pair, Kernel kernel, const Rule& rule, unsigned u, const double* s, Random& r,
              Hash& h) {
  switch (pair) {
    case 0:
      return run<float, float, float>(kernel, rule, u, s, r, h);
    case 1:
      return run<double, double, double>(kernel, rule, u, s, r, h);
    case 2:
      return run<bf16, bf16, float>(kernel, rule, u, s, r, h);
    case 3:
      return run<f16, f16, float>(kernel, rule, u, s, r, h);
    case 4:
      return run<float, bf16, float>(kernel, rule, u, s, r, h);
    default:
      return run<float, f16, float>(kernel, rule, u, s, r, h);
  }
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
    Group group = {};
    for (size_t h = 0; h < rule.hypers.size(); ++h) group.hypers[h] = hyper(rule.hypers[h]);
    for (size_t variant = 0; variant < rule.uses.size(); ++variant) {
      for (int decay = 0; decay < kDecays; ++decay) {
        for (int pair = 0; pair < kPairs; ++pair) {
          Hash hash;
          Random random;
          // Every variant reads the same scalars, so those of any will do.
          Clock clock = {0, {0, 0}};
          for (int t = 1; t <= 9; ++t) {
            Row row = rule.prepare(group, clock, t == 1 ? 1 : -1);
            if (t != 1 && t != 9) continue;
            row.scalars[1] = decay == kCoupled ? 0.01 : 1 - 0.03 * 0.01;
            run_pair(pair, kernels.find[r][variant][decay][pair], rule, rule.uses[variant],
                     row.scalars, random, hash);
          }
          std::printf("%s %zu %d %d %016" PRIx64 "\n", rule.name.c_str(), variant, decay, pair,
                      hash.value);
        }
      }
    }
  }
}
