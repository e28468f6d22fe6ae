"""Checkpoints in files: arrays, optimizers and what else a run needs, in one safetensors file.

A file is a tree of names: those that `save` was given, and below them what they hold. Arrays become
tensors of the file, called by their path in the tree, as `optimizer.state.0.exp_avg`; the tree
itself is JSON in the header, where the format has a place for text.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fusedstep import _arrays, _safetensors
from fusedstep._safetensors import CODES, DTYPES, Contents, Tensor, check_name, shown
from fusedstep._turn import Turn
from fusedstep._version import __version__
from fusedstep.buffers import FlatBuffer

__all__ = ["Saved", "load", "save"]


def __dir__() -> list[str]:
    return sorted(__all__)


_VERSION = 1  # of the tree; files of a later one are refused
_DEEPEST = 64  # levels of a tree
_BITS = 14_000  # of an integer: Python reads no more than 4300 digits
_TREE = "fusedstep"


class Saved(dict[str, Any]):
    """What a file holds, by the names that `save` was given: of `load`.

    Attributes:
        metadata: the dict that `save` was given.
        step: the most updates that an optimizer in it has taken; None without optimizers.
    """

    metadata: dict[Any, Any]
    step: int | None


def save(
    path: str | os.PathLike[str], /, *, metadata: Mapping[Any, Any] | None = None, **named: Any
) -> None:
    """Writes a run, or a part of it, to one safetensors file that cannot be lost half way.

    The file is written beside its place, flushed to the disk, and renamed into it: whenever the
    process dies, or the disk is full, the old file or the new one is there, whole. A digest of
    each 4 MiB, and of the header, tells when one byte has changed since. Arrays are written from
    where they lie, in pieces: a save takes 13 MiB of memory, and that of the largest array on a
    GPU; complex and conjugated arrays are copied first where they are strided. (On Windows a file
    cannot be replaced while arrays of it that were loaded are in use.)

    Our optimizers, also those in dicts and lists, step in no other thread meanwhile. Other threads
    that write to the arrays must be kept from it: the file would have some of the old values and
    some of the new.

    Any program that reads safetensors reads the arrays: `params.w`, `optimizer.state.0.exp_avg`,
    and so on, in the dtypes that they have.

    Args:
        path: of the file. One that is there is replaced; a link to it stays.
        metadata: a dict of your own, about the run, of what `named` may hold (default None).
        **named: what to save, by names of yours. Each an array of any layout (NumPy, torch, CuPy,
            what exports DLPack), a FlatBuffer, an optimizer or anything else with `state_dict` and
            `load_state_dict`, a `numpy.random.Generator`, or a number, string, None, or a dict,
            list or tuple of all these. `fusedstep.torch.save` takes modules too.

    Raises:
        TypeError: something of another kind, or an array of a dtype that safetensors has not; the
            message has its path.
        ValueError: no name, one that could be a path's (`"../w"`), or `path` is not a file's.
        OSError: the system cannot write it (no space, no right); the old file is as it was, unless
            all but the folder's own flush to the disk was done.
        RuntimeError: an optimizer is stepping in another thread.

    Example:
        >>> import os, tempfile, numpy as np, fusedstep as fs
        >>> params = fs.FlatBuffer.pack({"w": np.ones(3, np.float32)})
        >>> opt = fs.AdamW(params, lr=fs.schedules.Cosine(0.1, total=100))
        >>> _ = opt.step({"w": np.ones(3, np.float32)})
        >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
        >>> fs.save(path, params=params, optimizer=opt, epoch=7)
        >>> params["w"][...] = 0
        >>> saved = fs.load(path, params=params, optimizer=opt)
        >>> print(params["w"], opt.steps, saved["epoch"])
        [0.899 0.899 0.899] 1 7
    """
    if not named:
        raise ValueError("named must have something to save, as params=params, got nothing")
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"metadata must be a dict, got {type(metadata).__name__}")
    for name in named:
        check_name("named", name)
    # Nobody steps while the arrays are written.
    held: Callable[[], None] = functools.partial(_write, path, named, metadata or {})
    for turn in dict.fromkeys(_turns(named)):
        held = functools.partial(turn.read, held)
    held()


def load(path: str | os.PathLike[str], /, **named: Any) -> Saved:
    """Reads a file of `save`, and fills the objects that it is given, in place.

    The file is mapped and checked, all of it, before anything changes. What is not given is
    returned as the file has it: arrays in a mapping of the file, which cost no memory until they
    are written to (the file stays as it is), optimizers as their state_dict. While such arrays are
    in use the file may be replaced, as `save` does, but not cut or written over in place: a process
    that reads what is no longer there is ended by its system.

    Args:
        path: of the file, of `fusedstep.save` or `fusedstep.torch.save`.
        **named: objects to fill, by the names that they were saved under: arrays and FlatBuffers of
            the same shapes and dtypes, optimizers and other things with `load_state_dict`, random
            generators, dicts and lists of them, in which numbers and strings are replaced.

    Returns:
        All names of the file, with the given objects under theirs, and the rest as in the file.
        Its attributes are `metadata` and `step`.

    Raises:
        TypeError, ValueError: the file is not whole, or not of `save`, or does not fit what is
            given; the message has what and where. Nothing has changed then.
        OSError: the file cannot be opened.

    Example:
        >>> import os, tempfile, numpy as np, fusedstep as fs
        >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
        >>> fs.save(path, w=np.arange(3), metadata={"seed": 1})
        >>> saved = fs.load(path)
        >>> saved["w"], saved.metadata, saved.step
        (array([0, 1, 2]), {'seed': 1}, None)
    """
    return filled(path, named, as_numpy)


class Kind(NamedTuple):
    """Objects that are more than a tree of arrays and numbers: how a file has them."""

    tag: str  # in the tree
    fits: Callable[[Any], bool]
    taken: Callable[[Any], Any]  # the object -> the tree that a file has of it
    filled: Callable[[str, Any, Any], list[Filling]]  # label, object, tree -> how it is filled


class Filling(NamedTuple):
    """One part of filling what `load` was given, of which all that can be checked has been."""

    fill: Callable[[], None]
    undo: Callable[[], None] | None = None  # of what may still refuse; None of what cannot
    late: bool = False  # whether it looks at what an optimizer has loaded


class Leaf:
    """An array of a file's tree."""

    def __init__(self, tensor: Tensor, is_complex: bool, is_scalar: bool, is_tensor: bool) -> None:
        self.tensor = tensor
        self.is_complex = is_complex  # whether its last dimension is real and imaginary part
        self.is_scalar = is_scalar  # whether it was a NumPy scalar
        self.is_tensor = is_tensor  # whether it was a tensor of torch's

    def __repr__(self) -> str:
        return f"an array of {self.dtype}, shape {self.shape}"

    @property
    def dtype(self) -> str:
        """Its dtype's name."""
        name = DTYPES[self.tensor.code]
        return f"complex{2 * int(name.removeprefix('float'))}" if self.is_complex else name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.tensor.shape[:-1] if self.is_complex else self.tensor.shape


