// The only C++ that knows NumPy, DLPack and CUDA's array interface.
#include "memory.h"

#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "step.h"

namespace py = pybind11;

namespace fusedstep {
namespace {

// The address of all that is empty: an exporter may give none, or a new one each time.
char nothing;

[[noreturn]] void wrong_dtype(const Label& label, const std::string& got) {
  throw py::type_error(label.text() + " must be float32, float64, bfloat16 or float16, got " + got);
}

[[noreturn]] void not_contiguous(const Label& label) {
  throw py::value_error(label.text() + " must be C-contiguous, got a strided array");
}

int64_t count(const int64_t* shape, int ndim) {
  int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

void check_aligned(const void* data, int64_t n, DType dtype, const Label& label) {
  if (n == 0 || reinterpret_cast<uintptr_t>(data) % dtype_bytes(dtype) == 0) return;
  throw py::value_error(label.text() + " must be aligned to its item size, got an unaligned array");
}

bool c_contiguous(const DLTensor& t) {
  if (!t.strides || count(t.shape, t.ndim) == 0) return true;
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

// NumPy's built-in dtypes are singletons, so a pointer comparison settles the common case; the rest
// (copies, foreign byte order, ml_dtypes.bfloat16) is looked at by name.
DType numpy_dtype(const py::array& array, const Label& label) {
  static const py::handle f32 = py::dtype::of<float>().release();
  static const py::handle f64 = py::dtype::of<double>().release();
  static const py::handle f16 = py::dtype("float16").release();
  static py::handle seen_bf16;
  const py::handle descr = py::detail::array_proxy(array.ptr())->descr;
  if (descr.is(f32)) return DType::f32;
  if (descr.is(seen_bf16)) return DType::bf16;
  if (descr.is(f64)) return DType::f64;
  if (descr.is(f16)) return DType::f16;
  const auto text = py::str(py::getattr(descr, "name")).cast<std::string>();
  if (!py::getattr(descr, "isnative").cast<bool>()) {
    throw py::value_error(label.text() + " must be in native byte order, got dtype " +
                          py::repr(descr).cast<std::string>());
  }
  if (text == "float32") return DType::f32;
  if (text == "float64") return DType::f64;
  if (text == "float16") return DType::f16;
  if (text == "bfloat16") {
    if (!seen_bf16) seen_bf16 = py::reinterpret_borrow<py::object>(descr).release();
    return DType::bf16;
  }
  wrong_dtype(label, text);
}

View numpy_view(const py::array& array, const Label& label) {
  static_assert(sizeof(py::ssize_t) == sizeof(int64_t), "a 64-bit system");
  const auto* proxy = py::detail::array_proxy(array.ptr());
  const DType dtype = numpy_dtype(array, label);
  if (!(proxy->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_)) not_contiguous(label);
  if (!(proxy->flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_)) {
    throw py::value_error(label.text() +
                          " must be aligned to its item size, got an unaligned array");
  }
  const auto* shape = reinterpret_cast<const int64_t*>(proxy->dimensions);
  const bool writable = (proxy->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) != 0;
  const int64_t n = count(shape, proxy->nd);
  return {n ? proxy->data : &nothing, dtype, proxy->nd, shape, n, writable, array};
}

// DLPack's device type and index; type 0 for one that DLPack does not know, such as torch's meta.
std::pair<int, int> dlpack_device(py::handle object) {
  try {
    const py::tuple device(py::getattr(object, "__dlpack_device__")());
    return {py::int_(device[0]), py::int_(device[1])};
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ValueError) && !error.matches(PyExc_BufferError)) throw;
    return {0, 0};
  }
}

bool is_in(const Place& place, int type, int index) {
  if (place.device && place.device->kind != kCpu) {
    const int kind = type == kCudaManaged ? int{kCuda} : type;
    return kind == place.device->kind && index == place.index;
  }
  return type == kCpu || type == kCudaHost || type == kRocmHost;
}

[[noreturn]] void elsewhere(const Label& label, const Place& place, const std::string& got) {
  throw py::value_error(label.text() + " must be " + (place.device ? "on " : "in ") +
                        place_text(place) + ", got " + got);
}

// The capsule of object.__dlpack__(), by the newest protocol the exporter knows.
py::object dlpack_capsule(py::handle object, const Place& place) {
  const py::object method = py::getattr(object, "__dlpack__");
  py::dict asked;
  if (place.device && place.device->kind != kCpu) {
    // The exporter lets this stream wait for its own; 1 is the one that CUDA calls 0.
    asked["stream"] = place.stream ? reinterpret_cast<uintptr_t>(place.stream) : 1;
  }
  try {
    return method(**asked, py::arg("max_version") = py::make_tuple(1, 0), py::arg("copy") = false);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return method(**asked);
}

View dlpack_view(py::handle object, const Label& label, const Place& place) {
  const auto [type, index] = dlpack_device(object);
  if (!is_in(place, type, index)) {
    const py::object text =
        py::getattr(object, "device", py::str("type {} of DLPack").format(type));
    elsewhere(label, place, "device " + py::str(text).cast<std::string>());
  }
  // A torch tensor that takes part in autograd refuses to export; its detached alias does not.
  py::object source = py::reinterpret_borrow<py::object>(object);
  if (py::hasattr(object, "detach")) source = py::getattr(object, "detach")();

  py::object capsule;
  try {
    capsule = dlpack_capsule(source, place);
  } catch (py::error_already_set& error) {
    if (error.matches(PyExc_MemoryError)) throw;
    py::raise_from(error, PyExc_ValueError,
                   (label.text() + " must be exportable through DLPack, got " +
                    py::str(error.value()).cast<std::string>())
                       .c_str());
    throw py::error_already_set();
  }
  const DLTensor* t;
  bool writable = true, copied = false;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    const auto* managed = static_cast<DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->version.major != 1) {
      throw py::value_error(label.text() + " must export DLPack version 1, got version " +
                            std::to_string(managed->version.major));
    }
    writable = !(managed->flags & 1);
    copied = (managed->flags & 2) != 0;
    t = &managed->tensor;
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    t = &static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
  } else {
    throw py::type_error(label.text() + " must export a DLPack capsule, got " +
                         py::repr(capsule).cast<std::string>());
  }
  DType dtype;
  if (!dlpack_dtype(*t, dtype)) {
    wrong_dtype(label, py::str(py::getattr(object, "dtype", py::str("another type"))));
  }
  if (!c_contiguous(*t)) not_contiguous(label);
  auto* data = static_cast<char*>(t->data) + t->byte_offset;
  const int64_t n = count(t->shape, t->ndim);
  check_aligned(data, n, dtype, label);
  // The capsule is kept, not consumed: its own destructor gives the memory back.
  return {n ? data : &nothing, dtype, t->ndim, t->shape, n, writable && !copied, capsule};
}

// Torch's tensor class, once somebody has imported torch; else null.
py::handle torch_tensor_type() {
  static py::handle type;
  if (!type) {
    const py::dict modules = py::module_::import("sys").attr("modules");
    if (modules.contains("torch")) {
      type = py::getattr(modules["torch"], "Tensor", py::none()).release();
      if (type.is_none()) type = py::handle();  // torch is in the middle of its own import
    }
  }
  return type;
}

// A tensor as the NumPy array that torch makes of it, several times faster than through DLPack.
// False for what torch cannot show so: bfloat16, which DLPack can, and what DLPack refuses too.
bool torch_view(py::handle tensor, const Label& label, View& view) {
  py::object array;
  try {
    array = py::getattr(tensor, "detach")().attr("numpy")();
  } catch (py::error_already_set&) {
    return false;
  }
  view = numpy_view(py::reinterpret_borrow<py::array>(array), label);
  return true;
}

// What Numba and others show of a GPU's memory, version 2 or 3 of the protocol.
// https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
View interface_view(py::handle object, const Label& label, const Place& place) {
  uintptr_t address = 0;
  bool read_only = false;
  std::vector<int64_t> shape, strides;
  std::string typestr;
  py::object mask, stream;
  bool strided = false;
  const auto wrong = [&](const py::object& shown) {
    throw py::type_error(label.text() + " must have a valid __cuda_array_interface__, got " +
                         py::repr(shown).cast<std::string>());
  };
  const py::object shown = py::getattr(object, "__cuda_array_interface__");
  try {
    const auto get = [&](const char* key) { return shown.attr("get")(key); };
    std::tie(address, read_only) = shown["data"].cast<std::pair<uintptr_t, bool>>();
    shape = shown["shape"].cast<std::vector<int64_t>>();
    typestr = shown["typestr"].cast<std::string>();
    mask = get("mask");
    stream = get("stream");
    if (!stream.is_none()) (void)stream.cast<uintptr_t>();
    strided = !get("strides").is_none();
    if (strided) strides = get("strides").cast<std::vector<int64_t>>();
  } catch (const py::cast_error&) {
    wrong(shown);
  } catch (py::error_already_set& error) {
    if (error.matches(PyExc_MemoryError)) throw;
    wrong(shown);
  }
  if (strided && strides.size() != shape.size()) wrong(shown);
  if (!mask.is_none())
    throw py::type_error(label.text() + " must be a plain array, got a masked one");
  auto* data = reinterpret_cast<void*>(address);
  View view = {};
  if (typestr == "<f4") {
    view.dtype = DType::f32;
  } else if (typestr == "<f8") {
    view.dtype = DType::f64;
  } else if (typestr == "<f2") {
    view.dtype = DType::f16;
  } else {
    wrong_dtype(label, typestr);
  }
  // Owns the shape, and holds on to the array.
  struct Held {
    std::vector<int64_t> shape;
    py::object array;
  };
  auto held = std::make_unique<Held>(Held{shape, py::reinterpret_borrow<py::object>(object)});
  view.ndim = static_cast<int>(shape.size());
  view.shape = held->shape.data();
  view.n = count(view.shape, view.ndim);
  int64_t expected = dtype_bytes(view.dtype);
  for (int i = view.ndim - 1; strided && view.n > 0 && i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != expected) not_contiguous(label);
    expected *= shape[i];
  }
  view.writable = !read_only;
  view.data = view.n ? data : &nothing;
  if (!place.device) elsewhere(label, place, "a GPU's memory");
  check_aligned(view.data, view.n, view.dtype, label);
  int index = place.index;
  if (view.n) check_device(place.device->index_of(data, &index));
  if (index != place.index) elsewhere(label, place, place_text({place.device, index, nullptr}));
  if (!stream.is_none()) {
    const auto handle = stream.cast<uintptr_t>();
    auto* first = reinterpret_cast<void*>(handle == 1 ? 0 : handle);
    if (first != place.stream) check_device(place.device->order(index, first, place.stream));
  }
  view.owner = py::capsule(held.release(), [](void* p) { delete static_cast<Held*>(p); });
  return view;
}

}  // namespace

