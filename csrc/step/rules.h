// The rules as the host sees them: names, states, the scalars of the next step, and divisors.
#pragma once

#include <string>
#include <vector>

#include "interface/clock.h"
#include "interface/group.h"
#include "interface/options.h"

namespace fusedstep {

struct Rule {
  std::string name;
  std::vector<std::string> hypers, states;
  std::vector<Sign> signs;  // of the states

  // The states that there are under these hyperparameters.
  StateMask (*mask_of)(const double* hypers);

  // Those of them that no narrower format may hold, and why; null where there are none.
  StateMask (*exact)(const double* hypers);
  const char* why_exact;

  // The row of the update that follows `clock`, which is advanced to it.
  Row (*prepare)(const Group& group, Clock& clock, double factor, const Options& options);

  // Per variant, what the step divides elements [0, n) by, from their states (null: the variant has
  // none); null where the rule does not divide.
  using Divisors = void (*)(const double* scalars, const double* const* states, int64_t n,
                            double* result);
  std::vector<Divisors> divisors;
};

// In registry order, so that the place is the rule's number in Kernels::rules.
const std::vector<Rule>& rules();

// What becomes of gradients of this sum of squares.
Verdict judge(double sum, bool nonfinite, bool found_inf, const Options& options);

// What update number t of n elements divided by, under these hyperparameters. The rule divides.
void divisors(const Rule& rule, const double* hypers, int64_t t, const double* const* states,
              int64_t n, double* result);

// The number of a rule; throws std::invalid_argument for an unknown name.
int rule_number(const std::string& name);

}  // namespace fusedstep
