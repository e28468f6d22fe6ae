// The only C++ that knows NumPy, DLPack and CUDA's array interface.
#include "arrays.h"

#include <pybind11/stl.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "machine/dispatch.h"
#include "step/engine.h"

namespace py = pybind11;

namespace fusedstep {
namespace {

// What check_writable says it got.
constexpr char kReadOnly[] = "a read-only array";
constexpr char kScalar[] = "a NumPy scalar, which is immutable: an array of no dimensions may be";
constexpr char kCopy[] = "an exporter that copies its memory";
constexpr char kUnsaid[] =
    "an array whose library does not say that it may be written: train a copy, numpy.array(x)";

// The address of all that is empty: an exporter may give none, or a new one each time.
char nothing;

[[noreturn]] void wrong_dtype(const Label& label, const std::string& got) {
  std::string known;
  for (int i = 1; i < kArrayFormats; ++i) {
    known += (i == 1                  ? ""
              : i + 1 < kArrayFormats ? ", "
                                      : " or ") +
             std::string(kFormatInfo[i].name);
  }
  throw py::type_error(label.text() + " must be " + known + ", got " + got);
}

[[noreturn]] void not_contiguous(const Label& label) {
  throw py::value_error(label.text() + " must be C-contiguous, got a strided array");
}

void stands_apart(const Label& label, bool* strided) {
  if (!strided) not_contiguous(label);
  *strided = true;
}

int64_t count(const int64_t* shape, int ndim) {
  int64_t n = 1;
  for (int i = 0; i < ndim; ++i) n *= shape[i];
  return n;
}

// Where `n` elements at `data` lie; all that is empty has one address. The first page is never
// anybody's: an address there is an offset from none.
void* memory_at(void* data, int64_t n, const Label& label) {
  if (n == 0) return &nothing;
  if (reinterpret_cast<uintptr_t>(data) >= 4096) return data;
  throw py::value_error(label.text() + " must have memory for its elements, got none");
}

void check_aligned(const void* data, int64_t n, Format format, const Label& label) {
  if (n == 0 || reinterpret_cast<uintptr_t>(data) % format_bytes(format) == 0) return;
  throw py::value_error(label.text() + " must be aligned to its item size, got an unaligned array");
}

// Whether an error says that an exporter cannot, and not that the interpreter wants to stop.
bool is_refusal(const py::error_already_set& error) {
  return error.matches(PyExc_Exception) && !error.matches(PyExc_MemoryError);
}

// The attribute, or null where there is none. Unlike pybind11's, it lets other errors through.
py::object attribute(py::handle object, const char* name) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GetAttrString(object.ptr(), name));
  if (found) return found;
  if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
  PyErr_Clear();
  return found;
}

// A class of a module that is not ours to import: nothing is of it before somebody has done so.
class Imported {
 public:
  Imported(const char* module, const char* name) : module_(module), name_(name) {}

  bool has(py::handle object) { return known() && py::isinstance(object, py::handle(type_)); }

  // Not of a subclass.
  bool is_class_of(py::handle object) {
    return known() && py::type::handle_of(object).ptr() == type_;
  }

 private:
  bool known() {
    if (type_) return true;
    const py::object modules = py::module_::import("sys").attr("modules");
    const py::object module = modules.attr("get")(module_);
    if (module.is_none()) return false;
    type_ = attribute(module, name_).release().ptr();
    return type_;  // not in the middle of its own import
  }

  const char *module_, *name_;
  std::atomic<PyObject*> type_{nullptr};  // several threads may find it at once
};

