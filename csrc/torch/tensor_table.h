// A Stepper over torch's parameters, gradients and states, all of them looked at in each step.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <exception>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "python/commit.h"
#include "python/options.h"
#include "python/storage.h"
#include "step/stepper.h"
#include "tensor_reader.h"

namespace fusedstep {

// Asks the cache for what the last step looked at, in its order: after a forward and a backward pass
// none of it is there any more. Its addresses are hints; nothing is read through them.
class Trail {
 public:
  void begin() {
    std::swap(now_, before_);
    now_.clear();
    for (size_t i = 0; i < kAhead && i < before_.size(); ++i) prefetch(before_[i]);
  }
  void pass(const void* address) { pass(reinterpret_cast<uintptr_t>(address)); }
  void pass(uintptr_t address) {
    now_.push_back(address);
    const size_t ahead = now_.size() + kAhead;
    if (ahead < before_.size()) prefetch(before_[ahead]);
  }
  void pass_tensor(pybind11::handle tensor, const TensorView& view) {
    pass(tensor.ptr());
    const auto shape = reinterpret_cast<uintptr_t>(view.shape);  // in the middle of torch's object
    pass(shape - 64);
    pass(shape);
    pass(shape + 64);
  }

 private:
  static constexpr size_t kAhead = 64;  // addresses, some three parameters'

  std::vector<uintptr_t> now_, before_;
};

// Nothing is taken from an earlier step but what cannot be stale: the verdict that memory does not
// overlap, while it is where it was; and where states are, while nobody else has them. For that the
// table holds the optimizer's state, and sees who is shown it.
class TensorTable {
 public:
  // `scalars` are the state's 0-d tensors by name: the step count, then what the clock carries. A
  // rule without any keeps no count, and its clock carries whether the states have begun.
  // `storage` is Python's `Storage.native`, or None: all is as wide as a step computes.
  // `device` is None, or as for ArrayTable; `state` a dict of names to tensors for each parameter, as
  // torch.optim's.
  TensorTable(const std::string& rule, const std::vector<std::string>& scalars,
              const pybind11::object& storage, bool exchange, const pybind11::object& device,
              int index, pybind11::object state);

  // The state. Whoever is shown it may change it, and all in it, for as long as he keeps a part.
  pybind11::object state();
  void set_state(pybind11::object state);

  // Python's garbage collector goes through the state, which has the parameters and their hooks.
  int traverse(visitproc visit, void* arg) const;
  void clear();

  // Updates every parameter that has a gradient; averages and copies those without one, too.
  //   groups  (parameters, values as for as_group, torch's group, None or a tensor that has lr) of
  //           each
  //   options  Python's Options
  //   first   the number of the first parameter; the others follow, over all groups
  //   free    whether gradients are dropped once they are used
  //   shadows None, or a tensor or None for each parameter by number, to which it is copied
  //   changes pairs of a dict and what it takes over with the step
  //   owner   asked for what only torch can do:
  //     _again() is told that all is read anew
  //     _plain(i, kind, tensor) -> (the same as a plain tensor, what to copy it to after the step
  //         or None, whether it is to take the state's place), or an error that says what is
  //         wrong; kind is "params", "grads" or a state's name. Counts are on the device where
  //         they are live, else on the CPU, and no narrower than a step uses them.
  //     _begin([(parameter, torch's group, names)]) -> for each a dict of the missing states, which
  //         the commit takes over
  //     _match(i, [parameter, ...], [whether it is written, ...], contiguous) -> (the same, dense and
  //         of equal strides, contiguous if told, and pairs of what to copy to and from after the
  //         step)
  //     _first_of(i) -> the place of the first element of parameter i in that of which it is a shard
  //     _check_stored(i): an error where parameter i cannot be stored as the optimizer stores
  //     _moved() -> whether Python code ran: is told, before anything is written, that memory is
  //         elsewhere than in the last step
  //     _announce(parameters) is told which were written
  //     _name(i), _label(i, kind) -> what to call parameter i, or one of its tensors
  //     _attributes, the optimizer's own: what torch.amp left in them for this step is dropped
  // An error leaves everything as it was. What the step changes beside memory it changes at once.
  void step(const pybind11::list& groups, const pybind11::tuple& options, size_t first, bool free,
            const pybind11::object& owner, const pybind11::object& shadows,
            const pybind11::list& changes);

