// A StepTable whose tensors and gradients are Python's arrays.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "memory.h"
#include "step.h"

namespace fusedstep {

class ArrayTable {
 public:
  // `params` are the arrays to update, `groups[i]` the group of tensor i. There are no states yet.
  // `device` is None, or what device_capsule() of an extension module gives.
  ArrayTable(const std::string& rule, std::vector<std::string> names, const pybind11::list& params,
             std::vector<int> groups, const pybind11::object& device, int index);

  // (updates done, carry[0], carry[1])
  using ClockTuple = std::tuple<int64_t, double, double>;

  // Replaces all states and clocks, or throws and keeps what it had: `states[s][i]` is state s of
  // tensor i, or None where the rule's variant has none.
  void set_states(const std::vector<pybind11::list>& states, const std::vector<ClockTuple>& clocks);
  std::vector<ClockTuple> clocks();

  // (gradients' factor, maximal norm or None, skip non-finite ones, device's stream) or None.
  using Asked = std::optional<std::tuple<double, std::optional<double>, bool, uintptr_t>>;

  // One entry per tensor, an array or None. Each group is (maximize, decoupled, weight_decay,
  // hyperparameters in the rule's order). Returns the number of elements updated.
  int64_t step(const pybind11::sequence& grads, const std::vector<std::vector<double>>& groups,
               const Asked& asked);

  // The same with all gradients in one flat array, tensor i's at element offsets[i] of it.
  int64_t step_flat(pybind11::handle grads, const std::vector<int64_t>& offsets,
                    const std::vector<std::vector<double>>& groups, const Asked& asked);

  // Of the last step, if it was asked for a norm: the norm, and whether it was skipped, which a
  // device does not tell.
  double norm() const;
  bool skipped() const { return outcome_.skipped; }

  // Shapes and dtype names of the parameters.
  std::vector<pybind11::tuple> shapes() const;
  std::vector<std::string> dtypes() const;

 private:
  struct Param {
    pybind11::object array;  // as given: it owns the memory, and is looked at again in each step
    std::vector<int64_t> shape;
    View view;  // with the shape above
  };

  void check_params(const Place& place) const;
  int64_t run(const std::vector<Grad>& grads, const std::vector<std::vector<double>>& groups,
              const Asked& asked);
  Place place_for(const Asked& asked) const;

  int rule_;
  Place place_;
  std::vector<std::string> names_;
  std::vector<Param> params_;
  std::vector<View> states_;  // for their owners
  std::vector<int> groups_;
  StepTable table_;
  Outcome outcome_ = {};
};

}  // namespace fusedstep
