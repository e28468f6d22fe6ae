"""Tensors as plain memory that a kernel can sweep over: what cannot be read where it lies."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from fusedstep import _arrays, _core, _gpu, _runtime, _storage
from fusedstep._arrays import announcer, check_alone
from fusedstep._storage import Kept, Stored

DTYPES = (*(getattr(torch, name) for name in _arrays.DTYPES), torch.complex64, torch.complex128)

_INTEGERS = (torch.int16, torch.uint8)  # of which states may be


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


_REALS = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def dtype_name(param: torch.Tensor) -> str:
    """The name of the dtype of a parameter's numbers, a complex one's two reals."""
    return str(_REALS.get(param.dtype, param.dtype)).removeprefix("torch.")


def dtype_for(name: str, param: torch.Tensor) -> torch.dtype:
    """torch's dtype of this name, complex under a complex parameter."""
    dtype: torch.dtype = getattr(torch, name)
    complexes = {real: both for both, real in _REALS.items()}
    return complexes.get(dtype, dtype) if param.is_complex() else dtype


def allocate(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """n zeros, aligned to 64 bytes, on the CPU on huge pages where they are many."""
    if device.type != "cpu":
        return torch.zeros(n, dtype=dtype, device=device)
    try:
        memory = _core.allocate(n * dtype.itemsize, _runtime.huge_pages())
    except MemoryError:
        size = n * dtype.itemsize
        raise MemoryError(
            f"params take {size} bytes more, which the system does not grant"
        ) from None
    return torch.from_numpy(memory).view(dtype)


def own_storage(view: torch.Tensor) -> torch.Tensor:
    """A dense view as a tensor of its own: its storage spans no more, and keeps the memory alive.

    Through DLPack, which takes every dtype and device. The storage cannot be resized.
    """
    run = from_dlpack(to_dlpack(view.as_strided((view.numel(),), (1,))))
    return run.as_strided(view.shape, view.stride()).detach()


def new_state(param: torch.Tensor, dtype: torch.dtype, ordered: bool = False) -> torch.Tensor:
    """Zeros like `param`; `ordered` ones in the order of their places in it."""
    kind = torch.contiguous_format if ordered else torch.preserve_format
    if type(param) not in (torch.Tensor, torch.nn.Parameter) or param.is_meta:
        return torch.zeros_like(param, dtype=dtype, memory_format=kind)
    if param.device.type != "cpu" or param.numel() * dtype.itemsize < _core.HUGE_FROM:
        return torch.zeros_like(param, dtype=dtype, memory_format=kind, requires_grad=False)
    flat = allocate(param.numel(), dtype, param.device)
    return flat.view(param.shape) if ordered else flat.as_strided(param.shape, dense_strides(param))


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


def convert(source: Stored, target: Stored, first: int = 0) -> None:
    """`_storage.convert` of tensors of any kind: a DTensor's shard, strided, or on a GPU."""

    def here(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        return local(tensor).detach().cpu().contiguous()

    there = Stored(here(target.array), target.format, here(target.beside))
    if there.array.numel():
        _storage.convert(
            Stored(here(source.array), source.format, here(source.beside)), there, first
        )
    for new, old in ((there.array, target.array), (there.beside, target.beside)):
        if new is not None and local(old).data_ptr() != new.data_ptr():
            local(old).copy_(new)


class Swap:
    """Swaps parameters with their averages in place when it is called, and back the next time."""

    def __init__(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        with torch.no_grad():
            runs = [_swapped_runs(local(param), local(average)) for param, average in pairs]
        params = [param for param, _, _ in runs]
        averages = [average for _, average, _ in runs]
        self._back = [pair for *_, back in runs for pair in back]
        self._written = [tensor for pair in pairs for tensor in pair]
        self._table: Any
        if params[0].device.type == "cpu":
            names = list(map(str, range(len(runs))))
            dtypes = {dtype_name(param): dtype_name(average) for param, average in pairs}
            native = {d: [Kept(d), Kept(dtypes.get(d, d))] for d in _arrays.DTYPES}
            table = _core.ArrayTable("lookahead", names, params, [0] * len(runs), storage=native)
            table.load({"ema": averages}, table.clocks(), 0, [], [])
            self._table = table
        else:
            self._table = _SwapThere(params, averages)

    @property
    def swapped(self) -> bool:
        """Whether averages are in the parameters' place."""
        return bool(self._table.swapped)

    @torch.no_grad()
    def __call__(self) -> None:
        self._table.swap()
        for there, here in self._back:
            there.copy_(here)
        announcer()(self._written)


def in_order(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two plain tensors of one shape as 1-D ones of one order, where they lie if they are dense."""
    strides = dense_strides(a)
    if a.stride() == b.stride() == strides:
        n = a.numel()
        return a.as_strided((n,), (1,)), b.as_strided((n,), (1,))
    return a.contiguous().view(-1), b.contiguous().view(-1)


def as_reals(run: torch.Tensor) -> torch.Tensor:
    """A 1-D tensor of complex numbers as one of reals; any other as it is."""
    return torch.view_as_real(run).view(-1) if run.is_complex() else run


def _swapped_runs(
    param: torch.Tensor, average: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Both as 1-D reals of one order in memory, and what to copy to and from after writing."""
    plain = [tensor.detach().resolve_conj().resolve_neg() for tensor in (param, average)]
    runs = in_order(plain[0], plain[1])
    back = [
        (to.detach(), run.view(to.shape))
        for to, run in zip((param, average), runs, strict=True)
        if to.is_neg() or to.is_conj() or to.data_ptr() != run.data_ptr()
    ]
    return as_reals(runs[0]), as_reals(runs[1]), back


class _SwapThere:
    """The same of dense runs on a GPU, as ArrayTable::swap has it on the CPU."""

    def __init__(self, params: Sequence[torch.Tensor], averages: Sequence[torch.Tensor]) -> None:
        self._runs = list(zip(params, averages, strict=True))
        self._kept: dict[int, torch.Tensor] = {}
        self.swapped = False

    def swap(self) -> None:
        for k, (param, average) in enumerate(self._runs):
            alike = param.dtype == average.dtype
            if alike or (param.dtype, average.dtype) == (torch.bfloat16, torch.float32):
                for begin in range(0, param.numel(), _BLOCK):
                    p, a = (run[begin : begin + _BLOCK] for run in (param, average))
                    if alike:
                        values = p.clone()
                        p.copy_(a)
                        a.copy_(values)
                    else:
                        _swap_halves(p, a, self.swapped)
            elif self.swapped:
                param.copy_(self._kept.pop(k))
            else:
                self._kept[k] = param.clone()
                param.copy_(average)
        self.swapped = not self.swapped


_BLOCK = 1 << 22  # elements that are swapped at a time


def _swap_halves(param: torch.Tensor, average: torch.Tensor, back: bool) -> None:
    """A bfloat16 parameter and its float32 average, as swap_halves in array_table.cpp."""
    old = param.view(torch.int16).to(torch.int32) << 16
    words = average.view(torch.int32)
    if back:
        param.view(torch.int16).copy_(words >> 16)
        words.copy_(old + words.view(torch.int16)[::2])
        return
    word = torch.where(average.isnan(), 0x7FC00000, words)
    param.view(torch.int16).copy_((word + 0x8000) >> 16)
    words.copy_(old | (word & 0xFFFF))


def first_place(label: Callable[[], str], param: torch.Tensor) -> int:
    """The place in the whole parameter of the first element that is here.

    ValueError for a shard that is no run of places.
    """
    if not is_dtensor(param):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    given: Any = param
    shape, offset = compute_local_shape_and_global_offset(
        given.shape, given.device_mesh, given.placements
    )
    cut = [dim for dim, n in enumerate(param.shape) if n != shape[dim]]
    run = not cut or all(n == 1 for n in param.shape[: cut[-1]])
    if len(cut) > 1 or not run or any(p.is_partial() for p in given.placements):
        raise ValueError(
            f"{label()} must be sharded by its first dimension, because random bits and blocks of"
            f" 8-bit states go by place in the parameter, got {given.placements}"
        )
    return offset[cut[0]] * math.prod(param.shape[cut[0] + 1 :]) if cut else 0


def as_plain(
    tensor: Any, label: str, param: torch.Tensor, device: torch.device, is_state: bool = False
) -> tuple[torch.Tensor, bool]:
    """`tensor` as an ordinary tensor on `device`, and whether that is a copy.

    A state may be of integers.

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
    if tensor.dtype not in DTYPES and not (is_state and tensor.dtype in _INTEGERS):
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
    """`check_memory` of a tensor of any class: torch (to 2.14.1) copies unseen, and crashes."""
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


def check_apart(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError if tensors share an element with each other or within themselves."""
    spans = []
    for label, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
            continue  # said elsewhere
        check_memory(label, tensor)
        check_alone(label, tensor.shape, tensor.stride())
        begin = tensor.data_ptr()
        spans.append((begin, begin + _extent(tensor) * tensor.itemsize, label))
    spans.sort()
    for i, (_, end, label) in enumerate(spans):
        for j in range(i + 1, len(spans)):  # a slice of the rest is a copy of it
            begin, _, other = spans[j]
            if begin >= end:
                break
            a, b = tensors[label], tensors[other]
            if a.itemsize != b.itemsize or torch.isin(_places(a), _places(b)).any():
                first, second = (name for name in tensors if name in (label, other))
                raise ValueError(
                    f"{first} and {second} must not share memory, got overlapping buffers"
                )


def as_dense(tensors: Sequence[torch.Tensor], ordered: bool = False) -> list[torch.Tensor]:
    """The tensors, of one shape, where they are dense with the first one's strides, else copies.

    `ordered` ones are contiguous.
    """
    like = torch.empty(tensors[0].shape, device="meta") if ordered else tensors[0]
    strides = dense_strides(like)
    with torch.no_grad():
        return [
            tensor
            if tensor.stride() == strides
            else torch.empty_strided(
                tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
            ).copy_(tensor)
            for tensor in tensors
        ]
