// Reads opt.param_groups and opt.state, checks all of it, lets the stepper write, and then commits.
#include "tensor_table.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "python/arrays.h"
#include "python/locked.h"
#include "python/unlocked.h"
#include "step/rules.h"

namespace py = pybind11;

namespace fusedstep {
namespace {

// A dict's value, or null. No __missing__ is called: a defaultdict stays as it is.
py::object lookup(py::handle dict, py::handle key) {
#if PY_VERSION_HEX >= 0x030d0000
  PyObject* found;
  if (PyDict_GetItemRef(dict.ptr(), key.ptr(), &found) < 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
#else
  PyObject* found = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(found);
#endif
}

// A dict's values for keys that mostly come in the dict's own order, some left out: no hash is
// computed then.
class Ordered {
 public:
  explicit Ordered(py::handle dict) : dict_(dict) {}
  py::object at(py::handle key) {
    if (!hashed) {
      const Locked locked(dict_);
      PyObject *found, *value;
      for (Py_ssize_t next = at_; PyDict_Next(dict_.ptr(), &next, &found, &value);) {
        if (found != key.ptr()) continue;
        at_ = next;
        return py::reinterpret_borrow<py::object>(value);
      }
    }
    hashed = true;
    return lookup(dict_, key);
  }
  bool hashed = false;  // a tensor's hash is Python code

 private:
  py::handle dict_;
  Py_ssize_t at_ = 0;
};

int state_stream(size_t s) { return kState + static_cast<int>(s); }

// What a tensor holds that a stream in a format lies in, or what is beside it: integers of so many
// bytes, or numbers in a format.
struct Holding {
  int integer;
  Format format;
};
Holding holding(Format format, bool beside) {
  switch (format) {
    case Format::kQ8:
    case Format::kQ8Positive:
      return {1, Format::kNone};
    case Format::kSplit:
      return beside ? Holding{2, Format::kNone} : Holding{0, Format::kBf16};
    case Format::kKahan:
      return {0, Format::kBf16};
    default:
      return {0, format};
  }
}

// Whether a number is stored by its place in the parameter, so that those must be in order.
bool by_place(const Kept& kept) {
  return kept.rounding == Rounding::kStochastic ||
         kFormatInfo[static_cast<int>(kept.format)].block > 1;
}

std::string type_text(Format format, int reals) {
  if (reals == 1) return format_name(format);
  return format == Format::kF64 ? "complex128" : "complex64";
}

std::string type_text(const TensorView& view) {
  if (view.integer) return view.integer == 1 ? "uint8" : "int16";
  return type_text(view.format, view.reals);
}

std::string shape_text(const TensorView& view) {
  return fusedstep::shape_text(view.shape, view.ndim);
}

// Walks over all of Python's objects, by gc.get_objects and its like: who takes one may come to have
// a part of a state that nobody was shown. Python tells an audit hook before it.
std::atomic<uint64_t> walks{0};

int see_walk(const char* event, PyObject*, void*) {
  if (std::strncmp(event, "gc.get_", 7) == 0) ++walks;
  return 0;
}

// Whether walks are seen: another hook may have refused ours.
bool sees_walks() {
  static const bool seen = [] {
    if (PySys_AddAuditHook(see_walk, nullptr) != 0) PyErr_Clear();
    const uint64_t before = walks;
    if (PySys_Audit("gc.get_nothing", nullptr) != 0) PyErr_Clear();
    return walks != before;
  }();
  return seen;
}

std::vector<py::str> interned(const std::vector<std::string>& names) {
  std::vector<py::str> all;
  for (const std::string& name : names) {
    all.push_back(py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name.c_str())));
  }
  return all;
}

}  // namespace

TensorTable::TensorTable(const std::string& rule, const std::vector<std::string>& scalars,
                         const py::object& storage, bool exchange, const py::object& device,
                         int index, py::object state)
    : rule_(rule_number(rule)),
      place_{device_of(device), index, nullptr},
      reader_(exchange),
      storage_(rules()[rule_], storage),
      n_states_(rules()[rule_].states.size()),
      scalars_(interned(scalars)),
      amp_(interned({"grad_scale", "found_inf"})),
      stepper_(
          rule_,
          [this](size_t place) {
            const py::gil_scoped_acquire acquire;  // a step runs without the interpreter's lock
            return name_of(active_[place].i);
          },
          place_.device, index),
      state_(std::move(state)) {
  if (scalars_.size() > kCounts) {
    throw py::value_error("scalars must be at most 3, got " + std::to_string(scalars_.size()));
  }
  const auto add = [&](const std::string& name, int stream, bool beside) {
    if (!name.empty()) slots_.push_back({interned({name})[0], stream, beside});
  };
  const Form& form = storage_.of(Format::kBf16);  // which alone has something beside it
  for (size_t s = 0; s < n_states_; ++s) add(rules()[rule_].states[s], state_stream(s), false);
  for (size_t s = 0; s < n_states_; ++s) add(form.states[s].beside, state_stream(s), true);
  add(form.param.beside, kParam, true);
  add("ema", kEma, false);
}