  // Those of the parameters, by number, of which the device alone knows that every step of theirs
  // was skipped, for a rule that keeps no count. Waits for the device.
  std::vector<size_t> not_begun(const pybind11::list& params);

  // (number, norm, whether it is finite) of each gradient of the last step, if it measured them.
  // Waits for a device.
  std::optional<std::vector<std::tuple<size_t, double, bool>>> norms() const;

  // The tensor that the last step was given for the norm, or None.
  const pybind11::object& norm() const { return norm_; }

  // Of how many parameters the last step did not look at the states.
  size_t recalled() const { return recalled_; }

  // Whether the last step's counts were live.
  bool live() const { return lives_; }
  void set_live(bool live) { lives_ = live; }

 private:
  // A tensor in a parameter's state: a stream, or what lies beside one. The rule's states come first,
  // in its order.
  struct Slot {
    pybind11::str name;
    int stream;
    bool beside;
  };
  static constexpr int kSlots = 2 * kMaxStates + 2;
  using SlotMask = unsigned;

  // Where a state was that had no negation or conjugation pending: torch's object, and the memory.
  struct Known {
    const void *object = nullptr, *data = nullptr;
  };

  // A parameter's states and counts when nobody but the table had them. They hold until the state is
  // shown, and for the parameter as it was then.
  struct Held {
    static constexpr int kDims = 5;  // as many as torch has room for in a tensor's own object
    uint64_t shown = 0;              // how often the state had been shown; 0 is never
    SlotMask slots;                  // which of them
    Segment segment;
    Format format, grad_format;  // as the tensors have them; kNone: without a gradient
    int reals, ndim;
    void* grad;  // the last one found to have its memory
    std::array<Stream, kCounts> numbers;
    uint64_t serial;                                // no two are the same
    Lines lines;                                    // what a step looks at, the parameter's first
    size_t of_param;                                // how many those are
    std::array<int64_t, size_t{2} * kDims> layout;  // the parameter's shape and strides
  };

  // What the last step found out about a parameter.
  struct Counted {
    const void* param = nullptr;                // whose: another may get its number
    std::array<Known, kCounts + kSlots> known;  // the scalars, the slots
    bool entered = false;                       // the device has the clock
    uint64_t shown = 0;            // how often the state had been when it was last read
    unsigned tries = 0, rest = 0;  // to keep it, in vain, and the steps until the next one
  };

  // A state that is missing or no tensor, in an Entry, is null.
  struct Entry {
    std::array<pybind11::object, kCounts> scalars;
    std::array<pybind11::object, kSlots> slots;
    bool complete = true;

    bool same(const Entry& other) const {
      const auto is = [](const pybind11::object& a, const pybind11::object& b) { return a.is(b); };
      return std::equal(scalars.begin(), scalars.end(), other.scalars.begin(), is) &&
             std::equal(slots.begin(), slots.end(), other.slots.begin(), is);
    }
  };

  // A parameter that has a gradient, or is averaged or copied, in the step being taken.
  struct Active {
    size_t i;
    int group;
    bool updates;                         // it has a gradient
    SlotMask slots;                       // what the step has of its state
    pybind11::handle param, given;        // `given`: the gradient as the parameter has it
    pybind11::object grad;                // and as it is read
    pybind11::object shadow;              // likewise, or null
    std::array<Stream, kCounts> numbers;  // the scalars' memory: float32 or float64
    bool own_grad = true;                 // the gradient was read where it lies
    bool kept = false;                    // the states were not read: see Kept
    bool direct = false;                  // all of it was read where it lies
    size_t reading = 0;                   // the place in readings_, if not kept
  };

  // What was read for one of them.
  struct Reading {
    pybind11::object entry, fresh;  // its dict in the state, and what the step adds to it, or null
    std::array<pybind11::object, kCounts> scalars;
    std::array<pybind11::object, kSlots> slots;
    std::vector<pybind11::object> stand_ins;  // what else must live through the step
    size_t first_source = 0;                  // of those read for it
    Entry found;                              // in the state, as the step took it
  };

