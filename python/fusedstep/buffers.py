"""FlatBuffer: many named arrays in one aligned allocation."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any, SupportsFloat, overload

import numpy as np
from numpy.typing import DTypeLike

from fusedstep import _core, _runtime
from fusedstep._add import add
from fusedstep._arrays import as_array, as_dtype, as_values, flattened, in_order, is_array
from fusedstep._layout import Layout
from fusedstep._types import Array, Key, Shapes

__all__ = ["FlatBuffer"]


def __dir__() -> list[str]:
    return sorted(__all__)


def _as_shapes(shapes: Any, name: str) -> Shapes:
    if isinstance(shapes, FlatBuffer):
        return shapes.shapes
    if isinstance(shapes, str) or not isinstance(shapes, Iterable):
        raise TypeError(
            f"{name} must be a list of shapes, a dict of them by name, or a FlatBuffer, got"
            f' {shapes!r}: pass {name}=[(2, 3), 4], or {name}={{"w": (2, 3), "b": 4}}'
        )
    items = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes)
    result: dict[Key, tuple[int, ...]] = {}
    for key, shape in items:
        dims = tuple(shape) if isinstance(shape, Iterable) else (shape,)
        if not all(isinstance(d, int | np.integer) and d >= 0 for d in dims):
            raise ValueError(f"{name}[{key}] must be integers >= 0, got {shape!r}")
        result[key] = tuple(int(d) for d in dims)
    return result


class FlatBuffer(Mapping[Key, Array]):
    """Named arrays, back to back in one allocation, each a view of it with its own shape.

    A step sweeps a buffer from end to end instead of visiting scattered arrays. Each array starts
    at a multiple of 64 bytes; the gaps between them are zero and no step writes them. Buffers of
    4 MiB and more ask for transparent huge pages unless `set_huge_pages(False)`.

    Made by `pack` (from arrays), `zeros` (from shapes) or `over` (on memory of your own).
    `buffer[name]` is a view; `buffer[name] = x` copies `x` into it. `np.savez(file, **buffer)`
    saves the arrays by name, `np.save(file, buffer.flat)` the memory.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> params = fs.FlatBuffer.pack({"w": np.ones((2, 3), np.float32), "b": np.zeros(3, "f4")})
        >>> params["w"][0, 0] = 5
        >>> params
        FlatBuffer(2 arrays, 9 elements, float32, 256 bytes)
        >>> grads = params.zeros_like()
        >>> {name: view.shape for name, view in grads.items()}
        {'w': (2, 3), 'b': (3,)}
    """

    __slots__ = ("_flat", "_layout", "_views")

    _layout: Layout
    _flat: Array
    _views: dict[Key, Array]

    def __init__(self, *args: Any, **keywords: Any) -> None:
        raise TypeError(
            "FlatBuffer must be made by pack (from arrays), zeros (from shapes) or over (on memory"
            " of your own), as FlatBuffer.pack({...}), got a call of the class"
        )

    @classmethod
    def _of(cls, layout: Layout, flat: Array) -> FlatBuffer:
        """A buffer of a layout and the memory that fits it."""
        self = cls.__new__(cls)
        self._layout = layout
        self._flat = flat
        self._views = {
            key: flat[at : at + prod(shape)].reshape(shape)
            for (key, shape), at in zip(layout.shapes.items(), layout.offsets, strict=True)
        }
        return self

    @classmethod
    def pack(
        cls,
        arrays: Mapping[str, Any] | Iterable[Any],
        *,
        dtype: DTypeLike | None = None,
        huge_pages: bool | None = None,
    ) -> FlatBuffer:
        """Copies `arrays` into a new buffer.

        Args:
            arrays: a dict of arrays, which keep their names, or a sequence, numbered from 0. In
                dicts inside it they are named by their path: `{"dense": {"bias": b}}` gives
                "dense.bias".
            dtype: converts them; without it they must all have one dtype, and keep it.
            huge_pages: overrides `fusedstep.huge_pages()` for this buffer.

        Raises:
            TypeError: something is not an array, or the dtypes differ or are not supported.
        """
        if is_array(arrays):
            raise TypeError("arrays must be a dict or a sequence of arrays, got one array")
        if isinstance(arrays, Mapping):
            arrays = flattened(arrays, "arrays")
        items = arrays.items() if isinstance(arrays, Mapping) else enumerate(arrays)
        given: dict[Key, Array] = {k: as_array(a, f"arrays[{k}]") for k, a in items}
        if dtype is None:
            found = {a.dtype for a in given.values()}
            if len(found) > 1:
                listed = ", ".join(f"{k}: {a.dtype.name}" for k, a in list(given.items())[:8])
                raise TypeError(f"arrays must share one dtype unless dtype= is given, got {listed}")
            if given:
                first = next(iter(given))
                as_dtype(given[first].dtype, f"arrays[{first}]")
            dtype = found.pop() if found else np.float32
        buffer = cls.zeros({k: a.shape for k, a in given.items()}, dtype, huge_pages=huge_pages)
        for key, array in given.items():
            buffer[key][...] = array
        return buffer

    @classmethod
    def zeros(
        cls,
        shapes: Any,
        dtype: DTypeLike = np.float32,
        *,
        huge_pages: bool | None = None,
    ) -> FlatBuffer:
        """A buffer of zeros.

        Args:
            shapes: a dict of shapes, or a sequence of them, numbered from 0.
            dtype: float32, float64, float16 or bfloat16.
            huge_pages: overrides `fusedstep.huge_pages()` for this buffer.

        Raises:
            TypeError, ValueError: a dtype that no kernel takes; a shape that is not integers >= 0.
            ModuleNotFoundError: bfloat16 without ml_dtypes.
            MemoryError: the system does not grant the bytes, which the message gives.
        """
        return cls._allocate(Layout(_as_shapes(shapes, "shapes")), as_dtype(dtype), huge_pages)

    @classmethod
    def _allocate(
        cls, layout: Layout, dtype: np.dtype[Any], huge_pages: bool | None = None
    ) -> FlatBuffer:
        nbytes = layout.n * dtype.itemsize
        huge = _runtime.huge_pages() if huge_pages is None else huge_pages
        try:
            memory = _core.allocate(min(nbytes, sys.maxsize), huge)
        except MemoryError:
            raise MemoryError(f"shapes take {nbytes} bytes, more than the system grants") from None
        return cls._of(layout, memory.view(dtype))

    # For checkers, which are to miss `shapes` as much as we do.
    @overload
    @classmethod
    def over(cls, memory: Array, shapes: FlatBuffer) -> FlatBuffer: ...
    @overload
    @classmethod
    def over(cls, memory: Array, shapes: Iterable[Any]) -> FlatBuffer: ...
    @classmethod
    def over(cls, memory: Array, shapes: Any = None) -> FlatBuffer:
        """A buffer on the caller's memory, whose values it keeps: nothing is copied or cleared.

        The buffer starts at the first 64-byte boundary of `memory`, which for `np.memmap` and
        other page-aligned memory is its first element. `np.memmap` keeps a training state on disk.
        Each array begins at such a boundary: a flat vector of arrays side by side, as other
        programs have it, is one array to an optimizer, `fs.SGD(vector)`, with the same steps.

        Args:
            memory: a contiguous 1-D array of a supported dtype, at least `FlatBuffer.n_for(shapes)`
                elements from its first 64-byte boundary on. Read-only memory makes read-only views.
            shapes: as for `zeros`, or a FlatBuffer whose shapes to take. Needed, as they say what
                lies where.

        Raises:
            TypeError, ValueError: memory of another kind, shape, layout or dtype, or too small.

        Example:
            >>> import numpy as np, fusedstep as fs
            >>> memory = np.zeros(fs.FlatBuffer.n_for([(2, 3), 4]) + 16, np.float32)
            >>> buffer = fs.FlatBuffer.over(memory, [(2, 3), 4])
            >>> buffer[1] = 5.0
            >>> int(memory.sum())
            20
        """
        if not isinstance(memory, np.ndarray):
            raise TypeError(f"memory must be a NumPy array, got {type(memory).__name__}")
        shapes = _as_shapes(shapes, "shapes")
        memory = as_array(memory, "memory")
        dtype = as_dtype(memory.dtype, "memory.dtype")
        if memory.ndim != 1 or not memory.flags.c_contiguous or not memory.flags.aligned:
            raise ValueError(
                f"memory must be one-dimensional, contiguous and aligned, got shape {memory.shape}"
                f" with strides {memory.strides}"
            )
        layout = Layout(shapes)
        address = memory.__array_interface__["data"][0]
        skip = -address % _core.ALIGNMENT // dtype.itemsize
        if memory.size < layout.n + skip:
            raise ValueError(
                f"memory must have at least {layout.n + skip} elements ({skip} to the first 64-byte"
                f" boundary, and each array begins at one), got {memory.size}: step a vector of"
                " arrays side by side as one array, or FlatBuffer.pack them"
            )
        return cls._of(layout, memory[skip : skip + layout.n])

    @staticmethod
    def n_for(shapes: Any) -> int:
        """The number of elements, gaps included, that a buffer of these shapes takes."""
        return Layout(_as_shapes(shapes, "shapes")).n

    def zeros_like(
        self, dtype: DTypeLike | None = None, *, huge_pages: bool | None = None
    ) -> FlatBuffer:
        """A buffer of zeros with the same names, shapes and offsets, for gradients or states."""
        found = self.dtype if dtype is None else as_dtype(dtype)
        return self._allocate(self._layout, found, huge_pages)

    def copy(self, *, huge_pages: bool | None = None) -> FlatBuffer:
        """A buffer of its own memory with the same names, shapes and values."""
        result = self._allocate(self._layout, self.dtype, huge_pages)
        result._flat[...] = self._flat
        return result

    def add_(self, other: Any, scale: SupportsFloat = 1.0) -> FlatBuffer:
        """Adds `scale * other` to the arrays in place, in one pass, rounded once: accumulation.

        With the same bits on every instruction set and number of threads, whatever the dtypes are:
        read as float32, or as float64 in a float64 buffer, and stored in the buffer's own.

        Args:
            other: a FlatBuffer of the same shapes, which is the fastest; a dict of arrays of the
                buffer's names; or a sequence in its order. None adds nothing to that array.
            scale: a finite number (default 1).

        Returns:
            The buffer itself.

        Raises:
            TypeError, ValueError: an array is missing, of a wrong shape, dtype or layout, or
                overlaps the buffer; nothing has changed then.

        Example:
            >>> import numpy as np, fusedstep as fs
            >>> grads = fs.FlatBuffer.zeros({"w": 2})
            >>> for _ in range(2):
            ...     _ = grads.add_({"w": np.array([1, 3], np.float16)}, scale=0.5)
            >>> grads["w"]
            array([1., 3.], dtype=float32)
        """
        if isinstance(other, FlatBuffer) and other._layout == self._layout:
            add({"flat": self._flat}, [other._flat], scale, "buffer")
        else:
            add(self._views, in_order(self._views, other, "other"), scale, "buffer")
        return self

    @property
    def flat(self) -> Array:
        """The whole memory as one 1-D array, the zero gaps between the arrays included."""
        return self._flat

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype that all arrays share."""
        return self._flat.dtype

    @property
    def shapes(self) -> dict[Key, tuple[int, ...]]:
        """The shape of each array."""
        return dict(self._layout.shapes)

    @property
    def n(self) -> int:
        """The number of elements in the arrays, gaps not included."""
        return sum(prod(shape) for shape in self._layout.shapes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the whole memory, gaps included."""
        return int(self._flat.nbytes)

    def __getitem__(self, key: Key) -> Array:
        try:
            return self._views[key]
        except KeyError:
            raise KeyError(f"no array named {key!r}; there are {list(self._views)[:8]}") from None

    def __setitem__(self, key: Key, value: Any) -> None:
        view = self[key]
        array = as_values(value, "value")
        if array.ndim and array.shape != view.shape:
            raise ValueError(f"value for [{key}] must have shape {view.shape}, got {array.shape}")
        view[...] = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        # NumPy would make an array of the names.
        raise TypeError(
            "array must be one array, got a FlatBuffer, which is several: use buffer.flat, all of"
            " them with the gaps between, or each by name, as in np.savez(file, **buffer)"
        )

    def __iter__(self) -> Iterator[Key]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __contains__(self, key: object) -> bool:
        return key in self._views

    def __eq__(self, other: object) -> bool:
        return self is other  # as arrays do not compare to one truth value

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return (
            f"FlatBuffer({len(self)} arrays, {self.n} elements, {self.dtype.name},"
            f" {self.nbytes} bytes)"
        )

    def __copy__(self) -> FlatBuffer:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> FlatBuffer:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (dict(self._layout.shapes), self.dtype.name, dict(self._views))


def _unpickle(shapes: Shapes, dtype: str, arrays: dict[Key, Array]) -> FlatBuffer:
    buffer = FlatBuffer.zeros(shapes, dtype)
    for key, array in arrays.items():
        buffer[key][...] = array
    return buffer