def as_numpy(leaf: Leaf) -> Any:
    """A NumPy array, or scalar, in the file's pages."""
    array = leaf.tensor.values.view(_arrays.numpy_dtype(leaf.dtype)).reshape(leaf.shape)
    return array[()] if leaf.is_scalar else array


def as_tensor(leaf: Leaf) -> Any:
    """A torch tensor in the file's pages."""
    return _arrays.tensor_over(leaf.tensor.values, leaf.dtype, leaf.shape)


def as_saved(leaf: Leaf) -> Any:
    """A copy of the kind that was saved: what objects keep does not lie in a file."""
    return as_tensor(leaf).clone() if leaf.is_tensor else as_numpy(leaf).copy()


def as_own_tensor(leaf: Leaf) -> Any:
    """A torch tensor that does not lie in a file."""
    return as_tensor(leaf).clone()


# -- objects to trees ------------------------------------------------------------------------------


class _Packer:
    """Makes JSON of a tree, and collects its arrays."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.steps: list[int] = []
        self.called: dict[Any, str] = {}  # the parameters of an optimizer, by number
        self.counts: Counter[str] = Counter()  # of arrays whose paths are written the same

    def pack(self, label: str, value: Any, path: tuple[str, ...]) -> Any:
        """The JSON of a value, which errors call `label`."""
        if len(path) > _DEEPEST:
            raise ValueError(f"{label} must be at most {_DEEPEST} levels deep")
        if type(value) is int and value.bit_length() > _BITS:
            raise ValueError(f"{label} must be of at most {_BITS} bits, got {value.bit_length()}")
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        for kind in _KINDS:
            if kind.fits(value):
                return {kind.tag: self._state(label, kind.taken(value), path)}
        if isinstance(value, FlatBuffer):
            value = dict(value)
        if type(value) in (dict, OrderedDict, Counter):
            return self._mapping(label, value, path)
        if type(value) in (list, tuple) or _arrays.is_size(value):
            items = [
                self.pack(f"{label}[{i}]", one, (*path, str(i))) for i, one in enumerate(value)
            ]
            return items if type(value) is list else {"tuple": items}
        if _arrays.is_array(value):
            return self._array(label, value, path)
        raise TypeError(
            f"{label} must be an array, something with state_dict and load_state_dict, a number, a"
            f" string, None, or a dict, list or tuple of these, got {type(value).__name__}"
        )

    def _state(self, label: str, state: Any, path: tuple[str, ...]) -> Any:
        if isinstance(state, dict) and isinstance(state.get("param_groups"), list):
            own = state.get("state")
            entries = own.values() if isinstance(own, dict) else ()
            counts = [
                _arrays.as_float(one["step"])
                for one in (state, *entries)
                if isinstance(one, dict) and "step" in one
            ]
            known = [one for one in counts if one is not None and math.isfinite(one)]
            self.steps.append(int(max(known, default=0)))
            for group in state["param_groups"]:  # which states have the names of
                if isinstance(group, dict):
                    names = group.get("param_names") or ()
                    self.called.update(zip(group.get("params", ()), names, strict=False))
        packed = self.pack(label, state, path)
        self.called = {}
        return packed

    def _mapping(self, label: str, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        items = []
        called = self.called if path[-1:] == ("state",) else {}
        for key, one in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{label} must have strings and integers as keys, got {key!r}")
            items.append(
                (key, self.pack(f"{label}[{key!r}]", one, (*path, called.get(key, str(key)))))
            )
        if type(value) is Counter:
            return {"counter": items}
        return {"dict": dict(items)} if all(type(key) is str for key in value) else {"items": items}

    def _array(self, label: str, value: Any, path: tuple[str, ...]) -> Any:
        dtype, shape, array = _arrays.as_plain(value, label)
        packed: dict[str, Any] = {}
        if dtype.startswith("complex"):
            real = array.real.dtype
            array = np.asarray(array, order="C")[..., None].view(real)
            dtype, shape, packed["complex"] = real.name, array.shape, True
        if isinstance(value, np.generic):
            packed["scalar"] = True
        if _arrays.is_tensor(value):
            packed["torch"] = True
        if dtype not in CODES:
            raise TypeError(
                f"{label} must be of {', '.join(CODES)}, complex64, complex128, got {dtype}"
            )
        name = first = ".".join(path)
        while name in self.tensors:  # as those of "a.b" in one dict and "b" in another called "a"
            self.counts[first] += 1
            name = f"{first}#{self.counts[first] + 1}"
        check_name(label, name)
        self.tensors[name] = Tensor(CODES[dtype], shape, array)
        return {"array": name, **packed}


def _write(path: Any, named: Mapping[str, Any], metadata: Mapping[Any, Any]) -> None:
    packer = _Packer()
    tree = {name: packer.pack(name, value, (name,)) for name, value in named.items()}
    head = {
        "version": _VERSION,
        "program": f"fusedstep {__version__}",
        "step": max(packer.steps, default=None),
        "named": tree,
        "metadata": packer.pack("metadata", metadata, ("metadata",)),
    }
    text = json.dumps(head, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    _safetensors.write(path, Contents({"format": "pt", _TREE: text}, packer.tensors))


def _turn(value: Any) -> Turn | None:
    """Of our optimizers, whose turn it is."""
    turn = getattr(value, "_turn", None)
    return turn if isinstance(turn, Turn) else None


def _turns(value: Any, depth: int = 0) -> Iterator[Turn]:
    """Those of all our optimizers in a tree."""
    if isinstance(value, dict | list | tuple) and depth <= _DEEPEST:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _turns(one, depth + 1)
    elif turn := _turn(value):
        yield turn


# -- trees to objects ------------------------------------------------------------------------------


class _Reader:
    """Makes a tree of the JSON of a file."""

    def __init__(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        self.path, self.tensors = path, tensors
        self.used: set[str] = set()

    def refuse(self, why: str) -> NoReturn:
        _safetensors.refuse(self.path, why)

    def read(self, packed: Any, depth: int = 0) -> Any:
        """The tree that was packed, with a Leaf for each array."""
        if depth > 2 * _DEEPEST + 4:  # each may be an object, which has a tree
            self.refuse(f"its tree is more than {_DEEPEST} levels deep")
        if packed is None or isinstance(packed, bool | int | float | str):
            return packed
        if isinstance(packed, list):
            return [self.read(one, depth + 1) for one in packed]
        tag, inside = next(iter(packed.items()), ("", None))
        if tag == "array":
            return self._leaf(packed)
        if len(packed) == 1:
            if tag == "float" and inside in ("inf", "-inf", "nan"):
                return float(inside)
            if tag == "tuple" and isinstance(inside, list):
                return tuple(self.read(one, depth + 1) for one in inside)
            if tag == "dict" and isinstance(inside, dict):
                return {key: self.read(one, depth + 1) for key, one in inside.items()}
            if tag in ("items", "counter") and isinstance(inside, list):
                pairs = dict(pairs_of := [self._pair(one, depth) for one in inside])
                numbers = all(isinstance(one, int | float) for one in pairs.values())
                if len(pairs) < len(pairs_of) or (tag == "counter" and not numbers):
                    self.refuse(f"its tree has {shown(packed)}")
                return Counter(pairs) if tag == "counter" else pairs
            if tag in _TAGS:
                return self.read(inside, depth + 1)
        return self.refuse(f"its tree has {shown(packed)}")

    def _pair(self, packed: Any, depth: int) -> tuple[Any, Any]:
        if isinstance(packed, list) and len(packed) == 2 and type(packed[0]) in (int, str):
            return packed[0], self.read(packed[1], depth + 1)
        return self.refuse(f"its tree has {shown(packed)}")

    def _leaf(self, packed: dict[str, Any]) -> Leaf:
        name = packed["array"]
        if not isinstance(name, str) or name not in self.tensors:
            self.refuse(f"its tree has {shown(name)}, which is no tensor of it")
        tensor, is_complex = self.tensors[name], "complex" in packed
        if is_complex and (tensor.code not in ("F32", "F64") or tensor.shape[-1:] != (2,)):
            self.refuse(f"its tree has {name!r} as complex, which is {tensor.code}")
        self.used.add(name)
        is_scalar = "scalar" in packed and not tensor.shape
        is_tensor = "torch" in packed and _arrays.loaded_torch() is not None
        return Leaf(tensor, is_complex, is_scalar, is_tensor)


def filled(
    path: str | os.PathLike[str], named: Mapping[str, Any], as_array: Callable[[Leaf], Any]
) -> Saved:
    """`load`, which returns arrays of a library's own."""
    path = os.fsdecode(path)
    contents = _safetensors.read(path)
    reader = _Reader(path, contents.tensors)
    head = _safetensors.parsed(path, contents.metadata.get(_TREE, ""))
    if not isinstance(head, dict) or type(head.get("version")) is not int or head["version"] < 1:
        reader.refuse("its header has no version")
    if head["version"] > _VERSION:
        reader.refuse(f"it has version {head['version']}, and {_VERSION} is the last known here")
    tree = reader.read({"dict": head.get("named")})
    metadata, step = reader.read(head.get("metadata")), head.get("step")
    if not isinstance(metadata, dict):
        reader.refuse(f"its metadata is {shown(metadata)}")
    if step is not None and (type(step) is not int or step < 0):
        reader.refuse(f"its step is {shown(step)}")
    if unused := contents.tensors.keys() - reader.used:
        reader.refuse(f"its tree has no place for {sorted(unused)[:8]}")
    if missing := named.keys() - tree.keys():
        raise ValueError(f"named must be of {list(tree)}, got {sorted(missing)}")
    fillings: list[Filling] = []
    for name, target in named.items():
        if not _is_holder(target):
            raise TypeError(
                f"{name} must be something to fill, got {shown(target)}: load returns what it was"
            )
        fillings += _filled(name, target, tree[name])
    rest = {name: _finished(one, as_array) for name, one in tree.items() if name not in named}
    saved = Saved({name: named[name] if name in named else rest[name] for name in tree})
    saved.metadata, saved.step = _finished(metadata, as_array), step
    _commit(fillings)
    return saved


