// Turns the registry into run-time tables. Of the equations only the divisors are compiled here.
#include "rules.h"

#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

#define FUSEDSTEP_TARGET host
#include "rules/registry.h"

namespace fusedstep {
namespace {

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
}

template <class R>
int prepare(const double* hypers, Clock& clock, double* scalars) {
  typename R::Hypers h;
  std::memcpy(&h, hypers, sizeof(h));
  typename R::template Step<double, 0> step;
  static_assert(sizeof(step) / sizeof(double) + 2 <= kMaxScalars, "kernels.h: kMaxScalars");
  static_assert(sizeof(h) / sizeof(double) <= kMaxHypers, "kernels.h: kMaxHypers");
  const int variant = R::prepare(h, clock, step);
  std::memcpy(scalars, &step, sizeof(step));
  return variant;
}

template <class Step, size_t... kState>
void divide(const double* scalars, const double* const* states, int64_t n, double* result) {
  Step step;
  std::memcpy(&step, scalars, sizeof(step));
  for (int64_t i = 0; i < n; ++i) {
    result[i] = step.divisor((states[kState] ? states[kState][i] : 0.0)...);
  }
}

template <class Step, size_t... kState>
constexpr Rule::Divisors divisors_over(std::index_sequence<kState...>) {
  return divide<Step, kState...>;
}

template <class Step>
auto divisors_of(int) -> decltype(&Step::divisor, Rule::Divisors{}) {
  return divisors_over<Step>(std::make_index_sequence<Step::kStates>{});
}
template <class Step>
Rule::Divisors divisors_of(long) {  // the rule has none
  return nullptr;
}

template <class R, int kVariant = 0>
void add_variants(Rule& rule) {
  using Step = typename R::template Step<double, kVariant>;
  static_assert(sizeof(Step) == sizeof(typename R::template Step<double, 0>), "the same scalars");
  rule.uses.push_back(Step::kHas);
  rule.divisors.push_back(divisors_of<Step>(0));
  if constexpr (kVariant + 1 < R::kVariants) add_variants<R, kVariant + 1>(rule);
}

template <class R>
Rule describe() {
  Rule rule{R::kName, words(R::kHypers), words(R::kStates), {}, prepare<R>, {}};
  add_variants<R>(rule);
  if (rule.hypers.size() * sizeof(double) != sizeof(typename R::Hypers)) {
    throw std::logic_error(rule.name + ": kHypers and Hypers differ in length");
  }
  return rule;
}

template <class... R>
std::vector<Rule> describe_all(host::List<R...>) {
  return {describe<R>()...};
}

}  // namespace

const std::vector<Rule>& rules() {
  static const std::vector<Rule> all = describe_all(host::Registry{});
  return all;
}

unsigned used_states(const Rule& rule, const double* hypers) {
  Clock clock{1, {0, 0}};
  double scalars[kMaxScalars];
  return rule.uses[rule.prepare(hypers, clock, scalars)];
}

void divisors(const Rule& rule, const double* hypers, int64_t t, const double* const* states,
              int64_t n, double* result) {
  Clock clock{t, {0, 0}};
  double scalars[kMaxScalars];
  const int variant = rule.prepare(hypers, clock, scalars);
  rule.divisors[variant](scalars, states, n, result);
}

int rule_number(const std::string& name) {
  std::string known;
  for (size_t i = 0; i < rules().size(); ++i) {
    if (rules()[i].name == name) return static_cast<int>(i);
    known += (i ? ", " : "") + rules()[i].name;
  }
  throw std::invalid_argument("rule must be one of " + known + ", got '" + name + "'");
}

}  // namespace fusedstep
