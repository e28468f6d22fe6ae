"""`fusedstep convert`: a checkpoint's file read, told in words, and written for another program."""

from __future__ import annotations

import inspect
import os
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import fusedstep as fs
from fusedstep import convert
from fusedstep.convert._common import Converted, spec_of

# What a file's name ends with, where that says whose it is.
_ENDINGS = {
    ".keras": "keras",
    ".h5": "keras",
    ".hdf5": "keras",
    ".pdopt": "paddle",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
}
LIBRARIES = tuple(
    name.removeprefix("from_") for name in convert.__all__ if name.startswith("from_")
)
TARGETS = ("fusedstep", "torch")


def library_of(path: str) -> str:
    """Whose checkpoint a path is; ValueError where its name does not say so."""
    if not os.path.exists(path):
        raise FileNotFoundError(2, "No such file or folder", path)
    found = _ENDINGS.get(os.path.splitext(path)[1].lower())
    if os.path.isdir(path) and "deepspeed" in LIBRARIES:
        found = "deepspeed"
    if found is None:
        raise ValueError(f"--from must say whose {path} is, one of {', '.join(LIBRARIES)}")
    return found


def read(path: str, library: str | None, arguments: Mapping[str, Any]) -> Converted:
    """The checkpoint, of the library that is named or that the path names."""
    library = library or library_of(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is assumed, which is printed
        found: Converted = getattr(convert, f"from_{library}")(path, **arguments)
        return found


def write(path: str, target: str, state: Converted) -> str:
    """Writes a checkpoint; says for whom it is."""
    name, ours = state.optimizer, bool(state.convention)
    content: Any = dict(state)
    whom = f"{path}, for fusedstep.{name} and fusedstep.torch.{name}"
    if target == "torch":
        ours = ours or not _in_torch(name)
        content = convert.to_torch(state, ours=ours)
        whom = f"{path}, for fusedstep.torch.{name}"
        options = ", ".join(state.convention) or f"class {name}"
        whom += f"; torch.optim has no {options}" if ours else f" and torch.optim.{name}"
    if os.path.splitext(path)[1] == ".safetensors":
        fs.save(path, optimizer=_Held(content))
    elif target == "torch":
        import torch

        torch.save(content, path)
    else:
        raise ValueError(f"--output must end with .safetensors for --to {target}, got {path}")
    return whom


def _in_torch(name: str) -> bool:
    import torch

    return hasattr(torch.optim, name)


class _Held:
    """A state_dict that files take for an optimizer's."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def state_dict(self) -> Any:
        return self._state

    def load_state_dict(self, state: Any) -> None:
        self._state = state


def told(path: str, state: Converted) -> Iterator[str]:
    """What a checkpoint is, in lines of at most 80 columns."""
    spec = spec_of(state.optimizer)
    arrays = [one for entry in state["state"].values() for one in entry.values()]
    arrays = [one for one in arrays if hasattr(one, "nbytes") and one.ndim is not None]
    keys = list(dict.fromkeys(key for entry in state["state"].values() for key in entry))
    n = sum(len(group["params"]) for group in state["param_groups"])
    yield from line("checkpoint", f"{os.path.basename(path)}, of {state.library}")
    yield from line("optimizer", f"{state.theirs}, our {state.optimizer}")
    yield from line("step", str(state.step))
    kept = ", ".join(key for key in keys if key not in spec.scalars) or "none"
    size = sum(one.nbytes for one in arrays)
    yield from line("tensors", f"{len(arrays)} of {n} parameters, {size:,} bytes: {kept}")
    yield from line("convention", options(state.convention) or "torch's")
    for k, group in enumerate(state["param_groups"]):
        shown = {name: value for name, value in group.items() if name in spec.table}
        shown = {k: v for k, v in shown.items() if k not in spec.beyond_torch}
        rate = {} if "lr" in group else {"lr": "not in the file"}
        label = "arguments" if len(state["param_groups"]) == 1 else f"group {k}"
        yield from line(label, options({**shown, **rate}))
    if state.at_step:
        yield from line("each step", options(state.at_step))
    if state.masters:
        yield from line("masters", f"{len(state.masters)} parameters in float32")
    if state.assumed:
        taken = inspect.signature(getattr(convert, f"from_{state.library}")).parameters.values()
        names = [one.name for one in taken]
        any_name = any(one.kind is one.VAR_KEYWORD for one in taken)
        may_be_said = any_name or any(name in names for name in state.assumed)
        hint = "; --set NAME=VALUE says others" if may_be_said else ""
        yield from line("assumed", f"{options(state.assumed)}{hint}")


def options(values: Mapping[str, Any]) -> str:
    """Hyperparameters as a call has them."""
    return ", ".join(f"{name}={value}" for name, value in values.items())


def line(label: str, text: str) -> list[str]:
    """A label and what it is, over as many lines as it takes."""
    return textwrap.wrap(
        text,
        80,
        initial_indent=f"{label:12}",
        subsequent_indent=" " * 12,
        break_long_words=True,
        break_on_hyphens=False,
    )