void check_unmasked(py::handle array, const Label& label) {
  static Imported masked("numpy.ma", "MaskedArray");
  if (masked.has(array)) {
    throw py::type_error(label.text() + " must be a plain array, got a masked one");
  }
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

// NumPy's dtypes are mostly singletons, so a pointer comparison settles the common case; the rest
// (copies, foreign byte order, what is seen first) is looked at by name.
Format numpy_format(const py::array& array, const Label& label) {
  static std::atomic<PyObject*> seen[kArrayFormats];
  const py::handle descr = py::detail::array_proxy(array.ptr())->descr;
  for (int i = 1; i < kArrayFormats; ++i) {
    if (descr.ptr() == seen[i]) return static_cast<Format>(i);
  }
  const auto text = py::str(py::getattr(descr, "name")).cast<std::string>();
  if (!py::getattr(descr, "isnative").cast<bool>()) {
    throw py::value_error(label.text() + " must be in native byte order, got dtype " +
                          py::repr(descr).cast<std::string>());
  }
  for (int i = 1; i < kArrayFormats; ++i) {
    if (text != kFormatInfo[i].name) continue;
    PyObject* nothing = nullptr;
    if (seen[i].compare_exchange_strong(nothing, descr.ptr())) descr.inc_ref();
    return static_cast<Format>(i);
  }
  wrong_dtype(label, text);
}

const int64_t* as_shape(const py::array& array) {
  return reinterpret_cast<const int64_t*>(py::detail::array_proxy(array.ptr())->dimensions);
}

// `strided` is null where elements must follow each other; else it becomes true where they do not.
View numpy_view(const py::array& array, const Label& label, bool* strided) {
  static_assert(sizeof(py::ssize_t) == sizeof(int64_t), "a 64-bit system");
  const auto* proxy = py::detail::array_proxy(array.ptr());
  const Format format = numpy_format(array, label);
  if (!(proxy->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_)) stands_apart(label, strided);
  if (!(proxy->flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_)) {
    throw py::value_error(label.text() +
                          " must be aligned to its item size, got an unaligned array");
  }
  const int64_t* shape = as_shape(array);
  const bool writable = (proxy->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) != 0;
  const int64_t n = count(shape, proxy->nd);
  void* data = memory_at(proxy->data, n, label);
  return {data, format, proxy->nd, shape, n, writable ? nullptr : kReadOnly, array};
}

// DLPack's device type and index; type 0 for one that DLPack does not know, such as torch's meta.
std::pair<int, int> dlpack_device(py::handle object) {
  try {
    const py::tuple device(object.attr("__dlpack_device__")());
    const py::object index = device[1];  // None: Paddle's, of the CPU
    return {py::int_(device[0]), index.is_none() ? 0 : py::int_(index).cast<int>()};
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
  const py::object method = object.attr("__dlpack__");
  py::dict keywords;
  if (place.device && place.device->kind != kCpu) {
    // The exporter lets this stream wait for its own; 1 is the one that CUDA calls 0.
    keywords["stream"] = place.stream ? reinterpret_cast<uintptr_t>(place.stream) : 1;
  }
  try {
    return method(**keywords, py::arg("max_version") = py::make_tuple(1, 0),
                  py::arg("copy") = false);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return method(**keywords);
}

// The classes whose arrays may be written although a version of theirs exports unversioned capsules.
bool is_mutable(py::handle object) {
  static Imported cupy("cupy", "ndarray");
  return is_torch_tensor(object) || cupy.has(object);
}

// Whether `object` shows this memory as writable by a protocol that has a word for it.
bool shows_writable(py::handle object, const void* data) {
  try {
    for (const char* name : {"__array_interface__", "__cuda_array_interface__"}) {
      const py::object shown = attribute(object, name);
      if (!shown) continue;
      const auto [address, read_only] = shown["data"].cast<std::pair<uintptr_t, bool>>();
      return !read_only && reinterpret_cast<void*>(address) == data;
    }
    Py_buffer buffer;
    if (!PyObject_CheckBuffer(object.ptr())) return false;
    if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_FULL) != 0) throw py::error_already_set();
    const bool writable = !buffer.readonly && buffer.buf == data;
    PyBuffer_Release(&buffer);
    return writable;
  } catch (const py::cast_error&) {
    return false;
  } catch (const py::error_already_set& error) {
    if (!is_refusal(error)) throw;
    return false;
  }
}

// An array as DLPack shows it, of any dtype and strides.
struct Exported {
  py::object capsule;  // kept, not consumed: its own destructor gives the memory back
  const DLTensor* tensor;
  char* data;
  const char* fixed;
};

Exported exported(py::handle object, const Label& label, const Place& place) {
  // A torch tensor that takes part in autograd refuses to export; its detached alias does not.
  py::object source = py::reinterpret_borrow<py::object>(object);
  if (const py::object detach = attribute(object, "detach")) source = detach();

  Exported result = {};
  try {
    result.capsule = dlpack_capsule(source, place);
  } catch (py::error_already_set& error) {
    if (!is_refusal(error)) throw;
    py::raise_from(error, PyExc_ValueError,
                   (label.text() + " must be exportable through DLPack, got " +
                    py::str(error.value()).cast<std::string>())
                       .c_str());
    throw py::error_already_set();
  }
  PyObject* capsule = result.capsule.ptr();
  const bool versioned = PyCapsule_IsValid(capsule, "dltensor_versioned");
  if (versioned) {
    const auto* managed =
        static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    if (managed->version.major != 1) {
      throw py::value_error(label.text() + " must export DLPack version 1, got version " +
                            std::to_string(managed->version.major));
    }
    result.tensor = &managed->tensor;
    result.fixed = managed->flags & 1 ? kReadOnly : managed->flags & 2 ? kCopy : nullptr;
  } else if (PyCapsule_IsValid(capsule, "dltensor")) {
    const void* managed = PyCapsule_GetPointer(capsule, "dltensor");
    result.tensor = &static_cast<const DLManagedTensor*>(managed)->tensor;
  } else {
    throw py::type_error(label.text() + " must export a DLPack capsule, got " +
                         py::repr(result.capsule).cast<std::string>());
  }
  const DLTensor& t = *result.tensor;
  result.data = static_cast<char*>(
      memory_at(static_cast<char*>(t.data) + t.byte_offset, count(t.shape, t.ndim), label));
  // An unversioned capsule has no word for read-only: JAX's and TensorFlow's immutable arrays come
  // in one.
  if (!versioned && !is_mutable(object) && !shows_writable(object, result.data)) {
    result.fixed = kUnsaid;
  }
  return result;
}

// Throws unless the storage reaches as far as the tensor, whose elements span `extent`: torch lets
// one be shrunk under it (FSDP frees memory so), and then shows an address of nothing.
void check_storage(py::handle tensor, int64_t extent, int64_t item_bytes, const Label& label) {
  if (extent == 0) return;
  const auto first = tensor.attr("storage_offset")().cast<int64_t>();
  const auto bytes = tensor.attr("untyped_storage")().attr("nbytes")().cast<int64_t>();
  const int64_t needed = (first + extent) * item_bytes;
  if (bytes >= needed) return;
  throw py::value_error(label.text() + " must have memory for its elements, got a storage of " +
                        std::to_string(bytes) + " bytes where they need " + std::to_string(needed));
}

// DLPack would lose the negation that is pending in a lazy view of torch's.
void check_settled(py::handle tensor, const Label& label) {
  if (!tensor.attr("is_neg")().cast<bool>()) return;
  throw py::value_error(label.text() + " must not have its negative bit set, got a lazy view");
}

void check_place(py::handle object, const Label& label, const Place& place) {
  const py::object deleted = attribute(object, "is_deleted");  // JAX's
  if (deleted && PyCallable_Check(deleted.ptr()) && py::bool_(deleted())) {
    throw py::value_error(label.text() + " must have memory for its elements, got a deleted array");
  }
  const auto [type, index] = dlpack_device(object);
  if (is_in(place, type, index)) return;
  if (type == 0 && attribute(object, "sharding")) elsewhere(label, place, "a sharded array");
  py::object text = attribute(object, "device");
  if (!text) text = py::str("type {} of DLPack").format(type);
  elsewhere(label, place, "device " + py::str(text).cast<std::string>());
}

std::string dtype_text(py::handle object) {
  const py::object dtype = attribute(object, "dtype");
  return dtype ? py::str(dtype).cast<std::string>() : "another type";
}

View dlpack_view(py::handle object, const Label& label, const Place& place, bool* strided) {
  check_place(object, label, place);
  const Exported seen = exported(object, label, place);
  const DLTensor& t = *seen.tensor;
  Format format;
  if (!dlpack_format(t, format)) wrong_dtype(label, dtype_text(object));
  if (!c_contiguous(t)) stands_apart(label, strided);
  const int64_t n = count(t.shape, t.ndim);
  check_aligned(seen.data, n, format, label);
  return {seen.data, format, t.ndim, t.shape, n, seen.fixed, seen.capsule};
}

// A tensor as the NumPy array that torch makes of it, several times faster than through DLPack.
// False for what torch cannot show so: bfloat16, which DLPack can, and what DLPack refuses too.
bool torch_view(py::handle tensor, const Label& label, View& view, bool* strided) {
  static const py::handle bf16 =
      py::object(py::module_::import("torch").attr("bfloat16")).release();
  if (py::object(tensor.attr("dtype")).is(bf16)) return false;  // an error of torch's is slow
  py::object array;
  try {
    array = tensor.attr("detach")().attr("numpy")();
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_RuntimeError)) throw;
    return false;
  }
  view = numpy_view(py::reinterpret_borrow<py::array>(array), label, strided);
  return true;
}

