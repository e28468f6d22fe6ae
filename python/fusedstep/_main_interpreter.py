"""Imported only where the compiled core can be: in a process's main interpreter."""

import importlib
from contextlib import suppress

for _name in ("_interpreters", "_xxsubinterpreters"):  # since Python 3.13, and before
    with suppress(ModuleNotFoundError):
        _known = importlib.import_module(_name)
        if _known.get_current() != _known.get_main():
            raise ImportError(
                "fusedstep must be imported in the main interpreter, got a sub-interpreter: like"
                " NumPy it works in one interpreter of a process; use threads or processes"
            )
        break
