"""`flatten_`: parameters and gradients as views of flat buffers, and what becomes of the views."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fusedstep.buffers import _Layout
from fusedstep.torch.tensors import (
    DTYPES,
    allocate,
    check_apart,
    dense_strides,
    is_dtensor,
    state_dtype,
)


def _packed(
    like: Sequence[torch.Tensor], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A buffer of zeros, and views of it with the shapes and dimension orders of `like`."""
    layout = _Layout({i: (tensor.numel(),) for i, tensor in enumerate(like)})
    buffer = allocate(layout.n, dtype)
    views = [
        buffer.as_strided(tensor.shape, dense_strides(tensor), at)
        for tensor, at in zip(like, layout.offsets, strict=True)
    ]
    return buffer, views


class _Part:
    """The parameters of one dtype, their buffers, and the view that each was given."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.params = [TensorWeakRef(param) for param in params]
        self.flat, self.views = _packed(params, params[0].dtype)
        self.flat_grad, self.grads = _packed(params, params[0].dtype)
        self.warned = False

    def live(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Parameters that still exist, with their views and gradients' views."""
        return [
            (param, view, grad)
            for ref, view, grad in zip(self.params, self.views, self.grads, strict=True)
            if (param := ref()) is not None
        ]

    def broken(self) -> str | None:
        """What has left its view, if anything."""
        for k, (param, view, grad) in enumerate(self.live()):
            shape = tuple(param.shape)
            if not _same_place(param, view):
                return f"parameter {k}, of shape {shape}, has"
            if param.grad is not None and not _same_place(param.grad, grad):
                return f"the gradient of parameter {k}, of shape {shape}, has"
        return None


def _same_place(tensor: torch.Tensor, view: torch.Tensor) -> bool:
    return (
        tensor.device == view.device
        and tensor.dtype == view.dtype
        and tensor.shape == view.shape
        and tensor.stride() == view.stride()
        and tensor.data_ptr() == view.data_ptr()
    )


stepped_in_backward: Any = WeakTensorKeyDictionary()  # parameters, see backward.py
_parts: Any = WeakTensorKeyDictionary()  # parameter -> (its part, its place there)


class Flat:
    """The flat buffers that `flatten_` made, one pair for each dtype.

    `flat` and `flat_grad` are the buffers where there is one dtype, `flats` and `flat_grads` all of
    them by dtype. The gaps between parameters are zero and stay so.
    """

    def __init__(self, parts: dict[torch.dtype, _Part]) -> None:
        self._parts = parts

    @property
    def flats(self) -> dict[torch.dtype, torch.Tensor]:
        """The parameters' buffer of each dtype, 1-D."""
        return {dtype: part.flat for dtype, part in self._parts.items()}

    @property
    def flat_grads(self) -> dict[torch.dtype, torch.Tensor]:
        """The gradients' buffer of each dtype, 1-D, laid out as the parameters'."""
        return {dtype: part.flat_grad for dtype, part in self._parts.items()}

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
        n = sum(view.numel() for part in self._parts.values() for view in part.views)
        return f"Flat({', '.join(counts)}, {n} elements)"


