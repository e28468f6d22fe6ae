"""The optimizers, each a small class: its arguments, its equation in words, its rule's name.

What they share is `Optimizer`; what a step does is in csrc/. In order of increasing complexity.
"""

from __future__ import annotations

import copy
import fnmatch
import inspect
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, SupportsFloat

import numpy as np

from fusedstep import _arrays, _checkpoint, _core, _gpu, _lookahead
from fusedstep._arrays import announcer, as_array, as_dtype, in_order, is_tensor, name_params
from fusedstep._hypers import (
    AT_LEAST_0,
    FINITE,
    POSITIVE,
    as_number,
    at_step,
    is_scheduled,
    kept_schedules,
)
from fusedstep._spec import LR, Spec
from fusedstep._turn import new_turn
from fusedstep._types import Array, Betas, Changes, Grads, Key, Options, Pair, Params, Rate, States
from fusedstep.buffers import FlatBuffer
from fusedstep.schedules import Resumed, Schedule, plateaus, resumed, stored


class StepReport(NamedTuple):
    """What one step did."""

    step: int  # steps taken, this one included
    lr: float  # of the first group
    elements: int  # updated; tensors without a gradient are not counted


class Group:
    """Hyperparameters for the parameters whose names match a pattern.

    Args:
        pattern: a shell-style pattern (`fnmatch`: `*`, `?`, `[...]`) or several of them. A
            parameter belongs to the first group that matches its name; unnamed parameters are
            called `0`, `1`, ...
        **hypers: what differs from the optimizer's own arguments.

    Example:
        >>> import fusedstep as fs
        >>> fs.Group(["*.bias", "norm*"], weight_decay=0.0)
        Group(['*.bias', 'norm*'], weight_decay=0.0)
    """

    def __init__(self, pattern: str | Sequence[str], **hypers: Any) -> None:
        patterns = [pattern] if isinstance(pattern, str) else pattern
        strings = isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns)
        if not strings or not patterns:
            raise TypeError(f"pattern must be a string or several, got {pattern!r}")
        self.patterns = list(patterns)
        self.hypers = hypers

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("patterns", "hypers"):
            raise AttributeError(f"{name} must be set in group.hypers[{name!r}], got {value!r}")
        super().__setattr__(name, value)

    def matches(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the group."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)

    def __repr__(self) -> str:
        pattern = self.patterns[0] if len(self.patterns) == 1 else self.patterns
        return f"Group({', '.join([repr(pattern), *_assignments(self.hypers)])})"


# Wildcards as `fnmatch` has them; to take more for one would do no harm here.
_WILD = re.compile(r"[*?]|\[!?\]?[^\]]*\]")


class _Patterns:
    """Several groups' patterns, found by a part of the names that match them.

    So that a name is held against the few that it may match: one of thousands of groups has, say,
    `layer.17.*`. Of the parts between a pattern's wildcards it is the one that it shares with the
    fewest others.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        given = [(k, pattern) for k, group in enumerate(groups) for pattern in group.patterns]
        parts = [_WILD.split(pattern) for _, pattern in given]
        sharing = Counter(part for found in parts for part in set(found))
        self._whole: dict[str, int] = {}  # patterns without wildcards
        self._by_part: dict[int, dict[str, list[tuple[int, str]]]] = {}  # by its length first
        for (k, pattern), found in zip(given, parts, strict=True):
            if found == [pattern]:
                self._whole.setdefault(pattern, k)
                continue
            rarest = min(found, key=lambda part: (sharing[part], -len(part)))
            alike = self._by_part.setdefault(len(rarest), {})
            alike.setdefault(rarest, []).append((k, pattern))

    def first(self, name: str) -> int | None:
        """The number of the first group that has the name."""
        found = self._whole.get(name)
        for n, alike in self._by_part.items():
            for part in {name[at : at + n] for at in range(len(name) - n + 1)}:
                for k, pattern in alike.get(part, ()):
                    if found is not None and k >= found:
                        break
                    if fnmatch.fnmatchcase(name, pattern):
                        found = k
                        break
        return found


class ParamGroup(MutableMapping[str, Any]):
    """The hyperparameters of one group, checked when written, used from the next step on.

    Values that are wrong only together, such as `nesterov` without `momentum`, are found by that
    step, which then raises.

    `group["params"]` lists the group's parameters by number and is read-only. Keys that are no
    hyperparameters come from a checkpoint, and go into the next one.
    """

    def __init__(self, hypers: dict[str, Any], owner: type[Optimizer], params: list[int]) -> None:
        self._owner = owner
        self._params = params
        # Both are replaced as a whole by every change, so that what was read from them tells by its
        # identity whether it is stale, and a change is made at once.
        self._own: dict[str, Any] = {}  # what a checkpoint's group has beside hyperparameters
        self._hypers = {name: self._check(name, value) for name, value in hypers.items()}
        # The hyperparameters of which the rule's reading is known, but for a scheduled rate.
        self._last_read: tuple[dict[str, Any] | None, list[float]] = (None, [])

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise AttributeError(f'{name} must be set as group["{name}"], got {value!r}')
        super().__setattr__(name, value)

    def __copy__(self) -> ParamGroup:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _hypers=dict(self._hypers), _own=dict(self._own))
        return twin

    def _check(self, name: str, value: Any) -> Any:
        return self._owner.spec.check(name, value, schedules=True)

    def __getitem__(self, name: str) -> Any:
        if name == "params":
            return list(self._params)
        return self._own[name] if name in self._own else self._hypers[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._own:
            self._own = {**self._own, name: value}
            return
        if name not in self._hypers:
            known = ", ".join(self._hypers)
            raise ValueError(f"hyperparameter must be one of {known}, got {name!r}")
        self._hypers = {**self._hypers, name: self._check(name, value)}

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name} must stay: a group keeps all its hyperparameters")

    def __iter__(self) -> Iterator[str]:
        return iter((*self._hypers, *self._own, "params"))

    def __len__(self) -> int:
        return len(self._hypers) + len(self._own) + 1

    def _stored(self) -> dict[str, Any]:
        """The schedules among the hyperparameters, as a checkpoint has them."""
        return {
            name: stored(value)
            for name, value in self._hypers.items()
            if any(isinstance(v, Schedule) for v in (value if type(value) is tuple else [value]))
        }

    def __repr__(self) -> str:
        return f"ParamGroup({', '.join(_assignments(self._hypers))}, params={self._params})"


def _assignments(hypers: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in hypers.items()]


class Optimizer:
    """What all optimizers share: groups, state, steps and checkpoints.

    An optimizer updates its parameters in place, and holds on to them. It takes one array, a
    sequence or dict of arrays, or a `FlatBuffer`: NumPy arrays (memory-mapped ones too), torch
    tensors, CuPy arrays, or anything else that exports its memory through DLPack or
    `__cuda_array_interface__`; all in CPU memory, or all on one CUDA device. All must be
    C-contiguous, float32, float64, float16 or bfloat16, and in memory that is known to be writable,
    which JAX's and TensorFlow's immutable arrays are not. A container must keep its arrays: one
    that reads them from a file whenever it is asked, as `np.load` of an .npz file, is refused.
    States are float32, or float64 for float64 parameters, in flat buffers of their own.

    On a CUDA device a step is queued, not waited for, on the stream that is torch's or CuPy's
    current one if the first parameter is theirs, else on the one that the parameter names, else on
    CUDA's default stream. Results are the CPU's, bit by bit. States are arrays there, which
    `cupy.asarray` and `torch.as_tensor` view and `numpy.asarray` copies.

    In place of a number, `lr`, `weight_decay`, `momentum` and each of `betas` take a schedule: one
    of `fusedstep.schedules`, or any callable of the step, which counts from 0.

    A call that raises has changed nothing. One that is interrupted, by Ctrl-C or by what a signal's
    handler raises, has changed all or nothing: parameters, states, counts, `steps` and with it the
    schedules. So a handler may save `state_dict()`.
    """

    spec: ClassVar[Spec]
    _ahead = False  # whether the parameters stand at a look-ahead point

    def __init_subclass__(cls) -> None:
        """Completes the class's docstring from the one table of hyperparameters."""
        args = [
            "params: an array, a sequence or dict of arrays, or a FlatBuffer; see `Optimizer`.",
            *cls.spec.argument_docs(inspect.signature(cls.__init__), schedules=True),
            "groups: `Group` objects: parameters with hyperparameters of their own.",
        ]
        raises = [
            "TypeError: something is not an array or has an unsupported dtype, or a hyperparameter",
            "    is not of its kind.",
            "ValueError: a hyperparameter is outside its range, a group matches no parameter, or",
            "    memory is not where the first parameter's is, C-contiguous, aligned, writable and",
            "    free of overlap.",
        ]
        text = "\n        ".join(["Args:", *args]) + "\n\n    "
        text += "\n        ".join(["Raises:", *raises])
        cls.__doc__ = (cls.__doc__ or "").replace("Args: see below", text)

    def __setattr__(self, name: str, value: Any) -> None:
        cls = type(self)
        if name[0] != "_" and not hasattr(cls, name):
            hypers = self.__dict__["_groups"][0]._hypers if "_groups" in self.__dict__ else {}
            if name in hypers:
                raise AttributeError(
                    f'{name} must be set as opt.param_groups[0]["{name}"], got {value!r}'
                )
            if cls.__module__ == __name__:  # a subclass may have attributes of its own
                known = ", ".join(hypers)
                raise AttributeError(
                    f"{name} must be one of {known}, which are set in opt.param_groups[0],"
                    f" got opt.{name} = {value!r}"
                )
        super().__setattr__(name, value)

    # -- parameters and groups --------------------------------------------------------------------

    def __init__(self, params: Params, groups: Iterable[Group] = (), **hypers: Any) -> None:
        if not hasattr(self, "spec"):
            own = (cls for cls in Optimizer.__subclasses__() if cls.__module__ == __name__)
            raise TypeError(
                f"optimizer must be one of {', '.join(cls.__name__ for cls in own)}, got"
                f" {type(self).__name__}: Optimizer is the base class, which has no rule"
            )
        self._params = name_params(params)
        self._buffer = params if isinstance(params, FlatBuffer) else None
        self._names = [str(key) for key in self._params]
        # A sequence has no names, and its checkpoints go by position; a dict's numbers are names.
        self._named = isinstance(params, Mapping)
        if isinstance(groups, Group) or not isinstance(groups, Iterable):
            raise TypeError(f"groups must be a sequence of Group objects, got {groups!r}")
        self._groups, self._group_of = self._make_groups(hypers, list(groups))
        self._open_table()
        _, states, read = self._prepared()
        self._table.load(states or self._states, self._table.clocks(), 0, [], read)

    def _open_table(self) -> None:
        """Hands the parameters to the compiled table, which checks them.

        States, counts and the number of steps are the table's: it alone changes them, all at once.
        """
        self._turn = new_turn()
        params = list(self._params.values())
        # The CUDA device whose memory all of it is in; None: the CPU's.
        self._index = device = None
        if params and self._buffer is None:
            label = f"params[{self._names[0]}]"
            self._index = _arrays.index_of(params[0], label)
        if self._index is not None:
            known = {"device": params[0].device} if hasattr(params[0], "device") else {}
            device = _gpu.needed(label, **known).device()
        self._table = _core.ArrayTable(
            self.spec.rule, self._names, params, self._group_of, device, self._index or 0
        )
        self._shapes = self._table.shapes()
        self._dtypes = self._table.dtypes()
        self._tensors = {i: p for i, p in enumerate(params) if is_tensor(p)}

    @property
    def _states(self) -> States:
        return self._table.states

    def _make_groups(
        self, hypers: dict[str, Any], groups: list[Group]
    ) -> tuple[list[ParamGroup], list[int]]:
        for group in groups:
            if not isinstance(group, Group):
                raise TypeError(f"groups must be Group objects, got {group!r}")
            for name in group.hypers:
                if name not in hypers:
                    known = ", ".join(hypers)
                    raise ValueError(
                        f"{group!r} must name hyperparameters of {known}, got {name!r}"
                    )
        members: list[list[int]] = [[] for _ in range(len(groups) + 1)]
        group_of = []
        patterns = _Patterns(groups)
        for i, name in enumerate(self._names):
            first = patterns.first(name)
            place = 0 if first is None else 1 + first
            members[place].append(i)
            group_of.append(place)
        for group, found in zip(groups, members[1:], strict=True):
            if not found:
                raise ValueError(
                    f"{group!r} must match a parameter that no earlier group has, got names"
                    f" {self._names[:8]}"
                )
        own = [{}, *(group.hypers for group in groups)]
        made = [
            ParamGroup(hypers | extra, type(self), found)
            for extra, found in zip(own, members, strict=True)
        ]
        return made, group_of

    # -- hyperparameters and states, brought up to date before each step --------------------------

    def _prepared(self) -> tuple[list[list[float]], States | None, Changes]:
        """What the step about to be taken goes by, but for the rates.

        The groups as the rule reads them, all states if some are to begin, and changes of the
        groups' memory of what was read. Nothing is changed here.
        """
        natives: list[list[float]] = []
        wanted: list[tuple[str, int]] = []
        read: Changes = []
        for group in self._groups:
            hypers, native = group._last_read
            if hypers is not group._hypers:
                hypers = group._hypers
                native = self.spec.native_at(hypers, self._table.steps)
                states = self._states
                wanted += [
                    (state, i)
                    for state in self.spec.uses(native)
                    for i in group._params
                    if states[state][i] is None
                ]
                # A rate of its own in each step is cheap; any other schedule may call for other
                # states, so that nothing is known of a group that has one.
                if not any(is_scheduled(v) for n, v in hypers.items() if n != "lr"):
                    read.append((group.__dict__, {"_last_read": (hypers, native)}))
            natives.append(native)
        return natives, self._extended(self._states, wanted, self._groups) if wanted else None, read

    def _current(self) -> list[list[float]]:
        """All groups as the rule reads them in the step about to be taken."""
        return self._with_rates(self._prepared()[0], self._table.steps)

    def _no_states(self) -> States:
        return {state: [None] * len(self._names) for state in self.spec.states}

    def _extended(
        self,
        states: States,
        wanted: Iterable[tuple[str, int]],
        hypers: Sequence[Mapping[str, Any]],
    ) -> States:
        """`states` and the `wanted` ones (name, parameter), new, in one flat buffer per name."""
        result = {name: list(arrays) for name, arrays in states.items()}
        by_buffer: dict[tuple[str, str], list[int]] = {}
        for state, i in wanted:
            by_buffer.setdefault((state, self._state_dtype(i)), []).append(i)
        for (state, dtype), indices in by_buffer.items():
            shapes = {i: self._shapes[i] for i in sorted(indices)}
            buffer: Mapping[Key, Any] = (
                FlatBuffer.zeros(shapes, dtype)
                if self._index is None
                else _arrays.packed(shapes, dtype, self._index)
            )
            for i in indices:
                view = buffer[i]
                initial = self.spec.first(state, hypers[self._group_of[i]])
                if initial:  # untouched memory is zero already, and unpaged until the first step
                    view[...] = initial
                result[state][i] = view
        return result

    def _state_dtype(self, i: int) -> str:
        return "float64" if self._dtypes[i] == "float64" else "float32"

    def _with_rates(self, natives: list[list[float]], t: int) -> list[list[float]]:
        """`natives`, in which rates that follow a schedule are those of step t from now on."""
        for k, group in enumerate(self._groups):
            lr = group._hypers["lr"]
            if type(lr) is not float and callable(lr):
                rate = at_step("lr", lr, t, self.spec.table["lr"])
                natives[k] = [*natives[k][:LR], rate, *natives[k][LR + 1 :]]
        return natives

    # -- public -----------------------------------------------------------------------------------

    def step(
        self,
        grads: Grads,
        *,
        max_norm: SupportsFloat | None = None,
        loss_scale: SupportsFloat = 1.0,
        skip_nonfinite: bool = False,
    ) -> StepReport:
        """Updates the parameters once, in one sweep over memory.

        Args:
            grads: gradients in the form of the parameters: an array, a sequence or dict of arrays,
                or a FlatBuffer of the parameters' shapes, which is the fastest. Each has its
                parameter's shape, and its dtype or, for a float32 parameter, float32, bfloat16 or
                float16; a parameter without dimensions takes Python's and NumPy's numbers. None in
                an array's place leaves that parameter, its states and its count of updates alone.
                Gradients are read, never written.
            max_norm: clips the gradients, all of them together, to this norm:
                `g * min(1, max_norm / (norm + 1e-6))`, which costs another reading of them.
                `grad_norm` is then the norm before. A number >= 0, or inf to measure only
                (default None).
            loss_scale: what the loss was multiplied by; the gradients are divided by it first.
                Finite and > 0 (default 1).
            skip_nonfinite: an infinite or NaN gradient makes the step do nothing at all: no
                parameter, state or count changes (default False).

        Returns:
            The step's number, from 1, the learning rate of the first group, and the number of
            elements updated: 0 where the step was skipped, of which a CUDA device does not tell, so
            that there `steps`, and with it the schedules, count the skipped ones too.

        Raises:
            TypeError, ValueError: a gradient is missing, of a wrong shape, dtype or layout, not
                where the parameters are, or overlaps memory that the step writes; hyperparameters
                that do not go together; a schedule that returns a value out of range.
            RuntimeError: the optimizer is stepping in another thread, or the call comes from inside
                a step of its own (from a schedule, or an exporter of gradients).

        Example:
            >>> import numpy as np, fusedstep as fs
            >>> w = np.zeros(2, np.float32)
            >>> opt = fs.SGD(w, lr=1.0)
            >>> _ = opt.step(np.array([30.0, 40.0], np.float32), max_norm=5.0)
            >>> w, opt.grad_norm
            (array([-3., -4.], dtype=float32), 50.0)
        """
        options = None
        measured = max_norm is not None or skip_nonfinite is not False
        plain = type(loss_scale) is float and loss_scale == 1.0
        if measured or not plain or self._index is not None:
            options = self._options(max_norm, loss_scale, skip_nonfinite)
        return self._turn.run(self._step, grads, options)

    def _step(self, grads: Grads, options: Options | None) -> StepReport:
        """A step, while nobody else has a turn."""
        natives, states, read = self._prepared()
        table = self._table
        natives = self._with_rates(natives, table.steps)
        layout = None if self._buffer is None else self._buffer._layout
        # An exact type and an identity first: a small step takes a few microseconds in all.
        if type(grads) is FlatBuffer and (grads._layout is layout or grads._layout == layout):
            flat, offsets = grads._flat, grads._layout.offsets
            steps, elements = table.step_flat(flat, offsets, natives, options, states)
        else:
            ordered = in_order(self._params, grads)
            announce = announcer() if self._tensors else None
            steps, elements = table.step(ordered, natives, options, states, announce)
        # Of what the step did nothing is left to be noted but this, which saves the next one work.
        for memory, known in read:
            memory.update(known)
        return StepReport(steps, natives[0][LR], elements)

    def _options(self, max_norm: Any, loss_scale: Any, skip_nonfinite: Any) -> Options:
        """A step's keywords, checked."""
        if not isinstance(skip_nonfinite, bool):
            raise TypeError(f"skip_nonfinite must be True or False, got {skip_nonfinite!r}")
        norm = None if max_norm is None else as_number("max_norm", max_norm, AT_LEAST_0)
        scale = as_number("loss_scale", loss_scale, POSITIVE)
        if math.isinf(1 / scale):
            raise ValueError(f"loss_scale must have a finite inverse, got {loss_scale!r}")
        first = next(iter(self._params.values()), None)
        stream = 0 if self._index is None else _arrays.stream_of(first, self._index)
        return Options(1 / scale, norm, skip_nonfinite, stream)

    @property
    def grad_norm(self) -> float | None:
        """The norm of all gradients before the last step, if that had max_norm or skip_nonfinite.

        On a CUDA device, reading it waits for the step.
        """
        return self._turn.read(self._table.norm)

    def _announce(self, written: Iterable[int]) -> None:
        """Tells autograd of tensors that were written to, by number."""
        if tensors := [self._tensors[i] for i in written]:
            announcer()(tensors)

    @property
    def params(self) -> dict[Key, Any]:
        """The parameters by name, or by number."""
        return dict(self._params)

    @property
    def param_groups(self) -> list[ParamGroup]:
        """The default group, then `groups` in order; `param_groups[0]["lr"] = 0.1` edits one."""
        return list(self._groups)

    @property
    def steps(self) -> int:
        """The number of steps taken, the argument of the next call of a schedule."""
        return self._table.steps

    @property
    def state(self) -> dict[Key, dict[str, Array]]:
        """For each parameter its state arrays by torch's names, the arrays themselves.

        Example:
            >>> import numpy as np, fusedstep as fs
            >>> opt = fs.Adam({"w": np.ones(3, np.float32)})
            >>> opt.state["w"]["exp_avg"]
            array([0., 0., 0.], dtype=float32)
        """
        return {
            key: {s: a for s, arrays in self._states.items() if (a := arrays[i]) is not None}
            for i, key in enumerate(self._params)
        }

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state with torch's keys and layout, plus `step`, the steps taken.

        As in torch the arrays are the live ones; `copy.deepcopy` keeps a moment. Where a parameter
        is a torch tensor its state is torch's too, so that `torch.optim` can load it. A schedule is
        stored as its value in the last step, or before the first step as the one it begins with.
        One of `fusedstep.schedules` is also in `schedules`, a dict for each group that has
        parameters, as its `to_dict`, which has the progress of a `ReduceOnPlateau`. Where the
        parameters have names, each group has them as `param_names`, which is torch's key too.

        Raises:
            RuntimeError: the optimizer is stepping in another thread.
        """
        return self._turn.read(self._saved)

    def _saved(self) -> dict[str, Any]:
        """`state_dict`, while nobody else has a turn."""
        natives = self._last_natives()
        groups = []
        for group, native in zip(self._groups, natives, strict=True):
            stored = {**group, **self.spec.fixed, **self._followed(group._hypers, native)}
            if self._named:
                stored["param_names"] = [self._names[i] for i in group._params]
            groups.append(stored)
        begun = {i: c for i, c in enumerate(self._table.clocks()) if self._started(c)}
        # A hyperparameter that was edited may call for states which only the next step would make.
        uses = [
            self.spec.uses(self.spec.native({name: stored[name] for name in group._hypers}))
            for group, stored in zip(self._groups, groups, strict=True)
        ]
        wanted = [
            (name, i)
            for i in begun
            for name in uses[self._group_of[i]]
            if self._states[name][i] is None
        ]
        states = self._extended(self._states, wanted, self._groups)
        state: dict[int, dict[str, Any]] = {}
        for i, clock in begun.items():
            entry: dict[str, Any] = {"step": clock[0]} if self.spec.counts_steps else {}
            entry.update(zip(self.spec.carried, clock[1:], strict=False))
            entry.update((name, a[i]) for name, a in states.items() if a[i] is not None)
            state[i] = _arrays.as_tensors(entry) if i in self._tensors else entry
        groups = [stored for stored in groups if stored["params"]]
        whole = {"state": state, "param_groups": groups, "step": self.steps}
        schedules = [group._stored() for group in self._groups if group._params]
        return {**whole, "schedules": schedules} if any(schedules) else whole

    def _followed(self, group: Mapping[str, Any], native: list[float]) -> dict[str, Any]:
        """The scheduled hyperparameters of a group as numbers."""
        numbers, parts = self.spec.numbers(native), self.spec.parts
        return {
            name: tuple(map(numbers.get, parts[name])) if name in parts else numbers[name]
            for name, value in group.items()
            if is_scheduled(value)
        }

    def _last_natives(self) -> list[list[float]]:
        """The groups as the last step read them, or as the first will."""
        if used := self._table.used:
            return used
        t = max(self.steps - 1, 0)
        return self._with_rates([self.spec.native_at(g._hypers, t) for g in self._groups], t)

    def _divisors(self) -> list[tuple[Any, Array | None]]:
        """Each parameter with its `_divisor` under the present hyperparameters."""
        self.spec.check_divides(type(self).__name__)
        t = max(self.steps - 1, 0)
        natives = [self.spec.native_at(group._hypers, t) for group in self._groups]
        found = []
        for i, (param, clock) in enumerate(
            zip(self._params.values(), self._table.clocks(), strict=True)
        ):
            state = {
                n: a[i].astype(np.float64) for n, a in self._states.items() if a[i] is not None
            }
            found.append((param, self.spec.divisor(natives[self._group_of[i]], clock[0], state)))
        return found

    def _keep(self) -> Callable[[], None]:
        """What puts back states, counts and hyperparameters, in place, as they are now.

        Raises:
            RuntimeError: the optimizer is stepping in another thread.
        """
        return self._turn.read(self._kept)

    def _kept(self) -> Callable[[], None]:
        """`_keep`, while nobody else has a turn."""
        clocks = self._table.clocks()
        states = {name: list(arrays) for name, arrays in self._states.items()}
        arrays = [a for found in states.values() for a in found if a is not None]
        saved = [array.copy() for array in arrays]
        steps, used = self._table.steps, self._table.used
        hypers = [(group.__dict__, {"_hypers": group._hypers}) for group in self._groups]
        held = [one for group in self._groups for one in plateaus(group._hypers.values())]
        progress = [one._changed_to(one.progress) for one in held]

        def put_back() -> None:
            for array, values in zip(arrays, saved, strict=True):
                array[...] = values
            self._table.load(states, clocks, steps, used, hypers + progress)

        return lambda: self._turn.run(put_back)

    def _started(self, clock: tuple[int, float, float]) -> bool:
        return clock[0] > 0 if self.spec.counts_steps else clock[1] != 0

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over the state and hyperparameters of `state_dict`, copying the values.

        Checkpoints of `torch.optim` are taken too. Where checkpoint and optimizer have names of
        parameters, loading goes by them, and groups are told by the names in them; otherwise by
        position. A state that the last step had must be there; one that begins later begins as in
        the run. Keys of a group that are no hyperparameters stay in the group. A hyperparameter
        that is a schedule stays the one that was given, and goes on at the loaded step, a
        `ReduceOnPlateau` with the loaded progress. Hyperparameters that the dict lacks stay as
        they are.

        Warns:
            UserWarning: a schedule is not the checkpoint's; the message has both.

        Raises:
            TypeError, ValueError: a key, count, shape, dtype or value does not fit; nothing has
                changed then.
        """
        if self._ahead:
            raise RuntimeError("load_state_dict must come after a lookahead, not inside it")
        self._turn.run(self._load, state_dict)

    def _load(self, state_dict: Any) -> None:
        """`load_state_dict`, while nobody else has a turn."""
        entries, saved = _checkpoint.parts(state_dict)
        if "step" not in state_dict:  # torch's, see _beyond_torch
            saved = [
                {
                    name: value
                    for name, value in group.items()
                    if name not in self.spec.beyond_torch or name in group.get("fusedstep", ())
                }
                for group in saved
            ]
        own = [[self._names[i] for i in group._params] for group in self._groups if group._params]
        order, saved = _checkpoint.arranged(
            [group for group in saved if group["params"]], own, strict=self._named
        )
        _checkpoint.check_sizes(saved, list(map(len, own)))
        index_of = _checkpoint.places(saved, [g._params for g in self._groups if g._params])
        for one, entry in entries.items():
            if one not in index_of:
                raise ValueError(f"state_dict['state'] must have known parameters, got {one!r}")
            _checkpoint.check_mapping(f"state_dict['state'][{one!r}]", entry)
        steps = self._staged_steps(state_dict)
        hypers, others, uses_then = self._staged_groups(saved, order, steps)
        schedules = self._staged_schedules(state_dict, hypers, order)
        natives = [self.spec.native_at(values, steps) for values in hypers]
        uses = [self.spec.uses(native) for native in natives]
        staged = {
            i: self._staged_state(i, entries[one], uses_then[self._group_of[i]])
            for one, i in index_of.items()
            if entries.get(one)  # empty: torch's of a parameter that has not begun
        }
        clocks = [staged[i][0] if i in staged else (0, 0.0, 0.0) for i in range(len(self._names))]
        wanted = {(name, i) for i, place in enumerate(self._group_of) for name in uses[place]}
        wanted |= {(name, i) for i, (_, arrays) in staged.items() for name in arrays}
        states = self._extended(self._no_states(), sorted(wanted), hypers)
        for i, (_, arrays) in staged.items():
            for name, array in arrays.items():
                states[name][i][...] = array
        if schedules.warning:  # which may be an error: nothing has changed yet
            warnings.warn(schedules.warning, UserWarning, stacklevel=3)
        changes = [
            (group.__dict__, {"_hypers": values, "_own": other})
            for group, values, other in zip(self._groups, hypers, others, strict=True)
        ]
        changes += [plateau._changed_to(reached) for plateau, reached in schedules.progress]
        self._table.load(states, clocks, steps, [], changes)

    def _staged_schedules(
        self,
        state_dict: Mapping[str, Any],
        hypers: Sequence[Mapping[str, Any]],
        order: Sequence[int],
    ) -> Resumed:
        """What the dict's schedules, where it has any, mean for the present ones."""
        own = [values for group, values in zip(self._groups, hypers, strict=True) if group._params]
        saved = state_dict.get("schedules", [{}] * len(own))
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            raise ValueError(
                f"state_dict['schedules'] must have a dict for each of {len(own)} groups, got"
                f" {saved!r}"
            )
        saved = [saved[i] for i in order]
        places, parts = [], self.spec.parts
        for i, (values, entries) in enumerate(zip(own, saved, strict=True)):
            if not isinstance(entries, Mapping):
                raise TypeError(f"state_dict['schedules'][{i}] must be a dict, got {entries!r}")
            for name, entry in entries.items():
                where = f"state_dict['schedules'][{i}][{name!r}]"
                if name not in values:
                    raise ValueError(f"{where} must be of the hyperparameters {', '.join(values)}")
                if name not in parts:
                    places.append((name, where, values[name], entry))
                    continue
                n = len(parts[name])
                if not isinstance(entry, list | tuple) or len(entry) != n:
                    kind = "a pair" if n == 2 else f"{n} entries"
                    raise TypeError(f"{where} must be {kind}, got {entry!r}")
                places += [
                    (f"{name}[{k}]", f"{where}[{k}]", values[name][k], half)
                    for k, half in enumerate(entry)
                ]
        return resumed(places)

    def _staged_steps(self, state_dict: Mapping[str, Any]) -> int:
        """The steps taken: ours by name, in torch's checkpoints the largest count of a state."""
        if "step" in state_dict:
            return _checkpoint.count("state_dict['step']", state_dict["step"])
        counts = []
        for i, entry in state_dict["state"].items():
            if self.spec.counts_steps and "step" in entry:
                label = f"state_dict['state'][{i!r}]['step']"
                counts.append(_checkpoint.count(label, entry["step"]))
        return max(counts, default=0)

    def _staged_groups(
        self, saved: Sequence[Mapping[str, Any]], order: Sequence[int], steps: int
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[list[str]]]:
        """After loading: each group's hyperparameters, other keys, and the last step's states."""
        spec = self.spec
        hypers, others, uses = [], [], []
        pending = iter(zip(order, saved, strict=True))
        for group in self._groups:
            k, loaded = next(pending) if group._params else (0, {})
            values, then, other = dict(group._hypers), dict(group._hypers), {}
            where = f"{_checkpoint.GROUPS}[{k}]"
            for name, value in loaded.items():
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
                        other[name] = _checkpoint.copied(name, value)
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

    def _staged_state(
        self, i: int, entry: Mapping[str, Any], uses: list[str]
    ) -> tuple[tuple[int, float, float], dict[str, Array]]:
        """One parameter's clock and states as `entry` has them, checked."""
        where = f"state_dict['state'][{self._names[i]}]"
        known = [*self.spec.scalars, *self.spec.states]
        dtype = np.dtype(self._state_dtype(i))
        arrays: dict[str, Array] = {}
        scalars: dict[str, float] = {}
        for name, value in entry.items():
            label = f"{where}['{name}']"
            if name in self._states:
                if value is None:  # torch before the first step with momentum
                    continue
                array = as_array(_arrays.to_host(value), label)
                if array.shape != self._shapes[i]:
                    raise ValueError(
                        f"{label} must have shape {self._shapes[i]}, got {array.shape}"
                    )
                same = array.dtype is dtype  # as nearly always; the other question takes longer
                if not same and as_dtype(array.dtype, label).itemsize > dtype.itemsize:
                    raise TypeError(f"{label} must be {dtype}, got {array.dtype}")
                arrays[name] = array
            elif name == "step":
                scalars[name] = _checkpoint.count(label, value)
            elif name in self.spec.carried:
                scalars[name] = _checkpoint.carried(label, name, value)
            else:
                raise ValueError(f"{where} must have the keys {known}, got {name!r}")
        # A state that is there says enough where updates are not counted.
        for name in self.spec.required(uses) if self.spec.counts_steps else ():
            if name not in arrays and name not in scalars:
                raise ValueError(f"{where} must have the key {name!r}, got {list(entry)}")
        if not self.spec.counts_steps:
            return (0, float(bool(arrays)), 0.0), arrays
        first, second = [*(scalars[name] for name in self.spec.carried), 0.0, 0.0][:2]
        return (int(scalars["step"]), first, second), arrays

    def __getstate__(self) -> dict[str, Any]:
        if self._ahead:
            raise RuntimeError("copies must be made after a lookahead, not inside it")
        return self._turn.read(self._copied)

    def _copied(self) -> dict[str, Any]:
        """`__getstate__`, while nobody else has a turn."""
        table = self._table
        known = dict(table.states), table.clocks(), table.steps, table.used
        state = {**self.__dict__, "_table": known}
        for name in ("_tensors", "_index", "_turn"):
            del state[name]
        if self._buffer is not None:
            del state["_params"]  # views of the buffer
        return state

    def __copy__(self) -> Optimizer:
        """Another optimizer over the same parameters, with its own groups, states and counts."""
        twin = object.__new__(type(self))
        state = self.__getstate__()
        twin.__setstate__({**state, "_groups": [copy.copy(group) for group in self._groups]})
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._buffer is not None:
            self._params = dict(self._buffer.items())
        self._open_table()
        old, clocks, steps, used = state["_table"]
        wanted = [
            (s, i) for s, arrays in old.items() for i, a in enumerate(arrays) if a is not None
        ]
        states = self._extended(self._no_states(), wanted, self._groups)  # in flat buffers
        for name, i in wanted:
            states[name][i][...] = old[name][i]
        self._table.load(states, clocks, steps, used, [])

    def __repr__(self) -> str:
        n = sum(int(np.prod(shape)) for shape in self._shapes)
        dtypes = ", ".join(sorted(set(self._dtypes))) or "no dtype"
        lines = [f"{len(self._names)} parameters, {n} elements, {dtypes}"]
        for k, group in enumerate(self._groups):
            head = f"group {k} ({len(group._params)}): " if len(self._groups) > 1 else ""
            lines.append(head + ", ".join(_assignments(group._hypers)))
        return f"{type(self).__name__}(\n  " + "\n  ".join(lines) + "\n)"


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """A constructor's `locals()` as keywords, so that its signature is the only list of them."""
    return {name: a for name, a in arguments.items() if name not in ("self", "__class__")}


def _check_nesterov(group: Mapping[str, Any]) -> None:
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            "nesterov needs momentum > 0 and dampening = 0, got"
            f" momentum={group['momentum']}, dampening={group['dampening']}"
        )


