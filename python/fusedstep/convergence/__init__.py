"""When and how fast optimizers converge: theory, measurements, and landscapes to watch them on."""

from fusedstep.convergence import landscapes
from fusedstep.convergence.curvature import Curvature, curvature, safe_lr
from fusedstep.convergence.landscapes import Landscape
from fusedstep.convergence.quadratic import MomentumOptimum, Quadratic, Regime
from fusedstep.convergence.range_test import RangeTest, lr_range_test
from fusedstep.convergence.trajectories import Trajectory, trajectory

__all__ = [
    "Curvature",
    "Landscape",
    "MomentumOptimum",
    "Quadratic",
    "RangeTest",
    "Regime",
    "Trajectory",
    "curvature",
    "landscapes",
    "lr_range_test",
    "safe_lr",
    "trajectory",
]


def __dir__() -> list[str]:
    return sorted(__all__)