def flatten_(module_or_params: torch.nn.Module | Iterable[torch.Tensor]) -> Flat:
    """Makes parameters views of one flat buffer per dtype, and their gradients views of a second.

    The buffers are aligned and on huge pages, so that a step, a `zero_grad` or an all-reduce is one
    sweep over memory. The parameters stay the objects they are: `parameters()`, names, tied
    weights, `state_dict` and optimizers that hold them are as before. Autograd adds into the flat
    gradients, which exist from now on and are zero where backward has not been: a parameter without
    a part in the loss takes a step with a zero gradient instead of none. `zero_grad` of a fusedstep
    optimizer or of `module` zeroes the views and keeps them, whatever `set_to_none` says; of a
    parameter that was frozen meanwhile it drops the gradient.

    If something later moves a parameter or a gradient out of its view (`.to`, `p.data = ...`,
    another object's `zero_grad`, DistributedDataParallel with `gradient_as_bucket_view`), steps
    stay correct and `step` warns once. `flat_grad` is then not all that is to be reduced.

    Args:
        module_or_params: a module, whose parameters that require a gradient are taken, or an
            iterable of parameters. On the CPU, of a dtype that an optimizer takes.

    Returns:
        The buffers: `.flat` and `.flat_grad`, or by dtype `.flats` and `.flat_grads`.

    Raises:
        TypeError, ValueError: something is not a parameter in CPU memory of its own, is given
            twice, or there is none; nothing has changed then.

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

    parts = {
        dtype: _Part(found) for dtype, found in by_dtype.items()
    }  # all memory there is need of
    with torch.no_grad():
        for part in parts.values():
            for k, (param, view, grad) in enumerate(part.live()):
                view.copy_(param)
                if param.grad is not None:
                    grad.copy_(param.grad)
                param.data = view
                param.grad = grad.detach()  # an alias: `param.grad.data = ...` must not move ours
                _parts[param] = part, k
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
        if param.device.type != "cpu" or param.layout != torch.strided:
            raise ValueError(
                f"{label} must be dense and on the CPU, got {param.layout} on {param.device}"
            )
        if param.is_shared():
            raise ValueError(f"{label} must not be in shared memory, which it would leave")
        if param.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{label} must be {known}, got {param.dtype}")
        if not param.requires_grad:
            raise ValueError(f"{label} must require a gradient, got a frozen parameter")
        if param.grad is not None and param.grad.layout != torch.strided:
            raise ValueError(f"{label} must have a dense gradient, got {param.grad.layout}")
        for dtype in (getattr(param, "grad_dtype", None), getattr(param.grad, "dtype", None)):
            if dtype not in (None, param.dtype):
                raise TypeError(f"{label} must have a gradient of {param.dtype}, got {dtype}")
        if param in stepped_in_backward:
            raise ValueError(f"{label} must keep its gradient, but step_in_backward frees it")
        if id(param) in seen:
            raise ValueError(f"{label} must be given once, got it as {seen[id(param)]} too")
        seen[id(param)] = name
    check_apart({f"module_or_params[{name}]": param for name, param in params.items()})


def is_flat(param: torch.Tensor) -> bool:
    """Whether flatten_ placed the parameter's gradient and it is still there."""
    return param in _parts and _same_place(param, _parts[param][0].views[_parts[param][1]])


def restore(params: Iterable[torch.Tensor]) -> None:
    """Zeroes the flat gradients of the parameters that still are views, and puts them back."""
    if not len(_parts):
        return
    with torch.no_grad():
        wanted: dict[int, tuple[_Part, set[int]]] = {}
        for param in params:
            if is_flat(param):
                part, k = _parts[param]
                wanted.setdefault(id(part), (part, set()))[1].add(k)
                param.grad = part.grads[k].detach() if param.requires_grad else None
        for part, places in wanted.values():
            if len(places) == len(part.params):
                part.flat_grad.zero_()
            else:
                for k in places:
                    part.grads[k].zero_()


def zero_grad(self: torch.nn.Module, set_to_none: bool = True) -> None:
    """Zeroes the flat gradients, which stay; `Module.zero_grad` for the others."""
    type(self).zero_grad(self, set_to_none)
    restore(self.parameters())


def _levels_to_caller() -> int:
    """How far up from our caller the first frame is that is neither ours nor torch's."""
    levels, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("fusedstep.", "torch.")):
        levels, frame = levels + 1, frame.f_back
    return levels


def warn_of_broken(params: Iterable[torch.Tensor]) -> None:
    """Warns, once for each buffer, if a parameter or gradient of it has left its view."""
    if not len(_parts):
        return
    for part in {id(_parts[p][0]): _parts[p][0] for p in params if p in _parts}.values():
        if not part.warned and (what := part.broken()):
            part.warned = True
            warnings.warn(
                f"{what} left the flat buffer that flatten_ put it in; steps stay correct, but no"
                " longer sweep one buffer: call flatten_ again, and zero gradients by the"
                " optimizer's zero_grad",
                stacklevel=_levels_to_caller(),
            )


def packed_states(
    wanted: Iterable[tuple[torch.Tensor, Any, list[str]]], is_array: Callable[[str], bool]
) -> dict[tuple[torch.Tensor, str], torch.Tensor]:
    """New states for flat parameters, packed as they are, by parameter and name."""
    together: dict[tuple[int, str], list[torch.Tensor]] = {}
    if len(_parts):
        for param, _, names in wanted:
            if param in _parts:
                for name in filter(is_array, names):
                    together.setdefault((id(_parts[param][0]), name), []).append(param)
    result = {}
    for (_, name), params in together.items():
        for param, view in zip(params, _packed(params, state_dtype(params[0]))[1], strict=True):
            result[param, name] = view
    return result
