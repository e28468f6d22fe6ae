"""The optional CUDA module: whether this build has it, and which devices it sees."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

_MISSING = (
    "this build of fusedstep has no CUDA: install it from source with"
    ' CMAKE_ARGS="-DFUSEDSTEP_CUDA=ON" in the environment'
)


def module() -> ModuleType | None:
    """`fusedstep._cuda`, or None where this build has none."""
    try:
        return importlib.import_module("fusedstep._cuda")
    except ModuleNotFoundError as error:
        if error.name != "fusedstep._cuda":
            raise
        return None


def needed(label: str, device: Any = "type 2 of DLPack") -> ModuleType:
    """`fusedstep._cuda`; ValueError about `label`, which is on `device`, where there is none."""
    found = module()
    why = _MISSING if found is None else "CUDA finds no driver or no device here"
    if found is None or not found.devices():
        raise ValueError(f"{label} must be in CPU memory, got device {device}: {why}")
    return found


def info() -> dict[str, Any] | bool:
    """The module's line in `fusedstep info`: False, or its architectures and devices."""
    found = module()
    if found is None:
        return False
    return {"architectures": _architectures(found.ARCHITECTURES), "devices": found.devices()}


def _architectures(cmake: str) -> list[str]:
    """CMake's list of architectures by NVIDIA's names: sm_ is machine code, compute_ PTX."""
    names = []
    for word in cmake.split():
        number, _, kind = word.partition("-")
        if not number.rstrip("af").isdigit():  # all, all-major
            names.append(word)
            continue
        if kind != "virtual":
            names.append(f"sm_{number}")
        if kind != "real":
            names.append(f"compute_{number}")
    return names
