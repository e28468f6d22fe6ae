// The registers of the set this file is compiled for: FUSEDSTEP_TARGET names it, and its namespace.
#pragma once

#define FUSEDSTEP_STRING_(x) #x
#define FUSEDSTEP_STRING(x) FUSEDSTEP_STRING_(x)

#include FUSEDSTEP_STRING(FUSEDSTEP_TARGET.h)
