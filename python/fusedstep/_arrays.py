"""Arrays of NumPy, torch, CuPy, Numba and whatever exports DLPack.

Outside fusedstep.torch the only module that knows them apart.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import zip_longest
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fusedstep import _core, _gpu
from fusedstep._layout import Layout
from fusedstep._types import Grads, Key, Params

DTYPES = tuple(_core.formats())  # that parameters and gradients may have

_CUDA = (2, 13)  # DLPack's device types: a GPU's memory, and managed memory


def as_float(value: Any) -> float | None:
    """A number of any kind, 0-d arrays and tensors included, as a float; None for all else."""
    if hasattr(value, "detach"):  # a torch tensor, which warns when one under autograd is read
        value = value.detach()
    dtype = str(getattr(value, "dtype", ""))
    if "bool" in dtype or "complex" in dtype:
        return None
    if isinstance(value, str | bytes | bool | np.bool_ | list | tuple):
        return None
    try:
        return None if np.ndim(value) else float(value)
    except (TypeError, ValueError, RuntimeError):  # torch's, of a tensor without memory
        return None
    except OverflowError:
        return math.inf


def as_index(value: Any) -> int | None:
    """An integer of any kind as an int; None for a bool, an array or anything else."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return None if getattr(value, "ndim", 0) else operator.index(value)
    except TypeError:
        return None


def as_dtype(dtype: DTypeLike, name: str = "dtype") -> np.dtype[Any]:
    """`dtype` as NumPy's, `"bfloat16"` included; TypeError for one that no kernel takes."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        dtype = numpy_dtype("bfloat16", f"{name}='bfloat16' needs")
    if dtype is None:
        raise TypeError(f"{name} must be {', '.join(DTYPES)}, got None")
    try:
        result: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"{name} must be {', '.join(DTYPES)}, got {dtype!r}") from None
    if not result.isnative:
        raise ValueError(f"{name} must be in native byte order, got {result!r}")
    if result.name not in DTYPES:
        raise TypeError(f"{name} must be {', '.join(DTYPES)}, got {result.name}")
    return result


def numpy_dtype(name: str, needs: str = "") -> np.dtype[Any]:
    """NumPy's dtype of a name, or ml_dtypes', or ModuleNotFoundError, which says what needs it."""
    if not name.startswith(("bfloat", "float8")):
        return np.dtype(name)
    try:  # also where NumPy knows the name, as it does once ml_dtypes was imported
        import ml_dtypes
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{needs or f'{name} arrays need'} ml_dtypes: pip install 'fusedstep[bfloat16]'",
            name="ml_dtypes",
        ) from error
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


def as_array(value: Any, name: str) -> NDArray[Any]:
    """A NumPy view of `value`, a NumPy array, torch CPU tensor or DLPack exporter; never a copy.

    It is read-only where nothing says that the memory may be written.
    """
    array, is_bfloat16 = _core.array_of(value, name)
    return array.view(as_dtype("bfloat16", name)) if is_bfloat16 else array


def as_values(value: Any, name: str) -> NDArray[Any]:
    """`as_array` of an array, NumPy's conversion of anything else."""
    exports = isinstance(value, np.ndarray) or hasattr(value, "__dlpack__")
    return as_array(value, name) if exports else np.asarray(value)


def is_array(thing: Any) -> bool:
    """Whether it is one array or NumPy scalar, not several."""
    exports = hasattr(thing, "__dlpack__") or hasattr(thing, "__cuda_array_interface__")
    return isinstance(thing, np.ndarray | np.generic) or exports


def flattened(arrays: Mapping[Any, Any], label: str) -> Mapping[Any, Any]:
    """A dict without dicts and lists in it: `{"layers": [{"bias": b}]}` as `{"layers.0.bias": b}`.

    Flax' and MLX' trees of parameters are such.

    Raises:
        ValueError: two arrays would have one name.
    """
    if not any(map(_is_tree, arrays.values())):
        return arrays
    found: dict[Key, Any] = {}

    def put(inside: Iterable[tuple[Key, Any]], path: tuple[Key, ...]) -> None:
        for key, value in inside:
            name = ".".join(map(str, (*path, key))) if path else key
            if _is_tree(value):
                put(value.items() if isinstance(value, Mapping) else enumerate(value), (*path, key))
            elif name in found:
                raise ValueError(f"{label} must have distinct names, got {name!r} twice")
            else:
                found[name] = value

    put(arrays.items(), ())
    return found


def _is_tree(thing: Any) -> bool:
    """Whether it is a dict, or a list of arrays, dicts and lists."""
    if isinstance(thing, Mapping):
        return True
    return isinstance(thing, list | tuple) and all(_is_tree(one) or is_array(one) for one in thing)


