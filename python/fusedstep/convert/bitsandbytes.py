"""bitsandbytes: the state_dict of its optimizers, with states of 32 bits and of 8.

It has torch's layout, but one name for all states and one place for all hyperparameters: `state1`,
`state2` and `betas`, whoever they belong to. A state of 8 bits is a code for each element, which
stands for a number in `qmap`, times the largest magnitude of its block, in `absmax`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedstep import _checkpoint
from fusedstep._arrays import as_tensors
from fusedstep.convert import _common
from fusedstep.convert import torch as _torch
from fusedstep.convert._common import Converted, State

# Our names of `state1` and `state2`, and what `betas`, or the first of them, is called.
_KEPT: dict[str, tuple[tuple[str, ...], str]] = {
    "SGD": (("momentum_buffer",), "momentum"),
    "RMSprop": (("square_avg",), "alpha"),
    "Adagrad": (("sum",), ""),
    **dict.fromkeys(("Adam", "AdamW"), (("exp_avg", "exp_avg_sq"), "betas")),
    "Lion": (("exp_avg",), "betas"),
}
_HYPERS = ("lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3")
_BLOCKS = (256, 2048)  # elements that share a magnitude; 2048 before 0.44
# What is in no state of these, and of what it is.
_OTHERS = {
    "unorm_vec": "LAMB, LARS, or max_unorm",
    "gnorm_vec": "percentile_clipping",
    "max1": "8 bits without blocks",
}
_WRAPPED = "__bnb_optimizer_quant_state__"  # a dict with all else of a parameter's state


def from_bitsandbytes(
    source: Any, params: Any = None, optimizer: str | None = None, *,
    decay_after: bool | None = None,
) -> Converted:  # fmt: skip
    """The state_dict of a bitsandbytes optimizer, states of 8 bits as the float32 they stand for.

    Args:
        source: the state_dict, a dict that has one and no second, or the path of a file that
            `torch.save` wrote of either. It is read with `weights_only=True`.
        params: the parameters in the optimizer's order: arrays, tensors or shapes, in a dict by
            name, a list, or as `model.named_parameters()` (default None: no names, and shapes are
            not compared).
        optimizer: the class's name, as "Lion" or "PagedAdamW8bit" (default None: AdamW, or Adam,
            which is the same there, and the only one with two states).
        decay_after: of Adam and AdamW, whether decay comes after the update, as on CUDA devices,
            or before, as on others (default None: before, which `result.assumed` says). A
            state_dict does not say where it was.

    Returns:
        The state_dict for `fs.<result.optimizer>`. Options that bitsandbytes takes and ignores are
        not in it.

    Raises:
        TypeError, ValueError: it is no such state_dict, of another optimizer (LAMB, LARS, AdEMAMix
            have no equal here), or has other states or shapes; the message has which.
        ModuleNotFoundError: a path was given, and torch is missing.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> qmap, codes = np.linspace(-1, 1, 256, dtype=np.float32), np.array([0, 255], np.uint8)
        >>> entry = {"step": 7, "state1": codes, "qmap1": qmap, "absmax1": np.full(1, 0.5, "f4")}
        >>> group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.0, "weight_decay": 0, "params": [0]}
        >>> state = {"state": {0: entry}, "param_groups": [group]}
        >>> found = fs.convert.from_bitsandbytes(state, {"w": (2,)}, "Lion8bit")
        >>> found.step, found["state"][0]["exp_avg"]
        (7, array([-0.5,  0.5], dtype=float32))
    """
    entries, groups = _checkpoint.parts(_torch.held(source))
    entries = {i: _unwrapped(i, entry) for i, entry in entries.items()}
    name = _named(optimizer, entries)
    one = _common.convention("bitsandbytes", name)
    ours, layout = "", []
    for own in groups:
        made = _common.called(one, _arguments(name, own))
        extra = {"decay_after": True} if decay_after else {}
        rest = {key: value for key, value in own.items() if key not in _HYPERS}
        heeded = {**made.hypers, **extra}
        layout.append({**rest, **heeded, _checkpoint.BEYOND: list(heeded)})
        ours = made.name
    states = {i: _state(name, i, entry) for i, entry in entries.items() if entry}
    steps = max((_common.count("step", state["step"]) for state in states.values()), default=0)
    plain = {"state": states, "param_groups": layout}
    result = _torch.from_torch(plain, params, ours, step=steps)
    result.library, result.theirs = "bitsandbytes", name
    asked = {"decay_after": False} if len(_KEPT[name][0]) == 2 else {}
    said = {} if decay_after is None else {"decay_after": decay_after}
    # All that a group has not, the library ignores.
    result.assumed = _common.unsaid("source", "bitsandbytes'", asked, said, is_named=True)
    return result


def to_bitsandbytes(state_dict: Any, *, optimizer: str | None = None) -> dict[str, Any]:
    """A state_dict as one of bitsandbytes, with states of 32 bits, in tensors.

    Args:
        state_dict: of ours, of an optimizer whose equation bitsandbytes has, with all its states in
            float32 or narrower.
        optimizer: the name of our class, where `state_dict` is not one of a `from_` function
            (default None).

    Returns:
        The state_dict for a bitsandbytes optimizer of any `optim_bits`, which goes on in 32 bits.

    Raises:
        TypeError, ValueError: a state is missing or in another format, a group has no `lr`, or
            bitsandbytes has no such equation.
        ModuleNotFoundError: torch is missing.
    """
    mine = _common.optimizer_of(state_dict, optimizer)
    usual = _common.defaults(mine)
    groups = [{**usual, **own} for own in state_dict["param_groups"]]
    # Where decay stands is the device's matter.
    alike = {"param_groups": [{**own, "decay_after": False} for own in groups]}
    name, _ = _common.equal_of("bitsandbytes", mine, alike, of_group=None)
    one, (keys, first) = _common.convention("bitsandbytes", name), _KEPT[name]
    layout = []
    for k, (own, said) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        if "lr" not in said:
            raise ValueError(
                f"state_dict['param_groups'][{k}] must have lr: the rate was a schedule, give it"
                " the number"
            )
        found = _common.their_arguments(one, own)
        betas = found[first] if first == "betas" else (found.get(first, 0.0), 0.0)
        made = {"lr": own["lr"], "betas": betas, "eps": found.get("eps", 0.0)}
        made["weight_decay"] = own["weight_decay"]
        if len(keys) == 2:
            made |= {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
        rest = {key: value for key, value in own.items() if key not in usual}
        layout.append({**rest, **made, "params": list(own["params"])})
    steps, states = _common.steps_of(state_dict), {}
    for i, entry, _ in _common.ordered(state_dict):
        if not entry:
            continue
        made = {}
        for k, key in enumerate(keys, 1):
            array = _common.need(entry, key, i)
            if array.dtype == np.float64:
                where = f"state_dict['state'][{i!r}][{key!r}]"
                raise TypeError(f"{where} must be float32 or narrower, got float64")
            made[f"state{k}"] = np.array(array, np.float32)
        # A step of 1 is one without a buffer there.
        states[i] = {"step": max(int(entry.get("step", steps)), 1), **as_tensors(made)}
    return {"state": states, "param_groups": layout}


def _unwrapped(i: Any, entry: Any) -> State:
    """A parameter's state, without the dict around a part of it."""
    _checkpoint.check_mapping(f"state[{i!r}]", entry)
    inside = entry.get(_WRAPPED, {})
    _checkpoint.check_mapping(f"state[{i!r}]['{_WRAPPED}']", inside)
    return {**{key: value for key, value in entry.items() if key != _WRAPPED}, **inside}


