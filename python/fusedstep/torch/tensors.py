"""Tensors as plain memory that a kernel can sweep over: what cannot be read where it lies."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from fusedstep import _arrays, _core, _gpu, _runtime

DTYPES = (*(getattr(torch, name) for name in _arrays.DTYPES), torch.complex64, torch.complex128)


def gpu_of(device: torch.device) -> Any:
    """The core's device for a CUDA device; None for the CPU. ValueError in a build without CUDA."""
    return _gpu.needed("params", device).device() if device.type == "cuda" else None


def stream_of(device: torch.device) -> int:
    """torch's current stream on a CUDA device."""
    return torch.cuda.current_stream(device).cuda_stream


def recording(device: torch.device) -> bool:
    """Whether the current stream of a CUDA device is being recorded in a graph."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def state_dtype(param: torch.Tensor) -> torch.dtype:
    """float32; float64, complex64 and complex128 under parameters of those."""
    wide = param.dtype in (torch.float64, torch.complex64, torch.complex128)
    return param.dtype if wide else torch.float32


def allocate(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """n zeros, aligned to 64 bytes, on the CPU on huge pages where they are many."""
    if device.type != "cpu":
        return torch.zeros(n, dtype=dtype, device=device)
    memory = _core.allocate(n * dtype.itemsize, _runtime.huge_pages())
    return torch.from_numpy(memory).view(dtype)


def own_storage(view: torch.Tensor) -> torch.Tensor:
    """A dense view as a tensor of its own: its storage spans no more, and keeps the memory alive.

    Through DLPack, which takes every dtype and device. The storage cannot be resized.
    """
    run = from_dlpack(to_dlpack(view.as_strided((view.numel(),), (1,))))
    return run.as_strided(view.shape, view.stride()).detach()


def new_state(param: torch.Tensor) -> torch.Tensor:
    """Zeros like `param`, in the dtype of its states."""
    dtype = state_dtype(param)
    if type(param) not in (torch.Tensor, torch.nn.Parameter) or param.is_meta:
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if param.device.type != "cpu" or param.numel() * dtype.itemsize < _core.HUGE_FROM:
        return torch.zeros_like(
            param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
        )
    return allocate(param.numel(), dtype, param.device).as_strided(
        param.shape, dense_strides(param)
    )


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's strides if it is dense, else a dense tensor's with its order of dimensions."""
    return torch.empty_like(tensor, device="meta").stride()


def _dtensor() -> Any:
    """The class of DTensors, or no class where torch.distributed was not imported."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, without an import of torch.distributed where there can be none."""
    return isinstance(tensor, _dtensor())


def any_dtensor(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether one of many is a DTensor."""
    kind = _dtensor()
    return bool(kind) and any(isinstance(tensor, kind) for tensor in tensors)


def local(tensor: Any) -> torch.Tensor:
    """A DTensor's shard on this rank; any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        shard = tensor.to_local()
    return shard.wait() if hasattr(shard, "wait") else shard  # for a collective under way


def as_plain(
    tensor: Any, label: str, param: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, bool]:
    """`tensor` as an ordinary tensor on `device`, and whether that is a copy.

    A DTensor's local shard, distributed as `param` is; the values of a lazy negation or conjugate.
    """
    if is_dtensor(tensor) != is_dtensor(param):
        raise TypeError(
            f"{label} must be a DTensor where its parameter is, and only there, got"
            f" {type(tensor).__name__}"
        )
    if is_dtensor(tensor):
        placed = (tensor.device_mesh, tensor.placements), (param.device_mesh, param.placements)
        if placed[0] != placed[1]:
            if placed[0][0] != placed[1][0] or not label.startswith("grads"):
                raise ValueError(
                    f"{label} must be placed as its parameter, {placed[1]}, got {placed[0]}"
                )
            with torch.no_grad():
                tensor = tensor.redistribute(placements=param.placements)
        tensor = local(tensor)
    if tensor.layout != torch.strided:
        raise ValueError(f"{label} must be dense, got layout {tensor.layout}")
    if tensor.device != device:
        where = "the CPU" if device.type == "cpu" else device
        raise ValueError(f"{label} must be on {where}, got device {tensor.device}")
    if tensor.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{label} must be {known}, got {tensor.dtype}")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(f"{label} must be an ordinary tensor, got {type(tensor).__name__}")
    plain = tensor.detach()
    if type(plain) is not torch.Tensor:
        plain = plain.as_subclass(torch.Tensor)
    check_memory(label, plain)  # last of all: a subclass's own code may take it away
    resolved = plain.resolve_conj().resolve_neg()
    return resolved, resolved is not plain


def _extent(tensor: torch.Tensor) -> int:
    """How many elements of memory a tensor spans, from its first to its last."""
    n = tensor.numel()
    if n == 0 or tensor.is_contiguous():  # as nearly always; the sum takes longer
        return n
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in dims)


def check_memory(label: str, tensor: torch.Tensor) -> None:
    """Raises ValueError for a tensor whose storage was resized to less than it spans."""
    wanted = (tensor.storage_offset() + _extent(tensor)) * tensor.itemsize
    if tensor.numel() and (found := tensor.untyped_storage().nbytes()) < wanted:
        raise ValueError(
            f"{label} must have memory, {wanted} bytes of it, got a storage of {found} bytes"
        )


def check_readable(label: str, tensor: torch.Tensor) -> None:
    """`check_memory` of a tensor of any class: what torch copies without looking, and crashes."""
    tensor = local(tensor)
    ordinary = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    if ordinary and tensor.layout == torch.strided and not tensor.is_meta:
        check_memory(label, tensor)


def _places(tensor: torch.Tensor) -> torch.Tensor:
    """The byte addresses of a tensor's elements, without repetition, in order."""
    n = _extent(tensor)
    shape, strides = (tensor.shape, tensor.stride()) if n else ((0,), (1,))
    offsets = torch.arange(n, dtype=torch.int64, device="cpu").as_strided(shape, strides)
    return torch.unique(offsets) * tensor.itemsize + tensor.data_ptr()


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    if tensor.numel() < 2:
        return False
    reach = 1
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(dim for dim in dims if dim[1] > 1):
        if stride < reach:  # each dimension steps over all that the smaller ones span, or may not
            return len(_places(tensor)) < tensor.numel()
        reach += (size - 1) * stride
    return False


def check_apart(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError if tensors share an element with each other or within themselves."""
    spans = []
    for label, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
            continue  # said elsewhere
        check_memory(label, tensor)
        if _overlaps_itself(tensor):
            raise ValueError(
                f"{label} must have memory of its own for each element, got shape"
                f" {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        begin = tensor.data_ptr()
        spans.append((begin, begin + _extent(tensor) * tensor.itemsize, label))
    spans.sort()
    for i, (_, end, label) in enumerate(spans):
        for begin, _, other in spans[i + 1 :]:
            if begin >= end:
                break
            a, b = tensors[label], tensors[other]
            if a.itemsize != b.itemsize or torch.isin(_places(a), _places(b)).any():
                first, second = (name for name in tensors if name in (label, other))
                raise ValueError(
                    f"{first} and {second} must not share memory, got overlapping buffers"
                )


def as_dense(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, of one shape, where they are dense with the first one's strides, else copies."""
    strides = dense_strides(tensors[0])
    with torch.no_grad():
        return [
            tensor
            if tensor.stride() == strides
            else torch.empty_strided(
                tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
            ).copy_(tensor)
            for tensor in tensors
        ]
