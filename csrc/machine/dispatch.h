// Which instruction sets this build has, which this machine can run, and which one runs.
#pragma once

#include <string>
#include <vector>

#include "interface/kernels.h"

namespace fusedstep {

std::vector<std::string> compiled_isas();  // slowest first
std::vector<std::string> usable_isas();

// The chosen set: FUSEDSTEP_ISA if it is set, else the last usable one.
const std::string& isa();
const Kernels& kernels();

// Throws std::invalid_argument, listing the usable sets, for a name that is not one of them.
void set_isa(const std::string& name);

}  // namespace fusedstep