class SGD(Optimizer):
    """Stochastic gradient descent, plain, with momentum, or Nesterov's.

        b = g                                   at the first update, then
        b = momentum * b + (1 - dampening) * g
        p = p - lr * b                          plain: g for b; nesterov: g + momentum*b for b

    Use:
        vision models and convex problems, mostly with momentum 0.9 and a schedule. The
        least state, and the rate that needs the most tuning: `fusedstep.convergence` says
        what it may be.

    Args: see below

    State:
        None, or with momentum `momentum_buffer`, 4 bytes per element (8 for float64). A float32
        step moves 12 bytes per element, 20 with momentum.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.SGD(w, lr=0.5, momentum=0.9).step(np.array([1.0, -2.0], np.float32))
        StepReport(step=1, lr=0.5, elements=2)
        >>> w
        array([0.5, 3. ], dtype=float32)

    Reference:
        Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html

    Differs from:
        the original Nesterov method, which takes the gradient at the look-ahead point: this is the
        same method after a change of variables, as in torch; but not with weight_decay, which
        `nesterov` takes at the look-ahead point too, and `lookahead` at p.
    """

    spec = Spec("sgd", counts_steps=False, check_together=_check_nesterov)

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        momentum: Rate = 0.0,
        dampening: float = 0.0,
        weight_decay: Rate = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))

    @contextmanager
    def lookahead(self) -> Iterator[None]:
        """Nesterov's method in its original form: `with opt.lookahead(): g = grad(params)`.

        Inside, the parameters stand at the look-ahead point p - lr * momentum * b, where momentum
        alone would take them, to the bit where a plain step along b would; afterwards they are what
        they were, to the bit. The step that follows takes the gradient found there, and
        weight_decay at p. Keeps a copy of the parameters meanwhile.

        Raises:
            ValueError: there is no momentum, or `nesterov` is on, which is the other form; or the
                parameters are on a GPU, where `fusedstep.torch.SGD` looks ahead.
            RuntimeError: a step, or another look-ahead, inside.

        Example:
            >>> import numpy as np, fusedstep as fs
            >>> w = np.array([1.0], np.float32)
            >>> opt = fs.SGD(w, lr=0.5, momentum=0.5)
            >>> for _ in range(2):
            ...     with opt.lookahead():
            ...         g = w.copy()  # the gradient of w^2/2 at the look-ahead point
            ...     _ = opt.step(g)
            >>> w
            array([0.125], dtype=float32)

        Reference:
            Nesterov 1983; Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html
        """
        natives = self._current()
        numbers = list(map(self.spec.numbers, natives))
        _lookahead.check(numbers)
        arrays = [as_array(p, f"params[{key}]") for key, p in self._params.items()]
        moving = [(i, b) for i, b in enumerate(self._states["momentum_buffer"]) if b is not None]
        saved = [(arrays[i], arrays[i].copy()) for i, _ in moving]
        announced = [i for i, _ in moving if i in self._tensors]
        reaches = [group["lr"] * group["momentum"] for group in numbers]
        try:
            _lookahead.look_ahead(
                SGD, [(arrays[i], b, reaches[self._group_of[i]]) for i, b in moving]
            )
            self._announce(announced)
            self._ahead = True
            yield
        finally:
            self._ahead = False
            for array, values in saved:
                np.copyto(array, values)
            self._announce(announced)

    def _prepared(self) -> tuple[list[list[float]], States | None, Changes]:
        if self._ahead:
            raise RuntimeError("step and lookahead must come after a lookahead, not inside it")
        return super()._prepared()


