// What a step changes beside memory, so that no signal's handler finds half of it: Python runs such
// handlers, and raises what they raise, only while Python code runs.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <utility>
#include <vector>

namespace fusedstep {

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
  // another with the hashes that it keeps.
  void make() const {
    for (const auto& [into, from] : all_) {
      if (PyDict_Update(into.ptr(), from.ptr()) != 0) throw pybind11::error_already_set();
    }
  }

 private:
  std::vector<std::pair<pybind11::dict, pybind11::dict>> all_;
};

// Runs calls that a step owes once memory has changed. One that a signal's handler interrupts is
// made again, and what the handler raised is raised when all is done.
class Insistence {
 public:
  template <class Call>
  void run(const Call& call) {
    for (int tries = 0; tries < kTries; ++tries) {
      try {
        call();
        return;
      } catch (pybind11::error_already_set& error) {
        if (!first_) first_.emplace(error);
      }
    }
  }
  void raise() {
    if (first_) throw pybind11::error_already_set(*first_);
  }

 private:
  static constexpr int kTries = 8;  // what fails as often is no interruption
  std::optional<pybind11::error_already_set> first_;
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
