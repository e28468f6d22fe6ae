"""Schedules: learning rates, momenta and weight decays as closed forms of the step, from 0.

    opt = fs.AdamW(params, lr=fs.schedules.Cosine(3e-4, total=10_000).warmup(500))

A schedule is a value: immutable, hashable, equal to another with the same arguments. It is a
function of the step alone, so a run that resumes at step 10^9 gets its rate at once and to the bit,
on every machine: powers and cosines are the core's own. Optimizers call it before each update.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    SupportsIndex,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import numpy as np
from numpy.typing import NDArray

from fusedstep import _core
from fusedstep._arrays import is_traced
from fusedstep._hypers import (
    ANY,
    FINITE,
    FRACTION,
    LAST,
    POSITIVE,
    Hyper,
    as_integer,
    as_number,
    as_steps,
    as_whole,
)
from fusedstep._plot import as_axes, new_axes

__all__ = [
    "WSD",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Cyclic",
    "Exponential",
    "InverseSqrt",
    "Linear",
    "MultiStep",
    "OneCycle",
    "Polynomial",
    "ReduceOnPlateau",
    "Schedule",
    "Step",
    "from_dict",
]


def __dir__() -> list[str]:
    return sorted(__all__)


# Inside a schedule t is an int or an int64 array, and a value a float or an array: the equations
# below are written for both, and give both the same bits.
_T = Any
_Value = Any
_S = TypeVar("_S", bound="Schedule")


# -- arguments ------------------------------------------------------------------------------------


def _number_that_is(rule: str, accepts: Callable[[float], bool]) -> Callable[[str, Any], float]:
    return lambda name, value: as_number(name, value, Hyper(rule, accepts, ""))


def _integer_from(low: int) -> Callable[[str, Any], int]:
    return lambda name, value: as_integer(name, value, low)


def _count_or_none(name: str, value: Any) -> int | None:
    return None if value is None else as_integer(name, value, 1)


def _milestones(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a sequence of integers, got {value!r}")
    found = tuple(as_integer(f"{name}[{i}]", one, 0) for i, one in enumerate(value))
    if not found or any(a > b for a, b in pairwise(found)):
        raise ValueError(f"{name} must be sorted integers, at least one, got {value!r}")
    return found


def _progress(name: str, value: Any) -> tuple[float, float | None, int, int] | None:
    if value is None:
        return None
    if not isinstance(value, tuple | list) or len(value) != 4:
        raise TypeError(f"{name} must be None or (rate, best, bad, cooling), got {value!r}")
    best = value[1]
    if best is not None:
        best = as_number(f"{name}[1]", best, FINITE)
    rate = _number_that_is("finite and >= 0", _is_rate)(f"{name}[0]", value[0])
    counts = [as_integer(f"{name}[{i}]", value[i], 0) for i in (2, 3)]
    return rate, best, counts[0], counts[1]


def _is_rate(x: float) -> bool:
    return 0 <= x < math.inf


Rate = Annotated[float, _number_that_is("finite and >= 0", _is_rate)]
Positive = Annotated[float, lambda name, value: as_number(name, value, POSITIVE)]
Share = Annotated[float, _number_that_is("in [0, 1]", lambda x: 0 <= x <= 1)]
Fall = Annotated[float, lambda name, value: as_number(name, value, FRACTION)]
Decay = Annotated[float, _number_that_is("in (0, 1]", lambda x: 0 < x <= 1)]
Count = Annotated[int, _integer_from(1)]
Whole = Annotated[int, _integer_from(0)]
CountOrNone = Annotated[int | None, _count_or_none]
Milestones = Annotated[Sequence[int], _milestones]  # kept as a tuple
Progress = Annotated[tuple[float, float | None, int, int] | None, _progress]


def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _checked(name: str, value: Any, hint: Any) -> Any:
    """A schedule's argument as its annotation wants it, or TypeError or ValueError."""
    if get_origin(hint) is Annotated:
        return hint.__metadata__[0](name, value)
    if get_origin(hint) is Literal:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be one of {get_args(hint)}, got {value!r}")
        if value not in get_args(hint):
            raise ValueError(f"{name} must be one of {get_args(hint)}, got {value!r}")
        return str(value)  # not NumPy's
    if hint is bool and not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    if hint is Schedule and not isinstance(value, Schedule):
        raise TypeError(f"{name} must be a schedule, got {value!r}")
    return bool(value) if hint is bool else value


# -- arithmetic that takes an int or an array -----------------------------------------------------


def _pick(condition: Any, yes: _Value, no: _Value) -> _Value:
    if isinstance(condition, np.ndarray):
        return np.where(condition, yes, no)
    return yes if condition else no


def _least(a: _Value, b: _Value) -> _Value:
    return _pick(a < b, a, b)


def _sqrt(x: _Value) -> _Value:
    return np.sqrt(x) if isinstance(x, np.ndarray) else math.sqrt(x)


def _between(a: float, b: float, weight: _Value) -> _Value:
    """`a` at weight 0, `b` at weight 1, straight in between, and never beyond either."""
    value = a + (b - a) * weight
    value = _least(value, b) if a < b else _pick(value < b, b, value)
    return _pick(weight == 1, b, value)


def _geometric(first: float, ratio: float, n: _Value) -> _Value:
    """first * ratio^n; 0 from 0, however large the power."""
    return first * _core.power(ratio, n) if first else n * 0.0


