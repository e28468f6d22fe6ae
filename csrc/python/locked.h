// What Python's global lock guards, guarded where an interpreter has none ("free-threaded").
#pragma once

#include <pybind11/pybind11.h>

#include <type_traits>
#include <utility>

namespace fusedstep {

// Holds an object's own lock for as long as it lives. As with the global one, whatever waits for
// others, Python code and `Unlocked` among it, lets go of it meanwhile: so it guards what runs from one
// such place to the next, and no more. Nothing where there is a global lock.
class Locked {
 public:
#ifdef Py_GIL_DISABLED
  explicit Locked(pybind11::handle object) { PyCriticalSection_Begin(&section_, object.ptr()); }
  ~Locked() { PyCriticalSection_End(&section_); }

 private:
  PyCriticalSection section_;
#else
  explicit Locked(pybind11::handle) {}
  ~Locked() {}  // NOLINT(modernize-use-equals-default): else it is an unused variable
#endif

 public:
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;
};

// A method for pybind11, that runs while it has its object's lock. It returns copies: what a
// reference points to is another thread's as soon as it has returned.
#ifdef Py_GIL_DISABLED
template <class T, class Method, class R, class... Args>
auto locked_method(Method method) {
  return [method](const pybind11::object& self, Args... args) -> std::decay_t<R> {
    const Locked locked(self);
    return (self.cast<T&>().*method)(std::forward<Args>(args)...);
  };
}
template <class T, class R, class... Args>
auto locked(R (T::*method)(Args...)) {
  return locked_method<T, decltype(method), R, Args...>(method);
}
template <class T, class R, class... Args>
auto locked(R (T::*method)(Args...) const) {
  return locked_method<T, decltype(method), R, Args...>(method);
}
#else
template <class Method>
Method locked(Method method) {
  return method;
}
#endif

}  // namespace fusedstep
