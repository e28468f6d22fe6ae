"""Drop-in `torch.optim` classes on fusedstep's kernels, flat parameters, steps inside backward.

    from fusedstep.torch import AdamW        # instead of: from torch.optim import AdamW

There is a class for each of `fusedstep`'s optimizers. Needs torch >= 2.4.
"""

from __future__ import annotations as _annotations

from typing import TYPE_CHECKING as _TYPE_CHECKING

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _error:
    if _error.name != "torch":  # one that is there, and broken
        raise
    raise ModuleNotFoundError(
        "fusedstep.torch needs torch: pip install 'fusedstep[torch]'", name="torch"
    ) from None

from fusedstep import optimizers as _neutral
from fusedstep.torch import optimizers as _optimizers
from fusedstep.torch.add import add_
from fusedstep.torch.backward import step_in_backward
from fusedstep.torch.files import load, save
from fusedstep.torch.flat import Flat, flatten_
from fusedstep.torch.lr_scheduler import LRScheduler
from fusedstep.torch.optimizers import Optimizer
from fusedstep.torch.optimizers import drop_in as _drop_in

if _TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from fusedstep.torch.optimizers import How

# Written by .ci/torch_classes.py:

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Flat",
    "LRScheduler",
    "Lion",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "add_",
    "flatten_",
    "load",
    "save",
    "step_in_backward",
]


@_drop_in(_neutral.SGD)
class SGD(_optimizers.LookAhead):
    """Stochastic gradient descent, plain, with momentum, or Nesterov's."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        lr_in_momentum: bool = False,
        dampen_first: bool = False,
        dampened_nesterov: bool = False,
        capturable: bool = False,
        **how: Unpack[How],
    ) -> None: ...


@_drop_in(_neutral.Lion)
class Lion(Optimizer):
    """Lion: steps of one size along the sign of an interpolated momentum."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0001,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **how: Unpack[How],
    ) -> None: ...


@_drop_in(_neutral.Adagrad)
class Adagrad(Optimizer):
    """Adagrad: each element's rate falls with the sum of its squared gradients."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        eps_root: float = 0.0,
        capturable: bool = False,
        **how: Unpack[How],
    ) -> None: ...


@_drop_in(_neutral.RMSprop)
class RMSprop(Optimizer):
    """RMSprop: each element's gradient divided by a running root mean square."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        eps_root: float = 0.0,
        bias_correction: bool = False,
        nesterov: bool = False,
        lr_in_momentum: bool = False,
        initial_accumulator_value: float = 0.0,
        fused: bool | None = None,
        **how: Unpack[How],
    ) -> None: ...


@_drop_in(_neutral.Adadelta)
class Adadelta(Optimizer):
    """Adadelta: steps in the units of the parameter, from running averages of g^2 and of d^2."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-06,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        decoupled_weight_decay: bool = False,
        fused: bool | None = None,
        **how: Unpack[How],
    ) -> None: ...


@_drop_in(_neutral.Adam)
class Adam(Optimizer):
    """Adam: a running mean of the gradient over a running root mean square."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        bias_correction: bool = True,
        eps_root: float = 0.0,
        eps_hat: bool = False,
        amsgrad_corrected: bool = False,
        decay_after: bool = False,
        **how: Unpack[How],
    ) -> None: ...


@_drop_in(_neutral.AdamW)
class AdamW(Optimizer):
    """AdamW: Adam whose weight decay shrinks the parameter instead of joining the gradient."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        bias_correction: bool = True,
        eps_root: float = 0.0,
        eps_hat: bool = False,
        amsgrad_corrected: bool = False,
        decay_after: bool = False,
        **how: Unpack[How],
    ) -> None: ...


@_drop_in(_neutral.Adamax)
class Adamax(Optimizer):
    """Adamax: Adam with the largest recent gradient in place of the root mean square."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        eps_norm: float = 0.0,
        eps_divisor: float = 0.0,
        bias_correction: bool = True,
        fused: bool | None = None,
        **how: Unpack[How],
    ) -> None: ...


@_drop_in(_neutral.NAdam)
class NAdam(Optimizer):
    """NAdam: Adam with Nesterov's look-ahead in the running mean."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        momentum_decay: float = 0.004,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        eps_root: float = 0.0,
        fused: bool | None = None,
        **how: Unpack[How],
    ) -> None: ...


@_drop_in(_neutral.RAdam)
class RAdam(Optimizer):
    """RAdam: Adam that leaves out the denominator until its variance is known well enough."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-08,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        eps_root: float = 0.0,
        eps_hat: bool = True,
        threshold: float = 5.0,
        fused: bool | None = None,
        **how: Unpack[How],
    ) -> None: ...


@_drop_in(_neutral.ASGD)
class ASGD(Optimizer):
    """Averaged SGD: SGD with a falling rate, and the average of the late parameters beside it."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        lambd: float = 0.0001,
        alpha: float = 0.75,
        t0: float = 1000000.0,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        fused: bool | None = None,
        **how: Unpack[How],
    ) -> None: ...


@_drop_in(_neutral.Rprop)
class Rprop(Optimizer):
    """Rprop: each element's step grows while its gradient keeps its sign and shrinks when it
    turns."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-06, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        fused: bool | None = None,
        **how: Unpack[How],
    ) -> None: ...


# End of what it writes.


def __dir__() -> list[str]:
    return sorted(__all__)
