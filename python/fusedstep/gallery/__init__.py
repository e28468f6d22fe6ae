"""The lecture in figures: `fusedstep gallery -o DIR` writes them and a page to read.

Each figure is drawn by one short function, on the library's own kernels, and the page shows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedstep.gallery.figures import FIGURES, Entry

__all__ = ["FIGURES", "Entry", "draw", "write"]


def __dir__() -> list[str]:
    return sorted(__all__)


_NEEDED = ("matplotlib", "ml_dtypes", "pygments", "scipy", "sklearn", "threadpoolctl")


def draw(name: str) -> Any:
    """The matplotlib Figure of one entry.

    Args:
        name: of one of `FIGURES`.

    Raises:
        ValueError: there is no such figure.
        ModuleNotFoundError: a package of the extra `gallery` is not installed.

    Example:
        >>> from fusedstep import gallery
        >>> [len(ax.lines) for ax in gallery.draw("ravine").axes]
        [4, 3]
    """
    _check_installed()
    for entry in FIGURES:
        if entry.name == name:
            return entry.draw()
    raise ValueError(f"name must be one of {[entry.name for entry in FIGURES]}, got {name!r}")


def write(folder: str | os.PathLike[str], tick: Callable[[str], object] = lambda name: None) -> str:
    """Writes every figure as a PNG, and `index.html`, which shows them with captions and code.

    Args:
        folder: where to; made if it is not there. Files in it keep, but for those of these names.
        tick: called with each figure's name before it is drawn.

    Returns:
        The path of `index.html`.

    Raises:
        TypeError, ValueError: folder is no path, or empty.
        OSError: the folder or a file in it cannot be made or written to; found before anything is
            drawn.
        ModuleNotFoundError: a package of the extra `gallery` is not installed.
    """
    from fusedstep.gallery.page import page

    _check_installed()
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {folder!r}")
    if not str(folder):
        raise ValueError("folder must be a path, got ''")
    place = Path(folder)
    pictures = {entry.name: place / f"{entry.name}.png" for entry in FIGURES}
    index = place / "index.html"
    for path in [*place.parents, place]:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"cannot write to {place}: {path} is a file")
    for path in [*pictures.values(), index]:
        if path.is_dir():
            raise IsADirectoryError(f"cannot write {path}: it is a folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"cannot write {path}: permission denied")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"cannot make {place}: {error.strerror}") from error
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {place}: permission denied")
    for entry in FIGURES:
        tick(entry.name)
        entry.draw().savefig(pictures[entry.name], dpi=110)
    index.write_text(page(FIGURES), encoding="utf-8")
    return str(index)


def _check_installed() -> None:
    import importlib.util

    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f"the gallery needs {name}: pip install 'fusedstep[gallery]'", name=name
            )
