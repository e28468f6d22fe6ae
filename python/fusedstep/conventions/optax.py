"""optax: eps_root, rates in the momentum of RMSprop, the largest of corrected moments.

The names and arguments of `optax.sgd` and its fellows. What takes a `mask` there is a `Group` here.
`add_decayed_weights` before `sgd` is our SGD's `weight_decay`, after it the same with
`decoupled_weight_decay=True`.

Reference: https://optax.readthedocs.io, read and run as 0.2.8
"""

from __future__ import annotations

import math

from fusedstep._types import Rate, Unpack
from fusedstep.conventions._convention import (
    Beside,
    Ours,
    convention,
    or_zero,
    refuse,
    with_momentum,
)


@convention
def sgd(
    learning_rate: Rate, momentum: Rate | None = None, nesterov: bool = False, **how: Unpack[Beside]
) -> Ours:
    """Our SGD. Without momentum nesterov means nothing, as there."""
    hypers = {"lr": learning_rate, "momentum": or_zero(momentum)}
    return Ours("SGD", {**hypers, "nesterov": with_momentum(nesterov, momentum), **how})


@convention
def sign_sgd(learning_rate: Rate, **how: Unpack[Beside]) -> Ours:
    """`p = p - lr * sign(g)`: our Lion, whose moving average is the gradient."""
    return Ours("Lion", {"lr": learning_rate, "betas": (0.0, 0.0), **how})


@convention
def signum(learning_rate: Rate, beta: Rate = 0.9, **how: Unpack[Beside]) -> Ours:
    """`m = beta*m + (1-beta)*g; p = p - lr * sign(m)`: our Lion, of one decay."""
    return Ours("Lion", {"lr": learning_rate, "betas": (beta, beta), **how})


@convention
def adagrad(
    learning_rate: Rate,
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-7,
    **how: Unpack[Beside],
) -> Ours:
    """`p = p - lr * g / sqrt(s + eps)`, and s begins with 0.1."""
    hypers = {"lr": learning_rate, "initial_accumulator_value": initial_accumulator_value}
    return Ours("Adagrad", {**hypers, "eps": 0.0, "eps_root": eps, **how})


