// fusedstep._cuda: the GPUs that there are, and what fusedstep._core needs to step on one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "backend.h"
#include "python/unlocked.h"

namespace py = pybind11;
using namespace fusedstep;

namespace {

// A contiguous buffer's memory; throws for one that is not, or that is to be written and cannot be.
py::buffer_info bytes_of(const py::buffer& buffer, bool writable) {
  py::buffer_info info = buffer.request(writable);
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("buffer must be contiguous");
  return info;
}

}  // namespace

PYBIND11_MODULE(FUSEDSTEP_MODULE, m) {
  m.doc() = "The GPU module of fusedstep. Not public: use the package.";

  m.attr("ARCHITECTURES") = FUSEDSTEP_ARCHITECTURES;
  m.def("device", [] { return py::capsule(&device(), "fusedstep.device"); });
  m.def("devices", [] {
    py::list all;
    for (const DeviceInfo& one : devices()) {
      py::dict entry;
      entry["name"] = one.name;
      entry["capability"] = std::to_string(one.major) + "." + std::to_string(one.minor);
      entry["nbytes"] = one.bytes;
      entry["multiprocessors"] = one.multiprocessors;
      all.append(entry);
    }
    return all;
  });
  m.def(
      "index_of",
      [](uintptr_t address) {
        int index;
        if (const char* error = device().index_of(reinterpret_cast<void*>(address), &index)) {
          throw std::runtime_error(error);
        }
        return index;
      },
      py::arg("address"));
  py::class_<Allocation>(m, "Allocation", py::module_local())
      .def(py::init<size_t, int>(), py::arg("nbytes"), py::arg("index"), py::call_guard<Unlocked>())
      .def_property_readonly(
          "address", [](const Allocation& a) { return reinterpret_cast<uintptr_t>(a.data()); })
      .def_property_readonly("nbytes", &Allocation::bytes)
      .def_property_readonly("index", &Allocation::index)
      .def(
          "read",
          [](const Allocation& a, size_t at, const py::buffer& to) {
            const py::buffer_info info = bytes_of(to, true);
            const Unlocked unlocked;
            a.read(at, info.ptr, info.size * info.itemsize);
          },
          py::arg("at"), py::arg("to"))
      .def(
          "write",
          [](Allocation& a, size_t at, const py::buffer& from) {
            const py::buffer_info info = bytes_of(from, false);
            const Unlocked unlocked;
            a.write(at, info.ptr, info.size * info.itemsize);
          },
          py::arg("at"), py::arg("from_"));
}
