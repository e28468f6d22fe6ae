// The formats in which the elements of a stream may lie in memory: the one list, which the kernels,
// the host, a GPU and Python read.
#pragma once

#include <cstdint>

namespace fusedstep {

enum class Format : int { kNone, kF32, kF64, kBf16, kF16 };

// One line for each of them, in that order. Python's `_core.formats()` is this table.
struct FormatInfo {
  const char* name;  // NumPy's, ml_dtypes' and torch's
  int bytes;         // of an element
  int dlpack_code;   // DLDataTypeCode
};
constexpr FormatInfo kFormatInfo[] = {
    {"none", 0, -1},     // no stream
    {"float32", 4, 2},   // kDLFloat
    {"float64", 8, 2},   //
    {"bfloat16", 2, 4},  // kDLBfloat
    {"float16", 2, 2},
};
constexpr int kFormats = sizeof(kFormatInfo) / sizeof(kFormatInfo[0]);

// One stream of elements. No struct that goes into a GPU's table has padding, as tables are compared
// as bytes.
struct Stream {
  void* data = nullptr;
  Format format = Format::kNone;
  int padding = 0;
};

}  // namespace fusedstep
