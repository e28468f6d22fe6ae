// A Stepper whose tensors and gradients are Python's arrays.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "options.h"
#include "step/stepper.h"
#include "storage.h"

namespace fusedstep {

class ArrayTable {
 public:
  // `params` are the arrays to update, `groups[i]` the group of tensor i. There are no states yet.
  // `device` is None, or what device_capsule() of an extension module gives; `storage` None or
  // `Storage.native`.
  ArrayTable(const std::string& rule, std::vector<std::string> names, const pybind11::list& params,
             std::vector<int> groups, const pybind11::object& device, int index,
             const pybind11::object& storage);

  // (updates done, carry[0], carry[1])
  using ClockTuple = std::tuple<int64_t, double, double>;

  // What is known beside memory: the states' arrays by name, one or None for each tensor, with what
  // lies beside them and the averages; the steps taken, and the averages among them; and the groups
  // as the last of them read them, or none. All of it changes in step() and load() alone, at once,
  // with no Python code on the way that could be interrupted.
  const pybind11::dict& states() const { return states_; }
  int64_t steps() const { return steps_; }
  int64_t averages() const { return averages_; }
  // Whether every tensor has an array for its average.
  bool averaged() const { return averaged_; }
  const std::vector<std::vector<double>>& used() const { return used_; }
  std::vector<ClockTuple> clocks();

  // Replaces all of that, and updates dicts of Python objects that go with it: `changes` has pairs
  // of a dict and what it takes over. Or throws and keeps what it had.
  void load(const pybind11::dict& states, const std::vector<ClockTuple>& clocks, int64_t steps,
            std::vector<std::vector<double>> used, const pybind11::list& changes, int64_t averages);

  // (steps taken, elements updated)
  using Taken = std::pair<int64_t, int64_t>;

  // One entry per tensor, an array or None. Each group is (maximize, decoupled, weight_decay,
  // hyperparameters in the rule's order). `options` is None or Python's Options. `states` is None, or
  // replaces the states, some of which begin with this step. `announce` is None or called with the
  // tensors that were written to. `shadow` is None, or has an array or None for each tensor.
  Taken step(const pybind11::sequence& grads, const std::vector<std::vector<double>>& groups,
             const pybind11::object& options, const pybind11::object& states,
             const pybind11::object& announce, const pybind11::object& shadow);

  // The same with all gradients in one flat array, tensor i's at element offsets[i] of it.
  Taken step_flat(pybind11::handle grads, const std::vector<int64_t>& offsets,
                  const std::vector<std::vector<double>>& groups, const pybind11::object& options,
                  const pybind11::object& states, const pybind11::object& announce,
                  const pybind11::object& shadow);

  // Swaps the parameters and their averages, in place, and back the next time; no parameter may be
  // written in between. Throws before it has changed anything, and in itself is not interrupted.
  void swap();
  bool swapped() const { return swapped_; }

  // Of the gradients of the last step, if it measured them; waits for a device.
  std::optional<double> norm() const;
  // Of each tensor's, with whether it is finite; None for one that had none.
  std::optional<std::vector<std::optional<std::pair<double, bool>>>> norms() const;

  // Shapes and dtype names of the parameters.
  std::vector<pybind11::tuple> shapes() const;
  std::vector<std::string> dtypes() const;

 private:
  struct Param {
    pybind11::object array;  // as given: it owns the memory, and is looked at again in each step
    std::vector<int64_t> shape;
    View view;  // with the shape above
  };

  // States as the stepper takes them, checked.
  struct States {
    std::vector<Tensor> tensors;
    std::vector<View> views;  // for their owners
    bool averaged = true;
  };

  // What a step is given for each tensor: a View without owner for None.
  struct Given {
    std::vector<View> grads, shadows;
  };

  static bool quiet(pybind11::handle array);
  void check_param(size_t i, const Place& place) const;
  Given read(const pybind11::tuple& grads, const pybind11::tuple& shadows, bool zero_grad,
             const Place& place) const;
  pybind11::tuple as_shadows(const pybind11::object& shadow) const;
  States staged(const pybind11::dict& states, const std::vector<Clock>& clocks) const;
  View state_view(pybind11::handle array, size_t i, const std::string& key, Format format) const;
  Taken run(const std::vector<Stream>& grads, const std::vector<View>& shadows,
            const std::vector<std::vector<double>>& groups, const Options& options,
            const pybind11::object& states, const pybind11::object& announce,
            const pybind11::list& written);
  Place place_for(const Options& options) const;

  int rule_;
  Storage storage_;
  Place place_;
  std::vector<std::string> names_;
  std::vector<Param> params_;
  std::vector<int> groups_;
  Stepper stepper_;

  pybind11::dict states_;
  std::vector<View> views_;
  int64_t steps_ = 0, averages_ = 0;
  bool averaged_ = false;
  bool swapped_ = false;
  std::vector<std::vector<char>> kept_;  // parameters' own bytes, where a swap cannot hold them
  std::vector<std::vector<double>> used_;
  bool measured_ = false;
  double norm_ = 0;  // of a step that measured it here; a device keeps it
};

}  // namespace fusedstep
