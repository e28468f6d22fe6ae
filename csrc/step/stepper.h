// One optimizer's tensors as a table, and the step that sweeps them all in one parallel region.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "interface/device.h"
#include "interface/kernels.h"
#include "rules.h"

namespace fusedstep {

const char* dtype_name(DType dtype);
int64_t dtype_bytes(DType dtype);
DType state_dtype(DType param);  // float64 under float64, else float32

// The place of a combination in kTypePairs, or -1 where no kernel takes it.
int type_pair(DType param, DType grad);

// A group from (maximize, decoupled, weight_decay, then the rule's hyperparameters in its order);
// throws std::invalid_argument if there are more or fewer.
Group as_group(const std::vector<double>& values, int rule);

struct Grad {
  const void* data = nullptr;
  DType dtype = DType::f32;
  bool given = false;  // if not, its tensor sits the step out
};

struct Tensor {
  void* param;
  DType dtype;
  int64_t n;
  std::array<void*, kMaxStates> state;  // null where there is none
  int group;
  Clock clock;

  // On a device, with live counts:
  int64_t slot = 0;                      // where the device keeps the clock
  bool entered = false;                  // and whether it has it
  std::array<Live, kCounts> shown = {};  // numbers in its memory that show the clock
};

// What a step did. A device is not waited for: it alone knows whether it skipped, and the norm.
struct Outcome {
  int64_t elements;  // updated
  bool skipped;      // for a gradient that is not finite
  double norm;       // of the gradients, where it was to be measured
};

// One call at a time: the caller holds the optimizer's Turn (turn.h).
class StepTable {
 public:
  // `name_of` says what error messages call a tensor; step() calls it from the caller's thread.
  // Memory is the CPU's, or that of a device's number `index`.
  StepTable(int rule, std::function<std::string(size_t)> name_of, const Device* device = nullptr,
            int index = 0);
  ~StepTable();
  StepTable(const StepTable&) = delete;
  StepTable& operator=(const StepTable&) = delete;

  // Replaces all tensors. Their memory must not overlap: throws std::invalid_argument naming two
  // that do, and keeps what it had. Costs little where all memory is where it was.
  void set_tensors(const std::vector<Tensor>& tensors);

  // Waits for the device where it alone counts.
  std::vector<Clock> clocks();

  const std::vector<Tensor>& tensors() const { return tensors_; }

  // Of one tensor. After a step with live counts it is of no use.
  const Clock& clock(size_t tensor) const { return tensors_[tensor].clock; }

  // Updates every tensor that has a gradient. There is one gradient per tensor, of a type that goes
  // with the parameter's. Throws std::invalid_argument before it has written anything if a gradient
  // lies over memory that the step writes.
  Outcome step(const std::vector<Grad>& grads, const std::vector<DeviceGroup>& groups,
               const Control& control = {});

  // The clocks that the device has at these slots; waits for it.
  std::vector<Clock> device_clocks(const std::vector<int64_t>& slots) const;

  // The norm of the last step on a device that measured one; waits for the device.
  double device_norm() const;

 private:
  struct Range {
    uintptr_t begin, end;
    size_t tensor;
    int stream;  // -1 the parameter, else the state
  };
  bool in_place(const std::vector<Tensor>& tensors) const;
  std::string describe(size_t tensor, int stream) const;
  void check_overlap(const std::vector<Grad>& grads);
  Verdict measure(const std::vector<Grad>& grads, const Control& control) const;
  int row_of(const Tensor& tensor, const Group& group, double factor);
  void plan(const std::vector<Grad>& grads, const std::vector<DeviceGroup>& groups, bool live,
            double factor);
  void sweep_here(const std::vector<Grad>& grads);
  void sweep_there(const std::vector<Grad>& grads, const std::vector<DeviceGroup>& groups,
                   const Control& control);
  void fetch_clocks();

  int rule_;
  std::function<std::string(size_t)> name_of_;
  std::vector<Tensor> tensors_;
  std::vector<Range> written_;  // by address
  std::vector<Grad> clear_;     // gradients known to lie outside written_

  const Device* device_;
  void* memory_ = nullptr;  // the device's

  // Of the step being taken; members so that their memory is there for the next one.
  struct Part {
    size_t tensor;
    int row;        // in rows_, or with live counts the group
    unsigned uses;  // bit i: the step has state i
  };
  std::vector<Part> parts_;
  std::vector<Row> rows_;
  struct Prepared {  // what a row was prepared from, and the clock that follows
    int group;
    Clock before, after;
  };
  std::vector<Prepared> prepared_;  // of rows_
  std::vector<int> row_at_;         // by hash, or -1: rows_ found again; its size is a power of two
  std::vector<Segment> segments_;
  std::vector<int64_t> starts_;
  std::vector<Clock> advanced_;
  std::vector<DeviceTensor> there_;
};

}  // namespace fusedstep