class Lion(Optimizer):
    """Lion: steps of one size along the sign of an interpolated momentum.

        p = p * (1 - lr * weight_decay)
        p = p - lr * sign(beta1 * m + (1 - beta1) * g)      sign(0) = 0
        m = beta2 * m + (1 - beta2) * g

    Use:
        large models, where half of Adam's state counts. lr 3 to 10 times below AdamW's, and
        weight_decay as many times above.

    Args: see below

    State:
        `exp_avg`, 4 bytes per element (8 for float64). A float32 step moves 20 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.Lion(w, lr=0.25).step(np.array([0.01, -70.0], np.float32)).step
        1
        >>> w
        array([0.75, 2.25], dtype=float32)

    Reference:
        Chen et al. 2023, algorithm 2, https://arxiv.org/abs/2302.06675

    Differs from:
        coupled weight decay elsewhere: Lion's is decoupled, as in its paper. `sign(NaN)` is 0, as
        in torch: a NaN gradient shows in the momentum, not in the parameter.
    """

    spec = Spec("lion", fixed={"decoupled_weight_decay": True})

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: Rate = 0.0,
        *,
        maximize: bool = False,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))


class Adagrad(Optimizer):
    """Adagrad: each element's rate falls with the sum of its squared gradients.

        s = s + g^2
        p = p - lr / (1 + (t-1) * lr_decay) * g / (sqrt(s) + eps)

    Use:
        sparse features, such as words: a rare one keeps its large steps. The rate only ever
        falls, so that long runs on deep networks stall.

    Args: see below

    State:
        `sum`, 4 bytes per element (8 for float64). A float32 step moves 20 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.Adagrad(w, lr=0.5).step(np.array([4.0, -0.5], np.float32)).step
        1
        >>> w
        array([0.5, 2.5], dtype=float32)

    Reference:
        Duchi, Hazan, Singer 2011, https://jmlr.org/papers/v12/duchi11a.html

    Differs from:
        Keras, where s starts at 0.1, eps is 1e-7 and under the root, and lr is 1e-3. Not from
        torch.
    """

    spec = Spec("adagrad", initial={"sum": "initial_accumulator_value"})

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: Rate = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))