bool is_numpy_scalar(py::handle object) {
  static const py::handle generic =
      py::object(py::module_::import("numpy").attr("generic")).release();
  return py::isinstance(object, generic);
}

// Whether it is one real number of Python's or NumPy's, of whatever width; no truth value.
bool is_number(py::handle object) {
  static const py::handle kinds = [] {
    const py::module_ numpy = py::module_::import("numpy");
    return py::make_tuple(numpy.attr("floating"), numpy.attr("integer")).release();
  }();
  if (PyFloat_CheckExact(object.ptr()) || PyLong_CheckExact(object.ptr())) return true;
  return is_numpy_scalar(object) && py::isinstance(object, kinds);
}

[[noreturn]] void not_an_array(py::handle object, const Label& label) {
  throw py::type_error(label.text() + " must be a NumPy array or a DLPack exporter, got " +
                       py::str(py::type::of(object).attr("__name__")).cast<std::string>());
}

// NumPy's letter for a dtype code of DLPack's; null for one that it has no type for. Bfloat16 is
// shown by its bits.
const char* numpy_kind(int code) {
  switch (code) {
    case kInt:
      return "i";
    case kUnsigned:
    case kBfloat:
      return "u";
    case kFloat:
      return "f";
    case kComplex:
      return "c";
    case kBool:
      return "b";
    default:
      return nullptr;
  }
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
  const py::object shown = object.attr("__cuda_array_interface__");
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
    if (!is_refusal(error)) throw;
    wrong(shown);
  }
  if (strided && strides.size() != shape.size()) wrong(shown);
  if (!mask.is_none())
    throw py::type_error(label.text() + " must be a plain array, got a masked one");
  auto* data = reinterpret_cast<void*>(address);
  View view = {};
  for (int i = 1; i < kArrayFormats; ++i) {
    const FormatInfo& info = kFormatInfo[i];
    const bool real = info.dlpack_code == kFloat;
    if (real && typestr == "<f" + std::to_string(info.bytes)) view.format = static_cast<Format>(i);
  }
  if (view.format == Format::kNone) wrong_dtype(label, typestr);
  // Owns the shape, and holds on to the array.
  struct Held {
    std::vector<int64_t> shape;
    py::object array;
  };
  auto held = std::make_unique<Held>(Held{shape, py::reinterpret_borrow<py::object>(object)});
  view.ndim = static_cast<int>(shape.size());
  view.shape = held->shape.data();
  view.n = count(view.shape, view.ndim);
  int64_t expected = format_bytes(view.format);
  for (int i = view.ndim - 1; strided && view.n > 0 && i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != expected) not_contiguous(label);
    expected *= shape[i];
  }
  view.fixed = read_only ? kReadOnly : nullptr;
  if (!place.device) elsewhere(label, place, "a GPU's memory");
  check_aligned(data, view.n, view.format, label);
  view.data = memory_at(data, view.n, label);
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

