// The GPUs of this machine, and what they offer a Stepper.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "interface/device.h"

namespace fusedstep {

const Device& device();

struct DeviceInfo {
  std::string name;
  int major, minor;  // compute capability
  int64_t bytes;
  int multiprocessors;
};

// None where there is no driver.
std::vector<DeviceInfo> devices();

struct FreeDevice {
  void operator()(char* memory) const;
};
using DeviceMemory = std::unique_ptr<char, FreeDevice>;

// Zeroed memory of a GPU, for what has no other owner. Its calls wait for the device.
class Allocation {
 public:
  Allocation(size_t bytes, int index);
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;

  void read(size_t from, void* to, size_t bytes) const;
  void write(size_t to, const void* from, size_t bytes);
  void* data() const { return memory_.get(); }
  size_t bytes() const { return bytes_; }
  int index() const { return index_; }

 private:
  void check_range(size_t at, size_t bytes) const;

  DeviceMemory memory_;
  size_t bytes_;
  int index_;
};

}  // namespace fusedstep
