// How an optimizer stores its streams: Python's `Storage` (fusedstep/_storage.py) as the core's formats.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "interface/format.h"
#include "step/engine.h"
#include "step/rules.h"

namespace fusedstep {

// One stream's; `beside` is the key in a parameter's state of what lies beside it, empty where
// nothing does.
struct Kept {
  Format format = Format::kNone;
  Rounding rounding = Rounding::kNearest;
  std::string beside;

  Stream stream(void* data, void* beside_it) const { return {data, format, rounding, beside_it}; }
};

// Those of a parameter in one of the arrays' formats.
struct Form {
  Kept param, ema;
  std::vector<Kept> states;  // in the rule's order
};

inline Format format_of(const std::string& name) {
  for (int i = 1; i < kFormats; ++i) {
    if (name == kFormatInfo[i].name) return static_cast<Format>(i);
  }
  throw std::invalid_argument("format must be one of the core's, got '" + name + "'");
}

class Storage {
 public:
  // From `Storage.native`; from None all is in the formats that a step computes in, and rounded to
  // nearest.
  Storage(const Rule& rule, const pybind11::object& native) {
    for (int i = 1; i < kArrayFormats; ++i) {
      const auto format = static_cast<Format>(i);
      const Kept wide = {state_format(format), Rounding::kNearest, {}};
      forms_[i] = {{format, Rounding::kNearest, {}}, wide, {}};
      forms_[i].states.assign(rule.states.size(), wide);
      if (native.is_none()) continue;
      const auto all = native[kFormatInfo[i].name].cast<pybind11::list>();
      forms_[i].param = as_kept(all[0]);
      for (size_t s = 0; s < rule.states.size(); ++s) forms_[i].states[s] = as_kept(all[1 + s]);
      forms_[i].ema = as_kept(all[1 + rule.states.size()]);
    }
  }

  const Form& of(Format param) const { return forms_[static_cast<int>(param)]; }

 private:
  static Kept as_kept(const pybind11::handle& given) {
    const auto fields = pybind11::reinterpret_borrow<pybind11::tuple>(given);
    return {format_of(fields[0].cast<std::string>()),
            fields[1].cast<bool>() ? Rounding::kStochastic : Rounding::kNearest,
            fields[2].cast<std::string>()};
  }

  std::array<Form, kArrayFormats> forms_;
};

}  // namespace fusedstep
