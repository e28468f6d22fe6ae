"""What the torch that is installed has, asked of it: older ones lack some of what tests ask for."""

import inspect

import pytest
import torch
from torch.distributed import checkpoint

import fusedstep.torch as ft


def lacks(what):
    """The reason of a skip."""
    return f"torch {torch.__version__} has no {what}"


def needs(has, what):
    return pytest.mark.skipif(not has, reason=lacks(what))


def _takes_names():
    try:
        torch.optim.SGD([("w", torch.nn.Parameter(torch.ones(1)))])
    except TypeError:
        return False
    return True


# Without the exchange functions (torch < 2.10) each step looks at all states: TensorTable::keep.
EXCHANGE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
needs_exchange = needs(EXCHANGE, "DLPack functions for C: storages are asked for")
NAMES = _takes_names()
needs_names = needs(NAMES, "optimizers over named parameters")
# What torch's checkpoints warn of: one process; in torch 2.4.0 storages, which it writes itself.
OF_DCP = "torch.distributed is (disabled|unavailable)|TypedStorage is deprecated"
NO_DIST = "no_dist" in inspect.signature(checkpoint.save).parameters
# What AdamW's groups have here, and those of torch 2.4.0 have not.
NEW_KEYS = {"decoupled_weight_decay"} - torch.optim.AdamW(
    [torch.nn.Parameter(torch.ones(1))]
).param_groups[0].keys()


def named(module):
    """A module's parameters, with their names where optimizers take them."""
    return module.named_parameters() if NAMES else module.parameters()


def recalled(opt: ft.Optimizer, params: int):
    """Whether the last step looked at all states but those of so many parameters, if it can."""
    return opt._table.recalled == (params if EXCHANGE else 0)
