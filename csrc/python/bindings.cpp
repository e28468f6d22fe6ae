// fusedstep._core: a table of contents. What each entry does is said where it is defined.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <exception>
#include <future>
#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "array_table.h"
#include "arrays.h"
#include "files/digest.h"
#include "locked.h"
#include "machine/dispatch.h"
#include "machine/float_mode.h"
#include "machine/pages.h"
#include "machine/parallel.h"
#include "rules/power.h"
#include "step/engine.h"
#include "step/rules.h"
#include "step/stages.h"
#include "storage.h"
#include "torch/tensor_table.h"
#include "turn.h"
#include "unlocked.h"

namespace py = pybind11;
using namespace fusedstep;

namespace {

// Zeroed bytes as an array that owns its pages.
py::array allocate(size_t bytes, bool huge) {
  auto pages = std::make_unique<Pages>(bytes, huge);
  const py::capsule owner(pages.get(), [](void* p) { delete static_cast<Pages*>(p); });
  auto* data = static_cast<uint8_t*>(pages.release()->data());
  return py::array_t<uint8_t>({bytes}, {1}, data, owner);
}

// The digests of a contiguous buffer's pieces of `size` bytes, of which the last may be shorter.
std::vector<uint64_t> digests(const py::buffer& buffer, int64_t size) {
  const py::buffer_info info = buffer.request();
  const int64_t n = info.size * info.itemsize;
  const auto* bytes = static_cast<const uint8_t*>(info.ptr);
  if (info.ndim != 1 || info.strides[0] != info.itemsize) {
    throw py::value_error("buffer must be contiguous and of one dimension");
  }
  if (size < 1) throw py::value_error("size must be >= 1, got " + std::to_string(size));
  std::vector<uint64_t> result((n + size - 1) / size);
  const Unlocked unlocked;
  parallel_for(static_cast<int64_t>(result.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      result[i] = digest(bytes + i * size, std::min(size, n - i * size));
    }
  });
  return result;
}

// Copies a contiguous buffer into another, and digests the copy, while Python goes on: who writes to
// the first meanwhile changes nothing in between. Not by a thread of Python's: its start() waits
// without end for one that found no memory as it began.
class Digesting {
 public:
  Digesting(const py::buffer& source, const py::buffer& copy)
      : source_(source.request()), copy_(copy.request(true)) {
    const auto bytes = [](const py::buffer_info& info) {
      return info.ndim == 1 && info.strides[0] == info.itemsize ? info.size * info.itemsize : -1;
    };
    const int64_t n = bytes(source_);
    if (n < 0 || bytes(copy_) != n) {
      throw py::value_error("source and copy must be contiguous, of one dimension and one size");
    }
    digest_ = elsewhere([this, n] {
      return digest(static_cast<const uint8_t*>(source_.ptr), n, static_cast<uint8_t*>(copy_.ptr));
    });
  }
  Digesting(const Digesting&) = delete;
  Digesting& operator=(const Digesting&) = delete;

  uint64_t result() {
    const Unlocked unlocked;
    return digest_.get();
  }

 private:
  py::buffer_info source_, copy_;  // outlive the digest, whose end its destructor awaits
  std::future<uint64_t> digest_;
};

using Doubles = py::array_t<double, py::array::c_style>;

// The rule of a name, for which there are as many hyperparameters.
const Rule& rule_for(const std::string& name, const std::vector<double>& hypers) {
  const Rule& rule = rules()[rule_number(name)];
  if (hypers.size() != rule.hypers.size()) {
    throw py::value_error("hypers must have " + std::to_string(rule.hypers.size()) +
                          " entries, got " + std::to_string(hypers.size()));
  }
  return rule;
}

// What update number t divided each element by, from the arrays of its states or None.
Doubles divisors(const std::string& name, const std::vector<double>& hypers, int64_t t,
                 const std::vector<std::optional<Doubles>>& states) {
  const Rule& rule = rule_for(name, hypers);
  if (!rule.divisors[0]) throw py::value_error("rule must be one that divides, got " + name);
  if (states.size() != rule.states.size()) {
    throw py::value_error("states must have " + std::to_string(rule.states.size()) +
                          " entries, got " + std::to_string(states.size()));
  }
  const StateMask mask = rule.mask_of(hypers.data());
  const Doubles* first = nullptr;
  std::vector<const double*> data;
  for (size_t s = 0; s < states.size(); ++s) {
    const auto& state = states[s];
    if (!state && mask >> s & 1) throw py::value_error("states must have " + rule.states[s]);
    if (state && first && state->size() != first->size()) {
      throw py::value_error("states must have one size");
    }
    if (state && !first) first = &*state;
    data.push_back(state ? state->data() : nullptr);
  }
  if (!first) throw py::value_error("states must have one array at least");
  Doubles result(std::vector<py::ssize_t>(first->shape(), first->shape() + first->ndim()));
  divisors(rule, hypers.data(), t, data.data(), first->size(), result.mutable_data());
  return result;
}

