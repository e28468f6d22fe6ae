// What a GPU offers a Stepper: plain data and functions, so that the module that has them need not
// be linked with this one, nor be there at all.
#pragma once

#include <cstddef>

#include "clock.h"
#include "group.h"
#include "options.h"

namespace fusedstep {

struct Device;

// Where memory is: the CPU's, or that of a device's number `index`, which works on it in the order
// of `stream`.
struct Place {
  const Device* device = nullptr;
  int index = 0;
  void* stream = nullptr;
};

constexpr int kCounts = 1 + sizeof(Clock::carry) / sizeof(double);

// One tensor of a step on a device.
struct DeviceTensor {
  Segment segment;   // its row with live counts: its group
  StateMask states;  // that it has under its group's hyperparameters
  int padding = 0;
  // With live counts:
  int64_t slot;  // where the device keeps the tensor's clock, one for each tensor
  int enters;    // whether `clock` is to be put there first
  int counts;    // whether this is an update of it
  Clock clock;
  Stream shown[kCounts];  // numbers that show the clock, and that the user may set
};

struct DeviceStep {
  int rule;
  const DeviceTensor* tensors;
  size_t n_tensors;
  const Row* rows;
  size_t n_rows;
  const Group* groups;
  size_t n_groups;
  Options options;
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
  // `begins` where it is not null: whether a tensor's average is still to begin, as all steps that
  // were to begin it were skipped.
  const char* (*read_clocks)(void* memory, const int64_t* slots, size_t n, Clock* clocks,
                             int* begins);
  const char* (*read_norm)(void* memory, double* norm);
  // Of the tensors that have elements, in the order of the last step that measured n such.
  const char* (*read_norms)(void* memory, size_t n, double* norms, int* finite);
};

}  // namespace fusedstep
