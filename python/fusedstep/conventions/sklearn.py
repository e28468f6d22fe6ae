"""scikit-learn's multilayer perceptrons: `sklearn.neural_network`, solver="sgd" and "adam".

A schedule may stand for `learning_rate_init`; ours are in `fusedstep.schedules`. The perceptrons'
penalty `alpha` is part of the gradients that they hand to their solver.

Reference: https://scikit-learn.org, run as 1.9.1
"""

from __future__ import annotations

from fusedstep._types import Rate, Unpack
from fusedstep.conventions._convention import Beside, Ours, convention, with_momentum


@convention
def SGDOptimizer(
    learning_rate_init: Rate = 0.1,
    *,
    momentum: Rate = 0.9,
    nesterov: bool = True,
    **how: Unpack[Beside],
) -> Ours:
    """`v = momentum*v - lr*g; p = p + v`, or nesterov `p = p + momentum*v - lr*g`."""
    hypers = {"lr": learning_rate_init, "momentum": momentum, "lr_in_momentum": True}
    return Ours("SGD", {**hypers, "nesterov": with_momentum(nesterov, momentum), **how})


@convention
def AdamOptimizer(
    learning_rate_init: Rate = 0.001, beta_1: Rate = 0.9, beta_2: Rate = 0.999,
    epsilon: float = 1e-8, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`p = p - lr * sqrt(1-b2^t)/(1-b1^t) * m / (sqrt(v) + eps)`: eps at the uncorrected root."""
    hypers = {"lr": learning_rate_init, "betas": (beta_1, beta_2), "eps": epsilon}
    return Ours("Adam", {**hypers, "eps_hat": True, **how})