// The states that a rule has under these hyperparameters.
std::vector<bool> mask_of(const std::string& name, const std::vector<double>& hypers) {
  const Rule& rule = rule_for(name, hypers);
  const StateMask mask = rule.mask_of(hypers.data());
  std::vector<bool> used;
  for (size_t s = 0; s < rule.states.size(); ++s) used.push_back(mask >> s & 1);
  return used;
}

// Those of its states that no narrower format may hold, and why.
std::pair<std::vector<bool>, std::string> exact_of(const std::string& name,
                                                   const std::vector<double>& hypers) {
  const Rule& rule = rule_for(name, hypers);
  const StateMask mask = rule.exact(hypers.data());
  std::vector<bool> exact;
  for (size_t s = 0; s < rule.states.size(); ++s) exact.push_back(mask >> s & 1);
  return {exact, rule.why_exact ? rule.why_exact : ""};
}

// (array, format, what lies beside it or None) of n elements, of any dtype of that width. The arrays
// outlive it.
Stream stream_of(const py::tuple& given, int64_t n, int64_t entries, bool writes) {
  const auto data = [&](const py::object& object, int64_t items, int bytes) {
    const auto array = py::array::ensure(object);
    const bool fits = array && array.nbytes() == items * bytes &&
                      (array.flags() & py::array::c_style) && (!writes || array.writeable());
    if (fits) return const_cast<void*>(array.data());
    throw py::value_error("array must be C-contiguous, of " + std::to_string(items) +
                          " elements of " + std::to_string(bytes) + " bytes" +
                          (writes ? ", and writable" : ""));
  };
  Stream stream;
  stream.format = format_of(given[1].cast<std::string>());
  const FormatInfo& info = kFormatInfo[static_cast<int>(stream.format)];
  stream.data = data(given[0], n, info.bytes);
  if (info.block > 0) {
    stream.beside = data(given[2], info.block > 1 ? entries : n, info.beside);
  }
  return stream;
}

// Writes the numbers of one such array into another, rounded to nearest. `first` is the first one's
// place in its parameter.
void convert_arrays(const py::tuple& source, const py::tuple& target, int64_t first) {
  Segment segment;
  segment.n = py::array::ensure(source[0]).size();
  segment.first = first;
  const int64_t n = segment.n, entries = beside_entries(segment, Format::kQ8);
  const Stream from = stream_of(source, n, entries, false),
               to = stream_of(target, n, entries, true);
  const Unlocked unlocked;
  const FloatMode mode;
  convert(from, to, 0, n, first);
}

// (sum, finite) over the arrays as tensors, in their order.
std::pair<double, bool> sum_of_squares(const py::sequence& grads) {
  const py::tuple fixed(grads);  // the caller's list could change while an exporter runs Python
  std::vector<py::object> owners;
  std::vector<Segment> segments(fixed.size());
  for (size_t i = 0; i < fixed.size(); ++i) {
    const std::string item = std::to_string(i);
    View view = view_of(fixed[i], Label{"grads", &item});
    segments[i].stream[kParam] = segments[i].stream[kGrad] = {view.data, view.format};
    segments[i].n = view.n;
    owners.push_back(std::move(view.owner));
  }
  const Unlocked unlocked;
  const FloatMode mode;
  const Squared squared = measure(segments).all;
  return {squared.sum, squared.finite};
}

