// Checks of Python's arguments; the arithmetic of a step is engine.cpp's.
#include "array_table.h"

#include <algorithm>
#include <cstring>

#include "commit.h"
#include "machine/float_mode.h"
#include "machine/parallel.h"
#include "step/rules.h"
#include "unlocked.h"

namespace py = pybind11;

namespace fusedstep {
namespace {

constexpr char kEmaKey[] = "ema";  // the average's in a parameter's state

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
                       int index, const py::object& storage)
    : rule_(rule_number(rule)),
      storage_(rules()[rule_], storage),
      place_{device_of(device), index, nullptr},
      names_(std::move(names)),
      groups_(std::move(groups)),
      stepper_(rule_, [this](size_t i) { return names_[i]; }, place_.device, index) {
  if (params.size() != names_.size() || groups_.size() != names_.size()) {
    throw py::value_error("names, params and groups must agree in length");
  }
  const AtPlace at(place_);
  py::dict none;
  const auto add = [&](const std::string& key) {
    if (key.empty() || none.contains(key.c_str())) return;
    py::list empty;
    for (size_t i = 0; i < names_.size(); ++i) empty.append(py::none());
    none[py::str(key)] = empty;
  };
  for (const std::string& state : rules()[rule_].states) add(state);
  for (size_t i = 0; i < names_.size(); ++i) {
    const Label label{"params", &names_[i]};
    const View view = view_of(params[i], label, place_);
    check_writable(view, label);
    params_.push_back({params[i], {view.shape, view.shape + view.ndim}, view});
    params_.back().view.shape = params_.back().shape.data();  // which moves with its vector
    const Form& form = storage_.of(view.format);
    add(form.param.beside);
    for (const Kept& state : form.states) add(state.beside);
  }
  add(kEmaKey);
  load(none, std::vector<ClockTuple>(names_.size()), 0, {}, py::list(), 0);
}

// An array in a tensor's state: a format's elements, or what lies beside them, of format kNone.
View ArrayTable::state_view(py::handle array, size_t i, const std::string& key,
                            Format format) const {
  const std::string item = names_[i] + "]['" + key + "'";
  const Label label{"state", &item};
  const View& param = params_[i].view;
  const int bytes = static_cast<int>(format_bytes(format));
  // A GPU's arrays have no name for bfloat16, and no array has one for 8-bit floats.
  const bool named =
      static_cast<int>(format) < kArrayFormats && !(place_.device && format == Format::kBf16);
  View state =
      named ? view_of(array, label, place_) : memory_of(array, label, place_, param.n, bytes);
  check_writable(state, label);
  if (!named) return state;
  check_shape(state, param, label);
  if (state.format != format) {
    throw py::type_error(label.text() + " must be " + format_name(format) + ", got " +
                         format_name(state.format));
  }
  return state;
}

ArrayTable::States ArrayTable::staged(const py::dict& states,
                                      const std::vector<Clock>& clocks) const {
  const std::vector<std::string>& rule_states = rules()[rule_].states;
  if (clocks.size() != params_.size()) {
    throw py::value_error("clocks must agree with the parameters");
  }
  for (const auto& [key, arrays] : states) {
    if (py::len(arrays) == params_.size()) continue;
    throw py::value_error("states must have an entry for each parameter");
  }
  States found;
  const auto entry = [&](const std::string& key, size_t i) -> py::object {
    if (!states.contains(key.c_str())) return py::none();
    return states[key.c_str()][py::int_(i)];
  };
  const auto beside = [&](const Kept& kept, size_t i) -> void* {
    if (kept.beside.empty()) return nullptr;
    const py::object array = entry(kept.beside, i);
    if (array.is_none()) return nullptr;
    const std::string item = names_[i] + "]['" + kept.beside + "'";
    const Label label{"state", &item};
    Segment segment;
    segment.n = params_[i].view.n;
    const FormatInfo& info = kFormatInfo[static_cast<int>(kept.format)];
    View view = memory_of(array, label, place_, beside_entries(segment, kept.format), info.beside);
    check_writable(view, label);
    found.views.push_back(std::move(view));
    return found.views.back().data;
  };
  for (size_t i = 0; i < params_.size(); ++i) {
    const View& param = params_[i].view;
    const Form& form = storage_.of(param.format);
    Tensor& tensor = found.tensors.emplace_back();
    Stream(&stream)[kStreams] = tensor.segment.stream;
    stream[kParam] = form.param.stream(param.data, beside(form.param, i));
    if (!form.param.beside.empty() && !stream[kParam].beside) {
      stream[kParam].format = param.format;  // until the array is there, before the first step
    }
    tensor.segment.n = param.n;
    tensor.counted = {groups_[i], clocks[i]};
    tensor.slot = static_cast<int64_t>(i);
    const auto put = [&](int k, const std::string& key, const Kept& kept) {
      const py::object array = entry(key, i);
      if (array.is_none()) return false;
      View view = state_view(array, i, key, kept.format);
      stream[k] = kept.stream(view.data, beside(kept, i));
      found.views.push_back(std::move(view));
      return true;
    };
    for (size_t s = 0; s < rule_states.size(); ++s) {
      put(kState + static_cast<int>(s), rule_states[s], form.states[s]);
    }
    found.averaged &= put(kEma, kEmaKey, form.ema);
  }
  return found;
}

void ArrayTable::load(const py::dict& states, const std::vector<ClockTuple>& clocks, int64_t steps,
                      std::vector<std::vector<double>> used, const py::list& changes,
                      int64_t averages) {
  std::vector<Clock> converted;
  for (const auto& [t, first, second] : clocks) converted.push_back({t, {first, second}});
  States found = staged(states, converted);
  Changes all(changes);
  stepper_.set_tensors(found.tensors);
  views_ = std::move(found.views);
  states_ = states;
  steps_ = steps;
  averages_ = averages;
  averaged_ = found.averaged;
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

// Looks at the parameters again, at the gradients and at what takes copies. Those that run Python
// code come first, and once more if there are several, as each may move another.
ArrayTable::Given ArrayTable::read(const py::tuple& grads, const py::tuple& shadows, bool zero_grad,
                                   const Place& place) const {
  Given given = {std::vector<View>(grads.size()), std::vector<View>(shadows.size())};
  const auto look = [&](bool loud) {
    int seen = 0;
    const auto each = [&](const py::tuple& arrays, std::vector<View>& views, const char* argument,
                          const auto& view_of_one) {
      for (size_t i = 0; i < views.size(); ++i) {
        const py::handle item = PyTuple_GET_ITEM(arrays.ptr(), static_cast<py::ssize_t>(i));
        if (item.is_none() || quiet(item) == loud) continue;
        const Label label{argument, &names_[i]};
        views[i] = view_of_one(item, label, params_[i].view);
        check_shape(views[i], params_[i].view, label);
        ++seen;
      }
    };
    for (size_t i = 0; i < params_.size(); ++i) {
      if (quiet(params_[i].array) == loud) continue;
      check_param(i, place);
      ++seen;
    }
    const auto written = [&](py::handle item, const Label& label, const View&) {
      View view = view_of(item, label, place);
      check_writable(view, label);
      return view;
    };
    if (zero_grad) {
      each(grads, given.grads, "grads", written);
    } else {
      each(grads, given.grads, "grads",
           [&](py::handle item, const Label& label, const View& param) {
             return grad_of(item, label, place, param);
           });
    }
    each(shadows, given.shadows, "shadow", written);
    return seen;
  };
  if (look(true) > 1) look(true);
  look(false);
  return given;
}

py::tuple ArrayTable::as_shadows(const py::object& shadow) const {
  if (shadow.is_none()) return py::tuple();
  py::tuple all(shadow);
  if (all.size() == params_.size()) return all;
  throw py::value_error("shadow must have one entry per parameter (" +
                        std::to_string(params_.size()) + "), got " + std::to_string(all.size()));
}

ArrayTable::Taken ArrayTable::step(const py::sequence& grads,
                                   const std::vector<std::vector<double>>& groups,
                                   const py::object& options, const py::object& states,
                                   const py::object& announce, const py::object& shadow) {
  const Options own = as_options(options);
  const py::tuple fixed(grads);  // the caller's list could change while an exporter runs Python
  const size_t count = fixed.size();
  if (count != params_.size()) {
    throw py::value_error("grads must have one entry per parameter (" +
                          std::to_string(params_.size()) + "), got " + std::to_string(count));
  }
  const py::tuple shadows = as_shadows(shadow);
  const Place place = place_for(own);
  const AtPlace at(place);
  const Given given =
      read(fixed, shadows, own.zero_grad, place);  // DLPack capsules live until the sweep is done
  const py::tuple after(grads);
  if (after.size() != count || !std::equal(fixed.begin(), fixed.end(), after.begin(),
                                           [](py::handle a, py::handle b) { return a.is(b); })) {
    throw py::value_error("grads must stay as given while it is read, got a list that changed");
  }
  std::vector<Stream> converted(count);
  py::list written;
  const auto note = [&](py::handle array) {
    if (!announce.is_none() && is_versioned(array)) written.append(array);
  };
  for (size_t i = 0; i < count; ++i) {
    if (!given.grads[i].owner) continue;
    converted[i] = {given.grads[i].data, given.grads[i].format};
    note(params_[i].array);
    if (own.zero_grad) note(fixed[i]);
  }
  for (const py::handle array : shadows) note(array);
  return run(converted, given.shadows, groups, own, states, announce, written);
}

ArrayTable::Taken ArrayTable::step_flat(py::handle grads, const std::vector<int64_t>& offsets,
                                        const std::vector<std::vector<double>>& groups,
                                        const py::object& options, const py::object& states,
                                        const py::object& announce, const py::object& shadow) {
  const Options own = as_options(options);
  const py::tuple shadows = as_shadows(shadow);
  const Place place = place_for(own);
  const AtPlace at(place);
  const Given given = read(py::tuple(), shadows, false, place);
  const Label label{"grads"};
  const View view = view_of(grads, label, place);  // of a flat buffer: it runs no code
  if (own.zero_grad) check_writable(view, label);
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
  py::list written;
  for (const py::handle array : shadows) {
    if (!announce.is_none() && is_versioned(array)) written.append(array);
  }
  return run(converted, given.shadows, groups, own, states, announce, written);
}

// With the stream of this call, which a device's exporters are asked to let wait for theirs.
Place ArrayTable::place_for(const Options& options) const {
  Place place = place_;
  place.stream = options.stream;
  return place;
}

ArrayTable::Taken ArrayTable::run(const std::vector<Stream>& grads,
                                  const std::vector<View>& shadows,
                                  const std::vector<std::vector<double>>& groups,
                                  const Options& options, const py::object& states,
                                  const py::object& announce, const py::list& written) {
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
  std::vector<Stream> copies;
  for (const View& view : shadows) {
    copies.push_back(view.owner ? Stream{view.data, view.format} : Stream{});
  }

  // States that begin with this step are the table's from here on, unless it is not taken.
  Stepper::Kept kept;
  States found;
  if (!states.is_none()) {
    kept = stepper_.keep();
    const std::vector<Tensor>& before = kept.tensors;
    std::vector<Clock> clocks;
    for (const Tensor& tensor : before) clocks.push_back(tensor.counted.clock);
    found = staged(states, clocks);
    for (size_t i = 0; i < before.size(); ++i) {
      const Segment& segment = before[i].segment;
      const bool begins = segment.stream[kEma].format == Format::kNone;
      found.tensors[i].segment.ema_begins = begins || segment.ema_begins;
      found.tensors[i].entered = before[i].entered;
    }
    stepper_.set_tensors(found.tensors);
  }
  const auto put_back = [&] {
    if (!states.is_none()) stepper_.put_back(std::move(kept));
  };
  Outcome outcome;
  try {
    const Unlocked unlocked;
    outcome = stepper_.step(grads, converted, own, copies);
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
    views_ = std::move(found.views);
    averaged_ = found.averaged;
  }
  used_ = std::move(used);
  averages_ += options.average != 0;
  const Taken taken = {++steps_, outcome.elements};
  announce_to(announce, written);
  return taken;
}

namespace {

constexpr int64_t kSwapped = 1 << 16;  // elements that one thread swaps at a time

// As a float32's word is a bfloat16 and its lower half (formats/split.h), a parameter and its average
// change places in the memory that they have: the average's word has the parameter above its own
// lower half meanwhile.
void swap_halves(uint16_t* param, uint32_t* average, bool back, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t word = average[i], old = param[i];
    const auto low = static_cast<uint32_t>(static_cast<int16_t>(word));
    if (back) {
      average[i] = (old << 16) + low;
      param[i] = static_cast<uint16_t>(word >> 16);
    } else {
      const uint32_t kept = (word & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : word;  // NaN's is 0
      average[i] = (old << 16) | (kept & 0xffffu);
      param[i] = static_cast<uint16_t>((kept + 0x8000u) >> 16);
    }
  }
}

void swap_bytes(char* a, char* b, int64_t n) {
  char block[4096];
  for (int64_t size; n > 0; n -= size, a += size, b += size) {
    size = std::min<int64_t>(n, sizeof(block));
    std::memcpy(block, a, size);
    std::memcpy(a, b, size);
    std::memcpy(b, block, size);
  }
}

}  // namespace

void ArrayTable::swap() {
  if (place_.device) {
    throw py::value_error("params must be in CPU memory for ema, got " + place_text(place_));
  }
  for (int twice = 0; twice < 2; ++twice) {  // a look may run code that moves another
    for (size_t i = 0; i < params_.size(); ++i) check_param(i, place_);
  }
  const auto halves = [](const Stream& average, Format param) {
    return param == Format::kBf16 && average.format == Format::kF32;
  };
  const std::vector<Tensor>& tensors = stepper_.tensors();
  if (!swapped_) {
    kept_.assign(params_.size(), {});
    for (size_t i = 0; i < params_.size(); ++i) {
      const View& param = params_[i].view;
      const Stream& average = tensors[i].segment.stream[kEma];
      const bool fits = average.format == param.format || halves(average, param.format);
      if (average.format == Format::kNone || fits) continue;
      const auto* bytes = static_cast<const char*>(param.data);
      kept_[i].assign(bytes, bytes + param.n * format_bytes(param.format));
    }
  }
  size_t i = 0;
  // One for all, as each would need memory, which may be missing once others have changed places.
  const std::function<void(int64_t, int64_t)> swap_part = [&](int64_t begin, int64_t end) {
    const View& param = params_[i].view;
    const Stream& average = tensors[i].segment.stream[kEma];
    const int64_t bytes = format_bytes(param.format);
    auto* own = static_cast<char*>(param.data);
    if (average.format == param.format) {
      swap_bytes(own + begin * bytes, static_cast<char*>(average.data) + begin * bytes,
                 (end - begin) * bytes);
    } else if (halves(average, param.format)) {
      swap_halves(static_cast<uint16_t*>(param.data), static_cast<uint32_t*>(average.data),
                  swapped_, begin, end);
    } else if (swapped_) {
      std::memcpy(own + begin * bytes, kept_[i].data() + begin * bytes, (end - begin) * bytes);
    } else {
      convert(average, {param.data, param.format}, begin, end);
    }
  };
  const Unlocked unlocked;
  const FloatMode mode;
  for (; i < params_.size(); ++i) {
    if (tensors[i].segment.stream[kEma].format == Format::kNone) continue;
    parallel_for(params_[i].view.n, kSwapped, swap_part);
  }
  if (swapped_) kept_.clear();
  swapped_ = !swapped_;
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

std::vector<std::string> ArrayTable::dtypes() const {
  std::vector<std::string> all;
  for (const Param& param : params_) all.emplace_back(format_name(param.view.format));
  return all;
}

}  // namespace fusedstep