def _finished(tree: Any, as_array: Callable[[Leaf], Any]) -> Any:
    """A tree with a library's arrays for its leaves."""
    if isinstance(tree, Leaf):
        return as_array(tree)
    if isinstance(tree, dict):  # Counter too
        return type(tree)({key: _finished(one, as_array) for key, one in tree.items()})
    if isinstance(tree, list | tuple):
        return type(tree)(_finished(one, as_array) for one in tree)
    return tree


def _is_holder(target: Any) -> bool:
    """Whether it is something that can be filled."""
    if isinstance(target, np.generic):  # a number
        return False
    plain = isinstance(target, FlatBuffer | dict | list | tuple)
    return plain or any(kind.fits(target) for kind in _KINDS) or _arrays.is_array(target)


def _filled(label: str, target: Any, tree: Any) -> Iterator[Filling]:
    """How a target, which errors call `label`, takes over a tree; all that can be checked is."""
    for kind in _KINDS:
        if kind.fits(target):
            yield from kind.filled(label, target, tree)
            return
    if not isinstance(target, FlatBuffer | dict | list | tuple):
        yield _filled_array(label, target, tree)
        return
    if not isinstance(tree, dict | list | tuple):
        raise _of_another_kind(label, target, tree)
    own = dict(target) if isinstance(target, Mapping) else dict(enumerate(target))
    saved = tree if isinstance(tree, dict) else dict(enumerate(tree))
    if own.keys() != saved.keys():
        missing = [key for key in saved if key not in own][:8]
        extra = [key for key in own if key not in saved][:8]
        raise ValueError(
            f"{label} must have the names in the file, got missing {missing}, unknown {extra}"
        )
    for key, one in own.items():
        where = f"{label}[{key!r}]"
        if _is_holder(one):
            yield from _filled(where, one, saved[key])
            continue
        leaf = saved[key]
        value = _finished(leaf, as_saved)
        if isinstance(target, dict | list):
            put = functools.partial(target.__setitem__, key)
            plain = type(target) in (dict, list, OrderedDict, Counter)  # which refuses nothing
            undo = None if plain else functools.partial(put, one)
            yield Filling(functools.partial(put, value), undo)
            continue
        is_array = isinstance(leaf, Leaf) and not leaf.is_scalar
        if is_array or not (one == value or (one != one and value != value)):  # or both NaN
            raise ValueError(f"{where} must be {shown(leaf)}, as in the file, got {one!r}")


