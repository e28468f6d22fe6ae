"""Hyperparameters: what each name means, which values it takes, and how a rule reads it.

One table for every optimizer: a name means the same and is checked the same wherever it occurs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedstep._arrays import as_float, as_index

_FLAG = "True or False"


class Hyper(NamedTuple):
    """A hyperparameter's rule in words, its test, and its line in the docstrings."""

    rule: str
    accepts: Callable[[Any], bool]
    doc: str
    scheduled: bool = False  # whether a callable of the step may stand for the number

    @property
    def is_flag(self) -> bool:
        """Whether it is True or False, not a number."""
        return self.rule == _FLAG


def _flag(doc: str) -> Hyper:
    return Hyper(_FLAG, lambda x: isinstance(x, bool), doc)


# Rules without a hyperparameter of their own.
ABOVE_0 = Hyper("> 0", lambda x: x > 0, "")
AT_LEAST_0 = Hyper(">= 0", lambda x: x >= 0, "")
ANY = Hyper("or NaN", lambda x: True, "")
FINITE = Hyper("finite", math.isfinite, "")
FRACTION = Hyper("in [0, 1)", lambda x: 0 <= x < 1, "")
POSITIVE = Hyper("finite and > 0", lambda x: 0 < x < math.inf, "")
SHARE = Hyper("in [0, 1]", lambda x: 0 <= x <= 1, "")

# The ranges are torch.optim's; what torch leaves open must still be a finite number.
HYPERS: dict[str, Hyper] = {
    "lr": AT_LEAST_0._replace(doc="learning rate", scheduled=True),
    "betas": FRACTION._replace(doc="decay rates of the two moving averages", scheduled=True),
    "eps": AT_LEAST_0._replace(doc="added to the denominator"),
    "eps_root": AT_LEAST_0._replace(doc="added under the root in the denominator"),
    "eps_hat": _flag(
        "eps stands beside the root of the uncorrected moment, as the paper's eps-hat"
    ),
    "eps_norm": AT_LEAST_0._replace(doc="added to the norm so far"),
    "eps_divisor": AT_LEAST_0._replace(doc="added to the norm where it divides"),
    "weight_decay": AT_LEAST_0._replace(
        doc="weight decay, `g + weight_decay*p` unless decoupled", scheduled=True
    ),
    "momentum": AT_LEAST_0._replace(doc="momentum factor mu", scheduled=True),
    "dampening": FINITE._replace(doc="share tau of each new gradient kept out of the buffer"),
    "dampen_first": _flag("dampens the first gradient too, which else begins the buffer whole"),
    "nesterov": _flag("steps along the look-ahead gradient; needs momentum > 0, dampening = 0"),
    "dampened_nesterov": _flag("lets nesterov have a dampened buffer"),
    "lr_in_momentum": _flag("the rate multiplies what enters the buffer, not what leaves it"),
    "lr_decay": AT_LEAST_0._replace(doc="lr at update t is `lr/(1 + (t-1)*lr_decay)`"),
    "initial_accumulator_value": AT_LEAST_0._replace(doc="the sum of squares to begin with"),
    "alpha": AT_LEAST_0._replace(doc="decay rate of the mean square"),
    "centered": _flag("divides by an estimate of the standard deviation, not of the raw moment"),
    "rho": Hyper("in [0, 1]", lambda x: 0 <= x <= 1, "decay rate of both mean squares"),
    "amsgrad": _flag("divides by the largest second moment so far"),
    "amsgrad_corrected": _flag("amsgrad takes the largest after bias correction, not before"),
    "bias_correction": _flag("divides the averages by `1 - beta^t`; False is the plain form"),
    "momentum_decay": AT_LEAST_0._replace(doc="psi, how fast the momentum warms up; inf: at once"),
    "threshold": Hyper(">= 4", lambda x: x >= 4, "what r_t exceeds where the step is divided"),
    "lambd": FINITE._replace(doc="decay term"),
    "t0": FINITE._replace(doc="update at which averaging begins"),
    "etas": Hyper("as 0 < etas[0] < 1 < etas[1]", math.isfinite, "factors by which steps change"),
    "step_sizes": Hyper("not NaN", lambda x: not math.isnan(x), "smallest and largest step"),
    "maximize": _flag("climbs instead of descending"),
    "decoupled_weight_decay": _flag("shrinks p by `1 - lr*weight_decay` and leaves g alone"),
    "decay_after": _flag("decoupled weight decay comes after the update, not before"),
}

# Those of several numbers, each of which the rule has by itself: `betas` are `beta1`, `beta2`, ...
TUPLES = ("betas", "etas", "step_sizes")


def as_number(name: str, value: Any, hyper: Hyper) -> float:
    """`value` as a float that the rule accepts, or TypeError or ValueError."""
    number = value if type(value) is float else as_float(value)
    if number is None:
        rule = hyper.rule.replace(" and", "")
        kind = f"a number {rule}".replace("number finite", "finite number")
        raise TypeError(f"{name} must be {kind}, got {value!r}")
    if not hyper.accepts(number):
        raise ValueError(f"{name} must be {hyper.rule}, got {value!r}")
    return number