def _half_wave(x: _Value) -> _Value:
    """1 at 0, 0 at 1, along a cosine."""
    return (1 + _core.cospi(x)) / 2


def _count_passed(marks: Sequence[int], t: _T) -> _Value:
    """How many of the sorted `marks` are <= t."""
    if isinstance(t, np.ndarray):
        return np.searchsorted(marks, t, side="right").astype(np.int64)
    return bisect_right(marks, t)


def _take(values: tuple[float, ...], i: _Value) -> _Value:
    return np.array(values)[i] if isinstance(i, np.ndarray) else values[i]


def _split(t: _T, at: int, before: Callable[[_T], _Value], after: Callable[[_T], _Value]) -> _Value:
    """`before(t)` for t < at, then `after(t - at)`."""
    if not isinstance(t, np.ndarray):
        return before(t) if t < at else after(t - at)
    early = t < at
    result = np.empty(t.shape)
    result[early] = before(t[early])
    result[~early] = after(t[~early] - at)
    return result


# -- what all schedules share ---------------------------------------------------------------------


class Schedule(ABC):
    """A number for each step: call it with the step, from 0.

    `schedule(t)` takes an int and returns a float, or takes an array of ints (a list, a range) and
    returns a float64 array; t is from 0 to 2^53. Where an integer is asked for, a float that is
    whole, but for the rounding of a product such as 0.07 * 100, is one. Arguments that are out of
    range raise ValueError, those of another kind TypeError, each by name.

    `schedule.warmup(steps)`, `schedule.then(other, at)` and `schedule * number` make new ones.
    Subclasses are frozen dataclasses with a method `_at(t)`.

    Example:
        >>> from fusedstep.schedules import Cosine
        >>> lr = Cosine(0.1, total=100).warmup(10)
        >>> lr
        Cosine(lr=0.1, total=100, end=0.0).warmup(10, start=0.0)
        >>> lr(5), lr(10), lr(60), lr(110), lr(10**9)
        (0.05, 0.1, 0.05, 0.0, 0.0)
        >>> lr([0, 10]) * 2
        array([0. , 0.2])
    """

    _types: ClassVar[dict[str, type[Schedule]]] = {}
    __array_ufunc__: ClassVar[None] = None  # a NumPy number times a schedule is ours to make

    def __init_subclass__(cls) -> None:
        name = cls.__name__
        taken = Schedule._types.get(name)
        if taken is not None and taken.__module__ == __name__ != cls.__module__:
            raise TypeError(f"a schedule's class must not be named as one of ours, got {name!r}")
        if not name.startswith("_"):
            Schedule._types[name] = cls

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for name in self._arguments():
            object.__setattr__(self, name, _checked(name, getattr(self, name), hints[name]))
        self._check_together()

    def _check_together(self) -> None:  # noqa: B027  # most have no such arguments
        """Raises ValueError for arguments that are fine alone but not together."""

    @abstractmethod
    def _at(self, t: _T) -> _Value:
        """The value at an int, or the values at an int64 array."""

    @property
    def _end(self) -> int | None:
        """The step from which on the last value holds, where the arguments name one."""
        return getattr(self, "total", None)

    @property
    def span(self) -> int:
        """How many steps show what the schedule does; what `plot` draws."""
        return 100 if self._end is None else self._end

    @overload
    def __call__(self, t: SupportsIndex) -> float: ...
    @overload
    def __call__(self, t: Any) -> NDArray[np.float64]: ...
    def __call__(self, t: Any) -> Any:
        """The value at step `t`, an int from 0 to 2^53; or at each of an array of steps.

        Of a step that is traced inside of `jax.jit`, an array of JAX.
        """
        if type(t) is not int:  # which optimizers pass
            if is_traced(t):
                from fusedstep.jax._calls import scheduled

                return scheduled(self, t)
            number = None if isinstance(t, np.ndarray) else as_whole(t)
            if number is None:
                return self._at_each(t)
            t = number
        if not 0 <= t <= LAST:
            raise ValueError(f"t must be from 0 to 2^53, got {t}")
        return float(self._at(t))

    def _at_each(self, t: Any) -> NDArray[np.float64]:
        given = as_steps("t", t)
        result = np.empty(given.shape)
        with np.errstate(over="ignore"):  # as for one step
            result[...] = self._at(given)
        return result

    def warmup(self, steps: float, start: float = 0.0) -> Schedule:
        """Rises (or falls) linearly from `start` to this schedule's first value, then follows it.

        Args:
            steps: length of the warm-up, an integer >= 0; the schedule's own t = 0 is at t = steps.
            start: the value at t = 0; finite and >= 0.

        Returns:
            A new schedule.

        Raises:
            TypeError, ValueError: an argument of another kind or out of range.

        Example:
            >>> from fusedstep.schedules import Constant
            >>> Constant(0.4).warmup(4)(range(6))
            array([0. , 0.1, 0.2, 0.3, 0.4, 0.4])

        Reference:
            Goyal et al. 2017, https://arxiv.org/abs/1706.02677
        """
        return Warmup(self, steps, start)  # type: ignore[arg-type]  # checked there

    def then(self, other: Schedule, at: float | None = None) -> Schedule:
        """This schedule for t < at, from there on `other`, which begins with its own t = 0.

        Args:
            other: a schedule.
            at: the step of the join; an integer >= 0. By default this schedule's end: its `total`,
                after a warm-up that many steps later, after a join the end of what follows it.

        Returns:
            A new schedule.

        Raises:
            TypeError, ValueError: an argument of another kind or out of range, or no `at` after a
                schedule that has no end.

        Example:
            >>> from fusedstep.schedules import Constant, Linear
            >>> Constant(1.0).then(Linear(1.0, total=4), at=2)(range(7))
            array([1.  , 1.  , 1.  , 0.75, 0.5 , 0.25, 0.  ])
            >>> Linear(1.0, total=2, end=0.5).then(Constant(0.1))
            Linear(lr=1.0, total=2, end=0.5).then(Constant(lr=0.1), at=2)
        """
        at = self._end if at is None else at
        if at is None:
            raise TypeError(f"at must be given after a schedule that has no end, got {self!r}")
        return Then(self, other, at)  # type: ignore[arg-type]  # checked there

    def __mul__(self, factor: float) -> Schedule:
        if isinstance(factor, Schedule | str | bytes) or np.ndim(factor):
            return NotImplemented
        return Scaled(self, factor)

    __rmul__ = __mul__

    def to_dict(self) -> dict[str, Any]:
        """The schedule as a dict of numbers, strings, lists and dicts, for JSON or a checkpoint.

        Example:
            >>> from fusedstep.schedules import Step, from_dict
            >>> Step(0.1, every=30).to_dict()
            {'type': 'Step', 'lr': 0.1, 'every': 30, 'factor': 0.1}
            >>> from_dict(Step(0.1, every=30).to_dict())
            Step(lr=0.1, every=30, factor=0.1)
        """
        result: dict[str, Any] = {"type": type(self).__name__}
        for name in self._arguments():
            value = getattr(self, name)
            if isinstance(value, Schedule):
                value = value.to_dict()
            result[name] = list(value) if isinstance(value, tuple) else value
        return result

    @classmethod
    def from_dict(cls: type[_S], values: Mapping[str, Any]) -> _S:
        """The schedule whose `to_dict` gave `values`.

        Raises:
            TypeError, ValueError: not such a dict, or of a schedule of another class.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a dict, got {values!r}")
        arguments = dict(values)
        kind = arguments.pop("type", None)
        found = Schedule._types.get(kind) if isinstance(kind, str) else None
        if found is None or not issubclass(found, cls):
            known = [name for name, one in Schedule._types.items() if issubclass(one, cls)]
            raise ValueError(f"values['type'] must be one of {known}, got {kind!r}")
        if unknown := [name for name in arguments if name not in found._arguments()]:
            raise ValueError(f"values must have the keys {found._arguments()}, got {unknown}")
        required = [
            one.name
            for one in fields(found)  # type: ignore[arg-type]  # of a dataclass
            if one.default is MISSING
        ]
        if missing := [name for name in required if name not in arguments]:
            raise ValueError(f"values must have the keys {required}, got no {missing}")
        for name in arguments:
            if _hints(found)[name] is Schedule:
                arguments[name] = Schedule.from_dict(arguments[name])
        return found(**arguments)

    @classmethod
    def _arguments(cls) -> list[str]:
        return [one.name for one in fields(cls)]  # type: ignore[arg-type]  # of a dataclass below

    def plot(self, steps: int | None = None, ax: Any = None, **line: Any) -> Any:
        """Draws the schedule; needs matplotlib.

        Args:
            steps: draws t = 0 to `steps`; by default as many as show what the schedule does.
            ax: the matplotlib Axes to draw on; a new one by default.
            **line: as `Axes.plot` takes them: `color`, `label`, ...

        Returns:
            The Axes.

        Raises:
            TypeError, ValueError: steps is not an integer >= 1, or ax no Axes.
            ModuleNotFoundError: matplotlib is not installed.
        """
        last = self._shown if steps is None else as_integer("steps", steps, 1)
        if ax is None:
            ax = new_axes()
            ax.set(xlabel="step", ylabel="value")
        else:
            as_axes(ax)
        t = np.arange(min(last, 10_000) + 1)
        if last > 10_000:  # one at random of each stretch: equal strides can hide a wave
            ends = np.linspace(0, last, 10_000).astype(np.int64)
            within = np.random.default_rng(0).integers(ends[:-1], ends[1:])
            t = np.unique([0, *within, last])
        ax.plot(t, self(t), **{"label": repr(self), **line})
        return ax

    @property
    def _shown(self) -> int:
        return min(self.span, LAST)


from_dict: Callable[[Mapping[str, Any]], Schedule] = Schedule.from_dict


# -- what other schedules are made into -----------------------------------------------------------


def _operand(schedule: Schedule) -> str:
    """A schedule's repr as what stands before a dot."""
    return f"({schedule!r})" if isinstance(schedule, Scaled) else repr(schedule)


