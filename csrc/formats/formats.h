// Every format of interface/format.h, a line each.
#pragma once

#include "bf16.h"
#include "f16.h"
#include "f32.h"
#include "f64.h"
#include "kahan.h"
#include "q8.h"
#include "split.h"
