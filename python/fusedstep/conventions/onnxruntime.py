"""ONNX Runtime's training operators, `com.microsoft.AdamWOptimizer` and `SGDOptimizerV2`.

Reference: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md, run as
onnxruntime-training 1.19.2
"""

from __future__ import annotations

from fusedstep._hypers import as_whole
from fusedstep._types import Rate, Unpack
from fusedstep.conventions._convention import Beside, Ours, convention


@convention
def AdamWOptimizer(
    lr: Rate, alpha: Rate = 0.9, beta: Rate = 0.999, epsilon: float = 1e-8,
    weight_decay: Rate = 1e-2, adam_mode: int = 0, correct_bias: int = 1, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our AdamW; in mode 1 eps stands beside the uncorrected root and decay comes after.

    Mode 1 is what `onnxruntime.training.artifacts` writes, with an epsilon of 1e-6.
    """
    for name, value in (("adam_mode", adam_mode), ("correct_bias", correct_bias)):
        if as_whole(value) not in (0, 1):
            raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    hypers = {"lr": lr, "betas": (alpha, beta), "eps": epsilon, "weight_decay": weight_decay}
    other = adam_mode == 1
    place = {"eps_hat": other, "decay_after": other, "bias_correction": bool(correct_bias)}
    return Ours("AdamW", {**hypers, **place, **how})


@convention
def SGDOptimizerV2(lr: Rate, **how: Unpack[Beside]) -> Ours:
    """Our SGD."""
    return Ours("SGD", {"lr": lr, **how})
