// What a step changes beside memory, so that no signal's handler finds half of it: Python runs such
// handlers, and raises what they raise, only while Python code runs.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <utility>
#include <vector>

namespace fusedstep {

// How often a commit tries what it owes. What fails as often is no interruption, and finds no memory.
constexpr int kCommitTries = 8;

// Dicts, and what each is to take over; `key` in a dict keeps its place, and the dict its identity.
class Changes {
 public:
  Changes() = default;
  explicit Changes(const pybind11::list& pairs) {
    for (const pybind11::handle pair : pairs) {
      const auto both = pair.cast<pybind11::tuple>();
      add(both[0].cast<pybind11::dict>(), both[1].cast<pybind11::dict>());
    }
  }

  void add(pybind11::dict into, pybind11::dict from) {
    all_.emplace_back(std::move(into), std::move(from));
  }

  // No hash is computed, and nothing compared but identities and strings: a dict is taken over from
  // another with the hashes that it keeps. Only memory for a dict that grows may be missing.
  void make() const {
    for (const auto& [into, from] : all_) {
      for (int tries = 1; PyDict_Update(into.ptr(), from.ptr()) != 0; ++tries) {
        if (tries == kCommitTries) throw pybind11::error_already_set();
        PyErr_Clear();
      }
    }
  }

 private:
  std::vector<std::pair<pybind11::dict, pybind11::dict>> all_;
};

// Runs calls that a step owes once memory has changed. One that a signal's handler interrupts, or
// that finds no memory, is made again, and what was raised is raised when all is done.
class Insistence {
 public:
  template <class Call>
  void run(const Call& call) {
    for (int tries = 0; tries < kCommitTries; ++tries) {
      try {
        call();
        return;
      } catch (const std::exception&) {  // not the end of a thread, which must go on
        if (!first_) first_ = std::current_exception();
      }
    }
  }
  void raise() {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

// Tells autograd of tensors that were written to behind its back, so that a backward through their
// old values raises. `announce` is torch's function, or None.
inline void announce_to(const pybind11::object& announce, const pybind11::list& written) {
  if (announce.is_none() || written.empty()) return;
  Insistence insistence;
  insistence.run([&] { announce(written); });
  insistence.raise();
}

}  // namespace fusedstep