class RMSprop(Optimizer):
    """RMSprop: each element's gradient divided by a running root mean square.

        v = alpha * v + (1 - alpha) * g^2
        d = sqrt(v) + eps                       centered: sqrt(v - m^2) + eps, where
                                                m = alpha * m + (1 - alpha) * g
        p = p - lr * g / d                      momentum: p - lr * b, b = momentum * b + g / d

    Use:
        recurrent networks and reinforcement learning, where gradients change their scale:
        Adagrad with a memory that fades.

    Args: see below

    State:
        `square_avg`, `momentum_buffer` with momentum, `grad_avg` when centered, 4 bytes per element
        each (8 for float64). A float32 step moves 20 bytes per element, and 8 more for each option.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.RMSprop(w, lr=0.5, alpha=0.75).step(np.array([4.0, -0.5], np.float32)).step
        1
        >>> w
        array([0., 3.], dtype=float32)

    Reference:
        Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013, https://arxiv.org/abs/1308.0850

    Differs from:
        torch where rounding leaves `v` just below `m^2`: the root is taken of 0, not of a negative
        number, so a constant gradient cannot turn a parameter into NaN.
    """

    spec = Spec("rmsprop")

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: Rate = 0.0,
        momentum: Rate = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))


class Adadelta(Optimizer):
    """Adadelta: steps in the units of the parameter, from running averages of g^2 and of d^2.

        s = rho * s + (1 - rho) * g^2
        d = sqrt(a + eps) / sqrt(s + eps) * g
        a = rho * a + (1 - rho) * d^2
        p = p - lr * d

    Use:
        problems where no rate is to be chosen. Slow at first, as steps begin near
        `sqrt(eps)`.

    Args: see below

    State:
        `square_avg` and `acc_delta`, 4 bytes per element each (8 for float64). A float32 step moves
        28 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.Adadelta(w, rho=0.75, eps=0.25).step(np.array([1.0, 0.0], np.float32)).step
        1
        >>> w
        array([0.29289323, 2.        ], dtype=float32)

    Reference:
        Zeiler 2012, algorithm 1, https://arxiv.org/abs/1212.5701

    Differs from:
        the paper, which has no lr, as if it were 1, and rho 0.95 in its experiments. From Keras,
        whose lr is 1e-3, for a thousandth of these steps, and rho 0.95. Not from torch.
    """

    spec = Spec("adadelta")

    def __init__(
        self,
        params: Params,
        lr: Rate = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: Rate = 0.0,
        *,
        maximize: bool = False,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))