const Device* device_of(const py::object& capsule) {
  if (capsule.is_none()) return nullptr;
  const auto* device =
      static_cast<const Device*>(PyCapsule_GetPointer(capsule.ptr(), "fusedstep.device"));
  if (!device) throw py::error_already_set();
  if (device->size != sizeof(Device)) {
    throw py::import_error("fusedstep._cuda and fusedstep._core are of different builds");
  }
  return device;
}

void check_device(const char* error) {
  if (error) throw std::runtime_error(error);
}

std::string place_text(const Place& place) {
  if (!place.device) return "CPU memory";
  return "cuda:" + std::to_string(place.index);
}

View view_of(py::handle object, const Label& label, const Place& place) {
  const bool here = !place.device || place.device->kind == kCpu;
  static const py::handle ndarray = py::type::of(py::array()).release();
  const bool plain = py::type::handle_of(object).is(ndarray);
  if (plain || py::isinstance<py::array>(object)) {
    if (!plain && py::hasattr(object, "mask")) {
      throw py::type_error(label.text() + " must be a plain array, got a masked one");
    }
    if (!here) elsewhere(label, place, "a NumPy array");
    return numpy_view(py::reinterpret_borrow<py::array>(object), label);
  }
  const py::handle tensor = torch_tensor_type();
  View view;
  if (tensor && py::isinstance(object, tensor)) {
    if (here && torch_view(object, label, view)) return view;
    if (py::getattr(object, "is_neg")().cast<bool>()) {  // DLPack would lose the pending negation
      throw py::value_error(label.text() + " must not have its negative bit set, got a lazy view");
    }
  }
  if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    return dlpack_view(object, label, place);
  }
  if (py::hasattr(object, "__cuda_array_interface__")) return interface_view(object, label, place);
  throw py::type_error(label.text() + " must be a NumPy array or a DLPack exporter, got " +
                       py::str(py::type::of(object).attr("__name__")).cast<std::string>());
}

void check_grad_dtype(const Label& label, DType param, DType grad) {
  if (type_pair(param, grad) >= 0) return;
  throw py::type_error(label.text() + " must be " +
                       (param == DType::f32 ? "float32, bfloat16 or float16" : dtype_name(param)) +
                       " for a " + dtype_name(param) + " parameter, got " + dtype_name(grad));
}

std::string Label::text() const {
  return item ? std::string(argument) + "[" + *item + "]" : std::string(argument);
}

std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (ndim == 1 ? ",)" : ")");
}

}  // namespace fusedstep
