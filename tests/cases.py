"""The table of optimizers and keyword sets that every parametrised test walks.

A new optimizer adds its line here; test_reference.py checks that each hyperparameter is somewhere
given a value that is not its default. Most sets have a large lr, so that an error in the update is
seen in the parameter. Coupled weight_decay is at most 0.1, so that `g + weight_decay*p` of inputs
between 1/2 and 2 does not cancel. Betas below 1/2 are dyadic, so that `1 - beta` is exact in the
reference: rounded to double it would be a fair part of what float64 results may be off by.
"""

import inspect
import itertools
import math

import pytest

import fusedstep as fs
from fusedstep import _core

CASES = {
    "SGD": [
        {},
        {"lr": 0.5, "weight_decay": 0.1},
        {"lr": 0.5, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.3, "momentum": 0.9},
        {"lr": 0.3, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05},
        {"lr": 0.3, "momentum": 0.9, "nesterov": True},
        {"lr": 0.3, "momentum": 0.7, "nesterov": True, "weight_decay": 0.1, "maximize": True},
        {
            "lr": 0.3,
            "momentum": 0.8,
            "dampening": 0.3,
            "dampen_first": True,
            "nesterov": True,
            "dampened_nesterov": True,
            "lr_in_momentum": True,
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
        },
        {"lr": 0.0, "momentum": 0.9},
    ],
    "Lion": [
        {},
        {"lr": 0.1, "betas": (0.95, 0.98), "weight_decay": 0.1},
        {"lr": 0.1, "betas": (0.3, 0.5), "weight_decay": 0.1, "maximize": True},
        {"lr": 0.1, "betas": (0.0, 0.9)},
        {"lr": 0.1, "betas": (0.9, 0.0)},
        {"lr": 0.0},
    ],
    "Adagrad": [
        {},
        {"lr": 1.0, "lr_decay": 0.1},
        {"lr": 0.5, "initial_accumulator_value": 0.1, "eps": 0.0, "weight_decay": 0.1},
        {"lr": 0.5, "eps": 0.5, "weight_decay": 0.1, "maximize": True},
        {
            "lr": 0.5,
            "eps": 0.1,
            "eps_root": 0.2,
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
        },
        {"lr": 0.0},
    ],
    "RMSprop": [
        {},
        {"lr": 0.5, "alpha": 0.9, "eps": 1e-3},
        {"lr": 0.5, "alpha": 0.0},
        {"lr": 0.5, "centered": True},
        {"lr": 0.5, "centered": True, "alpha": 0.375, "eps": 0.1},
        {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 0.3, "momentum": 0.7, "centered": True, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.3, "eps": 0.0},
        {"lr": 0.3, "momentum": 0.8, "nesterov": True, "eps_root": 0.1, "bias_correction": True},
        {
            "lr": 0.3,
            "alpha": 0.9,
            "eps": 0.1,
            "eps_root": 0.1,
            "centered": True,
            "momentum": 0.8,
            "lr_in_momentum": True,
            "initial_accumulator_value": 1.0,
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
        },
        {"lr": 0.3, "eps_root": 0.1, "bias_correction": True},
        {"lr": 0.0, "momentum": 0.9},
    ],
    "Adadelta": [
        {},
        {"lr": 0.5, "rho": 0.8, "eps": 1e-3},
        {"lr": 0.5, "weight_decay": 0.1},
        {"lr": 0.5, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"eps": 0.0},
        {"lr": 0.0},
    ],
    "Adam": [
        {},
        {"lr": 0.3, "betas": (0.8, 0.9), "eps": 0.01},
        {"lr": 0.3, "betas": (0.5, 0.99), "weight_decay": 0.1},
        {"lr": 0.3, "betas": (0.25, 0.95), "weight_decay": 0.1, "maximize": True},
        {"lr": 0.3, "betas": (0.0, 0.9)},
        {"lr": 0.3, "betas": (0.9, 0.0)},
        {"lr": 0.3, "eps": 0.0},
        {"lr": 0.3, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.3, "amsgrad": True},
        {
            "lr": 0.3,
            "amsgrad": True,
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
            "maximize": True,
        },
        {"lr": 0.1, "bias_correction": False},
        {"lr": 0.1, "bias_correction": False, "amsgrad": True, "weight_decay": 0.1},
        {
            "lr": 0.3,
            "betas": (0.8, 0.9),
            "eps": 0.1,
            "eps_root": 0.1,
            "eps_hat": True,
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
            "decay_after": True,
        },
        {"lr": 0.3, "amsgrad": True, "amsgrad_corrected": True, "eps_root": 0.1},
        {"lr": 0.0},
    ],
    "AdamW": [
        {},
        {"lr": 0.3, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.3, "betas": (0.375, 0.9), "eps": 0.01, "weight_decay": 0.2},
        {"lr": 0.3, "weight_decay": 0.0, "eps": 0.0},
        {"lr": 0.3, "amsgrad": True},
        {"lr": 0.1, "bias_correction": False, "weight_decay": 0.1},
        {
            "lr": 0.3,
            "eps": 0.1,
            "eps_root": 0.1,
            "eps_hat": True,
            "decay_after": True,
            "amsgrad": True,
            "amsgrad_corrected": True,
        },
        {"lr": 0.0},
    ],
    "Adamax": [
        {},
        {"lr": 0.3, "betas": (0.8, 0.9), "eps": 0.1},
        {"lr": 0.3, "betas": (0.5, 0.99), "weight_decay": 0.1},
        {"lr": 0.3, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.3, "betas": (0.0, 0.9), "eps": 0.0},
        {
            "lr": 0.3,
            "eps_norm": 0.1,
            "weight_decay": 0.1,
            "decoupled_weight_decay": True,
        },
        {"lr": 0.3, "eps_divisor": 0.1, "bias_correction": False},
        {"lr": 0.0},
    ],
    "NAdam": [
        {},
        {"lr": 0.3, "betas": (0.8, 0.9), "eps": 0.01, "momentum_decay": 0.02},
        {"lr": 0.3, "betas": (0.25, 0.95), "weight_decay": 0.1},
        {"lr": 0.3, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.3, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.3, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        {"lr": 0.3, "betas": (0.0, 0.9)},
        {"lr": 0.3, "eps": 0.0, "momentum_decay": 0.0},
        {"lr": 0.3, "eps": 0.1, "eps_root": 0.1, "momentum_decay": math.inf},
        {"lr": 0.0},
    ],
    "RAdam": [
        {},
        {"lr": 0.3, "betas": (0.8, 0.9), "eps": 0.01},
        {"lr": 0.3, "betas": (0.375, 0.95), "weight_decay": 0.1},
        {"lr": 0.3, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.3, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.3, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        {"lr": 0.3, "betas": (0.0, 0.9), "eps": 0.0},
        {"lr": 0.3, "eps": 0.1, "eps_root": 0.1, "eps_hat": False, "threshold": 4.0},
        {"lr": 0.0},
    ],
    "ASGD": [
        {},
        {"lr": 0.5, "lambd": 0.1, "alpha": 0.5, "t0": 1.0},
        {"lr": 0.5, "lambd": 0.2, "t0": 3.0, "weight_decay": 0.1},
        {"lr": 0.5, "alpha": 1.0, "t0": 0.0, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.0, "t0": 2.0},
    ],
    "Rprop": [
        {},
        {"lr": 0.1, "etas": (0.3, 1.7), "step_sizes": (0.05, 0.4)},
        {"lr": 0.5, "weight_decay": 0.1},
        {"lr": 0.5, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.0},
    ],
}

# Every format of the core's table, and every mix of a parameter's and its gradient's.
FORMATS = list(_core.formats())
PAIRS = list(itertools.product(FORMATS, FORMATS))


# Those that torch.optim has not.
WITHOUT_PEER = {"Lion"}

# How slowly the mean of gradients decays, where that is not betas[0] or alpha.
MEAN_DECAY = {"Lion": lambda hypers: max(hypers["betas"])}


def _text(name, hypers):
    return "-".join([name, *(f"{key}={value}" for key, value in hypers.items())])


def each_case(accepts=lambda name, hypers: True):
    """Parametrises a test over `name` and `hypers` of every case that `accepts` takes."""
    found = [
        pytest.param(name, hypers, id=_text(name, hypers))
        for name, sets in CASES.items()
        for hypers in sets
        if accepts(name, hypers)
    ]
    return pytest.mark.parametrize(("name", "hypers"), found)


def each_pair(accepts=lambda param, grad: True):
    """Parametrises a test over the formats `param` and `grad`."""
    found = [pytest.param(*pair, id="/".join(pair)) for pair in PAIRS if accepts(*pair)]
    return pytest.mark.parametrize(("param", "grad"), found)


def each_case_in_turn(pairs=4):
    """Parametrises a test over every case, each with so many of the mixes, all of them in turn.

    A rule's equation and the formats do not know of each other, so that not every product of
    the two is something new; native/identity.cpp has all of it.
    """
    found = []
    for name, sets in CASES.items():
        for k, hypers in enumerate(sets):
            for pair in (PAIRS[(5 * (k * pairs + i)) % len(PAIRS)] for i in range(pairs)):
                text = "-".join([_text(name, hypers), "/".join(pair)])
                found.append(pytest.param(name, hypers, *pair, id=text))
    return pytest.mark.parametrize(("name", "hypers", "param", "grad"), found)


def defaults(name):
    """The hyperparameters of an optimizer class with their defaults, from its signature."""
    parameters = inspect.signature(getattr(fs, name)).parameters.items()
    return {key: p.default for key, p in parameters if key in getattr(fs, name)._spec.table}


def mean_decay(name, hypers):
    """The decay rate of the gradients' mean, 1 where there is none."""
    usual = hypers.get("betas", [hypers.get("alpha", 1)])[0]
    return MEAN_DECAY[name](hypers) if name in MEAN_DECAY else usual


def make(name, params, hypers):
    """The optimizer of a case."""
    return getattr(fs, name)(params, **hypers)


def load(opt, t, states):
    """Makes the next update of `opt` number `t`, with one dict of states per parameter."""
    entries = {}
    for i, state in enumerate(states):
        entries[i] = dict(state)
        if opt._spec.counts_steps:
            entries[i]["step"] = t - 1
    groups = opt.state_dict()["param_groups"]
    opt.load_state_dict({"state": entries, "param_groups": groups, "step": t - 1})
