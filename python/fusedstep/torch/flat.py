"""`flatten_`: parameters and gradients as views of flat buffers, and what becomes of the views."""

from __future__ import annotations

import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fusedstep._arrays import announcer
from fusedstep._layout import Layout
from fusedstep.torch.tensors import (
    DTYPES,
    allocate,
    check_apart,
    check_memory,
    dense_strides,
    is_dtensor,
    own_storage,
)


class _Memory:
    """Zeros for tensors like others, one after the other: memory that only this object sees whole.

    What it gives away is a storage of its own for each tensor (`own_storage`), as anything that
    saves, copies, sends or compares tensors does so by storage. Such a storage may be moved, as
    `share_memory_` does, and then lets go of what it was on; the views here stay where they are.
    """

    def __init__(self, like: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        layout = Layout({i: (tensor.numel(),) for i, tensor in enumerate(like)})
        self._whole = allocate(layout.n, dtype, like[0].device)
        self.views = [
            self._whole.as_strided(tensor.shape, dense_strides(tensor), at)
            for tensor, at in zip(like, layout.offsets, strict=True)
        ]
        self._flat = own_storage(self._whole)

    @property
    def flat(self) -> torch.Tensor:
        """The whole, 1-D: the same tensor each time, unless it has been moved."""
        if not _same_place(self._flat, self._whole):
            self._flat = own_storage(self._whole)
        return self._flat

    def apart(self) -> list[torch.Tensor]:
        """The views as tensors to give away."""
        return [own_storage(view) for view in self.views]


class _Part:
    """The parameters of one dtype, their memory, and what each was given of it."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.params = [weakref.ref(param) for param in params]
        self.places = {id(param): k for k, param in enumerate(params)}
        self.values = _Memory(params, params[0].dtype)
        self.grads = _Memory(params, params[0].dtype)
        self.given = self.grads.apart()  # what parameters get as their gradients
        self.addresses = [grad.data_ptr() for grad in self.grads.views]
        self.warned = False

    def place(self, param: torch.Tensor) -> int | None:
        """The parameter's place here, if it has one."""
        k = self.places.get(id(param))
        return k if k is not None and self.params[k]() is param else None

    def broken(self) -> str | None:
        """The first parameter or gradient that has left its view, in words, if any."""
        for k, ref in enumerate(self.params):
            if (param := ref()) is None or self.place(param) is None:
                continue
            shape = tuple(param.shape)
            if not _same_place(param, self.values.views[k]):
                return f"parameter {k}, of shape {shape}, has"
            if param.grad is not None and not _same_place(param.grad, self.grads.views[k]):
                return f"the gradient of parameter {k}, of shape {shape}, has"
        return None

    def restore(self, params: Iterable[torch.Tensor]) -> int:
        """Zeroes their gradients here, put back if need be; returns how many there are."""
        places = []
        for param in params:
            k = self.place(param)
            if k is None:
                continue
            given = self.given[k]
            if param.grad is not given or given.data_ptr() != self.addresses[k]:
                if not _same_place(param, self.values.views[k]):
                    continue
                self.given[k] = param.grad = own_storage(self.grads.views[k])
            if not param.requires_grad:
                param.grad = None
            places.append(k)
        if len(places) == len(self.places):
            self.grads.flat.zero_()
            announcer()(self.given)  # autograd counts the writes of each tensor apart
        else:
            for k in places:
                self.given[k].zero_()
        return len(places)


def _same_place(tensor: torch.Tensor, view: torch.Tensor) -> bool:
    return (
        tensor.device == view.device
        and tensor.dtype == view.dtype
        and tensor.shape == view.shape
        and tensor.stride() == view.stride()
        and tensor.data_ptr() == view.data_ptr()
    )


stepped_in_backward: Any = WeakTensorKeyDictionary()  # parameters, see backward.py
_parts: Any = WeakTensorKeyDictionary()  # the part of each parameter, which lives as long
_all: weakref.WeakSet[_Part] = weakref.WeakSet()


class Flat:
    """The flat buffers that `flatten_` made, one pair for each dtype.

    `flat` and `flat_grad` are the buffers where there is one dtype, `flats` and `flat_grads` all of
    them by dtype. The gaps between parameters are zero and stay so. Autograd does not see that what
    is written to a buffer is written to the tensors on it, nor the other way round.
    """

    def __init__(self, parts: dict[torch.dtype, _Part]) -> None:
        self._parts = parts

    @property
    def flats(self) -> dict[torch.dtype, torch.Tensor]:
        """The parameters' buffer of each dtype, 1-D."""
        return {dtype: part.values.flat for dtype, part in self._parts.items()}

    @property
    def flat_grads(self) -> dict[torch.dtype, torch.Tensor]:
        """The gradients' buffer of each dtype, 1-D, laid out as the parameters'."""
        return {dtype: part.grads.flat for dtype, part in self._parts.items()}

    def _only(self, buffers: dict[torch.dtype, torch.Tensor], name: str) -> torch.Tensor:
        if len(buffers) > 1:
            dtypes = ", ".join(map(str, buffers))
            raise ValueError(f"{name} needs parameters of one dtype, got {dtypes}: see {name}s")
        return next(iter(buffers.values()))

    @property
    def flat(self) -> torch.Tensor:
        """The one buffer of all parameters, 1-D."""
        return self._only(self.flats, "flat")

    @property
    def flat_grad(self) -> torch.Tensor:
        """The one buffer of all gradients, 1-D: one all-reduce reduces them all."""
        return self._only(self.flat_grads, "flat_grad")

    def __repr__(self) -> str:
        counts = [f"{len(p.params)} x {dtype}" for dtype, p in self._parts.items()]
        n = sum(v.numel() for part in self._parts.values() for v in part.values.views)
        return f"Flat({', '.join(counts)}, {n} elements)"


def flatten_(module_or_params: torch.nn.Module | Iterable[torch.Tensor]) -> Flat:
    """Makes parameters views of one flat buffer per dtype, and their gradients views of a second.

    The buffers are aligned, and on the CPU on huge pages, so that a step, a `zero_grad` or an all-
    reduce is one sweep over memory. The parameters stay the objects they are: `parameters()`,
    names, tied weights, `state_dict` and optimizers that hold them are as before. Autograd adds
    into the flat gradients, which exist from now on and are zero where backward has not been: a
    parameter without a part in the loss takes a step with a zero gradient instead of none.
    `zero_grad` of a fusedstep optimizer or of `module` zeroes the views and keeps them, whatever
    `set_to_none` says; of a parameter that was frozen meanwhile it drops the gradient.

    Each parameter, gradient and state has a storage of its own on that memory, which torch refuses
    to resize: what saves, copies or compares tensors by storage (`torch.save`, `copy.deepcopy`,
    safetensors, accelerate, `torch.distributed.checkpoint`) does as it would without `flatten_`.

    If something later moves a parameter or a gradient out of its view (`.to`, `p.data = ...`,
    `share_memory` and what sends a model to another process, another object's `zero_grad`,
    DistributedDataParallel with `gradient_as_bucket_view`), steps stay correct and `step` warns
    once. `flat_grad` is then not all that is to be reduced.

    Args:
        module_or_params: a module, whose parameters that require a gradient are taken, or an
            iterable of parameters. On the CPU or one CUDA device, of a dtype that an optimizer
            takes.

    Returns:
        The buffers: `.flat` and `.flat_grad`, or by dtype `.flats` and `.flat_grads`.

    Raises:
        TypeError, ValueError: something is not a parameter in memory of its own on the device of
            the others, is given twice, or there is none; a storage was resized to less than its
            parameter or gradient spans. Nothing has changed then.

    Example:
        >>> import torch
        >>> from fusedstep.torch import AdamW, flatten_
        >>> model = torch.nn.Linear(3, 2)
        >>> buffers = flatten_(model)
        >>> opt = AdamW(model.parameters())
        >>> model(torch.ones(3)).sum().backward()
        >>> buffers.flat_grad[:6]
        tensor([1., 1., 1., 1., 1., 1.])
        >>> opt.step()
        >>> opt.zero_grad()
        >>> model.weight.grad.data_ptr() == buffers.flat_grad.data_ptr()
        True
    """
    module = module_or_params if isinstance(module_or_params, torch.nn.Module) else None
    if isinstance(module_or_params, torch.Tensor) or not isinstance(
        module_or_params, torch.nn.Module | Iterable
    ):
        raise TypeError(
            "module_or_params must be a module or an iterable of parameters, got"
            f" {type(module_or_params).__name__}"
        )
    if module is not None:
        params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    else:
        params = {str(i): p for i, p in enumerate(module_or_params)}
    _check(params)
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for param in params.values():
        by_dtype.setdefault(param.dtype, []).append(param)

    with torch.inference_mode(False), torch.no_grad():
        # All the memory that there is need of, before anything changes.
        parts = {dtype: _Part(found) for dtype, found in by_dtype.items()}
        places = {dtype: part.values.apart() for dtype, part in parts.items()}
        for dtype, part in parts.items():
            _all.add(part)
            for param, value, grad in zip(by_dtype[dtype], places[dtype], part.given, strict=True):
                value.copy_(param)
                if param.grad is not None:
                    grad.copy_(param.grad)
                param.data = value
                param.grad = grad
                if param in _parts:  # a part that it leaves
                    _parts[param].places.pop(id(param), None)
                _parts[param] = part
    if module is not None:
        module.zero_grad = types.MethodType(zero_grad, module)
    return Flat(parts)


def _check(params: dict[str, Any]) -> None:
    if not params:
        raise ValueError(
            "module_or_params must have a parameter that requires a gradient, got none"
        )
    seen: dict[int, str] = {}
    for name, param in params.items():
        label = f"module_or_params[{name}]"
        if not isinstance(param, torch.Tensor) or not param.is_leaf:
            raise TypeError(f"{label} must be a parameter, got {type(param).__name__}")
        if is_dtensor(param):
            raise TypeError(f"{label} must be an ordinary parameter, got a DTensor")
        if param.device.type not in ("cpu", "cuda") or param.layout != torch.strided:
            raise ValueError(
                f"{label} must be dense and on the CPU, got {param.layout} on {param.device}; a"
                " CUDA device would do too"
            )
        if param.device != (home := next(iter(params.values())).device):
            raise ValueError(f"{label} must be on {home} as the others, got {param.device}")
        if param.device.type == "cpu" and param.is_shared():
            raise ValueError(f"{label} must not be in shared memory, which it would leave")
        if param.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{label} must be {known}, got {param.dtype}")
        if not param.requires_grad:
            raise ValueError(f"{label} must require a gradient, got a frozen parameter")
        if param.grad is not None and param.grad.layout != torch.strided:
            raise ValueError(f"{label} must have a dense gradient, got {param.grad.layout}")
        if param.grad is not None:
            check_memory(f"the gradient of {label}", param.grad)
        for dtype in (getattr(param, "grad_dtype", None), getattr(param.grad, "dtype", None)):
            if dtype not in (None, param.dtype):
                raise TypeError(f"{label} must have a gradient of {param.dtype}, got {dtype}")
        if param in stepped_in_backward:
            raise ValueError(f"{label} must keep its gradient, but step_in_backward frees it")
        if id(param) in seen:
            raise ValueError(f"{label} must be given once, got it as {seen[id(param)]} too")
        seen[id(param)] = name
    for name, param in params.items():
        if type(param).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise TypeError(
                f"module_or_params[{name}] must be an ordinary parameter, got"
                f" {type(param).__name__}"
            )
    check_apart({f"module_or_params[{name}]": param for name, param in params.items()})


def is_flat(param: torch.Tensor) -> bool:
    """Whether flatten_ placed the parameter and it is still there."""
    part = _parts.get(param)
    return part is not None and _same_place(param, part.values.views[part.places[id(param)]])


def restore(params: Sequence[torch.Tensor]) -> int:
    """Zeroes the flat gradients of parameters that still are views; returns how many there are."""
    with torch.no_grad():
        return sum(part.restore(params) for part in _all)


def zero_grad(self: torch.nn.Module, set_to_none: bool = True) -> None:
    """Zeroes the flat gradients, which stay; `Module.zero_grad` for the others."""
    params = list(self.parameters())
    if restore(params) < len(params):
        type(self).zero_grad(self, set_to_none)
        restore(params)


def _levels_to_caller() -> int:
    """How far up from our caller the first frame is that is neither ours nor torch's."""
    levels, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("fusedstep.", "torch.")):
        levels, frame = levels + 1, frame.f_back
    return levels


