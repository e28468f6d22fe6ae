"""Drop-in `torch.optim` classes on fusedstep's kernels, flat parameters, steps inside backward.

    from fusedstep.torch import AdamW        # instead of: from torch.optim import AdamW

There is a class for each of `fusedstep`'s optimizers. Needs torch >= 2.4.
"""

from typing import Any as _Any

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _error:
    if _error.name != "torch":  # one that is there, and broken
        raise
    raise ModuleNotFoundError(
        "fusedstep.torch needs torch: pip install 'fusedstep[torch]'", name="torch"
    ) from None

from fusedstep import optimizers as _neutral
from fusedstep.torch.add import add_
from fusedstep.torch.backward import step_in_backward
from fusedstep.torch.files import load, save
from fusedstep.torch.flat import Flat, flatten_
from fusedstep.torch.lr_scheduler import LRScheduler
from fusedstep.torch.optimizers import Optimizer
from fusedstep.torch.optimizers import drop_in as _drop_in

_classes = {name: _drop_in(getattr(_neutral, name)) for name in _neutral.NAMES}
globals().update(_classes)

__all__ = [
    "Flat",
    "LRScheduler",
    "Optimizer",
    "add_",
    "flatten_",
    "load",
    "save",
    "step_in_backward",
    *_classes,
]


def __getattr__(name: str) -> _Any:  # for type checkers, which cannot see the classes above
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