@dataclass(frozen=True, repr=False)
class Warmup(Schedule):
    """What `Schedule.warmup` makes."""

    schedule: Schedule
    steps: Whole
    start: Rate = 0.0

    def _at(self, t: _T) -> _Value:
        return _split(t, self.steps, self._rise, self.schedule._at)

    def _rise(self, t: _T) -> _Value:
        return _between(self.start, self.schedule._at(0), t / self.steps)

    @property
    def _end(self) -> int | None:
        return None if self.schedule._end is None else self.steps + self.schedule._end

    @property
    def span(self) -> int:
        """The warm-up and the schedule's own."""
        return self.steps + self.schedule.span

    def __repr__(self) -> str:
        return f"{_operand(self.schedule)}.warmup({self.steps}, start={self.start})"


@dataclass(frozen=True, repr=False)
class Then(Schedule):
    """What `Schedule.then` makes."""

    first: Schedule
    other: Schedule
    at: Whole

    def _at(self, t: _T) -> _Value:
        return _split(t, self.at, self.first._at, self.other._at)

    @property
    def _end(self) -> int | None:
        return None if self.other._end is None else self.at + self.other._end

    @property
    def span(self) -> int:
        """Up to the join, and the other's own."""
        return self.at + self.other.span

    def __repr__(self) -> str:
        return f"{_operand(self.first)}.then({self.other!r}, at={self.at})"