class Adam(Optimizer):
    """Adam: a running mean of the gradient over a running root mean square.

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2       amsgrad: vmax = max(vmax, v), used for v below
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    With `bias_correction=False` both `1 - beta^t` are 1: `p - lr * m / (sqrt(v) + eps)`.

    Use:
        most networks, with little tuning. With weight decay prefer `AdamW`; amsgrad where
        rare large gradients carry the information, as it does not forget them.

    Args: see below

    State:
        `exp_avg`, `exp_avg_sq`, and with amsgrad `max_exp_avg_sq`, 4 bytes per element each (8 for
        float64). A float32 step moves 28 bytes per element, 36 with amsgrad.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.Adam(w, lr=0.5).step(np.array([4.0, -0.25], np.float32)).step
        1
        >>> w
        array([0.5, 2.5], dtype=float32)

    Reference:
        Kingma & Ba 2015, algorithm 1, https://arxiv.org/abs/1412.6980; AMSGrad: Reddi et al. 2018,
        https://arxiv.org/abs/1904.09237

    Differs from:
        torch, which has no `bias_correction`. AMSGrad's maximum is taken of the uncorrected v, as
        in torch and in its paper; some libraries correct first.
    """

    spec = Spec("adam", beyond_torch=("bias_correction",))

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Rate = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))


