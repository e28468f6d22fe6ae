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
DType state_dtype(DType param);  // float64 under float64, else float32

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

// Every public call throws std::runtime_error, and does nothing, while another thread's step runs.
class StepTable {
 public:
  explicit StepTable(int rule) : rule_(rule) {}

  // Replaces all tensors. Their memory must not overlap: throws std::invalid_argument naming two
  // that do, and keeps what it had.
  void set_tensors(std::vector<Tensor> tensors);

  std::vector<Clock> clocks() const;

  // Updates every tensor that has a gradient, and returns the number of elements updated. There is
  // one gradient per tensor, of a type that goes with the parameter's. Throws std::invalid_argument
  // before it has written anything if a gradient lies over memory that the step writes.
  int64_t step(const std::vector<Grad>& grads, const std::vector<Group>& groups);

 private:
  struct Range {
    uintptr_t begin, end;
    size_t tensor;
    int stream;  // -1 the parameter, else the state
  };
  std::string describe(const Tensor& tensor, int stream) const;
  void check_overlap(const std::vector<Grad>& grads) const;

  int rule_;
  std::vector<Tensor> tensors_;
  std::vector<Range> written_;              // by address
  mutable std::atomic<pid_t> stepping_{0};  // the process that is in a step, or in a call like it
};

}  // namespace fusedstep
