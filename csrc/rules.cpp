// Turns the registry into run-time tables. Of the equations only the divisors are compiled here.
#include "rules.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

#define FUSEDSTEP_TARGET host
#include "rules/scalars.h"

namespace fusedstep {
namespace {

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
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
  Rule rule{R::kName, words(R::kHypers), words(R::kStates), {}, host::prepare<R>, {}};
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

Group group_of(const Rule& rule, const double* hypers) {
  Group group = {};
  std::copy(hypers, hypers + rule.hypers.size(), group.hypers);
  return group;
}

}  // namespace

const std::vector<Rule>& rules() {
  static const std::vector<Rule> all = describe_all(host::Registry{});
  return all;
}

Verdict judge(double sum, bool nonfinite, bool found_inf, const Control& control) {
  return host::judge(sum, nonfinite, found_inf, control.factor, control);
}

unsigned used_states(const Rule& rule, const double* hypers) {
  Clock clock{0, {0, 0}};
  return rule.uses[rule.prepare(group_of(rule, hypers), clock, 1).variant];
}

void divisors(const Rule& rule, const double* hypers, int64_t t, const double* const* states,
              int64_t n, double* result) {
  Clock clock{t - 1, {0, 0}};
  const Row row = rule.prepare(group_of(rule, hypers), clock, 1);
  rule.divisors[row.variant](row.scalars + 2, states, n, result);
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