class AdamW(Optimizer):
    """AdamW: Adam whose weight decay shrinks the parameter instead of joining the gradient.

        p = p * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2       amsgrad: vmax = max(vmax, v), used for v below
        p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    Use:
        transformers, and wherever weight decay should not depend on the gradients' scale.

    Args: see below

    State:
        As `Adam`: `exp_avg`, `exp_avg_sq`, and with amsgrad `max_exp_avg_sq`, 4 bytes per element
        each (8 for float64). A float32 step moves 28 bytes per element, 36 with amsgrad.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.AdamW(w, lr=0.5, weight_decay=0.5).step(np.array([4.0, -0.25], np.float32)).step
        1
        >>> w.round(3)
        array([0.25, 2.  ], dtype=float32)

    Reference:
        Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101

    Differs from:
        the paper, where the decay is scaled by the schedule alone: as in torch it is scaled by lr.
    """

    spec = Spec("adam", fixed={"decoupled_weight_decay": True}, beyond_torch=("bias_correction",))

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Rate = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        bias_correction: bool = True,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))


class Adamax(Optimizer):
    """Adamax: Adam with the largest recent gradient in place of the root mean square.

        m = beta1 * m + (1 - beta1) * g
        u = max(beta2 * u, |g| + eps)
        p = p - lr / (1 - beta1^t) * m / u

    Use:
        gradients with outliers, as of embeddings: the largest of late, not the mean square,
        sets the scale.

    Args: see below

    State:
        `exp_avg` and `exp_inf`, 4 bytes per element each (8 for float64). A float32 step moves 28
        bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.Adamax(w, lr=0.5).step(np.array([4.0, -0.25], np.float32)).step
        1
        >>> w
        array([0.5, 2.5], dtype=float32)

    Reference:
        Kingma & Ba 2015, algorithm 2, https://arxiv.org/abs/1412.6980

    Differs from:
        the paper, which has no eps; inside the maximum as in torch. A NaN leaves `u` with the next
        number, but never `m`.
    """

    spec = Spec("adamax")

    def __init__(
        self,
        params: Params,
        lr: Rate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Rate = 0.0,
        *,
        maximize: bool = False,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))