def check_no_array(things: Any, label: str) -> None:
    """TypeError for an array that is no memory, of which to iterate would make copies."""
    if hasattr(things, "dtype") and hasattr(things, "shape"):
        kind, library = type(things).__name__, type(things).__module__.partition(".")[0]
        raise TypeError(
            f"{label} must be an array in memory, or a sequence or dict of them, got {kind} of"
            f" {library}: read it into a NumPy array, and write that back"
        )


def name_params(params: Params) -> dict[Key, Any]:
    """Parameters in any form that an optimizer takes, by name or number."""
    if isinstance(params, Mapping):
        params = flattened(params, "params")
        named = dict(params.items())
        _check_lasting(params, named, map(params.__getitem__, named))
    elif is_array(params):
        named = {0: params}
    elif isinstance(params, Iterable) and not isinstance(params, str | bytes):
        check_no_array(params, "params")
        once = iter(params)
        named = dict(enumerate(once))
        if once is not params:  # an iterator can be asked only once
            _check_lasting(params, named, params)
    else:
        raise TypeError(
            "params must be an array, a FlatBuffer, or a sequence or dict of arrays,"
            f" got {type(params).__name__}"
        )
    if len({str(key) for key in named}) < len(named):
        raise ValueError(f"params must have distinct names, got {list(named)[:8]}")
    return named


def _check_lasting(params: Params, named: Mapping[Key, Any], again: Iterable[Any]) -> None:
    """Raises ValueError where `again` gives other arrays: training would move copies of ours.

    So do `np.load` of an .npz file, `shelve`, and the rows of a dataset in a file.
    """
    for key, first, second in zip_longest(named, named.values(), again):
        arrays = is_array(first) + is_array(second)
        if second is first or not arrays:  # of what is none the core says so
            continue
        if arrays == 1 or _core.address_of(first) != _core.address_of(second):
            kind = "dict" if isinstance(params, Mapping) else "list"
            raise ValueError(
                "params must give the same arrays each time it is asked, got a"
                f" {type(params).__name__} that makes params[{key}] anew: train the arrays of"
                f" {kind}(params), and store them afterwards"
            )


def in_order(params: Mapping[Key, Any], grads: Grads, name: str = "grads") -> Sequence[Any]:
    """Gradients in any form that `step` takes, as a sequence in the parameters' order."""
    if isinstance(grads, Mapping):
        grads = flattened(grads, name)
        if grads.keys() != params.keys():
            missing = [key for key in params if key not in grads][:8]
            extra = [key for key in grads if key not in params][:8]
            raise ValueError(
                f"{name} must have the names of params, got missing {missing}, unknown {extra}"
            )
        return [grads[key] for key in params]
    if isinstance(grads, list | tuple):
        return grads
    shapes = [getattr(p, "shape", None) for p in params.values()] if len(params) == 1 else []
    if grads is None or is_array(grads) or (type(grads) in (float, int) and shapes == [()]):
        return [grads]
    check_no_array(grads, name)
    if isinstance(grads, Iterable) and not isinstance(grads, str | bytes):
        return list(grads)
    raise TypeError(
        f"{name} must be an array, a FlatBuffer, or a sequence or dict of arrays,"
        f" got {type(grads).__name__}"
    )


def loaded_torch() -> Any:
    """torch where it has been imported, as it is where there is a tensor; else None."""
    return sys.modules.get("torch")


def is_traced(value: Any) -> bool:
    """Whether a value is known only as a program of JAX runs."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


def is_tensor(thing: Any) -> bool:
    """Whether it is a torch tensor."""
    torch = loaded_torch()
    return torch is not None and isinstance(thing, torch.Tensor)


def is_versioned(thing: Any) -> bool:
    """Whether it counts the writes to it: a tensor of torch or Paddle."""
    paddle = sys.modules.get("paddle")
    return is_tensor(thing) or (paddle is not None and isinstance(thing, paddle.Tensor))


def as_tensors(entry: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state in tensors."""
    torch = loaded_torch()
    result = {}
    for name, value in entry.items():
        if isinstance(value, np.ndarray) and value.dtype.name == "bfloat16":
            result[name] = torch.from_numpy(value.view(np.int16)).view(torch.bfloat16)
        elif isinstance(value, np.ndarray):
            result[name] = torch.from_numpy(value)
        elif isinstance(value, Array):
            result[name] = torch.as_tensor(value, device=value.device)
        else:  # torch's float32 where that is exact
            exact = name == "step" and value <= 2**24
            dtype = torch.float32 if exact else torch.float64
            result[name] = torch.tensor(float(value), dtype=dtype, device="cpu")
    return result


