"""Keras 3: `.keras` and `.weights.h5` files, and what `save_own_variables` of an optimizer stores.

A file numbers the optimizer's variables and says of none what it is. That follows from the
optimizer's class and its configuration, which a `.keras` file has and a `.weights.h5` file has not.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fusedstep.convert import _common
from fusedstep.convert._common import Converted, State

# What a class keeps: runs of variables, each with the states that every parameter has in turn.
# In a name's place a configuration's key stands for a run that is there where it is set.
_RUNS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "SGD": (("momentum", ("momentum_buffer",)),),
    "RMSprop": (
        ("", ("square_avg",)),
        ("momentum", ("momentum_buffer",)),
        ("centered", ("grad_avg",)),
    ),
    "Adagrad": (("", ("sum",)),),
    "Adadelta": (("", ("square_avg", "acc_delta")),),
    "Adam": (("", ("exp_avg", "exp_avg_sq")), ("amsgrad", ("max_exp_avg_sq",))),
    "AdamW": (("", ("exp_avg", "exp_avg_sq")), ("amsgrad", ("max_exp_avg_sq",))),
    "Adamax": (("", ("exp_avg", "exp_inf")),),
    "Nadam": (("", ("exp_avg", "exp_avg_sq")),),
    "Lion": (("", ("exp_avg",)),),
}
_BEFORE = (("use_ema", ("ema",)), ("gradient_accumulation_steps", ("accumulated",)))
# Configuration of what surrounds the update: what `step` takes, and what no step of ours does.
_AT_STEP = {"global_clipnorm": "max_norm", "clipvalue": "clip_value"}
_IDLE = ("name", "loss_scale_factor")  # of a configuration, which change no state
_NOT_OURS = {
    "clipnorm": "which clips each variable by itself: clip gradients before the step",
    "ema_overwrite_frequency": "which puts the average in the variables' place now and then",
}


def from_keras(
    source: Any, params: Any = None, *, optimizer: Any = None, **arguments: Any
) -> Converted:
    """A Keras optimizer's state, from a file or its variables.

    Args:
        source: the path of a `.keras` or `.weights.h5` file, an open `h5py.File`, or the dict that
            `optimizer.save_own_variables` fills, of variables by number.
        params: the model's trainable variables, in the order of `model.trainable_variables`:
            arrays, Keras variables, or shapes, in a dict by name or a list (default None: no names,
            and shapes are not compared).
        optimizer: what a file does not say: the Keras optimizer, its class's name, or the dict of
            `keras.optimizers.serialize` (default None: that of the file; in a `.weights.h5` its
            name, such as `adam_w`, with Keras' defaults).
        **arguments: of the optimizer's constructor, by Keras' names, before those of the file.

    Returns:
        The state_dict for `fs.<result.optimizer>`. `at_step` has `max_norm`, `clip_value` and
        `ema` where the optimizer clips or averages. A rate that is a schedule is not in it.

    Raises:
        TypeError, ValueError: the file is no Keras file, has no optimizer or one that has not been
            built, or other variables than the class, `arguments` and `params` call for.
        OSError: the file cannot be opened.
        ModuleNotFoundError: h5py is missing.

    Warns:
        UserWarning: neither the file nor `optimizer` says the arguments, and `arguments` leave some
            out; defaults are taken. `result.assumed` has them in any case.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.ones(2, np.float32)
        >>> store = {"0": 7, "1": 0.01, "2": np.zeros_like(w)}  # opt.save_own_variables(store)
        >>> state = fs.convert.from_keras(store, {"w": w}, optimizer="Lion", beta_1=0.8)
        >>> opt = fs.Lion({"w": w})
        >>> opt.load_state_dict(state)
        >>> opt.steps, opt.param_groups[0]["betas"]
        (7, (0.8, 0.99))
    """
    wanted = _common.wanted(params)
    with _opened(source) as (label, store, config):
        variables = _variables(label, store)
        name, given, is_known = _optimizer(label, optimizer or config, store)
    if name not in _RUNS:
        raise ValueError(f"{label} must have an optimizer of {', '.join(_RUNS)}, got {name}")
    has_rate = _has_rate(given.get("learning_rate", arguments.get("learning_rate")), variables)
    given = {**given, **arguments}
    one = _common.convention("keras", name)
    usual = _common.arguments(one)
    known = {*usual, *_AT_STEP, *_NOT_OURS, *(key for key, _ in _BEFORE), "ema_momentum"}
    for key, value in {**dict.fromkeys(arguments), **given}.items():
        if key not in known and (key in arguments or (key not in _IDLE and value is not None)):
            raise TypeError(
                f"{key} must be an argument of Keras' {name}: {', '.join(sorted(known))}"
            )
    for key, why in _NOT_OURS.items():
        if given.get(key):
            raise ValueError(f"{key} must be None, got {given[key]!r}, {why}, and give {key}=None")
    config = {**usual, **given}
    runs = [run for key, run in (*_BEFORE, *_RUNS[name]) if not key or config.get(key)]
    states, rest = _states(label, name, variables, runs, wanted, has_rate)
    filled = {**usual, **({"ema_momentum": 0.99} if config.get("use_ema") else {})}
    assumed = _common.unsaid(label, "Keras'", filled, given, is_named=is_known)
    steps = _common.count(f"{label}: iteration", variables[0])
    every = int(config.get("gradient_accumulation_steps") or 1)
    for i, state in states.items():
        if every > 1 and np.any(state.pop("accumulated")):
            raise ValueError(
                f"{label} must be saved after all {every} of gradient_accumulation_steps, got"
                f" gradients of {steps % every or every} that are not yet applied"
            )
        if name == "SGD" and "momentum_buffer" in state:
            state["momentum_buffer"] = -state["momentum_buffer"]
        if name == "Nadam":
            states[i]["mu_product"] = _common.number(f"{label}: u_product", rest[0])
    if has_rate and "learning_rate" not in arguments:
        config["learning_rate"] = _common.short(variables[1])
    ours = _common.called(one, {key: config[key] for key in usual})
    at_step = {mine: config[key] for key, mine in _AT_STEP.items() if config.get(key)}
    if config.get("use_ema"):
        at_step["ema"] = config.get("ema_momentum", filled["ema_momentum"])
    members = range(len(states))
    return _common.converted(
        "keras",
        name,
        ours.name,
        [_common.group(ours, members, wanted)],
        states,
        steps // every,
        at_step=at_step,
        assumed=assumed,
    )


def to_keras(state_dict: Any, *, optimizer: str | None = None) -> dict[str, Any]:
    """A state_dict as the variables of Keras' optimizer, for its `load_own_variables`.

    Args:
        state_dict: of ours, of an optimizer whose equation Keras has, with all its states.
        optimizer: the name of our class, where `state_dict` is not one of `from_keras` and the like
            (default None).

    Returns:
        Arrays by number, as text. The Keras optimizer must be built with the same arguments:
        `opt.build(variables); opt.load_own_variables(store)`. A rate that follows a schedule has no
        variable there: leave out the state_dict's `lr`.

    Raises:
        TypeError, ValueError: a state is missing, or Keras has no such equation.
    """
    mine = _common.optimizer_of(state_dict, optimizer)
    name, config = _common.equal_of("keras", mine, state_dict)
    entries = _common.ordered(state_dict)
    averaged = any("ema" in state for _, state, _ in entries)
    runs = [run for key, run in _RUNS[name] if not key or config.get(key)]
    store = [np.array(_common.steps_of(state_dict), np.int64)]
    if "lr" in entries[0][2]:
        store.append(np.array(entries[0][2]["lr"], np.float32))
    for run in ([("ema",)] if averaged else []) + runs:
        for i, state, _ in entries:
            arrays = [_common.need(state, key, i) for key in run]
            store += [-one if name == "SGD" and run != ("ema",) else one for one in arrays]
    if name == "Nadam":
        store.append(np.array(entries[0][1]["mu_product"], np.float32))
    return {str(i): one for i, one in enumerate(store)}


def _has_rate(rate: Any, variables: list[Any]) -> bool:
    """Whether variable 1 is the rate, which a schedule has not: as somebody said, or its shape."""
    if isinstance(rate, Mapping) or callable(rate):
        return False
    return rate is not None or (len(variables) > 1 and np.ndim(variables[1]) == 0)


@contextlib.contextmanager
def _opened(source: Any) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
    """What to call a source, its store of variables, and the optimizer's configuration, if any."""
    if isinstance(source, Mapping):  # a group of h5py is one
        yield getattr(source, "filename", None) or "source", _store("source", source), None
        return
    if not isinstance(source, str | bytes | os.PathLike):
        kind = type(source).__name__
        raise TypeError(f"source must be a path, an h5py.File or a dict of variables, got {kind}")
    path = os.fsdecode(source)
    label = os.path.basename(path)
    h5py = _h5py()
    config: Any = None
    file: Any = path
    with open(path, "rb") as raw:
        zipped = raw.read(4) == b"PK\x03\x04"
    if zipped:
        try:
            with zipfile.ZipFile(path) as whole:
                config = json.loads(whole.read("config.json")).get("compile_config") or {}
                config = config.get("optimizer")
                file = io.BytesIO(whole.read("model.weights.h5"))
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise ValueError(f"{label} must be a whole .keras file: {error}") from None
    try:
        opened = h5py.File(file, "r")
    except OSError as error:
        raise ValueError(f"{label} must be a whole HDF5 file: {error}") from None
    with opened:
        yield label, _store(label, opened), config


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ModuleNotFoundError(
            "Keras' files need h5py: pip install 'fusedstep[convert]'", name="h5py"
        ) from error
    return h5py


def _store(label: str, group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The optimizer's variables in a file, or what is one already."""
    if "optimizer_weights" in group or "model_weights" in group:
        raise ValueError(f"{label} must be a .keras or .weights.h5 file, got one of Keras 2")
    if "0" in group:
        return group
    for path in ("optimizer/vars", "vars"):
        if path in group and "0" in group[path]:
            found: Mapping[str, Any] = group[path]
            return found
    raise ValueError(f"{label} must have an optimizer's variables, got {sorted(group)[:8]}")


def _variables(label: str, store: Mapping[str, Any]) -> list[Any]:
    """All variables in the order of their numbers."""
    numbers = sorted(int(key) for key in store if key.isdecimal())
    if len(numbers) < len(store) or numbers != list(range(len(numbers))):
        missing = sorted(set(range(max(numbers, default=0))) - set(numbers))[:8]
        unknown = sorted(key for key in store if not key.isdecimal())[:8]
        raise ValueError(
            f"{label} must have variables 0 to {len(store) - 1}, got missing {missing}, unknown"
            f" {unknown}"
        )
    try:
        return [_read(store[str(i)]) for i in numbers]
    except OSError as error:
        raise ValueError(f"{label} must be a whole file: {error}") from None


def _read(value: Any) -> Any:
    """A variable: what h5py has of it is read."""
    return np.asarray(value[()]) if hasattr(value, "chunks") else value


def _optimizer(
    label: str, given: Any, store: Mapping[str, Any]
) -> tuple[str, dict[str, Any], bool]:
    """The optimizer's class, its configuration, and whether anybody said so."""
    if given is None:
        said = str(dict(getattr(store, "attrs", {})).get("name", ""))
        plain = re.sub(r"_\d+$", "", said).replace("_", "")
        for name in _RUNS:
            if name.lower() == plain:
                return name, {}, False
        raise ValueError(
            f"optimizer must be given: {label} says {said!r}, which is none of {', '.join(_RUNS)}"
        )
    if isinstance(given, str):
        return given, {}, True
    if isinstance(given, Mapping) and "class_name" in given:
        return str(given["class_name"]), dict(given.get("config") or {}), True
    if hasattr(given, "get_config"):
        return type(given).__name__, dict(given.get_config()), True
    raise TypeError(
        "optimizer must be a name, a Keras optimizer or its configuration, got"
        f" {type(given).__name__}"
    )


def _states(
    label: str,
    name: str,
    variables: list[Any],
    runs: list[tuple[str, ...]],
    params: _common.Wanted | None,
    has_rate: bool,
) -> tuple[dict[int, State], list[Any]]:
    """The states of each parameter, and the variables that are left."""
    first, last = 1 + has_rate, int(name == "Nadam")
    each = sum(map(len, runs))
    found = len(variables) - first - last
    expected = [f"iteration{', learning_rate' if has_rate else ''}"]
    expected += [" and ".join(run) + " of each parameter" for run in runs]
    expected += ["u_product"] * last
    shape = f"{label} must have the variables of {name}: {'; '.join(expected)}"
    if found <= 0 and runs:
        raise ValueError(f"{shape}; got {len(variables)}: the optimizer has not been built")
    if params is None and not runs and not found:
        raise ValueError(f"params must be given: {name} without momentum keeps nothing of them")
    n = len(params.shapes) if params else found // max(each, 1)
    if found != n * each:
        ours = f", {first + last + n * each} for {n}" if params else ""
        raise ValueError(f"{shape}{ours}; got {len(variables)}: are its options others?")
    states: dict[int, State] = {i: {} for i in range(n)}
    at = first
    for run in runs:
        for i in range(n):
            for key in run:
                states[i][key] = _common.array(f"{label}: variable {at}", variables[at])
                at += 1
    for key in (key for run in runs for key in run):
        arrays = [states[i][key] for i in range(n)]
        alike = params or _common.Wanted(None, [states[i][runs[0][0]].shape for i in range(n)])
        _common.check_shapes(label, key, arrays, alike)
    return states, variables[at:]
