"""What a convention is: a function from another library's arguments to an optimizer of ours."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypedDict, cast

import numpy as np

from fusedstep import optimizers
from fusedstep._arrays import as_float
from fusedstep._groups import Group
from fusedstep._hypers import AT_LEAST_0, HYPERS, as_number
from fusedstep._optimizer import Optimizer
from fusedstep._types import How, Params, Rate

if TYPE_CHECKING:
    from fusedstep.torch.optimizers import Optimizer as TorchOptimizer

P = ParamSpec("P")

_GROUPED = "given as groups=[fusedstep.Group(...)]"
_NARROW = "given as state_dtype"

# Arguments of other libraries' constructors that are no part of an equation: the default, at which
# they mean nothing, and what anything else must be.
_ELSEWHERE: dict[str, tuple[Any, str]] = {
    "accumulator_dtype": (None, _NARROW),
    "apply_decay_param_fun": (None, _GROUPED),
    "clipnorm": (None, "None, as no parameter is clipped by itself here"),
    "clipvalue": (None, "given to step(), as clip_value"),
    "ema_momentum": (0.99, "given to step(), as ema"),
    "ema_overwrite_frequency": (None, "None, as no average is written over parameters here"),
    "fp32_optimizer_states": (True, _NARROW),
    "global_clipnorm": (None, "given to step(), as max_norm"),
    "grad_clip": (None, "given to step(), as max_norm"),
    "gradient_accumulation_steps": (None, "None, as a step takes gradients added up by you"),
    "is_paged": (False, "False, as nothing is paged here"),
    "lazy_mode": (False, "False, as no gradient is sparse here"),
    "loss_scale_factor": (None, "given to step(), as loss_scale"),
    "lr_ratio": (None, _GROUPED),
    "lr_schedule": ("constant", "given to learning_rate_init, as a schedule"),
    "mask": (None, _GROUPED),
    "mu_dtype": (None, _NARROW),
    "multi_precision": (False, "given as rounding, which needs no second copy"),
    "optim_bits": (32, _NARROW),
    "power_t": (0.5, "given to learning_rate_init, as a schedule"),
    "rescale_grad": (1.0, "given to step(), as loss_scale=1/rescale_grad"),
    "use_ema": (False, "given to step(), as ema"),
    "use_lowprecision_moment": (False, _NARROW),
    "weight_decay_mask": (None, _GROUPED),
}

# Those that say where and how a library computes, or what things are called there.
_WITHOUT_EFFECT = (
    *("device", "min_8bit_size", "name", "use_locking", "use_multi_tensor"),
    "use_own_namescope_for_non_slot_vars",
)
# And of one library alone: of others `fused` is that of `fusedstep.torch`, which scalers ask for.
_WITHOUT_EFFECT_IN = {"tinygrad": ("fused",)}


class _Elsewhere(TypedDict, total=False):
    """Names of `_ELSEWHERE` and `_WITHOUT_EFFECT`, for checkers; a test compares."""

    accumulator_dtype: object
    apply_decay_param_fun: object
    clipnorm: object
    clipvalue: object
    ema_momentum: object
    ema_overwrite_frequency: object
    fp32_optimizer_states: object
    global_clipnorm: object
    grad_clip: object
    gradient_accumulation_steps: object
    is_paged: object
    lazy_mode: object
    loss_scale_factor: object
    lr_ratio: object
    lr_schedule: object
    mask: object
    mu_dtype: object
    multi_precision: object
    optim_bits: object
    power_t: object
    rescale_grad: object
    use_ema: object
    use_lowprecision_moment: object
    weight_decay_mask: object
    device: object
    min_8bit_size: object
    name: object
    use_locking: object
    use_multi_tensor: object
    use_own_namescope_for_non_slot_vars: object


class Beside(_Elsewhere, How, total=False):
    """What a convention takes by name beside the arguments of its equation, for checkers.

    What of this only one layer has is refused by the other when it is called.
    """

    groups: Iterable[Group]
    maximize: bool
    # Of `fusedstep.torch` alone:
    clip_value: float | None
    ema: float | Callable[[int], float] | None
    shadow: Any
    zero_grad: bool
    foreach: bool | None
    fused: bool | int | None  # tinygrad's is 0
    capturable: bool
    differentiable: bool


class Ours(NamedTuple):
    """An optimizer of ours, by its name, and what it is to be given."""

    name: str
    hypers: dict[str, Any]


class Convention(Protocol[P]):
    """Another library's optimizer. Called with parameters it returns ours, which steps as theirs.

    The arguments after the parameters are the library's, with its names and defaults; rates may be
    schedules of the step, which counts from 0. Those that are no part of the equation (names,
    devices, masks, clipping) are taken at their defaults, where they mean nothing, and else refused
    with what stands for them here. Which follow such a one in the library's order are keywords only
    here, so that no place means another argument. What our constructors take beside hyperparameters
    (`groups`, `state_dtype`, `rounding`, ...) may follow by name. The optimizer is an ordinary one,
    and its state_dict says by itself which equation it has.
    """

    __name__: str

    def __call__(self, params: Params, *args: P.args, **kwargs: P.kwargs) -> Optimizer: ...

    def torch(self, params: Any, *args: P.args, **kwargs: P.kwargs) -> TorchOptimizer:
        """The same for the parameters of a torch model: an optimizer of `fusedstep.torch`.

        Rates are numbers there; `fusedstep.torch.LRScheduler` takes a schedule.
        """
        ...

    def ours(self, *args: P.args, **kwargs: P.kwargs) -> Ours:
        """The name of our class and its keywords, for these arguments."""
        ...


def convention(translate: Callable[P, Ours]) -> Convention[P]:
    """Makes a convention of a function from a library's arguments to `Ours`."""

    library = translate.__module__.rpartition(".")[2]
    without_effect = (*_WITHOUT_EFFECT, *_WITHOUT_EFFECT_IN.get(library, ()))

    def ours(*args: P.args, **kwargs: P.kwargs) -> Ours:
        kept: dict[str, Any] = {}
        for name, value in kwargs.items():
            default, rule = _ELSEWHERE.get(name, (None, ""))
            if rule and not is_plain(value, default):
                raise TypeError(f"{name} must be {rule}, got {name}={value!r}")
            if not rule and name not in without_effect:
                kept[name] = value
        return cast("Callable[..., Ours]", translate)(*args, **kept)

    @functools.wraps(translate)
    def neutral(params: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
        name, hypers = ours(*args, **kwargs)
        return getattr(optimizers, name)(params, **hypers)

    def torch(params: Any, *args: P.args, **kwargs: P.kwargs) -> Any:
        name, hypers = ours(*args, **kwargs)
        return getattr(importlib.import_module("fusedstep.torch"), name)(params, **hypers)

    signature = inspect.signature(translate)
    first = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    neutral.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[first, *signature.parameters.values()], return_annotation=Optimizer
    )
    neutral.__dict__.update(ours=ours, torch=torch)
    return cast("Convention[P]", neutral)


