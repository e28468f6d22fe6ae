"""`torch.optim.Optimizer` over the neutral optimizers' rules, hyperparameters and kernels."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import operator
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, SupportsFloat, TypedDict, TypeVar, get_type_hints

import numpy as np
import torch
from torch.optim import optimizer as torch_optimizer

import fusedstep as neutral
from fusedstep import _arrays, _checkpoint, _core, _lookahead, _storage
from fusedstep._arrays import announcer, as_float
from fusedstep._hypers import (
    ABOVE_0,
    AT_LEAST_0,
    HYPERS,
    SHARE,
    as_number,
    at_step,
    check_flags,
    is_scheduled,
)
from fusedstep._spec import STATES, Spec
from fusedstep._storage import EMA, HOW, Form, Storage, Stored
from fusedstep._turn import Turn, new_turn
from fusedstep._types import (
    PLAIN,
    EmaDtype,
    Options,
    Rate,
    Rounding,
    StateDtype,
    StateRounding,
)
from fusedstep.torch import flat
from fusedstep.torch.tensors import (
    Swap,
    any_dtensor,
    as_dense,
    as_plain,
    check_apart,
    check_memory,
    check_readable,
    convert,
    dtype_for,
    dtype_name,
    first_place,
    gpu_of,
    is_dtensor,
    local,
    new_state,
    recording,
    stream_of,
)

# How torch computes, not what. The first has no effect here, the second is for GradScaler, the next
# for parameters on a GPU.
_FLAGS: dict[str, Any] = {
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
}
_HOW = ("capturable", "differentiable")
_KEPT = (*_HOW, "fused")  # which no checkpoint changes

# What each step does beside its rule: keywords of constructors, which hold for all steps that are
# not told otherwise, and of `step`. Each one's default, and its line in the docstrings.
_EACH: dict[str, tuple[Any, str]] = {
    "clip_value": (
        None,
        "clips each element of the gradients to [-clip_value, clip_value], after `max_norm`; NaN"
        " stays; a number > 0",
    ),
    "ema": (
        None,
        "keeps an exponential moving average of all parameters as they are stored, a state `ema`,"
        " as `torch.optim.swa_utils.AveragedModel` does, from a copy at the first average on: a"
        " decay in [0, 1], or a callable of the number of averages so far",
    ),
    "shadow": (
        None,
        "tensors of the parameters' shapes, in their order or by name, or None, that take a copy of"
        " the parameters: float32, bfloat16 or float16",
    ),
    "zero_grad": (False, "the gradients become zero, once they were read"),
}

# A group's key for the number of averages so far.
_AVERAGES = "averages"


class _AsMade:
    def __repr__(self) -> str:
        return "as constructed"


_AS_MADE: Any = _AsMade()
_UNTOLD = (_AS_MADE,) * len(_EACH)


class _Asked(NamedTuple):
    """What one step is asked for."""

    max_norm: float | None = None
    skip_nonfinite: bool = False
    norms: bool = False
    clip_value: float | None = None
    ema: Any = None
    shadow: list[Any] | None = None
    zero_grad: bool = False


# What takes copies of the parameters, by number or by name.
Shadows = Iterable[torch.Tensor | None] | Mapping[str, torch.Tensor | None] | None

# A group as the table takes it: parameters, hyperparameters in the rule's order, the group, and lr
# where only the GPU knows it.
_Row = tuple[list[Any], list[float], dict[str, Any], Any]

# Where a parameter is: its group, its place there, and its number, counted over all groups as in
# `state_dict`.
Place = tuple[int, int, int]

# Attributes that torch.amp.GradScaler sets for one step.
_AMP = ("grad_scale", "found_inf")

_OURS = "fusedstep"  # the key of our hook among torch's, which have numbers

_CPU = torch.device("cpu")

_PARAMS = operator.itemgetter("params")

_EXCHANGE = True  # read tensors through DLPack's C functions where torch has them


F = TypeVar("F", bound=Callable[..., Any])


def _signed(typed: F) -> Callable[[Callable[..., Any]], F]:
    """Gives a function that passes its arguments on the signature of the one that takes them."""

    def signed(passing: Any) -> Any:
        passing.__signature__ = inspect.signature(typed)
        return passing

    return signed


class Optimizer(torch.optim.Optimizer):
    """Base of the drop-in classes: `torch.optim.Optimizer` with a step in one sweep over memory.

    Parameter groups, hooks, closures, schedulers, `state_dict`, deepcopy and pickle are torch's.
    Parameters are tensors of float32, float64, bfloat16, float16, complex64 or complex128 (each
    number as two reals), all on the CPU or all on one CUDA device. A gradient may be any of the
    real ones under a real parameter (`torch.Tensor.grad_dtype`), complex under a complex one.
    States are float32, float64 under float64, unless `state_dtype` says otherwise. How parameters
    and states are stored (`rounding`, `state_dtype`, `state_rounding`, `seed`, `ema_dtype`) is the
    optimizer's, not a group's; what each step does beside its rule (`clip_value`, `ema`, `shadow`,
    `zero_grad`) holds for all steps that are not told otherwise.
    A step reads gradients and writes them only for `zero_grad`: with `max_norm`, or with
    `fused=True` under `torch.amp.GradScaler`, they stay as backward left them. Without `fused=True`
    it is the scaler that unscales them before, and that does not call `step` where one is not
    finite.

    On a CUDA device a step is queued on torch's current stream and does not wait for it. Results
    are the CPU's, bit by bit. With `capturable=True`, with `skip_nonfinite`, under a `GradScaler`
    that leaves its verdict to the step, or with an `lr` that is a tensor on the device, the step
    counts are on the device too.

    A step reads parameters, gradients, groups, and states that anybody was shown, anew, so all of
    them may be replaced or edited between steps. Tensors that are not dense, or whose strides
    differ from their parameter's, go through a dense copy that lives for the step.

    A call that raises has changed nothing. One that is interrupted, by Ctrl-C or by what a signal's
    handler raises, has changed all or nothing: parameters, states and counts. So a handler may save
    `state_dict()`.
    """

    _spec: ClassVar[Spec]
    _given: ClassVar[dict[str, Any]]  # keys of a group, with the constructor's defaults
    _extra: ClassVar[dict[str, Any]]  # keys that a group has only where the constructor got them
    _read: ClassVar[tuple[str, ...]]  # the keys that a step reads
    _quiet: ClassVar[dict[str, Any]]  # what the neutral class leaves out of its checkpoints
    param_groups: list[dict[str, Any]]
    _stepping_in_backward: set[Any]
    _keys: Sequence[str] = ()  # the parameters' names, when a step last measured gradients
    _found: set[int] | None = None  # in the constructor, the `id` of each parameter so far
    _turn: Turn
    _ahead: bool | str = False  # whether the parameters stand elsewhere, and where
    _storage: Storage
    _reread = False  # whether a group has changed since the last step
    _random: bool  # whether anything is rounded at random
    _arrays: set[str]  # the keys of arrays in states
    _each: _Asked  # as constructed
    _table: _core.TensorTable
    _gpu: Any  # what steps on the parameters' CUDA device, or None
    _device: torch.device
    # Groups as a step read them last.
    _seen: dict[int, tuple[tuple[Any, ...], tuple[Any, ...] | None, _Row]]

    def __init__(self, params: Any, **hypers: Any) -> None:
        self._store({name: hypers.pop(name) for name in HOW if name in hypers})
        each = {name: hypers.pop(name, default) for name, (default, _) in _EACH.items()}
        self._each = _Asked(**self._checked_each(each))
        self.__dict__.update(_turn=new_turn(), _stepping_in_backward=set(), **self._derived({}))
        beyond = sorted(self._extra.keys() & hypers.keys() - _FLAGS.keys())
        heard = {_checkpoint.BEYOND: beyond} if beyond else {}
        self._found = set()
        try:
            super().__init__(params, {**self._spec.fixed, **self._given, **hypers, **heard})
        finally:
            self._found = None
        self._shadows(self._each.shadow)
        if self._spec.begins_at_once:
            rows = self._current()
            helper = _Helper(self, self._counts_live(rows), rows)
            for params, native, group, _ in rows:
                names = ["step", *self._spec.uses(native)]
                if params:
                    names += self._beside(params[0], names)
                made = helper._begin([(param, group, names) for param in params])
                self.state.update(zip(params, made, strict=True))

    def _derived(self, state: Any) -> dict[str, Any]:
        """New attributes for all that is derived from groups and states."""
        return {"_seen": {}, **self._opened(torch.device("cpu"), state)}

    def _opened(self, device: torch.device, state: Any, live: bool = False) -> dict[str, Any]:
        """The compiled table for parameters on `device`, with counts there if `live`."""
        gpu = gpu_of(device)
        index = 0 if gpu is None else device.index or 0
        storage = self._storage.native
        table = _core.TensorTable(
            self._spec.rule, self._scalars(), storage, _EXCHANGE, gpu, index, state
        )
        table.live = live
        return {"_table": table, "_gpu": gpu, "_device": device}

    def _store(self, how: Mapping[str, Any]) -> None:
        """Takes over how parameters and states are stored."""
        self._storage = Storage(self._spec, how)  # type: ignore[arg-type]  # it checks them
        forms = [self._storage.of(name) for name in _arrays.DTYPES]
        self._random = any(form.random for form in forms)
        self._arrays = {name for form in forms for name in (*form.streams, *form.beside)}

    def _scalars(self) -> Sequence[str]:
        """The numbers in a parameter's state. What is rounded at random needs a count."""
        counts = self._spec.counts_steps
        return self._spec.scalars if counts or not self._random else ("step",)

    def _form(self, param: torch.Tensor) -> Form:
        """How a parameter and what belongs to it are stored."""
        return self._storage.of(dtype_name(param))

    def _beside(self, param: torch.Tensor, names: Sequence[str]) -> list[str]:
        """The keys of what lies beside a parameter and these of its states."""
        form = self._form(param)
        kept = [form.param, *(form.states[name] for name in names if name in form.states)]
        return [one.beside for one in kept if one.beside]

    def _ordered(self, param: torch.Tensor) -> bool:
        """Whether what is stored of a parameter depends on places in it."""
        form = self._form(param)
        return form.random or any(kept.by_block for kept in form.states.values())

    def _array_dtype(self, param: torch.Tensor, name: str) -> torch.dtype:
        """The dtype of an array in a parameter's state."""
        form = self._form(param)
        beside = form.beside.get(name)
        text = form.streams[name].dtype if beside is None else beside.beside_dtype
        return dtype_for(text, param)

    def _new(self, param: torch.Tensor, name: str) -> torch.Tensor:
        """A new array, zeros, of a parameter's state."""
        beside = self._form(param).beside.get(name)
        dtype = self._array_dtype(param, name)
        if beside is not None and beside.by_block:
            here = local(param)
            shape = beside.beside_shape(here.shape, self._first(param))
            return torch.zeros(shape, dtype=dtype, device=here.device)
        return new_state(param, dtype, self._ordered(param))

    def _first(self, param: torch.Tensor) -> int:
        """The place in the whole parameter of the first element here, where that matters."""
        if not self._ordered(param) or not is_dtensor(param):
            return 0
        return first_place(lambda: f"params[{self._places()[id(param)][2]}]", param)

    def _stored(self, param: torch.Tensor, name: str, entry: Mapping[str, Any]) -> Stored:
        """A state or an average in `entry`, with its format and what lies beside it."""
        kept = self._form(param).streams[name]
        beside = entry.get(kept.beside) if kept.beside else None
        if kept.beside and beside is None:
            k, j, i = self._places()[id(param)]
            (which,) = _names_in(self.param_groups[k], i, 1, j)
            raise ValueError(
                f"state[{which}]['{kept.beside}'] must be with the codes in '{name}', got none"
            )
        return Stored(entry[name], kept.format, beside)

    def _check_stored(self, label: str, param: torch.Tensor) -> None:
        """Raises ValueError for a parameter that cannot be stored as this optimizer stores."""
        self._storage.check_params([(label, dtype_name(param))])
        for name, kept in self._form(param).streams.items() if param.is_complex() else ():
            if kept.format not in ("float32", "float64"):
                key = "ema_dtype" if name == EMA else "state_dtype"
                raise ValueError(
                    f"{key} must be float32 or float64 under complex parameters, got"
                    f" {self._storage.how[key]!r} with {label} of {param.dtype}"
                )

    @staticmethod
    def _checked_each(given: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of _EACH, but for the shadows, which are to fit parameters."""
        checked = dict(given)
        if given.get("clip_value") is not None:
            checked["clip_value"] = as_number("clip_value", given["clip_value"], ABOVE_0)
        if given.get("ema") is not None and not callable(given["ema"]):
            checked["ema"] = as_number("ema", given["ema"], SHARE)
        if "zero_grad" in given:
            check_flags(zero_grad=given["zero_grad"])
        shadow = given.get("shadow")
        if shadow is not None and not isinstance(shadow, Mapping):
            if isinstance(shadow, torch.Tensor) or not isinstance(shadow, Iterable):
                kind = type(shadow).__name__
                raise TypeError(f"shadow must be a sequence or dict of tensors, got {kind}")
            checked["shadow"] = list(shadow)
        return checked

    def _shadows(self, given: Any) -> list[Any] | None:
        """What each parameter is copied to, or None, by number."""
        if given is None:
            return None
        n = len(self._params())
        shadows = given
        if isinstance(given, Mapping):
            names = self._distinct_names()
            unknown = [key for key in given if key not in names]
            if unknown:
                raise ValueError(f"shadow must have names of parameters, got {unknown[0]!r}")
            shadows = [given.get(name) for name in names]
        if len(shadows) != n:
            raise ValueError(f"shadow must have an entry for each of {n} parameters, got"
                             f" {len(shadows)}")  # fmt: skip
        for i, shadow in enumerate(shadows):
            if shadow is not None and not isinstance(shadow, torch.Tensor):
                raise TypeError(f"shadow[{i}] must be a tensor or None, got {shadow!r}")
        return list(shadows)

    @property
    def state(self) -> Any:
        """The states as torch has them, a dict of names to tensors for each parameter.

        Steps look at all of them again after it was read, until nobody holds a part of it.
        """
        if "_table" in self.__dict__:
            return self._table.state
        if "_early" in self.__dict__:
            return self._early
        raise AttributeError("state must be set, or the optimizer made, before it is read")

    @state.setter
    def state(self, state: Any) -> None:
        if "_table" in self.__dict__:
            self._table.state = state
        else:  # a subclass's, before it calls our constructor
            self._early = state

    @state.deleter
    def state(self) -> None:
        self._table.state = defaultdict(dict)

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The norm of all gradients before the last step, if that measured them (`max_norm`,
        `skip_nonfinite` or `norms`): float64, 0-d, on the parameters' device."""
        return self._table.norm

    @property
    def grad_norms(self) -> dict[str | int, float] | None:
        """The norm of each parameter's gradient before the last step, if that measured them.

        By name where all parameters have one of their own, else by number as in `state_dict`;
        without those that had no gradient. On a CUDA device, reading it waits for the step.
        """
        found = self._measured()
        return None if found is None else {key: norm for key, norm, _ in found}

    @property
    def nonfinite(self) -> list[str | int] | None:
        """The parameters whose gradients had an infinite or NaN element, as `grad_norms`."""
        found = self._measured()
        return None if found is None else [key for key, _, finite in found if not finite]

    def _measured(self) -> list[tuple[str | int, float, bool]] | None:
        """Key, norm and whether it is finite of each gradient of the last step."""
        found = self._turn.read(self._table.norms)
        keys = self._keys
        if found is None:
            return None
        return [(keys[i] if keys else i, norm, finite) for i, norm, finite in found]

    def _distinct_names(self) -> list[str]:
        """The names of all parameters, or none."""
        names = [str(name) for group in self.param_groups for name in group.get("param_names", ())]
        return names if len(set(names)) == len(self._params()) else []

    def __delattr__(self, name: str) -> None:
        # torch.amp.GradScaler deletes after the step what it set before it; the step has by then.
        if name not in _AMP or name in self.__dict__:
            super().__delattr__(name)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by torch.amp.GradScaler, which then leaves scale and non-finite gradients to step.

        As in torch only with `fused=True`: trainers, and scalers over several processes, count on
        gradients that are unscaled before the step, and on a step that is not called otherwise.
        """
        if self._stepping_in_backward:  # to be refused by the step, and by name
            return True
        return all(group.get("fused") for group in self.param_groups)

    # -- hyperparameters ---------------------------------------------------------------------------

    def _checked(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group's hyperparameters; TypeError or ValueError for one that is wrong."""
        if group.get("differentiable"):
            raise ValueError(
                f"differentiable must be False, got {group['differentiable']!r}: not supported"
            )
        known = self._known(group)
        return {n: self._check(n, known[n]) for n in self._read if n not in _FLAGS}

    def _known(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group with defaults for what it lacks, and for what it has but does not heed."""
        known = {**self._extra, **self._spec.fixed, **self._given, **group}
        heard = _checkpoint.heeded(group)
        return known | {n: value for n, value in self._extra.items() if n not in heard}

    def _to_python(self, group: dict[str, Any]) -> None:
        """Puts Python's numbers and tuples where a group has those of other libraries.

        A group with them is slower to read, and its checkpoint is refused by `weights_only`.
        """
        for name in {*self._read, *_FLAGS} & group.keys():
            group[name] = _as_python(group[name])

    def _check_capturable(self, group: Mapping[str, Any]) -> None:
        if group.get("capturable") and self._gpu is None:
            raise ValueError(
                f"capturable must be False, got {group['capturable']!r}: parameters on the CPU"
            )

    def _check(self, name: str, value: Any) -> Any:
        """One hyperparameter, checked unless it is the object that was accepted last."""
        accepted = self.__dict__.setdefault("_accepted", {})
        last, checked = accepted.get(name, (None, None))
        if value is not last or value is None:
            if is_scheduled(value):
                raise TypeError(f"{name} must be a number, got {value!r}: a schedule goes to"
                                " fusedstep.torch.LRScheduler(optimizer, schedule)")  # fmt: skip
            checked = self._spec.check(name, _plain(value, name))
            if _is_fixed(value):
                accepted[name] = value, checked
        return checked

    def _current(self) -> list[_Row]:
        """All groups as the table takes them; those that were edited are checked again."""
        self._settle(next(filter(None, map(_PARAMS, self.param_groups)), (None,))[0])
        rows = [self._row(k, group) for k, group in enumerate(self.param_groups)]
        if len(self._seen) > len(rows):
            self._seen = {k: self._seen[k] for k in range(len(rows))}
        return rows

    def _settle(self, param: torch.Tensor | None) -> None:
        """Before a step: makes the table one for the device, to which a model may have moved."""
        _lookahead.refuse_inside(self, "step and lookahead must come")
        if param is None or param.device == self._device or param.is_meta:
            return
        params = self._params()
        for i in self._not_begun():
            self.state.pop(params[i], None)
        self.__dict__.update(_seen={}, **self._opened(param.device, self.state, self._table.live))

    def _row(self, k: int, group: dict[str, Any]) -> _Row:
        """Group k as the table takes it."""
        values = tuple(map(group.get, self._read))
        if k in self._seen:
            before, copies, row = self._seen[k]
            same = row[0] is group["params"] and row[2] is group
            same = same and all(map(operator.is_, values, before))
            if same and (copies is None or copies == tuple(map(_copied, values))):
                return row
        self._check_capturable(group)
        copies = None if all(map(_is_fixed, values)) else tuple(map(_copied, values))
        known, lr = group, group.get("lr")
        if self._gpu is None or not isinstance(lr, torch.Tensor) or lr.device != self._device:
            lr = None
        else:  # to read it would be to wait for the device
            known, lr = {**group, "lr": 0.0}, lr.detach()
        native = self._spec.native(self._checked(known))
        self._storage.check_exact(native, map(dtype_name, group["params"]))
        row = (group["params"], native, group, lr)
        self._seen[k] = (values, copies, row)
        self._reread = True
        return row

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as torch's; checks its hyperparameters first."""
        if isinstance(param_group, dict):
            # As in torch only here: a scheduler may cycle a momentum down to 0.
            self._spec.check_together(self._checked({**self.defaults, **param_group}))
        before = len(getattr(self, "param_groups", ()))
        self._append(param_group)
        try:
            group = self.param_groups[-1]
            real = (p for one in self.param_groups for p in one["params"] if not p.is_meta)
            home = next((param.device for param in real), self._device)
            known = self._found  # as many as there are, without a look at all groups
            n = len(self._params()) if known is None else len(known)
            first = n - len(group["params"])
            for j, param in enumerate(group["params"]):
                device = param.device
                if device.type not in ("cpu", "cuda", "meta"):
                    rule = "on the CPU or a CUDA device"
                elif device not in (home, torch.device("meta")):  # which is yet to get memory
                    rule = f"on {home} as the others"
                else:
                    continue
                (name,) = _names_in(group, first + j, 1, j)
                raise ValueError(f"params[{name}] must be {rule}, got {device}")
            for j, param in enumerate(group["params"]):
                self._check_stored(f"params[{_names_in(group, first + j, 1, j)[0]}]", param)
            native = self._spec.native(self._checked({**group, "lr": 0.0}))
            self._storage.check_exact(native, map(dtype_name, group["params"]))
            if home != self._device:
                self.__dict__.update(self._opened(home, self.state))
            self._to_python(group)
            self._check_capturable(group)
        except BaseException:
            del self.param_groups[before:]
            raise

    def _append(self, param_group: dict[str, Any]) -> None:
        """torch's part of `add_param_group`.

        It looks through all groups for the new one's parameters. In a constructor, where nobody
        else can have changed a group, those that were found before are remembered instead.
        """
        if self._found is None:
            super().add_param_group(param_group)
            return
        groups = self.param_groups
        self.param_groups = [{**group, "params": []} for group in groups[:1]]  # whether by name
        try:
            super().add_param_group(param_group)
            group = self.param_groups[-1]
        finally:
            self.param_groups = groups
        params = set(map(id, group["params"]))
        if not self._found.isdisjoint(params):
            raise ValueError("some parameters appear in more than one parameter group")
        self._found |= params
        groups.append(group)

    # -- the step ----------------------------------------------------------------------------------

    def _step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: SupportsFloat | None = None,
        skip_nonfinite: bool = False,
        norms: bool = False,
        clip_value: SupportsFloat | None = _AS_MADE,
        ema: Rate | None = _AS_MADE,
        shadow: Shadows = _AS_MADE,
        zero_grad: bool = _AS_MADE,
    ) -> Any:
        asked = self._each
        told = clip_value, ema, shadow, zero_grad
        if told != _UNTOLD:
            given = zip(_EACH, told, strict=True)
            checked = self._checked_each({n: value for n, value in given if value is not _AS_MADE})
            asked = asked._replace(**checked)
        if asked.zero_grad and self._stepping_in_backward:
            raise RuntimeError(
                "zero_grad must be False, got True: step_in_backward frees gradients"
            )
        if max_norm is not None or skip_nonfinite is not False or norms is not False:
            max_norm = self._check_whole(max_norm, skip_nonfinite, norms)
            asked = asked._replace(max_norm=max_norm, skip_nonfinite=skip_nonfinite, norms=norms)
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"closure must be callable or None, got {type(closure).__name__}: gradients are"
                    " read from the parameters' grad, where backward leaves them"
                )
            with torch.enable_grad():
                loss = closure()
        self._turn.run(self._step_all, asked)
        return loss

    @_signed(_step)
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Updates the parameters that have a gradient, in one sweep over memory.

        Args:
            closure: recomputes the loss and the gradients, before the update (default None).
            max_norm: clips the gradients, all of them together, to this norm, as
                `torch.nn.utils.clip_grad_norm_` does, but leaves them as they are: the step
                multiplies as it reads. `grad_norm` is then the norm before. A number >= 0, or inf
                to measure only (default None). The norm is of this optimizer's gradients: where
                each rank has an optimizer of its own over a part of the model
                (`ZeroRedundancyOptimizer`), clip before the step.
            skip_nonfinite: an infinite or NaN gradient makes the step do nothing at all: no
                parameter, state or step count changes (default False).
            norms: measures each parameter's gradient, for `grad_norms` and `nonfinite`
                (default False).
            clip_value, ema, shadow, zero_grad: as the constructor's, for this step (default: the
                constructor's).

        Returns:
            What the closure returned.

        Raises:
            TypeError, ValueError: a parameter, gradient or state of another kind, dtype, shape or
                device than can be stepped, or memory that overlaps; hyperparameters out of range;
                `max_norm`, `skip_nonfinite` or `norms` with DTensors, of which a rank has a part.
            RuntimeError: the optimizer is stepping in another thread, or the call comes from inside
                a step of its own; a CUDA graph is being recorded and `capturable` is False.
        """
        observed = not self._observing and (
            torch.autograd._profiler_enabled()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )
        try:
            if observed:
                return self._observed_step(*args, **kwargs)
            return self._step(*args, **kwargs)
        except BaseException:
            self._end_scaling()
            raise

    def _end_scaling(self) -> None:
        """After a step that raised, or was none of ours: the next one is not scaled by it."""
        attributes = self.__dict__
        for name in _AMP:
            if name in attributes:
                del attributes[name]

    # torch wraps the step of every class that does not say so, which costs a small step its half.
    step.hooked = True  # type: ignore[attr-defined]

    _observing = False  # whether a subclass's step has seen to the hooks, and calls ours

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper of a subclass's own step, with the hooks run once for each call.

        Only the call can tell whether they were: a class may change after construction, not all of
        its bases' steps are wrapped, and `functools.wraps` makes others look it.
        """
        observed = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def once(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if self._observing:
                return func(self, *args, **kwargs)
            self._observing = True
            try:
                return observed(self, *args, **kwargs)
            finally:
                self._observing = False
                self._end_scaling()

        return once

    def _step_all(self, asked: _Asked) -> None:
        """A step, while nobody else has a turn."""
        rows = self._current()
        if asked.shadow is not None:
            asked = asked._replace(shadow=self._shadows(asked.shadow))
        self._update(rows, asked)

    def _check_whole(self, max_norm: Any, skip_nonfinite: Any, norms: Any) -> float | None:
        """`max_norm`, checked; raises unless all gradients are here at once, as all three need."""
        check_flags(skip_nonfinite=skip_nonfinite, norms=norms)
        if max_norm is not None:
            max_norm = as_number("max_norm", max_norm, AT_LEAST_0)
        if self._stepping_in_backward:
            raise RuntimeError("max_norm, skip_nonfinite and norms need all gradients at once, but"
                               " step_in_backward has already stepped and freed them")  # fmt: skip
        if any_dtensor(self._params()):
            raise ValueError("max_norm, skip_nonfinite and norms must not be given for DTensors,"
                             " got a model of which this rank has a part")  # fmt: skip
        return max_norm

    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)
    _step.__qualname__ = step.__qualname__  # by which Python's errors call it

    def _update(
        self,
        groups: list[_Row],
        asked: _Asked,
        first: int = 0,
        at: int = 0,
        free: bool = False,
    ) -> None:
        """Steps the parameters of `groups`, with the loss scale that torch.amp has set.

        `first` is the number of the first, and `at` its place in its group. `free` drops each
        gradient with the step that it was for.
        """
        found_inf = self.__dict__.get("found_inf")
        if found_inf is not None and self._stepping_in_backward:
            raise RuntimeError("GradScaler cannot be used with step_in_backward: gradients were"
                               " stepped before they were checked")  # fmt: skip
        scale = self.__dict__.get("grad_scale")
        max_norm, skip_nonfinite, norms = asked[:3]
        options = PLAIN
        if self._gpu is not None:
            live = skip_nonfinite or found_inf is not None or self._counts_live(groups)
            options = self._gpu_options(live, scale, found_inf, max_norm, skip_nonfinite, norms)
        elif norms or skip_nonfinite or not (scale is found_inf is max_norm is None):
            bad = 0.0 if found_inf is None else float(found_inf)
            factor = 1.0 if scale is None else 1 / float(scale)
            found = torch.tensor(bad, dtype=torch.float32, device="cpu")
            norm = self._new_norm(max_norm, skip_nonfinite or norms)
            options = Options(
                factor, max_norm, skip_nonfinite, norms=norms, found_inf=found, norm=norm
            )
        if type(self).state is not Optimizer.state:  # a subclass's own attribute
            self._table.state = self.state
        changes = []
        if asked.ema is not None:
            so_far = self._averages()
            decay = at_step("ema", asked.ema, so_far, SHARE)
            options = options._replace(average=so_far + 1, ema_decay=decay)
            changes = [(group, {_AVERAGES: so_far + 1}) for group in self.param_groups]
        if asked.clip_value is not None or asked.zero_grad or self._storage.seed:
            options = options._replace(
                clip_value=asked.clip_value, zero_grad=asked.zero_grad, seed=self._storage.seed
            )
        if options.max_norm is not None or options.skip_nonfinite or options.norms:
            self._keys = self._distinct_names()
        helper = _Helper(self, options.live, groups, first, at, asked)
        self._table.step(groups, options, first, free, helper, asked.shadow, changes)
        if self._reread:
            self._drop_late(groups)

    def _averages(self) -> int:
        """How many averages there were."""
        return max((group.get(_AVERAGES, 0) for group in self.param_groups), default=0)

    def _drop_late(self, rows: list[_Row]) -> None:
        """After a step: drops a state that it did not have, so that it begins anew later."""
        self._reread = False
        late = self._spec.late
        for params, native, *_ in rows:
            if late and late not in self._spec.uses(native):
                for param in params:
                    if param in self.state:
                        self.state[param].pop(late, None)

    def _counts_live(self, rows: list[_Row]) -> bool:
        """Whether the step counts are on the device: once there, they stay."""
        if self._gpu is None:
            return False
        return self._table.live or any(
            lr is not None or bool(group.get("capturable")) for _, _, group, lr in rows
        )

    def _new_norm(self, max_norm: Any, measure: bool) -> torch.Tensor | None:
        """Where a step that measures the gradients' norm is to write it."""
        if max_norm is None and not measure:
            return None
        return torch.empty((), dtype=torch.float64, device=self._device)

    def _gpu_options(
        self,
        live: bool,
        scale: Any,
        found_inf: Any,
        max_norm: Any,
        skip_nonfinite: bool,
        norms: bool,
    ) -> Options:
        """A step's options on a GPU: numbers that are there are not waited for."""
        norm = self._new_norm(max_norm, skip_nonfinite or norms)
        factor = 1.0
        if scale is not None and not isinstance(scale, torch.Tensor):
            factor, scale = 1 / float(scale), None
        scale, found_inf = (
            one.detach().to(self._device, non_blocking=True)
            if isinstance(one, torch.Tensor)
            else None
            if one is None
            else torch.tensor(float(one), dtype=torch.float32, device=self._device)
            for one in (scale, found_inf)
        )
        live = live or scale is not None
        stream = stream_of(self._device)
        return Options(
            factor, max_norm, skip_nonfinite, stream, norms, live, scale, found_inf, norm
        )

    def _places(self) -> dict[int, Place]:
        """Where each parameter is, by its `id`."""
        places: dict[int, Place] = {}
        first = 0
        for k, group in enumerate(self.param_groups):
            for j, param in enumerate(group["params"]):
                places.setdefault(id(param), (k, j, first + j))
            first += len(group["params"])
        return places

    def _step_one(self, param: torch.Tensor, place: Place) -> None:
        """Steps one parameter and drops its gradient, while nobody else has a turn.

        Looks at its own group alone.
        """
        self._settle(param)
        k, j, i = place
        _, native, group, lr = self._row(k, self.param_groups[k])
        # Averages and copies are made by `step`, of all parameters at once.
        asked = _Asked(clip_value=self._each.clip_value)
        self._update([([param], native, group, lr)], asked, i, j, free=True)

    def _is_array(self, name: str) -> bool:
        return name in self._arrays

    def _params(self) -> list[torch.Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _divisors(self) -> list[tuple[Any, Any]]:
        """Each parameter with its `_divisor` under the present hyperparameters."""
        self._spec.check_divides(type(self).__name__)
        found: list[tuple[Any, Any]] = []
        for group in self.param_groups:
            native = self._spec.native(self._checked(group))
            for param in group["params"]:
                entry = self.state.get(param, {})
                state = {
                    name: self._wide(param, name, entry).double().cpu().numpy()
                    for name in self._spec.states
                    if name in entry
                }
                t = int(entry.get("step", 0))
                found.append((param, self._spec.divisor(native, t, state)))
        return found

    def share_memory(self) -> None:
        """Moves the states to shared memory, as `torch.optim.Adagrad` can, for other processes."""
        for entry in self.state.values():
            for value in entry.values():
                if isinstance(value, torch.Tensor):
                    value.share_memory_()

    # -- gradients and checkpoints -----------------------------------------------------------------

    def _not_begun(self) -> list[int]:
        """The parameters whose states no update has filled: of skipped steps the GPU alone knew."""
        if not self._table.live or self._spec.counts_steps:
            return []
        return self._table.not_begun(self._params())

    def state_dict(self, state_dtype: str | None = None) -> dict[str, Any]:
        """The state and the groups, as torch's; on a GPU, waits for steps that may be skipped.

        Args:
            state_dtype: "float32" gives states and averages in bfloat16 or q8 as torch has them,
                float32, or float64 under float64 parameters, exactly; those in float32 and float64
                stay so. None gives them as they are, but for those in q8 of a DTensor, or for
                `torch.distributed.checkpoint`'s `get_state_dict`, which are bfloat16, exactly:
                what lies beside them has no placement (default None).
        """
        if state_dtype not in (None, "float32"):
            raise ValueError(f"state_dtype must be None or 'float32', got {state_dtype!r}")
        caller = sys._getframe(1).f_globals.get("__name__")
        to_reshard = caller == "torch.distributed.checkpoint.state_dict"
        if to_reshard:
            self._begin_flat()
        return self._turn.read(self._saved, state_dtype is not None, to_reshard)

    def _begin_flat(self) -> None:
        """Makes states for the checkpoint that is about to be read into them.

        By a step with lr 0 and zero gradients, as `get_state_dict` does itself, but not for
        parameters that have gradients, which those of `flatten_` always have.
        """
        params = self._params()
        fresh = not self.state and all(map(flat.is_flat, params))
        if not fresh or any(param.grad is None or param.grad.any() for param in params):
            return
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, lr in zip(self.param_groups, rates, strict=True):
                group["lr"] = torch.zeros_like(lr) if isinstance(lr, torch.Tensor) else 0.0
            self.step()
        finally:
            for group, lr in zip(self.param_groups, rates, strict=True):
                group["lr"] = lr

    def _saved(self, wide: bool, to_reshard: bool = False) -> dict[str, Any]:
        """`state_dict`, while nobody else has a turn."""
        if self._ahead == EMA:
            _lookahead.refuse_inside(self, "state_dict must come")
        result = super().state_dict()
        for i, late in self._late().items():
            if i in result["state"]:
                result["state"][i] = {**result["state"][i], **late}
        for i in self._not_begun():
            result["state"].pop(i, None)
        for i, param in enumerate(dict.fromkeys(self._params())):
            if i in result["state"]:
                entry = self._saved_entry(param, result["state"][i], wide, to_reshard)
                result["state"][i] = entry
        for group in result["param_groups"]:  # which may have been edited since they were made
            self._to_python(group)
        entries, missing, n = result["state"], self._spec.late, len(self._params())
        pending = [i for i in range(n) if entries.get(i, {}).get(missing, 0) is None]
        if pending:  # as in a neutral optimizer's
            result["pending"] = pending
        for i in pending:
            del entries[i][missing]
        return result

    def _saved_entry(
        self, param: torch.Tensor, entry: Mapping[str, Any], wide: bool, to_reshard: bool
    ) -> dict[str, Any]:
        """A parameter's state as a checkpoint has it, all wide or as it is."""
        result = dict(entry)
        for name, kept in self._form(param).streams.items():
            if kept.format in ("float32", "float64") or entry.get(name) is None:
                continue
            if name == EMA and not self._averages():
                continue  # the user's own
            coded = bool(kept.beside)
            if wide or (coded and (to_reshard or is_dtensor(param))):
                values = self._wide(param, name, entry)
                result[name] = values if wide else values.to(torch.bfloat16)
                result.pop(kept.beside, None)
        late = self._spec.late  # which torch has always
        narrow = late and self._form(param).states[late].format not in ("float32", "float64")
        if late and "step" in entry and late not in entry and (wide or not narrow):
            result[late] = new_state(param, dtype_for(_computed(param), param))
        return result

    def _wide(self, param: torch.Tensor, name: str, entry: Mapping[str, Any]) -> torch.Tensor:
        """A state or an average of a parameter as the step computes with it."""
        dtype = dtype_for(_computed(param), param)
        stored = self._stored(param, name, entry)
        if stored.beside is None:
            return stored.array.detach().to(dtype)
        result = new_state(param, dtype, True)
        convert(stored, Stored(result, _computed(param)), self._first(param))
        return result

    def masters(self) -> dict[str | int, torch.Tensor]:
        """Copies of the parameters at the precision that they are trained in, by name or number.

        float32, or float64 under float64: with `rounding="split"` or `"kahan"` more than the
        bfloat16 parameters show, otherwise what they are.
        """
        return self._turn.read(self._masters)

    def _masters(self) -> dict[str | int, torch.Tensor]:
        """`masters`, while nobody else has a turn."""
        _lookahead.refuse_inside(self, "masters must come")
        found: dict[str | int, torch.Tensor] = {}
        names = self._distinct_names()
        for i, param in enumerate(self._params()):
            kept = self._form(param).param
            beside = self.state.get(param, {}).get(kept.beside) if kept.beside else None
            result = new_state(param, dtype_for(_computed(param), param), True)
            with torch.no_grad():
                if beside is None:
                    result.copy_(param)
                else:
                    convert(Stored(param, kept.format, beside), Stored(result, "float32"))
            found[names[i] if names else i] = result
        return found

    @contextlib.contextmanager
    def ema(self) -> Iterator[None]:
        """The parameters' moving average in their place: `with opt.ema(): evaluate(model)`.

        Parameters and averages change places in the memory that they have, and back afterwards,
        also after an exception: the parameters are then what they were, to the bit. Inside they are
        for reading, and in 16 bits they are the average rounded to nearest, bfloat16 of a float32
        average with ties away from zero. A copy of the parameters is kept meanwhile only where they
        and their average are in formats of which neither holds the other. Of a model in shards each
        rank swaps its own.

        Raises:
            ValueError: no step had `ema=` so far.
            RuntimeError: a step, a load, a copy or a reading of the state inside.

        Example:
            >>> import torch
            >>> from fusedstep.torch import SGD
            >>> w = torch.nn.Parameter(torch.ones(1))
            >>> opt = SGD([w], lr=1.0, ema=0.5)
            >>> for _ in range(2):
            ...     w.grad = torch.ones(1)
            ...     opt.step()
            >>> with opt.ema():
            ...     print(w.item())
            -0.5
            >>> w.item()
            -1.0
        """
        self._settle(None)
        pairs = [
            (param, entry[EMA]) for param in self._params()
            if isinstance((entry := self.state.get(param, {})).get(EMA), torch.Tensor)
        ]  # fmt: skip
        if not pairs or not self._averages():
            raise ValueError("ema must follow a step with ema=, got no average so far")
        swap = Swap(pairs)
        try:
            self._turn.run(swap)
            self._ahead = EMA
            yield
        finally:
            if swap.swapped:
                self._turn.run(swap)
                self._ahead = False

    def _late(self) -> dict[int, dict[str, Any]]:
        """States that the next step would make for an edited hyperparameter, by parameter number.

        Else a checkpoint could not be told from one of which a state was lost.
        """
        numbers: list[int] = []
        wanted = []
        own, first = (*self._spec.scalars, *self._spec.states), 0
        for group in self.param_groups:
            with contextlib.suppress(TypeError, ValueError):  # the next step will say it
                uses = self._uses(group)
                for i, param in enumerate(group["params"], first):
                    entry = self.state.get(param, {})
                    names = [*uses, *self._beside(param, uses)]
                    missing = [name for name in names if entry.get(name) is None]
                    if missing and any(entry.get(name) is not None for name in own):
                        numbers.append(i)
                        wanted.append((param, group, missing))
            first += len(group["params"])
        made = _Helper(self, self._table.live, [])._begin(wanted) if wanted else []
        late = self._spec.late  # which begins as what the next step finds
        return {
            i: {name: None if name == late else value for name, value in fresh.items()}
            for i, fresh in zip(numbers, made, strict=True)
        }

    def _uses(self, group: Mapping[str, Any]) -> list[str]:
        """The states that a step under a group's hyperparameters has."""
        return self._spec.uses(self._spec.native(self._checked({**group, "lr": 0.0})))

    def _own_names(self) -> list[str]:
        """The keys of the rule in a parameter's state."""
        return [*self._scalars(), *self._spec.states]

    def __getstate__(self) -> dict[str, Any]:
        _lookahead.refuse_inside(self, "copies must be made")
        return self._turn.read(self._copied)

    def _copied(self) -> dict[str, Any]:
        """`__getstate__`, while nobody else has a turn."""
        result = super().__getstate__()
        result |= {"_how": self._storage.how, "_each": self._each}
        if missing := self._not_begun():
            params = self._params()
            result["state"] = copy.copy(result["state"])
            for i in missing:
                result["state"].pop(params[i], None)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients, or zeroes them; those that `flatten_` placed are always zeroed."""
        params = self._params()
        if flat.restore(params) < len(params):
            super().zero_grad(set_to_none)
            flat.restore(params)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over the state and groups of `state_dict`, ours or `torch.optim`'s.

        The values are copied, to float32 under parameters of fewer bits, and so is what you keep in
        `state` yourself. Hyperparameters that the dict lacks stay as they are, and so do
        `capturable` and `differentiable`. Groups that have the optimizer's own `param_names` in
        another order go by them; else, as in torch, groups and parameters go by position.

        Raises:
            TypeError, ValueError: an entry is missing or does not fit; nothing has changed then.
        """
        _lookahead.refuse_inside(self, "load_state_dict must come")
        _checkpoint.check_mapping("state_dict", state_dict)
        given = state_dict if isinstance(state_dict, dict) else dict(state_dict)
        # After the caller's own hooks, and before torch looks at anything. A load that is
        # interrupted may leave it behind, and the next one puts it in its place.
        hooks = self._optimizer_load_state_dict_pre_hooks
        hooks.pop(_OURS, None)
        hooks[_OURS] = Optimizer._staged
        try:
            self._turn.run(super().load_state_dict, given)
        finally:
            hooks.pop(_OURS, None)

    @torch.no_grad()
    def _staged(self, state_dict: Any) -> dict[str, Any]:
        """A checkpoint by position, all of it checked and copied, states hidden from torch."""
        entries, saved = _checkpoint.parts(state_dict)
        own = [group["params"] for group in self.param_groups]
        names = [group.get("param_names", ()) for group in self.param_groups]
        named = list(map(len, names)) == list(map(len, own))
        order, saved = _checkpoint.arranged(saved, names if named else None, strict=False)
        param_of = _checkpoint.places(saved, own)
        averages = state_dict.get(_AVERAGES)  # a neutral optimizer's
        number: dict[int, int] = {}
        for i, param in enumerate(self._params()):
            number.setdefault(id(param), i)
        # A neutral optimizer's checkpoint has no keys but its own.
        beyond = sorted(self._extra.keys() - _FLAGS.keys()) if "step" in state_dict else []
        groups, required, own_names = [], {}, self._own_names()
        unused: set[torch.Tensor] = set()  # of which a late state begins later
        for k, (loaded, params) in enumerate(zip(saved, own, strict=True)):
            if beyond:
                said = _checkpoint.whole(loaded, self._quiet)
                known = self._known(self.param_groups[k])
                loaded |= {n: said[n] for n in self._quiet if n in said and said[n] != known[n]}
            where = f"{_checkpoint.GROUPS}[{order[k]}]"
            group = {
                name: [number[id(param)] for param in params]
                if name == "params"
                else _checkpoint.copied(f"{where}[{name!r}]", value)
                for name, value in loaded.items()
            }
            if beyond:
                group[_checkpoint.BEYOND] = beyond
            if averages is not None:
                group[_AVERAGES] = _checkpoint.count("state_dict['averages']", averages)
            elif _AVERAGES in group:
                label = f"{where}['{_AVERAGES}']"
                group[_AVERAGES] = _checkpoint.count(label, group[_AVERAGES])
            groups.append(group)
            try:
                completed = self._completed(dict(group), self.param_groups[k], True)
                native = self._spec.native(self._checked({**completed, "lr": 0.0}))
                self._storage.check_exact(native, map(dtype_name, params))
                used = self._spec.uses(native)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from None
            needed = self._spec.required(used)
            required.update({id(param): needed for param in params})
            if self._spec.late and self._spec.late not in used:
                unused.update(params)
        # Without averages so far, that key is the user's own.
        taken_over = [*own_names, *([EMA] if any(g.get(_AVERAGES) for g in groups) else [])]
        recordable = self._recordable()
        pending = state_dict.get("pending", ())
        state: dict[Any, Any] = {}
        for key, entry in entries.items():
            where = f"state_dict['state'][{key!r}]"
            if key in param_of:
                param = param_of[key]
                counts = param.device if param in recordable else _CPU
                taken = self._taken(where, entry, param, counts, taken_over)
                self._check_complete(where, taken, own_names, required[id(param)], key in pending)
                if param in unused:
                    taken.pop(self._spec.late, None)
                state[number[id(param)]] = _Hidden(taken)
            elif isinstance(entry, Mapping) and set(own_names) & set(entry):
                raise ValueError(f"state_dict['state'] must have known parameters, got {key!r}")
            else:
                state[key] = _users_own(where, entry, None)
        return {**state_dict, "state": state, "param_groups": groups}

    def _completed(
        self, group: dict[str, Any], known: Mapping[str, Any], loaded: bool
    ) -> dict[str, Any]:
        """`group` with what it lacks from `known`, checked."""
        group.update(self._spec.fixed)  # AdamW takes Adam's checkpoint, and stays AdamW
        for name, default in self._given.items():
            group.setdefault(name, known.get(name, default))
        for name in (*self._extra, _checkpoint.BEYOND):
            if name in known:
                group.setdefault(name, known[name])
        for flag in _KEPT if loaded else ():
            if flag in group:
                group[flag] = known.get(flag, _FLAGS[flag])
        self._checked(group)
        self._to_python(group)
        return group

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", [])
        loaded = "defaults" not in state  # by load_state_dict, not from a copy or a pickle
        for k, group in enumerate(state["param_groups"]):
            self._completed(group, before[k] if k < len(before) else {}, loaded)
        entries = state["state"]
        if loaded:
            shown, entries = entries, defaultdict(dict)
            for key, entry in shown.items():
                entries[key] = entry.entry if isinstance(entry, _Hidden) else entry
        else:
            state = {"_each": _Asked(), **state}
            state |= {"_turn": new_turn(), "_stepping_in_backward": set()}
            self._store(state.pop("_how", {}))
        state = {name: value for name, value in state.items() if name != "state"}
        # One update of the attributes, before which nothing has changed, and after which all has.
        super().__setstate__({**state, **self._derived(entries)})

    def _recordable(self) -> set[Any]:
        """The parameters of groups with `capturable`, whose counts are on the device."""
        groups = self.__dict__.get("param_groups", [])
        return {p for group in groups if group.get("capturable") for p in group["params"]}

    def _taken(
        self, where: str, entry: Any, param: torch.Tensor, counts: torch.device, own: list[str]
    ) -> dict[str, Any]:
        """A parameter's saved state as the step wants it, checked and copied."""
        _checkpoint.check_mapping(where, entry)
        taken: dict[str, Any] = {}
        form = self._form(param)
        # What lies beside something is taken with it, or is of another form.
        beside = {
            *_storage.PARAM_BESIDE,
            *(_storage.in_q8(self._spec, name).beside for name in form.states),
        }
        # Of a neutral optimizer's checkpoint, or of fusedstep.convert's.
        known = {*own, *beside, *form.beside} - {*self._scalars()}
        arrays = {n: entry[n].copy() for n in known if isinstance(entry.get(n), np.ndarray)}
        if arrays:
            entry = {**entry, **_arrays.as_tensors(arrays)}
        for name, value in entry.items():
            label = f"{where}[{name!r}]"
            if isinstance(value, torch.Tensor):
                check_readable(label, value)
            if name in form.beside and form.beside[name] is form.param:
                taken[name] = self._taken_like(label, value, param, name)
            elif name in beside:
                if name in _storage.PARAM_BESIDE and form.param.beside and value is not None:
                    taken[form.param.beside] = self._taken_beside(label, name, value, param)
            elif name not in own:
                taken[name] = _users_own(label, value, None if param.is_meta else param.device)
            elif value is None:  # torch before the first step with momentum
                taken[name] = None
            elif self._is_array(name):
                taken |= self._taken_array(label, name, entry, param)
            else:
                one = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_sparse
                number = value.detach() if one else value
                if one and number.ndim:
                    number = number.reshape(())
                if name == "step":
                    _checkpoint.count(label, number)
                else:
                    _checkpoint.carried(label, name, number)
                taken[name] = _scalar(name, number, 0.0, counts)
        return taken

    def _taken_like(self, label: str, value: Any, param: torch.Tensor, name: str) -> torch.Tensor:
        """A copy of a saved array of one dtype and the parameter's shape."""
        _check_like(label, value, param)
        dtype = self._array_dtype(param, name)
        if value.dtype != dtype:
            wanted, found = (str(one).removeprefix("torch.") for one in (dtype, value.dtype))
            raise TypeError(f"{label} must be {wanted}, got {found}")
        return value if param.is_meta else _copied_like(label, self._new(param, name), value)

    def _taken_beside(self, label: str, name: str, value: Any, param: torch.Tensor) -> torch.Tensor:
        """What lies beside a parameter so that the master is that of another rounding."""
        _check_like(label, value, param)
        rounding, dtype = _storage.PARAM_BESIDE[name]
        if str(value.dtype) != f"torch.{dtype}":
            raise TypeError(f"{label} must be {dtype}, got {_float_name(value)}")
        key = self._form(param).param.beside
        new = self._new(param, key)
        if not param.is_meta and local(param).numel():
            here = (local(t).detach().cpu().contiguous() for t in (param, value))
            there = _storage.beside_param(Stored(next(here), rounding, next(here)), key)
            local(new).copy_(_arrays.as_tensors({key: there})[key])
        return new

    def _taken_array(
        self, label: str, name: str, entry: Mapping[str, Any], param: torch.Tensor
    ) -> dict[str, Any]:
        """A copy of a saved state or average, in whatever form it is, as a step has it."""
        value, kept = entry[name], self._form(param).streams[name]
        _check_like(label, value, param)
        coded = value.dtype == torch.uint8 and not param.is_complex()
        real = value.is_floating_point() and not param.is_complex()
        if not coded and not real and not (value.is_complex() and param.is_complex()):
            kind = "complex" if param.is_complex() else "floating point, or uint8 with exponents"
            raise TypeError(f"{label} must be {kind}, got {value.dtype}")
        if param.is_meta:
            return {key: entry[key] for key in (name, kept.beside) if key in entry}
        first = self._first(param)
        new = {key: self._new(param, key) for key in (name, kept.beside) if key}
        target = Stored(new[name], kept.format, new.get(kept.beside))
        if not coded and not kept.beside:
            _copied_like(label, new[name], value)
            return new
        source = Stored(value, _float_name(value))
        if coded:
            q8 = _storage.in_q8(self._spec, name)
            exponents = entry.get(q8.beside)
            shape = q8.beside_shape(local(param).shape, first)
            known = isinstance(exponents, torch.Tensor) and exponents.dtype == torch.uint8
            if exponents is None or not known or exponents.shape != shape:
                found = type(exponents).__name__
                if exponents is not None and known:
                    found = str(tuple(exponents.shape))
                raise ValueError(
                    f"{label[:-2]}_exponents'] must be uint8 of shape {shape}, got {found}"
                )
            source = Stored(value, q8.format, exponents)
        if source.format == target.format:  # bit by bit: a number has several codes
            local(new[name]).copy_(local(value))
            new[kept.beside].copy_(source.beside)
        else:
            convert(source, target, first)
        return new

    def _check_complete(
        self,
        where: str,
        entry: Mapping[str, Any],
        own: list[str],
        required: list[str],
        pending: bool,
    ) -> None:
        """Raises ValueError for a state that has begun, by this rule or another, and lacks some.

        `pending`: its late state begins with the next step.
        """
        late = self._spec.late
        lacking = [
            name for name in required if entry.get(name) is None and not (name == late and pending)
        ]
        if required and not lacking:
            return
        begun = {name for name, value in entry.items() if value is not None}
        begun &= STATES.union(own)
        begun -= {*self._scalars()} - {*self._spec.scalars}  # a count for random bits alone
        if begun and lacking:
            found = _checkpoint.given(entry)
            raise ValueError(f"{where} must have the key {lacking[0]!r}, got {found}")
        if begun and not begun.intersection(own):
            raise ValueError(f"{where} must have the keys {own}, got {list(entry)}")


class LookAhead(Optimizer):
    """SGD, which can look ahead."""

    @contextlib.contextmanager
    def lookahead(self) -> Iterator[None]:
        """Nesterov's method in its original form: `with opt.lookahead(): loss(model).backward()`.

        Inside, the parameters stand at p - lr * momentum * b; afterwards they are what they were,
        to the bit. The step that follows takes the gradient found there, and weight_decay at p.
        Forward and backward both belong inside. See `fusedstep.SGD.lookahead`.

        Raises:
            ValueError: there is no momentum, or `nesterov` is on, which is the other form.
            RuntimeError: a step, or another look-ahead, inside; a CUDA graph is being recorded,
                whose replays would keep to this moment's lr and momentum.
        """
        rows = self._current()
        if self._gpu is not None and recording(self._device):
            raise RuntimeError("lookahead must not be recorded in a CUDA graph")
        numbers = [self._spec.numbers(native) for _, native, _, _ in rows]
        for group, (*_, lr) in zip(numbers, rows, strict=True):
            if lr is not None:
                group["lr"] = float(lr)
        _lookahead.check(numbers)
        names = iter(self._distinct_names() or map(str, range(len(self._params()))))
        moving = {}
        for (params, *_), group in zip(rows, numbers, strict=True):
            for param, name in zip(params, names, strict=False):
                entry = self.state.get(param, {})
                buffer = entry.get("momentum_buffer")
                if buffer is None:
                    continue
                if self._form(param).states["momentum_buffer"].beside:
                    buffer = self._wide(param, "momentum_buffer", entry)
                moving[name] = param, buffer, group
        saved = [param.detach().clone() for param, *_ in moving.values()]
        try:
            stream = 0 if self._gpu is None else stream_of(self._device)
            _look_ahead(moving, self._gpu, self._device.index or 0, stream)
            self._ahead = True
            yield
        finally:
            self._ahead = False
            with torch.no_grad():
                for (param, *_), values in zip(moving.values(), saved, strict=True):
                    param.copy_(values)


@torch.no_grad()
def _look_ahead(
    moving: dict[str, tuple[torch.Tensor, torch.Tensor, dict[str, float]]],
    device: Any,
    index: int,
    stream: int,
) -> None:
    """Takes each (param, buffer, group) to its look-ahead point, where it lies if contiguous."""
    plain, reals = {}, {}
    for name, (param, buffer, group) in moving.items():
        if buffer.shape != param.shape:
            raise ValueError(
                f"state[{name}]['momentum_buffer'] must have shape {tuple(param.shape)}, got"
                f" {tuple(buffer.shape)}"
            )
        both = (local(t).detach().resolve_conj().resolve_neg() for t in (param, buffer))
        plain[name], along = (t.contiguous() for t in both)
        reals[name] = _as_reals(plain[name]), _as_reals(along), group
    _lookahead.look_ahead(reals, device, index, stream)
    for name, (param, *_) in moving.items():
        own, moved = local(param).detach(), plain[name]
        if own.is_conj() or own.is_neg() or own.data_ptr() != moved.data_ptr():
            own.copy_(moved)
    announcer()(
        [param for param, *_ in moving.values()]
    )  # a shard's own writes are not its DTensor's


def _as_reals(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class _Helper:
    """What the compiled table asks for during one step (tensor_table.h), and what it takes."""

    def __init__(
        self,
        optimizer: Optimizer,
        live: bool,
        rows: list[_Row],
        first: int = 0,
        at: int = 0,
        asked: _Asked = _Asked(),  # noqa: B008  # it is a tuple
    ) -> None:
        self._optimizer = optimizer
        self._asked = asked
        self._rows, self._first, self._at = rows, first, at  # see Optimizer._update
        self._counts = optimizer._device if live else _CPU  # where they are
        self._apart = False
        self._places: list[tuple[torch.Tensor, dict[str, Any], int]] = []
        self._attributes = optimizer.__dict__
        self._announce = announcer()

    def _again(self) -> None:
        self._apart = False
        self._places.clear()

    def _moved(self) -> bool:
        """Whether somebody's Python code may have run: a warning has its own."""
        return flat.warn_of_broken([param for params, *_ in self._rows for param in params])

    # Of the step alone, which may be one parameter's: no step looks at what it does not update.

    def _found(self) -> list[tuple[torch.Tensor, dict[str, Any], int]]:
        """Each parameter with its group and its place there."""
        if not self._places:
            for params, _, group, _ in self._rows:
                self._places += [(param, group, self._at + j) for j, param in enumerate(params)]
        return self._places

    def _param(self, i: int) -> torch.Tensor:
        return self._found()[i - self._first][0]

    def _name(self, i: int) -> str:
        _, group, at = self._found()[i - self._first]
        return _names_in(group, i, 1, at)[0]

    def _plain(self, i: int, kind: str, tensor: torch.Tensor) -> tuple[Any, Any, bool]:
        label, param = self._label(i, kind), self._param(i)
        device = self._optimizer._device
        is_state = kind not in ("params", "grads", "shadow")
        if is_state and not self._optimizer._is_array(kind):
            if tensor.numel() == 1 and not tensor.is_complex():
                check_memory(label, tensor)
                count = _scalar(kind, tensor, 0.0, self._counts)
                if (count.dtype, count.device) != (tensor.dtype, tensor.device):
                    self._check_not_recording()
                    return count, None, True
            device = self._counts
        plain, copied = as_plain(tensor, label, param, device, is_state)
        written = local(tensor).detach() if copied and kind != "grads" else None
        return plain, written, False

    def _match(
        self, i: int, tensors: list[torch.Tensor], writes: list[bool], ordered: bool
    ) -> tuple[list[torch.Tensor], list[Any]]:
        if not self._apart:  # the table sees the copies, not the memory that they stand in for
            with torch._C.DisableTorchFunctionSubclass():  # no code of theirs, which may move some
                check_apart(self._written())
            self._apart = True
        result = as_dense(tensors, ordered)
        back = [
            (tensor.detach(), dense)
            for tensor, dense, written in zip(tensors, result, writes, strict=True)
            if written and dense is not tensor
        ]
        return result, back

    def _first_of(self, i: int) -> int:
        return first_place(lambda: self._label(i, "params"), self._param(i))

    def _check_stored(self, i: int) -> None:
        self._optimizer._check_stored(self._label(i, "params"), self._param(i))

    def _written(self) -> dict[str, torch.Tensor]:
        """The tensors that the step may write to, by their names in errors."""
        found, entries = {}, self._optimizer.state
        for i, (param, *_) in enumerate(self._found(), self._first):
            shadow = self._asked.shadow[i] if self._asked.shadow else None
            if shadow is not None:
                found[self._label(i, "shadow")] = shadow
            if param.grad is None and self._asked.ema is None:
                continue
            found[self._label(i, "params")] = param
            if param.grad is not None and self._asked.zero_grad:
                found[self._label(i, "grads")] = param.grad
            for name, value in entries.get(param, {}).items():
                if self._optimizer._is_array(name) and isinstance(value, torch.Tensor):
                    found[self._label(i, name)] = value
        return {label: local(tensor) for label, tensor in found.items()}

    def _label(self, i: int, kind: str) -> str:
        name = self._name(i)
        is_state = kind not in ("params", "grads", "shadow")
        return f"state[{name}]['{kind}']" if is_state else f"{kind}[{name}]"

    def _check_not_recording(self) -> None:
        """Raises where what is made now would be made again by each replay of a graph."""
        opt = self._optimizer
        if opt._gpu is not None and recording(opt._device):
            raise RuntimeError(
                "a step that makes states or moves counts must come before the recording of a CUDA"
                " graph: take one step first"
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _begin(
        self, wanted: list[tuple[torch.Tensor, dict[str, Any], list[str]]]
    ) -> list[dict[str, torch.Tensor]]:
        opt = self._optimizer
        self._check_not_recording()
        packed = flat.packed_states(wanted, self._packed_dtype)
        made: list[dict[str, torch.Tensor]] = []
        entries = opt.state
        for param, group, names in wanted:
            entry = entries.get(param, {})
            fresh: dict[str, torch.Tensor] = {}
            made.append(fresh)
            hypers = {**opt._known(group), "lr": float(_plain(group["lr"], "lr"))}
            for name, kept in opt._form(param).states.items():
                if kept.beside in names and entry.get(name) is not None:
                    opt._stored(param, name, entry)  # refuses codes that lost their exponents
            for name in names:
                given = entry.get(name)
                initial = opt._spec.first(name, hypers)
                if given is not None and (opt._is_array(name) or not _is_number(given)):
                    at = next(k for k, (other, *_) in enumerate(self._found()) if other is param)
                    label = self._label(self._first + at, name)
                    raise TypeError(f"{label} must be a tensor, got {given!r}")
                if not opt._is_array(name):
                    fresh[name] = _scalar(name, given, initial, self._counts)
                    continue
                state = packed.get((param, name))
                fresh[name] = opt._new(param, name) if state is None else state
            for name in opt._spec.states:
                initial = opt._spec.first(name, hypers)
                if initial and name in fresh:
                    _fill(opt._stored(param, name, {**entry, **fresh}), initial)
            if opt._gpu is not None and EMA in fresh:  # which alone may know that it skips a step
                fresh[EMA].copy_(param)
        return made

    def _packed_dtype(self, param: torch.Tensor, name: str) -> torch.dtype | None:
        """The dtype of a state that is laid out as its parameter; None for any other."""
        opt = self._optimizer
        if not opt._is_array(name) or (opt._ordered(param) and not param.is_contiguous()):
            return None
        beside = opt._form(param).beside.get(name)
        return None if beside is not None and beside.by_block else opt._array_dtype(param, name)


def _names_in(group: Mapping[str, Any], first: int, n: int, at: int = 0) -> list[str]:
    """Names of n parameters of a group from place `at` on, in errors: the user's, or numbers."""
    given = group.get("param_names", ())[at : at + n]
    return [*map(str, given), *map(str, range(first + len(given), first + n))]


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


class _Hidden:
    """A parameter's state that torch's `load_state_dict` hands on as it is."""

    __slots__ = ("entry",)

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry


def _users_own(label: str, value: Any, device: torch.device | None) -> Any:
    """A copy of what users keep in a state themselves; a tensor goes to `device`, as in torch."""
    if not isinstance(value, torch.Tensor):
        return _checkpoint.copied(label, value)
    return value.detach().clone().to(device or value.device)


def _computed(param: torch.Tensor) -> str:
    """The dtype in which a step computes, of reals."""
    return "float64" if dtype_name(param) == "float64" else "float32"


def _float_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_like(label: str, value: Any, param: torch.Tensor) -> None:
    """Raises TypeError or ValueError for what is no tensor of the parameter's shape and kind."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{label} must be a tensor, got {type(value).__name__}")
    if value.shape != param.shape:
        raise ValueError(f"{label} must have shape {tuple(param.shape)}, got {tuple(value.shape)}")
    if is_dtensor(value) != is_dtensor(param):
        raise TypeError(f"{label} must be {type(param).__name__}, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{label} must be dense, got layout {value.layout}")
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{label} must have memory, got a tensor on {value.device}")


def _copied_like(label: str, target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    try:
        return target.copy_(value)
    except RuntimeError as error:  # of tensors of other libraries' own kinds
        raise ValueError(f"{label} must be something to copy: {error}") from error


def _fill(stored: Stored, number: float) -> None:
    """Makes all of a state one number, both reals of a complex one."""
    if stored.beside is None:
        complex_ = stored.array.is_complex()
        stored.array.fill_(complex(number, number) if complex_ else number)
        return
    values = torch.full(local(stored.array).shape, number, device="cpu")
    convert(Stored(values, "float32"), stored)


def _scalar(name: str, value: Any, default: float, device: torch.device) -> torch.Tensor:
    """A count as a 0-d tensor, no narrower than a step uses it.

    `step` as torch keeps it, which in float32 is exact to 2^24; what a rule carries, in float64.
    """
    given = value.dtype if isinstance(value, torch.Tensor) else None
    double = name != "step" or torch.float64 in (given, torch.get_default_dtype())
    if given is not None and value.device.type != "cpu":
        dtype = torch.float64 if double else torch.float32
        return value.detach().reshape(()).to(device=device, dtype=dtype, copy=True)
    number = default if value is None else float(value)
    dtype = torch.float64 if double or number >= 2**24 else torch.float32
    return torch.full((), number, dtype=dtype, device=device)


def _plain(value: Any, name: str) -> Any:
    """A hyperparameter without what torch takes too: tensors of one element, 0 and 1 for flags."""
    if isinstance(value, torch.Tensor):
        return value.detach().reshape(()) if value.numel() == 1 else value
    if isinstance(value, tuple | list):
        return tuple(_plain(half, name) for half in value)
    return bool(value) if type(value) is int and HYPERS[name].is_flag else value


_FIXED = (float, int, bool, types.NoneType)


def _is_fixed(value: Any) -> bool:
    """Whether a hyperparameter can change only by being replaced."""
    if type(value) is tuple:
        return all(map(_is_fixed, value))
    return type(value) in _FIXED or isinstance(value, np.generic)


def _as_python(value: Any) -> Any:
    """A number of any kind as Python's, several as a tuple of such; tensors and all else as is."""
    if type(value) in _FIXED or isinstance(value, torch.Tensor | str):
        return value
    if isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0:
        return tuple(map(_as_python, value))
    if isinstance(value, np.bool_):
        return bool(value)
    number = as_float(value)
    return value if number is None else number


def _copied(value: Any) -> Any:
    """A hyperparameter's present value, to be compared with a later one."""
    if _is_fixed(value):
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_copied(half) for half in value]
    plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "cpu"
    if plain or type(value) is np.ndarray:
        return value.tolist()
    return object()  # unlike all others: read again


class How(TypedDict, total=False):
    """What every class takes by keyword: how it stores, and what each step does."""

    rounding: Rounding
    state_dtype: StateDtype | dict[str, StateDtype | None] | None
    state_rounding: StateRounding
    seed: int
    ema_dtype: EmaDtype | None
    clip_value: float | None
    ema: float | Callable[[int], float] | None
    shadow: Any
    zero_grad: bool


_TYPES = get_type_hints(How)


def _type_of(spec: Spec, name: str) -> Any:
    """The annotation of an argument that torch's class has not, of the kind that torch gives."""
    if name == "params":
        return torch_optimizer.ParamsT
    if name in _FLAGS:
        return bool if name in _HOW else bool | None
    if name in _TYPES:
        return _TYPES[name]
    if name == "lr":
        return float | torch.Tensor
    if name in spec.parts:
        return types.GenericAlias(tuple, (float,) * len(spec.parts[name]))
    return bool if HYPERS[name].is_flag else float


class _InGroups:
    """Refuses `opt.lr = 0.5`, which would do nothing. A subclass may have such an attribute."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, optimizer: Any, cls: type) -> Any:
        if optimizer is None or self._name not in optimizer.__dict__:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {self._name!r}")
        return optimizer.__dict__[self._name]

    def __set__(self, optimizer: Any, value: Any) -> None:
        if type(optimizer) is self._owner:
            raise AttributeError(
                f'{self._name} must be set as opt.param_groups[0]["{self._name}"], got {value!r}'
            )
        optimizer.__dict__[self._name] = value


C = TypeVar("C", bound=Optimizer)


def drop_in(one: type[neutral.Optimizer]) -> Callable[[type[C]], type[C]]:
    """Makes a class torch's of a neutral one, with torch's signature where torch has such a class.

    What it decorates has the base, and for type checkers the signature.
    """

    def made(cls: type[C]) -> type[C]:
        return _made(one, cls)

    return made


def _made(one: type[neutral.Optimizer], cls: type[C]) -> type[C]:
    name, spec = one.__name__, one._spec
    own = dict(inspect.signature(one).parameters)
    for beside in ("groups", *HOW):
        own.pop(beside, None)  # a class that names none of HOW offers none
    peer = getattr(torch.optim, name, None)
    theirs = {} if peer is None else dict(inspect.signature(peer, eval_str=True).parameters)
    parameters = dict(theirs or own)
    keyword = inspect.Parameter.KEYWORD_ONLY
    flags = {n: inspect.Parameter(n, keyword, default=value) for n, value in _FLAGS.items()}
    extra = {n: p for n, p in {**own, **flags}.items() if n not in parameters}
    parameters |= {n: p.replace(kind=keyword) for n, p in extra.items()}
    added = {n: default for n, (default, _) in (*HOW.items(), *_EACH.items())}
    parameters |= {n: inspect.Parameter(n, keyword, default=d) for n, d in added.items()}
    # With types, by which configurations are parsed; torch 2.4.0 lacks some.
    typed = {n for n, p in theirs.items() if p.annotation is not p.empty}
    signature = inspect.Signature(
        [
            p if n in typed else p.replace(annotation=_type_of(spec, n))
            for n, p in parameters.items()
        ]
    )

    def __init__(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None
        Optimizer.__init__(self, **bound.arguments)

    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY),
            *signature.parameters.values(),
        ]
    )
    __init__.__annotations__ = {n: p.annotation for n, p in signature.parameters.items()}
    __init__.__annotations__["return"] = None
    hypers = [n for n in signature.parameters if n in spec.table]
    return type(
        name,
        cls.__bases__,
        {
            **{n: value for n, value in vars(cls).items() if n == "__firstlineno__"},
            "__doc__": _doc(one, signature, peer is not None),
            "__init__": __init__,
            "__module__": "fusedstep.torch",
            "_spec": spec,
            "_given": {
                n: p.default
                for n, p in signature.parameters.items()
                if n != "params" and n not in extra and n not in added
            },
            "_extra": {n: p.default for n, p in extra.items()},
            "_quiet": {n: value for n, value in one._quiet.items() if n in extra},
            "_read": tuple(dict.fromkeys([*hypers, *spec.fixed, *_HOW])),
            **{name: _InGroups() for name in (*hypers, *spec.fixed)},
        },
    )


def _doc(one: type[neutral.Optimizer], signature: inspect.Signature, has_peer: bool) -> str:
    """The neutral class's docstring with torch's arguments, and an example."""
    name = one.__name__
    head, rest = (one.__doc__ or "").split("Use:", 1)
    use, _, rest = rest.partition("Args:")
    tail = rest[rest.index("State:") :]
    before, _, after = tail.partition("Example:")
    after = after[after.index("Reference:") :]
    args = "\n        ".join(
        [
            "Args:",
            "params: parameters, (name, parameter) pairs, or dicts with `params` and overrides.",
            *one._spec.argument_docs(signature, schedules=False),
            "foreach: accepted, without effect.",
            "fused: True lets `GradScaler` leave unscaling and skipping to the step, which then",
            "    leaves gradients scaled, as torch's fused classes do (default None).",
            "capturable: on a CUDA device, keeps step counts there, so that steps can be recorded",
            "    in a CUDA graph (default False).",
            "differentiable: must be False.",
            *_storage.how_docs(),
            *(f"{n}: {doc} (default {default!r})." for n, (default, doc) in _EACH.items()),
            "",
        ]
    )
    raises = "\n        ".join(
        [
            "Raises:",
            "TypeError: params is no iterable of tensors, or a hyperparameter not of its kind.",
            "ValueError: a hyperparameter is outside its range, a parameter is given to two groups",
            "    or is not a leaf or not on the device of the others, or there is none.",
        ]
    )
    same = f"`torch.optim.{name}`" if has_peer else "an optimizer of `torch.optim`"
    return f"""{head}A drop-in for {same}; see `Optimizer` for what it takes.

    Use:{use}{args}
    {raises}

    {before}Example:
        >>> import torch
        >>> from fusedstep.torch import {name}
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> opt = {name}([w], lr=0.125)
        >>> w.square().sum().backward()
        >>> opt.step()
        >>> bool((w < 1).all())
        True

    {after}"""