def check_flags(**flags: Any) -> None:
    """Raises TypeError for a keyword of `step` that is not True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


LAST = 2**53  # integers up to here are exact as doubles


def _rounding(number: Any, dtype: Any) -> Any:
    """How far a float may lie from an integer that it is meant to be.

    0.07 * 100 is 7.000000000000001, and (1 - 0.97) * 1000 is 30.000000000000027.
    """
    kind = np.float32 if str(dtype).endswith("float32") else np.float64  # narrower ones: exact
    return np.minimum(16 * float(np.finfo(kind).eps) * abs(number), 0.1)


def as_whole(value: Any) -> int | None:
    """An integer of any kind, or a float that is one but for its rounding, as an int; or None."""
    index = as_index(value)
    number = as_float(value) if index is None else None
    if number is None or not math.isfinite(number):
        return index
    whole = round(number)
    is_whole = abs(number - whole) <= _rounding(number, getattr(value, "dtype", float))
    return whole if is_whole else None


def as_integer(name: str, value: Any, low: int) -> int:
    """`value`, whole floats included, as an int from `low` to 2^53; or TypeError or ValueError."""
    number = as_whole(value)
    if number is None:
        raise TypeError(f"{name} must be an integer >= {low}, got {value!r}")
    if not low <= number <= LAST:
        raise ValueError(f"{name} must be an integer from {low} to 2^53, got {value!r}")
    return number


def as_steps(name: str, value: Any) -> NDArray[np.int64]:
    """`value`, whole floats included, as an array from 0 to 2^53; or TypeError or ValueError."""
    try:
        given = np.asarray(value)
    except ValueError:  # a ragged list
        given = np.asarray(None)
    are_steps = given.dtype.kind in "iu" or not given.size or as_index(value) is not None
    if given.dtype.kind == "f":
        with np.errstate(invalid="ignore"):  # inf - inf
            near = np.abs(given - np.rint(given)) <= _rounding(given, given.dtype)
        are_steps = bool((near & np.isfinite(given)).all())
        given = np.rint(given)
    if not are_steps:
        raise TypeError(f"{name} must be an int or an array of ints, got {value!r}")
    if given.size and not 0 <= given.min() <= given.max() <= LAST:
        raise ValueError(f"{name} must be from 0 to 2^53, got {given.min()} to {given.max()}")
    return given.astype(np.int64)


def _part(name: str, value: Any, hyper: Hyper, schedules: bool) -> Any:
    return value if schedules and callable(value) else as_number(name, value, hyper)


def check(name: str, value: Any, hyper: Hyper, schedules: bool = False, n: int = 0) -> Any:
    """`value` as a float, a tuple of `n` or a bool; TypeError or ValueError if it is none of them.

    With `schedules` a callable may stand for a number where the hyperparameter takes one.
    """
    schedules = schedules and hyper.scheduled
    if n:
        try:
            parts = tuple(islice(value, n + 1))
        except (TypeError, ValueError, RuntimeError):  # torch's, of a sparse tensor
            parts = ()
        if len(parts) != n:
            kind = "a pair of" if n == 2 else n
            raise TypeError(f"{name} must be {kind} numbers, got {value!r}")
        parts = tuple(_part(f"{name}[{i}]", p, hyper, schedules) for i, p in enumerate(parts))
        if name == "etas" and not 0 < parts[0] < 1 < parts[1]:
            raise ValueError(f"etas must be {hyper.rule[3:]}, got {value!r}")
        return parts
    if hyper.is_flag:
        if isinstance(value, np.bool_):
            return bool(value)
        if not hyper.accepts(value):
            raise TypeError(f"{name} must be {hyper.rule}, got {value!r}")
        return value
    return _part(name, value, hyper, schedules)


def is_scheduled(value: Any) -> bool:
    """Whether a hyperparameter, or a part of it, is a callable of the step."""
    return callable(value) or (isinstance(value, tuple) and any(map(callable, value)))


def at_step(name: str, value: Any, t: int, hyper: Hyper) -> Any:
    """A scheduled hyperparameter with what its schedules return for step `t` in their place.

    A number may be infinite where torch's may; what a schedule returns has then overflown.
    """
    if isinstance(value, tuple):
        return tuple(_now(f"{name}[{i}]", part, t, hyper) for i, part in enumerate(value))
    return _now(name, value, t, hyper)


def _now(name: str, value: Any, t: int, hyper: Hyper) -> float:
    if not callable(value):
        return as_number(name, value, hyper)
    number = as_number(name, value(t), hyper)
    if number == math.inf:
        raise ValueError(f"{name} must be finite, got {number} from its schedule at step {t}")
    return number


def kept_schedules(current: Any, loaded: Any) -> Any:
    """`loaded`, except where `current` is a schedule."""
    tuples = isinstance(current, tuple) and isinstance(loaded, tuple | list)
    if tuples and len(loaded) == len(current):
        return tuple(map(kept_schedules, current, loaded))
    return current if callable(current) else loaded
