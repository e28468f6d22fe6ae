"""DeepSpeed's optimizers for the CPU.

Reference: https://deepspeed.readthedocs.io/en/latest/optimizers.html, run as 0.19.8
"""

from __future__ import annotations

from fusedstep._types import Betas, Rate, Unpack
from fusedstep.conventions._convention import Beside, Ours, convention, refuse

_NONE = "DeepSpeed has none on a CPU"


@convention
def DeepSpeedCPUAdam(
    lr: Rate = 1e-3, bias_correction: bool = True, betas: Betas = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: Rate = 0.0, amsgrad: bool = False, adamw_mode: bool = True, **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Adam; decay is decoupled unless `adamw_mode` is off."""
    refuse(_NONE, amsgrad=amsgrad)
    hypers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    mode = {"bias_correction": bias_correction, "decoupled_weight_decay": adamw_mode}
    return Ours("Adam", {**hypers, **mode, **how})


@convention
def DeepSpeedCPUAdagrad(
    lr: Rate = 1e-2, eps: float = 1e-10, weight_decay: Rate = 0.0, amsgrad: bool = False,
    **how: Unpack[Beside],
) -> Ours:  # fmt: skip
    """Our Adagrad."""
    refuse(_NONE, amsgrad=amsgrad)
    return Ours("Adagrad", {"lr": lr, "eps": eps, "weight_decay": weight_decay, **how})


@convention
def DeepSpeedCPULion(
    lr: Rate = 1e-3, betas: Betas = (0.9, 0.999), weight_decay: Rate = 0.0, **how: Unpack[Beside]
) -> Ours:
    """Our Lion, but that theirs moves where the direction is 0 too."""
    return Ours("Lion", {"lr": lr, "betas": betas, "weight_decay": weight_decay, **how})
