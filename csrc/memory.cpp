// The only C++ that knows NumPy and DLPack.
#include "memory.h"

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

// The device type, or 0 for one that DLPack does not know, such as torch's meta.
int dlpack_device(py::handle object) {
  try {
    return py::int_(py::tuple(py::getattr(object, "__dlpack_device__")())[0]);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ValueError) && !error.matches(PyExc_BufferError)) throw;
    return 0;
  }
}

// The capsule of object.__dlpack__(), by the newest protocol the exporter knows.
py::object dlpack_capsule(py::handle object) {
  const py::object method = py::getattr(object, "__dlpack__");
  try {
    return method(py::arg("max_version") = py::make_tuple(1, 0), py::arg("copy") = false);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return method();
}

View dlpack_view(py::handle object, const Label& label) {
  const int type = dlpack_device(object);
  if (type != kCpu && type != kCudaHost && type != kRocmHost) {
    const py::object text =
        py::getattr(object, "device", py::str("type {} of DLPack").format(type));
    throw py::value_error(label.text() + " must be in CPU memory, got device " +
                          py::str(text).cast<std::string>());
  }
  // A torch tensor that takes part in autograd refuses to export; its detached alias does not.
  py::object source = py::reinterpret_borrow<py::object>(object);
  if (py::hasattr(object, "detach")) source = py::getattr(object, "detach")();

  py::object capsule;
  try {
    capsule = dlpack_capsule(source);
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

}  // namespace

View view_of(py::handle object, const Label& label) {
  static const py::handle ndarray = py::type::of(py::array()).release();
  const bool plain = py::type::handle_of(object).is(ndarray);
  if (plain || py::isinstance<py::array>(object)) {
    if (!plain && py::hasattr(object, "mask")) {
      throw py::type_error(label.text() + " must be a plain array, got a masked one");
    }
    return numpy_view(py::reinterpret_borrow<py::array>(object), label);
  }
  const py::handle tensor = torch_tensor_type();
  View view;
  if (tensor && py::isinstance(object, tensor)) {
    if (torch_view(object, label, view)) return view;
    if (py::getattr(object, "is_neg")().cast<bool>()) {  // DLPack would lose the pending negation
      throw py::value_error(label.text() + " must not have its negative bit set, got a lazy view");
    }
  }
  if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    return dlpack_view(object, label);
  }
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
