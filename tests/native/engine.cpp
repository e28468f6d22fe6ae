// Steps plain memory through the engine, without Python: measures, plans and sweeps Adam over tensors
// of several formats, and compares every bit with a plain loop. Prints what differs; last, how many
// elements were compared. See test_engine.py.
#include "step/engine.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "machine/parallel.h"
#include "step/rules.h"

namespace fusedstep {
// Sets that dispatch.cpp knows and this program, which runs the scalar one, has not.
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels = {};
}
namespace avx512 {
extern const Kernels kernels = {};
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels = {};
}
#endif
}  // namespace fusedstep

using namespace fusedstep;

namespace {

// Betas whose powers double has exactly.
constexpr double kLr = 0.03, kBeta1 = 0.875, kBeta2 = 0.9375, kEps = 1e-3, kDecay = 0.01;
constexpr double kFactor = 0.5;

void expect(bool fine, const char* what, int tensor) {
  if (!fine) std::printf("tensor %d: %s\n", tensor, what);
}

// A number of few digits, so that every format has it exactly.
double number(int tensor, int k, int64_t i) {
  return ((i * 37 + k * 11 + tensor * 5) % 64 - (k == kGrad || k == kState ? 32 : 0)) / 16.0;
}

// Elements of a format from numbers, and back; bfloat16 rounded to nearest even.
void put(Format format, char* to, double x) {
  const auto value = static_cast<float>(x);
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  if (format == Format::kF64) {
    std::memcpy(to, &x, sizeof(x));
  } else if (format == Format::kF32) {
    std::memcpy(to, &value, sizeof(value));
  } else {
    const auto high = static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
    std::memcpy(to, &high, sizeof(high));
  }
}
double get(Format format, const char* from) {
  double wide = 0;
  float value = 0;
  uint16_t high = 0;
  if (format == Format::kF64) {
    std::memcpy(&wide, from, sizeof(wide));
    return wide;
  }
  if (format == Format::kF32) {
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  std::memcpy(&high, from, sizeof(high));
  const uint32_t word = static_cast<uint32_t>(high) << 16;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// A tensor: its formats, its group and its clock before the step.
struct Tensor {
  Format param, grad;
  int64_t n;
  int group;
  int64_t t;
  std::vector<char> memory[4];

  Format format(int k) const {
    return k == kParam ? param : k == kGrad ? grad : state_format(param);
  }
  bool has(int k) const { return k != kGrad || grad != Format::kNone; }
  double at(int k, int64_t i) const {
    return get(format(k), memory[k].data() + i * format_bytes(format(k)));
  }
  Segment segment() {
    Segment result;
    result.n = n;
    for (int k = 0; k < 4; ++k) {
      if (has(k)) result.stream[k] = {memory[k].data(), format(k)};
    }
    return result;
  }
};

// Adam's update of one element as csrc/README.md promises it: in T, its scalars rounded once.
template <class T>
void adam(T g, double lr, int64_t t, T& p, T& m, T& v) {
  double power1 = 1, power2 = 1;
  for (int64_t i = 0; i < t; ++i) {
    power1 *= kBeta1;
    power2 *= kBeta2;
  }
  const T step = T(lr / (1 - power1)), root = T(1 / std::sqrt(1 - power2));
  g = g * T(kFactor);
  g = std::fma(T(kDecay), p, g);
  m = std::fma(T(1 - kBeta1), g - m, m);
  v = std::fma(T(1 - kBeta2), g * g, T(kBeta2) * v);
  p = std::fma(-step, m / std::fma(std::sqrt(v), root, T(kEps)), p);
}

template <class T>
void expect_updated(const Tensor& before, const Tensor& after, double lr, int tensor) {
  for (int64_t i = 0; i < before.n; ++i) {
    T p = T(before.at(kParam, i)), m = T(before.at(kState, i)), v = T(before.at(kState + 1, i));
    adam(T(before.at(kGrad, i)), lr, before.t + 1, p, m, v);
    char rounded[8];
    put(before.param, rounded, p);
    expect(after.at(kParam, i) == get(before.param, rounded), "parameter", tensor);
    expect(after.at(kState, i) == m && after.at(kState + 1, i) == v, "state", tensor);
  }
}

// The sum of squares of numbers that double adds exactly, in whatever order.
double sum_of_squares(const Tensor& tensor) {
  double sum = 0;
  for (int64_t i = 0; i < tensor.n; ++i) sum += tensor.at(kGrad, i) * tensor.at(kGrad, i);
  return sum;
}

// Returns how many elements it compared.
long step() {
  constexpr Format kHalf = Format::kBf16, kFloat = Format::kF32, kDouble = Format::kF64;
  std::vector<Tensor> tensors = {
      {kFloat, kFloat, 1000, 0, 4, {}}, {kHalf, kFloat, 513, 0, 4, {}},
      {kDouble, kHalf, 1025, 1, 4, {}}, {kFloat, Format::kNone, 7, 0, 4, {}},
      {kHalf, kHalf, 0, 0, 4, {}},      {kFloat, kDouble, 40'000, 0, 9, {}},
      {kDouble, kDouble, 1, 1, 4, {}},  {kHalf, kDouble, 200'001, 1, 0, {}},
  };
  std::vector<Segment> segments;
  std::vector<Counted> counted;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor& tensor = tensors[i];
    for (int k = 0; k < 4; ++k) {
      const int64_t bytes = format_bytes(tensor.format(k));
      tensor.memory[k].resize(tensor.n * bytes);
      for (int64_t e = 0; tensor.has(k) && e < tensor.n; ++e) {
        put(tensor.format(k), tensor.memory[k].data() + e * bytes,
            number(static_cast<int>(i), k, e));
      }
    }
    counted.push_back({tensor.group, {tensor.t, {0, 0}}});
  }
  const std::vector<Tensor> before = tensors;
  for (Tensor& tensor : tensors) segments.push_back(tensor.segment());
  const int rule = rule_number("adam");
  std::vector<Group> groups(2);
  for (int i = 0; i < 2; ++i) {
    const double hypers[] = {kLr * (1 + i), kBeta1, kBeta2, kEps, 0, 1};
    std::memcpy(groups[i].hypers, hypers, sizeof(hypers));
    groups[i].weight_decay = kDecay;
  }

  const Measured measured = measure(segments);
  double all = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& own = measured.each[i];
    const int number = static_cast<int>(i);
    expect(own.has_value() == tensors[i].has(kGrad), "whether it is measured", number);
    if (!own) continue;
    expect(own->finite && own->sum == sum_of_squares(before[i]), "sum of squares", number);
    all += own->sum;
  }
  expect(measured.all.finite && measured.all.sum == all, "sum of all", -1);

  Plan plan;
  plan.make(rule, counted, groups, kFactor, {}, segments);
  expect(plan.rows().size() == 4, "one row for each group and clock", -1);
  expect(segments[0].row == segments[1].row && segments[2].row == segments[6].row, "its row", 0);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!takes_part(segments[i])) continue;
    expect(plan.after(segments[i]).t == tensors[i].t + 1, "clock after", static_cast<int>(i));
  }

  run(rule, segments, plan.rows());
  long compared = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int number = static_cast<int>(i);
    const double lr = kLr * (1 + tensors[i].group);
    expect(tensors[i].memory[kGrad] == before[i].memory[kGrad], "gradient", number);
    if (!before[i].has(kGrad)) {
      for (int k = 0; k < 4; ++k) {
        expect(tensors[i].memory[k] == before[i].memory[k], "sits out", number);
      }
    } else if (before[i].param == kDouble) {
      expect_updated<double>(before[i], tensors[i], lr, number);
    } else {
      expect_updated<float>(before[i], tensors[i], lr, number);
    }
    compared += before[i].n;
  }

  // A gradient that is not finite is told by its tensor.
  put(kFloat, tensors[1].memory[kGrad].data(), std::numeric_limits<double>::infinity());
  const Measured spoilt = measure(segments);
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (spoilt.each[i]) expect(spoilt.each[i]->finite == (i != 1), "finite", static_cast<int>(i));
  }
  expect(!spoilt.all.finite, "finite", -1);
  return compared;
}

}  // namespace

int main() {
  start_pool();
  long compared = 0;
  for (const int threads : {1, 3}) {
    set_num_threads(threads);
    compared += step();
  }
  std::printf("%ld\n", compared);
}
