// Through the C functions of DLPack's exchange table, or torch's attributes where there is none.
#include "tensor_reader.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

#include "python/arrays.h"
#include "step/engine.h"

namespace py = pybind11;

namespace fusedstep {
namespace {

char nothing;  // the address of all that is empty

// torch's complex dtypes: two numbers of a format each.
struct Complex {
  const char* name;
  Format format;
};
constexpr Complex kComplexes[] = {{"complex64", Format::kF32}, {"complex128", Format::kF64}};

// Those in which halves of numbers and codes are kept.
struct Integer {
  const char* name;
  int code, bytes;
};
constexpr Integer kIntegers[] = {{"int16", kInt, 2}, {"uint8", kUnsigned, 1}};

bool known_dtype(const DLTensor& t, TensorView& view) {
  view.reals = 1;
  view.integer = 0;
  if (dlpack_format(t, view.format)) return true;
  if (t.dtype.lanes != 1) return false;
  for (const Integer& integer : kIntegers) {
    if (t.dtype.code != integer.code || t.dtype.bits != 8 * integer.bytes) continue;
    view.format = Format::kNone;
    view.integer = integer.bytes;
    return true;
  }
  if (t.dtype.code != kComplex) return false;
  view.reals = 2;
  for (const Complex& complex : kComplexes) {
    view.format = complex.format;
    if (t.dtype.bits == 16 * format_bytes(complex.format)) return true;
  }
  return false;
}

}  // namespace

int64_t element_bytes(const TensorView& view) {
  return view.integer ? view.integer : view.reals * format_bytes(view.format);
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

bool same_strides(const TensorView& a, const TensorView& b) {
  if (!same_shape(a, b)) return false;
  if (a.n <= a.reals) return true;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != 1 && a.strides[i] != b.strides[i]) return false;
  }
  return true;
}

bool contiguous(const TensorView& view) {
  if (view.n <= view.reals) return true;
  int64_t expected = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] != 1 && view.strides[i] != expected) return false;
    expected *= view.shape[i];
  }
  return true;
}