def _named(optimizer: str | None, entries: Mapping[Any, State]) -> str:
    """The optimizer's name, without what says how its states are kept."""
    if optimizer is not None:
        return re.sub(r"^Paged|(8|32)bit$", "", optimizer)
    if any("state2" in entry for entry in entries.values()):
        return "AdamW"
    alike = ", ".join(name for name, (keys, _) in _KEPT.items() if len(keys) == 1)
    raise ValueError(f"optimizer must be given: state1 without state2 may be of {alike}")


def _arguments(name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """What a group's optimizer was given, as far as it is heeded."""
    for key in _HYPERS[:4]:
        if key not in own:
            raise ValueError(f"param_groups must have {key} of {name}, got {sorted(own)}")
    if len(own["betas"]) > 2:
        raise ValueError(f"betas must be two of {name}, got {own['betas']}, as of AdEMAMix")
    first = _KEPT[name][1]
    found = {"lr": own["lr"], "weight_decay": own["weight_decay"]}
    if first:
        found[first] = own["betas"] if first == "betas" else own["betas"][0]
    if "eps" in _common.arguments(_common.convention("bitsandbytes", name)):
        found["eps"] = own["eps"]
    return found


def _state(name: str, i: Any, entry: State) -> State:
    """A parameter's state by our names; ValueError for one of another optimizer."""
    keys = _KEPT[name][0]
    parts = [f"{part}{k + 1}" for k in range(len(keys)) for part in ("state", "qmap", "absmax")]
    known = ["step", *parts]
    for key in entry:
        if key not in known:
            why = f", which is of {_OTHERS[key]}" if key in _OTHERS else ""
            told = ", ".join(key for key in known if key.startswith("st"))
            raise ValueError(f"state[{i!r}] must have {told} of {name}, got {key!r}{why}")
    for key in ("step", *parts[::3]):
        if entry.get(key) is None:
            raise ValueError(f"state[{i!r}] must have {key!r} of {name}, got {sorted(entry)}")
    found = {key: _decoded(f"state[{i!r}]", entry, str(k)) for k, key in enumerate(keys, 1)}
    return {"step": entry["step"], **found}


def _decoded(label: str, entry: State, k: str) -> NDArray[Any]:
    """A state as it is, or what its codes stand for."""
    codes = _common.values(f"{label}['state{k}']", entry[f"state{k}"])
    if codes.dtype != np.uint8:
        return codes
    qmap, absmax = (
        _common.array(f"{label}['{key}']", _of(label, entry, key))
        for key in (f"qmap{k}", f"absmax{k}")
    )
    if qmap.shape != (256,):
        raise ValueError(f"{label}['qmap{k}'] must have shape (256,), got {qmap.shape}")
    for block in _BLOCKS:
        if absmax.shape == (-(-codes.size // block),):
            scales = np.repeat(absmax, block)[: codes.size].reshape(codes.shape)
            values: NDArray[Any] = qmap[codes] * scales
            return values
    sizes = " or ".join(f"({-(-codes.size // block)},)" for block in _BLOCKS)
    raise ValueError(f"{label}['absmax{k}'] must have shape {sizes}, got {absmax.shape}")


def _of(label: str, entry: State, key: str) -> Any:
    if key not in entry:
        raise ValueError(f"{label} must have {key!r} beside codes of 8 bits, got {sorted(entry)}")
    return entry[key]