def announcer() -> Callable[[list[Any]], None]:
    """What raises the version of tensors, so that a stale backward raises, and not lies."""
    if "paddle" not in sys.modules:
        return _torch_announcer()

    def announce(tensors: list[Any]) -> None:
        of_torch = []
        for tensor in tensors:
            if is_tensor(tensor):
                of_torch.append(tensor)
            else:
                tensor._bump_inplace_version()
        if of_torch:
            _torch_announcer()(of_torch)

    return announce


@cache
def _torch_announcer() -> Callable[[list[Any]], None]:
    """The one in C where there is: no signal's handler runs inside it."""
    torch = loaded_torch()
    public = torch.autograd.graph.increment_version
    for found in (getattr(torch._C, "_increment_version", public), public):
        try:
            found([])
        except (TypeError, RuntimeError):  # torch before 2.6 takes one tensor at a time
            continue
        return found  # type: ignore[no-any-return]  # torch is not followed

    def one_by_one(tensors: list[Any]) -> None:
        for tensor in tensors:
            public(tensor)

    return one_by_one


def index_of(array: Any, label: str = "params") -> int | None:
    """The CUDA device whose memory an array, which errors call `label`, is in; else None."""
    if isinstance(array, np.ndarray | Array):
        return None if isinstance(array, np.ndarray) else array.index
    if hasattr(array, "__dlpack_device__"):
        try:
            kind, index = array.__dlpack_device__()
        except (ValueError, BufferError, TypeError):  # torch's meta, JAX's deleted: the core says
            return None
        return int(index) if int(kind) in _CUDA else None
    try:
        address = array.__cuda_array_interface__["data"][0]
    except (AttributeError, KeyError, TypeError):  # none, or one that the core says is wrong
        return None
    return int(_gpu.needed(label, "of a GPU").index_of(address)) if address else 0


def stream_of(array: Any, index: int) -> int:
    """The stream on which the array's own library works at the moment; 0 is CUDA's default."""
    cupy = sys.modules.get("cupy")
    if is_tensor(array):
        return int(loaded_torch().cuda.current_stream(index).cuda_stream)
    if cupy is not None and isinstance(array, cupy.ndarray):
        with cupy.cuda.Device(index):
            return int(cupy.cuda.get_current_stream().ptr)
    shown = getattr(array, "__cuda_array_interface__", None)
    stream = shown.get("stream") if isinstance(shown, dict) else None
    return 0 if stream in (None, 1) else int(stream)


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


def is_module(thing: Any) -> bool:
    """Whether it is a torch module."""
    torch = loaded_torch()
    return torch is not None and isinstance(thing, torch.nn.Module)


def loads_as_torch(module: Any) -> bool:
    """Whether a torch module loads by torch's own code alone, which refuses nothing that fits."""
    methods = ("load_state_dict", "_load_from_state_dict", "set_extra_state")
    return not any(
        one._load_state_dict_pre_hooks
        or one._load_state_dict_post_hooks
        or any(not getattr(type(one), name).__module__.startswith("torch.") for name in methods)
        for one in module.modules()
    )


def is_torch_generator(thing: Any) -> bool:
    """Whether it is a torch random generator."""
    torch = loaded_torch()
    return torch is not None and isinstance(thing, torch.Generator)


def is_torch_s(thing: Any) -> bool:
    """Whether it is of a class of torch's, or of one derived from it: its state is in tensors."""
    return any(cls.__module__.partition(".")[0] == "torch" for cls in type(thing).__mro__)


def is_size(thing: Any) -> bool:
    """Whether it is a shape of torch's."""
    torch = loaded_torch()
    return torch is not None and type(thing) is torch.Size


def dtype_and_shape(array: Any) -> tuple[str, tuple[int, ...]]:
    """The name of an array's dtype, and its shape."""
    dtype = array.dtype
    name = dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")
    return name, tuple(array.shape)


