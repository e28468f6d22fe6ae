"""PaddlePaddle: `optimizer.state_dict()`, in memory or in a `.pdopt` file of `paddle.save`.

A state has arrays by the parameter's name, what it is, and a number: `linear_0.w_0_moment1_0`. It
has no rate, no hyperparameters and no count, which follows from the powers of beta that are kept.
"""

from __future__ import annotations

import codecs
import collections
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusedstep.convert import _common
from fusedstep.convert._common import Converted

_ADAM = {"moment1": "exp_avg", "moment2": "exp_avg_sq"}
# What each optimizer keeps of a parameter, by Paddle's names and ours.
_KEPT: dict[str, dict[str, str]] = {
    "SGD": {},
    "Momentum": {"velocity": "momentum_buffer"},
    "Adagrad": {"moment": "sum"},
    "RMSProp": {
        "mean_square": "square_avg",
        "momentum": "momentum_buffer",
        "mean_grad": "grad_avg",
    },
    "Adadelta": {"_avg_squared_grad": "square_avg", "_avg_squared_update": "acc_delta"},
    "Adam": {**_ADAM, "moment2_max": "max_exp_avg_sq"},
    "AdamW": {**_ADAM, "moment2_max": "max_exp_avg_sq"},
    "Adamax": {"moment": "exp_avg", "inf_norm": "exp_inf"},
    "NAdam": _ADAM,
    "RAdam": _ADAM,
    "Rprop": {"prevs": "prev", "learning_rates": "step_size"},
    "ASGD": {},
}
# What counts the steps: powers of an argument, and how many steps too many they have.
_POWERS: dict[str, dict[str, tuple[str, int]]] = {
    "Adam": {"beta1_pow_acc": ("beta1", 1), "beta2_pow_acc": ("beta2", 1)},
    "AdamW": {"beta1_pow_acc": ("beta1", 1), "beta2_pow_acc": ("beta2", 1)},
    "Adamax": {"beta1_pow_acc": ("beta1", 1)},
    "NAdam": {"beta2_pow": ("beta2", 0)},
    "RAdam": {"beta1_pow": ("beta1", 0), "beta2_pow": ("beta2", 0)},
}
# What else there is, of no use to us but for NAdam's product.
_MORE = {
    "NAdam": ("momentum_decay_pow", "mu_product"),
    "RAdam": ("rho",),
    "ASGD": ("d", "y", "m"),
}
_FIELDS = {
    name: [*kept, *_POWERS.get(name, ()), *_MORE.get(name, ())] for name, kept in _KEPT.items()
}
# Fields that only an argument brings along.
_AMSGRAD = "moment2_max"
_KEY = re.compile(
    rf"(.+?)(?:_fp32_master_\d+)?_({'|'.join({f for all in _FIELDS.values() for f in all})})_\d+"
)
_MASTERS, _SCHEDULE = "master_weights.", "LR_Scheduler."


