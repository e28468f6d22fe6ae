"""Checkpoints in torch's layout: what both layers check and arrange before anything is taken over.

Errors name the entry by its path, as in `state_dict['state'][0]['step'] must be ...`.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from fusedstep._hypers import FINITE, LAST, Hyper, as_number

GROUPS = "state_dict['param_groups']"

# What keeps a checkpoint's value from being changed by its owner: nothing inside can be.
_CONSTANT = (float, int, bool, str, bytes, type(None))

_SHARE = Hyper("in [0, 1]", lambda x: 0 <= x <= 1, "")

# What a rule carries from step to step beside its states.
_CARRIED = {
    "mu_product": _SHARE,
    "eta": Hyper("finite and >= 0", lambda x: 0 <= x < math.inf, ""),
    "mu": _SHARE,
}


def carried(label: str, name: str, value: Any) -> float:
    """A number that a rule carries, or TypeError or ValueError."""
    return as_number(label, value, _CARRIED[name])


def count(label: str, value: Any) -> int:
    """A number of steps, or TypeError or ValueError."""
    if type(value) is int and 0 <= value < LAST:
        return value
    number = as_number(label, value, FINITE)
    if not 0 <= number < LAST or number != int(number):
        raise ValueError(f"{label} must be an integer from 0 to 2^53 - 1, got {value!r}")
    return int(number)


def copied(label: str, value: Any) -> Any:
    """A deep copy of a value of the user's own, or TypeError."""
    if type(value) in _CONSTANT:
        return value
    try:
        return copy.deepcopy(value)
    except Exception as error:  # whatever the user's own class raises
        kind = type(value).__name__
        raise TypeError(f"{label} must be something to copy, got {kind}: {error}") from error


def parts(state_dict: Any) -> tuple[Mapping[Any, Any], list[dict[str, Any]]]:
    """The states and the groups of a checkpoint, each group with a list of distinct `params`."""
    check_mapping("state_dict", state_dict)
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"state_dict must have the key {key!r}, got {list(state_dict)}")
    states, groups = state_dict["state"], state_dict["param_groups"]
    check_mapping("state_dict['state']", states)
    _check_list(GROUPS, groups)
    for k, group in enumerate(groups):
        where = f"{GROUPS}[{k}]"
        check_mapping(where, group)
        if "params" not in group:
            raise ValueError(f"{where} must have the key 'params', got {list(group)}")
        _check_list(f"{where}['params']", group["params"])
        for i, one in enumerate(group["params"]):
            if not _is_hashable(one):
                raise TypeError(f"{where}['params'][{i}] must be a parameter's number, got {one!r}")
        if "param_names" in group:
            _check_names(f"{where}['param_names']", group["param_names"], len(group["params"]))
    return states, [dict(group) for group in groups]


def arranged(
    saved: list[dict[str, Any]], own: Sequence[Sequence[str]] | None, strict: bool
) -> tuple[list[int], list[dict[str, Any]]]:
    """The saved groups and their parameters in the order of the optimizer's, and the places of old.

    Names go before positions: where the checkpoint has those of the optimizer, a group is the one
    with the same names. Without names, by position.

    Args:
        saved: the groups of `parts`.
        own: the names of the parameters of each of the optimizer's groups; None without names.
        strict: whether names must agree, not only be used where they do.

    Raises:
        ValueError: names, groups or their sizes do not fit.
    """
    named = all("param_names" in group for group in saved if group["params"])
    if own is not None and named:
        found = [name for group in saved for name in group.get("param_names", ())]
        wanted = [name for group in own for name in group]
        if len(set(found)) < len(found):
            twice = [name for name, n in Counter(found).items() if n > 1][:8]
            raise ValueError(f"{GROUPS} must have distinct names, got {twice} more than once")
        if found and sorted(found) == sorted(wanted):
            return _by_name(saved, own)
        if found and strict:
            missing = [name for name in wanted if name not in found][:8]
            extra = [name for name in found if name not in wanted][:8]
            raise ValueError(
                f"{GROUPS} must have the names of params, got missing {missing}, unknown {extra}"
            )
    return list(range(len(saved))), saved


def check_sizes(saved: list[dict[str, Any]], sizes: list[int]) -> None:
    """Raises ValueError unless the saved groups have as many parameters as the optimizer's."""
    found = [len(group["params"]) for group in saved]
    if found != sizes:
        raise ValueError(f"{GROUPS} must hold {sizes} parameters, got {found}")


def places(saved: list[dict[str, Any]], own: Sequence[Sequence[Hashable]]) -> dict[Any, Any]:
    """What each saved parameter is here, from groups of equal sizes in the same order."""
    found: dict[Any, Any] = {}
    for k, (group, mine) in enumerate(zip(saved, own, strict=True)):
        for i, (one, here) in enumerate(zip(group["params"], mine, strict=True)):
            if found.setdefault(one, here) is not here:
                raise ValueError(f"{GROUPS}[{k}]['params'][{i}] must occur once, got {one!r} twice")
    return found


def _by_name(
    saved: list[dict[str, Any]], own: Sequence[Sequence[str]]
) -> tuple[list[int], list[dict[str, Any]]]:
    names = [list(group.get("param_names", ())) for group in saved]
    left: dict[tuple[str, ...], list[int]] = {}
    for k, its in enumerate(names):
        left.setdefault(tuple(sorted(its)), []).append(k)
    order, result = [], []
    for mine in own:
        fitting = left.get(tuple(sorted(mine)))
        if not fitting:
            raise ValueError(
                f"{GROUPS} must have {list(mine)[:8]} as one group, got groups {names[:8]}"
            )
        k = fitting.pop(0)
        number = dict(zip(names[k], saved[k]["params"], strict=True))
        order.append(k)
        result.append({**saved[k], "params": [number[n] for n in mine], "param_names": list(mine)})
    return order, result


def check_mapping(label: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{label} must be a dict, got {type(value).__name__}")


def _check_list(label: str, value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{label} must be a list, got {type(value).__name__}")


def _check_names(label: str, names: Any, n: int) -> None:
    _check_list(label, names)
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"{label}[{i}] must be a string, got {name!r}")
    if len(names) != n:
        raise ValueError(f"{label} must have a name for each of {n} parameters, got {len(names)}")


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
