// The options of one step: what holds for all of its tensors beside hyperparameters.
#pragma once

#include "format.h"

namespace fusedstep {

// Each is a keyword of Python's step(), or where it runs. `stream`, `live` and `scale` matter on a
// device only; `found_inf` and `norm` lie where the parameters do.
struct Options {
  double factor = 1;                    // multiplies the gradients, before their norm is taken
  double max_norm = __builtin_inf();    // to which the gradients are clipped
  double clip_value = __builtin_inf();  // to which each element is clipped then
  double ema_decay = 0;                 // of the averages, where there are any
  uint64_t seed = 0;                    // of what is rounded at random
  int measure = false;                  // their norm is wanted, that of all and of each tensor
  int skip_nonfinite = false;           // an infinite or NaN gradient: nothing changes at all
  int zero_grad = false;                // they become zero
  int average = 0;                      // parameters are averaged, for the so manieth time
  int padding = 0;
  // The device alone knows how many updates a tensor has had, and prepares the scalars: a skipped
  // step does not count, and a recorded one counts when replayed.
  int live = false;

  void* stream = nullptr;  // in the order of which the device works
  // Numbers in memory, where there are any: float32 or float64 on a device, on the CPU `found_inf` is
  // float32 and `norm` float64.
  Stream scale = {};      // the gradients were multiplied by it
  Stream found_inf = {};  // not 0: nothing changes at all
  Stream norm = {};       // where the norm of all is to be written
};

// What follows from the gradients' norm.
struct Verdict {
  double norm, factor;  // the factor clips too
  int skip;
};

}  // namespace fusedstep
