"""Checkpoints of a torch run in one file: `fusedstep.save` and `load` in tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fusedstep import files
from fusedstep.files import Saved

__all__ = ["load", "save"]


def __dir__() -> list[str]:
    return sorted(__all__)


def save(
    path: str | os.PathLike[str], /, *, metadata: Mapping[Any, Any] | None = None, **named: Any
) -> None:
    """Writes a training run to one safetensors file that cannot be lost half way.

    `fusedstep.save`, which takes all of these too: it says how files are written, and what else
    may be saved.

    Args:
        path: of the file. One that is there is replaced.
        metadata: a dict of your own, about the run (default None).
        **named: what to save, by names of yours: modules (their `state_dict`; tensors that share
            memory are written each), optimizers and learning-rate schedulers of ours and of torch,
            `GradScaler`, `torch.Generator`, tensors on any device, numbers, strings, and dicts,
            lists and tuples of these. Sharded tensors go to `torch.distributed.checkpoint`.

    Raises:
        TypeError, ValueError, OSError, RuntimeError: as `fusedstep.save`.

    Example:
        >>> import os, tempfile, torch
        >>> import fusedstep.torch as fst
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fst.AdamW(model.parameters(), lr=0.1, ema=0.99)
        >>> sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 100)
        >>> model(torch.ones(2)).backward()
        >>> opt.step()
        >>> sched.step()
        >>> path = os.path.join(tempfile.mkdtemp(), "run.safetensors")
        >>> fst.save(path, model=model, optimizer=opt, scheduler=sched, epoch=3)
        >>> saved = fst.load(path, model=model, optimizer=opt, scheduler=sched)
        >>> saved["epoch"], saved.step, sched.last_epoch
        (3, 1, 1)
    """
    files.save(path, metadata=metadata, **named)


def load(path: str | os.PathLike[str], /, **named: Any) -> Saved:
    """Reads a file of `save`, and fills the objects that it is given, in place.

    As `fusedstep.load`, and what is not given is returned in tensors, on the CPU.

    Args:
        path: of the file, of `fusedstep.torch.save` or `fusedstep.save`.
        **named: objects to fill, by the names that they were saved under, in any order. Modules
            must have the tensors that the file has, with their shapes and dtypes, on whatever
            device.

    Returns:
        All names of the file, with the given objects under theirs, and the rest as in the file:
        `load(path)["model"]` is a module's state_dict.

    Raises:
        TypeError, ValueError: the file is not whole, or not of `save`, or does not fit what is
            given; nothing has changed then.
        OSError: the file cannot be opened.

    Example:
        >>> import os, tempfile, torch
        >>> import fusedstep.torch as fst
        >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
        >>> fst.save(path, w=torch.ones(2, dtype=torch.bfloat16))
        >>> fst.load(path)["w"]
        tensor([1., 1.], dtype=torch.bfloat16)
    """
    return files.filled(path, named, files.as_tensor)