  // A tensor that was read, and what was found. One that a plain tensor stands in for has its address
  // alone, and no type: n is -1.
  struct Source {
    pybind11::handle tensor;
    const void* at;
    int64_t n = -1;
    Format format = Format::kNone;
    bool on_host = false;
  };

  // Thrown where one of a parameter's tensors has moved while another was asked for.
  struct Moved : std::exception {};

  Reading& of(const Active& a) { return readings_[a.reading]; }
  const Reading& of(const Active& a) const { return readings_[a.reading]; }
  void show();
  SlotMask slots_of(StateMask states, bool average) const;
  const Kept& kept_in(const Form& form, int stream) const;
  void collect(const pybind11::list& groups, size_t first, const Options& options,
               const pybind11::object& shadows, const pybind11::list& changes);
  bool recall(size_t place);
  void keep();
  uint64_t seen() const;
  void give_up(size_t i);
  bool alone(size_t place, const TensorView& p, pybind11::handle entry) const;
  bool in_place(size_t first) const;
  bool stayed() const;
  Entry find(const Active& a) const;
  bool takes_state(const Active& a) const;
  pybind11::list names_missing(const Active& a) const;
  void read(size_t place, bool begins);
  bool look(Active& a, const pybind11::str& kind, pybind11::object& tensor, TensorView& view,
            const void* before, Known* known = nullptr, bool on_host = false);
  bool replace(Active& a, const pybind11::str& kind, pybind11::object& tensor, TensorView& view,
               const Place& place);
  bool shows_less(size_t s, const Stream& number) const;
  Stream number(const pybind11::handle& tensor, const char* name) const;
  void check_grad(const Active& a, const TensorView& param, const TensorView& grad) const;
  void check_shadow(const Active& a, const TensorView& param, const TensorView& shadow) const;
  void check_slot(const Active& a, size_t s, const Segment& segment, const TensorView& param,
                  const TensorView& view) const;
  Clock clock_of(const Active& a, bool begins) const;
  void write_clocks();
  std::string name_of(size_t i) const;
  std::string state_label(const Active& a, const pybind11::str& name) const;

  int rule_;
  Place place_;
  TensorReader reader_;
  Storage storage_;
  std::vector<Slot> slots_;
  size_t n_states_;                     // of the rule
  std::vector<pybind11::str> scalars_;  // names
  std::vector<pybind11::str> amp_;      // what torch.amp sets for one step
  pybind11::str params_{"params"}, grads_{"grads"}, shadow_{"shadow"};
  std::vector<Counted> counted_;  // by parameter
  std::vector<Held> held_;        // likewise
  Stepper stepper_;
  pybind11::object norm_ = pybind11::none();
  std::optional<std::vector<size_t>> measured_;  // the parameters, by number
  bool lives_ = false;
  size_t recalled_ = 0;
  pybind11::object state_;
  uint64_t shown_ = 1;  // how often it was, by name
  uint64_t serial_ = 0;

  // Of the step being taken.
  bool stepping_ = false;
  uint64_t begun_ = 0;     // shown_ when it began
  pybind11::list pinned_;  // what keeps all states alive once others can drop them
  pybind11::handle owner_;
  bool live_ = false;
  std::vector<Active> active_;
  std::vector<Reading> readings_;
  std::vector<Group> groups_;
  pybind11::list written_;
  bool ran_ = false;             // Python code, which may have moved what was read before
  std::vector<Source> sources_;  // all tensors that were read
  Changes changes_;              // of the optimizer's state
  // (to, from) of copies, those of copies first.
  std::vector<std::pair<pybind11::object, pybind11::object>> back_of_copies_, back_;

  Trail trail_;

  std::vector<Tensor> tensors_;
  std::vector<uint64_t> filled_;  // the serial of what was kept that each is from, or 0
  // Of that step and of the last one. Addresses of the last one are compared, never followed.
  std::vector<Stream> gradients_, gradients_before_;
  std::vector<Stream> copies_;  // what parameters are copied to
};

}  // namespace fusedstep
