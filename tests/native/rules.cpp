// Prepares every rule's row under many hyperparameters and counts, and prints those whose variant
// has other states than the hyperparameters say; last, how many rows there were. See test_rules.py.
#include "step/rules.h"

#include <cstdio>

namespace fusedstep {
namespace scalar {
extern const Kernels kernels;
}
}  // namespace fusedstep

using namespace fusedstep;

int main() {
  constexpr double kValues[] = {0, 1, 0.5};
  constexpr int64_t kSteps[] = {1, 2, 5, 6, 7, 1000, 1000002};
  long rows = 0;
  for (size_t r = 0; r < rules().size(); ++r) {
    const Rule& rule = rules()[r];
    size_t sets = 1;
    for (size_t h = 0; h < rule.hypers.size(); ++h) sets *= 3;
    for (size_t set = 0; set < sets; ++set) {
      Group group = {};
      for (size_t h = 0, rest = set; h < rule.hypers.size(); ++h, rest /= 3) {
        group.hypers[h] = kValues[rest % 3];
      }
      for (const int64_t t : kSteps) {
        for (const double carried : {0.0, 1.0}) {
          Clock clock = {t - 1, {carried, carried}};
          const Row row = rule.prepare(group, clock, 1, {});
          ++rows;
          if (scalar::kernels.rules[r].mask[row.variant] == rule.mask_of(group.hypers)) continue;
          std::printf("%s, set %zu, update %ld\n", rule.name.c_str(), set, static_cast<long>(t));
        }
      }
    }
  }
  std::printf("%ld\n", rows);
}
