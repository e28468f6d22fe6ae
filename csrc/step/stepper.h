// One optimizer's tensors from step to step: what may be written, their clocks, and the five stages of
// a step: check, measure, prepare, sweep, commit.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"
#include "interface/device.h"

namespace fusedstep {

// A group from (maximize, decoupled, weight_decay, then the rule's hyperparameters in its order);
// throws std::invalid_argument if there are more or fewer.
Group as_group(const std::vector<double>& values, int rule);

struct Tensor {
  Segment segment;  // but for the gradient, the copy and the row, which are a step's
  Counted counted;

  // On a device, with live counts:
  int64_t slot = 0;                        // where the device keeps the clock
  bool entered = false;                    // and whether it has it
  std::array<Stream, kCounts> shown = {};  // numbers in its memory that show the clock
};

// What a step did. A device is not waited for: it alone knows whether it skipped, and the norms.
struct Outcome {
  int64_t elements = 0;  // updated
  bool skipped = false;  // for a gradient that is not finite
  double norm = 0;       // of the gradients, where it was to be measured
};

// The norm of one tensor's gradient, and whether its elements are finite.
struct Norm {
  double norm;
  bool finite;
};

// One call at a time: the caller holds the optimizer's Turn (python/turn.h).
class Stepper {
 public:
  struct Range {
    uintptr_t begin, end;
    size_t tensor;
    int stream;
  };
  // What set_tensors() replaces.
  struct Kept {
    std::vector<Tensor> tensors;
    std::vector<Range> written;
    std::vector<Stream> clear;
  };

  // `name_of` says what error messages call a tensor; step() calls it from the caller's thread.
  // Memory is the CPU's, or that of a device's number `index`.
  Stepper(int rule, std::function<std::string(size_t)> name_of, const Device* device = nullptr,
          int index = 0);
  ~Stepper();
  Stepper(const Stepper&) = delete;
  Stepper& operator=(const Stepper&) = delete;

  // Replaces all tensors. Their memory must not overlap: throws std::invalid_argument naming two
  // that do, and keeps what it had. Costs little where all memory is where it was.
  void set_tensors(const std::vector<Tensor>& tensors);

  // Its tensors as they are, to be put back when a step fails: that must need no memory.
  Kept keep() const;
  void put_back(Kept kept) noexcept;

  // Waits for the device where it alone counts.
  std::vector<Clock> clocks();

  const std::vector<Tensor>& tensors() const { return tensors_; }

  // Of one tensor. After a step with live counts it is of no use.
  const Clock& clock(size_t tensor) const { return tensors_[tensor].counted.clock; }

  // Updates every tensor that has a gradient: grads[i] is tensor i's, of format kNone for one that
  // sits the update out. `shadows` has what copies of the parameters go to, or is empty. Throws
  // std::invalid_argument before it has written anything if memory that the step writes overlaps
  // other memory of it.
  Outcome step(const std::vector<Stream>& grads, const std::vector<Group>& groups,
               const Options& options = {}, const std::vector<Stream>& shadows = {});

  // Of each tensor's gradient in the last step that measured them, times Options::factor; none for
  // one that had no gradient. Waits for the device.
  std::vector<std::optional<Norm>> norms() const;

  // The clocks that the device has at these slots; waits for it.
  std::vector<Clock> device_clocks(const std::vector<int64_t>& slots) const;

  // The norm of the last step on a device that measured one; waits for the device.
  double device_norm() const;

 private:
  bool in_place(const std::vector<Tensor>& tensors) const;
  std::string describe(size_t tensor, int stream) const;

  void check(const std::vector<Stream>& grads, const std::vector<Group>& groups,
             const Options& options, const std::vector<Stream>& shadows);
  void check_apart(const Stream& stream, size_t tensor, int k);
  void check_extra(const Options& options) const;
  Verdict measure(const Options& options, Measured& measured) const;
  void prepare(const std::vector<Group>& groups, double factor, const Options& options);
  void sweep_there(const std::vector<Group>& groups, const Options& options);
  void commit(const Options& options, Outcome& outcome);
  void fetch_clocks();

  int rule_;
  std::function<std::string(size_t)> name_of_;
  std::vector<Tensor> tensors_;
  std::vector<Range> written_;  // by address
  std::vector<Stream> clear_;   // gradients known to lie outside written_

  const Device* device_;
  void* memory_ = nullptr;  // the device's

  // Of the step being taken; members so that their memory is there for the next one.
  std::vector<Segment> segments_;
  std::vector<Counted> counted_;
  Plan plan_;
  std::vector<DeviceTensor> there_;

  Measured measured_;
  double factor_ = 1;  // of the gradients that were measured
  // On a device, of those that took part: whether they have elements.
  std::vector<std::optional<bool>> measured_there_;
};

}  // namespace fusedstep
