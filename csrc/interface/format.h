// The formats in which the elements of a stream may lie in memory: the one list, which the kernels,
// the host, a GPU and Python read.
#pragma once

#include <cstdint>

namespace fusedstep {

enum class Format : int { kNone, kF32, kF64, kBf16, kF16, kSplit, kKahan, kQ8, kQ8Positive };

// One line for each of them, in that order. Python's `_core.formats()` is this table.
struct FormatInfo {
  const char* name;  // NumPy's, ml_dtypes' and torch's of those that arrays have
  int bytes;         // of an element
  int dlpack_code;   // DLDataTypeCode; -1: no array's, but one that an optimizer keeps
  int beside;        // bytes of an entry of Stream::beside
  int block;         // elements that share an entry; 0: there are none
};
constexpr FormatInfo kFormatInfo[] = {
    {"none", 0, -1, 0, 0},     // no stream
    {"float32", 4, 2, 0, 0},   // kDLFloat
    {"float64", 8, 2, 0, 0},   //
    {"bfloat16", 2, 4, 0, 0},  // kDLBfloat
    {"float16", 2, 2, 0, 0},   //
    {"split", 2, -1, 2, 1},    // bfloat16, beside it the lower half of a float32
    {"kahan", 2, -1, 2, 1},    // bfloat16, beside it what its rounding left
    {"q8", 1, -1, 1, 128},     // 8-bit floats, beside them an exponent for each block
    {"q8_positive", 1, -1, 1, 128},
};
constexpr int kFormats = sizeof(kFormatInfo) / sizeof(kFormatInfo[0]);
constexpr int kArrayFormats = static_cast<int>(Format::kF16) + 1;  // below which are arrays' own

// How a number that a format has not becomes one that it has: the nearest, ties to even, or at
// random one of its two neighbours, so that the mean is the number.
enum class Rounding : int { kNearest, kStochastic };

// One stream of elements. No struct that goes into a GPU's table has padding, as tables are compared
// as bytes.
struct Stream {
  void* data = nullptr;
  Format format = Format::kNone;
  Rounding rounding = Rounding::kNearest;
  void* beside = nullptr;  // what a format keeps beside its elements
};

}  // namespace fusedstep