class NAdam(Optimizer):
    """NAdam: Adam with Nesterov's look-ahead in the running mean.

        mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2);  P_t = mu_1 * ... * mu_t
        m, v as Adam;  d = sqrt(v / (1 - beta2^t)) + eps
        p = p - lr * (1 - mu_t) / (1 - P_t) * g/d - lr * mu_(t+1) / (1 - P_t * mu_(t+1)) * m/d

    Use:
        problems that Adam suits, where its momentum answers a turn of the gradient too
        late.

    Args: see below

    State:
        `exp_avg` and `exp_avg_sq`, 4 bytes per element each (8 for float64), and one number
        `mu_product`. A float32 step moves 28 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.NAdam(w, lr=0.5).step(np.array([4.0, -0.25], np.float32)).step
        1
        >>> w.round(3)
        array([0.472, 2.528], dtype=float32)

    Reference:
        Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ

    Differs from:
        the paper, whose m decays by mu_t: by beta1 here, as in torch and Keras. In Keras
        momentum_decay is 1: its momentum has warmed up after a hundred steps, this one after some
        twenty thousand.
    """

    spec = Spec("nadam", carried=("mu_product",), initial={"mu_product": 1.0})

    def __init__(
        self,
        params: Params,
        lr: Rate = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Rate = 0.0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))