// Which slots a step has with these of the rule's states.
TensorTable::SlotMask TensorTable::slots_of(StateMask states, bool average) const {
  SlotMask mask = states;
  for (size_t s = n_states_; s < slots_.size(); ++s) {
    const int stream = slots_[s].stream;
    const bool has =
        stream == kParam || (stream == kEma ? average : states >> (stream - kState) & 1);
    mask |= SlotMask{has} << s;
  }
  return mask;
}

const Kept& TensorTable::kept_in(const Form& form, int stream) const {
  if (stream == kParam) return form.param;
  return stream == kEma ? form.ema : form.states[stream - kState];
}

py::object TensorTable::state() {
  show();
  return state_;
}

uint64_t TensorTable::seen() const { return shown_ + walks; }

void TensorTable::set_state(py::object state) {
  show();
  state_ = std::move(state);
}

// Before anybody else has the state, or it is dropped. A step under way, in another thread, goes on
// with the memory that it found.
void TensorTable::show() {
  const bool pins = stepping_ && shown_ == begun_ && PyDict_Check(state_.ptr());
  ++shown_;
  if (!pins) return;
  for (const py::handle entry : py::reinterpret_steal<py::list>(PyDict_Values(state_.ptr()))) {
    if (!PyDict_Check(entry.ptr())) continue;
    pinned_.append(py::reinterpret_steal<py::object>(PyDict_Copy(entry.ptr())));
  }
}

int TensorTable::traverse(visitproc visit, void* arg) const {
  Py_VISIT(state_.ptr());
  Py_VISIT(pinned_.ptr());
  return 0;
}

void TensorTable::clear() { set_state(py::dict()); }

std::string TensorTable::name_of(size_t i) const {
  return owner_.attr("_name")(i).cast<std::string>();
}

std::string TensorTable::state_label(const Active& a, const py::str& name) const {
  return "state[" + name_of(a.i) + "]['" + name.cast<std::string>() + "']";
}

// Reads a tensor, or puts in its place what torch makes of one that cannot be read where it lies. A
// real state that is the object it was, where it was, is not asked again whether it is lazy. `before`
// is where the last step found it: only memory that is elsewhere is measured. Says whether it is to
// take the place of what the state has.
bool TensorTable::look(Active& a, const py::str& kind, py::object& tensor, TensorView& view,
                       const void* before, Known* known, bool on_host) {
  const Place place = on_host ? Place{} : place_;
  if (reader_.read(tensor, view, place) && (known || !view.integer)) {
    trail_.pass_tensor(tensor, view);
    if (view.n) sources_.push_back({tensor, view.data, view.n, view.format, on_host});
    const bool own =
        view.held.empty();  // the shape lies in torch's object, and tells it from others
    const bool same = known && own && known->object == view.shape && known->data == view.data;
    if (same && view.reals == 1) return false;
    const bool there = known ? same : view.data == before;
    if ((there || reader_.holds(tensor, view)) && !reader_.lazy(tensor, view)) {
      if (known) *known = {view.shape, view.data};
      return false;
    }
  }
  if (known) *known = {};
  return replace(a, kind, tensor, view, place);
}

// Puts in a tensor's place what torch makes of it, and says whether the state is to have that too.
bool TensorTable::replace(Active& a, const py::str& kind, py::object& tensor, TensorView& view,
                          const Place& place) {
  ran_ = true;
  sources_.push_back({tensor, reader_.address(tensor)});
  of(a).stand_ins.push_back(tensor);
  const py::tuple made = owner_.attr("_plain")(a.i, kind, tensor);
  tensor = made[0];
  if (!in_place(of(a).first_source))
    throw Moved();  // nobody follows what was read of this parameter
  if (!reader_.read(tensor, view, place)) {
    throw py::value_error(owner_.attr("_label")(a.i, kind).cast<std::string>() +
                          " must have memory of its own, got " +
                          py::str(py::type::of(tensor).attr("__name__")).cast<std::string>());
  }
  if (view.n) sources_.push_back({tensor, view.data, view.n, view.format, !place.device});
  if (!py::object(made[1]).is_none()) back_.emplace_back(made[1], tensor);
  of(a).stand_ins.push_back(tensor);
  return made[2].cast<bool>();
}

void TensorTable::check_grad(const Active& a, const TensorView& param,
                             const TensorView& grad) const {
  if (same_shape(param, grad) && param.reals == grad.reals) return;
  const std::string name = name_of(a.i);
  const Label label{"grads", &name};
  if (!same_shape(param, grad)) {
    throw py::value_error(label.text() + " must have shape " + shape_text(param) + ", got " +
                          shape_text(grad));
  }
  throw py::type_error(label.text() + " must be " + (param.reals == 2 ? "complex" : "real") +
                       " as its " + type_text(param) + " parameter, got " + type_text(grad));
}

