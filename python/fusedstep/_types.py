"""The types that several layers name in their signatures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    Protocol,
    SupportsFloat,
    TypedDict,
    TypeVar,
    Union,
)

from numpy.typing import NDArray

if sys.version_info >= (3, 11):
    from typing import Unpack as Unpack
elif TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:  # for those who ask for hints: what can be subscripted
    Unpack = type

Array = NDArray[Any]
Key = str | int
Shapes = Mapping[Key, tuple[int, ...]]

# A number, 0-d arrays and tensors included, or a schedule: a callable of the step, from 0.
Rate = SupportsFloat | Callable[[int], SupportsFloat]
Betas = tuple[Rate, Rate]
Pair = tuple[float, float]


class Exporter(Protocol):
    """An array of any library that exports its memory through DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...


class CudaExporter(Protocol):
    """An array on a GPU, as Numba's."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


T_co = TypeVar("T_co", covariant=True)


class Several(Protocol[T_co]):
    """A list or tuple: as `Sequence`, but no str, of which one may only ask for a str."""

    def __contains__(self, value: object, /) -> bool: ...
    def __iter__(self) -> Iterator[T_co]: ...
    def __len__(self) -> int: ...


# Unions in words, as nothing else may name itself before Python 3.12.
AnyArray = Union[Array, Exporter, CudaExporter]  # noqa: UP007
# One array, or several, also nested: a FlatBuffer, a list, an iterator, a dict by name.
Params = Union[AnyArray, Iterable[AnyArray], Several["Params"], Mapping[Any, "Params"]]  # noqa: UP007
# As Params, with None for a tensor that sits the step out, and a number for one without axes.
Grads = Union[  # noqa: UP007
    AnyArray, float, None, Iterable[AnyArray | None], Several["Grads"], Mapping[Any, "Grads"]
]
States = Mapping[str, Sequence[Any]]  # by name, one array per parameter, or None
Clock = tuple[int, float, float]  # a count of updates, and what the rule carries beside it
Changes = list[tuple[dict[str, Any], dict[str, Any]]]  # dicts, and what each takes over


class Hypers(TypedDict, total=False):
    """The hyperparameters of all optimizers, as `_hypers.HYPERS` has them; a test compares."""

    lr: Rate
    betas: Betas
    eps: float
    eps_root: float
    eps_hat: bool
    eps_norm: float
    eps_divisor: float
    weight_decay: Rate
    momentum: Rate
    dampening: float
    dampen_first: bool
    nesterov: bool
    dampened_nesterov: bool
    lr_in_momentum: bool
    lr_decay: float
    initial_accumulator_value: float
    alpha: float
    centered: bool
    rho: float
    amsgrad: bool
    amsgrad_corrected: bool
    bias_correction: bool
    momentum_decay: float
    threshold: float
    lambd: float
    t0: float
    etas: Pair
    step_sizes: Pair
    maximize: bool
    decoupled_weight_decay: bool
    decay_after: bool


# The words of `How`: what checkers take, and what is checked against at run time.
Rounding = Literal["nearest", "stochastic", "kahan", "split"]
StateDtype = Literal["float32", "bfloat16", "q8"]
StateRounding = Literal["stochastic", "nearest"]
EmaDtype = Literal["float32", "float64", "bfloat16", "parameter"]


class How(TypedDict, total=False):
    """How an optimizer stores what it keeps: keywords of every class; `_storage.HOW` explains."""

    rounding: Rounding
    state_dtype: StateDtype | Mapping[str, StateDtype | None] | None
    state_rounding: StateRounding
    seed: int
    ema_dtype: EmaDtype | None


class Options(NamedTuple):
    """Options of a step, in both layers: what it does to the gradients, and where."""

    factor: float = 1.0  # of the gradients: 1 / loss_scale
    max_norm: float | None = None
    skip_nonfinite: bool = False
    stream: int = 0  # of the CUDA device; 0 on the CPU
    norms: bool = False  # of each tensor's gradient
    # torch's, whose GradScaler leaves its verdict to the step:
    live: bool = False  # whether the counts of steps are on the device
    scale: Any = None  # the loss scale as a tensor on the device
    found_inf: Any = None  # a tensor, not 0 where a gradient is known not to be finite
    norm: Any = None  # the tensor that the norm is written to
    # Both layers' again:
    clip_value: float | None = None  # of each element, after max_norm
    ema_decay: float = 0.0
    average: int = 0  # the number of the average that the step takes, from 1; 0: none
    zero_grad: bool = False
    seed: int = 0  # of what is rounded at random


PLAIN = Options()