bool dense(const TensorView& view) {
  if (contiguous(view)) return true;  // as nearly all are
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] != 1) dims.emplace_back(view.strides[i], view.shape[i]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

TensorReader::TensorReader(bool exchange) {
  const py::object torch = py::module_::import("torch");
  tensor_ = torch.attr("Tensor");
  parameter_ = torch.attr("nn").attr("Parameter");
  strided_ = torch.attr("strided");
  for (int i = 1; i < kArrayFormats; ++i) dtypes_.append(torch.attr(kFormatInfo[i].name));
  for (const Complex& complex : kComplexes) dtypes_.append(torch.attr(complex.name));
  for (const Integer& integer : kIntegers) dtypes_.append(torch.attr(integer.name));
  // Both stay with their class, which the members above keep.
  const py::object is_neg = tensor_.attr("is_neg"), grad = tensor_.attr("grad");
  if (Py_TYPE(is_neg.ptr()) == &PyMethodDescr_Type) {
    const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(is_neg.ptr())->d_method;
    if (method->ml_flags == METH_NOARGS) is_neg_ = method->ml_meth;
  }
  if (Py_TYPE(grad.ptr()) == &PyGetSetDescr_Type) {
    grad_ = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
  }
  if (!exchange) return;
  const py::object capsule = py::getattr(tensor_, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
  const auto* api = static_cast<const DLPackExchangeAPI*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->version.major != 1 || !api->view) return;
  api_ = api;
  use_count_ = py::getattr(torch.attr("_C"), "_storage_Use_Count", py::none());
  if (!use_count_.is_none()) alone_ = owners(torch.attr("empty")(1, py::arg("device") = "cpu"));
}

bool TensorReader::is_tensor(py::handle object) const {
  return object && (ordinary(object) || py::isinstance(object, tensor_));
}

bool TensorReader::read(py::handle tensor, TensorView& view, const Place& place) const {
  if (!ordinary(tensor)) return false;
  if (!api_) return read_attributes(tensor, view, place);
  DLTensor t;
  if (api_->view(tensor.ptr(), &t) != 0) {
    PyErr_Clear();  // the caller says what is wrong with a tensor that has no memory
    return false;
  }
  const int kind = place.device ? place.device->kind : kCpu;
  if (t.device.type != kind || (kind != kCpu && t.device.id != place.index)) return false;
  if (!known_dtype(t, view)) return false;
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.ndim = t.ndim;
  view.shape = t.shape;
  view.strides = t.strides;
  return finish(tensor, view);
}

bool TensorReader::read_attributes(py::handle tensor, TensorView& view, const Place& place) const {
  if (!py::getattr(tensor, "layout").is(strided_)) return false;
  const std::string text = place.device && place.device->kind != kCpu ? place_text(place) : "cpu";
  if (py::str(py::getattr(tensor, "device")).cast<std::string>() != text) return false;
  const py::object dtype = py::getattr(tensor, "dtype");
  size_t k = 0;  // the formats, but for none of them, then kComplexes and kIntegers
  while (k < dtypes_.size() && !py::object(dtypes_[k]).is(dtype)) ++k;
  if (k == dtypes_.size()) return false;
  const auto shape = py::getattr(tensor, "shape").cast<std::vector<int64_t>>();
  const auto strides = py::getattr(tensor, "stride")().cast<std::vector<int64_t>>();
  const size_t complex = kArrayFormats - 1, integer = complex + std::size(kComplexes);
  view.reals = k < complex || k >= integer ? 1 : 2;
  view.integer = k < integer ? 0 : kIntegers[k - integer].bytes;
  view.format = k < complex   ? static_cast<Format>(k + 1)
                : k < integer ? kComplexes[k - complex].format
                              : Format::kNone;
  view.data = reinterpret_cast<void*>(py::getattr(tensor, "data_ptr")().cast<uintptr_t>());
  view.held = shape;
  view.held.insert(view.held.end(), strides.begin(), strides.end());
  view.held.push_back(0);  // never empty: a copy's address says nothing of the tensor
  view.ndim = static_cast<int>(shape.size());
  view.shape = view.held.data();
  view.strides = view.held.data() + view.ndim;
  return finish(tensor, view);
}

// False for a tensor whose storage was taken away. Its address is then null, or the tensor's offset
// in the storage: as few addresses are as low as an offset, few tensors are asked for theirs.
bool TensorReader::finish(py::handle tensor, TensorView& view) const {
  static const py::handle storage_offset = py::str("storage_offset").release();
  constexpr uintptr_t kLow = uintptr_t{1} << 32;
  view.n = view.reals;
  for (int i = 0; i < view.ndim; ++i) view.n *= view.shape[i];
  if (view.n == 0) view.data = &nothing;
  const auto at = reinterpret_cast<uintptr_t>(view.data);
  if (view.n == 0 || at >= kLow) return true;
  const auto offset = py::getattr(tensor, storage_offset)().cast<int64_t>();
  return at != static_cast<uintptr_t>(offset * element_bytes(view));
}

bool TensorReader::holds(py::handle tensor, const TensorView& view) const {
  static const py::handle storage_offset = py::str("storage_offset").release();
  static const py::handle untyped_storage = py::str("untyped_storage").release();
  static const py::handle nbytes = py::str("nbytes").release();
  const auto ask = [](py::handle object, py::handle method) {
    auto answer =
        py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), method.ptr()));
    if (!answer) throw py::error_already_set();
    return answer;
  };
  if (view.n == 0) return true;
  auto end = ask(tensor, storage_offset).cast<int64_t>() + 1;
  for (int i = 0; i < view.ndim; ++i) end += (view.shape[i] - 1) * view.strides[i];
  return ask(ask(tensor, untyped_storage), nbytes).cast<int64_t>() >= end * element_bytes(view);
}

