// One optimizer's tensors as a table, and the step that sweeps them all in one parallel region.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
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

// A group from (maximize, decoupled, weight_decay, then the rule's hyperparameters in its order);
// throws std::invalid_argument if there are more or fewer.
Group as_group(const std::vector<double>& values, int rule);

struct Grad {
  const void* data;  // null: this tensor sits the step out
  DType dtype;
};

struct Tensor {
  void* param;
  DType dtype;
  int64_t n;
  std::array<void*, kMaxStates> state;  // null where there is none
  int group;
  Clock clock;
};

// One step at a time: the second thread is told, not let in. A process forked in the middle of a
// step is not in one.
class Turn {
 public:
  static constexpr int kNobody = -1;  // else the generation() whose thread is in a step

  // Throws std::runtime_error while another thread of this process has its turn.
  explicit Turn(std::atomic<int>& stepping);
  ~Turn() { stepping_ = kNobody; }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  std::atomic<int>& stepping_;
};

// Every public call throws std::runtime_error, and does nothing, while another thread's step runs.
class StepTable {
 public:
  // `name_of` says what error messages call a tensor; step() calls it from the caller's thread.
  StepTable(int rule, std::function<std::string(size_t)> name_of)
      : rule_(rule), name_of_(std::move(name_of)) {}

  // Replaces all tensors. Their memory must not overlap: throws std::invalid_argument naming two
  // that do, and keeps what it had. Costs little where all memory is where it was.
  void set_tensors(const std::vector<Tensor>& tensors);

  std::vector<Clock> clocks() const;

  // Of one tensor; not while a step runs.
  const Clock& clock(size_t tensor) const { return tensors_[tensor].clock; }

  // Updates every tensor that has a gradient, and returns the number of elements updated. There is
  // one gradient per tensor, of a type that goes with the parameter's; all are multiplied by
  // `factor`. Throws std::invalid_argument before it has written anything if a gradient lies over
  // memory that the step writes.
  int64_t step(const std::vector<Grad>& grads, const std::vector<Group>& groups, double factor = 1);

 private:
  struct Range {
    uintptr_t begin, end;
    size_t tensor;
    int stream;  // -1 the parameter, else the state
  };
  bool in_place(const std::vector<Tensor>& tensors) const;
  std::string describe(size_t tensor, int stream) const;
  void check_overlap(const std::vector<Grad>& grads);

  int rule_;
  std::function<std::string(size_t)> name_of_;
  std::vector<Tensor> tensors_;
  std::vector<Range> written_;  // by address
  std::vector<Grad> clear_;     // gradients known to lie outside written_
  mutable std::atomic<int> stepping_{Turn::kNobody};

  // Of the step being taken; members so that their memory is there for the next one.
  std::vector<Segment> segments_;
  std::vector<int64_t> starts_;
  std::vector<Clock> advanced_;
  std::deque<std::array<double, kMaxScalars>> scalars_;
};

}  // namespace fusedstep