void TensorTable::check_shadow(const Active& a, const TensorView& param,
                               const TensorView& shadow) const {
  const std::string name = name_of(a.i);
  const Label label{"shadow", &name};
  if (!same_shape(param, shadow)) {
    throw py::value_error(label.text() + " must have shape " + shape_text(param) + ", got " +
                          shape_text(shadow));
  }
  if (shadow.format != Format::kF64 && shadow.reals == param.reals) return;
  throw py::type_error(label.text() + " must be " +
                       (param.reals == 2 ? "complex64" : "float32, bfloat16 or float16") +
                       ", got " + type_text(shadow));
}

// A tensor of the parameter's state, as its storage has it.
void TensorTable::check_slot(const Active& a, size_t s, const Segment& segment,
                             const TensorView& param, const TensorView& view) const {
  const auto refuse = [&](const std::string& rule, const std::string& got) {
    throw py::value_error(state_label(a, slots_[s].name) + " must be " + rule + ", got " + got);
  };
  const Format format = kept_in(storage_.of(param.format), slots_[s].stream).format;
  const Holding wanted = holding(format, slots_[s].beside);
  if (slots_[s].beside && kFormatInfo[static_cast<int>(format)].block > 1) {
    const int64_t entries = beside_entries(segment, format);
    if (view.ndim != 1 || view.n != entries || !contiguous(view)) {
      refuse("contiguous, of shape (" + std::to_string(entries) + ",)", shape_text(view));
    }
  } else if (!same_shape(param, view)) {
    refuse("of shape " + shape_text(param), shape_text(view));
  }
  if (view.integer == wanted.integer && view.format == wanted.format &&
      (wanted.integer || view.reals == param.reals)) {
    return;
  }
  const char* integers[] = {nullptr, "uint8", "int16"};
  refuse(wanted.integer ? integers[wanted.integer] : type_text(wanted.format, param.reals),
         type_text(view));
}

TensorTable::Entry TensorTable::find(const Active& a) const {
  Entry found;
  if (of(a).entry && !PyDict_Check(of(a).entry.ptr())) {
    throw py::type_error("state[" + name_of(a.i) + "] must be a dict, got " +
                         py::repr(of(a).entry).cast<std::string>());
  }
  Ordered values(of(a).entry);
  const auto take = [&](const py::str& name, py::object& tensor) {
    py::object value = of(a).fresh ? lookup(of(a).fresh, name) : py::object();
    if (!value && of(a).entry) value = values.at(name);
    if (value && reader_.is_tensor(value)) {
      tensor = std::move(value);
    } else {
      found.complete = false;
    }
  };
  for (size_t s = 0; a.updates && s < scalars_.size(); ++s) take(scalars_[s], found.scalars[s]);
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (a.slots >> s & 1) take(slots_[s].name, found.slots[s]);
  }
  return found;
}

// Whether a step takes anything of a parameter's entry: plain SGD has none, and to find that out costs
// the tensor's hash, which is Python code.
bool TensorTable::takes_state(const Active& a) const {
  return a.slots != 0 || (a.updates && !scalars_.empty());
}

py::list TensorTable::names_missing(const Active& a) const {
  py::list names;
  for (size_t s = 0; a.updates && s < scalars_.size(); ++s) {
    if (!of(a).found.scalars[s]) names.append(scalars_[s]);
  }
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (a.slots >> s & 1 && !of(a).found.slots[s]) names.append(slots_[s].name);
  }
  return names;
}