@convention
def rmsprop(
    learning_rate: Rate, decay: float = 0.9, eps: float = 1e-8, initial_scale: float = 0.0,
    eps_in_sqrt: bool = True, centered: bool = False, momentum: Rate | None = None,
    nesterov: bool = False, bias_correction: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`u = lr * g / sqrt(v + eps)`, eps outside without `eps_in_sqrt`; with momentum
    `b = momentum*b + u; p = p - b`, or nesterov `p = p - (u + momentum*b)`.

    Their trace is -b.
    """
    hypers = {"lr": learning_rate, "alpha": decay, "momentum": or_zero(momentum)}
    place = {"eps": 0.0, "eps_root": eps} if eps_in_sqrt else {"eps": eps}
    options = {
        "centered": centered,
        "nesterov": with_momentum(nesterov, momentum),
        "bias_correction": bias_correction,
        "initial_accumulator_value": initial_scale,
        "lr_in_momentum": True,
    }
    return Ours("RMSprop", {**hypers, **place, **options, **how})


@convention
def adadelta(
    learning_rate: Rate,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: Rate = 0.0,
    **how: Unpack[Beside],
) -> Ours:
    """Our Adadelta: eps under both roots, weight decay in the gradient.

    NOTE: optax 0.2.8 may be given no rate, or None, and then goes up instead of down
    (`findings/rate_left_out_climbs.sh`). The rate must be a number or a schedule here; the paper's
    is 1.
    """
    hypers = {"lr": learning_rate, "rho": rho, "eps": eps, "weight_decay": weight_decay}
    return Ours("Adadelta", {**hypers, **how})


@convention
def adam(
    learning_rate: Rate, b1: Rate = 0.9, b2: Rate = 0.999, eps: float = 1e-8,
    eps_root: float = 0.0, *, nesterov: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Adam, or with nesterov our NAdam whose momentum is b1 from the start."""
    hypers = {"lr": learning_rate, "betas": (b1, b2), "eps": eps, "eps_root": eps_root, **how}
    if nesterov:
        return Ours("NAdam", {**hypers, "momentum_decay": math.inf})
    return Ours("Adam", hypers)


@convention
def adamw(
    learning_rate: Rate, b1: Rate = 0.9, b2: Rate = 0.999, eps: float = 1e-8,
    eps_root: float = 0.0, *, weight_decay: Rate = 1e-4, nesterov: bool = False,
    **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our AdamW, or with nesterov our NAdam, decoupled."""
    hypers = {"lr": learning_rate, "betas": (b1, b2), "eps": eps, "eps_root": eps_root, **how}
    hypers["weight_decay"] = weight_decay
    if nesterov:
        return Ours("NAdam", {**hypers, "momentum_decay": math.inf, "decoupled_weight_decay": True})
    return Ours("AdamW", hypers)


@convention
def nadam(
    learning_rate: Rate, b1: Rate = 0.9, b2: Rate = 0.999, eps: float = 1e-8,
    eps_root: float = 0.0, *, nesterov: bool = True, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our NAdam whose momentum is b1 from the start."""
    return adam.ours(learning_rate, b1, b2, eps, eps_root, nesterov=nesterov, **how)


@convention
def nadamw(
    learning_rate: Rate, b1: Rate = 0.9, b2: Rate = 0.999, eps: float = 1e-8,
    eps_root: float = 0.0, *, weight_decay: Rate = 1e-4, nesterov: bool = True,
    **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our NAdam, decoupled, whose momentum is b1 from the start."""
    return adamw.ours(
        learning_rate, b1, b2, eps, eps_root, weight_decay=weight_decay, nesterov=nesterov, **how
    )


@convention
def amsgrad(
    learning_rate: Rate, b1: Rate = 0.9, b2: Rate = 0.999, eps: float = 1e-8,
    eps_root: float = 0.0, *, bias_correction_mu: bool = True, bias_correction_nu: bool = True,
    **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Adam with amsgrad, which takes the largest of the corrected second moments.

    Raises:
        ValueError: one moment is to be corrected and the other is not.
    """
    if bias_correction_mu != bias_correction_nu:
        raise ValueError(
            f"bias_correction_nu must be that of mu, {bias_correction_mu!r}, got"
            f" {bias_correction_nu!r}"
        )
    hypers = {"lr": learning_rate, "betas": (b1, b2), "eps": eps, "eps_root": eps_root}
    options = {"amsgrad": True, "amsgrad_corrected": True}
    return Ours("Adam", {**hypers, **options, **how, "bias_correction": bias_correction_mu})


@convention
def adamax(
    learning_rate: Rate, b1: Rate = 0.9, b2: Rate = 0.999, eps: float = 1e-8, **how: Unpack[Beside]
) -> Ours:
    """Our Adamax."""
    return Ours("Adamax", {"lr": learning_rate, "betas": (b1, b2), "eps": eps, **how})


@convention
def adamaxw(
    learning_rate: Rate, b1: Rate = 0.9, b2: Rate = 0.999, eps: float = 1e-8,
    weight_decay: Rate = 1e-4, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Adamax with decoupled weight decay."""
    hypers = {"lr": learning_rate, "betas": (b1, b2), "eps": eps, "weight_decay": weight_decay}
    return Ours("Adamax", {**hypers, "decoupled_weight_decay": True, **how})


@convention
def radam(
    learning_rate: Rate, b1: Rate = 0.9, b2: Rate = 0.999, eps: float = 1e-8,
    eps_root: float = 0.0, threshold: float = 5.0, *, nesterov: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our RAdam with eps beside the corrected root. Theirs rectifies at the threshold too.

    Raises:
        ValueError: it is to be Nesterov's. Ours is not.
    """
    refuse("our RAdam has none", nesterov=nesterov)
    hypers = {"lr": learning_rate, "betas": (b1, b2), "eps": eps, "eps_root": eps_root}
    return Ours("RAdam", {**hypers, "eps_hat": False, "threshold": threshold, **how})


@convention
def lion(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.99,
    *,
    weight_decay: Rate = 1e-3,
    **how: Unpack[Beside],
) -> Ours:
    """Our Lion."""
    hypers = {"lr": learning_rate, "betas": (b1, b2), "weight_decay": weight_decay}
    return Ours("Lion", {**hypers, **how})


@convention
def rprop(
    learning_rate: float, eta_minus: float = 0.5, eta_plus: float = 1.2,
    min_step_size: float = 1e-6, max_step_size: float = 50.0, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Rprop, which is that of the paper.

    NOTE: optax 0.2.8 applies the previous step's update, so that it is a step late; its own request
    1725 mends that. These are the steps that it means to take.
    """
    bounds = {"etas": (eta_minus, eta_plus), "step_sizes": (min_step_size, max_step_size)}
    return Ours("Rprop", {"lr": learning_rate, **bounds, **how})
