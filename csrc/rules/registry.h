// Every rule, one line each. A rule's number is its place here; nothing else names them all.
#pragma once

#include "adadelta.h"
#include "adagrad.h"
#include "adam.h"
#include "adamax.h"
#include "asgd.h"
#include "ceiling.h"
#include "lion.h"
#include "nadam.h"
#include "radam.h"
#include "rmsprop.h"
#include "rprop.h"
#include "sgd.h"

namespace fusedstep {
namespace FUSEDSTEP_TARGET {

template <class... Rule>
struct List {
  static constexpr int kSize = sizeof...(Rule);
};

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
    Ceiling>;

static_assert(Registry::kSize == kRules, "kernels.h sizes its table by kRules");

}  // namespace FUSEDSTEP_TARGET
}  // namespace fusedstep