// Reads a parameter and all that goes with it, as far as its entry is complete, into tensors_ and
// gradients_ at `place`. `begins`: the entry was completed for this step.
void TensorTable::read(size_t place, bool begins) {
  Active& a = active_[place];
  a.direct = false;
  of(a).found = find(a);
  const Entry& entry = of(a).found;
  of(a).first_source = sources_.size();
  TensorView p, g = {}, copy = {}, views[kSlots];
  py::object param = py::reinterpret_borrow<py::object>(a.param);
  const std::vector<Tensor>& before = stepper_.tensors();
  const bool had = place < before.size() && place < gradients_before_.size();
  look(a, params_, param, p, had ? before[place].segment.stream[kParam].data : nullptr);
  if (a.updates) {
    look(a, grads_, a.grad, g, had ? gradients_before_[place].data : nullptr);
    check_grad(a, p, g);
  }
  if (a.shadow) {
    look(a, shadow_, a.shadow, copy, nullptr);
    check_shadow(a, p, copy);
  }
  const Form& form = storage_.of(p.format);
  const bool rounds = storage_.of(Format::kBf16).param.format != Format::kBf16 ||
                      storage_.of(Format::kBf16).param.rounding != Rounding::kNearest;
  if (p.reals == 2 || (rounds && p.format != Format::kBf16)) owner_.attr("_check_stored")(a.i);
  if (!entry.complete) return;

  const auto refuse = [&](const py::str& name, const std::string& rule, const std::string& got) {
    throw py::value_error(state_label(a, name) + " must be " + rule + ", got " + got);
  };
  for (size_t s = 0; a.updates && s < scalars_.size(); ++s) {
    TensorView view;
    of(a).scalars[s] = entry.scalars[s];
    py::object scalar = entry.scalars[s];
    bool moved = look(a, scalars_[s], scalar, view, nullptr, &counted_[a.i].known[s], !live_);
    if (view.n == 1 && shows_less(s, {view.data, view.format})) {
      moved = replace(a, scalars_[s], scalar, view, live_ ? place_ : Place{});
    }
    if (view.n != 1 || (view.format != Format::kF32 && view.format != Format::kF64)) {
      refuse(scalars_[s], "one float32 or float64 number",
             type_text(view) + " of shape " + shape_text(view));
    }
    of(a).scalars[s] = scalar;
    if (moved) {
      py::dict change;
      change[scalars_[s]] = scalar;
      changes_.add(py::reinterpret_borrow<py::dict>(begins ? of(a).fresh : of(a).entry), change);
    }
    a.numbers[s] = {view.data, view.format};
  }

  Tensor& tensor = tensors_[place];
  filled_[place] = 0;
  tensor = {};
  Segment& segment = tensor.segment;
  segment.n = p.n;
  bool ordered = a.updates && by_place(form.param);
  for (size_t s = 0; s < slots_.size(); ++s) {
    ordered = ordered || (a.slots >> s & 1 && by_place(kept_in(form, slots_[s].stream)));
  }
  if (ordered && !reader_.ordinary(a.param)) {
    segment.first = owner_.attr("_first_of")(a.i).cast<int64_t>();
  }
  bool direct = ordered ? contiguous(p) : dense(p);
  direct = direct && (!a.updates || same_strides(p, g)) && (!a.shadow || same_strides(p, copy));
  std::array<bool, kSlots> like = {};  // of the parameter's shape
  of(a).slots = entry.slots;
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (!of(a).slots[s]) continue;
    look(a, slots_[s].name, of(a).slots[s], views[s], nullptr, &counted_[a.i].known[kCounts + s]);
    check_slot(a, s, segment, p, views[s]);
    like[s] = same_shape(p, views[s]) && (!slots_[s].beside || slots_[s].stream == kParam);
    direct = direct && (!like[s] || same_strides(p, views[s]));
  }
  if (!direct) {
    py::list all, writes;
    std::vector<TensorView*> of_all;
    const auto pass = [&](const py::object& object, bool written, TensorView& view) {
      all.append(object);
      writes.append(written);
      of_all.push_back(&view);
    };
    pass(param, a.updates, p);
    if (a.updates) pass(a.grad, false, g);
    for (size_t s = 0; s < slots_.size(); ++s) {
      if (of(a).slots[s] && like[s]) pass(of(a).slots[s], true, views[s]);
    }
    if (a.shadow) pass(a.shadow, true, copy);
    ran_ = true;
    const py::tuple made = owner_.attr("_match")(a.i, all, writes, ordered);
    const py::list matched = made[0];
    for (const py::handle pair : py::list(made[1])) {
      const auto both = py::reinterpret_borrow<py::tuple>(pair);
      back_of_copies_.emplace_back(both[0], both[1]);
    }
    for (size_t k = 0; k < of_all.size(); ++k) {
      if (!reader_.read(matched[k], *of_all[k], place_))
        throw std::logic_error("_match must be plain");
    }
    a.own_grad = a.updates && py::object(matched[1]).is(a.grad);
    of(a).stand_ins.push_back(matched);
  }
  a.own_grad = a.own_grad && a.grad.is(a.given);

  const auto put = [&](int stream) -> Stream& {
    Stream& it = segment.stream[stream];
    it.format = kept_in(form, stream).format;
    it.rounding = kept_in(form, stream).rounding;
    return it;
  };
  put(kParam).data = p.data;
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (!of(a).slots[s]) continue;
    Stream& it = put(slots_[s].stream);
    (slots_[s].beside ? it.beside : it.data) = views[s].data;
    const bool average = slots_[s].stream == kEma;
    if (average) written_.append(entry.slots[s]);
    segment.ema_begins |= average && begins && of(a).fresh && lookup(of(a).fresh, slots_[s].name);
  }
  tensor.counted = {a.group, clock_of(a, begins)};
  if (live_) {  // one that is only averaged counts no update, but may begin its average
    tensor.slot = static_cast<int64_t>(a.i);
    tensor.entered = counted_[a.i].entered && !(begins && a.updates);
    for (size_t s = 0; a.updates && s < scalars_.size(); ++s) {
      tensor.shown[s] = a.numbers[s];
    }
  }
  gradients_[place] = {g.data, a.updates ? g.format : Format::kNone};
  copies_[place] = {copy.data, a.shadow ? copy.format : Format::kNone};
  a.direct = direct && of(a).stand_ins.empty() && !begins && !live_;
}