def warn_of_broken(params: Sequence[torch.Tensor]) -> bool:
    """Warns, once for each buffer, if a parameter or gradient of it has left; whether it did."""
    warned = False
    for part in [part for part in _all if not part.warned]:
        if any(part.place(param) is not None for param in params) and (what := part.broken()):
            part.warned = warned = True
            warnings.warn(
                f"{what} left the flat buffer that flatten_ put it in; steps stay correct, but no"
                " longer sweep one buffer: call flatten_ again, and zero gradients by the"
                " optimizer's zero_grad",
                stacklevel=_levels_to_caller(),
            )
    return warned


def packed_states(
    wanted: Iterable[tuple[torch.Tensor, Any, list[str]]],
    dtype_of: Callable[[torch.Tensor, str], torch.dtype | None],
) -> dict[tuple[torch.Tensor, str], torch.Tensor]:
    """New states for flat parameters, packed as they are, by parameter and name.

    `dtype_of` says in which dtype, or None for what has not the parameter's shape.
    """
    together: dict[tuple[int, str, torch.dtype], list[torch.Tensor]] = {}
    if len(_parts):
        for param, _, names in wanted:
            if param in _parts:
                for name in names:
                    if (dtype := dtype_of(param, name)) is not None:
                        key = id(_parts[param]), name, dtype
                        together.setdefault(key, []).append(param)
    result: dict[tuple[torch.Tensor, str], torch.Tensor] = {}
    for (_, name, dtype), params in together.items():
        states = _Memory(params, dtype).apart()
        result.update(zip(((param, name) for param in params), states, strict=True))
    return result
