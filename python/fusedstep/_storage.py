"""How an optimizer stores what it keeps: parameters, states and averages, each in its format.

One concept for both layers. A format is the core's; an array of it may have another beside it, in
the parameter's state: `low_bits`, `compensation`, `exp_avg_exponents`.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, get_args

import numpy as np

from fusedstep import _core
from fusedstep._arrays import DTYPES, as_dtype, as_index, to_host
from fusedstep._spec import LR, Spec
from fusedstep._types import Array, EmaDtype, How, Rounding, StateDtype, StateRounding

EMA = "ema"  # the average's key in a parameter's state

# Each keyword of `How`: its default, and its line in the docstrings.
HOW: dict[str, tuple[Any, str]] = {
    "rounding": (
        "nearest",
        "how bfloat16 parameters take their updates: 'nearest'; 'stochastic', at random; 'kahan',"
        " with a bfloat16 `compensation` beside them; 'split', with the lower half of a float32,"
        " `low_bits`, beside them",
    ),
    "state_dtype": (
        None,
        "the states': 'float32', 'bfloat16', 'q8', or a dict of these by state; None is float32,"
        " or float64 under float64 parameters",
    ),
    "state_rounding": (
        "stochastic",
        "of states in bfloat16 and q8: 'stochastic' or 'nearest'",
    ),
    "seed": (0, "of what is rounded at random: an integer in [0, 2^63)"),
    "ema_dtype": (
        None,
        "the average's: 'float32', 'float64', 'bfloat16', 'parameter'; None is float32, or float64"
        " under float64 parameters",
    ),
}

_PARAM_FORMATS = {
    "nearest": "bfloat16",
    "stochastic": "bfloat16",
    "kahan": "kahan",
    "split": "split",
}
_PARAM_KEYS = {"kahan": "compensation", "split": "low_bits"}
# The dtypes of arrays in formats that are no array's own, and of what is beside them.
_ARRAYS = {
    "split": ("bfloat16", "int16"),
    "kahan": ("bfloat16", "bfloat16"),
    "q8": ("uint8", "uint8"),
    "q8_positive": ("uint8", "uint8"),
}
# What lies beside parameters, by key in their state: their format, and its dtype.
PARAM_BESIDE = {key: (name, _ARRAYS[name][1]) for name, key in _PARAM_KEYS.items()}
_BLOCKS = _core.blocks()  # elements that share an entry beside them, by format
_WIDTHS = {**_core.formats(), "q8": 1}


class Kept(NamedTuple):
    """How one stream of a parameter lies in memory."""

    format: str  # the core's name
    random: bool = False  # rounded at random
    beside: str = ""  # what lies beside it, by its key in the state; empty: nothing

    @property
    def is_narrow(self) -> bool:
        """Whether a step computes in a wider type."""
        return self.format not in ("float32", "float64")

    @property
    def dtype(self) -> str:
        """The dtype of its array."""
        return _ARRAYS.get(self.format, (self.format, ""))[0]

    @property
    def beside_dtype(self) -> str:
        """The dtype of the array beside it."""
        return _ARRAYS[self.format][1]

    @property
    def by_block(self) -> bool:
        """Whether elements of a block share an entry beside them."""
        return _BLOCKS.get(self.format, 0) > 1

    def beside_shape(self, shape: Sequence[int], first: int = 0) -> tuple[int, ...]:
        """The shape of the array beside one of this shape, whose first element has this place."""
        if not self.by_block:
            return tuple(shape)
        n, block = math.prod(shape), _BLOCKS[self.format]
        return (-(-(first % block + n) // block) if n else 0,)


def in_q8(spec: Spec, state: str, random: bool = False) -> Kept:
    """A state in 8 bits: one that is never negative has a format of its own."""
    positive = "_positive" if state in spec.positive else ""
    return Kept("q8" + positive, random, f"{state}_exponents")


class Form(NamedTuple):
    """How a parameter of some dtype, its states and its average lie in memory."""

    param: Kept
    states: Mapping[str, Kept]
    ema: Kept

    @property
    def streams(self) -> Mapping[str, Kept]:
        """What has an array of its own in the parameter's state, by its key there."""
        return {**self.states, EMA: self.ema}

    @property
    def beside(self) -> Mapping[str, Kept]:
        """What lies beside a stream, by its key in the parameter's state."""
        return {k.beside: k for k in (self.param, *self.states.values()) if k.beside}

    def keys(self, names: Iterable[str]) -> list[str]:
        """The arrays in a parameter's state that has these streams, by key."""
        beside = [self.streams[name].beside for name in names]
        return [key for key in (*names, *beside, self.param.beside) if key]

    def dtype(self, key: str) -> str:
        """The dtype of an array in a parameter's state."""
        found = self.beside.get(key)
        return found.beside_dtype if found else self.streams[key].dtype

    def shape(self, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an array in the state of a parameter of this shape."""
        found = self.beside.get(key)
        return found.beside_shape(shape) if found else shape

    @property
    def random(self) -> bool:
        """Whether anything is rounded at random, so that updates must be counted."""
        return any(kept.random for kept in (self.param, *self.states.values(), self.ema))


class Storage:
    """How the parameters, states and averages of one optimizer are stored; checks `How`."""

    def __init__(self, spec: Spec, how: How) -> None:
        self._spec = spec
        defaults = {name: default for name, (default, _) in HOW.items()}
        self.how: dict[str, Any] = {**defaults, **how}
        self.seed: int = _as_seed(self.how["seed"])
        _check_choice("rounding", self.how["rounding"], get_args(Rounding))
        _check_choice("state_rounding", self.how["state_rounding"], get_args(StateRounding))
        if self.how["ema_dtype"] == "float16":
            raise ValueError(
                "ema_dtype must be wide enough that averages do not stall, got 'float16', which is"
                " rounded to nearest"
            )
        if self.how["ema_dtype"] is not None:
            _check_choice("ema_dtype", self.how["ema_dtype"], get_args(EmaDtype))
        self._state_dtypes = self._as_state_dtypes(self.how["state_dtype"])
        self._forms = {dtype: self._form(dtype) for dtype in DTYPES}

    def _as_state_dtypes(self, given: Any) -> dict[str, str | None]:
        """The dtype that was asked for each state; None for the default."""
        if not isinstance(given, Mapping):
            if given is not None:
                _check_choice("state_dtype", given, get_args(StateDtype))
            return dict.fromkeys(self._spec.states, given)
        for name, dtype in given.items():
            if name not in self._spec.states:
                known = ", ".join(self._spec.states) or "none"
                raise ValueError(f"state_dtype must name states, which are {known}, got {name!r}")
            if dtype is not None:
                _check_choice(f"state_dtype[{name!r}]", dtype, get_args(StateDtype))
        return {name: given.get(name) for name in self._spec.states}

    def _form(self, dtype: str) -> Form:
        wide = "float64" if dtype == "float64" else "float32"
        param = Kept(dtype)
        if dtype == "bfloat16":
            rounding = self.how["rounding"]
            param = Kept(
                _PARAM_FORMATS[rounding],
                rounding == "stochastic",
                _PARAM_KEYS.get(rounding, ""),
            )
        random = self.how["state_rounding"] == "stochastic"
        states = {}
        for name, asked in self._state_dtypes.items():
            if asked == "q8":
                states[name] = in_q8(self._spec, name, random)
            else:
                states[name] = Kept(asked or wide, random and asked == "bfloat16")
        average = self.how["ema_dtype"] or wide
        average = dtype if average == "parameter" else average
        return Form(param, states, Kept(average, average == "bfloat16"))

    def of(self, dtype: str) -> Form:
        """How a parameter of this dtype and what belongs to it are stored."""
        return self._forms[dtype]

    @property
    def native(self) -> dict[str, list[Kept]]:
        """As csrc/python/storage.h reads it: by dtype the parameter, the states, the average."""
        return {d: [f.param, *f.states.values(), f.ema] for d, f in self._forms.items()}

    def check_params(self, dtypes: Iterable[tuple[str, str]]) -> None:
        """Raises ValueError where a parameter, as (label, dtype), cannot be stored so."""
        rounding = self.how["rounding"]
        for label, dtype in dtypes:
            if rounding != "nearest" and dtype != "bfloat16":
                raise ValueError(
                    f"rounding must be 'nearest' unless all parameters are bfloat16, got"
                    f" {rounding!r} with {label} of {dtype}"
                )
            if self.how["ema_dtype"] == "parameter" and dtype == "float16":
                raise ValueError(
                    "ema_dtype must be wide enough that averages do not stall, got 'parameter' with"
                    f" {label} of float16, which is rounded to nearest"
                )

    def check_exact(self, native: Sequence[float], dtypes: Iterable[str]) -> None:
        """Raises ValueError where a state that must be exact would be narrow.

        Args:
            native: a group as the rule reads it.
            dtypes: those of its parameters.
        """
        if not any(self._state_dtypes.values()):
            return
        exact, why = _core.exact_of(self._spec.rule, native[LR:])
        for name, must in zip(self._spec.states, exact, strict=True):
            asked = self._state_dtypes[name]
            if not must or asked is None:
                continue
            for dtype in set(dtypes):
                if _WIDTHS[asked] < (8 if dtype == "float64" else 4):
                    wide = "float64" if dtype == "float64" else "float32"
                    raise ValueError(
                        f"state_dtype must leave {name} in {wide}, because {why}, got {asked!r}"
                    )


def _check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    if isinstance(value, str) and value in known:
        return
    *others, last = map(repr, known)
    raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def _as_seed(value: Any) -> int:
    seed = as_index(value)
    if seed is None:
        raise TypeError(f"seed must be an integer in [0, 2^63), got {value!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer in [0, 2^63), got {value!r}")
    return seed


# -- signatures and docstrings, where HOW stands as a list -----------------------------------------


def listed(signature: inspect.Signature) -> inspect.Signature:
    """A signature with the keywords of `How` in place of `**how`."""
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=How.__annotations__[name].__forward_arg__,
        )
        for name, (default, _) in HOW.items()
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        is_how = parameter.kind is inspect.Parameter.VAR_KEYWORD and parameter.name == "how"
        parameters += keywords if is_how else [parameter]
    return signature.replace(parameters=parameters)


@cache  # every class of optimizers asks
def how_docs() -> tuple[str, ...]:
    """The lines of docstrings for the keywords of `How`."""
    lines = []
    for name, (default, doc) in HOW.items():
        text = f"{name}: {doc} (default {default!r})."
        lines += textwrap.wrap(text, 92, subsequent_indent="    ")
    return tuple(lines)


# -- whole arrays from one format to another -------------------------------------------------------


class Stored(NamedTuple):
    """An array, its format, and what lies beside it."""

    array: Any
    format: str
    beside: Any = None


def array_dtype(name: str) -> np.dtype[Any]:
    """A dtype of `Kept` as NumPy's."""
    return as_dtype(name) if name in DTYPES else np.dtype(name)


def convert(source: Stored, target: Stored, first: int = 0) -> None:
    """Writes the numbers of one array into another, rounded to nearest where they must be.

    Any arrays in the CPU's memory, the target's C-contiguous. `first` is the place of the first
    element in its parameter, of which both may be a shard.
    """

    def raw(array: Any) -> Any:
        return None if array is None else _core.array_of(array, "array")[0]

    def read(array: Any) -> Any:
        return None if array is None else np.ascontiguousarray(raw(array))

    _core.convert(
        (read(source.array), source.format, read(source.beside)),
        (raw(target.array), target.format, raw(target.beside)),
        first,
    )


def put(source: Stored, target: Stored) -> None:
    """`convert` of whole arrays, wherever they lie; of the same format bit by bit."""
    here = Stored(to_host(source.array), source.format, to_host(source.beside))
    if source.format != target.format:
        is_here = isinstance(target.array, np.ndarray)
        there = target if is_here else Stored(*map(_blank, target))
        convert(here, there)
        if is_here:
            return
        here = there
    for into, values in ((target.array, here.array), (target.beside, here.beside)):
        if into is not None:
            into[...] = values


def _blank(part: Any) -> Any:
    """Memory for an array of this shape and dtype; what is none as it is."""
    return np.empty(part.shape, part.dtype) if hasattr(part, "dtype") else part


def decoded(source: Stored, dtype: str = "float32", first: int = 0) -> Array:
    """The numbers of an array, wherever it lies, as a new one of the dtype."""
    here = Stored(to_host(source.array), source.format, to_host(source.beside))
    result: Array = np.empty(tuple(here.array.shape), as_dtype(dtype))
    convert(here, Stored(result, dtype), first)
    return result


def beside_param(stored: Stored, key: str) -> Array:
    """What lies beside a bfloat16 parameter, by `key`, from what lies there under another rounding.

    The parameter stays; the number that the two make is kept as far as the other key can hold it:
    halfway to the next larger bfloat16, `low_bits` ends one short of it.
    """
    master, param = decoded(stored), decoded(Stored(stored.array, "bfloat16"))
    if key == "compensation":
        result: Array = (master - param).astype(array_dtype("bfloat16"))
        return result
    left = (master.view(np.uint32) - param.view(np.uint32)).view(np.int32)
    return left.clip(-(2**15), 2**15 - 1).astype(np.int16)
