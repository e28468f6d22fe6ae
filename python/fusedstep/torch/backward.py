"""`step_in_backward`: each parameter is updated as soon as its gradient is there."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import weakref
from typing import Any

import torch
from torch.nn.utils import clip_grad

from fusedstep.torch import flat
from fusedstep.torch.flat import stepped_in_backward
from fusedstep.torch.optimizers import Optimizer, Place
from fusedstep.torch.tensors import check_apart, is_dtensor


def _guard_clipping() -> None:
    """Makes torch's clipping, which would find no gradients and clip nothing, say so instead.

    Callers hold these functions under many names, and may have imported them long ago. What they
    hold is a wrapper that enters `no_grad` and then calls the function itself, which it has in its
    closure. There a guard takes the function's place, once, so that all names lead to it.
    """
    # The first is where clip_grad_norm_ and clip_grads_with_norm_ meet, from torch 2.6 on.
    by_norm = ("_clip_grads_with_norm_", "clip_grad_norm_")
    for name in (next(name for name in by_norm if hasattr(clip_grad, name)), "clip_grad_value_"):
        wrapper = getattr(clip_grad, name)
        clip = wrapper.__wrapped__
        if not hasattr(clip, "_guarded_by_fusedstep"):
            cell = next(cell for cell in wrapper.__closure__ if cell.cell_contents is clip)
            said = "clip_grad_norm_" if name in by_norm else name
            cell.cell_contents = wrapper.__wrapped__ = _guarded(clip, said)


def _guarded(clip: Any, said: str) -> Any:
    """`clip(parameters, limit, ...)`, or an error of function `said` where gradients are gone."""
    signature = inspect.signature(clip)

    @functools.wraps(clip)
    def guarded(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if any(param in stepped_in_backward for param in given):
            limit = list(signature.bind(given, *args, **kwargs).arguments.values())[1]
            if float(limit) != math.inf:  # by which trainers measure the norm, and clip nothing
                raise RuntimeError(
                    f"{said} needs all gradients at once, but step_in_backward has already stepped"
                    " and freed them"
                )
            if all(param.grad is None for param in given) and said == "clip_grad_value_":
                return None  # torch's takes no empty list
        return clip(given, *args, **kwargs)

    guarded._guarded_by_fusedstep = True  # type: ignore[attr-defined]
    return guarded


class StepInBackward:
    """The handle of `step_in_backward`: `remove()`, or leaving it as a context, ends it."""

    def __init__(self, optimizer: Optimizer, params: list[torch.Tensor]) -> None:
        self._optimizer = optimizer
        self._params = params
        self._backward = -1  # torch's number of the one under way, never used again
        self._places: dict[int, Place] = {}
        self._handles = [self._register(param) for param in params]
        optimizer._stepping_in_backward.add(self)
        for param in params:
            stepped_in_backward[param] = True
        _guard_clipping()

    def _register(self, param: torch.Tensor) -> Any:
        # Weak, as torch's hooks are no part of the cycles that Python can collect.
        running = weakref.ref(self)

        def hook(param: torch.Tensor) -> None:
            if (this := running()) is None:
                return
            place = this._place(param)
            if place is not None:  # else its group was removed: the gradient is the caller's
                this._optimizer._turn.run(this._optimizer._step_one, param, place)

        return param.register_post_accumulate_grad_hook(hook)

    def _place(self, param: torch.Tensor) -> Place | None:
        """Where the optimizer has the parameter; None where it has it no longer.

        Groups may be edited at any time. All of them are looked at once in each backward, and again
        where a parameter is not in the place that was found then.
        """
        backward = torch._C._current_graph_task_id()
        if backward == self._backward != -1:  # of a compiled one torch does not tell
            place = self._places.get(id(param))
            if place is None:
                return None
            k, j, _ = place
            groups = self._optimizer.param_groups
            if k < len(groups):
                params = groups[k]["params"]
                if j < len(params) and params[j] is param:
                    return place
        self._backward, self._places = backward, self._optimizer._places()
        return self._places.get(id(param))

    def remove(self) -> None:
        """Leaves gradients and steps to the caller again."""
        for handle in self._handles:
            handle.remove()
        for param in self._params:
            stepped_in_backward.pop(param, None)
        self._handles, self._params = [], []
        self._optimizer._stepping_in_backward.discard(self)
        for handles in _running.values():
            if self in handles:
                handles.remove(self)

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


# They live as long as their models, whether or not the caller keeps them.
_running: weakref.WeakKeyDictionary[torch.nn.Module, list[StepInBackward]] = (
    weakref.WeakKeyDictionary()
)


def _reducing() -> tuple[Any, ...]:
    """The wrappers that reduce gradients after backward; torch.distributed need not be there."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    return (torch.nn.parallel.DistributedDataParallel, *([fsdp] if fsdp else []))


