// Every rule, one line each. A rule's number is its place here; nothing else names them all.
#pragma once

#include "adadelta.h"
#include "adagrad.h"
#include "adam.h"
#include "adamax.h"
#include "asgd.h"
#include "ceiling.h"
#include "lion.h"
#include "lookahead.h"
#include "nadam.h"
#include "radam.h"
#include "rmsprop.h"
#include "rprop.h"
#include "sgd.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

using Registry = List<  //
    Sgd,                //
    Adagrad,            //
    RmsProp,            //
    Adam,               //
    NAdam,              //
    Adamax,             //
    Adadelta,           //
    RAdam,              //
    Asgd,               //
    Rprop,              //
    Lion,               //
    LookAhead,          //
    Ceiling>;

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
