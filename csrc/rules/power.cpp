// base^n, base^y and cos(pi*x) in twice double's precision, rounded once. The C library's pow and cos
// differ in the last bit between versions and instruction sets, and 1 - beta^t magnifies that bit.
// cuda/norm.cu includes this text: a GPU computes the same.
#include "power.h"

#include <cmath>

namespace fusedstep {
namespace {

// The unevaluated sum hi + lo with |lo| <= ulp(hi)/2. Dekker 1971; Hida, Li & Bailey 2001.
struct Pair {
  double hi, lo;
};

FUSEDSTEP_ANYWHERE Pair fast_two_sum(double a, double b) {  // |a| >= |b|
  const double s = a + b;
  return {s, b - (s - a)};
}

FUSEDSTEP_ANYWHERE Pair two_sum(double a, double b) {
  const double s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

FUSEDSTEP_ANYWHERE Pair operator*(Pair a, Pair b) {
  const double p = a.hi * b.hi;
  const double rest = std::fma(a.hi, b.hi, -p) + (a.hi * b.lo + a.lo * b.hi);
  return fast_two_sum(p, rest);
}

FUSEDSTEP_ANYWHERE Pair operator+(Pair a, Pair b) {
  const Pair s = two_sum(a.hi, b.hi);
  return fast_two_sum(s.hi, s.lo + (a.lo + b.lo));
}

FUSEDSTEP_ANYWHERE Pair operator/(Pair a, Pair b) {
  const double q = a.hi / b.hi;
  const Pair rest = a + Pair{-q, 0} * b;
  return fast_two_sum(q, (rest.hi + rest.lo) / b.hi);
}

constexpr double kLog2 = 0x1.62e42fefa39efp-1, kLog2Rest = 0x1.abc9e3b39803fp-56;
constexpr double kPi = 0x1.921fb54442d18p+1, kPiRest = 0x1.1a62633145c07p-53;

// log(x) for finite x > 0, by the series of atanh((m-1)/(m+1)) with m in [sqrt(1/2), sqrt(2)).
FUSEDSTEP_ANYWHERE Pair log(double x) {
  const Pair log2 = {kLog2, kLog2Rest};
  int exponent;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752) m *= 2, --exponent;
  const Pair s = two_sum(m, -1) / two_sum(m, 1), s2 = s * s;
  Pair sum = {0, 0};
  for (int k = 41; k >= 1; k -= 2) sum = sum * s2 + Pair{1, 0} / Pair{static_cast<double>(k), 0};
  return Pair{2, 0} * (s * sum) + Pair{static_cast<double>(exponent), 0} * log2;
}

// exp(x), by the Taylor series of (x - k log 2)/256, squared eight times.
FUSEDSTEP_ANYWHERE double exp(Pair x) {
  if (x.hi > 710) return HUGE_VAL;
  if (x.hi < -746) return 0;
  const double k = std::nearbyint(x.hi / kLog2);
  const Pair r = (x + Pair{-k, 0} * Pair{kLog2, kLog2Rest}) * Pair{0x1p-8, 0};
  Pair sum = {1, 0};
  for (int i = 14; i >= 1; --i) sum = sum * r / Pair{static_cast<double>(i), 0} + Pair{1, 0};
  for (int i = 0; i < 8; ++i) sum = sum * sum;
  return std::ldexp(sum.hi + sum.lo, static_cast<int>(k));
}

}  // namespace

FUSEDSTEP_ANYWHERE double power(double base, int64_t n) {
  if (base > 1) return power(base, static_cast<double>(n));  // squares could overflow to NaN
  Pair result = {1, 0}, square = {base, 0};
  for (; n > 0; n >>= 1) {
    if (n & 1) result = result * square;
    square = square * square;
  }
  return result.hi;
}

FUSEDSTEP_ANYWHERE double power(double base, double y) {
  if (base == 1 || y == 0) return 1;
  if (base == 0) return y > 0 ? 0 : HUGE_VAL;
  if (!std::isfinite(base) || !std::isfinite(y)) return std::pow(base, y);  // 0, 1, inf or NaN
  if (base < 0) {
    if (y != std::nearbyint(y)) return NAN;
    return std::fmod(y, 2.0) != 0 ? -power(-base, y) : power(-base, y);
  }
  const Pair product = log(base) * Pair{y, 0};
  return exp(product);
}

FUSEDSTEP_ANYWHERE double cospi(double x) {
  if (!std::isfinite(x)) return NAN;
  double r = std::fmod(std::fabs(x), 2.0);  // in [0, 2); each of the folds below is exact
  if (r > 1) r = 2 - r;
  const bool negative = r > 0.5;
  if (negative) r = 1 - r;
  if (r == 0.5) return 0;
  const Pair angle = Pair{r, 0} * Pair{kPi, kPiRest}, square = angle * angle;
  Pair sum = {1, 0};  // the Taylor series, whose last term is below 2^-106
  for (int k = 36; k >= 2; k -= 2) {
    sum = sum * square / Pair{-static_cast<double>(k * (k - 1)), 0} + Pair{1, 0};
  }
  return negative ? -sum.hi : sum.hi;
}

}  // namespace fusedstep
