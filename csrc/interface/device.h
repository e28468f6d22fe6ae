// What a GPU offers a StepTable: plain data and functions, so that the module that has them need not
// be linked with this one, nor be there at all.
#pragma once

#include <cstddef>

#include "clock.h"
#include "group.h"

namespace fusedstep {

struct Device;

// Where memory is: the CPU's, or that of a device's number `index`, which works on it in the order
// of `stream`.
struct Place {
  const Device* device = nullptr;
  int index = 0;
  void* stream = nullptr;
};

// A number in device memory, float32 or float64; null where there is none.
struct Live {
  void* at;
  DType dtype;
  int padding = 0;  // tables are compared as bytes
};

// What a step is asked beside gradients and hyperparameters.
struct Control {
  double factor = 1;                  // multiplies the gradients, before their norm is taken
  bool measure = false;               // the global norm of the gradients is wanted
  double max_norm = __builtin_inf();  // to which it is clipped
  bool skip_nonfinite = false;        // an infinite or NaN gradient: nothing changes at all

  // On a device only. With live counts the device alone knows how many updates a tensor has had, and
  // prepares the scalars: a skipped step does not count, and a recorded one counts when replayed.
  void* stream = nullptr;
  bool live = false;
  Live scale = {nullptr, DType::f32};      // the gradients were multiplied by it
  Live found_inf = {nullptr, DType::f32};  // not 0: nothing changes at all
  Live norm = {nullptr, DType::f64};       // where the norm is to be written
};

// What follows from the gradients' norm.
struct Verdict {
  double norm, factor;  // the factor clips too
  int skip;
};

constexpr int kCounts = 1 + sizeof(Clock::carry) / sizeof(double);

struct DeviceTensor {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  int64_t n;
  int pair;       // in kTypePairs
  unsigned uses;  // bit i: the step has state i
  int row;        // in DeviceStep's rows, or with live counts in its groups
  // With live counts:
  int64_t slot;  // where the device keeps the tensor's clock, one for each tensor
  bool enters;   // and `clock` is to be put there first
  Clock clock;
  Live shown[kCounts];  // numbers that show the clock, and that the user may set
};

struct DeviceGroup {
  Group group;
  Live lr;  // in place of the group's, if there
};

struct DeviceStep {
  int rule;
  const DeviceTensor* tensors;
  size_t n_tensors;
  const Row* rows;
  size_t n_rows;
  const DeviceGroup* groups;
  size_t n_groups;
  Control control;
};

// Every function but `close` returns null, or what went wrong, which is said until the thread's next
// call; nothing has been queued then.
struct Device {
  size_t size;  // of this struct, for a mismatch of builds
  int kind;     // DLPack's device type
  const char* (*open)(int index, void** memory);
  void (*close)(void* memory);
  const char* (*step)(void* memory, const DeviceStep* step);
  // Makes a device the thread's current one: exporters refuse to show memory of another.
  const char* (*use)(int index, int* before);
  // The device that memory belongs to.
  const char* (*index_of)(const void* at, int* index);
  // What is queued on `then` from now on runs after what is queued on `first` so far.
  const char* (*order)(int index, void* first, void* then);
  // Wait for the device.
  const char* (*read_clocks)(void* memory, const int64_t* slots, size_t n, Clock* clocks);
  const char* (*read_norm)(void* memory, double* norm);
};

}  // namespace fusedstep