void look_up_once() {
  view_of(py::array_t<float>(0), Label{"array"});
  is_number(py::float_(0.0));
}

std::string place_text(const Place& place) {
  if (!place.device) return "CPU memory";
  return "cuda:" + std::to_string(place.index);
}

View view_of(py::handle object, const Label& label, const Place& place, bool* strided) {
  const bool here = !place.device || place.device->kind == kCpu;
  static const py::handle ndarray = py::type::of(py::array()).release();
  const bool plain = py::type::handle_of(object).is(ndarray);
  if (plain || py::isinstance<py::array>(object)) {
    if (!plain) check_unmasked(object, label);
    if (!here) elsewhere(label, place, "a NumPy array");
    return numpy_view(py::reinterpret_borrow<py::array>(object), label, strided);
  }
  if (is_torch_tensor(object)) {
    View view;
    if (!here || !torch_view(object, label, view, strided)) {
      check_settled(object, label);
      view = dlpack_view(object, label, place, strided);
    }
    check_storage(object, view.n, format_bytes(view.format), label);
    return view;
  }
  if (is_numpy_scalar(object)) {
    if (!here) elsewhere(label, place, "a NumPy scalar");
    View view = numpy_view(py::array(py::reinterpret_borrow<py::object>(object)), label, nullptr);
    view.fixed = kScalar;
    return view;
  }
  if (attribute(object, "__dlpack__") && attribute(object, "__dlpack_device__")) {
    return dlpack_view(object, label, place, strided);
  }
  if (attribute(object, "__cuda_array_interface__")) return interface_view(object, label, place);
  not_an_array(object, label);
}

