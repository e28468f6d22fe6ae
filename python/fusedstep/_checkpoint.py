"""Checkpoints in torch's layout: what both layers check and arrange before anything is taken over.

Errors name the entry by its path, as in `state_dict['state'][0]['step'] must be ...`.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusedstep._arrays import as_array, as_dtype, to_host
from fusedstep._hypers import FINITE, LAST, SHARE, Hyper, as_number, kept_schedules
from fusedstep._spec import Spec
from fusedstep._storage import EMA, PARAM_BESIDE, Form, Stored, in_q8
from fusedstep._types import Clock

if TYPE_CHECKING:
    from fusedstep.schedules import Resumed

GROUPS = "state_dict['param_groups']"

# A group's key for the hyperparameters beyond torch's that it heeds: those that fusedstep.torch's
# constructor was given by name. Clients put keys of any optimizer into their groups, and torch's
# classes look only at their own; so do ours, at theirs and these.
BEYOND = "fusedstep"

# Types without anything inside that its owner could change.
_CONSTANT = (float, int, bool, str, bytes, type(None))

# Ranges of the numbers that rules carry from step to step.
_CARRIED = {
    "mu_product": SHARE,
    "eta": Hyper("finite and >= 0", lambda x: 0 <= x < math.inf, ""),
    "mu": SHARE,
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


def places(saved: list[dict[str, Any]], own: Sequence[Sequence[Hashable]]) -> dict[Any, Any]:
    """This optimizer's parameter for each saved one, or ValueError for groups of other sizes."""
    sizes, mine = [len(group["params"]) for group in saved], list(map(len, own))
    if sizes != mine:
        raise ValueError(f"{GROUPS} must hold {mine} parameters, got {sizes}")
    found: dict[Any, Any] = {}
    for k, (group, ours) in enumerate(zip(saved, own, strict=True)):
        for i, (one, here) in enumerate(zip(group["params"], ours, strict=True)):
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


def given(entry: Mapping[Any, Any]) -> list[Any]:
    """The keys of a saved state that have a value."""
    return [key for key, value in entry.items() if value is not None]


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


class Holder(NamedTuple):
    """A neutral optimizer, as far as a checkpoint must fit it."""

    spec: Spec
    names: Sequence[str]  # of the parameters
    named: bool  # whether a checkpoint's names must be these
    groups: Sequence[tuple[Mapping[str, Any], Sequence[int]]]  # hyperparameters and parameters
    shapes: Sequence[tuple[int, ...]]
    forms: Sequence[Form]  # of the parameters and their states
    wide: Sequence[str]  # the dtypes that they are computed in
    quiet: Mapping[str, Any]  # what a whole group of ours leaves out: options at their defaults


class Loaded(NamedTuple):
    """A checkpoint that fits, as the optimizer is to have it."""

    steps: int
    hypers: list[dict[str, Any]]  # of each group
    others: list[dict[str, Any]]  # its keys that are no hyperparameters
    uses: list[list[str]]  # the states that the next step has
    schedules: Resumed
    begun: dict[int, tuple[Clock, dict[str, Stored]]]  # clocks and states, by parameter
    averages: int  # of the parameters


def heeded(group: Mapping[str, Any]) -> Sequence[str]:
    """The hyperparameters beyond torch's that a group of `torch.optim`'s layout has for us."""
    names: Any = group.get(BEYOND, ())
    if not isinstance(names, (list, tuple)):
        raise TypeError(f"{GROUPS}[...]['{BEYOND}'] must be a list, got {names!r}")
    return names


def whole(group: Mapping[str, Any], quiet: Mapping[str, Any]) -> dict[str, Any]:
    """A group of ours with what it leaves out; one without a rate says nothing of its equation."""
    return {**(quiet if "lr" in group else {}), **group}