@dataclass(frozen=True, repr=False)
class Scaled(Schedule):
    """What `schedule * factor` makes."""

    schedule: Schedule
    factor: Rate

    def _at(self, t: _T) -> _Value:
        return self.schedule._at(t) * self.factor

    @property
    def _end(self) -> int | None:
        return self.schedule._end

    @property
    def span(self) -> int:
        """The schedule's own."""
        return self.schedule.span

    def __repr__(self) -> str:
        return f"{self.schedule!r} * {self.factor}"


class _Cycle(Schedule):
    """A schedule of the learning rate that has one of the momentum beside it."""

    @abstractmethod
    def _momentum_at(self, t: _T) -> _Value:
        """The momentum, as `_at` gives the rate."""

    @property
    def momentum(self) -> Schedule:
        """The momentum that cycles against the learning rate, itself a schedule."""
        return MomentumOf(self)


@dataclass(frozen=True, repr=False)
class MomentumOf(Schedule):
    """What `OneCycle.momentum` and `Cyclic.momentum` are."""

    schedule: Schedule

    def _check_together(self) -> None:
        if not isinstance(self.schedule, _Cycle):
            raise TypeError(f"schedule must be OneCycle or Cyclic, got {self.schedule!r}")

    def _at(self, t: _T) -> _Value:
        assert isinstance(self.schedule, _Cycle)
        return self.schedule._momentum_at(t)

    @property
    def _end(self) -> int | None:
        return self.schedule._end

    @property
    def span(self) -> int:
        """The learning rate's."""
        return self.schedule.span

    def __repr__(self) -> str:
        return f"{self.schedule!r}.momentum"


# -- the schedules --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step.

        lr(t) = lr

    Args:
        lr: the value; finite and >= 0.

    Example:
        >>> from fusedstep.schedules import Constant
        >>> Constant(0.1)(10**9)
        0.1
    """

    lr: Rate

    def _at(self, t: _T) -> _Value:
        return self.lr


@dataclass(frozen=True)
class Step(Schedule):
    """Step decay: multiplied by a factor at regular intervals.

        lr(t) = lr * factor^floor(t / every)

    Args:
        lr: the first value; finite and >= 0.
        every: steps between changes; an integer >= 1.
        factor: finite and >= 0.

    Example:
        >>> from fusedstep.schedules import Step
        >>> Step(0.5, every=2, factor=0.5)(range(5))
        array([0.5  , 0.5  , 0.25 , 0.25 , 0.125])

    Differs from:
        nothing: `torch.optim.lr_scheduler.StepLR(step_size=every, gamma=factor)`.
    """

    lr: Rate
    every: Count
    factor: Rate = 0.1

    def _at(self, t: _T) -> _Value:
        return _geometric(self.lr, self.factor, t // self.every)

    @property
    def span(self) -> int:
        """Four stages."""
        return 4 * self.every


@dataclass(frozen=True)
class MultiStep(Schedule):
    """Step decay at milestones of one's own.

        lr(t) = lr * factor^(number of milestones <= t)

    Args:
        lr: the first value; finite and >= 0.
        milestones: the steps from which on the next value holds; sorted integers >= 0. One that
            occurs twice counts twice.
        factor: finite and >= 0.

    Example:
        >>> from fusedstep.schedules import MultiStep
        >>> MultiStep(0.5, milestones=[1, 3], factor=0.5)(range(5))
        array([0.5  , 0.25 , 0.25 , 0.125, 0.125])

    Differs from:
        nothing: `torch.optim.lr_scheduler.MultiStepLR(gamma=factor)`.
    """

    lr: Rate
    milestones: Milestones
    factor: Rate = 0.1

    def _at(self, t: _T) -> _Value:
        return _geometric(self.lr, self.factor, _count_passed(self.milestones, t))

    @property
    def span(self) -> int:
        """Somewhat past the last milestone."""
        return self.milestones[-1] * 4 // 3 + 1


@dataclass(frozen=True)
class Exponential(Schedule):
    """Exponential decay: multiplied by the same number at each step.

        lr(t) = lr * decay^t

    Args:
        lr: the first value; finite and >= 0.
        decay: finite and >= 0.

    Example:
        >>> from fusedstep.schedules import Exponential
        >>> Exponential(0.5, decay=0.5)(range(4))
        array([0.5   , 0.25  , 0.125 , 0.0625])
        >>> Exponential.percent(0.5, alpha=50)
        Exponential(lr=0.5, decay=0.5)

    Differs from:
        nothing: `torch.optim.lr_scheduler.ExponentialLR(gamma=decay)`.
    """

    lr: Rate
    decay: Rate

    @classmethod
    def percent(cls, lr: float, alpha: float) -> Exponential:
        """Loses `alpha` percent at each step: `lr(t) = lr * (1 - alpha/100)^t`; alpha <= 100."""
        rule = _number_that_is("finite and <= 100", lambda x: -math.inf < x <= 100)
        return cls(lr, 1 - rule("alpha", alpha) / 100)

    def _at(self, t: _T) -> _Value:
        return _geometric(self.lr, self.decay, t)

    @property
    def span(self) -> int:
        """Down to one percent."""
        if not 0 < self.decay < 1:
            return 100
        return min(LAST, math.ceil(math.log(0.01) / math.log(self.decay)))


@dataclass(frozen=True)
class Linear(Schedule):
    """Straight from `lr` to `end`, and then `end`.

        lr(t) = lr + (end - lr) * min(t, total) / total

    Args:
        lr: the value at t = 0; finite and >= 0.
        total: the step from which on `end` holds; an integer >= 1.
        end: finite and >= 0.

    Example:
        >>> from fusedstep.schedules import Linear
        >>> Linear(1.0, total=4)(range(6))
        array([1.  , 0.75, 0.5 , 0.25, 0.  , 0.  ])

    Differs from:
        `torch.optim.lr_scheduler.LinearLR`, whose ends are factors of the optimizer's rate.
    """

    lr: Rate
    total: Count
    end: Rate = 0.0

    def _at(self, t: _T) -> _Value:
        return _between(self.end, self.lr, _remaining(t, self.total))


def _remaining(t: _T, total: int) -> _Value:
    """The share of `total` steps that is yet to come."""
    return (total - _least(t, total)) / total


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from `lr` down to `end`, and then `end`.

        lr(t) = end + (lr - end)/2 * (1 + cos(pi * min(t, total) / total))

    Args:
        lr: the value at t = 0; finite and >= 0.
        total: the step from which on `end` holds; an integer >= 1.
        end: finite and >= 0.

    Example:
        >>> from fusedstep.schedules import Cosine
        >>> Cosine(1.0, total=4, end=0.5)([0, 1, 2, 4, 5])
        array([1.       , 0.9267767, 0.75     , 0.5      , 0.5      ])

    Reference:
        Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983

    Differs from:
        `torch.optim.lr_scheduler.CosineAnnealingLR`, which rises again after `total`.
    """

    lr: Rate
    total: Count
    end: Rate = 0.0

    def _at(self, t: _T) -> _Value:
        return _between(self.end, self.lr, _half_wave(_least(t, self.total) / self.total))