View memory_of(py::handle object, const Label& label, const Place& place, int64_t n, int bytes) {
  View view = {nullptr, Format::kNone, 1, nullptr, n, nullptr, {}};
  int64_t found = 0, item = 0;
  if (place.device && attribute(object, "__cuda_array_interface__")) {  // of the optimizer's own
    const py::object shown = object.attr("__cuda_array_interface__");
    view.data = reinterpret_cast<void*>(shown["data"].cast<std::pair<uintptr_t, bool>>().first);
    item = std::stoi(shown["typestr"].cast<std::string>().substr(2));
    found = object.attr("size").cast<int64_t>();
    view.owner = py::reinterpret_borrow<py::object>(object);
  } else {
    if (place.device && place.device->kind != kCpu) elsewhere(label, place, "a NumPy array");
    py::array array = array_of(object, label.text()).first;
    if (!(array.flags() & py::array::c_style)) not_contiguous(label);
    if (!array.writeable()) view.fixed = kReadOnly;
    item = array.itemsize();
    found = array.size();
    view.data = const_cast<void*>(array.data());
    view.owner = std::move(array);
  }
  if (found != n || item != bytes) {
    throw py::value_error(label.text() + " must have " + std::to_string(n) + " elements of " +
                          std::to_string(bytes) + " bytes, got " + std::to_string(found) + " of " +
                          std::to_string(item));
  }
  view.data = memory_at(view.data, n, label);
  return view;
}

View grad_of(py::handle object, const Label& label, const Place& place, const View& param) {
  if (param.ndim > 0 || !is_number(object)) {
    bool strided = false;
    const bool here = !place.device || place.device->kind == kCpu;
    View view = view_of(object, label, place, here ? &strided : nullptr);
    if (!strided) return view;
    py::array copy = array_of(object, label.text()).first.attr("copy")("C");
    return {copy.mutable_data(), view.format, view.ndim, as_shape(copy), view.n, nullptr, copy};
  }
  if (place.device && place.device->kind != kCpu) elsewhere(label, place, "a number");
  const double value = PyFloat_AsDouble(object.ptr());
  if (PyErr_Occurred()) {  // an integer beyond all doubles
    PyErr_Clear();
    throw py::value_error(label.text() + " must fit in " + format_name(param.format) + ", got " +
                          py::repr(object).cast<std::string>());
  }
  // NumPy rounds it, in the way it rounds a number that meets an array; but has no bfloat16.
  const bool bf16 = param.format == Format::kBf16;
  const char* type = bf16 ? "float32" : format_name(param.format);
  py::array array = py::module_::import("numpy").attr("asarray")(value, type);
  if (bf16) {
    const auto rounded = py::array_t<uint16_t>(std::vector<py::ssize_t>{});
    const Stream stream = {const_cast<uint16_t*>(rounded.data()), param.format};
    const float row[kBlock] = {
        *static_cast<const float*>(array.data())};  // read by whole registers
    kernels().codec[static_cast<int>(param.format)][0].encode(stream, kGrad, 0, 0, 1, row, 0);
    array = rounded;
  }
  return {array.mutable_data(), param.format, 0, nullptr, 1, nullptr, array};
}