def step_in_backward(
    model: torch.nn.Module, optimizer: Optimizer, *, max_norm: float | None = None
) -> StepInBackward:
    """Updates each parameter in backward, once its gradient is complete, and frees the gradient.

    The gradients never exist all at once, which for AdamW takes a quarter off the memory of
    parameters, gradients and states. Each backward is a step: do not accumulate over several. The
    optimizer's own `step` then finds no gradients and does nothing but averages (`ema`) and copies
    (`shadow`); call it for these, its hooks and learning-rate schedulers as ever.

    What needs all gradients before the first update cannot be had: clipping (by norm or by value,
    torch's functions raise for these parameters, unless the limit is inf: trainers log the norm in
    this way, and read 0), `torch.amp.GradScaler`, and reductions after backward: a model that
    DistributedDataParallel or FullyShardedDataParallel wraps, now or later, would step each
    process's own gradients.

    Args:
        model: its parameters that `optimizer` holds are stepped; others keep their gradients.
        optimizer: one of `fusedstep.torch`.
        max_norm: must be None: there is no clipping by the global norm.

    Returns:
        A handle whose `remove()` ends it.

    Raises:
        TypeError: not a module, or not an optimizer of `fusedstep.torch`.
        ValueError: `max_norm` is given; the optimizer has `zero_grad`; the model is or has one
            wrapped for data-parallel training, is flattened, is stepped in backward already, or
            shares no parameter with the optimizer.

    Example:
        >>> import torch
        >>> from fusedstep.torch import SGD, step_in_backward
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> handle = step_in_backward(model, SGD(model.parameters(), lr=0.5))
        >>> model(torch.ones(2)).sum().backward()
        >>> model.weight.tolist(), model.weight.grad
        ([[-0.5, -0.5]], None)
        >>> handle.remove()
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be one of fusedstep.torch, got {type(optimizer).__module__}."
            f"{type(optimizer).__name__}"
        )
    if max_norm is not None:
        raise ValueError(
            f"max_norm must be None, got {max_norm!r}: the global norm is known only after"
            " backward, when the parameters have already been stepped"
        )
    if optimizer._each.zero_grad:
        raise ValueError("optimizer must not be told to zero_grad, got zero_grad=True: gradients"
                         " are freed")  # fmt: skip
    for module in model.modules():
        if isinstance(module, _reducing()):
            raise ValueError(
                f"model must not be wrapped in {type(module).__name__}: it reduces gradients after"
                " they would have been stepped"
            )
    held = {param for group in optimizer.param_groups for param in group["params"]}
    params = [param for param in model.parameters() if param.requires_grad and param in held]
    if not params:
        raise ValueError("model must have a parameter that optimizer holds, got none")
    if any(is_dtensor(param) for param in params):
        raise ValueError("model must have ordinary parameters, got DTensors: they reduce later")
    if any(flat.is_flat(param) for param in params):
        raise ValueError("model must not be flattened: flatten_ keeps all gradients in memory")
    check_apart({f"params[{k}]": param for k, param in enumerate(params)})
    if any(param in stepped_in_backward for param in params):
        raise ValueError("model must not be stepped in backward twice: remove() the other first")
    running = StepInBackward(optimizer, params)
    _running.setdefault(model, []).append(running)
    return running
