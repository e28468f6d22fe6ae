"""What a convention is: a function from another library's arguments to an optimizer of ours."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, cast

from fusedstep import optimizers
from fusedstep._optimizer import Optimizer
from fusedstep._types import Params, Rate

if TYPE_CHECKING:
    from fusedstep.torch.optimizers import Optimizer as TorchOptimizer

P = ParamSpec("P")

# Arguments of other libraries' constructors, and the argument of our `step` that is theirs.
_OF_STEP = {
    "clipvalue": "clip_value",
    "ema_momentum": "ema",
    "global_clipnorm": "max_norm",
    "grad_clip": "max_norm",
    "use_ema": "ema",
}


class Ours(NamedTuple):
    """An optimizer of ours, by its name, and what it is to be given."""

    name: str
    hypers: dict[str, Any]


class Convention(Protocol[P]):
    """Another library's optimizer. Called with parameters it returns ours, which steps as theirs.

    The arguments after the parameters are the library's, with its names and defaults; rates may be
    schedules of the step, which counts from 0. What our constructors take beside hyperparameters
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

    def ours(*args: P.args, **kwargs: P.kwargs) -> Ours:
        for name in kwargs.keys() & _OF_STEP.keys():
            raise TypeError(
                f"{name} must be given to step(), as {_OF_STEP[name]}, got {name}={kwargs[name]!r}"
            )
        return translate(*args, **kwargs)

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


def scaled(rate: Rate, factor: Callable[[int], float]) -> Callable[[int], float]:
    """A schedule: the rate of step t, times `factor(t)`."""
    return lambda t: float(rate(t) if callable(rate) else rate) * factor(t)