def is_plain(value: Any, default: Any) -> bool:
    """Whether an argument is a library's default, whatever is compared with it."""
    return value is default or (np.ndim(value) == 0 and bool(value == default))


def refuse(why: str, **options: Any) -> None:
    """Raises ValueError for an option that is not False, or a number that is not 0."""
    for name, value in options.items():
        nothing = False if HYPERS[name].is_flag else 0.0
        if not is_plain(value, nothing):
            raise ValueError(f"{name} must be {nothing!r}, got {value!r}: {why}")


def or_zero(value: Any) -> Any:
    """What stands for None where a library takes None or a number."""
    return 0.0 if value is None else value


def with_momentum(nesterov: Any, momentum: Any) -> Any:
    """`nesterov`, which in other libraries means nothing without momentum, and in ours is wrong."""
    without = momentum is None or as_float(momentum) == 0
    nothing = isinstance(nesterov, bool | np.bool_) and without
    return False if nothing else nesterov


def scaled(name: str, rate: Rate, factor: Callable[[int], float]) -> Callable[[int], float]:
    """A schedule: the rate of step t, which the library calls `name`, times `factor(t)`."""
    if not callable(rate):
        as_number(name, rate, AT_LEAST_0)
    return lambda t: as_number(name, rate(t) if callable(rate) else rate, AT_LEAST_0) * factor(t)