def check_plain(tensor: Any, label: str) -> str:
    """The name of a tensor's dtype; TypeError for one that is not all its values in memory here."""
    torch = loaded_torch()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"{label} must be a dense tensor, got a DTensor; torch.distributed.checkpoint saves"
            " what is sharded"
        )
    if torch.nn.parameter.is_lazy(tensor):
        raise TypeError(f"{label} must be initialized, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        kind = "a nested tensor" if tensor.is_nested else f"{tensor.layout} on {tensor.device}"
        raise TypeError(f"{label} must be a dense tensor, got {kind}")
    if tensor.is_quantized or dtype in ("complex32", "float4_e2m1fn_x2"):
        raise TypeError(f"{label} must be of a dtype that files have, got {dtype}")
    return dtype


def as_plain(value: Any, label: str) -> tuple[str, tuple[int, ...], Any]:
    """An array of any library: its dtype's name, its shape, and its values in a dtype as wide.

    Those on a GPU, if not complex, are a function that returns them.
    """
    if is_tensor(value):
        dtype = check_plain(value, label)
        torch = loaded_torch()

        def plain() -> Any:
            tensor = value.detach().cpu().resolve_conj().resolve_neg()
            if dtype.startswith(("bfloat", "float8")):
                tensor = tensor.view(torch.int16 if tensor.itemsize == 2 else torch.uint8)
            return tensor.numpy()

        late = value.device.type != "cpu" and not value.is_complex()
        return dtype, tuple(value.shape), plain if late else plain()
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{label} must be an array without a mask, got MaskedArray")
    dtype, shape = dtype_and_shape(value)
    if isinstance(value, Array):
        return dtype, shape, value.copy
    array = np.asarray(to_host(value))
    if not array.dtype.isnative:
        raise TypeError(f"{label} must be in native byte order, got {array.dtype!r}")
    return dtype, array.shape, array


def tensor_over(values: np.ndarray[Any, Any], dtype: str, shape: tuple[int, ...]) -> Any:
    """A torch tensor over an array's bytes."""
    torch = loaded_torch()
    if not values.flags.writeable:  # a mapping: torch (2.4.0 to 2.14.1) writes to it, and crashes
        values = values.copy()
    return torch.from_numpy(values).view(getattr(torch, dtype)).reshape(shape)


def _overlaps_itself(shape: Sequence[int], strides: Sequence[int], width: int = 1) -> bool:
    """Whether elements of an array share memory, of which each is `width` wide."""
    dims = [(abs(step), n) for n, step in zip(shape, strides, strict=True) if n > 1]
    reach = width
    for step, n in sorted(dims):
        if step < reach:  # each dimension steps over all that the smaller ones span, or may not
            break
        reach += (n - 1) * step
    else:
        return False
    if 0 in shape or min(dims)[0] == 0:
        return 0 not in shape
    places = np.zeros(1, np.int64)
    for step, n in dims:
        places = np.add.outer(places, step * np.arange(n)).reshape(-1)
    return bool((np.diff(np.sort(places)) < width).any())


def check_alone(label: str, shape: Any, strides: Any, width: int = 1) -> None:
    """ValueError for an array whose elements share memory."""
    if _overlaps_itself(shape, strides, width):
        raise ValueError(
            f"{label} must have memory of its own for each element, got shape {tuple(shape)} with"
            f" strides {tuple(strides)}"
        )


def writer(target: Any, label: str) -> Callable[[np.ndarray[Any, Any]], None]:
    """A function that writes an array's bytes, in C order, into an array of any library.

    Raises:
        TypeError, ValueError: it cannot be written.
    """
    if is_tensor(target):  # one that is not initialized has not even a shape
        check_plain(target, label)
    dtype, shape = dtype_and_shape(target)
    if is_tensor(target):
        torch = loaded_torch()
        check_alone(label, shape, target.stride())
        if target.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{label} must be writable, got a tensor of inference mode")

        def put(values: np.ndarray[Any, Any]) -> None:
            with torch.no_grad():
                target.copy_(tensor_over(values, dtype, shape))

        return put
    if hasattr(target, "set") and index_of(target) is not None:  # CuPy's
        return lambda values: target.set(values.view(dtype).reshape(shape))
    if isinstance(target, Array):
        return lambda values: target.__setitem__(..., values.view(target.dtype).reshape(shape))
    array = target if isinstance(target, np.ndarray) else as_array(target, label)
    if not isinstance(array, np.ndarray) or not array.flags.writeable:
        raise ValueError(f"{label} must be writable, got a read-only array")
    check_alone(label, shape, array.strides, array.itemsize)
    return lambda values: np.copyto(array, values.view(array.dtype).reshape(shape))


def _bytes(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A contiguous array's memory: buffers have no word for bfloat16."""
    return array.reshape(-1).view(np.uint8)


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
        self._memory = _gpu.needed("state").Allocation(nbytes, index) if memory is None else memory

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
        self._memory.read(self._offset, _bytes(result))
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
        self._memory.write(self._offset, _bytes(values))

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
    layout = Layout(shapes)
    flat = Array((layout.n,), dtype, index)
    return {
        key: flat.view(at, shape)
        for (key, shape), at in zip(shapes.items(), layout.offsets, strict=True)
    }


def _restored(values: np.ndarray[Any, Any], index: int) -> Array:
    result = Array(values.shape, values.dtype, index)
    result[...] = values
    return result


_gpu._restored = _restored  # type: ignore[attr-defined]  # where pickles of 0.1.0 look for it
