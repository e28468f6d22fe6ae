"""Optimizer updates for large flat parameter buffers: one SIMD sweep over memory per step."""

import importlib as _importlib
import typing as _typing

from fusedstep import _main_interpreter as _main_interpreter  # the first: the core hangs elsewhere
from fusedstep import optimizers as _optimizers
from fusedstep._groups import Group, ParamGroup
from fusedstep._optimizer import Optimizer, StepReport
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

if _typing.TYPE_CHECKING:
    import fusedstep.conventions as conventions
    import fusedstep.convergence as convergence
    import fusedstep.convert as convert
    import fusedstep.schedules as schedules
    from fusedstep import jax as jax  # not in __all__, as torch: `import *` works without them
    from fusedstep import torch as torch
    from fusedstep.files import Saved, load, save
    from fusedstep.optimizers import *  # noqa: F403  # what the next line takes

globals().update({name: getattr(_optimizers, name) for name in _optimizers.NAMES})

__all__ = [
    *_optimizers.NAMES,
    "FlatBuffer",
    "Group",
    "Optimizer",
    "ParamGroup",
    "Saved",
    "StepReport",
    "__version__",
    "conventions",
    "convergence",
    "convert",
    "huge_pages",
    "info",
    "isa",
    "load",
    "num_threads",
    "save",
    "schedules",
    "set_huge_pages",
    "set_isa",
    "set_num_threads",
    "usable_isas",
]


if not _typing.TYPE_CHECKING:  # which would take it for every name, a misspelt one too

    def __getattr__(name: str) -> _typing.Any:
        # What takes as long to import as all that a step needs.
        if name in ("conventions", "convergence", "convert", "jax", "schedules", "torch"):
            return _importlib.import_module(f"fusedstep.{name}")
        if name in ("Saved", "load", "save"):
            return getattr(_importlib.import_module("fusedstep.files"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "jax", "torch"})
