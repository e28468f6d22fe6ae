"""Optimizer updates for large flat parameter buffers: one SIMD sweep over memory per step."""

from fusedstep import schedules
from fusedstep._runtime import (
    huge_pages,
    info,
    isa,
    num_threads,
    set_huge_pages,
    set_isa,
    set_num_threads,
    usable_isas,
)
from fusedstep._version import __version__
from fusedstep.buffers import FlatBuffer
from fusedstep.optimizers import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Group,
    Lion,
    NAdam,
    Optimizer,
    ParamGroup,
    RAdam,
    RMSprop,
    Rprop,
    StepReport,
)

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "FlatBuffer",
    "Group",
    "Lion",
    "NAdam",
    "Optimizer",
    "ParamGroup",
    "RAdam",
    "RMSprop",
    "Rprop",
    "StepReport",
    "__version__",
    "huge_pages",
    "info",
    "isa",
    "num_threads",
    "schedules",
    "set_huge_pages",
    "set_isa",
    "set_num_threads",
    "usable_isas",
]