def from_paddle(
    source: Any, params: Any = None, optimizer: str | None = None, *, step: int | None = None,
    **arguments: Any,
) -> Converted:  # fmt: skip
    """The state of a Paddle optimizer.

    Args:
        source: `optimizer.state_dict()`, or the path of a file that `paddle.save` wrote of it.
        params: the parameters: Paddle's own, which have their names; arrays or shapes in a dict by
            those names; or others, in the optimizer's order (default None: the state's names and
            order).
        optimizer: the name of the class, as "AdamW" (default None: the one that has such a state,
            where there is only one).
        step: the updates taken, where the state has no count: SGD, Momentum, Adagrad, RMSProp,
            Adadelta and Rprop, or where the powers of beta have vanished (default None).
        **arguments: what the class was given, by Paddle's names.

    Returns:
        The state_dict for `fs.<result.optimizer>`. Without a number as `learning_rate` it has no
        rate: your optimizer keeps its own. What clips keeps nothing: give `max_norm` to every step.
        `masters` has the master weights of `multi_precision`.

    Raises:
        TypeError, ValueError: the state is of another optimizer, of other arguments or parameters;
            or the file is not whole, or has more than arrays and plain values. It is a pickle, of
            which nothing else is made.
        OSError: the file cannot be opened.

    Warns:
        UserWarning: neither `optimizer` nor `arguments` say what Paddle has defaults for, which are
            taken. `result.assumed` has them in any case.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.ones(2, np.float32)
        >>> state = {"w_0_moment_0": w, "w_0_inf_norm_0": w, "w_0_beta1_pow_acc_0": 0.9**8}
        >>> found = fs.convert.from_paddle(state, {"w_0": w}, "Adamax", learning_rate=0.1)
        >>> opt = fs.Adamax({"w_0": w})
        >>> opt.load_state_dict(found)
        >>> opt.steps, opt.param_groups[0]["lr"], opt.param_groups[0]["eps_norm"]
        (7, 0.1, 1e-08)
    """
    theirs = [getattr(one, "name", None) for _, one in _common.leaves(params)] if params else []
    wanted = _common.wanted(params)
    label, found = _opened(source)
    masters = {k.removeprefix(_MASTERS): v for k, v in found.items() if k.startswith(_MASTERS)}
    trees: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        if key.startswith((_MASTERS, _SCHEDULE)):
            continue
        parts = _KEY.fullmatch(key)
        if parts is None:
            raise ValueError(f"{label} must be of one of Paddle's optimizers of ours, got {key!r}")
        trees.setdefault(parts[2], {})[parts[1]] = value
    fields = {
        name: [f for f in own if f != _AMSGRAD or f in trees] for name, own in _FIELDS.items()
    }
    name = _common.named(optimizer, fields, trees)
    if trees.keys() != set(fields[name]):
        raise ValueError(
            f"{label} must have {', '.join(fields[name]) or 'nothing'} of {name}, got"
            f" {', '.join(trees) or 'nothing'}"
        )
    one = _common.convention("paddle", name)
    usual, given = _common.arguments(one), dict(arguments)
    if _AMSGRAD in _KEPT[name]:
        given.setdefault("amsgrad", _AMSGRAD in trees)
        if bool(given["amsgrad"]) != (_AMSGRAD in trees):
            raise ValueError(f"amsgrad must be {_AMSGRAD in trees}, as {label} has it, got"
                             f" {given['amsgrad']!r}")  # fmt: skip
    assumed = _common.unsaid(label, "Paddle's", usual, given, is_named=bool(optimizer))
    config = {**usual, **given}
    order, wanted = _ordered(label, trees, wanted, theirs)
    counts = {
        f"{path}'s {field}": _counted(label, trees[field][path], beta, config[beta], step, more)
        for field, (beta, more) in _POWERS.get(name, {}).items()
        for path in order
    }
    _check_unused(label, name, trees, config)
    if name == "ASGD":
        counts = {f"{path}'s m": _common.count("m", trees["m"][path]) for path in order}
    steps = _common.agreed(label, counts, step)
    kept = {f: mine for f, mine in _KEPT[name].items() if f in trees and _is_there(f, config)}
    states = _common.gathered(label, trees, kept, order, wanted)
    if name == "NAdam":
        for i, path in enumerate(order):
            product = _common.values(f"{label}: mu_product", trees["mu_product"][path])
            states[i]["mu_product"] = float(product.reshape(-1)[0])
    ours = _common.called(one, given)
    groups = [_common.group(ours, range(len(order)), wanted)]
    result = _common.converted("paddle", name, ours.name, groups, states, steps, assumed=assumed)
    named = dict(zip(order, wanted.names or range(len(order)), strict=True))
    result.masters = {named[k]: _common.array(f"{label}: {k}", v) for k, v in masters.items()}
    return result


def to_paddle(
    state_dict: Any, params: Any = None, *, optimizer: str | None = None
) -> dict[str, Any]:
    """A state_dict as that of a Paddle optimizer.

    Args:
        state_dict: of ours, of an optimizer whose equation Paddle has, with all its states.
        params: Paddle's parameters, in order (default None: the state_dict's names are Paddle's).
        optimizer: the name of our class, where `state_dict` is not one of `from_paddle` and the
            like (default None).

    Returns:
        Arrays of NumPy by name, for `set_state_dict` of an optimizer with the same arguments that
        has not stepped, and is the first of its parameters: Paddle numbers the others' from 1 on.

    Raises:
        TypeError, ValueError: a state or a name is missing, or Paddle has no such equation.
    """
    mine = _common.optimizer_of(state_dict, optimizer)
    name, config = _common.equal_of(
        "paddle", mine, state_dict, None, ("learning_rate", "weight_decay")
    )
    entries, names = _common.ordered(state_dict), _common.names_of(state_dict)
    if params is not None:
        listed = [one.name for _, one in _common.leaves(params)]
        if len(listed) != len(entries):
            raise ValueError(f"params must be {len(entries)}, got {len(listed)}")
        names = {i: one for (i, _, _), one in zip(entries, listed, strict=True)}
    steps, found = _common.steps_of(state_dict), dict[str, Any]()
    for i, state, _ in entries:
        if i not in names:
            raise ValueError("params must be given: state_dict has no names of parameters")
        arrays = {
            field: _common.need(state, mine, i)
            for field, mine in _KEPT[name].items()
            if _is_there(field, config)
        }
        alike = next(iter(arrays.values()), np.zeros(0))
        arrays |= {field: np.zeros_like(alike) for field in _KEPT[name] if field not in arrays}
        if not config.get("amsgrad"):
            arrays.pop(_AMSGRAD, None)
        for field, (beta, more) in _POWERS.get(name, {}).items():
            power = _common.power_to(config[beta], steps + more, alike.dtype)
            arrays[field] = np.full(1 if more else alike.shape, power, alike.dtype)
        if name == "NAdam":
            decay = _common.power_to(0.96, steps, alike.dtype)
            arrays["momentum_decay_pow"] = np.full(alike.shape, decay, alike.dtype)
            arrays["mu_product"] = np.full(alike.shape, state["mu_product"], alike.dtype)
        elif name == "RAdam":
            power = float(config["beta2"]) ** steps
            rho = steps * power / (1 - power) if steps else 0.0
            arrays["rho"] = np.full(alike.shape, rho, alike.dtype)
        found |= {f"{names[i]}_{field}_0": values for field, values in arrays.items()}
    return found


