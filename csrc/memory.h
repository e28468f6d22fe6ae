// Python objects as plain memory: NumPy arrays directly, anything else through DLPack.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "kernels.h"

namespace fusedstep {

struct View {
  void* data;
  DType dtype;
  int ndim;
  const int64_t* shape;  // the exporter's, alive while `owner` is
  int64_t n;             // elements
  bool writable;
  pybind11::object owner;  // the array, or the DLPack capsule
};

// What error messages call an object: "grads[w1]", or "params" alone. Built only when needed.
struct Label {
  const char* argument;
  const std::string* item = nullptr;
  std::string text() const;
};

// Reads `object`. Throws TypeError for what exposes no memory or an unsupported dtype, ValueError
// for memory that is not on the CPU, not C-contiguous, not aligned or not in native byte order.
View view_of(pybind11::handle object, const Label& label);

// Throws TypeError unless there is a kernel for the two types together.
void check_grad_dtype(const Label& label, DType param, DType grad);

std::string shape_text(const int64_t* shape, int ndim);  // "(3, 4)"

}  // namespace fusedstep