// As `read`, of a parameter whose states are kept: looks at it and its gradient alone. False where
// they are not what they were, and have to be read.
bool TensorTable::recall(size_t place) {
  Active& a = active_[place];
  Held& held = held_[a.i];
  if (held.shown != seen() || held.slots != a.slots || live_) return false;
  TensorView p, g = {}, copy = {};
  if (!reader_.read(a.param, p, place_)) return false;
  if (a.updates && !reader_.read(a.grad, g, place_)) return false;
  if (p.data != held.segment.stream[kParam].data || p.format != held.format ||
      p.reals != held.reals || p.ndim != held.ndim ||
      !std::equal(p.shape, p.shape + p.ndim, held.layout.data()) ||
      !std::equal(p.strides, p.strides + p.ndim, held.layout.data() + p.ndim)) {
    return false;
  }
  const Format grad_format = a.updates ? g.format : Format::kNone;
  if (grad_format != held.grad_format || reader_.lazy(a.param, p)) return false;
  if (a.updates) {
    if (g.reals != p.reals || !same_strides(p, g)) return false;
    if (g.data != held.grad && !reader_.holds(a.grad, g)) return false;
    if (reader_.lazy(a.grad, g)) return false;
    a.numbers = held.numbers;
    for (size_t s = 0; s < scalars_.size(); ++s) {
      if (shows_less(s, a.numbers[s])) return false;
    }
  }
  if (a.shadow) {
    if (!reader_.read(a.shadow, copy, place_) || copy.integer || !same_strides(p, copy) ||
        !reader_.holds(a.shadow, copy) || reader_.lazy(a.shadow, copy)) {
      return false;
    }
    check_shadow(a, p, copy);
  }
  held.grad = g.data;
  a.kept = true;
  Tensor& tensor = tensors_[place];
  if (filled_[place] != held.serial) {
    tensor = {};
    tensor.segment = held.segment;
    filled_[place] = held.serial;
  }
  tensor.counted = {a.group, clock_of(a, false)};
  gradients_[place] = {g.data, grad_format};
  copies_[place] = {copy.data, a.shadow ? copy.format : Format::kNone};
  return true;
}

// Whether a number is float32 where a step uses more: a checkpoint shall have what the next step
// reads. A step count is exact to 2^24; on the device, which is not waited for, it shows as much.
bool TensorTable::shows_less(size_t s, const Stream& number) const {
  if (number.format != Format::kF32) return false;
  return s > 0 || (!live_ && *static_cast<const float*>(number.data) >= 0x1p24f);
}

// The counts that the state's tensors show.
Clock TensorTable::clock_of(const Active& a, bool begins) const {
  // SGD carries whether its state had begun, Adam whether its first one had not.
  const bool first = begins && n_states_ > 0 && of(a).fresh && lookup(of(a).fresh, slots_[0].name);
  Clock clock{0, {first ? 0.0 : 1.0, first ? 1.0 : 0.0}};
  if (live_ || !a.updates) return clock;  // the device looks at the tensors
  for (size_t s = 0; s < scalars_.size(); ++s) {
    const Stream& number = a.numbers[s];
    const double shown = number.format == Format::kF64 ? *static_cast<const double*>(number.data)
                                                       : *static_cast<const float*>(number.data);
    if (s) {
      clock.carry[s - 1] = shown;
    } else if (shown >= 0 && shown < 0x1p53 && shown == std::floor(shown)) {
      clock.t = static_cast<int64_t>(shown);
    } else {
      throw py::value_error(state_label(a, scalars_[s]) +
                            " must be an integer from 0 to 2^53 - 1, got " + std::to_string(shown));
    }
  }
  return clock;
}

std::vector<size_t> TensorTable::not_begun(const py::list& params) {
  std::vector<int64_t> slots;
  for (size_t i = 0; i < std::min(counted_.size(), params.size()); ++i) {
    const bool own = counted_[i].param == py::object(params[i]).ptr();
    if (own && counted_[i].entered && scalars_.empty()) slots.push_back(static_cast<int64_t>(i));
  }
  std::vector<size_t> found;
  if (slots.empty()) return found;
  std::vector<Clock> clocks;
  {
    const Unlocked unlocked;
    clocks = stepper_.device_clocks(slots);
  }
  for (size_t k = 0; k < slots.size(); ++k) {
    if (clocks[k].t == 0 && clocks[k].carry[0] == 0) found.push_back(slots[k]);
  }
  return found;
}

std::optional<std::vector<std::tuple<size_t, double, bool>>> TensorTable::norms() const {
  if (!measured_) return std::nullopt;
  const Unlocked unlocked;
  const std::vector<std::optional<Norm>> norms = stepper_.norms();
  std::vector<std::tuple<size_t, double, bool>> found;
  for (size_t k = 0; k < measured_->size(); ++k) {
    const std::optional<Norm>& one = norms[k];
    if (one) found.emplace_back((*measured_)[k], one->norm, one->finite);
  }
  return found;
}

void TensorTable::write_clocks() {
  for (const Active& a : active_) {
    if (live_ || a.updates) counted_[a.i].entered = live_;
  }
  if (scalars_.empty() || live_) return;
  for (size_t place = 0; place < active_.size(); ++place) {
    const Active& a = active_[place];
    if (!a.updates) continue;
    const Clock clock = stepper_.clock(place);
    for (size_t s = 0; s < scalars_.size(); ++s) {
      const double value = s ? clock.carry[s - 1] : static_cast<double>(clock.t);
      const Stream& number = a.numbers[s];
      if (number.format == Format::kF64) {
        *static_cast<double*>(number.data) = value;
      } else {
        *static_cast<float*>(number.data) = static_cast<float>(value);
      }
    }
  }
}

