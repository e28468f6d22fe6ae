// What one tensor remembers between steps beside its arrays.
#pragma once

#include <stdint.h>

namespace fusedstep {

struct Clock {
  int64_t t;        // updates done; prepare() sees the number of the one it prepares, from 1
  double carry[2];  // the rule's running scalars, such as NAdam's mu_product; zero before t = 1
};

}  // namespace fusedstep