def loaded(own: Holder, state_dict: Any) -> Loaded:
    """A checkpoint, all of it checked; TypeError or ValueError where it does not fit."""
    spec = own.spec
    entries, saved = parts(state_dict)
    if "step" not in state_dict:  # torch's, see Spec.beyond_torch
        saved = [
            {
                name: value
                for name, value in group.items()
                if name not in spec.beyond_torch or name in heeded(group)
            }
            for group in saved
        ]
    else:
        saved = [whole(group, own.quiet) for group in saved]
    members = [members for _, members in own.groups if members]
    names = [[own.names[i] for i in group] for group in members]
    order, saved = arranged([group for group in saved if group["params"]], names, own.named)
    index_of = places(saved, members)
    for one, entry in entries.items():
        if one not in index_of:
            raise ValueError(f"state_dict['state'] must have known parameters, got {one!r}")
        check_mapping(f"state_dict['state'][{one!r}]", entry)
    steps = _loaded_steps(spec, state_dict)
    hypers, others, uses_then = _loaded_groups(own, saved, order, steps)
    held = [values for values, (_, members) in zip(hypers, own.groups, strict=True) if members]
    schedules = _loaded_schedules(spec, state_dict, held, order)
    uses = [spec.uses(spec.native_at(values, steps)) for values in hypers]
    group_of = {i: k for k, (_, members) in enumerate(own.groups) for i in members}
    pending = state_dict.get("pending", ())
    begun = {
        i: _loaded_state(own, i, entries[one], uses_then[group_of[i]], one in pending)
        for one, i in index_of.items()
        if entries.get(one)  # empty: torch's of a parameter that has not begun
    }
    # In torch's layout, which has no place beside groups, each of these has the number.
    torch_s = max((group.get("averages", 0) for group in saved), default=0)
    averages = count("state_dict['averages']", state_dict.get("averages", torch_s))
    return Loaded(steps, hypers, others, uses, schedules, begun, averages)


def _loaded_steps(spec: Spec, state_dict: Mapping[str, Any]) -> int:
    """The steps taken: ours by name, in torch's checkpoints the largest count of a state."""
    if "step" in state_dict:
        return count("state_dict['step']", state_dict["step"])
    counts = []
    for i, entry in state_dict["state"].items():
        if spec.counts_steps and "step" in entry:
            label = f"state_dict['state'][{i!r}]['step']"
            counts.append(count(label, entry["step"]))
    return max(counts, default=0)


