// Checks of Python's arguments; the arithmetic of a step is engine.cpp's.
#include "array_table.h"

#include <algorithm>

#include "commit.h"
#include "step/rules.h"
#include "unlocked.h"

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
      stepper_(rule_, [this](size_t i) { return names_[i]; }, place_.device, index) {
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
  py::dict none;
  for (const std::string& state : rules()[rule_].states) {
    py::list empty;
    for (size_t i = 0; i < names_.size(); ++i) empty.append(py::none());
    none[py::str(state)] = empty;
  }
  load(none, std::vector<ClockTuple>(names_.size()), 0, {}, py::list());
}

ArrayTable::States ArrayTable::staged(const py::dict& states,
                                      const std::vector<Clock>& clocks) const {
  const std::vector<std::string>& rule_states = rules()[rule_].states;
  if (states.size() != rule_states.size() || clocks.size() != params_.size()) {
    throw py::value_error("states and clocks must agree with the rule and the parameters");
  }
  States found;
  for (size_t i = 0; i < params_.size(); ++i) {
    const View& param = params_[i].view;
    Tensor& tensor = found.tensors.emplace_back();
    tensor.segment.stream[kParam] = {param.data, param.format};
    tensor.segment.n = param.n;
    tensor.counted = {groups_[i], clocks[i]};
    tensor.slot = static_cast<int64_t>(i);
  }
  for (size_t s = 0; s < rule_states.size(); ++s) {
    const py::sequence arrays = states[py::str(rule_states[s])];
    if (arrays.size() != params_.size()) {
      throw py::value_error("states must have an entry for each parameter");
    }
    for (size_t i = 0; i < params_.size(); ++i) {
      const py::object array = arrays[i];
      if (array.is_none()) continue;
      const View& param = params_[i].view;
      const std::string item = names_[i] + "]['" + rule_states[s] + "'";
      const Label label{"state", &item};
      View state = view_of(array, label, place_);
      check_writable(state, label);
      check_shape(state, param, label);
      if (state.format != state_format(param.format)) {
        throw py::type_error(label.text() + " must be " + format_name(state_format(param.format)) +
                             ", got " + format_name(state.format));
      }
      found.tensors[i].segment.stream[kState + s] = {state.data, state.format};
      found.views.push_back(std::move(state));
    }
  }
  return found;
}

void ArrayTable::load(const py::dict& states, const std::vector<ClockTuple>& clocks, int64_t steps,
                      std::vector<std::vector<double>> used, const py::list& changes) {
  std::vector<Clock> converted;
  for (const auto& [t, first, second] : clocks) converted.push_back({t, {first, second}});
  States found = staged(states, converted);
  Changes all(changes);
  stepper_.set_tensors(found.tensors);
  views_ = std::move(found.views);
  states_ = states;
  steps_ = steps;
  used_ = std::move(used);
  measured_ = false;
  all.make();
}

std::vector<ArrayTable::ClockTuple> ArrayTable::clocks() {
  std::vector<Clock> clocks;
  {
    const Unlocked unlocked;  // a device may be waited for
    clocks = stepper_.clocks();
  }
  std::vector<ClockTuple> all;
  for (const Clock& c : clocks) all.emplace_back(c.t, c.carry[0], c.carry[1]);
  return all;
}

void ArrayTable::check_param(size_t i, const Place& place) const {
  const Label label{"params", &names_[i]};
  const View now = view_of(params_[i].array, label, place);
  const View& then = params_[i].view;
  if (now.data != then.data || now.format != then.format || !same_shape(now, then)) {
    throw py::value_error(label.text() +
                          " must stay where it was when the optimizer was made, got another"
                          " address, shape or dtype: make a new optimizer");
  }
  check_writable(now, label);
}

// Whether reading the array runs none but its library's code. Other code may do anything: free
// memory that was read before, for one.
bool ArrayTable::quiet(py::handle array) {
  static const py::handle ndarray = py::type::of(py::array()).release();
  return py::type::handle_of(array).is(ndarray) || is_plain_tensor(array);
}

// Looks at the parameters again, and at the gradients: a View without owner for None. Those that run
// Python code come first, and once more if there are several, as each may move another.
std::vector<View> ArrayTable::read(const py::tuple& grads, const Place& place) const {
  std::vector<View> views(grads.size());
  const auto look = [&](bool loud) {
    int seen = 0;
    for (size_t i = 0; i < params_.size(); ++i) {
      if (quiet(params_[i].array) == loud) continue;
      check_param(i, place);
      ++seen;
    }
    for (size_t i = 0; i < views.size(); ++i) {
      const py::handle item = PyTuple_GET_ITEM(grads.ptr(), static_cast<py::ssize_t>(i));
      if (item.is_none() || quiet(item) == loud) continue;
      const Label label{"grads", &names_[i]};
      views[i] = grad_of(item, label, place, params_[i].view);
      check_shape(views[i], params_[i].view, label);
      ++seen;
    }
    return seen;
  };
  if (look(true) > 1) look(true);
  look(false);
  return views;
}