// f(*args) while the thread holds the turn. Plain C, as each step comes through here: pybind11 would
// take longer than a small step's checks.
template <Turn::Kind kKind>
PyObject* held(PyObject* self, PyObject* const* args, Py_ssize_t n) {
  auto* turn = static_cast<Turn*>(PyCapsule_GetPointer(self, nullptr));
  if (!turn) return nullptr;
  if (n < 1) return PyErr_Format(PyExc_TypeError, "call must be given");
  try {
    const Turn::Holder holder(*turn, kKind, "step and load_state_dict");
    return PyObject_Vectorcall(args[0], args + 1, n - 1, nullptr);
  } catch (const std::runtime_error& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// (run, read) of a new turn: f, *args -> f(*args), alone or reading.
py::tuple turn() {
  const auto method = [](const char* name, auto* function) {
    return PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
                       METH_FASTCALL, nullptr};
  };
  static PyMethodDef run = method("run", held<Turn::kAlone>);
  static PyMethodDef read = method("read", held<Turn::kReading>);
  const py::capsule self(new Turn, [](void* turn) { delete static_cast<Turn*>(turn); });
  return py::make_tuple(py::reinterpret_steal<py::object>(PyCFunction_New(&run, self.ptr())),
                        py::reinterpret_steal<py::object>(PyCFunction_New(&read, self.ptr())));
}

// Lets Python's garbage collector look into objects of a class, once they are constructed.
template <class T>
void collected(PyHeapTypeObject* heap_type) {
  static const auto of = [](PyObject* self) -> T* {
    auto* instance = reinterpret_cast<py::detail::instance*>(self);
    const auto held = instance->get_value_and_holder();
    return held.holder_constructed() ? held.template value_ptr<T>() : nullptr;
  };
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const T* object = of(self);
    return object ? object->traverse(visit, arg) : 0;
  };
  type.tp_clear = [](PyObject* self) {
    if (T* object = of(self)) object->clear();
    return 0;
  };
}

