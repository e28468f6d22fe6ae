"""The class behind all optimizers: groups, states, steps and checkpoints."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, SupportsFloat, cast

import numpy as np

from fusedstep import _arrays, _checkpoint, _core, _gpu, _groups, _lookahead, _storage
from fusedstep._arrays import announcer, in_order, is_tensor, is_versioned, name_params
from fusedstep._groups import Group, ParamGroup, assignments
from fusedstep._hypers import (
    ABOVE_0,
    AT_LEAST_0,
    POSITIVE,
    SHARE,
    as_number,
    at_step,
    check_flags,
    is_scheduled,
)
from fusedstep._layout import Layout
from fusedstep._spec import LR, Spec
from fusedstep._storage import EMA, Form, Storage, Stored, decoded
from fusedstep._turn import new_turn
from fusedstep._types import (
    PLAIN,
    Array,
    Changes,
    Clock,
    Grads,
    How,
    Key,
    Options,
    Params,
    Rate,
    States,
)
from fusedstep.buffers import FlatBuffer


class _Report(NamedTuple):
    step: int
    lr: float
    elements: int


class StepReport(_Report):
    """The outcome of one step.

    Attributes:
        step: steps taken, this one included.
        lr: the learning rate of the first group.
        elements: those updated; tensors without a gradient are not counted.
        grad_norm, grad_norms, nonfinite: with `norms=True`, what the optimizer's attributes of
            these names tell; else None.
    """

    grad_norm: float | None = None
    grad_norms: dict[Key, float] | None = None
    nonfinite: list[Key] | None = None


# What docstrings say of every optimizer's arguments.
_ARGS = """Args:
        params: an array, a sequence or dict of arrays, or a FlatBuffer; see `Optimizer`.
        {}
        groups: `Group` objects: parameters with hyperparameters of their own.
        {}

    Raises:
        TypeError: something is not an array or has an unsupported dtype, or a hyperparameter
            is not of its kind.
        ValueError: a hyperparameter is outside its range, a group matches no parameter, or
            memory is not where the first parameter's is, C-contiguous, aligned, writable and
            free of overlap; a way to store what the parameters' dtypes or the rule exclude."""


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """A constructor's `locals()` as keywords, so that its signature is the only list of them."""
    found = {name: a for name, a in arguments.items() if name not in ("self", "__class__", "how")}
    how = arguments.get("how", {})
    for name in how:
        if name not in _storage.HOW:
            cls = arguments["__class__"].__name__
            raise TypeError(f"{cls}.__init__() got an unexpected keyword argument {name!r}")
    return {**found, **how}


def _wide(dtype: str) -> str:
    """The dtype that a parameter of this one is computed in."""
    return "float64" if dtype == "float64" else "float32"


