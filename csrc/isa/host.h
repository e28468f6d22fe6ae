// The host's view of the rules: it computes their scalars in double and never runs their equations.
#pragma once

#define FN inline
