"""MLX: no bias correction unless asked for, and dampening of the first gradient too.

Reference: https://ml-explore.github.io/mlx, run as 0.32.4
"""

from __future__ import annotations

from collections.abc import Sequence

from fusedstep._types import Rate, Unpack
from fusedstep.conventions._convention import Beside, Ours, convention


@convention
def SGD(
    learning_rate: Rate, momentum: Rate = 0.0, weight_decay: Rate = 0.0, dampening: float = 0.0,
    nesterov: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our SGD, but that the first gradient is dampened as all are."""
    hypers = {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
    buffer = {"dampening": dampening, "dampen_first": True, "nesterov": nesterov}
    return Ours("SGD", {**hypers, **buffer, **how})


@convention
def RMSprop(
    learning_rate: Rate, alpha: float = 0.99, eps: float = 1e-8, **how: Unpack[Beside]
) -> Ours:
    """Our RMSprop."""
    return Ours("RMSprop", {"lr": learning_rate, "alpha": alpha, "eps": eps, **how})


@convention
def Adagrad(learning_rate: Rate, eps: float = 1e-8, **how: Unpack[Beside]) -> Ours:
    """Our Adagrad."""
    return Ours("Adagrad", {"lr": learning_rate, "eps": eps, **how})


@convention
def AdaDelta(
    learning_rate: Rate, rho: float = 0.9, eps: float = 1e-6, **how: Unpack[Beside]
) -> Ours:
    """Our Adadelta."""
    return Ours("Adadelta", {"lr": learning_rate, "rho": rho, "eps": eps, **how})


@convention
def Adam(
    learning_rate: Rate, betas: Sequence[Rate] = (0.9, 0.999), eps: float = 1e-8,
    bias_correction: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Adam, without bias correction by default."""
    hypers = {"lr": learning_rate, "betas": betas, "eps": eps}
    return Ours("Adam", {**hypers, "bias_correction": bias_correction, **how})


@convention
def AdamW(
    learning_rate: Rate, betas: Sequence[Rate] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: Rate = 0.01, bias_correction: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our AdamW, without bias correction by default."""
    hypers = {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    return Ours("AdamW", {**hypers, "bias_correction": bias_correction, **how})


@convention
def Adamax(
    learning_rate: Rate,
    betas: Sequence[Rate] = (0.9, 0.999),
    eps: float = 1e-8,
    **how: Unpack[Beside],
) -> Ours:
    """`u = max(b2*u, |g|); p = p - lr * m / (u + eps)`, without bias correction."""
    hypers = {"lr": learning_rate, "betas": betas, "eps": 0.0, "eps_divisor": eps}
    return Ours("Adamax", {**hypers, "bias_correction": False, **how})


@convention
def Lion(
    learning_rate: Rate,
    betas: Sequence[Rate] = (0.9, 0.99),
    weight_decay: Rate = 0.0,
    **how: Unpack[Beside],
) -> Ours:
    """Our Lion."""
    hypers = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay}
    return Ours("Lion", {**hypers, **how})