def _filled_array(label: str, target: Any, leaf: Any) -> Filling:
    if not isinstance(leaf, Leaf):
        raise _of_another_kind(label, target, leaf)
    put = _arrays.writer(target, label)
    dtype, shape = _arrays.dtype_and_shape(target)
    if dtype != leaf.dtype:
        raise TypeError(f"{label} must be {leaf.dtype}, as in the file, got {dtype}")
    if shape != leaf.shape:
        raise ValueError(f"{label} must have shape {leaf.shape}, as in the file, got {shape}")
    return Filling(lambda: put(leaf.tensor.values.reshape(-1)))


def _of_another_kind(label: str, target: Any, tree: Any) -> TypeError:
    name = type(target).__name__
    return TypeError(f"{label} must be of the file's kind, {shown(tree)}, got {name}")


def _commit(fillings: list[Filling]) -> None:
    """Fills all, or nothing, also when it is interrupted, by Ctrl-C or a signal's handler."""
    refusing = sorted((f for f in fillings if f.undo), key=lambda filling: filling.late)
    left = deque(f for f in fillings if not f.undo)
    begun: list[Filling] = []
    interrupted = None
    for _ in range(len(left) + 8):  # what cannot refuse is finished
        try:
            for one in refusing[len(begun) :]:
                begun.append(one)
                one.fill()
            refusing = []
            while left:
                left[0].fill()
                left.popleft()
            break
        except BaseException as error:
            if refusing:
                for one in reversed(begun):
                    with contextlib.suppress(Exception):  # of what refused, and may do so again
                        one.undo()  # type: ignore[misc]  # chosen for having it
                raise
            interrupted = error
    if interrupted:
        raise interrupted


