// Powers for the per-step scalars and for schedules, the same bits on every machine (power.cpp).
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define FUSEDSTEP_ANYWHERE __host__ __device__  // a GPU prepares the scalars of a recorded step
#else
#define FUSEDSTEP_ANYWHERE
#endif

namespace fusedstep {

FUSEDSTEP_ANYWHERE double power(double base, int64_t n);  // n >= 0
FUSEDSTEP_ANYWHERE double power(double base, double y);
FUSEDSTEP_ANYWHERE double cospi(double x);  // cos(pi*x), exact where that is a number of few bits

}  // namespace fusedstep