py::object TensorReader::storage_of(py::handle tensor) const {
  static const py::handle untyped_storage = py::str("untyped_storage").release();
  auto storage = py::reinterpret_steal<py::object>(
      PyObject_CallMethodNoArgs(tensor.ptr(), untyped_storage.ptr()));
  if (!storage) throw py::error_already_set();
  return storage;
}

// torch's object begins with its functions' address, and then has those of its storage, autograd's
// data and its version, between others; which are where is not ours to know, nor matters.
void TensorReader::add_lines(py::handle tensor, Lines& lines) const {
  constexpr size_t kObject = 32, kTensor = 192, kOther = 64;  // bytes, about
  const auto at = tensor.attr("_cdata").cast<uintptr_t>();
  lines.add(reinterpret_cast<uintptr_t>(tensor.ptr()), kObject);
  lines.add(at, kTensor);
  uintptr_t words[8];
  std::memcpy(words, reinterpret_cast<const void*>(at), sizeof(words));
  for (const uintptr_t* word = words + 1; word != std::end(words); ++word) {
    const bool address = *word % alignof(void*) == 0 && *word >> 20 && !(*word >> 47);
    if (address) lines.add(*word, kOther);
  }
}

TensorReader::Owners TensorReader::owners(py::handle tensor) const {
  const py::object storage = storage_of(tensor);
  const bool watched = PyType_SUPPORTS_WEAKREFS(Py_TYPE(storage.ptr())) &&
                       *PyObject_GET_WEAKREFS_LISTPTR(storage.ptr()) != nullptr;
  return {use_count_(storage.attr("_cdata")).cast<int64_t>(), Py_REFCNT(storage.ptr()) + watched};
}

bool TensorReader::referred_once(py::handle object) {
  return Py_REFCNT(object.ptr()) == 1 && (!PyType_SUPPORTS_WEAKREFS(Py_TYPE(object.ptr())) ||
                                          !*PyObject_GET_WEAKREFS_LISTPTR(object.ptr()));
}

bool TensorReader::alone(py::handle tensor) const {
  return ordinary(tensor) && referred_once(tensor) && owners(tensor) == alone_;
}

const void* TensorReader::address(py::handle tensor) const {
  static const py::handle data_ptr = py::str("data_ptr").release();
  DLTensor t;
  if (api_) {
    if (api_->view(tensor.ptr(), &t) == 0) return static_cast<char*>(t.data) + t.byte_offset;
  } else if (ordinary(tensor)) {
    const auto at =
        py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr.ptr()));
    if (at) return reinterpret_cast<void*>(at.cast<uintptr_t>());
  }
  PyErr_Clear();
  return nullptr;
}

bool TensorReader::lazy(py::handle tensor, const TensorView& view) const {
  static const py::handle is_neg = py::str("is_neg").release();
  static const py::handle is_conj = py::str("is_conj").release();
  const auto answer = py::reinterpret_steal<py::object>(
      is_neg_ && ordinary(tensor) ? is_neg_(tensor.ptr(), nullptr)
                                  : PyObject_CallMethodNoArgs(tensor.ptr(), is_neg.ptr()));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True ||
         (view.reals == 2 && py::getattr(tensor, is_conj)().cast<bool>());
}

py::object TensorReader::grad(py::handle tensor) const {
  static const py::handle name = py::str("grad").release();
  auto grad = py::reinterpret_steal<py::object>(grad_ && ordinary(tensor)
                                                    ? grad_->get(tensor.ptr(), grad_->closure)
                                                    : PyObject_GetAttr(tensor.ptr(), name.ptr()));
  if (!grad) throw py::error_already_set();
  return grad;
}

void TensorReader::drop_grad(py::handle tensor) const {
  const int failed = grad_ && grad_->set && ordinary(tensor)
                         ? grad_->set(tensor.ptr(), Py_None, grad_->closure)
                         : PyObject_SetAttrString(tensor.ptr(), "grad", Py_None);
  if (failed) throw py::error_already_set();
}

}  // namespace fusedstep
