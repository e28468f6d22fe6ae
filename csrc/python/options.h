// Python's `Options` (fusedstep/_types.py) as the core's.
#pragma once

#include <pybind11/pybind11.h>

#include "interface/options.h"

namespace fusedstep {

// Those that are the same for arrays and tensors; the defaults from None. What lies in a device's
// memory, fields 6 to 8, the caller reads.
inline Options as_options(const pybind11::object& given) {
  Options options;
  if (given.is_none()) return options;
  const auto fields = pybind11::reinterpret_borrow<pybind11::tuple>(given);
  const auto flag = [&](size_t i) { return fields[i].cast<bool>(); };
  options.factor = fields[0].cast<double>();
  if (!pybind11::object(fields[1]).is_none()) options.max_norm = fields[1].cast<double>();
  options.skip_nonfinite = flag(2);
  options.measure = !pybind11::object(fields[1]).is_none() || options.skip_nonfinite || flag(4);
  options.stream = reinterpret_cast<void*>(fields[3].cast<uintptr_t>());
  options.live = flag(5);
  if (!pybind11::object(fields[9]).is_none()) options.clip_value = fields[9].cast<double>();
  options.ema_decay = fields[10].cast<double>();
  options.average = fields[11].cast<int>();
  options.zero_grad = flag(12);
  options.seed = fields[13].cast<uint64_t>();
  return options;
}

}  // namespace fusedstep
