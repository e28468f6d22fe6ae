"""ONNX' training operators, `ai.onnx.preview.training`: Adagrad, Adam, Momentum.

R is their rate, and T their count of updates at the first step, 0 or 1: with 0 the first step of
Adam corrects no bias, and that of Momentum is not dampened.

Reference: https://onnx.ai/onnx/operators, whose reference implementation was run as 1.23.2
"""

from __future__ import annotations

import math
from typing import Any

from fusedstep._arrays import as_float
from fusedstep._hypers import ABOVE_0, FINITE, FRACTION, as_number, as_whole
from fusedstep._types import Rate, Unpack
from fusedstep.conventions._convention import Beside, Ours, convention, is_plain, scaled


def _check_count(T: int) -> None:
    if as_whole(T) not in (0, 1):
        raise ValueError(f"T must be 0 or 1 at the first step, got {T!r}")


@convention
def Adagrad(
    R: Rate, decay_factor: float = 0.0, epsilon: float = 1e-6, norm_coefficient: Rate = 0.0,
    T: int = 0, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`r = R / (1 + T*decay_factor)`: our Adagrad, from T = 1 on with a schedule of the rate."""
    _check_count(T)
    hypers = {"eps": epsilon, "weight_decay": norm_coefficient, **how}
    if T == 0:
        return Ours("Adagrad", {"lr": R, "lr_decay": decay_factor, **hypers})
    return Ours(
        "Adagrad", {"lr": scaled("R", R, lambda t: 1 / (1 + (t + 1) * decay_factor)), **hypers}
    )


@convention
def Adam(
    R: Rate, alpha: float = 0.9, beta: float = 0.999, epsilon: float = 1e-6,
    norm_coefficient: Rate = 0.0, norm_coefficient_post: float = 0.0, T: int = 0,
    **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`r = R * sqrt(1-beta^T)/(1-alpha^T)`, R where T = 0; `X = (X - r*V/(sqrt(H)+eps))*(1-post)`.

    `norm_coefficient` is coupled weight decay, `norm_coefficient_post` the share that X loses after
    the update, whatever the rate is.

    Raises:
        ValueError: both coefficients are given. Ours decays once.
    """
    _check_count(T)
    hypers: dict[str, Any] = {"betas": (alpha, beta), "eps": epsilon, **how}
    rate = R
    if T == 0:
        rate = scaled("R", R, lambda t: math.sqrt(1 - beta**t) / (1 - alpha**t) if t > 0 else 1.0)
        hypers["bias_correction"] = False
    else:
        hypers["eps_hat"] = True
    both = not is_plain(norm_coefficient, 0) and not is_plain(norm_coefficient_post, 0)
    if both:
        raise ValueError(
            "norm_coefficient_post must be 0 beside norm_coefficient, got"
            f" {norm_coefficient_post!r} and {norm_coefficient!r}"
        )
    if not is_plain(norm_coefficient_post, 0):
        lost = as_number("norm_coefficient_post", norm_coefficient_post, FRACTION)

        def share(rate: Any) -> float:
            return lost / as_number("R beside norm_coefficient_post", rate, ABOVE_0)

        decay = (lambda t: share(rate(t))) if callable(rate) else share(rate)
        hypers |= {"weight_decay": decay, "decoupled_weight_decay": True, "decay_after": True}
    else:
        hypers["weight_decay"] = norm_coefficient
    return Ours("Adam", {"lr": rate, **hypers})


@convention
def Momentum(
    R: Rate, alpha: Rate, beta: float, mode: str = "standard", norm_coefficient: Rate = 0.0,
    T: int = 0, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`V = alpha*V + beta*G`, beta 1 where T = 0; `X = X - R*V`, or nesterov `R*(G + alpha*V)`."""
    _check_count(T)
    if mode not in ("standard", "nesterov"):
        raise ValueError(f"mode must be 'standard' or 'nesterov', got {mode!r}")
    hypers = {"lr": R, "momentum": alpha, "weight_decay": norm_coefficient, **how}
    beta = as_number("beta", beta, FINITE)
    nesterov = mode == "nesterov"
    if as_float(alpha) == 0:  # of a buffer that is dampened only, which our SGD has not
        if not nesterov and beta != 1:
            hypers["lr"] = scaled("R", R, lambda t: beta if t > 0 or T > 0 else 1.0)
        return Ours("SGD", hypers)
    buffer = {"dampening": 1 - beta, "dampen_first": T > 0}
    options = {"nesterov": nesterov, "dampened_nesterov": nesterov}
    return Ours("SGD", {**buffer, **options, **hypers})