// Cold, with what only it calls: it runs once, and is a hundredth of the wheel smaller so.
[[gnu::cold]] void define_all(py::module_& m) {
  m.doc() = "The compiled core of fusedstep. Not public: use the package.";

  // pybind11 wants a function that takes it by value. NOLINTNEXTLINE(performance-unnecessary-value-param)
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const std::bad_alloc&) {  // whose own words name a class of C++
      PyErr_SetString(
          PyExc_MemoryError,
          "params and what is kept of each must fit in memory, got none from the system");
    }
  });

  m.attr("COMPILER") = FUSEDSTEP_COMPILER;
  m.def("compiled_isas", compiled_isas);
  m.def("usable_isas", usable_isas);
  m.def("isa", isa);
  m.def("lanes", [] { return kernels().lanes; });
  m.def("set_isa", set_isa, py::arg("name"));

  start_pool();
  m.attr("MAX_THREADS") = kMaxThreads;
  m.def("num_threads", num_threads);
  m.def("set_num_threads", set_num_threads, py::arg("n"));
  m.def("default_threads", default_threads);
  m.def("take_threads_used", take_threads_used);
  m.def("cpu_quota", cpu_quota, py::arg("membership"), py::arg("root"));

  m.attr("ALIGNMENT") = kAlignment;
  m.attr("HUGE_FROM") = kHugeFrom;
  m.def("allocate", allocate, py::arg("nbytes"), py::arg("huge"));

  m.def("power", py::overload_cast<double, int64_t>(power), py::arg("base"), py::arg("n"));
  m.def("power", py::overload_cast<double, double>(power), py::arg("base"), py::arg("y"));
  m.def("power", py::vectorize(py::overload_cast<double, double>(power)), py::arg("base"),
        py::arg("y"));
  m.def("power", py::vectorize(py::overload_cast<double, int64_t>(power)), py::arg("base"),
        py::arg("n"));
  m.def("cospi", cospi, py::arg("x"));
  m.def("cospi", py::vectorize(cospi), py::arg("x"));

  m.def("formats", [] {
    py::dict all;  // bytes by name
    for (int i = 1; i < kArrayFormats; ++i) all[kFormatInfo[i].name] = kFormatInfo[i].bytes;
    return all;
  });
  m.def("stream_formats", [] {
    std::vector<std::string> all;  // in the order of their numbers
    for (const FormatInfo& info : kFormatInfo) all.emplace_back(info.name);
    return all;
  });
  m.def("blocks", [] {
    py::dict all;  // elements that share an entry beside them, by the format's name
    for (const FormatInfo& info : kFormatInfo) {
      if (info.block > 0) all[info.name] = info.block;
    }
    return all;
  });
  m.def("convert", convert_arrays, py::arg("source"), py::arg("target"), py::arg("first"));
  m.def("rules", [] {
    py::dict all;  // (hyperparameters, states, whether it divides, which states are never negative)
    for (const Rule& rule : rules()) {
      std::vector<bool> positive;
      for (const Sign sign : rule.signs) positive.push_back(sign == Sign::kPositive);
      all[py::str(rule.name)] =
          py::make_tuple(rule.hypers, rule.states, rule.divisors[0] != nullptr, positive);
    }
    return all;
  });
  m.def("divisors",
        py::overload_cast<const std::string&, const std::vector<double>&, int64_t,
                          const std::vector<std::optional<Doubles>>&>(divisors),
        py::arg("rule"), py::arg("hypers"), py::arg("t"), py::arg("states"));
  m.def("mask_of", py::overload_cast<const std::string&, const std::vector<double>&>(mask_of),
        py::arg("rule"), py::arg("hypers"));

  m.def("exact_of", exact_of, py::arg("rule"), py::arg("hypers"));

  look_up_once();
  m.def("array_of", array_of, py::arg("array"), py::arg("name"));
  m.def("address_of", address_of, py::arg("array"));
  m.def("sum_of_squares", py::overload_cast<const py::sequence&>(sum_of_squares), py::arg("grads"));

  m.def("digests", digests, py::arg("buffer"), py::arg("size"));

  py::class_<Digesting>(m, "Digesting")
      .def(py::init<py::buffer, py::buffer>(), py::arg("source"), py::arg("copy"))
      .def("result", &Digesting::result);

  m.def("turn", turn);
  m.def("stages", [] { return py::capsule(&stages(), "fusedstep.stages"); });

  py::class_<ArrayTable>(m, "ArrayTable")
      .def(py::init<const std::string&, std::vector<std::string>, const py::list&, std::vector<int>,
                    const py::object&, int, const py::object&>(),
           py::arg("rule"), py::arg("names"), py::arg("params"), py::arg("groups"),
           py::arg("device") = py::none(), py::arg("index") = 0, py::arg("storage") = py::none())
      .def_property_readonly("states", locked(&ArrayTable::states))
      .def_property_readonly("steps", locked(&ArrayTable::steps))
      .def_property_readonly("used", locked(&ArrayTable::used))
      .def("clocks", locked(&ArrayTable::clocks))
      .def("load", locked(&ArrayTable::load), py::arg("states"), py::arg("clocks"),
           py::arg("steps"), py::arg("used"), py::arg("changes"), py::arg("averages") = 0)
      .def("step", locked(&ArrayTable::step), py::arg("grads"), py::arg("groups"),
           py::arg("options") = py::none(), py::arg("states") = py::none(),
           py::arg("announce") = py::none(), py::arg("shadow") = py::none())
      .def("step_flat", locked(&ArrayTable::step_flat), py::arg("grads"), py::arg("offsets"),
           py::arg("groups"), py::arg("options") = py::none(), py::arg("states") = py::none(),
           py::arg("announce") = py::none(), py::arg("shadow") = py::none())
      .def("swap", locked(&ArrayTable::swap))
      .def_property_readonly("swapped", locked(&ArrayTable::swapped))
      .def_property_readonly("averages", locked(&ArrayTable::averages))
      .def_property_readonly("averaged", locked(&ArrayTable::averaged))
      .def("norm", locked(&ArrayTable::norm))
      .def("norms", locked(&ArrayTable::norms))
      .def("shapes", locked(&ArrayTable::shapes))
      .def("dtypes", locked(&ArrayTable::dtypes));

  py::class_<TensorTable>(m, "TensorTable", py::custom_type_setup(collected<TensorTable>))
      .def(py::init<const std::string&, const std::vector<std::string>&, const py::object&, bool,
                    const py::object&, int, py::object>(),
           py::arg("rule"), py::arg("scalars"), py::arg("storage"), py::arg("exchange"),
           py::arg("device"), py::arg("index"), py::arg("state"))
      .def_property("state", locked(&TensorTable::state), locked(&TensorTable::set_state))
      .def("step", locked(&TensorTable::step), py::arg("groups"), py::arg("options"),
           py::arg("first"), py::arg("free"), py::arg("owner"), py::arg("shadows") = py::none(),
           py::arg("changes") = py::list())
      .def("norms", locked(&TensorTable::norms))
      .def("not_begun", locked(&TensorTable::not_begun), py::arg("params"))
      .def_property_readonly("norm", locked(&TensorTable::norm))
      .def_property_readonly("recalled", locked(&TensorTable::recalled))
      .def_property("live", locked(&TensorTable::live), locked(&TensorTable::set_live));
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) { define_all(m); }
