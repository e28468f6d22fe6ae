// The DLPack ABI, https://dmlc.github.io/dlpack/latest/c_api.html, as far as it is used here.
#pragma once

#include <cstdint>

#include "interface/format.h"

namespace fusedstep {

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;  // null: C-contiguous
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  struct {
    uint32_t major, minor;
  } version;
  void* context;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;  // bit 0: read-only, bit 1: a copy
  DLTensor tensor;
};

// What a framework's tensor type offers as `__dlpack_c_exchange_api__`, from DLPack 1.2 on. The
// version comes first and stays; the members after it are those of major version 1.
struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  void* previous;
  void *allocate, *from_object, *to_object;
  int (*view)(void* object, DLTensor* out);  // borrows; -1 with a Python error set if it cannot
  void* stream;
};

enum { kCpu = 1, kCudaHost = 3, kRocmHost = 11 };  // device types with CPU memory
enum { kCuda = 2, kCudaManaged = 13 };             // with a GPU's
// Dtype codes.
enum { kInt = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

// False for a type that no kernel takes.
inline bool dlpack_format(const DLTensor& t, Format& format) {
  for (int i = 1; i < kArrayFormats; ++i) {
    const FormatInfo& info = kFormatInfo[i];
    if (t.dtype.lanes != 1 || t.dtype.code != info.dlpack_code || t.dtype.bits != 8 * info.bytes) {
      continue;
    }
    format = static_cast<Format>(i);
    return true;
  }
  return false;
}

}  // namespace fusedstep