class Optimizer:
    """The base of all optimizers: groups, state, steps and checkpoints.

    An optimizer updates its parameters in place, and holds on to them. It takes one array, a
    sequence or dict of arrays, or a `FlatBuffer`: NumPy arrays (memory-mapped ones too), torch
    tensors, CuPy arrays, or anything else that exports its memory through DLPack or
    `__cuda_array_interface__`; all in CPU memory, or all on one CUDA device. All must be
    C-contiguous, float32, float64, float16 or bfloat16, and in memory that is known to be writable,
    which JAX's and TensorFlow's immutable arrays are not. What is in dicts in a dict is named by
    its path. A container must keep its arrays: one that reads them from a file whenever it is
    asked, as `np.load` of an .npz file, is refused.
    States are float32, or float64 for float64 parameters, unless `state_dtype` says otherwise, in
    flat buffers of their own. docs/narrow.md says what `rounding` and `state_dtype` cost and save.

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

    _spec: ClassVar[Spec]
    _quiet: ClassVar[dict[str, Any]] = {}  # what is named only where it is not this: Spec.always
    _ahead: bool | str = False  # whether the parameters stand elsewhere, and where

    def __init_subclass__(cls) -> None:
        """Completes the class's docstring from the one table of hyperparameters."""
        if hasattr(cls, "_spec"):  # not where it is a base of somebody's own
            signature = _storage.listed(inspect.signature(cls.__init__))
            cls.__init__.__signature__ = signature  # type: ignore[attr-defined]
            cls._quiet = {
                name: signature.parameters[name].default
                for name in cls._spec.beyond_torch
                if name in signature.parameters and name not in cls._spec.always
            } or cls._quiet
            docs = cls._spec.argument_docs(signature, schedules=True)
            indent = "\n        "
            text = _ARGS.format(indent.join(docs), indent.join(_storage.how_docs()))
            cls.__doc__ = (cls.__doc__ or "").replace("Args: see below", text)

    def __setattr__(self, name: str, value: Any) -> None:
        cls = type(self)
        if name[0] != "_" and not hasattr(cls, name):
            hypers = self.__dict__["_groups"][0]._hypers if "_groups" in self.__dict__ else {}
            if name in hypers:
                raise AttributeError(
                    f'{name} must be set as opt.param_groups[0]["{name}"], got {value!r}'
                )
            if cls.__module__ == Optimizer.__module__:  # a subclass may have attributes of its own
                known = ", ".join(hypers)
                raise AttributeError(
                    f"{name} must be one of {known}, which are set in opt.param_groups[0],"
                    f" got opt.{name} = {value!r}"
                )
        super().__setattr__(name, value)

    # -- parameters and groups --------------------------------------------------------------------

    def __init__(self, params: Params, groups: Iterable[Group] = (), **hypers: Any) -> None:
        if not hasattr(self, "_spec"):
            known = Optimizer.__subclasses__()
            ours = [cls.__name__ for cls in known if cls.__module__ == Optimizer.__module__]
            raise TypeError(
                f"optimizer must be one of {', '.join(ours)}, got"
                f" {type(self).__name__}: Optimizer is the base class, which has no rule"
            )
        how = {name: hypers.pop(name) for name in _storage.HOW if name in hypers}
        self._storage = Storage(self._spec, cast(How, how))
        self._params = name_params(params)
        self._buffer = params if isinstance(params, FlatBuffer) else None
        self._names = [str(key) for key in self._params]
        # A sequence has no names, and its checkpoints go by position; a dict's numbers are names.
        self._named = isinstance(params, Mapping)
        self._groups, self._group_of = _groups.made(groups, hypers, self._names, type(self))
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
            self._spec.rule,
            self._names,
            params,
            self._group_of,
            device,
            self._index or 0,
            self._storage.native,
        )
        self._shapes = self._table.shapes()
        self._dtypes = self._table.dtypes()
        labels = (f"params[{name}]" for name in self._names)
        self._storage.check_params(zip(labels, self._dtypes, strict=True))
        self._tensors = {i: p for i, p in enumerate(params) if is_tensor(p)}
        self._versioned = {i: p for i, p in enumerate(params) if is_versioned(p)}

    @property
    def _states(self) -> States:
        return self._table.states

    def _form(self, i: int) -> Form:
        """How parameter i and what belongs to it are stored."""
        return self._storage.of(self._dtypes[i])

    # -- hyperparameters and states, brought up to date before each step --------------------------

    def _prepared(self, average: bool = False) -> tuple[list[list[float]], States | None, Changes]:
        """Groups as the next step's rule reads them, but for rates; all states if some begin.

        And changes of the groups' memory of what was read. Nothing is changed here.
        """
        _lookahead.refuse_inside(self, "step and lookahead must come")
        natives: list[list[float]] = []
        wanted: list[tuple[str, int]] = []
        read: Changes = []
        for group in self._groups:
            hypers, native = group._last_read
            if hypers is not group._hypers:
                hypers = group._hypers
                native = self._spec.native_at(hypers, self._table.steps)
                self._storage.check_exact(native, (self._dtypes[i] for i in group._params))
                states = self._states
                uses = self._spec.uses(native)
                wanted += [
                    (key, i)
                    for i in group._params
                    for key in self._form(i).keys(uses)
                    if states[key][i] is None
                ]
                # A rate of its own in each step is cheap; any other schedule may call for other
                # states, so that nothing is known of a group that has one.
                if not any(is_scheduled(v) for n, v in hypers.items() if n != "lr"):
                    read.append((group.__dict__, {"_last_read": (hypers, native)}))
            natives.append(native)
        if average and not self._table.averaged:
            wanted += [(EMA, i) for i, array in enumerate(self._states[EMA]) if array is None]
        return natives, self._extended(self._states, wanted, self._groups) if wanted else None, read

    def _current(self) -> list[list[float]]:
        """All groups as the rule reads them in the step about to be taken."""
        return self._with_rates(self._prepared()[0], self._table.steps)

    def _no_states(self) -> States:
        return {key: [None] * len(self._names) for key in self._states}

    def _extended(
        self,
        states: States,
        wanted: Iterable[tuple[str, int]],
        hypers: Sequence[Mapping[str, Any]],
    ) -> States:
        """`states` and the `wanted` ones (key, parameter), new, in one flat buffer per key."""
        result = {name: list(arrays) for name, arrays in states.items()}
        by_buffer: dict[tuple[str, str], list[int]] = {}
        for key, i in wanted:
            by_buffer.setdefault((key, self._form(i).dtype(key)), []).append(i)
        for (key, name), indices in by_buffer.items():
            shapes: dict[Key, tuple[int, ...]] = {
                i: self._form(i).shape(key, self._shapes[i]) for i in sorted(indices)
            }
            dtype = _storage.array_dtype(name)
            buffer: Mapping[Key, Any] = (
                FlatBuffer._allocate(Layout(shapes), dtype)
                if self._index is None
                else _arrays.packed(shapes, dtype, self._index)
            )
            for i in indices:
                result[key][i] = buffer[i]
        for key, i in wanted:
            initial = self._spec.first(key, hypers[self._group_of[i]])
            if initial and key in self._spec.states:
                # Untouched memory is zero already, and unpaged until the first step.
                self._put(result, key, i, Stored(np.full(self._shapes[i], initial), "float64"))
        return result

    def _stored(self, states: States, key: str, i: int) -> Stored:
        """A parameter's state or average, with its format and what lies beside it."""
        kept = self._form(i).streams[key]
        return Stored(states[key][i], kept.format, states[kept.beside][i] if kept.beside else None)

    def _put(self, states: States, key: str, i: int, values: Stored) -> None:
        """Writes the numbers of any array, in any format, into a state or an average."""
        _storage.put(values, self._stored(states, key, i))

    def _with_rates(self, natives: list[list[float]], t: int) -> list[list[float]]:
        """`natives`, in which rates that follow a schedule are those of step t from now on."""
        for k, group in enumerate(self._groups):
            lr = group._hypers["lr"]
            if type(lr) is not float and callable(lr):
                rate = at_step("lr", lr, t, self._spec.table["lr"])
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
        norms: bool = False,
        clip_value: SupportsFloat | None = None,
        ema: Rate | None = None,
        shadow: Grads | None = None,
        zero_grad: bool = False,
    ) -> StepReport:
        """Updates the parameters once, in one sweep over memory.

        Args:
            grads: gradients in the form of the parameters: an array, a sequence or dict of arrays,
                or a FlatBuffer of the parameters' shapes, which is the fastest. Each has its
                parameter's shape and is float32, float64, bfloat16 or float16, whatever the
                parameter is: read as float32, or as float64 under a float64 parameter. A parameter
                without dimensions takes Python's and NumPy's numbers. None in an array's place
                leaves that parameter, its states and its count of updates alone. Gradients are
                read, and never written unless `zero_grad` says so. One that is not C-contiguous is
                copied for the step, and cannot be zeroed.
            max_norm: clips the gradients, all of them together, to this norm:
                `g * min(1, max_norm / (norm + 1e-6))`, which costs another reading of them.
                `grad_norm` is then the norm before. A number >= 0, or inf to measure only
                (default None).
            loss_scale: what the loss was multiplied by; the gradients are divided by it first.
                Finite and > 0 (default 1).
            skip_nonfinite: an infinite or NaN gradient makes the step do nothing at all: no
                parameter, state or count changes (default False).
            norms: measures the gradient of each tensor too, for the report: `grad_norms` and
                `nonfinite`. Costs another reading of the gradients, or with `max_norm` or
                `skip_nonfinite` nothing; on a CUDA device it waits for the step (default False).
            clip_value: clips each element of the gradients to [-clip_value, clip_value], after
                `loss_scale` and `max_norm`, whose norm is that before it; NaN stays. A number > 0
                (default None).
            ema: keeps an exponential moving average of the parameters as they are stored, those
                without a gradient too: `a + (1 - ema) * (p - a)`, from a copy at the first average
                on. A decay in [0, 1], or a callable of the number of averages so far. A state,
                `state[name]["ema"]`; `opt.ema()` puts it in the parameters' place. 8 bytes per
                element in float32 (default None).
            shadow: arrays in the form of the parameters, with None for those without, that take a
                copy of the parameters as they are stored: float32, float64, float16 or bfloat16,
                rounded to nearest. 2 bytes per element in 16 bits (default None).
            zero_grad: the gradients become zero, once they were read. 4 bytes per element in
                float32 (default False).

        Returns:
            The step's number, from 1, the learning rate of the first group, and the number of
            elements updated: 0 where the step was skipped, of which a CUDA device does not tell, so
            that there `steps`, and with it the schedules, count the skipped ones too.

        Raises:
            TypeError, ValueError: a gradient is missing, of a wrong shape, dtype or layout, not
                where the parameters are, or overlaps memory that the step writes, as may a
                shadow; hyperparameters that do not go together; a schedule that returns a value
                out of range; a state that cannot be narrow.
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
        measured = max_norm is not None or skip_nonfinite is not False or norms is not False
        finished = clip_value is not None or ema is not None or zero_grad is not False
        plain = type(loss_scale) is float and loss_scale == 1.0
        if measured or finished or not plain or self._index is not None or self._storage.seed:
            options = self._options(
                max_norm, loss_scale, skip_nonfinite, norms, clip_value, zero_grad
            )
        return self._turn.run(self._step, grads, options, ema, shadow)

    def _step(
        self, grads: Grads, options: Options | None, ema: Any = None, shadow: Any = None
    ) -> StepReport:
        """A step, while nobody else has a turn."""
        natives, states, read = self._prepared(ema is not None)
        table = self._table
        if ema is not None:
            decay = at_step("ema", ema, table.averages, SHARE)
            average = table.averages + 1
            options = (options or PLAIN)._replace(ema_decay=decay, average=average)
        announce = announcer() if self._versioned else None
        copies = None
        if shadow is not None:
            copies = in_order(self._params, shadow, "shadow")
            if announce is None and any(map(is_versioned, copies)):
                announce = announcer()
        natives = self._with_rates(natives, table.steps)
        layout = None if self._buffer is None else self._buffer._layout
        # An exact type and an identity first: a small step takes a few microseconds in all.
        if type(grads) is FlatBuffer and (grads._layout is layout or grads._layout == layout):
            flat, offsets = grads._flat, grads._layout.offsets
            steps, elements = table.step_flat(
                flat, offsets, natives, options, states, announce, copies
            )
        else:
            ordered = in_order(self._params, grads)
            steps, elements = table.step(ordered, natives, options, states, announce, copies)
        # The table has noted all else; this saves the next step work.
        for memory, known in read:
            memory.update(known)
        report = StepReport(steps, natives[0][LR], elements)
        if options is not None and options.norms:
            report.grad_norm, report.grad_norms = self.grad_norm, self.grad_norms
            report.nonfinite = self.nonfinite
        return report

    def _options(
        self,
        max_norm: Any,
        loss_scale: Any,
        skip_nonfinite: Any,
        norms: Any,
        clip_value: Any,
        zero_grad: Any,
    ) -> Options:
        """A step's keywords, checked."""
        check_flags(skip_nonfinite=skip_nonfinite, norms=norms, zero_grad=zero_grad)
        clip = None if clip_value is None else as_number("clip_value", clip_value, ABOVE_0)
        norm = None if max_norm is None else as_number("max_norm", max_norm, AT_LEAST_0)
        scale = as_number("loss_scale", loss_scale, POSITIVE)
        if math.isinf(1 / scale):
            raise ValueError(f"loss_scale must have a finite inverse, got {loss_scale!r}")
        first = next(iter(self._params.values()), None)
        stream = 0 if self._index is None else _arrays.stream_of(first, self._index)
        return Options(
            1 / scale,
            norm,
            skip_nonfinite,
            stream,
            norms,
            clip_value=clip,
            zero_grad=zero_grad,
            seed=self._storage.seed,
        )

    @property
    def grad_norm(self) -> float | None:
        """The norm of all gradients before the last step, of those that it measured.

        A step measures with max_norm, skip_nonfinite or norms; after any other this is None. On a
        CUDA device, reading it waits for the step.
        """
        return self._turn.read(self._table.norm)

    @property
    def grad_norms(self) -> dict[Key, float] | None:
        """The norm of each tensor's gradient, as `grad_norm`; without those that had none."""
        found = self._turn.read(self._table.norms)
        if found is None:
            return None
        return {key: one[0] for key, one in zip(self._params, found, strict=True) if one}

    @property
    def nonfinite(self) -> list[Key] | None:
        """The tensors whose gradients had an infinite or NaN element, as `grad_norm`.

        Example:
            >>> import numpy as np, fusedstep as fs
            >>> opt = fs.SGD({"w": np.ones(2, np.float32), "b": np.ones(1, np.float32)})
            >>> grads = {"w": np.array([3, 4], np.float32), "b": np.array([np.nan], np.float32)}
            >>> report = opt.step(grads, skip_nonfinite=True, norms=True)
            >>> report.elements, report.grad_norms, report.nonfinite
            (0, {'w': 5.0, 'b': nan}, ['b'])
        """
        found = self._turn.read(self._table.norms)
        if found is None:
            return None
        return [key for key, one in zip(self._params, found, strict=True) if one and not one[1]]

    def _announce(self, written: Iterable[int]) -> None:
        """Tells autograd of tensors that were written to, by number."""
        if tensors := [self._versioned[i] for i in written]:
            announcer()(tensors)

    @contextmanager
    def ema(self) -> Iterator[None]:
        """The parameters' moving average in their place: `with opt.ema(): evaluate(model)`.

        Parameters and averages change places in the memory that they have, and back afterwards,
        also after an exception: they are then what they were, to the bit. Inside, parameters are
        for reading, and in 16 bits they are the average rounded to nearest, bfloat16 of a float32
        average with ties away from zero. A copy of the parameters is kept meanwhile only where the
        average has another dtype, but for float32 under bfloat16 parameters, which share bits.

        Raises:
            ValueError: no step had `ema=` so far; or the parameters are on a GPU.
            RuntimeError: a step, a load, a copy or a reading of the state inside.

        Example:
            >>> import numpy as np, fusedstep as fs
            >>> w = np.array([1.0], np.float32)
            >>> opt = fs.SGD(w, lr=1.0)
            >>> for _ in range(2):
            ...     _ = opt.step(np.array([1.0], np.float32), ema=0.5)
            >>> with opt.ema():
            ...     print(w)
            [-0.5]
            >>> w
            array([-1.], dtype=float32)
        """
        _lookahead.refuse_inside(self, "ema must come")
        if not any(array is not None for array in self._states[EMA]):
            raise ValueError("ema must follow a step with ema=, got no average so far")
        try:
            self._turn.run(self._table.swap)
            self._ahead = "ema"
            self._announce(self._versioned)
            yield
        finally:
            if self._table.swapped:
                self._turn.run(self._table.swap)
                self._ahead = False
                self._announce(self._versioned)

    def masters(self) -> dict[Key, Array]:
        """Copies of the parameters at the precision that they are trained in, by name or number.

        float32, or float64 for float64 parameters: with `rounding="split"` or `"kahan"` more than
        the bfloat16 parameters show, otherwise what they are.

        Example:
            >>> import ml_dtypes, numpy as np, fusedstep as fs
            >>> w = np.ones(1, ml_dtypes.bfloat16)
            >>> opt = fs.SGD(w, lr=2.0**-12, rounding="split")
            >>> _ = opt.step(np.ones(1, np.float32))
            >>> w, opt.masters()[0]
            (array([1], dtype=bfloat16), array([0.99975586], dtype=float32))
        """
        return self._turn.read(self._masters)

    def _masters(self) -> dict[Key, Array]:
        """`masters`, while nobody else has a turn."""
        _lookahead.refuse_inside(self, "masters must come")
        found = {}
        for i, (key, param) in enumerate(self._params.items()):
            kept = self._form(i).param
            beside = self._states[kept.beside][i] if kept.beside else None
            found[key] = decoded(Stored(param, kept.format, beside), _wide(self._dtypes[i]))
        return found

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

        Of a state in q8 `exp_avg` is its 8-bit floats, and `exp_avg_exponents` has what lies beside
        them; `low_bits` and `compensation` lie beside the parameter; `ema` is its average.

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

    def state_dict(self, state_dtype: str | None = None) -> dict[str, Any]:
        """The optimizer's state with torch's keys and layout, plus `step`, the steps taken.

        As in torch the arrays are the live ones; `copy.deepcopy` keeps a moment. Where a parameter
        is a torch tensor its state is torch's too, so that `torch.optim` can load it. A schedule is
        stored as its value in the last step, or before the first step as the one it begins with.
        One of `fusedstep.schedules` is also in `schedules`, a dict for each group that has
        parameters, as its `to_dict`, which has the progress of a `ReduceOnPlateau`. Where the
        parameters have names, each group has them as `param_names`, which is torch's key too.
        Where anything is rounded at random each state has `step`, its count of updates, so that a
        resumed run has the same bits.

        Args:
            state_dtype: "float32" gives states and averages in bfloat16 or q8 as torch has them,
                float32, or float64 under float64 parameters, in copies; exactly; those in float32
                and float64 stay so. None gives all as it is (default None). `masters` has what
                belongs to the parameters.

        Raises:
            ValueError: another state_dtype.
            RuntimeError: the optimizer is stepping in another thread, or the call comes from inside
                `ema`.
        """
        if state_dtype not in (None, "float32"):
            raise ValueError(f"state_dtype must be None or 'float32', got {state_dtype!r}")
        return self._turn.read(self._saved, state_dtype is not None)

    def _saved(self, plain: bool) -> dict[str, Any]:
        """`state_dict`, while nobody else has a turn."""
        if self._ahead == "ema":
            _lookahead.refuse_inside(self, "state_dict must come")
        natives = self._last_natives()
        groups = []
        for group, native in zip(self._groups, natives, strict=True):
            stored = {**group, **self._spec.fixed, **self._followed(group._hypers, native)}
            if self._named:
                stored["param_names"] = [self._names[i] for i in group._params]
            groups.append(stored)
        clocks = self._table.clocks()
        # A hyperparameter that was edited may call for states which only the next step would make.
        uses = [
            self._spec.uses(
                self._spec.native({n: stored.get(n, v) for n, v in group._hypers.items()})
            )
            for group, stored in zip(self._groups, groups, strict=True)
        ]
        late, pending = self._spec.late, []
        shown: dict[int, list[str]] = {}  # the states of each parameter that has begun
        for i, clock in enumerate(clocks):
            if not self._started(i, clock):
                continue
            used = uses[self._group_of[i]]
            known = self._spec.states if self._has_begun(clock) else ()
            names = [n for n in known if n in used or self._states[n][i] is not None]
            if late and clock[2]:
                names = [n for n in self._spec.states if n in names and n != late]
                if late in used:
                    pending.append(i)
                elif plain or (i in self._tensors and not self._form(i).streams[late].is_narrow):
                    # Which torch has, and does not use.
                    names = [late, *names]
            shown[i] = names
        wanted = [
            (key, i)
            for i, names in shown.items()
            for key in self._form(i).keys(names)
            if self._states[key][i] is None
        ]
        states = self._extended(self._states, wanted, self._groups)
        state: dict[int, dict[str, Any]] = {}
        for i, clock in enumerate(clocks):
            entry: dict[str, Any] = {}
            form = self._form(i)
            if i in shown:
                entry.update({"step": clock[0]} if self._counts(i) else {})
                entry.update(zip(self._spec.carried, clock[1:], strict=False))
                for name in shown[i]:
                    entry.update(self._entry(states, name, i, plain))
            entry.update(self._entry(states, EMA, i, plain))
            beside = states[form.param.beside][i] if form.param.beside else None
            if beside is not None and (i in shown or np.any(beside)):
                entry[form.param.beside] = beside
            if entry:
                state[i] = _arrays.as_tensors(entry) if i in self._tensors else entry
        groups = [stored for stored in groups if stored["params"]]
        whole = {"state": state, "param_groups": groups, "step": self.steps}
        schedules = [group._stored() for group in self._groups if group._params]
        if pending:
            whole["pending"] = pending  # whose late state begins with the next step
        if self._table.averages:
            whole["averages"] = self._table.averages
        return {**whole, "schedules": schedules} if any(schedules) else whole

    def _entry(self, states: States, key: str, i: int, plain: bool) -> dict[str, Any]:
        """A state or an average as a checkpoint has it, and what lies beside it."""
        if states[key][i] is None:
            return {}
        stored, wide = self._stored(states, key, i), _wide(self._dtypes[i])
        if plain and self._form(i).streams[key].is_narrow:
            return {key: decoded(stored, wide)}
        beside = self._form(i).streams[key].beside
        return {key: stored.array} | ({beside: stored.beside} if beside else {})

    def _followed(self, group: Mapping[str, Any], native: list[float]) -> dict[str, Any]:
        """The scheduled hyperparameters of a group as numbers."""
        numbers, parts = self._spec.numbers(native), self._spec.parts
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
        return self._with_rates([self._spec.native_at(g._hypers, t) for g in self._groups], t)

    def _divisors(self) -> list[tuple[Any, Array | None]]:
        """Each parameter with its `divisor` under the present hyperparameters."""
        self._spec.check_divides(type(self).__name__)
        t = max(self.steps - 1, 0)
        natives = [self._spec.native_at(group._hypers, t) for group in self._groups]
        found = []
        for i, (param, clock) in enumerate(
            zip(self._params.values(), self._table.clocks(), strict=True)
        ):
            state = {
                name: decoded(self._stored(self._states, name, i), "float64")
                for name in self._spec.states
                if self._states[name][i] is not None
            }
            found.append((param, self._spec.divisor(natives[self._group_of[i]], clock[0], state)))
        return found

    def _keep(self) -> Callable[[], None]:
        """A function that puts back states, counts and hyperparameters, in place, as they are now.

        Raises:
            RuntimeError: the optimizer is stepping in another thread.
        """
        return self._turn.read(self._kept)

    def _kept(self) -> Callable[[], None]:
        """`_keep`, while nobody else has a turn."""
        from fusedstep.schedules import plateaus

        clocks = self._table.clocks()
        states = {name: list(arrays) for name, arrays in self._states.items()}
        arrays = [a for found in states.values() for a in found if a is not None]
        saved = [array.copy() for array in arrays]
        steps, used = self._table.steps, self._table.used
        averages = self._table.averages
        hypers = [(group.__dict__, {"_hypers": group._hypers}) for group in self._groups]
        held = [one for group in self._groups for one in plateaus(group._hypers.values())]
        progress = [one._changed_to(one.progress) for one in held]

        def put_back() -> None:
            for array, values in zip(arrays, saved, strict=True):
                array[...] = values
            self._table.load(states, clocks, steps, used, hypers + progress, averages)

        return lambda: self._turn.run(put_back)

    def _counts(self, i: int) -> bool:
        """Whether a parameter's state has its count of updates."""
        return self._spec.counts_steps or self._form(i).random

    def _started(self, i: int, clock: Clock) -> bool:
        """Whether a parameter has a state to save, or a count of updates."""
        return (self._counts(i) and clock[0] > 0) or self._has_begun(clock)

    def _has_begun(self, clock: Clock) -> bool:
        """Whether the states of a parameter have begun, also in a checkpoint without counts."""
        return clock[0] > 0 if self._spec.counts_steps else clock[1] != 0

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

        States may be in any format, float32, bfloat16 or q8, whatever this optimizer keeps them in:
        they are converted, and rounded to nearest where they must be. `low_bits` and `compensation`
        are taken over where `rounding` has them, and begin at zero where the dict lacks them.

        Raises:
            TypeError, ValueError: a key, count, shape, dtype or value does not fit; nothing has
                changed then.
        """
        _lookahead.refuse_inside(self, "load_state_dict must come")
        self._turn.run(self._load, state_dict)

    def _load(self, state_dict: Any) -> None:
        """`load_state_dict`, while nobody else has a turn."""
        groups = [(group._hypers, group._params) for group in self._groups]
        own = _checkpoint.Holder(
            self._spec,
            self._names,
            self._named,
            groups,
            self._shapes,
            [self._form(i) for i in range(len(self._names))],
            [_wide(dtype) for dtype in self._dtypes],
            self._quiet,
        )
        found = _checkpoint.loaded(own, state_dict)
        for values, group in zip(found.hypers, self._groups, strict=True):
            native = self._spec.native_at(values, found.steps)
            self._storage.check_exact(native, (self._dtypes[i] for i in group._params))
        begun = found.begun
        clocks = [begun[i][0] if i in begun else (0, 0.0, 0.0) for i in range(len(self._names))]
        forms = list(map(self._form, range(len(self._names))))
        wanted = {
            (key, i) for i, k in enumerate(self._group_of) for key in forms[i].keys(found.uses[k])
        }
        for i, (_, arrays) in begun.items():
            names = [name for name in arrays if name in forms[i].streams]
            wanted |= {(key, i) for key in forms[i].keys(names)}
        states = self._extended(self._no_states(), sorted(wanted), found.hypers)
        for i, (_, arrays) in begun.items():
            for name, stored in arrays.items():
                if name in forms[i].streams:
                    self._put(states, name, i, stored)
                elif key := forms[i].param.beside:
                    there = stored.array
                    if name != key:
                        param = list(self._params.values())[i]
                        there = _storage.beside_param(Stored(param, stored.format, there), key)
                    states[key][i][...] = there
        if found.schedules.warning:  # which may be an error: nothing has changed yet
            warnings.warn(found.schedules.warning, UserWarning, stacklevel=3)
        changes = [
            (group.__dict__, {"_hypers": values, "_own": other})
            for group, values, other in zip(self._groups, found.hypers, found.others, strict=True)
        ]
        changes += [plateau._changed_to(reached) for plateau, reached in found.schedules.progress]
        self._table.load(states, clocks, found.steps, [], changes, found.averages)

    def __getstate__(self) -> dict[str, Any]:
        _lookahead.refuse_inside(self, "copies must be made")
        return self._turn.read(self._copied)

    def _copied(self) -> dict[str, Any]:
        """`__getstate__`, while nobody else has a turn."""
        table = self._table
        known = dict(table.states), table.clocks(), table.steps, table.used, table.averages
        state = {**self.__dict__, "_table": known, "_how": self._storage.how}
        for name in ("_tensors", "_versioned", "_index", "_turn", "_storage"):
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
        state = dict(state)
        self._storage = Storage(self._spec, state.pop("_how", {}))
        self.__dict__.update(state)
        if self._buffer is not None:
            self._params = dict(self._buffer.items())
        self._open_table()
        old, clocks, steps, used, *averages = state["_table"]
        if any(len(native) != len(self._spec.order) for native in used):
            used = []  # another version's: the groups say it too
        wanted = [
            (s, i) for s, arrays in old.items() for i, a in enumerate(arrays) if a is not None
        ]
        states = self._extended(self._no_states(), wanted, self._groups)  # in flat buffers
        for name, i in wanted:
            states[name][i][...] = old[name][i]
        self._table.load(states, clocks, steps, used, [], *averages)

    def __repr__(self) -> str:
        n = sum(int(np.prod(shape)) for shape in self._shapes)
        dtypes = ", ".join(sorted(set(self._dtypes))) or "no dtype"
        lines = [f"{len(self._names)} parameters, {n} elements, {dtypes}"]
        for k, group in enumerate(self._groups):
            head = f"group {k} ({len(group._params)}): " if len(self._groups) > 1 else ""
            lines.append(head + ", ".join(assignments(group._telling())))
        return f"{type(self).__name__}(\n  " + "\n  ".join(lines) + "\n)"
