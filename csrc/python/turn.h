// Whose turn it is with an optimizer: one step, load or reading of its state at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "machine/parallel.h"

namespace fusedstep {

// A thread holds its turn for all of a step, the Python code in it included, so that another
// thread's step finds neither half of it. The second one is told, not let in. A process forked in
// the middle of a step is not in one.
class Turn {
 public:
  enum Kind { kAlone, kReading };

  // Holds the turn for as long as it lives. A thread may read within its own step: a signal's
  // handler that saves a checkpoint does. Throws std::runtime_error for what must wait.
  class Holder {
   public:
    Holder(Turn& turn, Kind kind, const char* what) : turn_(turn) {
      const uint64_t me = token();
      uint64_t before = turn.holder_.load();
      if (before == me) {
        if (kind == kReading) return;
        throw std::runtime_error(std::string(what) +
                                 " must not be called from inside a step of the same optimizer");
      }
      const bool stale = before >> 32 != me >> 32;  // of before a fork, or nobody's
      if ((before && !stale) || !turn.holder_.compare_exchange_strong(before, me)) {
        throw std::runtime_error("this optimizer is already stepping in another thread");
      }
      held_ = true;
    }
    ~Holder() {
      if (held_) turn_.holder_ = 0;
    }
    Holder(const Holder&) = delete;
    Holder& operator=(const Holder&) = delete;

   private:
    Turn& turn_;
    bool held_ = false;
  };

 private:
  // This thread, of this process: never 0.
  static uint64_t token() {
    static std::atomic<uint32_t> threads{0};
    thread_local const uint32_t me = ++threads;
    return static_cast<uint64_t>(generation()) << 32 | me;
  }

  std::atomic<uint64_t> holder_{0};
};

}  // namespace fusedstep