// A tensor of one number in the device's memory.
Stream TensorTable::number(const py::handle& tensor, const char* name) const {
  TensorView view;
  if (tensor.is_none()) return {};
  const bool found = reader_.read(tensor, view, place_);
  if (!found || view.n != 1 || (view.format != Format::kF32 && view.format != Format::kF64)) {
    throw py::value_error(std::string(name) + " must be one float32 or float64 number on " +
                          place_text(place_) + ", got " + py::str(tensor).cast<std::string>());
  }
  return {view.data, view.format};
}

// Reads all that the step goes by. Python code may run on the way, and move what was read before.
void TensorTable::collect(const py::list& groups, size_t first, const Options& options,
                          const py::object& shadows, const py::list& changes) {
  active_.clear();
  readings_.clear();
  groups_.clear();
  gradients_.clear();
  copies_.clear();
  sources_.clear();
  back_.clear();
  back_of_copies_.clear();
  changes_ = Changes(changes);
  written_ = py::list();
  ran_ = false;
  trail_.begin();

  constexpr size_t kAhead = 4;  // parameters whose objects are on the way to the cache
  std::vector<size_t> begins;
  py::list wanted;
  Ordered entries(state_);
  size_t i = first;
  for (const py::handle item : groups) {
    const auto group = py::reinterpret_borrow<py::tuple>(item);
    const py::tuple params(group[0]);  // the list may change while torch is asked
    groups_.push_back(as_group(group[1].cast<std::vector<double>>(), rule_));
    groups_.back().lr = number(group[3], "lr");
    const bool average = options.average != 0;
    const SlotMask of_rest = slots_of(0, average),
                   slots = slots_of(rules()[rule_].mask_of(groups_.back().hypers), average);
    // Each by its own size: the second may find no memory where the first did.
    if (counted_.size() < i + params.size()) counted_.resize(i + params.size());
    if (held_.size() < i + params.size()) held_.resize(i + params.size());
    for (const py::handle param : params) {
      const size_t here = i++, place = active_.size();
      if (here + kAhead < held_.size()) {
        const Lines& lines = held_[here + kAhead].lines;
        lines.fetch(lines.n);
      }
      ran_ = ran_ || !reader_.ordinary(param);
      py::object grad = reader_.grad(param);
      py::object shadow;
      if (!shadows.is_none()) {
        shadow = py::reinterpret_borrow<py::object>(PyList_GetItem(shadows.ptr(), here));
        if (shadow.is_none()) shadow = {};
      }
      const bool updates = !grad.is_none();
      if (!updates && !average && !shadow) continue;
      if (counted_[here].param != param.ptr()) {
        counted_[here] = {};
        counted_[here].param = param.ptr();
        held_[here].shown = 0;
      }
      Active& a = active_.emplace_back();
      a.i = here;
      a.group = static_cast<int>(groups_.size()) - 1;
      a.param = param;
      a.given = grad;
      a.grad = std::move(grad);
      a.updates = updates;
      a.shadow = std::move(shadow);
      if (place == tensors_.size()) tensors_.emplace_back();
      if (place == filled_.size()) filled_.push_back(0);
      gradients_.emplace_back();
      copies_.emplace_back();
      a.slots = updates ? slots : of_rest;
      if (updates) written_.append(param);
      if (a.shadow) written_.append(a.shadow);
      if (recall(place)) continue;
      if (held_[here].shown == seen()) give_up(here);  // the step may replace what it reads
      a.reading = readings_.size();
      readings_.emplace_back();
      if (takes_state(a)) of(a).entry = entries.at(param);
      if (of(a).entry) trail_.pass(of(a).entry.ptr());
      read(place, false);
      if (of(a).found.complete) continue;
      begins.push_back(place);
      wanted.append(py::make_tuple(param, group[2], names_missing(a)));
    }
  }
  tensors_.resize(active_.size());
  filled_.resize(active_.size());
  ran_ = ran_ || entries.hashed;
  if (begins.empty()) return;
  ran_ = true;
  const py::list made = owner_.attr("_begin")(wanted);
  py::dict added;
  for (size_t k = 0; k < begins.size(); ++k) {
    Active& a = active_[begins[k]];
    of(a).fresh = made[k];
    read(begins[k], true);
    if (!of(a).found.complete) throw std::logic_error("_begin must make all states");
    if (of(a).entry) {
      changes_.add(py::reinterpret_borrow<py::dict>(of(a).entry),
                   py::reinterpret_borrow<py::dict>(of(a).fresh));
    } else {
      added[a.param] = of(a).fresh;
    }
  }
  changes_.add(py::reinterpret_borrow<py::dict>(state_), added);
}

