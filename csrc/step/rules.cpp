// Turns the registry into run-time tables. Of the equations only the divisors are compiled here.
#include "rules.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>

#define FUSEDSTEP_TARGET host
#include "rules/scalars.h"

namespace fusedstep {
namespace {

constexpr int count_words(const char* text) {
  int count = 0;
  for (char before = ' '; *text; before = *text++) count += before == ' ' && *text != ' ';
  return count;
}

std::vector<std::string> words(const char* text) {
  std::vector<std::string> result;
  for (char before = ' '; *text; before = *text++) {
    if (*text == ' ') continue;
    if (before == ' ') result.emplace_back();
    result.back() += *text;
  }
  return result;
}

template <class Step, size_t... kState>
void divide(const double* scalars, [[maybe_unused]] const double* const* states, int64_t n,
            double* result) {
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

template <class R, class Step>
auto divisors_of(int) -> decltype(&Step::divisor, Rule::Divisors{}) {
  return divisors_over<Step>(std::make_index_sequence<host::count(R::kStates)>{});
}
template <class R, class Step>
Rule::Divisors divisors_of(long) {  // the rule has none
  return nullptr;
}

// Whether hyperparameters decide on the rule's states.
template <class R, class = void>
constexpr bool kDecide = false;
template <class R>
constexpr bool kDecide<R, std::void_t<decltype(&R::states)>> = true;

template <class R>
StateMask mask_of(const double* hypers) {
  if constexpr (kDecide<R>) return R::states(host::hypers_of<R>(hypers));
  return host::mask_of<R, typename R::template Step<double, 0>>(0);
}

// Whether some states must be exact.
template <class R, class = void>
constexpr const char* kWhyExact = nullptr;
template <class R>
constexpr const char* kWhyExact<R, std::void_t<decltype(&R::exact)>> = R::kExact;

template <class R>
StateMask exact_of([[maybe_unused]] const double* hypers) {
  if constexpr (kWhyExact<R> != nullptr) return R::exact(host::hypers_of<R>(hypers));
  return 0;
}

template <class R, int kVariant = 0>
void add_variants(Rule& rule) {
  using Step = typename R::template Step<double, kVariant>;
  using First = typename R::template Step<double, 0>;
  static_assert(sizeof(Step) == sizeof(First), "the same scalars");
  static_assert(kDecide<R> || host::mask_of<R, Step>(0) == host::mask_of<R, First>(0),
                "states() says which states there are");
  rule.divisors.push_back(divisors_of<R, Step>(0));
  if constexpr (kVariant + 1 < R::kVariants) add_variants<R, kVariant + 1>(rule);
}

template <class R>
Rule describe() {
  static_assert(count_words(R::kHypers) * sizeof(double) == sizeof(typename R::Hypers),
                "kHypers and Hypers: the same hyperparameters");
  Rule rule{R::kName,     words(R::kHypers), {}, {}, mask_of<R>, exact_of<R>,
            kWhyExact<R>, host::prepare<R>,  {}};
  for (int s = 0; s < host::count(R::kStates); ++s) {
    rule.states.emplace_back(R::kStates.state[s].name);
    rule.signs.push_back(R::kStates.state[s].sign);
  }
  add_variants<R>(rule);
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
  // Never destroyed: a daemon thread may be in a step still as the process ends.
  static const auto* const all = new std::vector<Rule>(describe_all(host::Registry{}));
  return *all;
}

Verdict judge(double sum, bool nonfinite, bool found_inf, const Options& options) {
  return host::judge(sum, nonfinite, found_inf, options.factor, options);
}

void divisors(const Rule& rule, const double* hypers, int64_t t, const double* const* states,
              int64_t n, double* result) {
  Clock clock{t - 1, {0, 0}};
  const Row row = rule.prepare(group_of(rule, hypers), clock, 1, Options{});
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
