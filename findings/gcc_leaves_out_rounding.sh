#!/usr/bin/env bash
# GCC 12.2.0 (Debian 12, x86-64): at -O2 the vectorizer leaves out roundings of doubles to float.
#
# (double)(float)x rounds x to 24 bits; where sixteen such values are then squared and added in pairs,
# the program below computes from unrounded ones, without -ffast-math, for an array whose rest is
# zeros: some lanes are rounded and some are not, so that the same value counts differently by its
# place. -O1, or -O2 -fno-tree-slp-vectorize, has the sums that C defines. A program that compares
# results of two instruction sets or optimization levels sees it as 1e-9 of the sum; no warning tells.
#
# Seen, of 16 lengths of the array:
#   -O1: 0 sums of unrounded values
#   -O2: 14 sums of unrounded values
#   -O2 -fno-tree-slp-vectorize: 0 sums of unrounded values
# Needs Debian 12 and its binutils and libc6-dev; the compiler is unpacked in the temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
version=12.2.0-14+deb12u1
apt-get download --quiet --quiet "gcc-12=$version" "cpp-12=$version" "libgcc-12-dev=$version" \
  2> /dev/null
for package in *.deb; do dpkg -x "$package" "$folder/unpacked"; done
compiler="$folder/unpacked/usr/bin/x86_64-linux-gnu-gcc-12"
cat > rounding.c <<'C'
int printf(const char*, ...);

__attribute__((noinline)) double sum_of_squares(const double* from, long n) {
  double tail[16] = {0}, s[16];
  __builtin_memcpy(tail, from, n * sizeof(double));
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const double x = (float)tail[i];
    s[i] = x * x + 0.0;
  }
#pragma GCC unroll 16
  for (int half = 8; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) s[i] = s[i] + s[i + half];
  }
  return s[0];
}

int main() {
  double values[16], rounded[16];
  int differ = 0;
  for (int i = 0; i < 16; ++i) {
    volatile float narrow = values[i] = 1.0 / (3 + i);
    rounded[i] = narrow;
  }
  for (int n = 1; n <= 16; ++n) {
    differ += sum_of_squares(values, n) != sum_of_squares(rounded, n);
  }
  printf("%d", differ);
}
C
run() {
  "$compiler" "$@" rounding.c -o rounding
  ./rounding
}
"$compiler" --version | head -n 1
one=$(run -O1) two=$(run -O2) without=$(run -O2 -fno-tree-slp-vectorize)
echo "-O1: $one, -O2: $two, -O2 -fno-tree-slp-vectorize: $without sums of unrounded values"
[ "$one" = 0 ] && [ "$without" = 0 ] || { echo "other optimizations do it too: GCC has changed"; exit 1; }
[ "$two" = 14 ] || { echo "-O2 rounds: GCC has changed"; exit 1; }
