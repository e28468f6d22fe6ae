// Python objects as plain memory: NumPy arrays directly, anything else through DLPack.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "device.h"

namespace fusedstep {

struct View {
  void* data;
  DType dtype;
  int ndim;
  const int64_t* shape;  // the exporter's, alive while `owner` is
  int64_t n;             // elements
  bool writable;
  pybind11::object owner;  // the array, the DLPack capsule, or what the shape was copied to
};

// What error messages call an object: "grads[w1]", or "params" alone. Built only when needed.
struct Label {
  const char* argument;
  const std::string* item = nullptr;
  std::string text() const;
};

// Reads `object`. Throws TypeError for what exposes no memory or an unsupported dtype, ValueError
// for memory that is elsewhere, not C-contiguous, not aligned or not in native byte order.
View view_of(pybind11::handle object, const Label& label, const Place& place = {});

// The device in a capsule of another extension module of this build; null for None.
const Device* device_of(const pybind11::object& capsule);

// Throws what a function of a Device says, if it says anything.
void check_device(const char* error);

// Makes the place's device the thread's current one, for as long as an object of it lives.
class AtPlace {
 public:
  explicit AtPlace(const Place& place) : device_(place.device) {
    if (device_) check_device(device_->use(place.index, &before_));
  }
  ~AtPlace() {
    if (device_) device_->use(before_, &before_);
  }
  AtPlace(const AtPlace&) = delete;
  AtPlace& operator=(const AtPlace&) = delete;

 private:
  const Device* device_;
  int before_ = 0;
};

// "CPU memory" or "cuda:0".
std::string place_text(const Place& place);

// Throws TypeError unless there is a kernel for the two types together.
void check_grad_dtype(const Label& label, DType param, DType grad);

std::string shape_text(const int64_t* shape, int ndim);  // "(3, 4)"

}  // namespace fusedstep
