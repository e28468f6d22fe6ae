// Python objects as plain memory: NumPy arrays directly, anything else through DLPack.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "interface/device.h"

namespace fusedstep {

struct View {
  void* data;
  Format format;
  int ndim;
  const int64_t* shape;    // the exporter's, alive while `owner` is
  int64_t n;               // elements
  const char* fixed;       // what it is that must not be written; null for what may
  pybind11::object owner;  // the array, the DLPack capsule, or what the shape was copied to
};

// What error messages call an object: "grads[w1]", or "params" alone. Built only when needed.
struct Label {
  const char* argument;
  const std::string* item = nullptr;
  std::string text() const;
};

// Reads `object`, a NumPy scalar too. Throws TypeError for what exposes no memory or an unsupported
// dtype, ValueError for memory that is not there, elsewhere, not C-contiguous, not aligned or not in
// native byte order.
// `strided`: it may lie apart, with `data` where it begins, and this becomes true then.
View view_of(pybind11::handle object, const Label& label, const Place& place = {},
             bool* strided = nullptr);

// The memory of n elements of so many bytes, whatever they are; throws as view_of, and for another
// number of them. Of format kNone.
View memory_of(pybind11::handle object, const Label& label, const Place& place, int64_t n,
               int bytes);

// A gradient of `param`: a number of Python's or NumPy's too where that has no dimensions. One whose
// elements lie apart is a copy, where it is in the CPU's memory.
View grad_of(pybind11::handle object, const Label& label, const Place& place, const View& param);

// Throws ValueError for memory of which nobody says that it may be written.
void check_writable(const View& view, const Label& label);

// Any array in the CPU's memory as NumPy's, of whatever dtype and strides, and whether its elements
// are the bits of bfloat16; never a copy, but of a NumPy scalar. Throws as view_of.
std::pair<pybind11::array, bool> array_of(pybind11::handle object, const std::string& name);

// Where an array, on whatever device, begins.
uintptr_t address_of(pybind11::handle object);
// Whether it is a torch.Tensor; or one, or a Parameter, and no subclass, which runs nobody's Python
// code when it is read.
bool is_torch_tensor(pybind11::handle object);
bool is_plain_tensor(pybind11::handle object);

// Whether it counts the writes to it, of which automatic differentiation is told: a tensor of torch or
// Paddle.
bool is_versioned(pybind11::handle object);

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

// Asks Python for what the functions above ask once. When a module is loaded: later another thread
// might wait for the first one's answer, and that one for Python, which waits for both.
void look_up_once();

// "CPU memory" or "cuda:0".
std::string place_text(const Place& place);

std::string shape_text(const int64_t* shape, int ndim);  // "(3, 4)"

}  // namespace fusedstep
