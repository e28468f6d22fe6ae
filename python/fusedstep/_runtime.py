"""Instruction set, threads and pages of the kernels: chosen at import, changeable after."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from typing import Any

import numpy as np

from fusedstep import _core, _gpu
from fusedstep._version import __version__

_THP = "/sys/kernel/mm/transparent_hugepage/enabled"


def isa() -> str:
    """The instruction set whose kernels run: `scalar`, `avx2`, `avx512` or `neon`."""
    return _core.isa()


def usable_isas() -> list[str]:
    """The instruction sets that this build has and this machine can run, slowest first."""
    return _core.usable_isas()


def set_isa(name: str) -> None:
    """Runs the kernels of instruction set `name` from now on. Results do not change by a bit.

    `FUSEDSTEP_ISA` in the environment does the same before import.

    Raises:
        ValueError: `name` is not one of `usable_isas()`.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    _core.set_isa(name)


def num_threads() -> int:
    """The number of threads a step may use, the caller's included.

    By default the cores this process may use (affinity mask, cgroup quota) divided by
    `LOCAL_WORLD_SIZE`; `FUSEDSTEP_NUM_THREADS` in the environment overrides it.
    """
    return _core.num_threads()


def set_num_threads(n: int) -> None:
    """Lets a step use up to `n` threads. Results do not change by a bit.

    Raises:
        ValueError: `n` is not an integer from 1 to 4096.
    """
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n must be an integer, got {n!r}")
    if not 1 <= n <= _core.MAX_THREADS:
        raise ValueError(f"n must be an integer from 1 to {_core.MAX_THREADS}, got {n}")
    _core.set_num_threads(n.__index__())


def _huge_pages_from_environment() -> bool:
    text = os.environ.get("FUSEDSTEP_HUGE_PAGES") or "1"
    if text not in ("0", "1"):
        raise ValueError(f"FUSEDSTEP_HUGE_PAGES must be 0 or 1, got {text!r}")
    return text == "1"


_huge_pages = _huge_pages_from_environment()


def huge_pages() -> bool:
    """Whether new buffers of 4 MiB and more ask for transparent huge pages."""
    return _huge_pages


def set_huge_pages(enabled: bool) -> None:
    """Turns the request for huge pages on or off for buffers made from now on.

    `FUSEDSTEP_HUGE_PAGES=0` in the environment does the same before import.
    """
    global _huge_pages
    if not isinstance(enabled, bool | np.bool_):
        raise TypeError(f"enabled must be True or False, got {enabled!r}")
    _huge_pages = bool(enabled)


def _system_huge_pages() -> str:
    """The kernel's own setting: `always`, `madvise`, `never`, or `unavailable`."""
    try:
        with open(_THP) as file:
            return file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return "unavailable"


def _version_of(distribution: str) -> str | None:
    import importlib.metadata  # which takes longer to import than all of this package

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def info() -> dict[str, Any]:
    """Instruction sets, threads, pages, modules and versions, as `fusedstep info` prints them.

    `cuda` is False for a build without CUDA, else a dict: `architectures`, for which it was
    compiled, and `devices`, which it sees, with name, compute capability, bytes and
    multiprocessors. `xla_module` is whether the build has what `fusedstep.jax` needs.
    """
    return {
        "version": __version__,
        "isa": isa(),
        "isas_compiled": _core.compiled_isas(),
        "isas_usable": usable_isas(),
        "threads": num_threads(),
        "huge_pages": huge_pages(),
        "huge_pages_system": _system_huge_pages(),
        "cuda": _gpu.info(),
        "xla_module": importlib.util.find_spec("fusedstep._jax") is not None,
        "cpu": _cpu_model(),
        "platform": platform.platform(),
        "compiler": _core.COMPILER,
        "python": sys.version.split()[0],
        "numpy": _version_of("numpy"),
        "ml_dtypes": _version_of("ml_dtypes"),
        "torch": _version_of("torch"),
        "jax": _version_of("jax"),
    }


# A wrong FUSEDSTEP_ISA or FUSEDSTEP_NUM_THREADS is an error here, at import, not in the first step.
_core.isa()
_core.num_threads()
