// Powers for the per-step scalars and for schedules, the same bits on every machine (power.cpp).
// Host only.
#pragma once

#include <stdint.h>

namespace fusedstep {

double power(double base, int64_t n);  // n >= 0
double power(double base, double y);
double cospi(double x);  // cos(pi*x), exact where that is a number of few bits

}  // namespace fusedstep