// Whether the tensors that were read, from one on, are what they were; runs no Python code.
bool TensorTable::in_place(size_t first) const {
  const auto same = [&](const Source& s) {
    if (s.n < 0) return reader_.address(s.tensor) == s.at;
    TensorView now;
    return reader_.read(s.tensor, now, s.on_host ? Place{} : place_) && now.data == s.at &&
           now.n == s.n && now.format == s.format;
  };
  return std::all_of(sources_.begin() + static_cast<ptrdiff_t>(first), sources_.end(), same);
}

// Whether all that was read is still there, and still what the optimizer has; runs none but torch's
// Python code.
bool TensorTable::stayed() const {
  Ordered entries(state_);
  for (size_t place = 0; place < active_.size(); ++place) {
    const Active& a = active_[place];
    if (a.kept) {
      const Segment& segment = tensors_[place].segment;
      const auto stays = [&](const py::handle& tensor, const void* data) {
        TensorView now;
        return reader_.read(tensor, now, place_) && now.data == data && now.n == segment.n;
      };
      if (held_[a.i].shown != seen() || !stays(a.param, segment.stream[kParam].data) ||
          (a.updates && !stays(a.grad, gradients_[place].data)) ||
          (a.shadow && !stays(a.shadow, copies_[place].data))) {
        return false;
      }
    } else if (takes_state(a) &&
               (!entries.at(a.param).is(of(a).entry) || !find(a).same(of(a).found))) {
      return false;
    }
  }
  if (!in_place(0)) return false;
  for (const Active& a : active_) {
    if (reader_.ordinary(a.param) && !reader_.grad(a.param).is(a.given)) return false;
  }
  return true;
}

// Whether nobody but the state has what a step over a parameter took of it, and it is still that: the
// dict, its tensors, their storages. Nobody can move then what he has not been shown.
bool TensorTable::alone(size_t place, const TensorView& p, py::handle entry) const {
  const Active& a = active_[place];
  const Segment& segment = tensors_[place].segment;
  if (takes_state(a) && (!entry || !PyDict_Check(entry.ptr()) || !reader_.referred_once(entry))) {
    return false;
  }
  TensorView view;
  const auto is = [&](const py::str& name, const Place& where, const void* data) {
    const py::handle tensor = lookup(entry, name);  // not another reference to it
    return tensor && reader_.alone(tensor) && reader_.read(tensor, view, where) &&
           view.data == data;
  };
  for (size_t s = 0; a.updates && s < scalars_.size(); ++s) {
    if (!is(scalars_[s], Place{}, a.numbers[s].data) || view.n != 1 ||
        view.format != a.numbers[s].format) {
      return false;
    }
  }
  for (size_t s = 0; s < slots_.size(); ++s) {
    if (!(a.slots >> s & 1)) continue;
    const Stream& stream = segment.stream[slots_[s].stream];
    if (!is(slots_[s].name, place_, slots_[s].beside ? stream.beside : stream.data)) return false;
    const Holding wanted = holding(stream.format, slots_[s].beside);
    const bool shared = slots_[s].beside && slots_[s].stream != kParam;
    if (view.integer != wanted.integer || view.format != wanted.format) return false;
    if (shared ? view.n != beside_entries(segment, stream.format) : !same_strides(p, view)) {
      return false;
    }
  }
  return p.data == segment.stream[kParam].data && p.n == segment.n;
}

// Leaves a parameter's states to be read in each step, for a while that doubles each time.
void TensorTable::give_up(size_t i) {
  constexpr unsigned kMostTries = 10;
  held_[i].shown = 0;
  counted_[i].rest = 1u << std::min(++counted_[i].tries, kMostTries);
}

// After a step: what the next ones need not read. Not of a state that is shown between any two.
void TensorTable::keep() {
  const bool knows = reader_.knows_alone() && sees_walks();
  if (ran_ || live_ || !knows || !reader_.referred_once(state_)) return;
  const uint64_t shown = seen();
  Ordered entries(state_);
  for (size_t place = 0; place < active_.size(); ++place) {
    const Active& a = active_[place];
    Counted& counted = counted_[a.i];
    if (!a.direct) continue;
    if (counted.shown != shown) {
      counted.shown = shown;
      counted.tries = counted.rest = 0;
    } else if (counted.rest > 0) {
      --counted.rest;
    } else {
      of(a) = {};  // none of its references are somebody's
      TensorView p;
      py::handle entry;  // not another reference to it
      if (takes_state(a)) entry = entries.at(a.param);
      if (!reader_.read(a.param, p, place_) || p.ndim > Held::kDims || !alone(place, p, entry)) {
        give_up(a.i);
        continue;
      }
      Held& held = held_[a.i];
      held.slots = a.slots;
      held.segment = tensors_[place].segment;
      held.format = p.format;
      held.grad_format = gradients_[place].format;
      held.reals = p.reals;
      held.ndim = p.ndim;
      held.grad = gradients_[place].data;
      held.numbers = a.numbers;
      held.serial = ++serial_;
      held.lines = {};
      reader_.add_lines(a.param, held.lines);
      held.of_param = held.lines.n;
      if (a.updates) reader_.add_lines(a.given, held.lines);
      for (size_t s = 0; a.updates && s < scalars_.size(); ++s) {
        held.lines.add(reinterpret_cast<uintptr_t>(a.numbers[s].data), sizeof(double));
      }
      std::copy(p.shape, p.shape + p.ndim, held.layout.begin());
      std::copy(p.strides, p.strides + p.ndim, held.layout.begin() + p.ndim);
      held.shown = shown;
    }
  }
}