def _counted(
    label: str, value: Any, beta: str, number: float, step: int | None, more: int
) -> int | None:
    n = _common.power_of(label, value, beta, number, step)
    return None if n is None else n - more


def _check_unused(
    label: str, name: str, trees: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> None:
    """Raises ValueError for a state of which the arguments make nothing, and others would.

    NOTE: RMSProp's `momentum` is none of them: without momentum it is the last step.
    """
    if name == "RMSProp" and not config["centered"]:
        for path, one in trees["mean_grad"].items():
            _common.check_unused(f"{label}: mean_grad of {path}", one, "RMSProp, not centered")
    if name == "ASGD":  # whose sum `d` of the batches' last gradients, `y`, is that of the one
        for path, one in trees["d"].items():
            total, y = _common.values(label, one), _common.values(label, trees["y"].get(path))
            if y.shape != (1, *total.shape) or not np.array_equal(y[0], total, equal_nan=True):
                raise ValueError(
                    f"{label}: y of {path} must be the gradient of one batch, as d, got"
                    f" {len(y)} of other values: was batch_num another?"
                )


def _is_there(field: str, config: Mapping[str, Any]) -> bool:
    """Whether an optimizer of ours has a field; Paddle's RMSProp has all, of zeros."""
    needs = {"momentum": "momentum", "mean_grad": "centered", _AMSGRAD: "amsgrad"}
    return field not in needs or bool(config[needs[field]])


def _ordered(
    label: str, trees: Mapping[str, Mapping[str, Any]], params: _common.Wanted | None, theirs: Any
) -> tuple[list[str], _common.Wanted]:
    """Paddle's names of the parameters, in the order of `params`."""
    paths: list[str] = list(next(iter(trees.values()), {}))
    if params is None:
        if not trees:
            raise ValueError(f"params must be given: {label} keeps nothing of them")
        shapes = [np.shape(_common.values("", one)) for one in next(iter(trees.values())).values()]
        return paths, _common.Wanted(paths, shapes)
    for names in (theirs, params.names):
        if names and set(names) == set(paths):
            return list(names), params
    if not trees:
        return [str(name) for name in params.names or range(len(params.shapes))], params
    if len(paths) != len(params.shapes):
        missing = [one for one in theirs if one and one not in paths]
        raise ValueError(
            f"{label} must be of {len(params.shapes)} parameters, got {len(paths)}:"
            f" {', '.join(paths[:8])}{'; not ' if missing else ''}{', '.join(missing[:8])}"
        )
    return paths, params


def _opened(source: Any) -> tuple[str, dict[str, Any]]:
    """What to call a source, and its values by name."""
    label = "source"
    if not isinstance(source, Mapping):
        if not isinstance(source, str | bytes | os.PathLike):
            kind = type(source).__name__
            raise TypeError(f"source must be a path or a state_dict, got {kind}")
        path = os.fsdecode(source)
        label = os.path.basename(path)
        with open(path, "rb") as file:
            try:
                source = _Unpickler(file).load()
            except OSError:
                raise
            except Exception as error:  # a pickle that is not whole raises anything
                raise ValueError(
                    f"{label} must be a whole file by paddle.save, of arrays: {error}"
                ) from None
        if not isinstance(source, Mapping):
            kind = type(source).__name__
            raise ValueError(f"{label} must have a state_dict, got {kind}")
    flat = {key: one for key, one in source.items() if key != "StructuredToParameterName@@"}
    return label, dict(_common.leaves(_plain(flat)))


def _plain(tree: Any) -> Any:
    """A tree in which arrays are without the names that `paddle.save` puts beside some."""
    if isinstance(tree, Mapping):
        return {key: _plain(one) for key, one in tree.items()}
    if isinstance(tree, tuple) and len(tree) == 2 and isinstance(tree[1], np.ndarray):
        return tree[1]
    return tree


class _Unpickler(pickle.Unpickler):
    """Makes arrays and plain values, and nothing else that a file may name."""

    def find_class(self, module: str, name: str) -> Any:
        found = _MADE.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found


_MADE: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
    ("numpy.core.multiarray", "scalar"): np.float64(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "tuple"): tuple,
}