void check_writable(const View& view, const Label& label) {
  if (view.fixed == kScalar)
    throw py::type_error(label.text() + " must be an array, got " + kScalar);
  if (view.fixed) throw py::value_error(label.text() + " must be writable, got " + view.fixed);
}

std::pair<py::array, bool> array_of(py::handle object, const std::string& name) {
  const Label label{name.c_str()};
  if (py::isinstance<py::array>(object)) {
    check_unmasked(object, label);
    return {py::reinterpret_borrow<py::array>(object), false};
  }
  if (is_numpy_scalar(object)) {
    auto array = py::array(py::reinterpret_borrow<py::object>(object));
    array.attr("flags").attr("writeable") = false;
    return {array, false};
  }
  if (!attribute(object, "__dlpack__") || !attribute(object, "__dlpack_device__")) {
    not_an_array(object, label);
  }
  const bool torch = is_torch_tensor(object);
  if (torch) check_settled(object, label);
  check_place(object, label, {});
  const Exported seen = exported(object, label, {});
  const DLTensor& t = *seen.tensor;
  const char* kind = t.dtype.lanes == 1 ? numpy_kind(t.dtype.code) : nullptr;
  if (!kind || t.dtype.bits % 8) wrong_dtype(label, dtype_text(object));
  const int64_t item = t.dtype.bits / 8;
  const bool bf16 = t.dtype.code == kBfloat;
  const std::vector<py::ssize_t> shape(t.shape, t.shape + t.ndim);
  std::vector<py::ssize_t> strides(t.ndim);
  int64_t extent = 1, dense = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    const int64_t stride = t.strides ? t.strides[i] : dense;
    strides[i] = stride * item;
    extent = shape[i] && extent ? extent + (shape[i] - 1) * stride : 0;
    dense *= shape[i];
  }
  if (torch) check_storage(object, extent, item, label);
  py::array array(py::dtype(kind + std::to_string(item)), shape, strides, seen.data, seen.capsule);
  if (seen.fixed) array.attr("flags").attr("writeable") = false;
  return {array, bf16};
}

uintptr_t address_of(py::handle object) {
  const Label label{"params"};
  const void* data = object.ptr();  // a scalar is in nobody's memory but its own
  if (py::isinstance<py::array>(object)) {
    const auto array = py::reinterpret_borrow<py::array>(object);
    data = array.size() ? array.data() : &nothing;
  } else if (attribute(object, "__dlpack__")) {
    data = exported(object, label, {}).data;
  } else if (const py::object shown = attribute(object, "__cuda_array_interface__")) {
    return shown["data"].cast<std::pair<uintptr_t, bool>>().first;
  }
  return reinterpret_cast<uintptr_t>(data);
}

bool is_torch_tensor(py::handle object) {
  static Imported tensor("torch", "Tensor");
  return tensor.has(object);
}

bool is_versioned(py::handle object) {
  static Imported paddle("paddle", "Tensor");
  return is_torch_tensor(object) || paddle.has(object);
}

bool is_plain_tensor(py::handle object) {
  static Imported tensor("torch", "Tensor"), parameter("torch.nn", "Parameter");
  return tensor.is_class_of(object) || parameter.is_class_of(object);
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