class RAdam(Optimizer):
    """RAdam: Adam that leaves out the denominator until its variance is known well enough.

        m, v as Adam;  rinf = 2 / (1 - beta2) - 1;  r_t = rinf - 2 * t * beta2^t / (1 - beta2^t)
        r_t > 5:  r = sqrt((r_t-4) * (r_t-2) * rinf / ((rinf-4) * (rinf-2) * r_t))
                  p = p - lr / (1 - beta1^t) * r * sqrt(1 - beta2^t) * m / (sqrt(v) + eps)
        else:     p = p - lr / (1 - beta1^t) * m

    Use:
        Adam without a warm-up to tune: it steps by momentum alone while the denominator is
        a guess.

    Args: see below

    State:
        `exp_avg` and `exp_avg_sq`, 4 bytes per element each (8 for float64). A float32 step moves
        28 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.RAdam(w, lr=0.5).step(np.array([4.0, -1.0], np.float32)).step
        1
        >>> w
        array([-1. ,  2.5], dtype=float32)

    Reference:
        Liu et al. 2020, algorithm 2, https://arxiv.org/abs/1908.03265

    Differs from:
        the paper, which divides from r_t > 4 on and has no eps: 5 as in torch and in its authors'
        code.
    """

    spec = Spec("radam")

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Rate = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))


class ASGD(Optimizer):
    """Averaged SGD: SGD with a falling rate, and the average of the late parameters beside it.

        p = p * (1 - lambd * eta);  p = p - eta * g
        ax = ax + mu * (p - ax)                 ax = p while mu is 1
        eta = lr / (1 + lambd * lr * t)^alpha;  mu = 1 / max(1, t - t0)     for the next step

    The first step has eta = lr and mu = 1. The average is `opt.state[name]["ax"]`.

    Use:
        convex problems with noisy gradients, of which the average lies closer to the
        minimum than the last parameters do.

    Args: see below

    State:
        `ax`, 4 bytes per element (8 for float64), and the numbers `eta` and `mu`. A float32 step
        moves 20 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.ASGD(w, lr=0.5, lambd=0.0).step(np.array([1.0, -2.0], np.float32)).step
        1
        >>> w
        array([0.5, 3. ], dtype=float32)

    Reference:
        Polyak & Juditsky 1992, https://doi.org/10.1137/0330046

    Differs from:
        the paper, which averages from the start: here from update t0 on, as in torch, so that the
        default leaves `ax = p` for a million updates. torch rounds eta and mu to float32.
    """

    spec = Spec(
        "asgd",
        hypers={"alpha": FINITE._replace(doc="power by which eta falls")},
        carried=("eta", "mu"),
        initial={"eta": "lr", "mu": 1.0},
    )

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: Rate = 0.0,
        *,
        maximize: bool = False,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))


class Rprop(Optimizer):
    """Rprop: each element's step grows while its gradient keeps its sign and shrinks when it turns.

        s = sign(g * prev);  D = clamp(D * (etas[1] if s > 0, etas[0] if s < 0, else 1), step_sizes)
        g = 0 where s < 0;   p = p - sign(g) * D;   prev = g

    D starts at the lr of the first update.

    Use:
        full batches. It looks at signs alone, which the noise of mini-batches turns.

    Args: see below

    State:
        `prev` and `step_size`, 4 bytes per element each (8 for float64). A float32 step moves 28
        bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> opt = fs.Rprop(w, lr=0.5, etas=(0.5, 2.0))
        >>> opt.step(np.array([0.1, -9.0], np.float32)).step
        1
        >>> opt.step(np.array([0.1, 9.0], np.float32)).step
        2
        >>> w
        array([-0.5,  2.5], dtype=float32)

    Reference:
        Riedmiller & Braun 1993, https://doi.org/10.1109/ICNN.1993.298623, without backtracking

    Differs from:
        torch, which has no weight decay here. As in torch a NaN gradient counts as no sign.
    """

    spec = Spec("rprop", beyond_torch=("weight_decay",))

    def __init__(
        self,
        params: Params,
        lr: Rate = 1e-2,
        etas: Pair = (0.5, 1.2),
        step_sizes: Pair = (1e-6, 50.0),
        *,
        weight_decay: Rate = 0.0,
        maximize: bool = False,
        groups: Iterable[Group] = (),
    ) -> None:
        super().__init__(**_given(locals()))