@dataclass(frozen=True)
class Polynomial(Schedule):
    """From `lr` to `end` along a power of the steps that remain, and then `end`.

        lr(t) = end + (lr - end) * (1 - min(t, total)/total)^power

    Args:
        lr: the value at t = 0; finite and >= 0.
        total: the step from which on `end` holds; an integer >= 1.
        end: finite and >= 0.
        power: finite and > 0; 1 is `Linear`.

    Example:
        >>> from fusedstep.schedules import Polynomial
        >>> Polynomial(1.0, total=4, power=2.0)(range(6))
        array([1.    , 0.5625, 0.25  , 0.0625, 0.    , 0.    ])

    Differs from:
        `torch.optim.lr_scheduler.PolynomialLR`, which ends at 0.
    """

    lr: Rate
    total: Count
    end: Rate = 0.0
    power: Positive = 1.0

    def _at(self, t: _T) -> _Value:
        return _between(self.end, self.lr, _core.power(_remaining(t, self.total), self.power))


@dataclass(frozen=True)
class CosineRestarts(Schedule):
    """Half a cosine from `lr` towards `end`, again and again (SGDR).

        lr(t) = end + (lr - end)/2 * (1 + cos(pi * s / n))      s steps into a cycle of n steps

    Cycles have period, period * mult, period * mult^2, ... steps.

    Args:
        lr: the value at the start of each cycle; finite and >= 0.
        period: steps of the first cycle; an integer >= 1.
        mult: an integer >= 1.
        end: finite and >= 0.

    Example:
        >>> from fusedstep.schedules import CosineRestarts
        >>> CosineRestarts(1.0, period=2, mult=2)([0, 1, 2, 4, 6, 10])
        array([1. , 0.5, 1. , 0.5, 1. , 0.5])

    Reference:
        Loshchilov & Hutter 2017, https://arxiv.org/abs/1608.03983

    Differs from:
        nothing: `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(T_0=period, T_mult=mult)`.
    """

    lr: Rate
    period: Count
    mult: Count = 1
    end: Rate = 0.0

    def _at(self, t: _T) -> _Value:
        if self.mult == 1:
            into, length = t % self.period, self.period
        else:
            cycle = _count_passed(self._starts, t) - 1
            into, length = t - _take(self._starts, cycle), _take(self._lengths, cycle)
        return _between(self.end, self.lr, _half_wave(into / length))

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        starts, length = [0], self.period
        while starts[-1] + length <= LAST:
            starts.append(starts[-1] + length)
            length *= self.mult
        return tuple(starts)

    @cached_property
    def _lengths(self) -> tuple[float, ...]:  # the last may be too long for an int64
        return tuple(float(self.period * self.mult**i) for i in range(len(self._starts)))

    @property
    def span(self) -> int:
        """Three cycles."""
        return self.period * (1 + self.mult + self.mult**2)


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """Falls with the square root of the step.

        lr(t) = lr * sqrt(timescale / (t + timescale))

    Args:
        lr: the value at t = 0; finite and >= 0.
        timescale: the steps after which `lr` is down by sqrt(2); finite and > 0.

    Example:
        >>> from fusedstep.schedules import InverseSqrt
        >>> InverseSqrt(1.0, timescale=100)([0, 300, 1500])
        array([1.  , 0.5 , 0.25])

    Reference:
        Zhai et al. 2022, https://arxiv.org/abs/2106.04560, after Vaswani et al. 2017
    """

    lr: Rate
    timescale: Positive

    def _at(self, t: _T) -> _Value:
        return self.lr * _sqrt(self.timescale / (t + self.timescale))

    @property
    def span(self) -> int:
        """Down to about a third."""
        return math.ceil(min(8 * self.timescale, LAST))


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay: `lr`, and over the last `decay` steps down to `end`.

        lr(t) = lr                                   t <= total - decay
        lr(t) = end + (lr - end) * w(x)              x = (t - (total - decay)) / decay, at most 1

    where w is 1 - x (linear), (1 + cos(pi*x))/2 (cosine) or 1 - sqrt(x) (1-sqrt); the exponential
    form is lr * (end/lr)^x. The warm-up comes with `.warmup(steps)`.

    Args:
        lr: the stable value; finite and >= 0, with the exponential form > 0.
        total: the step from which on `end` holds; an integer >= 1.
        decay: steps of the decay; an integer from 1 to `total`.
        end: finite and >= 0, with the exponential form > 0.
        shape: "linear", "cosine", "exponential" or "1-sqrt".

    Example:
        >>> from fusedstep.schedules import WSD
        >>> WSD(1.0, total=6, decay=4).warmup(2)(range(10))
        array([0.  , 0.5 , 1.  , 1.  , 1.  , 0.75, 0.5 , 0.25, 0.  , 0.  ])

    Reference:
        Hu et al. 2024, https://arxiv.org/abs/2404.06395; 1-sqrt: Hägele et al. 2024,
        https://arxiv.org/abs/2405.18392
    """

    lr: Rate
    total: Count
    decay: Count
    end: Rate = 0.0
    shape: Literal["linear", "cosine", "exponential", "1-sqrt"] = "linear"

    def _check_together(self) -> None:
        if self.decay > self.total:
            raise ValueError(f"decay must be <= total ({self.total}), got {self.decay}")
        if self.shape == "exponential":
            for name in ("lr", "end"):
                if getattr(self, name) == 0:
                    raise ValueError(f"{name} must be > 0 with shape='exponential', got 0.0")
            if not 0 < self.end / self.lr < math.inf:
                raise ValueError(f"end / lr must be finite and > 0, got {self.end} / {self.lr}")

    def _at(self, t: _T) -> _Value:
        return _split(t, self.total - self.decay, lambda t: self.lr, self._fall)

    def _fall(self, t: _T) -> _Value:
        x = _least(t, self.decay) / self.decay
        if self.shape == "exponential":
            return _pick(x == 1, self.end, _geometric(self.lr, self.end / self.lr, x))
        if self.shape == "linear":
            weight = _remaining(t, self.decay)
        else:
            weight = _half_wave(x) if self.shape == "cosine" else 1 - _sqrt(x)
        return _between(self.end, self.lr, weight)


@dataclass(frozen=True)
class OneCycle(_Cycle):
    """One cycle: up to `max_lr`, then down to almost nothing, while the momentum does the reverse.

        from          to            until step (from 0)
        max_lr/div    max_lr        pct_start * total - 1               div = div_factor
        max_lr        lowest        total - 1                           lowest = max_lr/div/final

    With `three_phase` it falls to max_lr/div by step `2 * pct_start * total - 2` and only then to
    the lowest. `.momentum` is the schedule of the momentum, from `max_momentum` to `base_momentum`
    and back.

    Args:
        max_lr: the highest value; finite and >= 0.
        total: steps of the cycle, after which the lowest value holds; an integer >= 1.
        pct_start: share of the cycle that rises; in [0, 1], at most 0.5 with `three_phase`.
        div_factor, final_div_factor: finite and > 0.
        anneal: "cos" or "linear".
        three_phase: adds the phase back to the first value.
        base_momentum, max_momentum: in [0, 1).

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> cycle = fs.schedules.OneCycle(1.0, total=10, div_factor=4, anneal="linear")
        >>> cycle([0, 1, 2, 9, 10])
        array([2.50e-01, 6.25e-01, 1.00e+00, 2.50e-05, 2.50e-05])
        >>> opt = fs.SGD(np.ones(3, np.float32), lr=cycle, momentum=cycle.momentum)
        >>> cycle.momentum(0), cycle.momentum(2), cycle.momentum(9)
        (0.95, 0.85, 0.95)

    Reference:
        Smith & Topin 2018, https://arxiv.org/abs/1708.07120

    Differs from:
        `torch.optim.lr_scheduler.OneCycleLR`, which raises after `total` steps, divides by zero
        where `pct_start * total` is 1, and sets the momentum by itself.
    """

    max_lr: Rate
    total: Count
    pct_start: Share = 0.3
    div_factor: Positive = 25.0
    final_div_factor: Positive = 1e4
    anneal: Literal["cos", "linear"] = "cos"
    three_phase: bool = False
    base_momentum: Fall = field(default=0.85, kw_only=True)
    max_momentum: Fall = field(default=0.95, kw_only=True)

    def _check_together(self) -> None:
        if self.three_phase and self.pct_start > 0.5:
            raise ValueError(f"pct_start must be <= 0.5 with three_phase, got {self.pct_start}")

    def _at(self, t: _T) -> _Value:
        first = self.max_lr / self.div_factor
        return self._along(t, first, self.max_lr, first, first / self.final_div_factor)

    def _momentum_at(self, t: _T) -> _Value:
        low, high = self.base_momentum, self.max_momentum
        return self._along(t, high, low, high, high)

    def _along(self, t: _T, first: float, top: float, third: float, last: float) -> _Value:
        """From value to value at the ends of the phases."""
        values = [first, top, third, last] if self.three_phase else [first, top, last]
        result: _Value = last
        for i in reversed(range(len(values) - 1)):
            begin, end = self._ends[i], self._ends[i + 1]
            if not isinstance(t, np.ndarray) and t > end:
                continue
            x = _least((t - begin) / (end - begin), 1.0) if end > begin else t * 0.0 + 1.0
            a, b = values[i], values[i + 1]
            cosine = self.anneal == "cos"
            here = _between(b, a, _half_wave(x)) if cosine else _between(a, b, x)
            result = _pick(t <= end, here, result)
        return result

    @cached_property
    def _ends(self) -> tuple[float, ...]:
        """The steps at which phases begin and end, which as in torch need not be integers."""
        rise = self.pct_start * self.total - 1
        back = (2 * self.pct_start * self.total - 2,) if self.three_phase else ()
        return 0.0, rise, *back, self.total - 1.0


@dataclass(frozen=True)
class Cyclic(_Cycle):
    """Triangular waves between `base_lr` and `max_lr`, while the momentum does the reverse.

        lr(t) = base_lr + (max_lr - base_lr) * h * s      h from 0 up to 1 and back in each cycle

    where s is 1 ("triangular"), 2^-cycle ("triangular2") or gamma^t ("exp_range"). `.momentum` is
    the schedule of the momentum, `max_momentum - (max_momentum - base_momentum) * h * s`.

    Args:
        base_lr, max_lr: finite and >= 0.
        step_size_up: steps of the rise; an integer >= 1.
        step_size_down: steps of the fall; an integer >= 1, or None for as many as of the rise.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: in (0, 1]; 1 in the other modes, which do not use it.
        base_momentum, max_momentum: in [0, 1).

    Example:
        >>> from fusedstep.schedules import Cyclic
        >>> Cyclic(0.0, 1.0, step_size_up=2, mode="triangular2")(range(9))
        array([0.  , 0.5 , 1.  , 0.5 , 0.  , 0.25, 0.5 , 0.25, 0.  ])

    Reference:
        Smith 2017, https://arxiv.org/abs/1506.01186

    Differs from:
        `torch.optim.lr_scheduler.CyclicLR`, which sets the momentum by itself, takes a function for
        the scale, and ignores `gamma` in the modes that do not use it.
    """

    base_lr: Rate
    max_lr: Rate
    step_size_up: Count = 2000
    step_size_down: CountOrNone = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: Decay = 1.0
    base_momentum: Fall = field(default=0.8, kw_only=True)
    max_momentum: Fall = field(default=0.9, kw_only=True)

    def _check_together(self) -> None:
        if self.gamma != 1 and self.mode != "exp_range":
            raise ValueError(f"gamma must be 1 with mode={self.mode!r}, got {self.gamma}")

    def _at(self, t: _T) -> _Value:
        return _between(self.base_lr, self.max_lr, self._height(t))

    def _momentum_at(self, t: _T) -> _Value:
        return _between(self.max_momentum, self.base_momentum, self._height(t))

    def _height(self, t: _T) -> _Value:
        up, down = self.step_size_up, self.step_size_down or self.step_size_up
        into = t % (up + down)
        height = _pick(into <= up, into / up, (up + down - into) / down)
        if self.mode == "triangular2":
            height = height * _core.power(0.5, t // (up + down))
        elif self.mode == "exp_range":
            height = height * _core.power(self.gamma, t)
        return height

    @property
    def span(self) -> int:
        """Three cycles."""
        return 3 * (self.step_size_up + (self.step_size_down or self.step_size_up))


@dataclass(frozen=True)
class ReduceOnPlateau(Schedule):
    """Falls by a factor when a metric has stopped improving: the only schedule with a state.

        lr = max(lr * factor, min_lr)       after more than `patience` metrics in a row no better

    `step(metric)` tells it the metric, once per epoch or as often as that is known; `schedule(t)`
    is the present rate, whatever t. Its state is `progress`, part of equality, repr and `to_dict`;
    all else is immutable, and the hash is of the arguments. Optimizers and
    `fusedstep.torch.LRScheduler` save it in their `state_dict`, and put it back into the schedule
    that they were given.

    Args:
        lr: the first value; finite and >= 0.
        mode: "min" where a lower metric is better, "max" where a higher one is.
        factor: in [0, 1).
        patience: how many steps in a row may be no better; an integer >= 0.
        threshold: a metric is better by at least this; finite and >= 0.
        threshold_mode: "rel": threshold is a share of the best metric's size; "abs": a difference.
        cooldown: steps after a fall in which none is counted; an integer >= 0.
        min_lr: lower bound; finite and >= 0.
        eps: falls smaller than this are not made; finite and >= 0.
        progress: None, or (rate, best metric, steps without a better one, cooldown left).

    Example:
        >>> from fusedstep.schedules import ReduceOnPlateau
        >>> lr = ReduceOnPlateau(0.5, factor=0.5, patience=1)
        >>> [lr.step(loss) for loss in (3.0, 2.0, 2.0, 2.0, 1.0)]
        [0.5, 0.5, 0.5, 0.25, 0.25]
        >>> lr(10**9)
        0.25

    Differs from:
        `torch.optim.lr_scheduler.ReduceLROnPlateau` in the way it is attached; refuses a metric
        that is infinitely good; and takes a "rel" threshold as a share of the best metric's size.
        torch multiplies the metric itself, so that below 0 its bar lies on the worse side: metrics
        that get worse by less than the threshold count as better, and the rate never falls.
    """

    lr: Rate
    mode: Literal["min", "max"] = "min"
    factor: Fall = 0.1
    patience: Whole = 10
    threshold: Rate = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: Whole = 0
    min_lr: Rate = 0.0
    eps: Rate = 1e-8
    progress: Progress = field(default=None, hash=False, kw_only=True)

    def _at(self, t: _T) -> _Value:
        return self.lr if self.progress is None else self.progress[0]

    def step(self, metric: float) -> float:
        """Takes in a metric (NaN is no better than any) and returns the rate from now on."""
        value = as_number("metric", metric, ANY)
        rate, best, bad, cooling = self.progress or (self.lr, None, 0, 0)
        if self._is_better(value, best):
            if math.isinf(value):
                raise ValueError(f"metric must not be infinitely good, got {value}")
            best, bad = value, 0
        else:
            bad += 1
        if cooling:
            cooling, bad = cooling - 1, 0
        if bad > self.patience:
            lower = max(rate * self.factor, self.min_lr)
            rate = lower if rate - lower > self.eps else rate
            cooling, bad = self.cooldown, 0
        self._go_on((rate, best, bad, cooling))
        return rate

    def _go_on(self, progress: tuple[float, float | None, int, int] | None) -> None:
        object.__setattr__(self, "progress", progress)

    def _changed_to(self, progress: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What makes `progress` its own, together with other changes: a dict, and its update."""
        return self.__dict__, {"progress": progress}

    def _is_better(self, value: float, best: float | None) -> bool:
        sign = 1 if self.mode == "min" else -1
        if best is None:
            return sign * value < math.inf
        if self.threshold_mode == "abs":
            bar = best - sign * self.threshold
        else:  # a share of the best one's size: below 0, too, the bar lies on the better side
            bar = best * (1 - math.copysign(self.threshold, sign * best))
        return sign * value < sign * bar