ArrayTable::Taken ArrayTable::step(const py::sequence& grads,
                                   const std::vector<std::vector<double>>& groups,
                                   const py::object& options, const py::object& states,
                                   const py::object& announce) {
  const Options own = as_options(options);
  const py::tuple fixed(grads);  // the caller's list could change while an exporter runs Python
  const size_t given = fixed.size();
  if (given != params_.size()) {
    throw py::value_error("grads must have one entry per parameter (" +
                          std::to_string(params_.size()) + "), got " + std::to_string(given));
  }
  const Place place = place_for(own);
  const AtPlace at(place);
  const std::vector<View> views =
      read(fixed, place);  // DLPack capsules live until the sweep is done
  const py::tuple after(grads);
  if (after.size() != given || !std::equal(fixed.begin(), fixed.end(), after.begin(),
                                           [](py::handle a, py::handle b) { return a.is(b); })) {
    throw py::value_error("grads must stay as given while it is read, got a list that changed");
  }
  std::vector<Stream> converted(given);
  py::list written;
  for (size_t i = 0; i < given; ++i) {
    if (!views[i].owner) continue;
    converted[i] = {views[i].data, views[i].format};
    if (!announce.is_none() && is_torch_tensor(params_[i].array)) written.append(params_[i].array);
  }
  const Taken taken = run(converted, groups, own, states);
  if (taken.second) announce_to(announce, written);
  return taken;
}

ArrayTable::Taken ArrayTable::step_flat(py::handle grads, const std::vector<int64_t>& offsets,
                                        const std::vector<std::vector<double>>& groups,
                                        const py::object& options, const py::object& states) {
  const Options own = as_options(options);
  const Place place = place_for(own);
  const AtPlace at(place);
  read(py::tuple(), place);  // of a flat buffer, whose arrays run no code
  const View view = view_of(grads, Label{"grads"}, place);
  std::vector<Stream> converted;
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
    char* data = static_cast<char*>(view.data) + offsets[i] * format_bytes(view.format);
    converted.push_back({data, view.format});
  }
  return run(converted, groups, own, states);
}

// With the stream of this call, which a device's exporters are asked to let wait for theirs.
Place ArrayTable::place_for(const Options& options) const {
  Place place = place_;
  place.stream = options.stream;
  return place;
}

ArrayTable::Taken ArrayTable::run(const std::vector<Stream>& grads,
                                  const std::vector<std::vector<double>>& groups,
                                  const Options& options, const py::object& states) {
  std::vector<Group> converted;
  const int needed = groups_.empty() ? 0 : *std::max_element(groups_.begin(), groups_.end()) + 1;
  if (groups.size() < static_cast<size_t>(needed)) {
    throw py::value_error("groups must have at least " + std::to_string(needed) + " entries, got " +
                          std::to_string(groups.size()));
  }
  for (const std::vector<double>& values : groups) {
    converted.push_back(as_group(values, rule_));
  }
  Options own = options;
  own.live = place_.device && options.skip_nonfinite;  // whether it counts, only the device knows
  std::vector<std::vector<double>> used = groups;

  // States that begin with this step are the table's from here on, unless it is not taken.
  std::vector<Tensor> before;
  std::vector<View> views;
  if (!states.is_none()) {
    before = stepper_.tensors();
    std::vector<Clock> clocks;
    for (const Tensor& tensor : before) clocks.push_back(tensor.counted.clock);
    States found = staged(states, clocks);
    for (size_t i = 0; i < before.size(); ++i) found.tensors[i].entered = before[i].entered;
    stepper_.set_tensors(found.tensors);
    views = std::move(found.views);
  }
  const auto put_back = [&] {
    if (!states.is_none()) stepper_.set_tensors(before);
  };
  Outcome outcome;
  try {
    const Unlocked unlocked;
    outcome = stepper_.step(grads, converted, own);
  } catch (...) {
    put_back();
    throw;
  }

  // The commit: all of it, and nothing on the way that Python could interrupt.
  measured_ = options.measure;
  norm_ = outcome.norm;
  if (outcome.skipped) {
    put_back();
    return {steps_, 0};
  }
  if (!states.is_none()) {
    states_ = py::reinterpret_borrow<py::dict>(states);
    views_ = std::move(views);
  }
  used_ = std::move(used);
  return {++steps_, outcome.elements};
}

std::optional<double> ArrayTable::norm() const {
  if (!measured_) return std::nullopt;
  if (!place_.device) return norm_;
  const Unlocked unlocked;
  return stepper_.device_norm();
}

std::optional<std::vector<std::optional<std::pair<double, bool>>>> ArrayTable::norms() const {
  if (!measured_) return std::nullopt;
  const Unlocked unlocked;
  std::vector<std::optional<std::pair<double, bool>>> all;
  for (const std::optional<Norm>& one : stepper_.norms()) {
    all.push_back(one ? std::optional(std::pair(one->norm, one->finite)) : std::nullopt);
  }
  return all;
}

std::vector<py::tuple> ArrayTable::shapes() const {
  std::vector<py::tuple> all;
  for (const Param& param : params_) all.push_back(py::tuple(py::cast(param.shape)));
  return all;
}

std::vector<std::string> ArrayTable::state_dtypes() const {
  std::vector<std::string> all;
  for (const Param& param : params_) all.emplace_back(format_name(state_format(param.view.format)));
  return all;
}

std::vector<std::string> ArrayTable::dtypes() const {
  std::vector<std::string> all;
  for (const Param& param : params_) all.emplace_back(format_name(param.view.format));
  return all;
}

}  // namespace fusedstep
