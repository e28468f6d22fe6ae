// Every format of interface/format.h, a line each.
#pragma once

#include "bf16.h"
#include "f16.h"
#include "f32.h"
#include "f64.h"
