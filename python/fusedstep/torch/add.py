"""`add_`: tensors plus a multiple of others, in one pass over each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fusedstep._add import add
from fusedstep._arrays import announcer
from fusedstep.torch.tensors import as_plain, as_reals, check_apart, gpu_of, in_order, stream_of


def add_(
    tensors: Iterable[torch.Tensor],
    others: Iterable[torch.Tensor | None],
    scale: float = 1.0,
) -> None:
    """Adds `scale * other` to each tensor in place, in one pass, rounded once: accumulation.

    With the same bits on every instruction set, number of threads and device, whatever the dtypes
    are: read as float32, or as float64 into a float64 tensor, and stored in the tensor's own.

    Args:
        tensors: what is added to, as parameters and their gradients may be: strided, complex or
            DTensors too.
        others: as many, each of its tensor's shape, on its device, and complex where that is; None
            adds nothing.
        scale: a finite number (default 1).

    Raises:
        TypeError, ValueError: something is no tensor, or of another shape, kind or device, or
            overlaps a tensor that is written; nothing has changed then.

    Example:
        >>> import torch
        >>> from fusedstep.torch import add_
        >>> total = torch.zeros(2)
        >>> for _ in range(2):
        ...     add_([total], [torch.tensor([1.0, 3.0], dtype=torch.bfloat16)], scale=0.5)
        >>> total
        tensor([1., 3.])
    """
    given = _as_list("tensors", tensors), _as_list("others", others)
    if len(given[0]) != len(given[1]):
        raise ValueError(f"others must have {len(given[0])} tensors, got {len(given[1])}")
    pairs = [(i, a, b) for i, (a, b) in enumerate(zip(*given, strict=True)) if b is not None]
    runs = []
    for i, tensor, other in pairs:
        if tensor is None:
            raise TypeError(f"tensors[{i}] must be a tensor, got None")
        if other.shape != tensor.shape:
            shapes = tuple(tensor.shape), tuple(other.shape)
            raise ValueError(f"others[{i}] must have shape {shapes[0]}, got {shapes[1]}")
        if other.is_complex() != tensor.is_complex():
            kind = "complex" if tensor.is_complex() else "real"
            raise TypeError(f"others[{i}] must be {kind} as tensors[{i}], got {other.dtype}")
        device = given[0][pairs[0][0]].device
        plain, copied = as_plain(tensor, f"tensors[{i}]", tensor, device)
        along, _ = as_plain(other, f"others[{i}]", tensor, device)
        runs.append((tensor, plain, copied, *in_order(plain, along)))
    if not runs:
        return
    check_apart(
        {f"tensors[{i}]": plain for (i, *_), (_, plain, *_) in zip(pairs, runs, strict=True)}
    )
    device = runs[0][1].device
    gpu = gpu_of(device)
    stream = 0 if gpu is None else stream_of(device)
    into = {str(i): as_reals(run) for (i, *_), (*_, run, _) in zip(pairs, runs, strict=True)}
    along = [as_reals(run) for *_, run in runs]
    try:
        add(into, along, scale, "tensors", gpu, device.index or 0, stream)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("other[", "others[")) from None
    with torch.no_grad():
        for tensor, plain, copied, run, _ in runs:
            if copied or run.data_ptr() != plain.data_ptr():
                there = plain if not copied else tensor.detach()
                there.copy_(run.view(plain.shape))
    announcer()([tensor for _, tensor, _ in pairs])


def _as_list(name: str, given: Any) -> Sequence[Any]:
    if isinstance(given, torch.Tensor) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be several tensors, got {type(given).__name__}")
    found = list(given)
    for i, one in enumerate(found):
        if one is not None and not isinstance(one, torch.Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, got {type(one).__name__}")
    return found
