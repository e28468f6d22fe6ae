"""TensorFlow 1, `tf.compat.v1.train`: eps beside the uncorrected root or under it.

Reference: https://www.tensorflow.org/api_docs/python/tf/compat/v1/train, run as 2.21.0
"""

from __future__ import annotations

from fusedstep._types import Rate, Unpack
from fusedstep.conventions._convention import Beside, Ours, convention, with_momentum


@convention
def GradientDescentOptimizer(learning_rate: Rate, **how: Unpack[Beside]) -> Ours:
    """Our SGD."""
    return Ours("SGD", {"lr": learning_rate, **how})


@convention
def MomentumOptimizer(
    learning_rate: Rate, momentum: Rate, *, use_nesterov: bool = False, **how: Unpack[Beside]
) -> Ours:
    """Our SGD with momentum: the rate is outside the buffer."""
    hypers = {
        "lr": learning_rate,
        "momentum": momentum,
        "nesterov": with_momentum(use_nesterov, momentum),
    }
    return Ours("SGD", {**hypers, **how})


@convention
def AdagradOptimizer(
    learning_rate: Rate, initial_accumulator_value: float = 0.1, **how: Unpack[Beside]
) -> Ours:
    """`p = p - lr * g / sqrt(s)`, without eps; s begins with 0.1."""
    hypers = {"lr": learning_rate, "initial_accumulator_value": initial_accumulator_value}
    return Ours("Adagrad", {**hypers, "eps": 0.0, **how})


@convention
def AdadeltaOptimizer(
    learning_rate: Rate = 0.001, rho: float = 0.95, epsilon: float = 1e-8, **how: Unpack[Beside]
) -> Ours:
    """Our Adadelta."""
    return Ours("Adadelta", {"lr": learning_rate, "rho": rho, "eps": epsilon, **how})


@convention
def AdamOptimizer(
    learning_rate: Rate = 0.001, beta1: Rate = 0.9, beta2: Rate = 0.999, epsilon: float = 1e-8,
    **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`p = p - lr * sqrt(1-b2^t)/(1-b1^t) * m / (sqrt(v) + eps)`: eps at the uncorrected root."""
    hypers = {"lr": learning_rate, "betas": (beta1, beta2), "eps": epsilon}
    return Ours("Adam", {**hypers, "eps_hat": True, **how})


@convention
def RMSPropOptimizer(
    learning_rate: Rate, decay: float = 0.9, momentum: Rate = 0.0, epsilon: float = 1e-10,
    *, centered: bool = False, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """`b = momentum*b + lr * g / sqrt(v + eps)`, and v begins with 1."""
    hypers = {"lr": learning_rate, "alpha": decay, "momentum": momentum, "centered": centered}
    place = {"eps": 0.0, "eps_root": epsilon, "lr_in_momentum": True}
    return Ours("RMSprop", {**hypers, **place, "initial_accumulator_value": 1.0, **how})
