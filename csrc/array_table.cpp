// Checks of Python's arguments; the arithmetic of a step is step.cpp's.
#include "array_table.h"

#include <algorithm>

namespace py = pybind11;

namespace fusedstep {
namespace {

bool same_shape(const View& a, const View& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

void check_shape(const View& got, const View& expected, const Label& label) {
  if (same_shape(got, expected)) return;
  throw py::value_error(label.text() + " must have shape " +
                        shape_text(expected.shape, expected.ndim) + ", got " +
                        shape_text(got.shape, got.ndim));
}

void check_writable(const View& view, const Label& label) {
  if (!view.writable) {
    throw py::value_error(label.text() + " must be writable, got a read-only array");
  }
}

}  // namespace

ArrayTable::ArrayTable(const std::string& rule, std::vector<std::string> names,
                       const py::list& params, const std::vector<py::list>& states,
                       const std::vector<int>& groups)
    : rule_(rule_number(rule)), names_(std::move(names)), table_(rule_) {
  const size_t n = names_.size();
  if (params.size() != n || groups.size() != n || states.size() != rules()[rule_].states.size()) {
    throw py::value_error("names, params, groups and states must agree in length");
  }
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < n; ++i) {
    const Label label{"params", &names_[i]};
    const View view = view_of(params[i], label);
    check_writable(view, label);
    tensors.push_back({names_[i], view.data, view.dtype, view.n, {}, groups[i], Clock{}});
    groups_ = std::max(groups_, groups[i] + 1);
    const DType state_type = view.dtype == DType::f64 ? DType::f64 : DType::f32;
    for (size_t s = 0; s < states.size(); ++s) {
      if (py::object(states[s][i]).is_none()) continue;
      const Label state_label{"state", &names_[i]};
      const View state = view_of(states[s][i], state_label);
      check_writable(state, state_label);
      check_shape(state, view, state_label);
      if (state.dtype != state_type) {
        throw py::type_error(state_label.text() + " must be " + dtype_name(state_type) + ", got " +
                             dtype_name(state.dtype));
      }
      tensors.back().state[s] = state.data;
      states_.push_back(state);
    }
    params_.push_back({params[i], {view.shape, view.shape + view.ndim}, view});
    params_.back().view.shape = params_.back().shape.data();  // which moves with its vector
  }
  table_.set_tensors(std::move(tensors));
}

void ArrayTable::check_params() const {
  for (size_t i = 0; i < params_.size(); ++i) {
    const Label label{"params", &names_[i]};
    const View now = view_of(params_[i].array, label);
    const View& then = params_[i].view;
    if (now.data != then.data || now.dtype != then.dtype || !same_shape(now, then)) {
      throw py::value_error(label.text() +
                            " must stay where it was when the optimizer was made, got another"
                            " address, shape or dtype: make a new optimizer");
    }
    check_writable(now, label);
  }
}

int64_t ArrayTable::step(const py::sequence& grads,
                         const std::vector<std::vector<double>>& groups) {
  const py::object fast = py::reinterpret_steal<py::object>(
      PySequence_Fast(grads.ptr(), "grads must be a sequence of arrays"));
  if (!fast) throw py::error_already_set();
  const size_t given = PySequence_Fast_GET_SIZE(fast.ptr());
  if (given != params_.size()) {
    throw py::value_error("grads must have one entry per parameter (" +
                          std::to_string(params_.size()) + "), got " + std::to_string(given));
  }
  check_params();
  std::vector<py::object> owners;  // DLPack capsules live until the sweep is done
  std::vector<Grad> converted(given, Grad{nullptr, DType::f32});
  for (size_t i = 0; i < given; ++i) {
    const py::handle item = PySequence_Fast_GET_ITEM(fast.ptr(), static_cast<py::ssize_t>(i));
    if (item.is_none()) continue;
    const Label label{"grads", &names_[i]};
    View view = view_of(item, label);
    check_shape(view, params_[i].view, label);
    converted[i] = {view.data, view.dtype};
    owners.push_back(std::move(view.owner));
  }
  return run(converted, groups);
}

int64_t ArrayTable::step_flat(py::handle grads, const std::vector<int64_t>& offsets,
                              const std::vector<std::vector<double>>& groups) {
  check_params();
  const View view = view_of(grads, Label{"grads"});
  std::vector<Grad> converted;
  if (offsets.size() != params_.size()) {
    throw py::value_error("grads must have one segment per parameter (" +
                          std::to_string(params_.size()) + "), got " +
                          std::to_string(offsets.size()));
  }
  for (size_t i = 0; i < offsets.size(); ++i) {
    if (offsets[i] < 0 || offsets[i] + params_[i].view.n > view.n) {
      throw py::value_error("grads must have at least " +
                            std::to_string(offsets[i] + params_[i].view.n) + " elements, got " +
                            std::to_string(view.n));
    }
    char* data = static_cast<char*>(view.data) + offsets[i] * dtype_bytes(view.dtype);
    converted.push_back({data, view.dtype});
  }
  return run(converted, groups);
}

int64_t ArrayTable::run(const std::vector<Grad>& grads,
                        const std::vector<std::vector<double>>& groups) {
  for (size_t i = 0; i < grads.size(); ++i) {
    const DType param = params_[i].view.dtype, grad = grads[i].dtype;
    if (!grads[i].data || type_pair(param, grad) >= 0) continue;
    throw py::type_error(
        Label{"grads", &names_[i]}.text() + " must be " +
        (param == DType::f32 ? "float32, bfloat16 or float16" : dtype_name(param)) + " for a " +
        dtype_name(param) + " parameter, got " + dtype_name(grad));
  }
  const size_t hypers = rules()[rule_].hypers.size();
  std::vector<Group> converted;
  if (groups.size() < static_cast<size_t>(groups_)) {
    throw py::value_error("groups must have at least " + std::to_string(groups_) +
                          " entries, got " + std::to_string(groups.size()));
  }
  for (const std::vector<double>& values : groups) {
    if (values.size() != hypers + 3) {
      throw py::value_error("groups must have maximize, decoupled, weight_decay and " +
                            std::to_string(hypers) + " hyperparameters, got " +
                            std::to_string(values.size()) + " values");
    }
    Group group = {values[0] != 0, values[1] != 0, values[2], {}};
    std::copy(values.begin() + 3, values.end(), group.hypers.begin());
    converted.push_back(group);
  }
  const py::gil_scoped_release release;
  return table_.step(grads, converted);
}

std::vector<py::tuple> ArrayTable::shapes() const {
  std::vector<py::tuple> all;
  for (const Param& param : params_) all.push_back(py::tuple(py::cast(param.shape)));
  return all;
}

std::vector<std::string> ArrayTable::dtypes() const {
  std::vector<std::string> all;
  for (const Param& param : params_) all.emplace_back(dtype_name(param.view.dtype));
  return all;
}

py::tuple ArrayTable::clock(size_t i) const {
  const Clock& clock = table_.tensors().at(i).clock;
  return py::make_tuple(clock.t, clock.carry[0], clock.carry[1]);
}

void ArrayTable::set_clock(size_t i, int64_t t, double first, double second) {
  if (t < 0) throw py::value_error("step must be >= 0, got " + std::to_string(t));
  table_.tensors().at(i).clock = Clock{t, {first, second}};
}

}  // namespace fusedstep
