"""PaddlePaddle: eps under RMSProp's root and beside Adamax's norm, its weight decay coupled.

`weight_decay` is None or a number, as `L2Decay` has it. `grad_clip` is our step's `max_norm`.

Reference: https://www.paddlepaddle.org.cn/documentation, run as 3.3.1
"""

from __future__ import annotations

from fusedstep._hypers import as_whole
from fusedstep._types import Pair, Rate, Unpack
from fusedstep.conventions._convention import Beside, Ours, convention, or_zero, with_momentum


@convention
def SGD(
    learning_rate: Rate = 0.001, weight_decay: Rate | None = None, **how: Unpack[Beside]
) -> Ours:
    """Our SGD."""
    return Ours("SGD", {"lr": learning_rate, "weight_decay": or_zero(weight_decay), **how})


@convention
def Momentum(
    learning_rate: Rate = 0.001, momentum: Rate = 0.9, use_nesterov: bool = False,
    weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our SGD with momentum."""
    hypers = {
        "lr": learning_rate,
        "momentum": momentum,
        "nesterov": with_momentum(use_nesterov, momentum),
    }
    return Ours("SGD", {**hypers, "weight_decay": or_zero(weight_decay), **how})


@convention
def Adagrad(
    learning_rate: Rate, epsilon: float = 1e-6, weight_decay: Rate | None = None, *,
    initial_accumulator_value: float = 0.0, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Adagrad."""
    hypers = {"lr": learning_rate, "eps": epsilon, "weight_decay": or_zero(weight_decay)}
    initial = {"initial_accumulator_value": initial_accumulator_value}
    return Ours("Adagrad", {**hypers, **initial, **how})


@convention
def Adadelta(
    learning_rate: Rate = 0.001, epsilon: float = 1e-6, rho: float = 0.95,
    weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Adadelta."""
    hypers = {"lr": learning_rate, "eps": epsilon, "rho": rho}
    return Ours("Adadelta", {**hypers, "weight_decay": or_zero(weight_decay), **how})


@convention
def RMSProp(
    learning_rate: Rate, rho: float = 0.95, epsilon: float = 1e-6, momentum: Rate = 0.0,
    centered: bool = False, weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`b = momentum*b + lr * g / sqrt(v + eps); p = p - b`."""
    hypers = {"lr": learning_rate, "alpha": rho, "momentum": momentum, "centered": centered}
    place = {"eps": 0.0, "eps_root": epsilon, "lr_in_momentum": True}
    return Ours("RMSprop", {**hypers, **place, "weight_decay": or_zero(weight_decay), **how})


@convention
def Adam(
    learning_rate: Rate = 0.001, beta1: Rate = 0.9, beta2: Rate = 0.999, epsilon: float = 1e-8,
    weight_decay: Rate | None = None, *, amsgrad: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Adam."""
    hypers = {"lr": learning_rate, "betas": (beta1, beta2), "eps": epsilon, "amsgrad": amsgrad}
    return Ours("Adam", {**hypers, "weight_decay": or_zero(weight_decay), **how})


@convention
def AdamW(
    learning_rate: Rate = 0.001, beta1: Rate = 0.9, beta2: Rate = 0.999, epsilon: float = 1e-8,
    weight_decay: Rate = 0.01, *, amsgrad: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our AdamW."""
    hypers = {"lr": learning_rate, "betas": (beta1, beta2), "eps": epsilon, "amsgrad": amsgrad}
    return Ours("AdamW", {**hypers, "weight_decay": weight_decay, **how})


@convention
def Adamax(
    learning_rate: Rate = 0.001, beta1: Rate = 0.9, beta2: Rate = 0.999, epsilon: float = 1e-8,
    weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`u = max(b2*u + eps, |g|); p = p - lr/(1-b1^t) * m / u`."""
    hypers = {"lr": learning_rate, "betas": (beta1, beta2), "eps": 0.0, "eps_norm": epsilon}
    return Ours("Adamax", {**hypers, "weight_decay": or_zero(weight_decay), **how})


@convention
def NAdam(
    learning_rate: Rate = 0.002, beta1: Rate = 0.9, beta2: Rate = 0.999, epsilon: float = 1e-8,
    momentum_decay: float = 0.004, weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our NAdam."""
    hypers = {"lr": learning_rate, "betas": (beta1, beta2), "eps": epsilon}
    decays = {"momentum_decay": momentum_decay, "weight_decay": or_zero(weight_decay)}
    return Ours("NAdam", {**hypers, **decays, **how})


@convention
def RAdam(
    learning_rate: Rate = 0.001, beta1: Rate = 0.9, beta2: Rate = 0.999, epsilon: float = 1e-8,
    weight_decay: Rate | None = None, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our RAdam."""
    hypers = {"lr": learning_rate, "betas": (beta1, beta2), "eps": epsilon}
    return Ours("RAdam", {**hypers, "weight_decay": or_zero(weight_decay), **how})


@convention
def Rprop(
    learning_rate: Rate = 0.001, learning_rate_range: Pair = (1e-5, 50.0),
    etas: Pair = (0.5, 1.2), **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Rprop."""
    return Ours(
        "Rprop", {"lr": learning_rate, "step_sizes": learning_rate_range, "etas": etas, **how}
    )


@convention
def ASGD(
    learning_rate: Rate = 0.001,
    batch_num: int = 1,
    weight_decay: Rate | None = None,
    **how: Unpack[Beside],
) -> Ours:
    """Our SGD: of one batch the averaged gradient is the gradient.

    Raises:
        ValueError: there are more batches. Their gradients are kept and averaged then, which is
            another algorithm (SAG) than that which torch and we call ASGD.
    """
    if as_whole(batch_num) != 1:
        raise ValueError(f"batch_num must be 1, got {batch_num!r}: a mean over the gradients of all"
                         " batches is another algorithm")  # fmt: skip
    return Ours("SGD", {"lr": learning_rate, "weight_decay": or_zero(weight_decay), **how})
