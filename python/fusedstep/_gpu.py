"""The optional CUDA module, and arrays in a GPU's memory."""

from __future__ import annotations

import importlib
import sys
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from fusedstep.buffers import _Layout

_MISSING = (
    "this build of fusedstep has no CUDA: install it from source with"
    ' CMAKE_ARGS="-DFUSEDSTEP_CUDA=ON" in the environment'
)
_CUDA = (2, 13)  # DLPack's device types: a GPU's memory, and managed memory


def module() -> ModuleType | None:
    """`fusedstep._cuda`, or None where this build has none."""
    try:
        return importlib.import_module("fusedstep._cuda")
    except ModuleNotFoundError as error:
        if error.name != "fusedstep._cuda":
            raise
        return None


def needed(label: str, device: Any = "type 2 of DLPack") -> ModuleType:
    """`fusedstep._cuda`; ValueError about `label`, which is on `device`, where there is none."""
    found = module()
    why = _MISSING if found is None else "CUDA finds no driver or no device here"
    if found is None or not found.devices():
        raise ValueError(f"{label} must be in CPU memory, got device {device}: {why}")
    return found


def info() -> dict[str, Any] | bool:
    """What `fusedstep info` tells of it: False, or its architectures and the devices it sees."""
    found = module()
    if found is None:
        return False
    return {"architectures": _architectures(found.ARCHITECTURES), "devices": found.devices()}


def _architectures(cmake: str) -> list[str]:
    """What CMake was told to compile for, by NVIDIA's names: sm_ is machine code, compute_ PTX."""
    names = []
    for word in cmake.split():
        number, _, kind = word.partition("-")
        if not number.rstrip("af").isdigit():  # all, all-major
            names.append(word)
            continue
        if kind != "virtual":
            names.append(f"sm_{number}")
        if kind != "real":
            names.append(f"compute_{number}")
    return names


def index_of(array: Any, label: str = "params") -> int | None:
    """The CUDA device whose memory an array, which errors call `label`, is in; else None."""
    if isinstance(array, np.ndarray | Array):
        return None if isinstance(array, np.ndarray) else array.index
    if hasattr(array, "__dlpack_device__"):
        try:
            kind, index = array.__dlpack_device__()
        except (ValueError, BufferError):  # unknown to DLPack, as torch's meta
            return None
        return int(index) if int(kind) in _CUDA else None
    try:
        address = array.__cuda_array_interface__["data"][0]
    except (AttributeError, KeyError, TypeError):  # none, or one that the core says is wrong
        return None
    return int(needed(label, "of a GPU").index_of(address)) if address else 0


def stream_of(array: Any, index: int) -> int:
    """The stream on which the array's own library works at the moment; 0 is CUDA's default."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(array, torch.Tensor):
        return int(torch.cuda.current_stream(index).cuda_stream)
    if cupy is not None and isinstance(array, cupy.ndarray):
        with cupy.cuda.Device(index):
            return int(cupy.cuda.get_current_stream().ptr)
    shown = getattr(array, "__cuda_array_interface__", None)
    stream = shown.get("stream") if isinstance(shown, dict) else None
    return 0 if stream in (None, 1) else int(stream)


class Array:
    """An array in a GPU's memory, which fusedstep allocated: an optimizer's state.

    `cupy.asarray(a)` and `torch.as_tensor(a)` are views of it, through `__cuda_array_interface__`,
    for use on the stream that steps run on. `numpy.asarray(a)` is a copy in the CPU's memory, and
    `a[...] = x` copies into it; both wait for the device.
    """

    __array_priority__ = 1

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, index: int, memory: Any = None, offset: int = 0
    ) -> None:
        self.shape: tuple[int, ...] = tuple(shape)
        self.dtype, self.index = np.dtype(dtype), index
        self._offset = offset  # in bytes
        nbytes = prod(self.shape) * self.dtype.itemsize
        self._memory = needed("state").Allocation(nbytes, index) if memory is None else memory

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(prod(self.shape))

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return int(self.size * self.dtype.itemsize)

    @property
    def device(self) -> str:
        """Its device, as `cuda:0`."""
        return f"cuda:{self.index}"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._memory.address + self._offset, False),
            "strides": None,
            "version": 3,
            "stream": None,
        }

    def view(self, offset: int, shape: tuple[int, ...]) -> Array:
        """Elements from `offset` on of this one-dimensional array, seen with a shape."""
        at = self._offset + offset * self.dtype.itemsize
        return Array(shape, self.dtype, self.index, self._memory, at)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if copy is False:
            raise ValueError("copy must not be False: the array is in a GPU's memory")
        result = np.empty(self.shape, self.dtype)
        self._memory.read(self._offset, result)
        return result if dtype is None else result.astype(dtype)

    def astype(self, dtype: Any) -> np.ndarray[Any, Any]:
        """Its values in the CPU's memory."""
        return np.asarray(self).astype(dtype)

    def copy(self) -> np.ndarray[Any, Any]:
        """Its values in the CPU's memory."""
        return np.asarray(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key is not Ellipsis:
            raise TypeError(f"key must be ..., got {key!r}: the array is in a GPU's memory")
        values = np.empty(self.shape, self.dtype)
        np.copyto(values, to_host(value), casting="same_kind")
        self._memory.write(self._offset, values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Array:
        result = Array(self.shape, self.dtype, self.index)
        result[...] = self
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (np.asarray(self), self.index)

    def __repr__(self) -> str:
        return f"Array({np.asarray(self)!r}, {self.device})"


def packed(shapes: dict[Any, tuple[int, ...]], dtype: Any, index: int) -> dict[Any, Array]:
    """Zeroed arrays of these shapes, laid out as a FlatBuffer's in one allocation on a device."""
    layout = _Layout(shapes)
    flat = Array((layout.n,), dtype, index)
    return {
        key: flat.view(at, shape)
        for (key, shape), at in zip(shapes.items(), layout.offsets, strict=True)
    }


def _restored(values: np.ndarray[Any, Any], index: int) -> Array:
    result = Array(values.shape, values.dtype, index)
    result[...] = values
    return result


def to_host(value: Any) -> Any:
    """The values of an array on a GPU as NumPy's; anything else as it is."""
    if isinstance(value, Array):
        return np.asarray(value)
    if isinstance(value, np.ndarray) or index_of(value) is None:
        return value
    if hasattr(value, "detach"):
        return value.detach().cpu()
    if hasattr(value, "get"):
        return value.get()  # CuPy
    if hasattr(value, "copy_to_host"):
        return value.copy_to_host()  # Numba
    raise TypeError(
        f"value must be a NumPy, torch, CuPy or Numba array, got {type(value).__name__}"
    )
