"""MLX: `optimizer.state`, in memory or as `mx.savez` and `mx.save_safetensors` write it.

A state has the count, the rate and the moments, each beside its parameter: `dense.weight.m`. It
does not say its optimizer, of which several keep the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedstep.convert import _common
from fusedstep.convert._common import Converted

_ADAM = {"m": "exp_avg", "v": "exp_avg_sq"}
# What each optimizer keeps of a parameter, by MLX' names and ours.
_KEPT: dict[str, dict[str, str]] = {
    "SGD": {"v": "momentum_buffer"},  # without momentum too, as zeros
    "RMSprop": {"v": "square_avg"},
    "Adagrad": {"v": "sum"},
    "AdaDelta": {"v": "square_avg", "u": "acc_delta"},
    **dict.fromkeys(("Adam", "AdamW"), _ADAM),
    "Adamax": {**_ADAM, "v": "exp_inf"},
    "Lion": {"m": "exp_avg"},
}


def from_mlx(
    source: Any, params: Any = None, optimizer: str | None = None, **arguments: Any
) -> Converted:
    """The state of an MLX optimizer.

    Args:
        source: `optimizer.state`, the dict of `tree_flatten` of it, or the path of a `.safetensors`
            or `.npz` file with that.
        params: the parameters, nested as in `model.trainable_parameters()`, or by names with dots:
            `dense.weight`; arrays or shapes (default None: as the state has them).
        optimizer: the name of the class, as "AdamW" (default None: the one that has such a state,
            where there is only one).
        **arguments: what the class was given, by MLX' names. `learning_rate` may be left out, which
            the state has, and must be given if it is a schedule: then the result has no rate.

    Returns:
        The state_dict for `fs.<result.optimizer>`.

    Raises:
        TypeError, ValueError: the state is of another optimizer, of several, or of other
            parameters; or the file is not whole.
        OSError: the file cannot be opened.
        ModuleNotFoundError: safetensors is missing.

    Warns:
        UserWarning: neither `optimizer` nor `arguments` say what MLX has defaults for, which are
            taken. `result.assumed` has them in any case.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.ones(2, np.float32)
        >>> state = {"step": 7, "learning_rate": np.float32(0.1), "w": {"m": w}}
        >>> found = fs.convert.from_mlx(state, {"w": w}, "Lion", betas=(0.8, 0.9))
        >>> opt = fs.Lion({"w": w})
        >>> opt.load_state_dict(found)
        >>> opt.steps, opt.param_groups[0]["lr"], opt.param_groups[0]["betas"]
        (7, 0.1, (0.8, 0.9))
    """
    wanted = _common.wanted(params)
    label, found = _common.tensors(source, "MLX'")
    if any(name.startswith("states.") for name in found):
        raise ValueError(
            f"{label} must be of one optimizer, got MultiOptimizer's: convert each of its states"
        )
    for name in ("step", "learning_rate"):
        if name not in found:
            raise ValueError(f"{label} must be an MLX optimizer's state, got no {name}")
    steps = _common.count(f"{label}: step", found.pop("step"))
    rate = found.pop("learning_rate")
    trees: dict[str, dict[str, Any]] = {}
    for name, value in found.items():
        path, _, field = name.rpartition(".")
        trees.setdefault(field, {})[path] = value
    name = _common.named(optimizer, _KEPT, trees)
    kept = _KEPT[name]
    if trees and trees.keys() != kept.keys():
        raise ValueError(f"{label} must have {', '.join(kept)} of {name}, got {', '.join(trees)}")
    one = _common.convention("mlx", name)
    given = {"learning_rate": _common.short(_common.values("learning_rate", rate)), **arguments}
    usual = _common.arguments(one)
    assumed = _common.unsaid(label, "MLX'", usual, given, is_named=bool(optimizer))
    order = _common.paths_of(label, trees, wanted)
    states = _common.gathered(label, trees, kept, order, wanted)
    ours = _common.called(one, given)
    if ours.name == "SGD" and not ours.hypers["momentum"]:
        for path in order if trees else ():
            _common.check_unused(f"{label}: {path}.v", trees["v"][path], "SGD without momentum")
        states = {}
    if wanted is None or wanted.names is None:
        wanted = _common.Wanted(order, [()] * len(order))
    groups = [_common.group(ours, range(len(order)), wanted)]
    return _common.converted("mlx", name, ours.name, groups, states, steps, assumed=assumed)


def to_mlx(state_dict: Any, *, optimizer: str | None = None) -> dict[str, Any]:
    """A state_dict as the state of an MLX optimizer.

    Args:
        state_dict: of ours, of an optimizer whose equation MLX has, with all its states and the
            parameters' names, which are to be MLX' paths: `dense.weight`.
        optimizer: the name of our class, where `state_dict` is not one of `from_mlx` and the like
            (default None).

    Returns:
        Arrays of NumPy by path, as `tree_flatten(optimizer.state)` has them; a file of them
        (`np.savez`) is one that `mx.load` reads. Into an optimizer with the same arguments:
        `opt.state = tree_unflatten([(k, mx.array(v)) for k, v in found.items()])`. The rate is
        `learning_rate`; without a rate in `state_dict` it is 0, until the schedule sets it.

    Raises:
        TypeError, ValueError: a state or a name is missing, or MLX has no such equation.
    """
    mine = _common.optimizer_of(state_dict, optimizer)
    name, _ = _common.equal_of("mlx", mine, state_dict)
    entries = _common.ordered(state_dict)
    names = _common.names_of(state_dict)
    found: dict[str, Any] = {
        "step": np.array(_common.steps_of(state_dict), np.uint64),
        "learning_rate": np.array(entries[0][2].get("lr", 0.0), np.float32),
    }
    for i, state, own in entries:
        if i not in names:
            raise ValueError("state_dict must have the parameters' names: param_names of a group")
        for field, key in _KEPT[name].items():
            if name == "SGD" and not own["momentum"]:
                continue
            found[f"{names[i].replace('/', '.')}.{field}"] = _common.need(state, key, i)
    return found
