// A torch tensor's memory, strides included, in some tens of nanoseconds and without linking torch.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "interface/device.h"
#include "python/dlpack.h"

namespace fusedstep {

struct TensorView {
  void* data;
  Format format;
  int reals;  // 1, or 2 where an element is a complex number
  int ndim;
  const int64_t *shape, *strides;  // the tensor's own, alive while nobody changes it
  int64_t n;                       // real numbers, or integers
  int integer;                     // bytes of an integer; 0: it has real or complex numbers
  std::vector<int64_t> held;       // what they are where they had to be copied, else empty
};

bool same_shape(const TensorView& a, const TensorView& b);

// Bytes of an element.
int64_t element_bytes(const TensorView& view);

// Whether the same place in memory is the same element in both.
bool same_strides(const TensorView& a, const TensorView& b);

// Whether the elements fill one run of memory, in any order of the dimensions.
bool dense(const TensorView& view);
// And in the order of their places in the tensor.
bool contiguous(const TensorView& view);

inline void prefetch(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address));
}

// Cache lines of objects of torch's. They are hints, for prefetching: nothing is read there.
struct Lines {
  std::array<uintptr_t, 20> address;
  size_t n = 0;

  void add(uintptr_t begin, size_t bytes) {
    for (uintptr_t line = begin & ~uintptr_t{63}; line < begin + bytes; line += 64) {
      const auto end = address.begin() + n;
      if (n < address.size() && std::find(address.begin(), end, line) == end) address[n++] = line;
    }
  }
  void fetch(size_t first) const {
    for (size_t i = 0; i < first; ++i) prefetch(address[i]);
  }
};

class TensorReader {
 public:
  // `exchange` uses DLPack's C functions, which torch has since 2.10; else Python's attributes.
  explicit TensorReader(bool exchange);

  bool is_tensor(pybind11::handle object) const;

  // Whether it is a torch.Tensor or Parameter and no subclass, of which no Python code runs.
  bool ordinary(pybind11::handle tensor) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    return type == parameter_.ptr() || type == tensor_.ptr();
  }

  // Reads an ordinary tensor. False for what has no memory to sweep over as it is: another class
  // (DTensor, FakeTensor, ...), place, layout or dtype, or a storage that was resized to nothing.
  // Integers, which have no format, are int16 and uint8: what an optimizer keeps.
  bool read(pybind11::handle tensor, TensorView& view, const Place& place) const;

  // Whether the tensor's storage reaches as far as its elements do: one may be resized under it.
  bool holds(pybind11::handle tensor, const TensorView& view) const;

  // Where any tensor's elements are, whatever its class; null for one that cannot tell. Runs no
  // Python code.
  const void* address(pybind11::handle tensor) const;

  // Whether the values are not those in memory: a negation or conjugation is pending.
  bool lazy(pybind11::handle tensor, const TensorView& view) const;

  // Whether there is no reference to an object but one, weak ones counted.
  static bool referred_once(pybind11::handle object);

  // Whether nobody has an ordinary tensor, or a storage under it, but the one reference to it that
  // there is. Only where `knows_alone`.
  bool alone(pybind11::handle tensor) const;
  bool knows_alone() const {
#ifdef Py_GIL_DISABLED
    return false;  // a count is another one as soon as it was read
#else
    return alone_ != Owners{};
#endif
  }

  // Adds what torch will look at for a tensor, as far as it can be guessed.
  void add_lines(pybind11::handle tensor, Lines& lines) const;

  // `tensor.grad`, and `tensor.grad = None`.
  pybind11::object grad(pybind11::handle tensor) const;
  void drop_grad(pybind11::handle tensor) const;

 private:
  // How many have a tensor's storage, and how many its Python object, while that is looked at.
  using Owners = std::pair<int64_t, int64_t>;
  Owners owners(pybind11::handle tensor) const;

  bool read_attributes(pybind11::handle tensor, TensorView& view, const Place& place) const;
  bool finish(pybind11::handle tensor, TensorView& view) const;

  const DLPackExchangeAPI* api_ = nullptr;
  pybind11::object storage_of(pybind11::handle tensor) const;
  pybind11::object use_count_;           // of a storage's address
  Owners alone_ = {};                    // of a storage that only its tensor has
  pybind11::object tensor_, parameter_;  // the classes
  pybind11::object strided_;             // torch.strided
  pybind11::list dtypes_;                // torch's: formats', complex ones, integers

  // What the two classes inherit, called without a lookup of its name; null where torch has
  // another kind of attribute there.
  PyObject* (*is_neg_)(PyObject*, PyObject*) = nullptr;
  PyGetSetDef* grad_ = nullptr;
};

}  // namespace fusedstep
