"""Keras 3: eps beside the uncorrected root or under it, rates in the momentum, decoupled decay.

`weight_decay` is None or a number; it shrinks the variable before the update, in every class.
Gradients are clipped by our `step`: `global_clipnorm` is its `max_norm`, `clipvalue` its
`clip_value`, and an average of the variables its `ema`. `clipnorm`, which clips each variable by
itself, and `ema_overwrite_frequency` are not to be had.

Reference: https://keras.io/api/optimizers, read and run as 3.15.1
"""

from __future__ import annotations

from typing import Any

from fusedstep._types import Rate, Unpack
from fusedstep.conventions._convention import Beside, Ours, convention, or_zero, with_momentum


def _decay(weight_decay: Rate | None) -> dict[str, Any]:
    return {"weight_decay": or_zero(weight_decay), "decoupled_weight_decay": True}


@convention
def SGD(
    learning_rate: Rate = 0.01, momentum: Rate = 0.0, nesterov: bool = False,
    weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`m = momentum*m - lr*g; p = p + m`, or nesterov `p = p + momentum*m - lr*g`.

    Without momentum nesterov means nothing, as there. Our buffer is -m.
    """
    hypers = {"lr": learning_rate, "momentum": momentum, "lr_in_momentum": True}
    return Ours(
        "SGD",
        {**hypers, "nesterov": with_momentum(nesterov, momentum), **_decay(weight_decay), **how},
    )


@convention
def RMSprop(
    learning_rate: Rate = 0.001, rho: float = 0.9, momentum: Rate = 0.0, epsilon: float = 1e-7,
    centered: bool = False, weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`p = p - lr * g / sqrt(v + eps)`; with momentum the rate is in the buffer."""
    hypers = {"lr": learning_rate, "alpha": rho, "momentum": momentum, "centered": centered}
    place = {"eps": 0.0, "eps_root": epsilon, "lr_in_momentum": True}
    return Ours("RMSprop", {**hypers, **place, **_decay(weight_decay), **how})


@convention
def Adagrad(
    learning_rate: Rate = 0.001, initial_accumulator_value: float = 0.1, epsilon: float = 1e-7,
    weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`p = p - lr * g / sqrt(s + eps)`, and s begins with 0.1."""
    hypers = {"lr": learning_rate, "initial_accumulator_value": initial_accumulator_value}
    return Ours(
        "Adagrad", {**hypers, "eps": 0.0, "eps_root": epsilon, **_decay(weight_decay), **how}
    )


@convention
def Adadelta(
    learning_rate: Rate = 0.001, rho: float = 0.95, epsilon: float = 1e-7,
    weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Adadelta, with a rate of a thousandth."""
    hypers = {"lr": learning_rate, "rho": rho, "eps": epsilon}
    return Ours("Adadelta", {**hypers, **_decay(weight_decay), **how})


@convention
def Adam(
    learning_rate: Rate = 0.001, beta_1: Rate = 0.9, beta_2: Rate = 0.999, epsilon: float = 1e-7,
    amsgrad: bool = False, weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`p = p - lr * sqrt(1-b2^t)/(1-b1^t) * m / (sqrt(v) + eps)`: eps at the uncorrected root."""
    hypers = {"lr": learning_rate, "betas": (beta_1, beta_2), "eps": epsilon, "amsgrad": amsgrad}
    return Ours("Adam", {**hypers, "eps_hat": True, **_decay(weight_decay), **how})


@convention
def AdamW(
    learning_rate: Rate = 0.001, weight_decay: Rate = 0.004, beta_1: Rate = 0.9,
    beta_2: Rate = 0.999, epsilon: float = 1e-7, amsgrad: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Keras' Adam with weight decay: there both are decoupled."""
    hypers = {"lr": learning_rate, "betas": (beta_1, beta_2), "eps": epsilon, "amsgrad": amsgrad}
    return Ours("AdamW", {**hypers, "eps_hat": True, "weight_decay": or_zero(weight_decay), **how})


@convention
def Adamax(
    learning_rate: Rate = 0.001, beta_1: Rate = 0.9, beta_2: Rate = 0.999, epsilon: float = 1e-7,
    weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`u = max(b2*u, |g|); p = p - lr/(1-b1^t) * m / (u + eps)`."""
    hypers = {"lr": learning_rate, "betas": (beta_1, beta_2), "eps": 0.0, "eps_divisor": epsilon}
    return Ours("Adamax", {**hypers, **_decay(weight_decay), **how})


@convention
def Nadam(
    learning_rate: Rate = 0.001, beta_1: Rate = 0.9, beta_2: Rate = 0.999, epsilon: float = 1e-7,
    weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our NAdam with `momentum_decay=1`: the momentum has warmed up after a hundred steps."""
    hypers = {"lr": learning_rate, "betas": (beta_1, beta_2), "eps": epsilon}
    return Ours("NAdam", {**hypers, "momentum_decay": 1.0, **_decay(weight_decay), **how})


@convention
def Lion(
    learning_rate: Rate = 0.001, beta_1: Rate = 0.9, beta_2: Rate = 0.99,
    weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Lion."""
    hypers = {"lr": learning_rate, "betas": (beta_1, beta_2), "weight_decay": or_zero(weight_decay)}
    return Ours("Lion", {**hypers, **how})