def _loaded_groups(
    own: Holder, saved: Sequence[Mapping[str, Any]], order: Sequence[int], steps: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[list[str]]]:
    """After loading: each group's hyperparameters, other keys, and the last step's states."""
    spec = own.spec
    hypers, others, uses = [], [], []
    pending = iter(zip(order, saved, strict=True))
    for before, members in own.groups:
        k, group = next(pending) if members else (0, {})
        values, then, other = dict(before), dict(before), {}
        where = f"{GROUPS}[{k}]"
        for name, value in group.items():
            try:
                if name in ("params", "param_names"):
                    continue
                if name in values:
                    then[name] = spec.check(name, value)
                    kept = kept_schedules(values[name], value)
                    values[name] = spec.check(name, kept, schedules=True)
                elif name in spec.fixed:
                    if spec.check(name, value) != spec.fixed[name]:
                        raise ValueError(f"{name} must be {spec.fixed[name]}, got {value!r}")
                elif name in spec.table:
                    known = ", ".join(values)
                    raise ValueError(f"hyperparameters must be {known}, got {name!r}")
                else:
                    other[name] = copied(name, value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from None
        hypers.append(values)
        others.append(other)
        then = spec.at(then, max(steps - 1, 0))
        try:
            spec.check_together(then)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        uses.append(spec.uses(spec.native(then)))
    return hypers, others, uses


def _loaded_schedules(
    spec: Spec,
    state_dict: Mapping[str, Any],
    own: Sequence[Mapping[str, Any]],
    order: Sequence[int],
) -> Resumed:
    """The schedules in `own`, each group's, as those of the dict, if any, resume them."""
    from fusedstep.schedules import resumed

    saved = state_dict.get("schedules", [{}] * len(own))
    if not isinstance(saved, list | tuple) or len(saved) != len(own):
        raise ValueError(
            f"state_dict['schedules'] must have a dict for each of {len(own)} groups, got {saved!r}"
        )
    saved = [saved[i] for i in order]
    found = []
    for i, (values, entries) in enumerate(zip(own, saved, strict=True)):
        if not isinstance(entries, Mapping):
            raise TypeError(f"state_dict['schedules'][{i}] must be a dict, got {entries!r}")
        for name, entry in entries.items():
            where = f"state_dict['schedules'][{i}][{name!r}]"
            if name not in values:
                raise ValueError(f"{where} must be of the hyperparameters {', '.join(values)}")
            if name not in spec.parts:
                found.append((name, where, values[name], entry))
                continue
            n = len(spec.parts[name])
            if not isinstance(entry, list | tuple) or len(entry) != n:
                kind = "a pair" if n == 2 else f"{n} entries"
                raise TypeError(f"{where} must be {kind}, got {entry!r}")
            found += [
                (f"{name}[{k}]", f"{where}[{k}]", values[name][k], part)
                for k, part in enumerate(entry)
            ]
    return resumed(found)


def _loaded_state(
    own: Holder, i: int, entry: Mapping[str, Any], uses: Sequence[str], pending: bool
) -> tuple[Clock, dict[str, Stored]]:
    """One parameter's clock and states as `entry` has them, checked.

    `pending`: its late state begins with the next step.
    """
    spec = own.spec
    where = f"state_dict['state'][{own.names[i]}]"
    beside = [in_q8(spec, state).beside for state in spec.states if state in entry]
    known = ["step", *spec.carried, *spec.states, *beside, EMA, *PARAM_BESIDE]
    arrays: dict[str, Stored] = {}
    scalars: dict[str, float] = {}
    for name, value in entry.items():
        label = f"{where}['{name}']"
        if name in (*spec.states, EMA, *PARAM_BESIDE):
            if value is not None:  # as torch's before the first step with momentum
                arrays[name] = _loaded_array(own, i, name, entry, label)
        elif name == "step":
            scalars[name] = count(label, value)
        elif name in spec.carried:
            scalars[name] = carried(label, name, value)
        elif name not in beside:
            raise ValueError(f"{where} must have the keys {known}, got {name!r}")
    # What belongs to the parameter says nothing of updates.
    if entry.keys() <= {EMA, *PARAM_BESIDE}:
        return (0, 0.0, 0.0), arrays
    # A state that is there says enough where updates are not counted.
    for name in spec.required(uses) if spec.counts_steps else ():
        late = name == spec.late and pending
        if name not in arrays and name not in scalars and not late:
            raise ValueError(f"{where} must have the key {name!r}, got {given(entry)}")
    if spec.late not in uses:
        arrays.pop(spec.late, None)  # torch's, which nothing uses
    t = int(scalars.get("step", 0))
    if not spec.counts_steps:
        return (t, float(any(name in arrays for name in spec.states)), 0.0), arrays
    first, second = [*(scalars[name] for name in spec.carried), 0.0, 0.0][:2]
    if spec.late:
        second = float(t > 0 and spec.late not in arrays)
    return (t, first, second), arrays


def _loaded_array(own: Holder, i: int, name: str, entry: Mapping[str, Any], label: str) -> Stored:
    """A state, an average or what lies beside the parameter, in whatever format it is, checked."""
    shape, wide = own.shapes[i], np.dtype(own.wide[i])
    array = as_array(to_host(entry[name]), label)
    if array.shape != shape:
        raise ValueError(f"{label} must have shape {shape}, got {array.shape}")
    if name in PARAM_BESIDE:
        rounding, dtype = PARAM_BESIDE[name]
        if array.dtype.name != dtype:
            raise TypeError(f"{label} must be {dtype}, got {array.dtype}")
        return Stored(array, rounding)
    kept = in_q8(own.spec, name)
    if array.dtype == np.uint8 and entry.get(kept.beside) is not None:
        exponents = as_array(to_host(entry[kept.beside]), f"{label[:-2]}_exponents']")
        expected = kept.beside_shape(shape)
        if exponents.shape != expected or exponents.dtype != np.uint8:
            raise ValueError(
                f"{label[:-2]}_exponents'] must be uint8 of shape {expected}, got"
                f" {exponents.dtype} of shape {exponents.shape}"
            )
        return Stored(array, kept.format, exponents)
    same = array.dtype is wide  # as nearly always; the other question takes longer
    if not same and as_dtype(array.dtype, label).itemsize > wide.itemsize and name != EMA:
        raise TypeError(f"{label} must be {wide}, got {array.dtype}")
    return Stored(array, array.dtype.name)