def plateaus(values: Iterable[Any]) -> list[ReduceOnPlateau]:
    """The schedules with a state among hyperparameters, and within them."""
    found: list[ReduceOnPlateau] = []
    for value in values:
        if isinstance(value, ReduceOnPlateau):
            found.append(value)
        elif isinstance(value, Schedule):
            found += plateaus(getattr(value, name) for name in value._arguments())
        elif isinstance(value, tuple):
            found += plateaus(value)
    return found


def stored(value: Any) -> Any:
    """A schedule, or each of several, as its `to_dict`; None for a number or another callable."""
    if isinstance(value, list | tuple):
        return [stored(one) for one in value]
    return value.to_dict() if isinstance(value, Schedule) else None


class Resumed(NamedTuple):
    """What a checkpoint's schedules mean for those that an optimizer or scheduler has now."""

    progress: list[tuple[ReduceOnPlateau, Any]]  # where each goes on from
    warning: str  # how the two differ; empty if they do not


def resumed(places: Iterable[tuple[str, str, Any, Any]]) -> Resumed:
    """Compares present hyperparameters with a checkpoint's schedules, and changes nothing.

    Args:
        places: for each hyperparameter, or half of one, its name, the path of its entry in the
            checkpoint, its present value, and the entry: what `to_dict` gave, or None.

    Raises:
        TypeError, ValueError: an entry is not such a dict, or one `ReduceOnPlateau` stands in
            several places to which the checkpoint gives different progress.
    """
    reached: dict[int, tuple[ReduceOnPlateau, Any]] = {}
    differences = []
    for name, where, own, values in places:
        if values is None:
            continue
        saved = _read(where, values)
        if callable(own) and not isinstance(own, Schedule):
            continue  # nothing is known of it
        mine, theirs = plateaus([own]), plateaus([saved])
        for one, other in zip(mine, theirs, strict=True) if len(mine) == len(theirs) else ():
            if reached.setdefault(id(one), (one, other.progress))[1] != other.progress:
                raise ValueError(
                    f"{where} must have the progress of the other places of its schedule, got"
                    f" {other.progress}"
                )
        before, now = _without_progress(saved), _without_progress(own)
        if before != now:
            differences.append(f"{name} was {before!r}, is {now!r}")
    warning = "; ".join(dict.fromkeys(differences))  # once where many groups have the same
    if warning:
        warning = f"schedules differ from the checkpoint's, and the present ones stay: {warning}"
    return Resumed(list(reached.values()), warning)


def _read(where: str, values: Any) -> Any:
    """A checkpoint's schedule; as it is where it has a class that this process does not know."""
    try:
        return Schedule.from_dict(values) if _is_known(values) else values
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None


def _is_known(values: Any) -> bool:
    """Whether no schedule in the dict has the name of an unknown class."""
    if not isinstance(values, Mapping):
        return True
    kind = values.get("type")
    named = not isinstance(kind, str) or kind in Schedule._types
    return named and all(map(_is_known, values.values()))


def _without_progress(schedule: Any) -> Any:
    bare = copy.deepcopy(schedule)
    for one in plateaus([bare]):
        one._go_on(None)
    return bare