# -- kinds of objects ------------------------------------------------------------------------------


def _has_state(value: Any) -> bool:
    """Whether it is an object that gives and takes its state."""
    return not isinstance(value, type) and all(
        callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict")
    )


def _filled_state(label: str, target: Any, tree: Any) -> list[Filling]:
    """By its own method, which checks; ours have changed nothing where they raise, and copy."""
    has_groups, is_torch_s = hasattr(target, "param_groups"), _arrays.is_torch_s(target)
    if _turn(target):
        as_array = as_tensor if is_torch_s else as_numpy
    else:
        as_array = as_own_tensor if is_torch_s else as_saved
        # torch would put whole tensors where it has shards.
        for i, group in enumerate(target.param_groups if has_groups and is_torch_s else ()):
            for k, param in enumerate(group["params"]):
                _arrays.check_plain(param, f"{label}.param_groups[{i}]['params'][{k}]")
    state = _finished(tree, as_array)
    before = target.state_dict()  # the arrays themselves, which a load of an optimizer replaces
    if not has_groups:
        before = copy.deepcopy(before)
    return [_loading(label, target, state, before, late=not has_groups)]


def _loading(label: str, target: Any, state: Any, before: Any, late: bool = False) -> Filling:
    def fill() -> None:
        try:
            target.load_state_dict(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            kinds = (KeyError, RuntimeError, TypeError, ValueError)
            kind = next(one for one in kinds if isinstance(error, one))
            raise kind(f"{label}: {error}") from error

    return Filling(fill, lambda: target.load_state_dict(before), late)


def _filled_generator(label: str, target: Any, tree: Any) -> list[Filling]:
    bits, own = target.bit_generator, target.bit_generator.state
    kind = tree.get("bit_generator") if isinstance(tree, dict) else None
    if kind != own["bit_generator"]:
        raise TypeError(
            f"{label} must be a generator of {str(kind)[:80]}, got {own['bit_generator']}"
        )
    state = _finished(tree, as_numpy)

    def put(state: Any) -> None:
        bits.state = state

    return [Filling(lambda: put(state), lambda: put(own))]


def _filled_module(label: str, target: Any, tree: Any) -> list[Filling]:
    """Checked by name, shape and dtype first, as torch copies before it knows that all fits."""
    own = target.state_dict()
    if not isinstance(tree, dict):
        raise _of_another_kind(label, target, tree)

    def extra(key: Any) -> bool:  # what a module checks itself, and keeps
        return str(key).rpartition(".")[2] == "_extra_state" and key in own

    tensors = {key: one for key, one in own.items() if not extra(key)}
    list(_filled(label, tensors, {key: one for key, one in tree.items() if not extra(key)}))
    state = {
        key: _finished(one, as_saved if extra(key) else as_tensor) for key, one in tree.items()
    }
    if _arrays.loads_as_torch(target):
        return [Filling(lambda: target.load_state_dict(state))]
    return [_loading(label, target, state, copy.deepcopy(own))]


def _filled_torch_generator(label: str, target: Any, tree: Any) -> list[Filling]:
    before = target.get_state()
    if not isinstance(tree, Leaf) or (tree.dtype, tree.shape) != ("uint8", tuple(before.shape)):
        raise _of_another_kind(label, target, tree)
    state = as_tensor(tree)
    return [Filling(lambda: target.set_state(state), lambda: target.set_state(before))]


_KINDS = (
    Kind("module", _arrays.is_module, lambda module: module.state_dict(), _filled_module),
    Kind("state_dict", _has_state, lambda value: value.state_dict(), _filled_state),
    Kind(
        "generator",
        lambda value: isinstance(value, np.random.Generator),
        lambda value: value.bit_generator.state,
        _filled_generator,
    ),
    Kind(
        "torch_generator",
        _arrays.is_torch_generator,
        lambda value: value.get_state(),
        _filled_torch_generator,
    ),
)
_TAGS = {kind.tag for kind in _KINDS}
