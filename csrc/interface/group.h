// The hyperparameters of one step, as plain data: the host and a GPU prepare scalars from them.
#pragma once

#include "kernels.h"

namespace fusedstep {

// Whether weight decay is part of the gradient, or shrinks the parameter before or after the update.
enum Decoupled { kPartOfGradient, kBeforeUpdate, kAfterUpdate };

// What holds for all tensors of a group in one step.
struct Group {
  int maximize, decoupled;  // ints leave no padding, as tables are compared as bytes; see Decoupled
  double weight_decay;
  double hypers[kMaxHypers];  // in the rule's order, lr first
  Stream lr = {};             // in the device's memory, in place of the first hyperparameter
};

}  // namespace fusedstep
