// fusedstep._jax: the engine's stages as functions that XLA calls.
#include <pybind11/pybind11.h>
#include <xla/ffi/api/c_api.h>

#include "handlers.h"

namespace py = pybind11;
using namespace fusedstep;

PYBIND11_MODULE(_jax, m, py::mod_gil_not_used()) {
  m.doc() = "The JAX module of fusedstep. Not public: use fusedstep.jax.";

  m.attr("FFI_VERSION") = py::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.attr("STREAMS") = kStreams;
  m.attr("ROW_WORDS") = sizeof(Row) / sizeof(uint32_t);
  m.def(
      "use",
      [](const py::object& capsule, const py::object& evaluate) {
        const auto* stages =
            static_cast<const Stages*>(PyCapsule_GetPointer(capsule.ptr(), "fusedstep.stages"));
        if (!stages) throw py::error_already_set();
        if (stages->size != sizeof(Stages)) {
          throw py::import_error("fusedstep._jax and fusedstep._core are of different builds");
        }
        jax::use(stages, evaluate);
      },
      py::arg("stages"), py::arg("evaluate"));
  m.def("targets", jax::targets);
}
