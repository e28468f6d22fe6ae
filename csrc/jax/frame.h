// One call by XLA: arrays in, arrays out, attributes by name, read through the C header of its FFI. The
// C++ header beside that one would bring iostreams, twice the module's size in a wheel.
#pragma once

#include <xla/ffi/api/c_api.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>

namespace fusedstep::jax {

// What is wrong with a call that Python made: a fault of ours. What is the user's is an invalid_argument.
class Wrong : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class T>
struct Span {
  const T* data = nullptr;
  size_t size = 0;

  const T& operator[](size_t i) const { return data[i]; }
  const T* begin() const { return data; }
  const T* end() const { return data + size; }
};

template <class T>
constexpr XLA_FFI_DataType kType = XLA_FFI_DataType_INVALID;
template <>
constexpr XLA_FFI_DataType kType<int32_t> = XLA_FFI_DataType_S32;
template <>
constexpr XLA_FFI_DataType kType<int64_t> = XLA_FFI_DataType_S64;
template <>
constexpr XLA_FFI_DataType kType<double> = XLA_FFI_DataType_F64;

// A dense array of XLA's. `bytes` are an element's.
class Array {
 public:
  explicit Array(const void* buffer) : buffer_(static_cast<const XLA_FFI_Buffer*>(buffer)) {}

  int64_t n() const {
    int64_t n = 1;
    for (int64_t i = 0; i < buffer_->rank; ++i) n *= buffer_->dims[i];
    return n;
  }
  int bytes() const {
    switch (buffer_->dtype) {
      case XLA_FFI_DataType_F64:
      case XLA_FFI_DataType_S64:
        return 8;
      case XLA_FFI_DataType_F32:
      case XLA_FFI_DataType_S32:
      case XLA_FFI_DataType_U32:
        return 4;
      case XLA_FFI_DataType_BF16:
      case XLA_FFI_DataType_F16:
      case XLA_FFI_DataType_S16:
        return 2;
      case XLA_FFI_DataType_U8:
        return 1;
      default:
        throw Wrong("an array has a type that no stream has");
    }
  }
  char* data() const { return static_cast<char*>(buffer_->data); }

  // Whole numbers and floats of either size, as JAX has them with and without 64 bits.
  int64_t integer(int64_t i) const { return wide() ? get<int64_t>(i) : get<int32_t>(i); }
  double number(int64_t i) const { return wide() ? get<double>(i) : get<float>(i); }
  void put(int64_t i, double value) const {
    if (wide()) {
      set(i, value);
    } else {
      set(i, static_cast<float>(value));
    }
  }
  bool wide() const { return bytes() == 8; }

  // Element i, which may lie at any place.
  template <class T>
  T get(int64_t i) const {
    T value;
    std::memcpy(&value, data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <class T>
  void set(int64_t i, const T& value) const {
    std::memcpy(data() + i * sizeof(T), &value, sizeof(T));
  }

 private:
  const XLA_FFI_Buffer* buffer_;
};

class Frame {
 public:
  explicit Frame(const XLA_FFI_CallFrame& frame) : frame_(frame) {}

  int64_t arguments() const { return frame_.args.size; }
  int64_t results() const { return frame_.rets.size; }
  Array argument(int64_t i) const {
    if (i >= arguments()) throw Wrong("a call has too few arguments");
    return Array(frame_.args.args[i]);
  }
  Array result(int64_t i) const {
    if (i >= results()) throw Wrong("a call has too few results");
    return Array(frame_.rets.rets[i]);
  }

  std::string_view text(const char* name) const {
    const auto* found =
        static_cast<const XLA_FFI_ByteSpan*>(attribute(name, XLA_FFI_AttrType_STRING));
    return {found->ptr, found->len};
  }
  template <class T>
  Span<T> span(const char* name) const {
    const auto* found = static_cast<const XLA_FFI_Array*>(attribute(name, XLA_FFI_AttrType_ARRAY));
    if (found->dtype != kType<T>) throw Wrong(std::string(name) + " has another type");
    return {static_cast<const T*>(found->data), found->size};
  }

 private:
  const void* attribute(const char* name, XLA_FFI_AttrType type) const {
    const XLA_FFI_Attrs& all = frame_.attrs;
    for (int64_t i = 0; i < all.size; ++i) {
      if (std::string_view(all.names[i]->ptr, all.names[i]->len) == name && all.types[i] == type) {
        return all.attrs[i];
      }
    }
    throw Wrong(std::string("a call has no ") + name);
  }

  const XLA_FFI_CallFrame& frame_;
};

inline XLA_FFI_Error* error_of(const XLA_FFI_Api* api, XLA_FFI_Error_Code code,
                               const std::string& words) {
  XLA_FFI_Error_Create_Args arguments = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr,
                                         words.c_str(), code};
  return api->XLA_FFI_Error_Create(&arguments);
}

// A function of a frame as XLA calls it. Asked for it, it tells XLA which version of the FFI it speaks.
template <void (*kBody)(const Frame&)>
XLA_FFI_Error* handler(XLA_FFI_CallFrame* frame) {
  const XLA_FFI_Extension_Base* extension = frame->extension_start;
  if (extension && extension->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* told =
        reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    told->api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                         XLA_FFI_API_MINOR};
    told->traits = 0;
    return nullptr;
  }
  try {
    kBody(Frame(*frame));
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return error_of(frame->api, XLA_FFI_Error_Code_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return error_of(frame->api, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "a step found no memory");
  } catch (const std::exception& error) {
    return error_of(frame->api, XLA_FFI_Error_Code_INTERNAL,
                    std::string("fusedstep: ") + error.what());
  }
}

}  // namespace fusedstep::jax
