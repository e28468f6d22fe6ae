// The engine as a table of functions, for other modules of this build.
#pragma once

#include "interface/stages.h"

namespace fusedstep {

const Stages& stages();

}  // namespace fusedstep