void TensorTable::step(const py::list& groups, const py::tuple& options, size_t first, bool free,
                       const py::object& owner, const py::object& shadows,
                       const py::list& changes) {
  struct Release {  // of all that the step borrows, however it ends
    TensorTable& table;
    ~Release() {  // NOLINT(bugprone-exception-escape): an empty list has memory
      table.active_.clear();
      table.readings_.clear();
      table.back_.clear();
      table.back_of_copies_.clear();
      table.changes_ = {};
      table.written_ = py::list();
      table.stepping_ = false;
      table.pinned_ = py::list();
    }
  } const release{*this};
  if (!PyDict_Check(state_.ptr())) {
    throw py::type_error("state must be a dict, got " + py::repr(state_).cast<std::string>());
  }
  stepping_ = true;
  begun_ = shown_;
  active_.clear();  // a process forked in the middle of a step has its parent's
  owner_ = owner;
  Options own = as_options(options);
  live_ = own.live;
  own.scale = number(options[6], "grad_scale");
  own.found_inf = number(options[7], "found_inf");
  own.norm = number(options[8], "norm");

  std::swap(gradients_, gradients_before_);
  constexpr int kTries = 3;
  for (int tries = 0;; ++tries) {
    bool whole = true;
    try {
      collect(groups, first, own, shadows, changes);
    } catch (const Moved&) {
      whole = false;
    }
    const bool moved =
        !std::equal(gradients_.begin(), gradients_.end(), gradients_before_.begin(),
                    gradients_before_.end(),
                    [](const Stream& x, const Stream& y) { return x.data == y.data; }) ||
        !std::equal(tensors_.begin(), tensors_.end(), stepper_.tensors().begin(),
                    stepper_.tensors().end(), [](const Tensor& x, const Tensor& y) {
                      return x.segment.stream[kParam].data == y.segment.stream[kParam].data;
                    });
    if (moved) ran_ = owner_.attr("_moved")().cast<bool>() || ran_;
    if (whole && (!ran_ || stayed())) break;
    if (tries == kTries) {
      throw py::value_error(
          "params, grads and state must stay where they are while a step reads"
          " them, got memory that moved each time");
    }
    owner_.attr("_again")();
  }
  recalled_ = active_.size() - readings_.size();
  stepper_.set_tensors(tensors_);
  const py::dict attributes = owner_.attr("_attributes");
  const py::object announce = owner_.attr("_announce");
  // What the commit needs memory for: the last that may fail.
  std::optional<std::vector<size_t>> measured;
  if (own.measure) measured.emplace();
  for (const Active& a : active_) {
    if (measured) measured->push_back(a.i);
    if (own.zero_grad && a.updates && a.own_grad) written_.append(a.given);
  }
  Outcome outcome;
  {
    const Unlocked unlocked;
    outcome = shadows.is_none() ? stepper_.step(gradients_, groups_, own)
                                : stepper_.step(gradients_, groups_, own, copies_);
  }

  // The commit. No Python code runs before states and counts are those of the new parameters.
  for (const py::str& name : amp_) {
    if (PyDict_Contains(attributes.ptr(), name.ptr()) == 1 &&
        PyDict_DelItem(attributes.ptr(), name.ptr()) != 0) {
      PyErr_Clear();  // another thread has dropped it
    }
  }
  if (!place_.device && own.norm.data) *static_cast<double*>(own.norm.data) = outcome.norm;
  norm_ = options[8];
  measured_ = std::move(measured);
  lives_ = live_;
  if (outcome.skipped) return;
  write_clocks();
  changes_.make();
  Insistence insistence;
  for (const auto* pairs : {&back_of_copies_, &back_}) {
    for (const auto& [to, from] : *pairs) {
      insistence.run([&, target = to, source = from] { target.attr("copy_")(source); });
    }
  }
  for (const Active& a : active_) {
    if (a.kept) held_[a.i].lines.fetch(held_[a.i].of_param);
    if (!own.zero_grad || !a.updates || a.own_grad) continue;
    insistence.run([&] { a.given.attr("detach")().attr("zero_")(); });
  }
  insistence.run([&] { announce(written_); });
  for (const Active& a : active_) {
    if (free && a.updates) insistence.run([&] { reader_.drop_grad(a.param); });
  }
  insistence.raise();
  written_ = py::list();  // of which some are states
  try {
    keep();
  } catch (const py::error_already_set& error) {  // somebody's torch function mode
    if (!error.matches(PyExc_Exception)) throw;
  }
}

}  // namespace fusedstep
