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

}  // namespace

ArrayTable::ArrayTable(const std::string& rule, std::vector<std::string> names,
                       const py::list& params, std::vector<int> groups, const py::object& device,
                       int index)
    : rule_(rule_number(rule)),
      place_{device_of(device), index, nullptr},
      names_(std::move(names)),
      groups_(std::move(groups)),
      table_(rule_, [this](size_t i) { return names_[i]; }, place_.device, index) {
  if (params.size() != names_.size() || groups_.size() != names_.size()) {
    throw py::value_error("names, params and groups must agree in length");
  }
  const AtPlace at(place_);
  for (size_t i = 0; i < names_.size(); ++i) {
    const Label label{"params", &names_[i]};
    const View view = view_of(params[i], label, place_);
    check_writable(view, label);
    params_.push_back({params[i], {view.shape, view.shape + view.ndim}, view});
    params_.back().view.shape = params_.back().shape.data();  // which moves with its vector
  }
  py::list none;
  for (size_t i = 0; i < names_.size(); ++i) none.append(py::none());
  set_states(std::vector<py::list>(rules()[rule_].states.size(), none),
             std::vector<ClockTuple>(names_.size()));
}

void ArrayTable::set_states(const std::vector<py::list>& states,
                            const std::vector<ClockTuple>& clocks) {
  if (states.size() != rules()[rule_].states.size() || clocks.size() != params_.size()) {
    throw py::value_error("states and clocks must agree with the rule and the parameters");
  }
  std::vector<Tensor> tensors;
  std::vector<View> views;
  for (size_t i = 0; i < params_.size(); ++i) {
    const View& param = params_[i].view;
    const auto [t, first, second] = clocks[i];
    tensors.push_back(
        {param.data, param.dtype, param.n, {}, groups_[i], Clock{t, {first, second}}});
    tensors.back().slot = static_cast<int64_t>(i);
    for (size_t s = 0; s < states.size(); ++s) {
      const py::object array = states[s][i];
      if (array.is_none()) continue;
      const Label label{"state", &names_[i]};
      const View state = view_of(array, label, place_);
      check_writable(state, label);
      check_shape(state, param, label);
      if (state.dtype != state_dtype(param.dtype)) {
        throw py::type_error(label.text() + " must be " + dtype_name(state_dtype(param.dtype)) +
                             ", got " + dtype_name(state.dtype));
      }
      tensors.back().state[s] = state.data;
      views.push_back(state);
    }
  }
  table_.set_tensors(tensors);
  states_ = std::move(views);
}

std::vector<ArrayTable::ClockTuple> ArrayTable::clocks() {
  std::vector<Clock> clocks;
  {
    const py::gil_scoped_release release;  // a device may be waited for
    clocks = table_.clocks();
  }
  std::vector<ClockTuple> all;
  for (const Clock& c : clocks) all.emplace_back(c.t, c.carry[0], c.carry[1]);
  return all;
}

void ArrayTable::check_params(const Place& place) const {
  for (size_t i = 0; i < params_.size(); ++i) {
    const Label label{"params", &names_[i]};
    const View now = view_of(params_[i].array, label, place);
    const View& then = params_[i].view;
    if (now.data != then.data || now.dtype != then.dtype || !same_shape(now, then)) {
      throw py::value_error(label.text() +
                            " must stay where it was when the optimizer was made, got another"
                            " address, shape or dtype: make a new optimizer");
    }
    check_writable(now, label);
  }
}

int64_t ArrayTable::step(const py::sequence& grads, const std::vector<std::vector<double>>& groups,
                         const Asked& asked) {
  const py::tuple fixed(grads);  // the caller's list could change while an exporter runs Python
  const size_t given = fixed.size();
  if (given != params_.size()) {
    throw py::value_error("grads must have one entry per parameter (" +
                          std::to_string(params_.size()) + "), got " + std::to_string(given));
  }
  const Place place = place_for(asked);
  const AtPlace at(place);
  check_params(place);
  std::vector<py::object> owners;  // DLPack capsules live until the sweep is done
  std::vector<Grad> converted(given, Grad{nullptr, DType::f32});
  for (size_t i = 0; i < given; ++i) {
    const py::handle item = PyTuple_GET_ITEM(fixed.ptr(), static_cast<py::ssize_t>(i));
    if (item.is_none()) continue;
    const Label label{"grads", &names_[i]};
    View view = grad_of(item, label, place, params_[i].view);
    check_shape(view, params_[i].view, label);
    converted[i] = {view.data, view.dtype};
    owners.push_back(std::move(view.owner));
  }
  return run(converted, groups, asked);
}

int64_t ArrayTable::step_flat(py::handle grads, const std::vector<int64_t>& offsets,
                              const std::vector<std::vector<double>>& groups, const Asked& asked) {
  const Place place = place_for(asked);
  const AtPlace at(place);
  check_params(place);
  const View view = view_of(grads, Label{"grads"}, place);
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
  return run(converted, groups, asked);
}

// With the stream of this call, which a device's exporters are asked to let wait for theirs.
Place ArrayTable::place_for(const Asked& asked) const {
  Place place = place_;
  if (asked) place.stream = reinterpret_cast<void*>(std::get<3>(*asked));
  return place;
}

int64_t ArrayTable::run(const std::vector<Grad>& grads,
                        const std::vector<std::vector<double>>& groups, const Asked& asked) {
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].data) continue;
    check_grad_dtype(Label{"grads", &names_[i]}, params_[i].view.dtype, grads[i].dtype);
  }
  std::vector<DeviceGroup> converted;
  const int needed = groups_.empty() ? 0 : *std::max_element(groups_.begin(), groups_.end()) + 1;
  if (groups.size() < static_cast<size_t>(needed)) {
    throw py::value_error("groups must have at least " + std::to_string(needed) + " entries, got " +
                          std::to_string(groups.size()));
  }
  for (const std::vector<double>& values : groups) {
    converted.push_back({as_group(values, rule_), {nullptr, DType::f32}});
  }
  Control control;
  control.stream = place_for(asked).stream;
  if (asked) {
    const auto& [factor, max_norm, skip_nonfinite, stream] = *asked;
    control.factor = factor;
    control.measure = max_norm.has_value() || skip_nonfinite;
    if (max_norm) control.max_norm = *max_norm;
    control.skip_nonfinite = skip_nonfinite;
    control.live = place_.device && skip_nonfinite;  // whether it counts, only the device knows
  }
  const py::gil_scoped_release release;
  outcome_ = table_.step(grads, converted, control);
  return outcome_.elements;
}

double ArrayTable::norm() const {
  if (!place_.device) return outcome_.norm;
  const py::gil_scoped_release release;
  return table_.device_norm();
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

}  // namespace fusedstep
