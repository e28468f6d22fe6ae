// One optimizer's tensors as a table, and the step that sweeps them all in one parallel region.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "rules.h"
#include "rules/clock.h"

namespace fusedstep {

const char* dtype_name(DType dtype);
int64_t dtype_bytes(DType dtype);

// The place of a combination in kTypePairs, or -1 where no kernel takes it.
int type_pair(DType param, DType grad);

// Hyperparameters that hold for all tensors of a group in one step.
struct Group {
  bool maximize, decoupled;
  double weight_decay;
  std::array<double, kMaxHypers> hypers;  // in the rule's order, lr first
};

struct Grad {
  const void* data;  // null: this tensor sits the step out
  DType dtype;
};

struct Tensor {
  std::string name;
  void* param;
  DType dtype;
  int64_t n;
  std::array<void*, kMaxStates> state;  // null where there is none
  int group;
  Clock clock;
};

class StepTable {
 public:
  explicit StepTable(int rule) : rule_(rule) {}

  // The tensors' memory must not overlap: throws std::invalid_argument naming two that do.
  void set_tensors(std::vector<Tensor> tensors);
  std::vector<Tensor>& tensors() { return tensors_; }
  const std::vector<Tensor>& tensors() const { return tensors_; }

  // Updates every tensor that has a gradient, whose type must go with the parameter's. Throws
  // std::invalid_argument before it has written anything unless there is one gradient per tensor
  // and none lies over memory that the step writes. Returns the number of elements updated.
  int64_t step(const std::vector<Grad>& grads, const std::vector<Group>& groups);

 private:
  struct Range {
    uintptr_t begin, end;
    size_t tensor;
    int stream;  // -1 the parameter, else the state
  };
  std::string describe(const Range& range) const;
  void check(const std::vector<Grad>& grads) const;

  int rule_;
  std::vector<Tensor> tensors_;
  std::vector<Range> written_;      // by address
  std::vector<Grad> checked_;       // gradients of the last step, known not to overlap
  std::atomic<pid_t> stepping_{0};  // the process that is in a step
};

}  // namespace fusedstep
