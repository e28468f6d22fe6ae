"""bitsandbytes with 32-bit states. What its CPU code ignores is refused here.

Reference: https://huggingface.co/docs/bitsandbytes, run as 0.50.2 on a CPU
"""

from __future__ import annotations

from fusedstep._types import Betas, Rate, Unpack
from fusedstep.conventions._convention import Beside, Ours, convention, refuse

_IGNORED = "bitsandbytes ignores it on a CPU; our class has it"


@convention
def SGD(
    lr: Rate, momentum: Rate = 0.0, dampening: float = 0.0, weight_decay: Rate = 0.0,
    nesterov: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our SGD with momentum; dampening and nesterov are ignored there."""
    refuse(_IGNORED, dampening=dampening, nesterov=nesterov)
    return Ours("SGD", {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **how})


@convention
def Adagrad(
    lr: Rate = 1e-2, lr_decay: float = 0.0, weight_decay: Rate = 0.0,
    initial_accumulator_value: float = 0.0, eps: float = 1e-10, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Adagrad; it refuses lr_decay and initial_accumulator_value."""
    refuse(_IGNORED, lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value)
    return Ours("Adagrad", {"lr": lr, "weight_decay": weight_decay, "eps": eps, **how})


@convention
def RMSprop(
    lr: Rate = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: Rate = 0.0,
    momentum: Rate = 0.0, centered: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our RMSprop without momentum, which is ignored there, and not centered."""
    refuse(_IGNORED, momentum=momentum, centered=centered)
    return Ours(
        "RMSprop", {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, **how}
    )


@convention
def Adam(
    lr: Rate = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: Rate = 0.0,
    amsgrad: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our AdamW: weight decay is decoupled in its Adam too. amsgrad is ignored there."""
    refuse(_IGNORED, amsgrad=amsgrad)
    hypers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return Ours("Adam", {**hypers, "decoupled_weight_decay": True, **how})


@convention
def AdamW(
    lr: Rate = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: Rate = 1e-2,
    amsgrad: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our AdamW. amsgrad is ignored there."""
    refuse(_IGNORED, amsgrad=amsgrad)
    hypers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return Ours("AdamW", {**hypers, **how})


@convention
def Lion(
    lr: Rate = 1e-4, betas: Betas = (0.9, 0.99), weight_decay: Rate = 0.0, **how: Unpack[Beside]
) -> Ours:
    """Our Lion."""
    return Ours("Lion", {"lr": lr, "betas": betas, "weight_decay": weight_decay, **how})
