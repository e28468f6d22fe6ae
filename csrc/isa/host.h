// The host's view of the rules, one double wide: it computes their scalars, and what they divide by.
#pragma once

#define FN inline

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

FN double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
FN double sqrt(double a) { return __builtin_sqrt(a); }
FN double select_gt(double a, double b, double x, double y) { return a > b ? x : y; }

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
