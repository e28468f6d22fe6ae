// Python's global lock, given back for as long as the core computes.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

namespace fusedstep {

// As pybind11::gil_scoped_release, but fit for the end of the process: Python ends a daemon thread
// that asks for the lock then by unwinding its stack, and a destructor lets nothing be thrown out
// of it, so that std::terminate would abort the process. Such a thread is parked instead.
// https://docs.python.org/3/c-api/init.html#c.PyEval_RestoreThread
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // glibc's forced unwinding, which must not be stopped: it is not, it waits
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace fusedstep
