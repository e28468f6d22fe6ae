"""tinygrad's `nn.optim`. `fused` lays all parameters side by side there, of the same equation.

Reference: https://docs.tinygrad.org/nn/#optimizers, run as 0.14.0
"""

from __future__ import annotations

from fusedstep._types import Rate, Unpack
from fusedstep.conventions._convention import Beside, Ours, convention, with_momentum


@convention
def SGD(
    lr: Rate = 0.001, momentum: Rate = 0.0, weight_decay: Rate = 0.0, nesterov: bool = False,
    classic: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our SGD; `classic` takes the rate into the buffer. Without momentum nesterov is nothing."""
    hypers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    nesterov = with_momentum(nesterov, momentum)
    return Ours("SGD", {**hypers, "nesterov": nesterov, "lr_in_momentum": classic, **how})


@convention
def Adam(
    lr: Rate = 0.001, b1: Rate = 0.9, b2: Rate = 0.999, eps: float = 1e-8, **how: Unpack[Beside]
) -> Ours:
    """Our Adam."""
    return Ours("Adam", {"lr": lr, "betas": (b1, b2), "eps": eps, **how})


@convention
def AdamW(
    lr: Rate = 0.001, b1: Rate = 0.9, b2: Rate = 0.999, eps: float = 1e-8,
    weight_decay: Rate = 0.01, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our AdamW."""
    hypers = {"lr": lr, "betas": (b1, b2), "eps": eps, "weight_decay": weight_decay}
    return Ours("AdamW", {**hypers, **how})
